// The dispatcher side: how operators on sharded and deferred tensors are seen before they run.
//
// Such tensors carry DispatchKey::DeferredInit in their key set (reserved above autograd for an
// out-of-tree library and otherwise unused), so views of them carry it too and no other operator
// pays. One boxed fallback on that key recognizes storages by the deleter of their DataPtr and
// finds the StorageTag in its context. A sharded storage's tag is asked and the operator goes on
// below the key; a deferred one's names a recorder, which gets the operator instead. A thread that
// is inside deferred_init has the key in its thread-local state, so that factories come here too; so
// has one that is about to compute a weight's gradient, for a few operators.
//
// A process may register one fallback per key, while this header may be compiled into several
// shared objects. The first registers, and publishes what the others need (DispatchTable) through
// an operator of its own, which all find in LibTorch's one dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/torch.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <thread>

#include "fsdp/fsdp.hpp"
#include "fsdp/torch/input_cast.hpp"

namespace fsdp::detail {

class DeferredScope;  // deferred.hpp

/// Takes operators over instead of letting them run. Implemented by deferred construction.
class OperatorRecorder {
 public:
  /// Replaces `op`'s arguments on top of `stack` by its results. None of them is sharded. Called
  /// on the thread that calls the operator, with the key still active.
  virtual void record(const c10::OperatorHandle& op, torch::jit::Stack* stack) = 0;

 protected:
  ~OperatorRecorder() = default;
};

/// Who answers for a storage. Reference-counted by the DataPtrs that carry it and by its makers.
class StorageTag {
 public:
  /// Called before an operator reads (or, `writes`, mutates) `tensor`, which lives in this storage.
  /// Throws to stop the operator.
  virtual void before_operator(const c10::OperatorHandle& op, const c10::TensorImpl& tensor,
                               bool writes) = 0;
  /// Called once for every before_operator that returned, when the operator is done.
  virtual void after_operator() noexcept {}

  /// What the operator's other arguments are cast to, called after before_operator; null: nothing.
  virtual const InputCast* input_cast() const noexcept { return nullptr; }

  /// Called with the first result of an operator of ATen's on the storage, where follows_results().
  virtual void after_result(const c10::OperatorHandle&, const at::Tensor&) {}
  bool follows_results() const noexcept { return follows_results_; }

  /// Who gets the operators on this storage; null for a sharded one, whose operators run.
  OperatorRecorder* recorder() const noexcept { return recorder_; }

  void retain() noexcept { references_.fetch_add(1, std::memory_order_relaxed); }
  void release() noexcept {
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

 protected:
  explicit StorageTag(OperatorRecorder* recorder = nullptr, bool follows_results = false)
      : recorder_(recorder), follows_results_(follows_results) {}
  virtual ~StorageTag() = default;

 private:
  OperatorRecorder* const recorder_;
  const bool follows_results_;
  std::atomic<std::size_t> references_{0};
};

/// Chooses where results are computed. Implemented by GradPlacement (grad_placement.hpp).
class ResultPlacer {
 public:
  /// Runs `op` on the arguments on top of `stack`, and leaves its results there; or does nothing, and
  /// returns false. Called on the thread that calls the operator, with the key excluded.
  virtual bool compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) = 0;

 protected:
  ~ResultPlacer() = default;
};

/// What a thread is inside of.
struct ThreadSlots {
  OperatorRecorder* recorder;  ///< gets this thread's factories, and all that deferred tensors meet
  DeferredScope* scope;        ///< the innermost
  std::weak_ptr<ResultPlacer> placer;  ///< asked about this thread's operators
};

/// What the shared objects of a process agree on. The layout belongs to the operator's name below.
struct DispatchTable {
  c10::DeleterFnPtr deleter;                   ///< marks our storages
  ThreadSlots& (*thread_slots)();              ///< those of the calling thread
  std::atomic<OperatorRecorder*>* recorder;    ///< the process's one recorder, once there is one
};

inline constexpr const char* kTableOperator = "fsdp::dispatch_table";
inline constexpr const char* kTableOverload = "v4";

inline void release_storage_tag(void* context) { static_cast<StorageTag*>(context)->release(); }

/// The registrar's; others reach it through the table.
inline ThreadSlots& own_thread_slots() {
  static thread_local ThreadSlots slots{};
  return slots;
}

inline StorageTag* tag_of(c10::StorageImpl& storage, c10::DeleterFnPtr deleter) {
  const at::DataPtr& data = storage._mutable_data_ptr_no_checks();
  if (data.get_deleter() != deleter) return nullptr;
  return static_cast<StorageTag*>(data.get_context());
}

inline StorageTag* tag_of(const c10::TensorImpl& tensor, c10::DeleterFnPtr deleter) {
  if (!tensor.key_set().has(kTagKey) || !tensor.has_storage()) return nullptr;
  return tag_of(*tensor.unsafe_storage().unsafeGetStorageImpl(), deleter);
}

/// The tags of sharded storages that an operator's arguments have touched; tells them when it is
/// done, however it ends.
class TouchedTags {
 public:
  TouchedTags() = default;
  TouchedTags(const TouchedTags&) = delete;
  TouchedTags& operator=(const TouchedTags&) = delete;
  ~TouchedTags() {
    for (StorageTag* tag : tags_) {
      tag->after_operator();
      tag->release();
    }
  }

