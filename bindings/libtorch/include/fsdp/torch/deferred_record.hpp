// What deferred construction remembers: the operators that made or wrote each storage.
//
// Tensors are identified by storage, not by object: an operator's tensor arguments are kept as
// places (storage, sizes, strides, offset, type), so views need no record. Storages have numbers;
// a storage's history is the list of operators that created or wrote it, in order. The values of a
// storage follow from its history and, recursively, from what the operators in it read, as far as
// that was recorded before them. The process has one log, so deferred tensors of different
// constructions and threads may be combined freely.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <queue>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fsdp/torch/dispatch.hpp"

namespace fsdp::detail {

using StorageNumber = std::uint64_t;

/// A tensor as a window on a storage.
struct TensorPlace {
  StorageNumber storage;
  std::size_t storage_bytes;
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;
  std::int64_t offset;  ///< elements
  at::ScalarType type;
  bool conjugate;
  bool negative;
};

inline TensorPlace place_of(const at::Tensor& tensor, StorageNumber storage) {
  return {storage,
          tensor.storage().nbytes(),
          tensor.sizes().vec(),
          tensor.strides().vec(),
          tensor.storage_offset(),
          tensor.scalar_type(),
          tensor.is_conj(),
          tensor.is_neg()};
}

/// Storage::is_alias_of() would look at the data.
inline bool same_storage(const at::Tensor& a, const at::Tensor& b) {
  return a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

/// One recorded operator. Immutable once it is in the log.
struct RecordedOperator {
  /// A deferred tensor among the arguments or results: the argument or result at `index`, or its
  /// element `element` when that is a list (-1: it is not).
  struct Tensor {
    std::size_t index;
    std::int64_t element;
    TensorPlace place;
  };

  explicit RecordedOperator(const c10::OperatorHandle& handle) : op(handle) {}

  c10::OperatorHandle op;
  torch::jit::Stack arguments;   ///< real tensors as copies; deferred ones and generators as None
  std::vector<Tensor> tensors;   ///< the deferred arguments
  std::vector<Tensor> created;   ///< the results in storages of their own
  std::vector<StorageNumber> written;
  std::int64_t generator = -1;   ///< which argument is one, -1: none
  at::Tensor generator_state;    ///< before the operator; undefined when it draws no numbers
  caffe2::TypeMeta default_type;
  std::uint64_t sequence = 0;    ///< given by the log
};

using RecordedOperatorPtr = std::shared_ptr<const RecordedOperator>;

/// All histories of the process, and the recorder of new operators. Any thread.
class DeferredLog final : public OperatorRecorder {
 public:
  /// See deferred_operator.hpp.
  void record(const c10::OperatorHandle& op, torch::jit::Stack* stack) override;

  /// A new storage, whose history is kept at least until drop().
  StorageNumber add_storage() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const StorageNumber number = ++storages_made_;
    histories_.emplace(number, History{});
    ++live_;
    return number;
  }

  /// No tensor lives in the storage any more; others may still have been made from it.
  void drop(StorageNumber storage) {
    Histories garbage;  // destroyed after the lock is released
    const std::lock_guard<std::mutex> lock(mutex_);
    histories_.at(storage).live = false;
    if (--live_ == 0) {
      garbage.swap(histories_);
      reachable_ = 0;
    } else if (histories_.size() > 2 * reachable_ + 256) {
      collect(garbage);
    }
  }

  /// How many storages have a history, of live and dropped ones.
  std::size_t size() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return histories_.size();
  }

  /// Adds `recorded` to the histories of the storages that it created or wrote.
  void append(const std::shared_ptr<RecordedOperator>& recorded) {
    const std::lock_guard<std::mutex> lock(mutex_);
    recorded->sequence = ++operators_;
    const auto add = [&](StorageNumber storage) {
      auto& history = histories_.at(storage).operators;
      if (history.empty() || history.back() != recorded) history.push_back(recorded);
    };
    for (const auto& result : recorded->created) add(result.place.storage);
    for (const StorageNumber storage : recorded->written) add(storage);
  }

  /// The operators, in order, that give `storages` their values.
  std::vector<RecordedOperatorPtr> history_of(const std::vector<StorageNumber>& storages) const {
    const auto later = [](const RecordedOperatorPtr& a, const RecordedOperatorPtr& b) {
      return a->sequence < b->sequence;
    };
    std::priority_queue<RecordedOperatorPtr, std::vector<RecordedOperatorPtr>, decltype(later)>
        open(later);
    std::unordered_set<StorageNumber> needed;
    std::vector<RecordedOperatorPtr> found;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto need = [&](StorageNumber storage, std::uint64_t before) {
      if (!needed.insert(storage).second) return;
      for (const auto& recorded : histories_.at(storage).operators) {
        if (recorded->sequence < before) open.push(recorded);
      }
    };
    for (const StorageNumber storage : storages) need(storage, UINT64_MAX);
    while (!open.empty()) {
      const RecordedOperatorPtr recorded = open.top();
      open.pop();
      if (!found.empty() && found.back() == recorded) continue;  // it writes several of them
      found.push_back(recorded);
      for (const auto& argument : recorded->tensors) {
        need(argument.place.storage, recorded->sequence);
      }
    }
    std::reverse(found.begin(), found.end());
    return found;
  }

