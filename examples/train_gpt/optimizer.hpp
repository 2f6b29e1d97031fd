// AdamW for a GPT: which parameters decay, and the learning rate of each step.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <fsdp/torch.hpp>
#include <map>
#include <numbers>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "options.hpp"

/// The original shape of each parameter, by name. Taken before sharding: a shard is
/// one-dimensional.
using Shapes = std::map<std::string, std::vector<std::int64_t>>;

inline Shapes shapes_of(const torch::nn::Module& module) {
  Shapes shapes;
  for (const auto& item : module.named_parameters())
    shapes[item.key()] = item.value().sizes().vec();
  return shapes;
}

/// Whether weight decay applies: to matrices that are no embedding; not to biases and LayerNorms.
inline bool decays(const std::string& name, const std::vector<std::int64_t>& shape) {
  return shape.size() >= 2 && name.find("embedding") == std::string::npos;
}

/// AdamW on the parameters: torch's, or the engine's own on the shards.
using TrainOptimizer = std::variant<torch::optim::AdamW, fsdp::FusedOptimizer>;

/// Sets what the command line says in every parameter group, whatever a checkpoint held. Group 0
/// decays. The engine's optimizer keeps what it was made with.
inline void configure(TrainOptimizer& optimizer, const Options& o) {
  auto* adamw = std::get_if<torch::optim::AdamW>(&optimizer);
  if (adamw == nullptr) return;
  for (std::size_t group = 0; group < adamw->param_groups().size(); ++group) {
    static_cast<torch::optim::AdamWOptions&>(adamw->param_groups()[group].options())
        .betas({o.betas.first, o.betas.second})
        .eps(o.eps)
        .weight_decay(group == 0 ? o.weight_decay : 0.0);
  }
}

/// Torch's AdamW over `parameters` (sharded or not) in two groups, by the original `shapes`.
inline TrainOptimizer make_torch_adamw(
    const torch::OrderedDict<std::string, torch::Tensor>& parameters, const Shapes& shapes,
    const Options& o) {
  std::vector<torch::Tensor> with_decay, without;
  for (const auto& item : parameters) {
    (decays(item.key(), shapes.at(item.key())) ? with_decay : without).push_back(item.value());
  }
  TrainOptimizer optimizer(
      std::in_place_type<torch::optim::AdamW>,
      std::vector<torch::optim::OptimizerParamGroup>{
          {with_decay, std::make_unique<torch::optim::AdamWOptions>(o.lr)},
          {without, std::make_unique<torch::optim::AdamWOptions>(o.lr)}},
      torch::optim::AdamWOptions(o.lr));
  configure(optimizer, o);
  return optimizer;
}

/// The engine's AdamW with the same options. Collective.
template <class Sharded>
TrainOptimizer make_fused_adamw(const Sharded& model, const Shapes& shapes, const Options& o) {
  fsdp::AdamWConfig config;
  config.lr = o.lr;
  config.beta1 = o.betas.first;
  config.beta2 = o.betas.second;
  config.eps = o.eps;
  config.weight_decay = o.weight_decay;
  fsdp::FusedOptimizer optimizer = model.adamw(config);
  for (const auto& name : model.named_parameters().keys()) {
    if (!decays(name, shapes.at(name))) optimizer.set_param_options(name, 1.0, 0.0);
  }
  return TrainOptimizer(std::move(optimizer));
}

inline void step_with(TrainOptimizer& optimizer) {
  std::visit([](auto& any) { any.step(); }, optimizer);
}

/// Bytes of AdamW's running averages on this rank, of the parameters named `names`.
inline std::uint64_t state_bytes(TrainOptimizer& optimizer, const std::vector<std::string>& names) {
  std::uint64_t bytes = 0;
  const auto add = [&](const torch::Tensor& tensor) {
    if (tensor.defined()) bytes += tensor.nbytes();
  };
  if (auto* adamw = std::get_if<torch::optim::AdamW>(&optimizer)) {
    for (const auto& [parameter, state] : adamw->state()) {
      const auto& adam = static_cast<const torch::optim::AdamWParamState&>(*state);
      for (const auto& tensor : {adam.exp_avg(), adam.exp_avg_sq(), adam.max_exp_avg_sq()}) {
        add(tensor);
      }
    }
  } else {
    const auto& fused = std::get<fsdp::FusedOptimizer>(optimizer);
    for (const auto& name : names) {
      for (const char* state : {"exp_avg", "exp_avg_sq"}) add(fused.state(name, state));
    }
  }
  return bytes;
}

/// The learning rate of `step` (the first is 1): a linear warm-up to lr, then half a cosine down to
/// min_lr at the last step.
inline double learning_rate(const Options& o, std::int64_t step) {
  if (step <= o.warmup) return o.lr * static_cast<double>(step) / static_cast<double>(o.warmup);
  const double done =
      static_cast<double>(step - o.warmup) / static_cast<double>(o.steps - o.warmup);
  return o.min_lr +
         0.5 * (o.lr - o.min_lr) * (1.0 + std::cos(std::numbers::pi * std::min(done, 1.0)));
}

inline void set_learning_rate(TrainOptimizer& optimizer, double lr) {
  if (auto* adamw = std::get_if<torch::optim::AdamW>(&optimizer)) {
    for (auto& group : adamw->param_groups()) group.options().set_lr(lr);
  } else {
    std::get<fsdp::FusedOptimizer>(optimizer).set_lr(lr);
  }
}
