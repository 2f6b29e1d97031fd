// torch.amp.GradScaler for a sharded module: what overflows on one rank is skipped by all.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "fsdp/torch/sharded_module.hpp"

namespace fsdp {

/// Scales the loss so that small float16 gradients survive, unscales the gradients, and skips the
/// step on every rank if any gradient of any rank is not finite. Used as torch's:
///
///   fsdp::ShardedGradScaler scaler(model);
///   scaler.scale(loss).backward();
///   scaler.unscale_();                 // to clip; else step() does it
///   model.clip_grad_norm_(1.0);
///   scaler.step(optimizer);
///   scaler.update();
///
/// Every rank makes one alike. Copies do not share it.
class ShardedGradScaler {
 public:
  /// For the gradients of `model`'s parameters(); one that is not `enabled` has the scale 1 and
  /// skips nothing. Local.
  template <class Impl>
  explicit ShardedGradScaler(const ShardedModule<Impl>& model, const GradScalerState& options = {},
                             bool enabled = true)
      : state_(model.state()), scaler_(options, enabled) {}

  ShardedGradScaler(const ShardedGradScaler&) = delete;
  ShardedGradScaler& operator=(const ShardedGradScaler&) = delete;

  /// The loss (or outputs) times the scale. Local.
  at::Tensor scale(const at::Tensor& outputs) const {
    return scaler_.is_enabled() ? outputs * scaler_.scale() : outputs;
  }

  /// Divides every `.grad` by the scale; whether any of any rank was not finite. Once an update;
  /// throws INVALID_STATE otherwise. Collective.
  bool unscale_() {
    state_->require_current();
    state_->settle();
    found_ = scaler_.unscale(state_->engine(), detail::writable_pieces(*state_));
    return *found_;
  }

  /// Unscales if that has not been done, and steps `optimizer` (torch::optim's on parameters(), or
  /// a FusedOptimizer) unless a gradient was not finite; whether it has. Each optimizer once an
  /// update; throws INVALID_STATE otherwise. Collective.
  template <class AnyOptimizer>
  bool step(AnyOptimizer& optimizer) {
    if (scaler_.is_enabled()) {
      const void* self = &optimizer;
      if (std::find(stepped_.begin(), stepped_.end(), self) != stepped_.end()) {
        throw Error(FSDP_ERR_INVALID_STATE,
                    "the gradient scaler's step() was called for this optimizer already since the "
                    "last update()");
      }
      if (!found_) unscale_();
      stepped_.push_back(self);
      if (*found_) return false;
    }
    optimizer.step();
    return true;
  }

  /// Ends an iteration: the scale grows or backs off. Local.
  void update() {
    scaler_.update();
    found_.reset();
    stepped_.clear();
  }

  /// Local.
  double get_scale() const { return scaler_.scale(); }
  bool is_enabled() const noexcept { return scaler_.is_enabled(); }
  /// What a checkpoint keeps, and taking it back, the same on every rank. Local.
  GradScalerState state() const { return scaler_.state(); }
  void set_state(const GradScalerState& state) { scaler_.set_state(state); }

 private:
  std::shared_ptr<detail::ModelState> state_;
  GradScaler scaler_;
  std::optional<bool> found_;          // since the last update
  std::vector<const void*> stepped_;   // the same
};

}  // namespace fsdp
