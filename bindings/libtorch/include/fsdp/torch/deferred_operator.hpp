// Recording one operator: what deferred construction does instead of running it.
//
// Deferred tensors are meta tensors, so LibTorch's own meta kernels say what shapes, types and
// views an operator gives, and autograd sees what it would see. What gives a tensor in a storage of
// its own, or writes one, goes to the log. What needs values, or reaches real memory in a way that
// cannot be replayed, is an error that names the operator.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/torch/deferred_arguments.hpp"

namespace fsdp::detail {

/// The most bytes of arguments that are made only to find out the shape of a result.
inline constexpr std::size_t kProbeBytes = std::size_t{64} << 20;

/// One operator on its way into the log. Used once, on the thread that called the operator, with
/// the key excluded.
class OperatorRecording : OperatorArguments {
 public:
  OperatorRecording(DeferredLog& log, const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : OperatorArguments(op, stack), log_(log) {}

  /// Replaces the arguments on the stack by the results.
  void run() {
    if (deferred_.empty() && !is_factory()) {
      run_for_real();
      return;
    }
    require_recordable();
    auto recorded = std::make_shared<RecordedOperator>(op_);
    describe_arguments(*recorded);
    // Whatever fails below, the generator is as before and nothing has been recorded.
    const bool random = op_.hasTag(at::Tag::nondeterministic_seeded);
    if (random) recorded->generator_state = state_of(generator());
    torch::jit::Stack results;
    try {
      results = random ? results_of_random(*recorded) : results_on_meta(*recorded);
      adopt_results(*recorded, results);
    } catch (c10::Error& error) {
      if (random) set_state(generator(), recorded->generator_state);
      error.add_context("while fsdp::deferred_init recorded " + op_.operator_name().name);
      throw;
    } catch (...) {
      if (random) set_state(generator(), recorded->generator_state);
      throw;
    }
    if (!recorded->created.empty() || !recorded->written.empty()) log_.append(recorded);
    stack_.resize(first_);
    for (c10::IValue& result : results) stack_.push_back(std::move(result));
  }

 private:
  /// Lets meta kernels look at (null) data pointers. Those that write look for overlaps.
  class OpenStorages {
   public:
    OpenStorages(const std::vector<Argument>& deferred, bool open) {
      if (!open) return;
      for (const Argument& argument : deferred) {
        storages_.push_back(argument.tensor.storage());
        storages_.back().unsafeGetStorageImpl()->clear_data_ptr_access_error_msg_();
      }
    }
    OpenStorages(const OpenStorages&) = delete;
    OpenStorages& operator=(const OpenStorages&) = delete;
    ~OpenStorages() {
      for (const c10::Storage& storage : storages_) forbid_access(*storage.unsafeGetStorageImpl());
    }

   private:
    std::vector<c10::Storage> storages_;
  };

  /// For operators that meet no deferred tensor. The meta device is what deferred tensors name.
  void run_for_real() {
    if (device_ >= 0 && argument(device_).isDevice() && argument(device_).toDevice().is_meta()) {
      stack_[first_ + index_of(device_)] = at::Device(at::kCPU);
    }
    op_.callBoxed(&stack_);
  }

  static at::Tensor on_meta(const at::Tensor& real) {
    return at::empty_strided(real.sizes(), real.strides(),
                             real.options().device(at::kMeta).requires_grad(false));
  }

  torch::jit::Stack results_of_random(const RecordedOperator& recorded) {
    // A factory's type is known from its result only.
    const at::ScalarType type = deferred_.empty() ? at::kFloat : deferred_[0].tensor.scalar_type();
    if (deferred_.size() <= 1 && real_.empty() && fill_of(op_, type) != Fill::none) {
      torch::jit::Stack results = results_on_meta(recorded);
      const at::Tensor& like = results.at(0).toTensor();
      const Fill fill = fill_of(op_, like.scalar_type());
      if (fill != Fill::none) {
        draw(fill, like, generator());
        return results;
      }
    }
    return results_of_real_run(recorded);
  }

  /// Runs the operator on real tensors, whose values are replayed, for what it draws and for the
  /// shapes of its results; the values are thrown away. Small integers made from nothing (randperm)
  /// stay real: constructors look at them.
  torch::jit::Stack results_of_real_run(const RecordedOperator& recorded) {
    for (const Argument& deferred : deferred_) {
      if (at::GradMode::is_enabled() && deferred.tensor.requires_grad()) {
        refuse("it takes a tensor that requires a gradient; use a NoGradGuard");
      }
    }
    const at::NoGradGuard no_grad;
    torch::jit::Stack results = arguments();
    if (device_ >= 0) results[index_of(device_)] = recorded.arguments[index_of(device_)];
    std::vector<at::Tensor> replayed;
    {
      Replay replay(log_);
      std::vector<StorageNumber> storages;
      for (const auto& tensor : recorded.tensors) storages.push_back(tensor.place.storage);
      replay.run(storages);
      for (const auto& tensor : recorded.tensors) {
        replayed.push_back(replay.at_place(tensor.place));
        put_argument(results, 0, tensor, replayed.back());
      }
    }
    op_.callBoxed(&results);
    for (std::size_t i = 0; i < results.size(); ++i) {
      for_each_tensor(results[i], [&](std::int64_t, const at::Tensor& result) {
        require_dense(result);
        for (std::size_t a = 0; a < replayed.size(); ++a) {
          if (!same_storage(result, replayed[a])) continue;
          const Argument* written = written_result(i);
          if (written != nullptr) return written->tensor;
          return deferred_[a].tensor.as_strided(result.sizes(), result.strides(),
                                                result.storage_offset());
        }
        for (const Argument& real : real_) {
          if (same_storage(result, real.tensor)) return result;
        }
        const bool small = static_cast<std::int64_t>(result.nbytes()) <= kSmallBytes;
        if (deferred_.empty() && small && at::isIntegralType(result.scalar_type(), true)) {
          return result;
        }
        return on_meta(result);
      });
    }
    return results;
  }

  torch::jit::Stack results_on_meta(const RecordedOperator& recorded) {
    torch::jit::Stack results = arguments();
    if (device_ >= 0 && (argument(device_).isDevice() || deferred_.empty())) {
      results[index_of(device_)] = at::Device(at::kMeta);
    }
    for (std::size_t i = 0; i < results.size(); ++i) {
      if (schema_.arguments()[i].name() == "pin_memory") results[i] = c10::IValue();
    }
    for (const Argument& real : real_) {
      const at::Tensor stand_in = on_meta(real.tensor);
      copy_scalar_kind(real.tensor, stand_in);
      stand_ins_.push_back({stand_in, real.tensor});
      put_argument(results, 0, {real.index, real.element, {}}, stand_in);
    }
    try {
      const OpenStorages opened(deferred_, writes_);
      op_.callBoxed(&results);
    } catch (const c10::Error& error) {
      // Some kernels for any device look at data.
      const bool no_kernel = dynamic_cast<const c10::NotImplementedError*>(&error) != nullptr ||
                             std::string(error.what_without_backtrace()).find(kNoData) == 0;
      if (!no_kernel) throw;
      return results_without_meta_kernel(recorded, error);
    }
    return results;
  }

  /// LibTorch has meta kernels for most operators, not for all that need no values.
  torch::jit::Stack results_without_meta_kernel(const RecordedOperator& recorded,
                                                const c10::Error& error) {
    torch::jit::Stack results;
    for (std::size_t i = 0; i < schema_.returns().size(); ++i) {
      if (const Argument* written = written_result(i)) results.emplace_back(written->tensor);
    }
    if (writes_ && results.size() == schema_.returns().size() &&
        !op_.hasTag(at::Tag::inplace_view)) {
      return results;
    }
    const std::string why = first_sentence(error.what_without_backtrace());
    bool of_values = writes_ || op_.hasTag(at::Tag::data_dependent_output) ||
                     op_.hasTag(at::Tag::dynamic_output_shape);
    for (const c10::Argument& result : schema_.returns()) {
      of_values = of_values || !(result.type()->isSubtypeOf(*c10::TensorType::get()) ||
                                 result.type()->isSubtypeOf(*c10::ListType::ofTensors()));
    }
    if (of_values) refuse("it needs values (" + why + ")");
    std::size_t bytes = 0;
    for (const auto& tensor : recorded.tensors) bytes += tensor.place.storage_bytes;
    if (bytes > kProbeBytes) {
      refuse(c10::str("its tensors have more than ", kProbeBytes, " bytes (", why, ")"));
    }
    return results_of_real_run(recorded);
  }

  static std::string first_sentence(const std::string& text) {
    return text.substr(0, std::min(text.find('\n'), text.find(". ")));
  }

  void adopt_results(RecordedOperator& recorded, torch::jit::Stack& results) {
    for (std::size_t i = 0; i < results.size(); ++i) {
      for_each_tensor(results[i], [&](std::int64_t element, const at::Tensor& result) {
        return adopt_result(recorded, i, element, result);
      });
    }
  }

  /// Replaces the defined tensors in `value` by what `change(element, tensor)` returns.
  template <class Change>
  static void for_each_tensor(c10::IValue& value, const Change& change) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) value = change(-1, value.toTensor());
    } else if (value.isTensorList()) {
      ListEditor list(value);
      std::size_t element = 0;
      for (const c10::IValue& item : value.toListRef()) {
        const at::Tensor& tensor = item.toTensor();
        if (tensor.defined()) {
          list.set(element, change(static_cast<std::int64_t>(element), tensor));
        }
        ++element;
      }
      value = list.list();
    }
  }

  void require_dense(const at::Tensor& result) const {
    if (result.layout() != at::kStrided || !result.has_storage() || result.is_quantized()) {
      refuse("its result is not a dense tensor");
    }
  }

  /// What the caller gets for a result of the meta kernel.
  at::Tensor adopt_result(RecordedOperator& recorded, std::size_t index, std::int64_t element,
                          const at::Tensor& result) {
    if (result.device().is_cpu()) return result;
    require_dense(result);
    c10::StorageImpl* storage = result.storage().unsafeGetStorageImpl();
    for (const auto& [stand_in, real] : stand_ins_) {
      if (!same_storage(result, stand_in)) continue;
      return real.as_strided(result.sizes(), result.strides(),
                             real.storage_offset() + result.storage_offset());
    }
    const bool known = as_deferred(tag_of(*storage, dispatch_table().deleter)) != nullptr;
    const DeferredTag* tag = adopt(result, log_);
    if (!known) made_.push_back(storage);
    if (std::find(made_.begin(), made_.end(), storage) != made_.end()) {
      recorded.created.push_back({index, element, place_of(result, tag->number)});
    }
    return result;
  }

  DeferredLog& log_;
  std::vector<std::pair<at::Tensor, at::Tensor>> stand_ins_;  // meta tensors for real arguments
  std::vector<const c10::StorageImpl*> made_;                 // the results' own storages
};

inline void DeferredLog::record(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard unseen(kTagKey);
  OperatorRecording(*this, op, *stack).run();
}

}  // namespace fsdp::detail
