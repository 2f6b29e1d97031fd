// The models that bench/ trains, in plain LibTorch; bench/peers has the same in PyTorch. Names, order of parameters and
// arithmetic are the same in both.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>

/// A GPT of 33.7 million parameters: 8 pre-norm blocks of width 512, 8 heads, 8192 tokens, context 256, untied head.
inline constexpr std::int64_t kWidth = 512, kHeads = 8, kBlocks = 8, kVocabulary = 8192, kContext = 256;

struct AttentionImpl : torch::nn::Module {
  AttentionImpl()
      : qkv(register_module("qkv", torch::nn::Linear(kWidth, 3 * kWidth))),
        out(register_module("out", torch::nn::Linear(kWidth, kWidth))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto batch = x.size(0), tokens = x.size(1);
    const auto parts =
        qkv(x).view({batch, tokens, 3, kHeads, kWidth / kHeads}).permute({2, 0, 3, 1, 4});
    const auto mixed = at::scaled_dot_product_attention(parts[0], parts[1], parts[2], {}, 0.0,
                                                        /*is_causal=*/true);
    return out(mixed.transpose(1, 2).reshape({batch, tokens, kWidth}));
  }

  torch::nn::Linear qkv, out;
};
TORCH_MODULE(Attention);

struct MlpImpl : torch::nn::Module {
  MlpImpl()
      : up(register_module("up", torch::nn::Linear(kWidth, 4 * kWidth))),
        down(register_module("down", torch::nn::Linear(4 * kWidth, kWidth))) {}

  torch::Tensor forward(const torch::Tensor& x) { return down(at::gelu(up(x))); }

  torch::nn::Linear up, down;
};
TORCH_MODULE(Mlp);

/// A unit.
struct BlockImpl : torch::nn::Module {
  BlockImpl()
      : norm1(register_module("norm1", layer_norm())),
        attn(register_module("attn", Attention())),
        norm2(register_module("norm2", layer_norm())),
        mlp(register_module("mlp", Mlp())) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto mixed = x + attn(norm1(x));
    return mixed + mlp(norm2(mixed));
  }

  static torch::nn::LayerNorm layer_norm() {
    return torch::nn::LayerNorm(torch::nn::LayerNormOptions({kWidth}));
  }

  torch::nn::LayerNorm norm1;
  Attention attn;
  torch::nn::LayerNorm norm2;
  Mlp mlp;
};
TORCH_MODULE(Block);

/// Tokens [batch, tokens] -> logits [batch, tokens, kVocabulary].
struct GptImpl : torch::nn::Module {
  GptImpl()
      : tok(register_module("tok", torch::nn::Embedding(kVocabulary, kWidth))),
        pos(register_module("pos", torch::nn::Embedding(kContext, kWidth))) {
    for (std::int64_t i = 0; i < kBlocks; ++i) {
      blocks.push_back(register_module("block" + std::to_string(i), Block()));
    }
    norm = register_module("norm", BlockImpl::layer_norm());
    head = register_module(
        "head", torch::nn::Linear(torch::nn::LinearOptions(kWidth, kVocabulary).bias(false)));
  }

  torch::Tensor forward(const torch::Tensor& tokens) {
    auto x = tok(tokens) + pos(torch::arange(tokens.size(1)));
    for (auto& block : blocks) x = block(x);
    return head(norm(x));
  }

  torch::nn::Embedding tok, pos;
  std::vector<Block> blocks;
  torch::nn::LayerNorm norm{nullptr};
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Gpt);

/// 200 units of a Linear(16, 16) each, with tanh between.
inline constexpr std::int64_t kTinyUnits = 200, kTinyWidth = 16, kTinyBatch = 8;

/// A unit.
struct LayerImpl : torch::nn::Module {
  LayerImpl() : linear(register_module("linear", torch::nn::Linear(kTinyWidth, kTinyWidth))) {}
  torch::Tensor forward(const torch::Tensor& x) { return linear(x).tanh(); }
  torch::nn::Linear linear;
};
TORCH_MODULE(Layer);

struct TinyImpl : torch::nn::Module {
  TinyImpl() {
    for (std::int64_t i = 0; i < kTinyUnits; ++i) {
      layers.push_back(register_module("layer" + std::to_string(i), Layer()));
    }
  }
  torch::Tensor forward(torch::Tensor x) {
    for (auto& layer : layers) x = layer(x);
    return x;
  }
  std::vector<Layer> layers;
};
TORCH_MODULE(Tiny);
