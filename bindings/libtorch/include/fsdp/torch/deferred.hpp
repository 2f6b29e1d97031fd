// Deferred construction: modules whose parameters exist as a record of how to make them.
//
//   auto model = fsdp::deferred_init([&] { return Transformer(config); });  // allocates nothing
//   auto sharded = fsdp::fully_shard(model, options);                       // made unit by unit
//
// Inside deferred_init, tensors that the module's constructors make are meta tensors (their
// device() says meta) without data, and every operator on them is recorded, there and afterwards,
// until they are made. The values are bitwise those of the same construction without deferred_init
// from the same generator state, whatever is made first, and the generator ends in the same state.
//
// What it costs: a random operator's record keeps the generator's state, 5 KiB. Numbers are drawn
// twice. Operators that draw other than by uniform_, normal_, rand or randn (and their _like forms)
// on floating-point tensors are run for real while recording, with what they read, and the result
// is thrown away: for a moment their tensors are allocated. So are, up to 64 MiB, operators whose
// results' shapes LibTorch's meta kernels do not tell (where, index_select, ...). Tensors with data
// that meet deferred ones are copied into the record. Values that constructors look at are real
// from the start: torch::tensor(), and integers of randperm, randint and the like up to 1 MiB.
//
// What is an error (naming the operator; it is not recorded, and the generator is unchanged):
// operators that need values (item, equal, nonzero), that write from a deferred tensor into one
// with data, that make something other than dense CPU tensors, that ask for another device. A
// pointer to the data of a deferred tensor is an error as well. torch::save writes deferred tensors
// as it does meta tensors: without values and without complaint. Operators of libraries other than
// ATen that draw random numbers must carry the tag nondeterministic_seeded.
#pragma once

#include <torch/csrc/autograd/variable.h>
#include <torch/torch.h>

#include <memory>
#include <unordered_map>
#include <utility>

#include "fsdp/torch/deferred_operator.hpp"
#include "fsdp/torch/tensor_backup.hpp"

namespace fsdp {

namespace detail {

/// Records on this thread for as long as it lives. Nests.
class RecordingScope {
 public:
  RecordingScope() : slots_(dispatch_table().thread_slots()), outer_(slots_.recorder) {
    if (c10::impl::tls_is_dispatch_key_excluded(kTagKey)) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "fsdp::deferred_init was called from inside an operator on a sharded or deferred "
                  "tensor, where nothing can be recorded");
    }
    slots_.recorder = &deferred_log();
  }
  RecordingScope(const RecordingScope&) = delete;
  RecordingScope& operator=(const RecordingScope&) = delete;
  ~RecordingScope() { slots_.recorder = outer_; }

 private:
  ThreadSlots& slots_;
  OperatorRecorder* const outer_;
  const c10::impl::IncludeDispatchKeyGuard seen_{kTagKey};
};

/// While one lives, factories of this thread make real tensors, inside deferred_init as well.
/// For fully_shard, which a constructor may call.
class DeferredPause {
 public:
  DeferredPause() : slots_(dispatch_table().thread_slots()), outer_(slots_.recorder) {
    slots_.recorder = nullptr;
  }
  DeferredPause(const DeferredPause&) = delete;
  DeferredPause& operator=(const DeferredPause&) = delete;
  ~DeferredPause() { slots_.recorder = outer_; }

 private:
  ThreadSlots& slots_;
  OperatorRecorder* const outer_;
};

/// How the values of one deferred tensor come to be: no data, and independent of the tensor, which
/// may be pointed at other memory or destroyed. Operators recorded later on tensors that share its
/// storage count. Any thread.
class DeferredRecord {
 public:
  DeferredRecord(DeferredTag& tag, TensorPlace place) : tag_(tag), place_(std::move(place)) {
    tag_.retain();
  }
  DeferredRecord(const DeferredRecord&) = delete;
  DeferredRecord& operator=(const DeferredRecord&) = delete;
  ~DeferredRecord() { tag_.release(); }

  const DeferredLog& log() const noexcept { return tag_.log; }
  const TensorPlace& place() const noexcept { return place_; }

 private:
  DeferredTag& tag_;
  const TensorPlace place_;
};

using DeferredRecordPtr = std::shared_ptr<const DeferredRecord>;

/// The record of `tensor`, or null when it is not deferred.
inline DeferredRecordPtr deferred_record(const at::Tensor& tensor) {
  DeferredTag* tag = deferred_tag(tensor);
  if (tag == nullptr) return nullptr;
  return std::make_shared<const DeferredRecord>(*tag, place_of(tensor, tag->number));
}

/// Writes the recorded values into `destination`, a CPU tensor of the same sizes and type whose
/// contents do not matter. What eager construction leaves uninitialized (torch::empty, never
/// written) is left as it is when `destination` is contiguous and the recorded tensor is all of its
/// storage; in that case also no other memory of the tensor's size is needed for tensors that began
/// as torch::empty, as those of torch::nn do. The version of `destination` grows if anything was
/// written. Not recorded, not differentiated; generators are afterwards as before. Throws
/// INVALID_ARGUMENT for another shape, type or device, and whatever the operators throw.
inline void replay_into(const DeferredRecord& record, const at::Tensor& destination) {
  const TensorPlace& place = record.place();
  const at::IntArrayRef sizes(place.sizes);
  if (!destination.defined() || !destination.device().is_cpu() ||
      destination.layout() != at::kStrided || is_sharded(destination) ||
      destination.sizes() != sizes || destination.scalar_type() != place.type) {
    throw Error(FSDP_ERR_INVALID_ARGUMENT,
                c10::str("replay_into: a dense CPU tensor of type ", place.type, " and shape ",
                         sizes, " is needed"));
  }
  if (destination.numel() == 0) return;
  Replay replay(record.log());
  if (destination.is_contiguous() && place.offset == 0 && !place.conjugate && !place.negative &&
      destination.strides() == at::IntArrayRef(place.strides) &&
      destination.nbytes() == place.storage_bytes) {
    replay.place_at(place.storage,
                    at::from_blob(destination.data_ptr(), sizes, destination.options()));
  }
  replay.run({place.storage});
  const at::Tensor value = replay.at_place(place);
  if (value.const_data_ptr() != destination.const_data_ptr()) {
    destination.copy_(value);
  } else if (replay.wrote(place.storage)) {
    torch::autograd::impl::bump_version(destination);
  }
}

