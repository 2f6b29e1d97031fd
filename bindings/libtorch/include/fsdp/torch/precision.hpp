// What ShardOptions' types mean for the units, parameters, buffers, inputs and outputs of a module.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fsdp/torch/input_cast.hpp"
#include "fsdp/torch/model_state.hpp"
#include "fsdp/torch/options.hpp"
#include "fsdp/torch/outputs.hpp"
#include "fsdp/torch/shard_walk.hpp"
#include "fsdp/torch/tensor_backup.hpp"

namespace fsdp::detail {

/// The choices for one walked module tree, which it outlives. Local.
class PrecisionPlan {
 public:
  /// Tells the model what is computed and reduced in which type. Throws for names that the module
  /// has not, and types that cannot be.
  PrecisionPlan(const ShardOptions& options, ShardWalk& walk) : options_(options), walk_(walk) {
    const MixedPrecision& all = options.mixed_precision;
    for (const auto& [name, unit] : options.unit_mixed_precision) {
      const auto module = std::find_if(walk.modules.begin(), walk.modules.end(),
                                       [&, &name = name](const auto& m) { return m.name == name; });
      if (module == walk.modules.end()) {
        throw Error(FSDP_ERR_INVALID_ARGUMENT, "ShardOptions::unit_mixed_precision names module '" +
                                                   name + "', which the module has not");
      }
      const std::string of = "unit_mixed_precision of '" + name + "': ";
      const fsdp_dtype_t param = c_dtype(unit.param_dtype, of + "param_dtype");
      fsdp_dtype_t reduce = c_dtype(unit.reduce_dtype, of + "reduce_dtype");
      if (!unit.reduce_dtype && !all.reduce_dtype) reduce = param;
      require_castable(unit.buffer_dtype, of + "buffer_dtype");
      walk.model.set_unit_dtypes(module->id, param, reduce);
      units_.emplace(module->id, unit);
    }
    for (const auto& [name, type] : options.param_dtypes) {
      const auto found = std::find(walk.leaf_names.begin(), walk.leaf_names.end(), name);
      if (found == walk.leaf_names.end()) {
        throw Error(FSDP_ERR_INVALID_ARGUMENT, "ShardOptions::param_dtypes names parameter '" +
                                                   name + "', which the module has not");
      }
      walk.model.set_param_dtype(static_cast<std::uint32_t>(found - walk.leaf_names.begin()),
                                 c_dtype(type, "param_dtypes of '" + name + "'"));
    }
  }

  /// What operators on the parameters of the unit of this module cast their inputs to. A unit that
  /// was sharded before keeps its choice.
  std::optional<at::ScalarType> input_type(std::uint32_t module) const {
    const MixedPrecision& all = options_.mixed_precision;
    const auto unit = units_.find(module);
    if (unit != units_.end()) {
      if (!unit->second.cast_forward_inputs.value_or(all.cast_forward_inputs)) return std::nullopt;
      return unit->second.param_dtype ? unit->second.param_dtype : all.param_dtype;
    }
    for (const ShardWalk::Adopted& adopted : walk_.adopted) {
      if (module < adopted.module || module - adopted.module >= adopted.root->module_count) {
        continue;
      }
      const auto known = adopted.root->input_types.find(module - adopted.module);
      if (known == adopted.root->input_types.end()) return std::nullopt;
      return known->second;
    }
    return all.cast_forward_inputs ? all.param_dtype : std::nullopt;
  }

  /// Casts the floating buffers of modules that were not sharded before, brings all their buffers to
  /// the device, and tells the state which tensors are buffers and what the handle's forward casts.
  void finish(ModelState& state) const {
    const MixedPrecision& all = options_.mixed_precision;
    for (const WalkedModule& walked : walk_.modules) {
      const std::uint32_t unit = state.engine().unit_of_module(walked.id);
      const auto own = units_.find(state.engine().unit_info(unit).module);
      const auto type = own != units_.end() && own->second.buffer_dtype ? own->second.buffer_dtype
                                                                        : all.buffer_dtype;
      for (const auto& item : walked.module->named_buffers(/*recurse=*/false)) {
        const at::Tensor& buffer = item.value();
        if (!buffer.defined()) continue;
        const bool first = state.buffers.insert(buffer.unsafeGetTensorImpl()).second;
        if (!first || walked.adopted) continue;
        const bool casts = type && needs_cast(buffer, *type);
        const bool moves = !buffer.is_meta() && buffer.device() != walk_.device();
        if (!casts && !moves) continue;
        const at::Device device = moves ? walk_.device() : buffer.device();
        point_at(buffer, buffer.detach().to(device, casts ? *type : buffer.scalar_type()));
      }
    }
    if (all.cast_forward_inputs) state.input_type = all.param_dtype;
    state.output_type = all.output_dtype;
  }

