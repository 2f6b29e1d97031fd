// What fsdp_bench_gpu runs: one training step each, in bfloat16 beside float32 masters, with the
// same AdamW.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <fsdp/torch.hpp>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gpt2.hpp"

/// The command line.
struct Arguments {
  std::string system, model;
  std::int64_t batch = 1, tokens = 16;
  torch::Device device{torch::kCUDA, 0};
};

inline constexpr double kLr = 3e-4, kBeta1 = 0.9, kBeta2 = 0.95, kEps = 1e-8, kDecay = 0.1;

class System {
 public:
  virtual ~System() = default;
  /// Launches a step; returns its loss, on the device.
  virtual torch::Tensor step(const torch::Tensor& tokens) = 0;
  /// Members of a JSON object: what the system knows of its own memory.
  virtual std::string memory() { return ""; }

 protected:
  template <class Model>
  static torch::Tensor loss_of(Model& model, const torch::Tensor& tokens) {
    const auto length = tokens.size(1) - 1;
    const torch::Tensor logits = model.forward(tokens.narrow(1, 0, length));
    return torch::nn::functional::cross_entropy(logits.flatten(0, 1).to(torch::kFloat),
                                                tokens.narrow(1, 1, length).flatten());
  }
};

/// This engine: every block a unit, its own AdamW.
class Sharded final : public System {
 public:
  explicit Sharded(const Arguments& args) : model_(make(args, plan_)), adamw_(optimizer(model_)) {}

  torch::Tensor step(const torch::Tensor& tokens) override {
    model_.zero_grad();
    const torch::Tensor loss = loss_of(model_, tokens);
    loss.backward();
    adamw_.step();
    return loss.detach();
  }

  std::string memory() override {
    if (model_.parameters()[0].is_cpu()) return "";
    const fsdp::CudaStats stats = model_.engine().cuda_stats();
    return ", \"engine_peak_bytes\": " + std::to_string(stats.device_bytes_peak) +
           ", \"plan_bytes\": " + std::to_string(plan_.device_peak_bytes) +
           ", \"overflows\": " + std::to_string(stats.overflows);
  }

 private:
  using Model = fsdp::ShardedModule<Gpt2Impl>;

  static Model make(const Arguments& args, fsdp::Plan& plan) {
    const Gpt2Config config = gpt2_config(args.model);
    Gpt2 module(config);
    initialize(*module, args.device);
    fsdp::ShardOptions options;
    options.comm = fsdp::Communicator::single();
    options.wrap = fsdp::wrap_class("BlockImpl");
    options.device = args.device;
    options.mixed_precision.param_dtype = torch::kBFloat16;
    options.mixed_precision.reduce_dtype = torch::kFloat;
    options.prefetch_order = fsdp::trace_forward(
        module, [&] { module->forward(torch::zeros({1, args.tokens}, torch::kLong)); });
    plan = fsdp::plan(*module, options, /*world_size=*/1, /*optimizer_bytes_per_element=*/8);
    return fsdp::fully_shard(module, options);
  }

  static fsdp::FusedOptimizer optimizer(const Model& model) {
    fsdp::AdamWConfig config;
    config.lr = kLr;
    config.beta1 = kBeta1;
    config.beta2 = kBeta2;
    config.eps = kEps;
    config.weight_decay = kDecay;
    return model.adamw(config);
  }

  fsdp::Plan plan_{};
  Model model_;
  fsdp::FusedOptimizer adamw_;
};

/// LibTorch alone: the model in bfloat16, its masters, gradients and AdamW's averages in float32,
/// everything whole and all parameters at once (foreach and fused operators).
class Plain final : public System {
 public:
  explicit Plain(const Arguments& args) : model_(gpt2_config(args.model)) {
    initialize(*model_, args.device);
    for (const auto& param : model_->parameters()) {
      masters_.push_back(param.detach().to(args.device).clone());
      grads_.push_back(torch::empty_like(masters_.back()));
      averages_.push_back(torch::zeros_like(masters_.back()));
      squares_.push_back(torch::zeros_like(masters_.back()));
      steps_.push_back(torch::zeros({}, torch::TensorOptions(torch::kFloat).device(args.device)));
    }
    model_->to(args.device, torch::kBFloat16);
    params_ = model_->parameters();
  }

  torch::Tensor step(const torch::Tensor& tokens) override {
    {
      const torch::NoGradGuard no_grad;
      at::_foreach_copy_(params_, masters_);
    }
    model_->zero_grad();
    const torch::Tensor loss = loss_of(*model_, tokens);
    loss.backward();
    const torch::NoGradGuard no_grad;
    std::vector<torch::Tensor> narrow;
    for (const auto& param : params_) narrow.push_back(param.grad());
    at::_foreach_copy_(grads_, narrow);
    at::_foreach_add_(steps_, 1);
    at::_fused_adamw_(masters_, grads_, averages_, squares_, /*max_exp_avg_sqs=*/{}, steps_, kLr,
                      kBeta1, kBeta2, kDecay, kEps, /*amsgrad=*/false, /*maximize=*/false);
    return loss.detach();
  }

 private:
  Gpt2 model_;
  std::vector<torch::Tensor> params_, masters_, grads_, averages_, squares_, steps_;
};
