// The engine's own SGD and AdamW on a sharded module: one pass over the shards, without tensors.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "fsdp/torch/gradients.hpp"

namespace fsdp {

/// An optimizer of all parameters of a sharded module, made by its adamw() or sgd(). It does what
/// torch::optim's does, with the arithmetic that fsdp.h documents to the bit, and keeps its state
/// in float32 for this rank's shards only. It reads `.grad` of the handle's parameters(), so that
/// zero_grad(), clipping and scaling work as ever. Copies share it. It keeps the shards alive, not
/// the handle. Functions marked collective must be called by all ranks alike.
class FusedOptimizer {
 public:
  /// Use ShardedModule::adamw() or sgd(). Collective.
  template <class Config>
  FusedOptimizer(std::shared_ptr<detail::ModelState> state, const Config& options)
      : state_(std::move(state)), optimizer_(state_->engine(), options) {}

  /// Updates every parameter whose `.grad` is defined; one without is left alone and does not count
  /// the step. Collective when a forward without backward came before, else local.
  void step() {
    state_->require_current();
    const torch::NoGradGuard no_grad;
    state_->settle();
    detail::give_gradients_to_engine(*state_);
    state_->writes->before_write();
    optimizer_.step();
  }

  /// Makes every `.grad` undefined, as the handle's. Local.
  void zero_grad() { state_->zero_grad(); }

  /// The learning rate. Local.
  double lr() const { return optimizer_.lr(); }
  /// Sets it from the next step on, the same on every rank. Local.
  void set_lr(double lr) { optimizer_.set_lr(lr); }

  /// Gives the parameter `name` (as in named_parameters()) `lr_factor` times the learning rate and
  /// a weight decay of its own: what parameter groups are for. The same on every rank. Local.
  void set_param_options(const std::string& name, double lr_factor, double weight_decay) {
    optimizer_.set_param_options(id_of(name), lr_factor, weight_decay);
  }

  /// How many steps the parameter `name` has taken. Local.
  std::uint64_t step_count(const std::string& name) const {
    return optimizer_.step_count(id_of(name));
  }

  /// This rank's piece of the state `state` ("exp_avg", "exp_avg_sq", "momentum_buffer") of the
  /// parameter `name`; undefined before its first step. It keeps the optimizer alive. Local.
  at::Tensor state(const std::string& name, const std::string& state) const {
    const std::uint32_t id = id_of(name);
    float* data = optimizer_.state(id, state);
    if (data == nullptr) return at::Tensor();
    const at::Device device = state_->writes->shard_device();
    return at::from_blob(data, {state_->params[id].shard.numel()}, [keep = optimizer_](void*) {},
                         at::TensorOptions(at::kFloat).device(device), device);
  }

  /// The optimizer of the C++ layer.
  const Optimizer& engine_optimizer() const noexcept { return optimizer_; }
  Optimizer& engine_optimizer() noexcept { return optimizer_; }

 private:
  std::uint32_t id_of(const std::string& name) const {
    for (std::uint32_t id = 0; id < state_->params.size(); ++id) {
      if (state_->params[id].name == name) return id;
    }
    throw Error(FSDP_ERR_INVALID_ARGUMENT, "the model has no parameter '" + name + "'");
  }

  std::shared_ptr<detail::ModelState> state_;
  Optimizer optimizer_;
};

}  // namespace fsdp
