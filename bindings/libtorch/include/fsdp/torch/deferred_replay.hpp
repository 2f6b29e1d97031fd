// Running recorded operators on real tensors.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fsdp/torch/deferred_random.hpp"
#include "fsdp/torch/deferred_record.hpp"

namespace fsdp::detail {

/// What the operators of this thread do while one lives is not recorded and not differentiated,
/// whatever the caller is inside of.
class PlainOperators {
 private:
  const c10::InferenceMode ordinary_{false};
  const at::NoGradGuard no_grad_;
  const c10::impl::ExcludeDispatchKeyGuard unseen_{c10::DispatchKeySet(kTagKey) |
                                                   c10::autocast_dispatch_keyset};
};

/// The window `place` on a real storage.
inline at::Tensor window(const TensorPlace& place, const c10::Storage& storage) {
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
      c10::scalarTypeToTypeMeta(place.type));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(place.sizes, place.strides, place.offset);
  if (place.conjugate) tensor._set_conj(true);
  if (place.negative) tensor._set_neg(true);
  return tensor;
}

/// The tensor at `index` of `values`, or in the list there.
inline at::Tensor tensor_at(const c10::IValue& value, std::int64_t element) {
  if (element < 0) return value.toTensor();
  return value.toListRef()[static_cast<std::size_t>(element)].toTensor();
}

/// A list of tensors or optional tensors with some of them replaced; the original stays.
class ListEditor {
 public:
  explicit ListEditor(const c10::IValue& list) : optional_(list.isOptionalTensorList()) {
    for (const c10::IValue& element : list.toListRef()) {
      elements_.push_back(element.isTensor() ? element.toTensor() : at::Tensor());
    }
  }
  void set(std::size_t index, at::Tensor tensor) { elements_.at(index) = std::move(tensor); }
  c10::IValue list() const {
    if (!optional_) return c10::IValue(c10::List<at::Tensor>(at::TensorList(elements_)));
    c10::List<std::optional<at::Tensor>> list;
    for (const at::Tensor& tensor : elements_) {
      list.push_back(tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt);
    }
    return list;
  }

 private:
  bool optional_;
  std::vector<at::Tensor> elements_;
};

/// Puts `tensor` where `where` says on a stack whose arguments begin at `first`.
inline void put_argument(torch::jit::Stack& stack, std::size_t first,
                         const RecordedOperator::Tensor& where, at::Tensor tensor) {
  c10::IValue& slot = stack.at(first + where.index);
  if (where.element < 0) {
    slot = std::move(tensor);
    return;
  }
  ListEditor list(slot);
  list.set(static_cast<std::size_t>(where.element), std::move(tensor));
  slot = list.list();
}

/// One replay: gives storages their recorded values, on the calling thread, under PlainOperators.
/// The default generator is borrowed for operators that cannot be given another, and is put back;
/// do not draw from it on other threads meanwhile.
class Replay {
 public:
  explicit Replay(const DeferredLog& log) : log_(log) {}

  /// Uses `data`, contiguous memory of exactly the storage's size, as storage `number`. Where
  /// nothing has been written, it keeps its contents.
  void place_at(StorageNumber number, const at::Tensor& data) {
    placed_.emplace(number, data.storage());
  }

  /// Makes the values of `storages`. Call once.
  void run(const std::vector<StorageNumber>& storages) {
    const auto operators = log_.history_of(storages);
    std::unordered_map<StorageNumber, std::size_t> last_use;
    for (std::size_t i = 0; i < operators.size(); ++i) {
      for (const auto& argument : operators[i]->tensors) last_use[argument.place.storage] = i;
      for (const auto& result : operators[i]->created) last_use[result.place.storage] = i;
    }
    for (const StorageNumber number : storages) last_use[number] = operators.size();
    for (std::size_t i = 0; i < operators.size(); ++i) {
      const RecordedOperator& recorded = *operators[i];
      run(recorded);
      const auto release = [&](const RecordedOperator::Tensor& tensor) {
        if (last_use.at(tensor.place.storage) == i) storages_.erase(tensor.place.storage);
      };
      for (const auto& argument : recorded.tensors) release(argument);
      for (const auto& result : recorded.created) release(result);
    }
  }

