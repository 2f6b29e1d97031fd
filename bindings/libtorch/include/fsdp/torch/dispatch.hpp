// The dispatcher side: how operators on sharded tensors are seen before they run.
//
// Sharded tensors carry DispatchKey::DeferredInit in their key set (reserved above autograd for an
// out-of-tree library and otherwise unused), so views of them carry it too and no other operator
// pays. One boxed fallback on that key recognizes storages by the deleter of their DataPtr, asks
// the StorageTag in its context, and redispatches below the key.
//
// A process may register one fallback per key, while this header may be compiled into several
// shared objects. The first registers, and publishes what the others need (the deleter that marks
// our storages) through an operator of its own, which all find in LibTorch's one dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/torch.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>

#include "fsdp/fsdp.hpp"

namespace fsdp::detail {

inline constexpr c10::DispatchKey kShardedKey = c10::DispatchKey::DeferredInit;

/// Who answers for a storage. Reference-counted by the DataPtrs that carry it and by its makers.
class StorageTag {
 public:
  /// Called before an operator reads (or, `writes`, mutates) `tensor`, which lives in this storage.
  /// Throws to stop the operator.
  virtual void before_operator(const c10::OperatorHandle& op, const c10::TensorImpl& tensor,
                               bool writes) = 0;
  /// Called once for every before_operator that returned, when the operator is done.
  virtual void after_operator() noexcept {}

  void retain() noexcept { references_.fetch_add(1, std::memory_order_relaxed); }
  void release() noexcept {
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

 protected:
  StorageTag() = default;
  virtual ~StorageTag() = default;

 private:
  std::atomic<std::size_t> references_{0};
};

/// What the shared objects of a process agree on. The layout belongs to the operator's name below.
struct DispatchTable {
  c10::DeleterFnPtr deleter;
};

inline constexpr const char* kTableOperator = "fsdp::dispatch_table";
inline constexpr const char* kTableOverload = "v1";

inline void release_storage_tag(void* context) { static_cast<StorageTag*>(context)->release(); }

inline StorageTag* tag_of(const c10::TensorImpl& tensor, c10::DeleterFnPtr deleter) {
  if (!tensor.key_set().has(kShardedKey) || !tensor.has_storage()) return nullptr;
  auto* storage = tensor.unsafe_storage().unsafeGetStorageImpl();
  const at::DataPtr& data = storage->_mutable_data_ptr_no_checks();
  if (data.get_deleter() != deleter) return nullptr;
  return static_cast<StorageTag*>(data.get_context());
}

/// The tags an operator's arguments have touched; tells them when it is done, however it ends.
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
    tag->before_operator(op, *impl, writes);
    tag->retain();
    tags_.push_back(tag);
  }

 private:
  c10::SmallVector<StorageTag*, 8> tags_;
};

inline bool is_written(const c10::Argument& argument) {
  const c10::AliasInfo* alias = argument.alias_info();
  if (alias == nullptr) return false;
  if (alias->isWrite()) return true;
  for (const c10::AliasInfo& contained : alias->containedTypes()) {
    if (contained.isWrite()) return true;
  }
  return false;
}

/// Whether the operators inside `op` may be left alone. True for ATen's own, whose kernels only
/// touch what they were given; not for _backward, which runs a whole backward pass, nor for
/// operators of others, which may call modules.
inline bool is_closed(const c10::OperatorHandle& op) {
  const std::string& name = op.operator_name().name;
  return name.compare(0, 6, "aten::") == 0 && name != "aten::_backward";
}

/// The boxed kernel behind every operator that has a sharded tensor among its arguments.
inline void sharded_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                             torch::jit::Stack* stack) {
  TouchedTags touched;
  const auto& arguments = op.schema().arguments();
  const std::size_t count = arguments.size();
  const std::size_t first = stack->size() - count;
  for (std::size_t i = 0; i < count; ++i) {
    const c10::IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      touched.touch(op, value.toTensor(), is_written(arguments[i]));
    } else if (value.isTensorList() || value.isOptionalTensorList()) {
      const bool writes = is_written(arguments[i]);
      for (const c10::IValue& element : value.toListRef()) {
        if (element.isTensor()) touched.touch(op, element.toTensor(), writes);
      }
    }
  }
  const c10::DispatchKeySet below =
      keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kShardedKey);
  if (is_closed(op)) {
    c10::impl::ExcludeDispatchKeyGuard nested(kShardedKey);
    op.redispatchBoxed(below, stack);
  } else {
    op.redispatchBoxed(below, stack);
  }
}

inline void publish_table(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  static const DispatchTable table{&release_storage_tag};
  stack->emplace_back(reinterpret_cast<std::int64_t>(&table));
}

/// Registers the fallback, or finds the one another shared object registered.
inline const DispatchTable& find_or_register_table() {
  auto& dispatcher = c10::Dispatcher::singleton();
  const c10::OperatorName name(kTableOperator, kTableOverload);
  if (!dispatcher.hasBackendFallbackForDispatchKey(kShardedKey)) {
    try {
      // Never unregistered: operators may be running, and order at exit is not ours to choose.
      new c10::RegistrationHandleRAII(dispatcher.registerFallback(
          kShardedKey, c10::KernelFunction::makeFromBoxedFunction<&sharded_fallback>(), "fsdp"));
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

/// A data pointer that carries `tag`. Owns one reference to it, nothing of `data`.
inline at::DataPtr tagged_pointer(void* data, StorageTag* tag) {
  tag->retain();
  return at::DataPtr(data, tag, dispatch_table().deleter, at::Device(at::kCPU));
}

/// A storage of `bytes` bytes at `data` (borrowed) that carries `tag`.
inline c10::intrusive_ptr<c10::StorageImpl> tagged_storage(void* data, std::size_t bytes,
                                                           StorageTag* tag) {
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), static_cast<std::int64_t>(bytes),
      tagged_pointer(data, tag), /*allocator=*/nullptr, /*resizable=*/false);
}

/// A contiguous float tensor over a tagged storage, `offset` elements from its start, whose
/// operators go through the fallback.
inline at::Tensor tagged_tensor(const c10::intrusive_ptr<c10::StorageImpl>& storage,
                                std::int64_t offset, at::IntArrayRef shape) {
  at::Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet({c10::DispatchKey::CPU, kShardedKey}),
      caffe2::TypeMeta::Make<float>());
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(shape);
  impl->set_storage_offset(offset);
  return tensor;
}

/// Whether `tensor` belongs to a sharded model, live or destroyed.
inline bool is_sharded(const at::Tensor& tensor) {
  return tag_of(*tensor.unsafeGetTensorImpl(), dispatch_table().deleter) != nullptr;
}

}  // namespace fsdp::detail
