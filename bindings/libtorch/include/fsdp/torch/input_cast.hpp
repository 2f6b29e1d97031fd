// What an operator of a forward does with its other floating-point arguments when one of them is a
// parameter of a unit that computes in another type: it gets casts of them.
//
// C++ modules have no hooks that could cast the inputs of each unit's forward, as FSDP's Python
// hooks do; the fallback (dispatch.hpp) sees operators instead. It runs above autograd, so
// gradients go back through the cast.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <unordered_set>

namespace fsdp::detail {

/// The key of our tensors; see dispatch.hpp.
inline constexpr c10::DispatchKey kTagKey = c10::DispatchKey::DeferredInit;

/// What inputs are cast to, and which tensors are left as they are.
struct InputCast {
  at::ScalarType type;
  /// The module's buffers: their type is the host's choice, and operators may write them.
  const std::unordered_set<const c10::TensorImpl*>* buffers;
};

/// Whether an operator's argument may be written by it.
inline bool is_written(const c10::Argument& argument) {
  const c10::AliasInfo* alias = argument.alias_info();
  if (alias == nullptr) return false;
  if (alias->isWrite()) return true;
  for (const c10::AliasInfo& contained : alias->containedTypes()) {
    if (contained.isWrite()) return true;
  }
  return false;
}

/// Whether a tensor of this type is cast to another one: a real floating-point type.
inline bool is_castable(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kDouble;
}

inline bool needs_cast(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.defined() && tensor.scalar_type() != type && is_castable(tensor.scalar_type());
}

inline bool needs_cast(const InputCast& cast, const at::Tensor& tensor) {
  if (!needs_cast(tensor, cast.type)) return false;
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  // A parameter has its own type; a number of the program takes that of what it meets.
  return !impl->key_set().has(kTagKey) && !impl->is_wrapped_number() &&
         cast.buffers->count(impl) == 0;
}

/// Casts the arguments of `op` on top of `stack`; those it writes, parameters and buffers stay.
inline void cast_inputs(const InputCast& cast, const c10::OperatorHandle& op,
                        torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const std::size_t first = stack->size() - arguments.size();
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (is_written(arguments[i])) continue;
    if (value.isTensor()) {
      if (needs_cast(cast, value.toTensor())) value = value.toTensor().to(cast.type);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list = value.toTensorList();
      bool copied = false;
      for (std::size_t k = 0; k < list.size(); ++k) {
        const at::Tensor element = list.get(k);
        if (!needs_cast(cast, element)) continue;
        if (!copied) list = list.copy();
        copied = true;
        list.set(k, element.to(cast.type));
      }
      if (copied) value = std::move(list);
    }
  }
}

}  // namespace fsdp::detail