  void touch(const c10::OperatorHandle& op, const at::Tensor& tensor, bool writes) {
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    StorageTag* tag = tag_of(*impl, &release_storage_tag);
    if (tag == nullptr) return;
    if (tag->recorder() != nullptr) {
      recorder_ = tag->recorder();
      return;
    }
    tag->before_operator(op, *impl, writes);
    tag->retain();
    tags_.push_back(tag);
    if (input_cast_ == nullptr) input_cast_ = tag->input_cast();
    if (follower_ == nullptr && tag->follows_results()) follower_ = tag;
  }

  bool empty() const noexcept { return tags_.empty(); }

  /// Who is shown the operator's result, if anybody is.
  StorageTag* follower() const noexcept { return follower_; }

  /// What the first tag that casts inputs casts them to; null if none does.
  const InputCast* input_cast() const noexcept { return input_cast_; }

  /// Who takes the operator over, if anybody does. Throws when it touches both kinds of tensors.
  OperatorRecorder* recorder(const c10::OperatorHandle& op) const {
    if (tags_.empty()) return recorder_ != nullptr ? recorder_ : own_thread_slots().recorder;
    if (recorder_ != nullptr) {
      throw Error(FSDP_ERR_UNSUPPORTED,
                  op.operator_name().name +
                      " was called with a tensor of a sharded model and a deferred tensor: "
                      "materialize the deferred one before");
    }
    return nullptr;
  }

 private:
  c10::SmallVector<StorageTag*, 8> tags_;
  OperatorRecorder* recorder_ = nullptr;
  const InputCast* input_cast_ = nullptr;
  StorageTag* follower_ = nullptr;
};

/// Whether the operators inside `op` may be left alone. True for ATen's own, whose kernels only
/// touch what they were given; not for _backward, which runs a whole backward pass, nor for
/// operators of others, which may call modules.
inline bool is_closed(const c10::OperatorHandle& op) {
  const std::string_view name = op.operator_name().name;
  return name.substr(0, 6) == "aten::" && name != "aten::_backward";
}

/// The boxed kernel behind every operator that has a tagged tensor among its arguments, and behind
/// every operator of a thread inside deferred_init.
inline void tag_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                             torch::jit::Stack* stack) {
  TouchedTags touched;
  const auto& arguments = op.schema().arguments();
  const std::size_t count = arguments.size();
  const std::size_t first = stack->size() - count;
  for (std::size_t i = 0; i < count; ++i) {
    const c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      touched.touch(op, value.toTensor(), is_written(arguments[i]));
    } else if (value.isList() && (value.isTensorList() || value.isOptionalTensorList())) {
      const bool writes = is_written(arguments[i]);
      for (const c10::IValue& element : value.toListRef()) {
        if (element.isTensor()) touched.touch(op, element.toTensor(), writes);
      }
    }
  }
  if (OperatorRecorder* recorder = touched.recorder(op)) {
    recorder->record(op, stack);
    return;
  }
  if (const InputCast* cast = touched.input_cast()) cast_inputs(*cast, op, stack);
  const c10::DispatchKeySet below =
      keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kTagKey);
  if (is_closed(op)) {
    c10::impl::ExcludeDispatchKeyGuard nested(kTagKey);
    if (touched.empty()) {  // it came for the placer
      const std::shared_ptr<ResultPlacer> placer = own_thread_slots().placer.lock();
      if (placer && placer->compute(op, stack)) return;
    }
    op.redispatchBoxed(below, stack);
    StorageTag* const follower = touched.follower();
    if (follower != nullptr && at::GradMode::is_enabled() && !stack->empty() &&
        stack->back().isTensor()) {
      follower->after_result(op, stack->back().toTensor());
    }
  } else {
    op.redispatchBoxed(below, stack);
  }
}

