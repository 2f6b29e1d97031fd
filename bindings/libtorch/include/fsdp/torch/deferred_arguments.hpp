// The arguments of an operator that deferred construction meets: which are deferred, which are
// real, what may be recorded of them, and what a replay needs.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/torch/deferred_replay.hpp"

namespace fsdp::detail {

/// Operators that change what a tensor object is (its shape, storage or history), and no values.
inline bool changes_no_values(const c10::OperatorHandle& op) {
  const std::string& name = op.operator_name().name;
  if (name == "aten::requires_grad_" || name == "aten::retain_grad" || name == "aten::set_data") {
    return true;
  }
  return op.hasTag(at::Tag::inplace_view) && name.compare(0, 12, "aten::resize") != 0;
}

/// Tensors that constructors look into are not deferred up to this size.
inline constexpr std::int64_t kSmallBytes = 1 << 20;

inline bool takes_device(const c10::Argument& argument) {
  const auto optional = argument.type()->cast<c10::OptionalType>();
  const auto& type = optional ? optional->getElementType() : argument.type();
  return type->kind() == c10::TypeKind::DeviceObjType;
}

inline bool takes_generator(const c10::Argument& argument) {
  const auto optional = argument.type()->cast<c10::OptionalType>();
  const auto& type = optional ? optional->getElementType() : argument.type();
  return type->kind() == c10::TypeKind::GeneratorType;
}

/// An operator's arguments on a stack.
class OperatorArguments {
 protected:
  struct Argument {
    std::size_t index;
    std::int64_t element;
    at::Tensor tensor;
    bool written;
  };

