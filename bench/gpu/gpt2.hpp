// GPT-2 in plain LibTorch, and what it is trained on; bench/peers/gpt2.py has the same in PyTorch.
// Parameters and tokens are functions of their numbers, so that both start from the same values
// without files.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

struct Gpt2Config {
  std::int64_t width, layers, heads, context, vocabulary;
};

/// "124m" and "774m" are GPT-2's own; "tiny" is for tests.
inline Gpt2Config gpt2_config(const std::string& name) {
  if (name == "124m") return {768, 12, 12, 1024, 50257};
  if (name == "774m") return {1280, 36, 20, 1024, 50257};
  if (name == "tiny") return {64, 3, 4, 32, 100};
  throw std::runtime_error("--model " + name + ": 124m, 774m or tiny is expected");
}

struct AttentionImpl : torch::nn::Module {
  explicit AttentionImpl(const Gpt2Config& c)
      : heads(c.heads),
        qkv(register_module("qkv", torch::nn::Linear(c.width, 3 * c.width))),
        out(register_module("out", torch::nn::Linear(c.width, c.width))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto batch = x.size(0), tokens = x.size(1), width = x.size(2);
    const auto parts =
        qkv(x).view({batch, tokens, 3, heads, width / heads}).permute({2, 0, 3, 1, 4});
    const auto mixed = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0.0,
                                                        /*is_causal=*/true);
    return out(mixed.transpose(1, 2).reshape({batch, tokens, width}));
  }

  std::int64_t heads;
  torch::nn::Linear qkv, out;
};
TORCH_MODULE(Attention);

/// A unit.
struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(const Gpt2Config& c)
      : norm1(register_module("norm1", layer_norm(c))),
        attn(register_module("attn", Attention(c))),
        norm2(register_module("norm2", layer_norm(c))),
        up(register_module("up", torch::nn::Linear(c.width, 4 * c.width))),
        down(register_module("down", torch::nn::Linear(4 * c.width, c.width))) {}

  torch::Tensor forward(torch::Tensor x) {
    x = x + attn(norm1(x));
    return x + down(at::gelu(up(norm2(x)), "tanh"));
  }

  static torch::nn::LayerNorm layer_norm(const Gpt2Config& c) {
    return torch::nn::LayerNorm(torch::nn::LayerNormOptions({c.width}));
  }

  torch::nn::LayerNorm norm1;
  Attention attn;
  torch::nn::LayerNorm norm2;
  torch::nn::Linear up, down;
};
TORCH_MODULE(Block);

/// Tokens [batch, tokens] -> logits [batch, tokens, vocabulary]; the head is the token embedding.
struct Gpt2Impl : torch::nn::Module {
  explicit Gpt2Impl(const Gpt2Config& c)
      : tok(register_module("tok", torch::nn::Embedding(c.vocabulary, c.width))),
        pos(register_module("pos", torch::nn::Embedding(c.context, c.width))) {
    for (std::int64_t i = 0; i < c.layers; ++i) {
      blocks.push_back(register_module("block" + std::to_string(i), Block(c)));
    }
    norm = register_module("norm", BlockImpl::layer_norm(c));
  }

  torch::Tensor forward(const torch::Tensor& tokens) {
    auto x = tok(tokens) + pos(torch::arange(tokens.size(1), tokens.options()));
    for (auto& block : blocks) x = block(x);
    return at::linear(norm(x), tok->weight);
  }

  torch::nn::Embedding tok, pos;
  std::vector<Block> blocks;
  torch::nn::LayerNorm norm{nullptr};
};
TORCH_MODULE(Gpt2);

/// Numbers in [0, 1) that look like noise: the fractions of 43758.5453 sin(12.9898 i + 78.233
/// salt), in double.
inline torch::Tensor noise(std::int64_t count, std::int64_t salt, torch::Device device) {
  const auto i = torch::arange(count, torch::TensorOptions(torch::kDouble).device(device));
  const auto wild = (i * 12.9898 + 78.233 * static_cast<double>(salt)).sin() * 43758.5453;
  return wild - wild.floor();
}

/// Sets a model's parameters, made on `device`: uniform ones of deviation 0.02; biases are 0,
/// norms' weights 1.
inline void initialize(torch::nn::Module& model, torch::Device device) {
  const torch::NoGradGuard no_grad;
  std::int64_t number = 0;
  for (auto& item : model.named_parameters()) {
    auto& param = item.value();
    ++number;
    if (item.key().ends_with("bias")) {
      param.zero_();
    } else if (param.dim() == 1) {
      param.fill_(1.0);
    } else {
      const double width = 0.02 * 3.4641016151377544;  // of uniform numbers: deviation x sqrt(12)
      param.copy_(((noise(param.numel(), number, device) - 0.5) * width).view(param.sizes()));
    }
  }
}

/// The tokens of a step, [batch, tokens + 1]: small numbers are frequent, so that there is
/// something to learn.
inline torch::Tensor tokens_of(const Gpt2Config& c, std::int64_t step, std::int64_t batch,
                               std::int64_t tokens, torch::Device device) {
  const auto drawn = noise(batch * (tokens + 1), 1000 + step, device).pow(4);
  return (drawn * static_cast<double>(c.vocabulary)).to(torch::kLong).view({batch, tokens + 1});
}
