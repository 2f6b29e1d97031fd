// The sharded leaves: one 1-D tensor per parameter over this rank's shard, for optimizers.
//
// Reading one is always allowed. Before the first operator that writes one, the engine is asked to
// wait until no other rank reads the old values (begin_write), so that any in-place operation by
// anybody is safe and none is silently early.
#pragma once

#include <torch/csrc/autograd/variable.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/heap.hpp"
#include "fsdp/torch/device.hpp"
#include "fsdp/torch/dispatch.hpp"

namespace fsdp::detail {

/// When this rank's shards may be written. Shared by the model and every sharded leaf, which keep
/// the engine alive.
class ShardWrites {
 public:
  /// `engine` computes on `device`, and its shards are on `shard_device`.
  ShardWrites(Engine engine, at::Device device, at::Device shard_device)
      : engine_(std::move(engine)), device_(device), shard_device_(shard_device) {}

  const Engine& engine() const noexcept { return engine_; }

  /// To call for what may launch work: on a GPU the engine learns which stream is current on this
  /// thread, in a backward autograd's for the device.
  Engine& engine() {
    if (!device_.is_cpu()) {
      void* const stream = current_stream(device_);
      if (stream != stream_) engine_.set_compute_stream(stream);
      stream_ = stream;
    }
    return engine_;
  }

  at::Device device() const noexcept { return device_; }
  at::Device shard_device() const noexcept { return shard_device_; }

  /// The shards belong to another model from here on: `successor` answers, and its engine takes the
  /// place of this one.
  void hand_over(std::shared_ptr<ShardWrites> successor) {
    detach();
    engine_ = successor->engine();
    successor_ = std::move(successor);
  }

  /// A unit has been unsharded: this rank and its peers may be reading shards.
  void on_unshard() noexcept {
    reading_ = true;
    writable_ = false;
    written_ = false;
  }

  /// This rank reads no more; peers may.
  void on_closed() noexcept { reading_ = false; }

  /// The engine said that shards may be written.
  void on_writable() noexcept {
    reading_ = false;
    writable_ = true;
  }

  /// Whether a unit was unsharded since the last forward or backward ended.
  bool reading() const noexcept { return reading_; }

  /// Call before writing a shard. Collective when it has to wait.
  void before_write() {
    if (successor_) return successor_->before_write();
    if (written_) return;
    if (!writable_) {
      if (recover_) recover_();
      engine().begin_write();
      on_writable();
    }
    // Graphs that saved the old values must not run backward with the new ones.
    for (const at::Tensor& leaf : module_leaves_) torch::autograd::impl::bump_version(leaf);
    written_ = true;
  }

  /// `leaves`: the module's own parameters, whose saved versions a write makes stale. `recover` is
  /// run before the engine is asked anything. Both are dropped by detach().
  void attach(std::vector<at::Tensor> leaves, std::function<void()> recover) {
    module_leaves_ = std::move(leaves);
    recover_ = std::move(recover);
  }

  /// The model is being destroyed; the leaves stay usable.
  void detach() {
    module_leaves_.clear();
    recover_ = nullptr;
  }

 private:
  Engine engine_;
  const at::Device device_;
  const at::Device shard_device_;
  std::optional<void*> stream_;  // the engine's, once it was told one
  std::shared_ptr<ShardWrites> successor_;
  bool reading_ = false;
  bool writable_ = false;
  bool written_ = false;
  std::vector<at::Tensor> module_leaves_;
  std::function<void()> recover_;
};

/// Answers for the storage of one sharded leaf.
class ShardTag final : public StorageTag {
 public:
  explicit ShardTag(std::shared_ptr<ShardWrites> writes) : writes_(std::move(writes)) {}

  void before_operator(const c10::OperatorHandle&, const c10::TensorImpl&, bool writes) override {
    if (writes) writes_->before_write();
  }

 private:
  std::shared_ptr<ShardWrites> writes_;
};

/// The sharded leaf of parameter `param`: shape {shard_numel}, this rank's piece of the flattened
/// parameter. It keeps the engine alive. Collective behaviour as ShardWrites.
inline at::Tensor make_shard_leaf(const std::shared_ptr<ShardWrites>& writes, std::uint32_t param,
                                  bool requires_grad) {
  const Shard shard = writes->engine().shard(param);
  const auto storage = tagged_storage(
      shard.data, static_cast<std::size_t>(shard.numel) * sizeof(float), new ShardTag(writes),
      writes->shard_device());
  at::Tensor leaf = tagged_tensor(storage, 0, {shard.numel});
  leaf.set_requires_grad(requires_grad);
  return leaf;
}

/// A view of the gradient shard of `shard`, undefined while it has none. It keeps the engine alive,
/// and the memory, though the gradient is cleared; an ordinary tensor otherwise, which may be
/// written at any time. `moves`, if not null, says whether the gradient may be elsewhere once it was
/// cleared.
inline at::Tensor grad_shard_view(const std::shared_ptr<ShardWrites>& writes, const Shard& shard,
                                  bool* moves = nullptr) {
  if (shard.grad == nullptr) return at::Tensor();
  const bool in_heap = heap_retain(shard.grad);
  if (moves != nullptr) *moves = in_heap;
  const auto release = [writes, in_heap](void* data) {
    if (in_heap) heap_release(data);
  };
  return at::from_blob(shard.grad, {shard.numel}, release,
                       at::TensorOptions(at::kFloat).device(writes->shard_device()),
                       writes->shard_device());
}

/// Whether `grad` is a view of the gradient shard and not a tensor of the user's own.
inline bool is_shard_view(const at::Tensor& grad, const Shard& shard) {
  return shard.grad != nullptr && grad.numel() == shard.numel && !is_sharded(grad) &&
         grad.scalar_type() == at::kFloat &&
         (shard.numel == 0 || grad.const_data_ptr() == shard.grad);
}

/// Answers for the `.grad` of a module's own parameter, which exists only to make an optimizer or
/// a clipping function that was given the wrong parameters fail with a message.
class PoisonTag final : public StorageTag {
 public:
  explicit PoisonTag(std::string name) : name_(std::move(name)) {}

  void before_operator(const c10::OperatorHandle& op, const c10::TensorImpl&, bool) override {
    throw Error(FSDP_ERR_INVALID_STATE,
                "the gradient of the module's own parameter '" + name_ + "' was used by " +
                    op.operator_name().name +
                    ", but the model is sharded: build optimizers on, and read gradients from, "
                    "the parameters() of the handle that fsdp::fully_shard returned, and clear "
                    "them with its zero_grad()");
  }

 private:
  std::string name_;
};

/// A tensor of the sizes and type of `leaf` without data, any operator on which throws, naming
/// parameter `name`.
inline at::Tensor make_poison_grad(const std::string& name, const at::Tensor& leaf) {
  auto storage = tagged_storage(nullptr, 0, new PoisonTag(name), leaf.device());
  storage->release_data_and_set_meta_custom_data_ptr_error_msg_(
      "the gradient of the sharded parameter '" + name +
      "' is not here: read gradients from the parameters() of the handle that "
      "fsdp::fully_shard returned");
  return tagged_tensor(storage, 0, leaf.sizes(), leaf.scalar_type());
}

}  // namespace fsdp::detail
