// Running a forward without data: every operator of the thread, on meta tensors.
//
// While a module is traced its parameters and buffers are meta tensors, and the thread's operators
// come to a recorder. It tells the tracer which parameters they read, and finds the shapes of their
// results: by LibTorch's meta kernels, or, for operators that have none in C++ (relu, embedding,
// batch norm), by running them once on memory of no particular contents. Operators that meet no
// meta tensor run as always.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fsdp/torch/dispatch.hpp"
#include "fsdp/torch/tracer.hpp"

namespace fsdp::detail {

class TraceRecorder final : public OperatorRecorder {
 public:
  explicit TraceRecorder(Tracer& tracer) : tracer_(tracer) {}

  /// Parameter `param` is `leaf`, which points at a meta tensor by now.
  void add(std::uint32_t param, const at::Tensor& leaf) {
    params_[leaf.storage().unsafeGetStorageImpl()] = {param, leaf.unsafeGetTensorImpl()};
  }

  void record(const c10::OperatorHandle& op, torch::jit::Stack* stack) override {
    const c10::impl::ExcludeDispatchKeyGuard unseen(kTagKey);
    const std::size_t first = stack->size() - op.schema().arguments().size();
    bool meta = false;
    std::vector<std::uint32_t> leaves, views;
    for (std::size_t i = first; i < stack->size(); ++i) {
      change_tensors((*stack)[i], [&](const at::Tensor& tensor) {
        meta = meta || tensor.is_meta();
        if (!tensor.has_storage()) return tensor;
        const auto known = params_.find(tensor.storage().unsafeGetStorageImpl());
        if (known == params_.end()) return tensor;
        const auto [param, leaf] = known->second;
        (tensor.unsafeGetTensorImpl() == leaf ? leaves : views).push_back(param);
        return tensor;
      });
    }
    if (!meta) {
      op.callBoxed(stack);
      return;
    }
    tracer_.operator_runs(leaves, views, is_view(op));
    torch::jit::Stack results = shapes_of(op, {stack->begin() + static_cast<std::ptrdiff_t>(first),
                                               stack->end()});
    stack->resize(first);
    for (c10::IValue& result : results) stack->push_back(std::move(result));
  }

 private:
  struct Param {
    std::uint32_t param;
    const c10::TensorImpl* leaf;
  };

  /// Replaces the defined tensors in `value` by what `change` makes of them.
  template <class Change>
  static void change_tensors(c10::IValue& value, const Change& change) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) value = change(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(tensor.defined() ? change(tensor) : tensor);
      }
      value = std::move(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
        list.push_back(tensor && tensor->defined() ? std::optional(change(*tensor)) : tensor);
      }
      value = std::move(list);
    }
  }

  static bool is_view(const c10::OperatorHandle& op) {
    for (const c10::Argument& result : op.schema().returns()) {
      if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
    }
    return false;
  }

  static bool writes(const c10::OperatorHandle& op) {
    for (const c10::Argument& argument : op.schema().arguments()) {
      if (is_written(argument)) return true;
    }
    return false;
  }

  static at::Tensor on_meta(const at::Tensor& tensor) {
    if (tensor.is_meta() || tensor.layout() != at::kStrided) return tensor;
    at::Tensor meta = at::empty_strided(tensor.sizes(), tensor.strides(),
                                        tensor.options().device(at::kMeta).requires_grad(false));
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      meta.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    return meta;
  }

  static torch::jit::Stack shapes_of(const c10::OperatorHandle& op, torch::jit::Stack arguments) {
    torch::jit::Stack results = arguments;
    for (std::size_t i = 0; i < results.size(); ++i) {
      change_tensors(results[i], on_meta);
      const c10::IValue& value = results[i];
      if (value.isDevice() && op.schema().arguments()[i].name() == "device") {
        results[i] = at::Device(at::kMeta);  // where the module's data would be is no matter here
      }
    }
    try {
      op.callBoxed(&results);
    } catch (const c10::NotImplementedError&) {
      return writes(op) ? written_arguments(op, arguments) : probe(op, std::move(arguments));
    }
    return results;
  }

  /// What an operator that writes its arguments in place returns.
  static torch::jit::Stack written_arguments(const c10::OperatorHandle& op,
                                             const torch::jit::Stack& arguments) {
    torch::jit::Stack results;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
      if (is_written(op.schema().arguments()[i])) results.push_back(arguments[i]);
    }
    if (results.size() < op.schema().returns().size()) throw;
    results.resize(op.schema().returns().size());
    return results;
  }

  /// Runs the operator on real tensors for the shapes of its results; integers are zero, so that
  /// they are indices of whatever there is.
  static torch::jit::Stack probe(const c10::OperatorHandle& op, torch::jit::Stack arguments) {
    bool of_values = op.hasTag(at::Tag::data_dependent_output) ||
                     op.hasTag(at::Tag::dynamic_output_shape);
    for (const c10::Argument& result : op.schema().returns()) {
      of_values = of_values || !(result.type()->isSubtypeOf(*c10::TensorType::get()) ||
                                 result.type()->isSubtypeOf(*c10::ListType::ofTensors()));
    }
    if (of_values) {
      throw Error(FSDP_ERR_UNSUPPORTED, op.operator_name().name +
                                            " cannot be traced: it needs values, and tensors have "
                                            "none while a module is traced");
    }
    for (c10::IValue& argument : arguments) {
      change_tensors(argument, [](const at::Tensor& tensor) {
        if (!tensor.is_meta()) return tensor;
        at::Tensor real = at::empty_strided(tensor.sizes(), tensor.strides(),
                                            tensor.options().device(at::kCPU));
        if (!real.is_floating_point() && !real.is_complex()) real.zero_();
        return real;
      });
    }
    op.callBoxed(&arguments);
    for (c10::IValue& result : arguments) change_tensors(result, on_meta);
    return arguments;
  }

  Tracer& tracer_;
  std::unordered_map<const c10::StorageImpl*, Param> params_;
};

}  // namespace fsdp::detail