/// Leaves that fully_shard has pointed at memory for a param_init_fn to fill: while one lives,
/// materialize_module() called on this thread, from whatever shared object, fills those that were
/// deferred by replay_into(record, leaf). Scopes nest. To be destroyed on its own thread.
class DeferredScope {
 public:
  DeferredScope() : slots_(dispatch_table().thread_slots()), outer_(slots_.scope) {
    slots_.scope = this;
  }
  DeferredScope(const DeferredScope&) = delete;
  DeferredScope& operator=(const DeferredScope&) = delete;
  ~DeferredScope() { slots_.scope = outer_; }

  /// `leaf`, the same object that the module holds, must outlive the scope; `record` is what it had
  /// before.
  void add(const at::Tensor& leaf, DeferredRecordPtr record) {
    records_[leaf.unsafeGetTensorImpl()] = std::move(record);
  }

  /// The record of `leaf` in this thread's scopes, or null.
  static DeferredRecordPtr find(const at::Tensor& leaf) {
    const DeferredScope* scope = dispatch_table().thread_slots().scope;
    for (; scope != nullptr; scope = scope->outer_) {
      const auto known = scope->records_.find(leaf.unsafeGetTensorImpl());
      if (known != scope->records_.end()) return known->second;
    }
    return nullptr;
  }

 private:
  ThreadSlots& slots_;
  DeferredScope* const outer_;
  std::unordered_map<const c10::TensorImpl*, DeferredRecordPtr> records_;
};

/// point_at() for good: gradients are expected on the device of `data` from here on.
inline void put_under(const at::Tensor& tensor, const at::Tensor& data) {
  point_at(tensor, data);
  if (tensor.is_leaf() && torch::autograd::impl::try_get_grad_accumulator(tensor)) {
    using Node = torch::autograd::Node;
    torch::autograd::impl::set_grad_accumulator(
        tensor, c10::weak_intrusive_ptr<Node>(c10::intrusive_ptr<Node>()));
  }
}

/// Makes one parameter or buffer in place. Tensors that share a storage go on sharing one.
inline void materialize_in_place(const at::Tensor& tensor) {
  DeferredTag* tag = deferred_tag(tensor);
  if (tag == nullptr) {
    if (const auto record = DeferredScope::find(tensor)) replay_into(*record, tensor);
    return;
  }
  const TensorPlace place = place_of(tensor, tag->number);
  at::Tensor real;
  if (const auto storage = tag->real()) {
    const PlainOperators plain;
    real = window(place, c10::Storage(storage));
  } else {
    Replay replay(tag->log);
    replay.run({place.storage});
    real = replay.at_place(place);
    tag->set_real(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
        real.storage().unsafeGetStorageImpl()));
  }
  put_under(tensor, real);
}

}  // namespace detail

/// Calls `make()`, which constructs a module (or anything made of tensors), recording instead of
/// computing on this thread, and returns what it returns. Nests; other threads are unaffected. What
/// make() throws is passed on, and nothing stays recorded.
template <class Make>
decltype(auto) deferred_init(Make&& make) {
  const detail::RecordingScope scope;
  return std::forward<Make>(make)();
}

/// Whether `tensor` has no data yet, only a record. An undefined tensor has not.
inline bool is_deferred(const at::Tensor& tensor) {
  return detail::deferred_tag(tensor) != nullptr;
}

/// Whether any parameter or buffer in or below `module` is deferred.
inline bool is_deferred(const torch::nn::Module& module) {
  for (const at::Tensor& tensor : module.parameters()) {
    if (is_deferred(tensor)) return true;
  }
  for (const at::Tensor& tensor : module.buffers()) {
    if (is_deferred(tensor)) return true;
  }
  return false;
}

/// A real tensor with the values that `tensor` would have, had it not been deferred, and the same
/// requires_grad; `tensor` stays as it is, and later calls give new tensors. One that is not
/// deferred is returned itself. Local.
inline at::Tensor materialize_tensor(const at::Tensor& tensor) {
  detail::DeferredTag* tag = detail::deferred_tag(tensor);
  if (tag == nullptr) return tensor;
  const auto place = detail::place_of(tensor, tag->number);
  detail::Replay replay(tag->log);
  replay.run({place.storage});
  at::Tensor real = replay.at_place(place);
  if (tensor.requires_grad()) real.set_requires_grad(true);
  return real;
}

/// Puts real tensors under the deferred parameters and buffers of `module` (with `recurse`, also of
/// the modules below it): the tensor objects stay, as does whoever shares them and requires_grad.
/// What is not deferred is left alone. Called by a param_init_fn during fully_shard, it fills the
/// memory that the module's parameters have been given. Local.
inline void materialize_module(torch::nn::Module& module, bool recurse = true) {
  for (const at::Tensor& tensor : module.parameters(recurse)) detail::materialize_in_place(tensor);
  for (const at::Tensor& tensor : module.buffers(recurse)) detail::materialize_in_place(tensor);
}

}  // namespace fsdp
