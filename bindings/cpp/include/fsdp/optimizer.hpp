// SGD and AdamW on an engine's shards, for hosts that have no optimizer of their own.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fsdp/engine.hpp"
#include "fsdp/error.hpp"

namespace fsdp {

/// Options of stochastic gradient descent; see fsdp_sgd_config_t.
struct SgdConfig {
  double lr = 1e-3;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  bool nesterov = false;
  bool maximize = false;
};

/// Options of AdamW; see fsdp_adamw_config_t.
struct AdamWConfig {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-2;
  bool maximize = false;
};

/// An optimizer of all parameters of an engine, whose arithmetic fsdp.h documents to the bit.
/// Copies share it; the last one destroys it. One thread at a time. Which functions are collective
/// is said in fsdp.h.
class Optimizer {
 public:
  /// SGD. Collective: all ranks pass the same options.
  Optimizer(const Engine& engine, const SgdConfig& options) : engine_(engine) {
    fsdp_sgd_config_t config = FSDP_SGD_CONFIG_INIT;
    config.lr = options.lr;
    config.momentum = options.momentum;
    config.dampening = options.dampening;
    config.weight_decay = options.weight_decay;
    config.nesterov = options.nesterov ? 1 : 0;
    config.maximize = options.maximize ? 1 : 0;
    fsdp_optimizer_t* optimizer = nullptr;
    check(fsdp_optimizer_create_sgd(engine.get(), &config, &optimizer),
          "cannot make the optimizer");
    handle_.reset(optimizer, fsdp_optimizer_destroy);
  }

  /// AdamW. Collective: all ranks pass the same options.
  Optimizer(const Engine& engine, const AdamWConfig& options) : engine_(engine) {
    fsdp_adamw_config_t config = FSDP_ADAMW_CONFIG_INIT;
    config.lr = options.lr;
    config.beta1 = options.beta1;
    config.beta2 = options.beta2;
    config.eps = options.eps;
    config.weight_decay = options.weight_decay;
    config.maximize = options.maximize ? 1 : 0;
    fsdp_optimizer_t* optimizer = nullptr;
    check(fsdp_optimizer_create_adamw(engine.get(), &config, &optimizer),
          "cannot make the optimizer");
    handle_.reset(optimizer, fsdp_optimizer_destroy);
  }

  /// Updates the shards of every parameter that has a gradient; gradients stay. Local after a
  /// backward.
  void step() { check(fsdp_optimizer_step(get())); }
  /// Forgets every gradient of the engine. Local.
  void zero_grad() { engine_.zero_grad(); }

  /// The learning rate. Local.
  double lr() const {
    double lr = 0;
    check(fsdp_optimizer_get_lr(get(), &lr));
    return lr;
  }
  /// Sets it from the next step on, the same on every rank. Local.
  void set_lr(double lr) { check(fsdp_optimizer_set_lr(get(), lr)); }

  /// Gives a parameter `lr_factor` times the learning rate and a weight decay of its own, the same
  /// on every rank. Local.
  void set_param_options(std::uint32_t param, double lr_factor, double weight_decay) {
    check(fsdp_optimizer_set_param_options(get(), param, lr_factor, weight_decay));
  }

  /// How many steps a parameter has taken. Local.
  std::uint64_t step_count(std::uint32_t param) const {
    std::uint64_t steps = 0;
    check(fsdp_optimizer_step_count(get(), param, &steps));
    return steps;
  }

  /// The state `name` of this rank's piece of a parameter, as long as its shard; null before its
  /// first step. Local.
  float* state(std::uint32_t param, const std::string& name) const {
    float* data = nullptr;
    check(fsdp_optimizer_state(get(), param, name.c_str(), &data));
    return data;
  }

  /// Saves shards, this optimizer's states and counts, further `states` and texts to `dir`, as
  /// Engine::save_checkpoint does. Options are not saved. Collective.
  void save_checkpoint(const std::string& dir, const std::vector<fsdp_state_t>& states = {},
                       const std::map<std::string, std::string>& metadata = {}) const {
    std::vector<fsdp_metadata_t> texts;
    for (const auto& [key, value] : metadata) texts.push_back({key.c_str(), value.c_str()});
    check(fsdp_optimizer_save(get(), dir.c_str(), states.data(), states.size(), texts.data(),
                              texts.size()),
          "cannot save the checkpoint '" + dir + "'");
  }

  /// Loads what save_checkpoint has saved, at any world size; on error nothing has changed.
  /// Collective.
  void load_checkpoint(const std::string& dir, const std::vector<fsdp_state_t>& states = {}) {
    check(fsdp_optimizer_load(get(), dir.c_str(), states.data(), states.size()),
          "cannot load the checkpoint '" + dir + "'");
  }

  /// The engine whose parameters it updates.
  const Engine& engine() const noexcept { return engine_; }

  /// The C handle, owned by this object.
  fsdp_optimizer_t* get() const noexcept { return handle_.get(); }

 private:
  Engine engine_;
  std::shared_ptr<fsdp_optimizer_t> handle_;
};

}  // namespace fsdp
