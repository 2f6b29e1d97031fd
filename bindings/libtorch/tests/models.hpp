// A module that several programs shard. In a namespace of its own, so that a program can have
// another one of that name.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace harness::models {

/// A residual block; no length is a multiple of another.
struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(std::int64_t width)
      : norm(register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})))),
        up(register_module("up", torch::nn::Linear(width, 3 * width + 1))),
        down(register_module("down", torch::nn::Linear(3 * width + 1, width))) {}
  at::Tensor forward(const at::Tensor& x) { return x + down(torch::gelu(up(norm(x)))); }
  torch::nn::LayerNorm norm;
  torch::nn::Linear up, down;
};
TORCH_MODULE(Block);

}  // namespace harness::models
