// The storage behind one unit's parameters: an address while unsharded, an error while sharded.
//
// All parameters of a unit that are computed in float32, and every view of them that autograd
// saves, share one storage object over the unit buffer, and those computed in 16 bits another one
// over their copies: swapping the two pointers unshards and reshards them all. On a GPU both are
// over the unit buffer, which has all types one behind the other, and is another one each time.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/torch/grad_placement.hpp"
#include "fsdp/torch/pending_gradients.hpp"
#include "fsdp/torch/shard_leaf.hpp"
#include "fsdp/torch/tensors.hpp"

namespace fsdp::detail {

class ModelState;
class UnitStorage;

/// What outlives the handle of a sharded model, as long as one of the module's parameters does: its
/// shards (and with them the engine), and what is needed to shard the module again.
struct ShardedRoot {
  struct Param {
    std::string name;
    const c10::TensorImpl* leaf;  ///< the module's own tensor; to compare with, may be gone
    at::Tensor shard;
  };

  const torch::nn::Module* module;  ///< to compare with, may be gone
  std::uint32_t first_module;       ///< its number in the engine's model
  std::uint32_t module_count;       ///< modules of the engine's model
  std::shared_ptr<ShardWrites> writes;
  std::vector<Param> params;        ///< by parameter number
  /// What operators on a unit's parameters cast their inputs to, by the unit's module.
  std::map<std::uint32_t, at::ScalarType> input_types;
  std::weak_ptr<ModelState> state;  ///< the handle's, if it lives
};

/// Decides what happens when an operator touches a unit. Implemented by ModelState.
class UnitHost {
 public:
  /// Makes `unit` readable, or throws. `op` and `tensor` are what touched it.
  virtual void touch(UnitStorage& unit, const c10::OperatorHandle& op,
                     const c10::TensorImpl& tensor) = 0;
  /// Whether the calling thread is in a forward, whose operators cast their inputs.
  virtual bool computes_forward() const noexcept = 0;

 protected:
  ~UnitHost() = default;
};

/// A parameter's place in its unit.
struct UnitParam {
  std::string name;     ///< dotted name from the root
  std::uint32_t id;     ///< its number
  std::int64_t offset;  ///< elements from the start of its storage
  std::int64_t numel;
};

/// Parameters of a unit that share a storage: a pointer that is there while they are unsharded.
struct UnitFace {
  std::size_t bytes = 0;  ///< of the storage
  std::vector<UnitParam> params;  ///< by offset
  c10::intrusive_ptr<c10::StorageImpl> storage;
  const c10::StorageImpl* address = nullptr;  ///< its, also after it was given up
  std::string sharded_message = {};  ///< what it says while sharded; it has that itself then

  /// Every access to the data that does not go through an operator throws `message`.
  void forbid(std::string message) {
    point_at(*storage, nullptr);
    storage->release_data_and_set_meta_custom_data_ptr_error_msg_(std::move(message));
  }

  /// The data is at `data`. Only after forbid(), whose message is kept.
  void allow(void* data) {
    sharded_message = *std::move(storage->get_extra_meta().custom_data_ptr_error_msg_);
    storage->clear_data_ptr_access_error_msg_();
    point_at(*storage, data);
  }
};

inline std::string operator_name(const c10::OperatorHandle& op) { return op.operator_name().name; }

/// One unit's storage and its state as the binding sees it. Made for ModelState; lives as long as
/// any tensor of the unit, which may be longer than the handle: then every use is an error, but the
/// values stay, for fully_shard to go on from.
class UnitStorage final : public StorageTag {
 public:
  /// A sharded unit of the model `root`. `buffer`: the parameters that are computed in float32, in
  /// the unit buffer; `copies`: the others, in their 16-bit copies. Both have no storages yet; they
  /// will be on `device`.
  UnitStorage(UnitHost* host, std::shared_ptr<ShardedRoot> root, std::uint32_t index,
              const std::string& name, UnitFace buffer, UnitFace copies, at::Device device)
      : StorageTag(nullptr, /*follows_results=*/device.is_cpu() && has_large(buffer)),
        index(index),
        name(name.empty() ? "(root)" : name),
        host_(host),
        root_(std::move(root)),
        device_(device),
        buffer_(std::move(buffer)),
        copies_(std::move(copies)) {
    for (UnitFace* face : {&buffer_, &copies_}) {
      face->storage = tagged_storage(nullptr, face->bytes, this, device_);
      face->address = face->storage.get();
    }
    forbid_access("the parameters of unit '" + this->name +
                  "' are sharded: their data cannot be read here. Call the model through the "
                  "handle that fsdp::fully_shard returned, and read shards through its "
                  "parameters()");
  }

  void before_operator(const c10::OperatorHandle& op, const c10::TensorImpl& tensor,
                       bool writes) override {
    if (host_ == nullptr) {
      throw Error(FSDP_ERR_INVALID_STATE, "parameter '" + param_at(tensor) + "' was used by " +
                                              operator_name(op) + " after " + ended_);
    }
    host_->touch(*this, op, tensor);
    if (writes) {
      throw Error(FSDP_ERR_UNSUPPORTED,
                  "parameter '" + param_at(tensor) + "' is sharded and cannot be written by " +
                      operator_name(op) +
                      ": write the shards that the handle's parameters() returns instead");
    }
    pins_.fetch_add(1, std::memory_order_relaxed);
  }

  void after_result(const c10::OperatorHandle& op, const at::Tensor& result) override {
    if (is_weighted(op)) follow_gradients(result);
  }

  const InputCast* input_cast() const noexcept override {
    return input_cast_ && host_ != nullptr && host_->computes_forward() ? &*input_cast_ : nullptr;
  }

