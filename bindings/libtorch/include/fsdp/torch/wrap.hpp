// Which modules become units.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/torch/trace.hpp"

namespace fsdp {

namespace detail {

/// `a::b::BlockImpl` -> `BlockImpl`, also for templates (`a::B<c::D>` -> `B<c::D>`).
inline std::string unqualified(const std::string& class_name) {
  const std::size_t stop = class_name.find('<');
  const std::size_t colons = class_name.rfind("::", stop);
  return colons == std::string::npos ? class_name : class_name.substr(colons + 2);
}

}  // namespace detail

/// Decides which modules become units, each a parcel that is unsharded and resharded as a whole.
/// The root always is one, and owns what no other unit does. Make one with the functions below;
/// default-constructed it adds no unit below the root.
///
/// Modules of a model that was sharded before keep their units: policies that go by size or take
/// all pass them by, and one that names such a unit throws INVALID_STATE ("wrapped already").
class WrapPolicy {
 public:
  /// The root is the first of the modules.
  using Apply = std::function<void(Model&, const std::vector<detail::WalkedModule>&)>;

  WrapPolicy() = default;
  explicit WrapPolicy(Apply apply) : apply_(std::move(apply)) {}

  /// Marks the units in `model`. Called by fully_shard.
  void apply(Model& model, const std::vector<detail::WalkedModule>& modules) const {
    if (apply_) apply_(model, modules);
  }

 private:
  Apply apply_;
};

/// Every module for which `want(module, dotted name)` returns true is a unit; exceptions thrown by
/// `want` leave fully_shard unchanged.
inline WrapPolicy wrap_if(
    std::function<bool(const torch::nn::Module&, const std::string& fqn)> want) {
  return WrapPolicy([want = std::move(want)](Model& model, const auto& modules) {
    for (const auto& walked : modules) {
      if (!walked.can_be_named() || !want(*walked.module, walked.name)) continue;
      model.wrap_module(walked.id);
    }
  });
}

/// Every module of this class is a unit. `class_name` is the C++ class, with or without its
/// namespaces: for TORCH_MODULE(Block) it is "BlockImpl". Throws INVALID_ARGUMENT when the model
/// has no such module.
inline WrapPolicy wrap_class(const std::string& class_name) {
  return WrapPolicy([class_name](Model& model, const auto& modules) {
    bool found = false;
    for (const auto& walked : modules) {
      if (walked.class_name != class_name && detail::unqualified(walked.class_name) != class_name) {
        continue;
      }
      found = true;
      if (walked.can_be_named()) model.wrap_module(walked.id);
    }
    if (!found) {
      throw Error(FSDP_ERR_INVALID_ARGUMENT,
                  "wrap_class(\"" + class_name + "\"): the model has no module of this class");
    }
  });
}

/// Every module is a unit; one that owns no parameter costs nothing.
inline WrapPolicy wrap_always() {
  return WrapPolicy([](Model& model, const auto&) { model.wrap_always(); });
}

/// Every module with at least `min_numel` parameter elements below it, counted without those of
/// nested units, is a unit.
inline WrapPolicy wrap_size(std::uint64_t min_numel) {
  return WrapPolicy([min_numel](Model& model, const auto&) { model.wrap_size(min_numel); });
}

/// Exactly these modules (and the root) are units. Throws INVALID_ARGUMENT when one of them is not
/// part of the model.
inline WrapPolicy wrap_modules(std::vector<const torch::nn::Module*> wanted) {
  return WrapPolicy([wanted = std::move(wanted)](Model& model, const auto& modules) {
    for (const torch::nn::Module* module : wanted) {
      bool found = false;
      for (const auto& walked : modules) {
        if (walked.module != module) continue;
        found = true;
        if (!walked.root) model.wrap_module(walked.id);
      }
      if (!found) {
        throw Error(FSDP_ERR_INVALID_ARGUMENT,
                    "wrap_modules: a module is not part of the model that is being sharded");
      }
    }
  });
}

/// As wrap_size, but only modules that the traced forward called become units, and only parameters
/// that it used count. The trace must be of the module that is being sharded.
inline WrapPolicy wrap_traced(const ExecutionTrace& trace, std::uint64_t min_numel) {
  return WrapPolicy([order = trace.order, min_numel](Model& model, const auto&) {
    model.wrap_trace(order, min_numel);
  });
}

}  // namespace fsdp