  OperatorArguments(const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : op_(op),
        schema_(op.schema()),
        stack_(stack),
        first_(stack.size() - schema_.arguments().size()) {
    for (std::size_t i = 0; i < schema_.arguments().size(); ++i) {
      const c10::IValue& value = stack_[first_ + i];
      if (value.isTensor()) {
        sort_argument(i, -1, value.toTensor());
      } else if (value.isTensorList() || value.isOptionalTensorList()) {
        std::int64_t element = 0;
        for (const c10::IValue& item : value.toListRef()) {
          if (item.isTensor()) sort_argument(i, element, item.toTensor());
          ++element;
        }
      } else if (device_ < 0 && takes_device(schema_.arguments()[i])) {
        device_ = static_cast<std::int64_t>(i);
      } else if (generator_ < 0 && takes_generator(schema_.arguments()[i])) {
        generator_ = static_cast<std::int64_t>(i);
      }
    }
  }
  ~OperatorArguments() = default;

  [[noreturn]] void refuse(const std::string& why) const {
    throw Error(FSDP_ERR_UNSUPPORTED,
                op_.operator_name().name + " cannot be recorded by fsdp::deferred_init: " + why);
  }

  void sort_argument(std::size_t index, std::int64_t element, const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    const bool written = is_written(schema_.arguments()[index]);
    const bool deferred = deferred_tag(tensor) != nullptr;
    (deferred ? deferred_ : real_).push_back({index, element, tensor, written});
    writes_ = writes_ || written;
  }

  /// Makes tensors from nothing, on a device that can be chosen. torch::tensor() looks so as well,
  /// but has its values at hand: it makes a scalar_tensor, or fills an `empty` of one dimension,
  /// asked for on the CPU, through a pointer.
  bool is_factory() const {
    const std::string& name = op_.operator_name().name;
    if (!real_.empty() || device_ < 0 || name == "aten::scalar_tensor") return false;
    if (name != "aten::empty" || !argument(device_).isDevice()) return true;
    const c10::IValue& sizes = stack_[first_];
    if (!argument(device_).toDevice().is_cpu() || !sizes.isIntList()) return true;
    const auto shape = sizes.toIntVector();
    return shape.size() != 1 || shape[0] > kSmallBytes / 8;
  }

  static std::size_t index_of(std::int64_t index) { return static_cast<std::size_t>(index); }

  const c10::IValue& argument(std::int64_t index) const { return stack_[first_ + index_of(index)]; }

  torch::jit::Stack arguments() const {
    return {stack_.begin() + static_cast<std::ptrdiff_t>(first_), stack_.end()};
  }

  at::Generator generator() const {
    if (generator_ >= 0 && argument(generator_).isGenerator()) {
      return argument(generator_).toGenerator();
    }
    return at::detail::getDefaultCPUGenerator();
  }

  void require_recordable() const {
    if (device_ >= 0 && argument(device_).isDevice()) {
      const at::Device device = argument(device_).toDevice();
      if (!device.is_cpu() && !device.is_meta()) {
        refuse("it asks for device " + device.str() + "; only the CPU is supported");
      }
    }
    if (generator().device().type() != at::kCPU) {
      refuse("its generator is on device " + generator().device().str() +
             "; only the CPU is supported");
    }
    if (!real_.empty() && changes_no_values(op_)) {
      refuse("it would give a deferred tensor the memory of one that has data, or the reverse");
    }
    for (const Argument& real : real_) {
      if (real.written) refuse("it writes from a deferred tensor into one that has data");
      if (!real.tensor.device().is_cpu() || real.tensor.layout() != at::kStrided) {
        refuse("it takes a tensor that is not a dense CPU tensor (device " +
               real.tensor.device().str() + ")");
      }
      if (at::GradMode::is_enabled() && real.tensor.requires_grad()) {
        refuse("it takes a tensor that has data and requires a gradient; use a NoGradGuard");
      }
    }
    for (const Argument& deferred : deferred_) {
      if (deferred_tag(deferred.tensor)->was_made_real()) {
        refuse("it uses a view of a tensor that fsdp::materialize_module has made real; take the "
               "view of the real tensor instead");
      }
    }
  }

  /// What a replay needs: copies of real tensors, places of deferred ones, the device the CPU.
  void describe_arguments(RecordedOperator& recorded) const {
    recorded.arguments = arguments();
    recorded.default_type = c10::get_default_dtype();
    recorded.generator = generator_;
    if (generator_ >= 0) recorded.arguments[index_of(generator_)] = c10::IValue();
    if (device_ >= 0 && argument(device_).isDevice()) {
      recorded.arguments[index_of(device_)] = at::Device(at::kCPU);
    }
    for (const Argument& real : real_) {
      at::Tensor copy = real.tensor.detach().clone();
      copy_scalar_kind(real.tensor, copy);
      put_argument(recorded.arguments, 0, {real.index, real.element, {}}, copy);
    }
    const bool keeps_values = changes_no_values(op_);
    for (const Argument& deferred : deferred_) {
      const StorageNumber number = deferred_tag(deferred.tensor)->number;
      const RecordedOperator::Tensor where{deferred.index, deferred.element,
                                           place_of(deferred.tensor, number)};
      put_argument(recorded.arguments, 0, where, at::Tensor());
      recorded.tensors.push_back(where);
      if (deferred.written && !keeps_values) recorded.written.push_back(number);
    }
  }

  /// A number in an expression (x * 2.0) is a tensor that does not decide the result's type.
  static void copy_scalar_kind(const at::Tensor& from, const at::Tensor& to) {
    if (from.unsafeGetTensorImpl()->is_wrapped_number()) {
      to.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
  }

  /// The deferred argument that result `index` is, for results that the schema says are arguments.
  const Argument* written_result(std::size_t index) const {
    const c10::AliasInfo* result = schema_.returns().at(index).alias_info();
    if (result == nullptr || !result->isWrite()) return nullptr;
    for (const Argument& deferred : deferred_) {
      const c10::AliasInfo* argument = schema_.arguments()[deferred.index].alias_info();
      if (deferred.element < 0 && argument != nullptr && argument->isWrite() &&
          argument->beforeSets() == result->beforeSets()) {
        return &deferred;
      }
    }
    return nullptr;
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack& stack_;
  const std::size_t first_;
  std::int64_t device_ = -1;     ///< which argument says the device, -1: none
  std::int64_t generator_ = -1;  ///< which argument is a generator, -1: none
  bool writes_ = false;
  std::vector<Argument> deferred_;
  std::vector<Argument> real_;
};

}  // namespace fsdp::detail