  /// Operators of a forward that get a parameter of the unit cast their other inputs from here on.
  void set_input_cast(InputCast cast) { input_cast_ = cast; }

  void after_operator() noexcept override { pins_.fetch_sub(1, std::memory_order_relaxed); }

  /// Whether an operator that got a tensor of this unit is running.
  bool pinned() const noexcept { return pins_.load(std::memory_order_relaxed) != 0; }

  bool unsharded() const noexcept { return unsharded_; }

  /// Unshards the unit: from here on its tensors can be read. Collective.
  void unshard(Engine& engine) {
    void* const buffer = engine.unshard(index);
    void* copies = nullptr;
    if (!device_.is_cpu()) {
      copies = buffer;  // all types one behind the other
    } else if (copies_.bytes > 0) {
      const std::uint32_t first = copies_.params.front().id;
      const fsdp_tensor_t tensor = engine.param_data(first);
      copies = static_cast<char*>(tensor.data) + tensor.byte_offset -
               engine.param_info(first).compute_offset;
    }
    if (!buffer_.params.empty()) buffer_.allow(buffer);
    if (!copies_.params.empty()) copies_.allow(copies);
    unsharded_ = true;
  }

  /// Ends what unshard() began: from here on every access to the data that does not go through an
  /// operator throws.
  void mark_sharded() {
    for (UnitFace* face : {&buffer_, &copies_}) {
      if (!face->params.empty()) face->forbid(std::move(face->sharded_message));
    }
    unsharded_ = false;
  }

  /// The handle is gone: every later use is an error that says so. The shards stay.
  void orphan() {
    end(
        "the handle of the sharded model it belongs to was destroyed; keep what "
        "fsdp::fully_shard returned, or shard the module again");
  }

  /// Another model has taken the parameters over: what is left here are views of old.
  void replace() {
    end(kReplaced);
    root_.reset();
  }

  /// The model that the parameters belong to; null after replace().
  const std::shared_ptr<ShardedRoot>& root() const noexcept { return root_; }

  /// The name of the parameter that `tensor`, a parameter or a view of one, starts in.
  const std::string& param_at(const c10::TensorImpl& tensor) const {
    const std::int64_t offset = tensor.storage_offset();
    const UnitParam* best = nullptr;
    const bool copied = tensor.has_storage() &&
                        tensor.unsafe_storage().unsafeGetStorageImpl() == copies_.address;
    for (const UnitParam& param : (copied ? copies_ : buffer_).params) {
      if (best == nullptr || (param.offset <= offset && (param.numel > 0 || offset == 0))) {
        best = &param;
      }
    }
    return best == nullptr ? name : best->name;
  }

  /// The tensor that a parameter of the unit is: not to be read while the unit is sharded.
  at::Tensor tensor_of(const ParamInfo& param) const {
    const at::ScalarType type = scalar_type_of(param.dtype);
    const at::IntArrayRef sizes(param.shape, static_cast<std::size_t>(param.ndim));
    const auto& storage = type == at::kFloat ? buffer_.storage : copies_.storage;
    return tagged_tensor(storage, storage_offset(param, device_), sizes, type);
  }

  /// Where a parameter begins in its storage, in elements.
  static std::int64_t storage_offset(const ParamInfo& param, at::Device device) {
    const bool wide = param.dtype.bits == 32;
    if (wide && device.is_cpu()) return param.unit_offset;
    return param.compute_offset / (wide ? 4 : 2);
  }

  const std::uint32_t index;  ///< the unit's number in the engine
  const std::string name;     ///< the dotted name of its module, "(root)" for the root

  // Owned by ModelState:
  std::uint32_t tree_begin = 0;  ///< its module's number; descendants' follow
  std::uint32_t tree_end = 0;    ///< one past its module's last descendant
  std::uint32_t expected = 0;    ///< gradients that complete the unit in this backward
  std::uint32_t arrived = 0;     ///< parameters with a gradient since the last reduction
  std::vector<std::uint32_t> param_ids;
  PendingGradients pending;  ///< on a GPU: those that are not in the slot yet

  static constexpr const char* kReplaced =
      "the model was re-wrapped by another fsdp::fully_shard: use the newer handle";

 private:
  static bool has_large(const UnitFace& face) {
    const auto large = [](const UnitParam& param) { return param.numel >= kLargeGradient; };
    return std::any_of(face.params.begin(), face.params.end(), large);
  }

  void end(const char* why) {
    if (host_ == nullptr) return;
    host_ = nullptr;
    ended_ = why;
    forbid_access("the parameters of unit '" + name + "' cannot be read here after " + why);
    buffer_.storage.reset();
    copies_.storage.reset();
  }

  void forbid_access(const std::string& message) {
    for (UnitFace* face : {&buffer_, &copies_}) {
      if (face->params.empty()) continue;
      face->forbid(message);
    }
    unsharded_ = false;
  }

  UnitHost* host_;
  const char* ended_ = nullptr;  // why host_ is gone
  std::shared_ptr<ShardedRoot> root_;
  const at::Device device_;
  UnitFace buffer_;
  UnitFace copies_;
  std::optional<InputCast> input_cast_;
  std::atomic<int> pins_{0};
  bool unsharded_ = false;
};

/// The unit that `tensor` lies in, if it is a parameter (or a view of one) of a sharded model.
inline UnitStorage* unit_of(const at::Tensor& tensor) {
  return dynamic_cast<UnitStorage*>(
      tag_of(*tensor.unsafeGetTensorImpl(), dispatch_table().deleter));
}

}  // namespace fsdp::detail
