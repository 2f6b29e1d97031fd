// The `.grad`s of a model's sharded leaves as a whole: their norm, clipping, unscaling, and handing
// them to the engine's own optimizers. They are views of the engine's gradient shards, or tensors
// of the user's own.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "fsdp/torch/model_state.hpp"

namespace fsdp::detail {

/// This rank's gradients as contiguous float32, by parameter; null where there is none.
struct GradientPieces {
  std::vector<at::Tensor> tensors;  ///< keep the memory
  std::vector<const float*> data;
};

inline GradientPieces gradient_pieces(const ModelState& state) {
  static const float kEmpty = 0;  // the address of a piece that is there, but has no elements
  GradientPieces pieces;
  for (const ParamState& param : state.params) {
    const at::Tensor grad = param.shard.grad();
    const at::Tensor plain =
        grad.defined() ? grad.detach().to(param.shard.device(), at::kFloat).contiguous()
                       : at::Tensor();
    pieces.tensors.push_back(plain);
    pieces.data.push_back(!plain.defined()      ? nullptr
                          : plain.numel() == 0 ? &kEmpty
                                               : plain.const_data_ptr<float>());
  }
  return pieces;
}

/// The norm of order `p` over all parameters and ranks; see fsdp_engine_total_norm. Collective.
inline double total_grad_norm(ModelState& state, double p, bool error_if_nonfinite) {
  state.require_current();
  const torch::NoGradGuard no_grad;
  state.settle();
  return state.engine().total_norm(gradient_pieces(state).data, p, error_if_nonfinite);
}

/// Whether `.grad` of every parameter is what the engine has, which it can then scale all at once:
/// on a GPU a launch for each parameter would take longer than the scaling.
inline bool gradients_are_the_engines(ModelState& state) {
  state.require_current();
  state.settle();
  for (std::uint32_t id = 0; id < state.params.size(); ++id) {
    const at::Tensor grad = state.params[id].shard.grad();
    const Shard shard = state.engine().shard(id);
    if (grad.defined() ? !is_shard_view(grad, shard) : shard.grad != nullptr) return false;
  }
  return true;
}

/// Clips the gradients and returns their norm from before. Collective.
inline double clip_gradients(ModelState& state, double max_norm, double p,
                             bool error_if_nonfinite) {
  if (!(max_norm >= 0)) {
    throw Error(FSDP_ERR_INVALID_ARGUMENT,
                "clip_grad_norm_: max_norm cannot be " + std::to_string(max_norm) +
                    ": a number of at least 0 is needed");
  }
  if (!state.writes->device().is_cpu() && gradients_are_the_engines(state)) {
    return state.engine().clip_grad_norm(max_norm, p, error_if_nonfinite);
  }
  const double norm = total_grad_norm(state, p, error_if_nonfinite);
  const torch::NoGradGuard no_grad;
  const auto factor = static_cast<float>(max_norm / (norm + 1e-6));
  if (factor >= 1) return norm;
  for (const ParamState& param : state.params) {
    at::Tensor grad = param.shard.grad();
    if (grad.defined()) grad.mul_(factor);  // a NaN too
  }
  return norm;
}

/// The same pieces to be written in place. Throws UNSUPPORTED for a gradient of the user's own that
/// is not contiguous float32.
inline std::vector<float*> writable_pieces(const ModelState& state) {
  std::vector<float*> pieces;
  for (const ParamState& param : state.params) {
    const at::Tensor grad = param.shard.grad();
    if (grad.defined() && (grad.scalar_type() != at::kFloat || !grad.is_contiguous())) {
      throw Error(FSDP_ERR_UNSUPPORTED, "the gradient of parameter '" + param.name +
                                            "' is not contiguous float32: it cannot be unscaled");
    }
    const bool there = grad.defined() && grad.numel() > 0;
    pieces.push_back(there ? grad.data_ptr<float>() : nullptr);
  }
  return pieces;
}

/// Makes the engine's gradients what `.grad` says, for an optimizer in the engine: cleared where
/// `.grad` is undefined, and of a tensor of the user's own its values. Local.
inline void give_gradients_to_engine(ModelState& state) {
  for (std::uint32_t id = 0; id < state.params.size(); ++id) {
    const ParamState& param = state.params[id];
    const at::Tensor grad = param.shard.grad();
    if (!grad.defined()) {
      state.engine().clear_grad(id);
      continue;
    }
    const Shard shard = state.engine().shard(id);
    if (is_shard_view(grad, shard)) continue;
    if (shard.grad == nullptr) {
      throw Error(FSDP_ERR_UNSUPPORTED,
                  "the .grad of parameter '" + param.name +
                      "' was not made by a backward: an optimizer in the engine cannot use it");
    }
    if (shard.numel == 0) continue;
    tensor_at(shard.grad, {shard.numel}, at::kFloat, param.shard.device()).copy_(grad);
  }
}

}  // namespace fsdp::detail
