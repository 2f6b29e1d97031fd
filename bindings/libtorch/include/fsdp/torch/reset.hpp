// Modules without storage, and their default initialization: the reset_parameters() of a module,
// whatever its class.
//
// C++ modules have no common reset_parameters(). LibTorch's own classes are known here; a user's
// class derives from Resettable.
#pragma once

#include <torch/torch.h>

#include <functional>

#include "fsdp/torch/deferred.hpp"

namespace fsdp {

/// A module that can give its own parameters and buffers (not its children's) their first values.
/// fully_shard calls it for modules whose parameters or buffers have no storage; all of them have
/// memory then. Gradients are disabled during the call.
///
///   struct NormImpl : torch::nn::Module, fsdp::Resettable {
///     NormImpl() : scale(register_parameter("scale", torch::empty({8}, at::kMeta))) {}
///     void reset_parameters() override { torch::nn::init::ones_(scale); }
///     at::Tensor scale;
///   };
class Resettable {
 public:
  virtual ~Resettable() = default;
  /// Writes every element of the module's own parameters and buffers. All ranks must write the
  /// same, so seed alike.
  virtual void reset_parameters() = 0;
};

/// Makes all parameters and buffers of `module` meta tensors, in place: shapes and types stay, data
/// and records of deferred_init go. What module.to("meta") does in Python and cannot do in C++.
/// Local. Throws INVALID_STATE for a sharded module.
inline void to_meta(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  const detail::DeferredPause real_tensors;
  auto tensors = module.named_parameters();
  for (const auto& item : module.named_buffers()) {
    if (!tensors.contains(item.key())) tensors.insert(item.key(), item.value());
  }
  for (const auto& item : tensors) {
    if (detail::is_sharded(item.value())) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "to_meta: parameter '" + item.key() + "' belongs to a sharded model");
    }
  }
  for (const auto& item : tensors) {
    const at::Tensor& tensor = item.value();
    detail::put_under(tensor, at::empty_strided(tensor.sizes(), tensor.strides(),
                                                tensor.options().device(at::kMeta)));
  }
}

namespace detail {

/// A call of module.reset_parameters() when `module` is one of Impl...; else empty.
template <class... Impl>
std::function<void()> reset_of_any(torch::nn::Module& module) {
  std::function<void()> reset;
  const auto match = [&](auto* typed) {
    if (typed != nullptr) reset = [typed] { typed->reset_parameters(); };
    return typed != nullptr;
  };
  (match(dynamic_cast<Impl*>(&module)) || ...);
  return reset;
}

/// What gives the module's own parameters and buffers their default values, as its constructor
/// does; empty for a class that is not known. `parent` is the module that has registered it.
inline std::function<void()> reset_of(torch::nn::Module& module, torch::nn::Module* parent) {
  using namespace torch::nn;
  if (auto* resettable = dynamic_cast<Resettable*>(&module)) {
    return [resettable] { resettable->reset_parameters(); };
  }
  if (auto* attention = dynamic_cast<MultiheadAttentionImpl*>(&module)) {
    return [attention] { attention->_reset_parameters(); };
  }
  if (auto* prelu = dynamic_cast<PReLUImpl*>(&module)) {
    return [prelu] { init::constant_(prelu->weight, prelu->options.init()); };
  }
  // An attention makes its output layer's bias zero.
  auto* attention = dynamic_cast<MultiheadAttentionImpl*>(parent);
  if (attention != nullptr && attention->out_proj.get() == &module) {
    return [attention] {
      attention->out_proj->reset_parameters();
      if (attention->out_proj->bias.defined()) init::zeros_(attention->out_proj->bias);
    };
  }
  return reset_of_any<
      LinearImpl, BilinearImpl, EmbeddingImpl, EmbeddingBagImpl, LayerNormImpl, GroupNormImpl,
      Conv1dImpl, Conv2dImpl, Conv3dImpl, ConvTranspose1dImpl, ConvTranspose2dImpl,
      ConvTranspose3dImpl, BatchNorm1dImpl, BatchNorm2dImpl, BatchNorm3dImpl, InstanceNorm1dImpl,
      InstanceNorm2dImpl, InstanceNorm3dImpl, RNNImpl, LSTMImpl, GRUImpl, RNNCellImpl, LSTMCellImpl,
      GRUCellImpl>(module);
}

}  // namespace detail
}  // namespace fsdp