 private:
  const ShardOptions& options_;
  const ShardWalk& walk_;
  std::map<std::uint32_t, UnitMixedPrecision> units_;  // by module number
};

// ---- values that hold tensors ----

/// A copy of a value in which the tensors have become what `cast` makes of them. For the types in
/// which outputs.hpp finds tensors.
template <class T>
struct CastTensors;

template <class Cast, class T>
T cast_tensors(const T& value, const Cast& cast) {
  return CastTensors<T>::cast(value, cast);
}

template <>
struct CastTensors<at::Tensor> {
  template <class Cast>
  static at::Tensor cast(const at::Tensor& tensor, const Cast& cast) {
    return cast(tensor);
  }
};

template <class T>
struct CastTensors<std::optional<T>> {
  template <class Cast>
  static std::optional<T> cast(const std::optional<T>& value, const Cast& cast) {
    if (!value) return value;
    return cast_tensors(*value, cast);
  }
};

template <class... T>
struct CastTensors<std::tuple<T...>> {
  template <class Cast>
  static std::tuple<T...> cast(const std::tuple<T...>& value, const Cast& cast) {
    return std::apply(
        [&](const T&... element) { return std::tuple<T...>(cast_tensors(element, cast)...); },
        value);
  }
};

template <class First, class Second>
struct CastTensors<std::pair<First, Second>> {
  template <class Cast>
  static std::pair<First, Second> cast(const std::pair<First, Second>& value, const Cast& cast) {
    return {cast_tensors(value.first, cast), cast_tensors(value.second, cast)};
  }
};

template <class T>
struct CastTensors<std::vector<T>> {
  template <class Cast>
  static std::vector<T> cast(const std::vector<T>& value, const Cast& cast) {
    std::vector<T> result;
    result.reserve(value.size());
    for (const T& element : value) result.push_back(cast_tensors(element, cast));
    return result;
  }
};

template <class T, std::size_t N>
struct CastTensors<std::array<T, N>> {
  template <class Cast>
  static std::array<T, N> cast(const std::array<T, N>& value, const Cast& cast) {
    std::array<T, N> result = value;
    for (T& element : result) element = cast_tensors(element, cast);
    return result;
  }
};

/// `value` with its floating tensors in `type`, or nothing if they are.
template <class T>
std::optional<T> casted(const T& value, at::ScalarType type) {
  bool needed = false;
  visit_outputs(value, [&](const at::Tensor& tensor) { needed |= needs_cast(tensor, type); });
  if (!needed) return std::nullopt;
  return cast_tensors(value, [&](const at::Tensor& tensor) {
    return needs_cast(tensor, type) ? tensor.to(type) : tensor;
  });
}

/// An argument on its way to a module's forward, of the same type (reference or not) as it came: a
/// cast of it, if it holds floating tensors of another type than `type`, else itself.
template <class Arg>
class CastArgument {
 public:
  CastArgument(std::remove_reference_t<Arg>& argument, std::optional<at::ScalarType> type)
      : argument_(argument) {
    if constexpr (outputs_known<Value>) {
      if (type) cast_ = casted(static_cast<const Value&>(argument), *type);
    }
  }
  CastArgument(const CastArgument&) = delete;
  CastArgument& operator=(const CastArgument&) = delete;

  Arg&& get() {
    if constexpr (outputs_known<Value>) {
      if (cast_) return static_cast<Arg&&>(*cast_);
    }
    return static_cast<Arg&&>(argument_);
  }

 private:
  using Value = std::decay_t<Arg>;
  struct Nothing {};

  std::remove_reference_t<Arg>& argument_;
  std::conditional_t<outputs_known<Value>, std::optional<Value>, Nothing> cast_;
};

/// Casts what a forward returned by value to `type`.
template <class Output>
void cast_output(Output& output, std::optional<at::ScalarType> type) {
  if (!type) return;
  if constexpr (!std::is_reference_v<Output> && outputs_known<Output>) {
    if (auto cast = casted(output, *type)) output = std::move(*cast);
  }
}

/// Throws when the type of a forward's output hides tensors that would have to be cast.
template <class Output>
void require_castable_output(std::optional<at::ScalarType> type) {
  constexpr bool known =
      std::is_void_v<Output> || (!std::is_reference_v<Output> && outputs_known<Output>);
  if (!known && type) {
    throw Error(FSDP_ERR_UNSUPPORTED,
                "MixedPrecision::output_dtype needs a forward that returns tensors by value, alone "
                "or in pair, tuple, optional, vector and array");
  }
}

}  // namespace fsdp::detail