  /// Whether run() wrote anything into storage `number`.
  bool wrote(StorageNumber number) const { return written_.count(number) != 0; }

  /// The real tensor at a place in one of the storages that run() made.
  at::Tensor at_place(const TensorPlace& place) const {
    return window(place, storages_.at(place.storage));
  }

 private:
  void run(const RecordedOperator& recorded) {
    if (leaves_uninitialized(recorded)) return;
    torch::jit::Stack stack = recorded.arguments;
    for (const auto& argument : recorded.tensors) {
      put_argument(stack, 0, argument, at_place(argument.place));
    }
    std::optional<DefaultGeneratorGuard> borrowed;
    if (recorded.generator_state.defined()) {
      if (recorded.generator >= 0) {
        if (!generator_.defined()) generator_ = at::make_generator<at::CPUGeneratorImpl>();
        set_state(generator_, recorded.generator_state);
        stack.at(static_cast<std::size_t>(recorded.generator)) = generator_;
      } else {
        borrowed.emplace();
        set_state(at::detail::getDefaultCPUGenerator(), recorded.generator_state);
      }
    }
    const DefaultType default_type(recorded.default_type);
    recorded.op.callBoxed(stack);
    written_.insert(recorded.written.begin(), recorded.written.end());
    for (const auto& result : recorded.created) written_.insert(result.place.storage);
    for (const auto& result : recorded.created) {
      keep(recorded, result.place, tensor_at(stack.at(result.index), result.element));
    }
  }

  /// True for an `empty` into memory that is there already.
  bool leaves_uninitialized(const RecordedOperator& recorded) {
    if (placed_.empty() || recorded.created.size() != 1) return false;
    const auto placed = placed_.find(recorded.created[0].place.storage);
    if (placed == placed_.end()) return false;
    const std::string& name = recorded.op.operator_name().name;
    if (name != "aten::empty" && name != "aten::empty_like" && name != "aten::new_empty" &&
        name != "aten::empty_strided" && name != "aten::new_empty_strided") {
      return false;
    }
    storages_[placed->first] = placed->second;
    return true;
  }

  /// Takes a result's storage for the recorded one, or a copy where it is not laid out alike.
  void keep(const RecordedOperator& recorded, const TensorPlace& place, const at::Tensor& result) {
    if (result.sizes() != at::IntArrayRef(place.sizes) || result.scalar_type() != place.type) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  recorded.op.operator_name().name +
                      " gave a tensor of another shape or type than when it was recorded");
    }
    const auto known = storages_.find(place.storage);
    if (known != storages_.end()) {
      if (result.storage().is_alias_of(known->second)) return;
      window(place, known->second).copy_(result);
      return;
    }
    const auto placed = placed_.find(place.storage);
    const bool alike = result.strides() == at::IntArrayRef(place.strides) &&
                       result.storage_offset() == place.offset &&
                       result.is_conj() == place.conjugate && result.is_neg() == place.negative;
    if (placed == placed_.end() && alike && result.storage().use_count() == 1) {
      storages_.emplace(place.storage, result.storage());
      return;
    }
    const c10::Storage storage =
        placed != placed_.end()
            ? placed->second
            : at::empty({static_cast<std::int64_t>(place.storage_bytes)}, at::kByte).storage();
    storages_.emplace(place.storage, storage);
    window(place, storage).copy_(result);
  }

  /// The process's default type while an operator runs.
  class DefaultType {
   public:
    explicit DefaultType(caffe2::TypeMeta type) : before_(c10::get_default_dtype()) {
      if (type != before_) c10::set_default_dtype(type);
      changed_ = type != before_;
    }
    DefaultType(const DefaultType&) = delete;
    DefaultType& operator=(const DefaultType&) = delete;
    ~DefaultType() {
      if (changed_) c10::set_default_dtype(before_);
    }

   private:
    caffe2::TypeMeta before_;
    bool changed_;
  };

  const PlainOperators plain_;
  const DeferredLog& log_;
  std::unordered_map<StorageNumber, c10::Storage> storages_;
  std::unordered_map<StorageNumber, c10::Storage> placed_;
  std::unordered_set<StorageNumber> written_;
  at::Generator generator_;
};

}  // namespace fsdp::detail
