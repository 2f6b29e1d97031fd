// AdamW for a GPT: which parameters decay, and the learning rate of each step.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numbers>
#include <string>
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

/// Sets what the command line says in every parameter group, whatever a checkpoint held. Group 0
/// decays.
inline void configure(torch::optim::AdamW& optimizer, const Options& o) {
  for (std::size_t group = 0; group < optimizer.param_groups().size(); ++group) {
    static_cast<torch::optim::AdamWOptions&>(optimizer.param_groups()[group].options())
        .betas({o.betas.first, o.betas.second})
        .eps(o.eps)
        .weight_decay(group == 0 ? o.weight_decay : 0.0);
  }
}

/// AdamW over `parameters` (sharded or not) in two groups, by the original `shapes`.
inline torch::optim::AdamW make_optimizer(
    const torch::OrderedDict<std::string, torch::Tensor>& parameters, const Shapes& shapes,
    const Options& o) {
  std::vector<torch::Tensor> with_decay, without;
  for (const auto& item : parameters) {
    (decays(item.key(), shapes.at(item.key())) ? with_decay : without).push_back(item.value());
  }
  torch::optim::AdamW optimizer(
      std::vector<torch::optim::OptimizerParamGroup>{
          {with_decay, std::make_unique<torch::optim::AdamWOptions>(o.lr)},
          {without, std::make_unique<torch::optim::AdamWOptions>(o.lr)}},
      torch::optim::AdamWOptions(o.lr));
  configure(optimizer, o);
  return optimizer;
}

/// Bytes of AdamW's running averages on this rank.
inline std::uint64_t state_bytes(torch::optim::AdamW& optimizer) {
  std::uint64_t bytes = 0;
  for (const auto& [parameter, state] : optimizer.state()) {
    const auto& adam = static_cast<const torch::optim::AdamWParamState&>(*state);
    for (const auto& tensor : {adam.exp_avg(), adam.exp_avg_sq(), adam.max_exp_avg_sq()}) {
      if (tensor.defined()) bytes += tensor.nbytes();
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

inline void set_learning_rate(torch::optim::AdamW& optimizer, double lr) {
  for (auto& group : optimizer.param_groups()) group.options().set_lr(lr);
}