inline void publish_table(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  static std::atomic<OperatorRecorder*> recorder{nullptr};
  static const DispatchTable table{&release_storage_tag, &own_thread_slots, &recorder};
  stack->emplace_back(reinterpret_cast<std::int64_t>(&table));
}

/// Registers the fallback, or finds the one another shared object registered.
inline const DispatchTable& find_or_register_table() {
  auto& dispatcher = c10::Dispatcher::singleton();
  const c10::OperatorName name(kTableOperator, kTableOverload);
  if (!dispatcher.hasBackendFallbackForDispatchKey(kTagKey)) {
    try {
      // Never unregistered: operators may be running, and order at exit is not ours to choose.
      new c10::RegistrationHandleRAII(dispatcher.registerFallback(
          kTagKey, c10::KernelFunction::makeFromBoxedFunction<&tag_fallback>(), "fsdp"));
      new c10::RegistrationHandleRAII(dispatcher.registerDef(
          c10::FunctionSchema(kTableOperator, kTableOverload, {},
                              {c10::Argument("address", c10::IntType::get())}),
          "fsdp"));
      new c10::RegistrationHandleRAII(
          dispatcher.registerImpl(name, c10::DispatchKey::CompositeImplicitAutograd,
                                  c10::KernelFunction::makeFromBoxedFunction<&publish_table>(),
                                  std::nullopt, nullptr, "fsdp"));
    } catch (const c10::Error&) {
      // Another thread's copy of this code was faster; its operator appears below.
    }
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  do {
    const auto op = dispatcher.findSchema(name);
    if (op && op->hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) {
      torch::jit::Stack stack;
      op->callBoxed(&stack);
      return *reinterpret_cast<const DispatchTable*>(stack.back().toInt());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  } while (std::chrono::steady_clock::now() < deadline);
  throw Error(FSDP_ERR_UNSUPPORTED,
              "the dispatch key DeferredInit is already used by another library, or by another "
              "version of this one, in this process");
}

/// What marks our storages in this process; registers the fallback on first use. Any thread.
inline const DispatchTable& dispatch_table() {
  static const DispatchTable& table = find_or_register_table();
  return table;
}

/// A pointer to memory on `device` that carries `tag`. Owns one reference to it, nothing of `data`.
inline at::DataPtr tagged_pointer(void* data, StorageTag* tag, at::Device device) {
  tag->retain();
  return at::DataPtr(data, tag, dispatch_table().deleter, device);
}

/// Lets a storage made by tagged_storage point to `data` (borrowed) from here on. Another thread's
/// operator that meets it meanwhile finds the tag all the time.
inline void point_at(c10::StorageImpl& storage, void* data) {
  at::DataPtr& pointer = storage._mutable_data_ptr_no_checks();
  auto* const tag = static_cast<StorageTag*>(pointer.get_context());
  pointer = tagged_pointer(data, tag, pointer.device());
}

/// A storage of `bytes` bytes at `data` (borrowed) on `device` that carries `tag`.
inline c10::intrusive_ptr<c10::StorageImpl> tagged_storage(void* data, std::size_t bytes,
                                                           StorageTag* tag, at::Device device) {
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), static_cast<std::int64_t>(bytes),
      tagged_pointer(data, tag, device), /*allocator=*/nullptr, /*resizable=*/false);
}

/// A contiguous tensor over a tagged storage, `offset` elements from its start, whose operators go
/// through the fallback.
inline at::Tensor tagged_tensor(const c10::intrusive_ptr<c10::StorageImpl>& storage,
                                std::int64_t offset, at::IntArrayRef shape,
                                at::ScalarType type = at::kFloat) {
  const c10::DispatchKey backend = c10::computeDispatchKey(type, at::kStrided, storage->device());
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet({backend, kTagKey}),
      c10::scalarTypeToTypeMeta(type));
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(shape);
  impl->set_storage_offset(offset);
  return tensor;
}

/// Whether `tensor` belongs to a sharded model, live or destroyed.
inline bool is_sharded(const at::Tensor& tensor) {
  const StorageTag* tag = tag_of(*tensor.unsafeGetTensorImpl(), dispatch_table().deleter);
  return tag != nullptr && tag->recorder() == nullptr;
}

}  // namespace fsdp::detail
