// The model: a decoder-only transformer over bytes, in plain LibTorch. Nothing in here knows about
// sharding.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "gpt_config.hpp"

/// Causal multi-head self-attention: [batch, tokens, d_model] -> the same shape.
struct AttentionImpl : torch::nn::Module {
  explicit AttentionImpl(const GptConfig& config)
      : heads(config.heads),
        qkv(register_module("qkv", torch::nn::Linear(config.d_model, 3 * config.d_model))),
        proj(register_module("proj", torch::nn::Linear(config.d_model, config.d_model))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto batch = x.size(0), tokens = x.size(1), width = x.size(2);
    // [batch, tokens, 3, heads, head width] -> three of [batch, heads, tokens, head width]
    const auto parts =
        qkv(x).view({batch, tokens, 3, heads, width / heads}).permute({2, 0, 3, 1, 4});
    const auto mixed =
        at::scaled_dot_product_attention(parts[0], parts[1], parts[2], /*attn_mask=*/{},
                                         /*dropout_p=*/0.0, /*is_causal=*/true);
    return proj(mixed.transpose(1, 2).reshape({batch, tokens, width}));
  }

  std::int64_t heads;
  torch::nn::Linear qkv, proj;
};
TORCH_MODULE(Attention);

/// The position-wise part of a block: d_model -> 4 d_model -> d_model with GELU between.
struct MlpImpl : torch::nn::Module {
  explicit MlpImpl(const GptConfig& config)
      : up(register_module("up", torch::nn::Linear(config.d_model, 4 * config.d_model))),
        proj(register_module("proj", torch::nn::Linear(4 * config.d_model, config.d_model))) {}

  torch::Tensor forward(const torch::Tensor& x) { return proj(at::gelu(up(x), "tanh")); }

  torch::nn::Linear up, proj;
};
TORCH_MODULE(Mlp);

/// One pre-LayerNorm transformer block; the trainer makes each block a unit.
struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(const GptConfig& config)
      : norm1(register_module("norm1",
                              torch::nn::LayerNorm(torch::nn::LayerNormOptions({config.d_model})))),
        attention(register_module("attention", Attention(config))),
        norm2(register_module("norm2",
                              torch::nn::LayerNorm(torch::nn::LayerNormOptions({config.d_model})))),
        mlp(register_module("mlp", Mlp(config))) {}

  torch::Tensor forward(torch::Tensor x) {
    x = x + attention(norm1(x));
    return x + mlp(norm2(x));
  }

  torch::nn::LayerNorm norm1;
  Attention attention;
  torch::nn::LayerNorm norm2;
  Mlp mlp;
};
TORCH_MODULE(Block);

/// The whole model: int64 tokens [batch, tokens <= seq] -> logits [batch, tokens, 256].
/// Its initial values depend on LibTorch's global generator only (torch::manual_seed).
struct GptImpl : torch::nn::Module {
  explicit GptImpl(const GptConfig& config)
      : seq(config.seq),
        token_embedding(
            register_module("token_embedding", torch::nn::Embedding(kVocabulary, config.d_model))),
        position_embedding(register_module("position_embedding",
                                           torch::nn::Embedding(config.seq, config.d_model))),
        blocks(register_module("blocks", torch::nn::ModuleList())),
        norm(register_module("norm",
                             torch::nn::LayerNorm(torch::nn::LayerNormOptions({config.d_model})))) {
    for (std::int64_t layer = 0; layer < config.layers; ++layer) blocks->push_back(Block(config));
    if (!config.tie_head) {
      head = register_module(
          "head",
          torch::nn::Linear(torch::nn::LinearOptions(config.d_model, kVocabulary).bias(false)));
    }
    initialize(config.layers);
  }

  torch::Tensor forward(const torch::Tensor& tokens) {
    TORCH_CHECK(tokens.size(1) <= seq, "the model reads at most ", seq, " tokens, not ",
                tokens.size(1));
    auto x = token_embedding(tokens) +
             position_embedding(torch::arange(tokens.size(1), tokens.options()));
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    x = norm(x);
    return head.is_empty() ? at::linear(x, token_embedding->weight) : head(x);
  }

  std::int64_t seq;
  torch::nn::Embedding token_embedding, position_embedding;
  torch::nn::ModuleList blocks;
  torch::nn::LayerNorm norm;
  torch::nn::Linear head{nullptr};

 private:
  // GPT-2's rule: normal(0, 0.02) weights and zero biases; the projections that write to the
  // residual stream are smaller by sqrt(2 layers), so that its variance does not grow with depth.
  void initialize(std::int64_t layers) {
    torch::NoGradGuard no_grad;
    for (auto& item : named_parameters()) {
      const std::string& name = item.key();
      auto& parameter = item.value();
      if (name.find("norm") != std::string::npos) continue;  // LayerNorm: ones and zeros already
      if (parameter.dim() < 2) {
        parameter.zero_();
      } else {
        const bool residual = name.ends_with("proj.weight");
        parameter.normal_(0.0,
                          residual ? 0.02 / std::sqrt(2.0 * static_cast<double>(layers)) : 0.02);
      }
    }
  }
};
TORCH_MODULE(Gpt);