 private:
  struct History {
    bool live = true;
    std::vector<RecordedOperatorPtr> operators;
  };
  using Histories = std::unordered_map<StorageNumber, History>;

  /// Moves the histories that no live storage depends on to `garbage`.
  void collect(Histories& garbage) {
    std::unordered_set<StorageNumber> reached;
    std::vector<StorageNumber> open;
    for (const auto& [number, history] : histories_) {
      if (history.live && reached.insert(number).second) open.push_back(number);
    }
    while (!open.empty()) {
      const StorageNumber number = open.back();
      open.pop_back();
      for (const auto& recorded : histories_.at(number).operators) {
        for (const auto& argument : recorded->tensors) {
          if (reached.insert(argument.place.storage).second) open.push_back(argument.place.storage);
        }
      }
    }
    for (auto it = histories_.begin(); it != histories_.end();) {
      const auto next = std::next(it);
      if (reached.count(it->first) == 0) garbage.insert(histories_.extract(it));
      it = next;
    }
    reachable_ = histories_.size();
  }

  mutable std::mutex mutex_;
  Histories histories_;
  std::size_t live_ = 0;
  std::size_t reachable_ = 0;  ///< histories left by the last collect()
  StorageNumber storages_made_ = 0;
  std::uint64_t operators_ = 0;
};

/// The process's log, made by whichever shared object asks first; never destroyed.
inline DeferredLog& deferred_log() {
  static DeferredLog& log = []() -> DeferredLog& {
    std::atomic<OperatorRecorder*>& published = *dispatch_table().recorder;
    OperatorRecorder* known = published.load();
    if (known == nullptr) {
      auto* made = new DeferredLog();
      if (published.compare_exchange_strong(known, made)) return *made;
      delete made;
    }
    return static_cast<DeferredLog&>(*known);
  }();
  return log;
}

/// Marks the storage of deferred tensors.
class DeferredTag final : public StorageTag {
 public:
  explicit DeferredTag(DeferredLog& log)
      : StorageTag(&log), log(log), number(log.add_storage()) {}
  ~DeferredTag() override { log.drop(number); }

  void before_operator(const c10::OperatorHandle&, const c10::TensorImpl&, bool) override {}

  /// The storage that materialize_module() has put under tensors of this one, while it lives.
  c10::intrusive_ptr<c10::StorageImpl> real() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return real_ ? real_->lock() : nullptr;
  }
  void set_real(const c10::intrusive_ptr<c10::StorageImpl>& storage) {
    const std::lock_guard<std::mutex> lock(mutex_);
    real_.emplace(storage);
  }
  bool was_made_real() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return real_.has_value();
  }

  DeferredLog& log;
  const StorageNumber number;

 private:
  mutable std::mutex mutex_;
  std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> real_;
};

inline DeferredTag* as_deferred(StorageTag* tag) {
  if (tag == nullptr || tag->recorder() == nullptr) return nullptr;
  return static_cast<DeferredTag*>(tag);
}

/// The tag of a deferred tensor's storage, null for any other tensor.
inline DeferredTag* deferred_tag(const at::Tensor& tensor) {
  if (!tensor.defined()) return nullptr;
  return as_deferred(tag_of(*tensor.unsafeGetTensorImpl(), dispatch_table().deleter));
}

inline constexpr const char* kNoData =
    "this tensor was made inside fsdp::deferred_init and has no data yet, only a record of how to "
    "make it: its data cannot be read or written through a pointer before materialize_module, "
    "materialize_tensor or fully_shard has made it";

/// Makes every access to the data that does not go through an operator an error.
inline void forbid_access(c10::StorageImpl& storage) {
  storage.release_data_and_set_meta_custom_data_ptr_error_msg_(kNoData);
}

/// Makes `tensor`, on the meta device, deferred: its storage gets a tag, unless it has one, and its
/// operators come to the recorder. It stays the same object. Returns the tag.
inline DeferredTag* adopt(const at::Tensor& tensor, DeferredLog& log) {
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::Storage& storage = tensor.storage();
  c10::StorageImpl& place = *storage.unsafeGetStorageImpl();
  DeferredTag* tag = as_deferred(tag_of(place, dispatch_table().deleter));
  if (tag == nullptr) {
    tag = new DeferredTag(log);
    tag->retain();
    place.set_data_ptr_noswap(
        at::DataPtr(nullptr, tag, dispatch_table().deleter, at::Device(at::kMeta)));
    forbid_access(place);
  }
  if (!impl->key_set().has(kTagKey)) {
    const at::Tensor keyed = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), impl->key_set().add(kTagKey), tensor.dtype());
    keyed.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                       tensor.storage_offset());
    impl->shallow_copy_from(keyed.getIntrusivePtr());
  }
  return tag;
}

}  // namespace fsdp::detail
