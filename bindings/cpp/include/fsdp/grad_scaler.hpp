// A gradient scaler for float16, whose skipped steps all ranks agree on.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "fsdp/engine.hpp"
#include "fsdp/error.hpp"
#include "fsdp/optimizer.hpp"

namespace fsdp {

/// Options and state of a gradient scaler; see fsdp_grad_scaler_config_t.
struct GradScalerState {
  double scale = 65536;
  double growth_factor = 2;
  double backoff_factor = 0.5;
  std::uint64_t growth_interval = 2000;
  std::uint64_t growth_tracker = 0;
};

/// Scales a loss so that small float16 gradients survive, and skips steps whose gradients
/// overflowed on any rank. Copies share it. Every rank makes one alike. Which functions are
/// collective is said in fsdp.h.
class GradScaler {
 public:
  /// One that is not `enabled` has the scale 1 and skips nothing. Local.
  explicit GradScaler(const GradScalerState& options = {}, bool enabled = true)
      : enabled_(enabled) {
    const fsdp_grad_scaler_config_t config = c_config(options);
    fsdp_grad_scaler_t* scaler = nullptr;
    check(fsdp_grad_scaler_create(&config, &scaler), "cannot make the gradient scaler");
    handle_.reset(scaler, fsdp_grad_scaler_destroy);
  }

  /// What the loss is to be multiplied by. Local.
  double scale() const {
    double scale = 0;
    check(fsdp_grad_scaler_scale(get(), &scale));
    return scale;
  }

  /// Divides the engine's gradients by the scale; whether any of any rank was not finite.
  /// Collective.
  bool unscale(const Engine& engine) {
    std::int32_t found = 0;
    check(fsdp_grad_scaler_unscale(get(), engine.get(), nullptr, 0, &found));
    return found != 0;
  }
  /// The same with this rank's pieces of gradients of the host's own, null where there is none.
  /// Collective.
  bool unscale(const Engine& engine, const std::vector<float*>& pieces) {
    std::int32_t found = 0;
    check(fsdp_grad_scaler_unscale(get(), engine.get(), pieces.data(), pieces.size(), &found));
    return found != 0;
  }

  /// Whether an optimizer of the host's is to step now; unscales first if that has not been done.
  /// Collective.
  bool may_step(const Engine& engine) {
    std::int32_t step = 0;
    check(fsdp_grad_scaler_may_step(get(), engine.get(), nullptr, 0, &step));
    return step != 0;
  }
  /// The same with pieces as for unscale. Collective.
  bool may_step(const Engine& engine, const std::vector<float*>& pieces) {
    std::int32_t step = 0;
    check(fsdp_grad_scaler_may_step(get(), engine.get(), pieces.data(), pieces.size(), &step));
    return step != 0;
  }

  /// Steps `optimizer` unless it is to be skipped; whether it has. Collective.
  bool step(Optimizer& optimizer) {
    std::int32_t stepped = 0;
    check(fsdp_grad_scaler_step(get(), optimizer.get(), &stepped));
    return stepped != 0;
  }

  /// Ends an iteration: the scale grows or backs off. Local.
  void update() { check(fsdp_grad_scaler_update(get())); }

  /// What a checkpoint keeps. Local.
  GradScalerState state() const {
    fsdp_grad_scaler_config_t config{};
    config.struct_size = sizeof(config);
    check(fsdp_grad_scaler_get_state(get(), &config));
    return {config.scale, config.growth_factor, config.backoff_factor, config.growth_interval,
            config.growth_tracker};
  }
  /// Takes what state() gave, the same on every rank. Local.
  void set_state(const GradScalerState& state) {
    const fsdp_grad_scaler_config_t config = c_config(state);
    check(fsdp_grad_scaler_set_state(get(), &config));
  }

  /// Whether it does anything.
  bool is_enabled() const noexcept { return enabled_; }

  /// The C handle, owned by this object.
  fsdp_grad_scaler_t* get() const noexcept { return handle_.get(); }

 private:
  fsdp_grad_scaler_config_t c_config(const GradScalerState& state) const {
    fsdp_grad_scaler_config_t config = FSDP_GRAD_SCALER_CONFIG_INIT;
    config.scale = state.scale;
    config.growth_factor = state.growth_factor;
    config.backoff_factor = state.backoff_factor;
    config.growth_interval = state.growth_interval;
    config.growth_tracker = state.growth_tracker;
    config.enabled = enabled_ ? 1 : 0;
    return config;
  }

  bool enabled_;
  std::shared_ptr<fsdp_grad_scaler_t> handle_;
};

}  // namespace fsdp
