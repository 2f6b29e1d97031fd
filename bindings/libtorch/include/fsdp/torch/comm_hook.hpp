// A function of the user's that changes a unit's gradients before they are reduced, with tensors.
#pragma once

#include <c10/core/StreamGuard.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fsdp/torch/model_state.hpp"

namespace fsdp {

/// The full gradients that this rank has for one unit, just before they are reduced. On a GPU they
/// are complete on the calling thread's current stream, which reduces them after what the hook puts
/// there.
struct UnitGradientTensors {
  std::uint32_t unit;              ///< its number in the engine
  std::string name;                ///< its module's name, "" for the root
  std::vector<std::string> names;  ///< of the parameters that have a gradient
  /// Their gradients, float32, in the parameters' shapes, on the device that computes: views, valid
  /// during the call, to be changed in place.
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
    std::optional<c10::StreamGuard> there;
    if (unit.cuda_stream != nullptr) {
      const auto index = static_cast<c10::DeviceIndex>(unit.device.device_id);
      there.emplace(stream_at(unit.cuda_stream, at::Device(kGpu, index)));
    }
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
