// A function of the user's that changes a unit's gradients before they are reduced, with tensors.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fsdp/torch/model_state.hpp"

namespace fsdp {

/// The full gradients that this rank has for one unit, just before they are reduced.
struct UnitGradientTensors {
  std::uint32_t unit;              ///< its number in the engine
  std::string name;                ///< its module's name, "" for the root
  std::vector<std::string> names;  ///< of the parameters that have a gradient
  /// Their gradients, float32, in the parameters' shapes: views, valid during the call, to be
  /// changed in place.
  std::vector<at::Tensor> gradients;
};

/// Changes gradients in place; see ShardedModule::register_comm_hook.
using TensorCommHook = std::function<void(UnitGradientTensors&)>;

namespace detail {

/// Sets the engine's hook; an empty one removes it. Local.
inline void register_comm_hook(const std::shared_ptr<ModelState>& state, TensorCommHook hook) {
  state->require_current();
  if (!hook) {
    state->engine().set_comm_hook({});
    return;
  }
  // Weak: the engine keeps the hook, and the state the engine.
  state->engine().set_comm_hook([weak = std::weak_ptr<ModelState>(state),
                                 hook = std::move(hook)](const UnitGradients& unit) {
    const auto locked = weak.lock();
    if (!locked) return;
    const torch::NoGradGuard no_grad;
    UnitGradientTensors tensors{unit.unit, unit.name, {}, {}};
    for (std::uint32_t i = 0; i < unit.count; ++i) {
      const fsdp_full_gradient_t& gradient = unit.gradients[i];
      const ParamState& param = locked->params[gradient.param];
      tensors.names.push_back(param.name);
      tensors.gradients.push_back(
          tensor_at(gradient.data, param.leaf.sizes(), at::kFloat, param.leaf.device()));
    }
    hook(tensors);
  });
}

}  // namespace detail
}  // namespace fsdp
