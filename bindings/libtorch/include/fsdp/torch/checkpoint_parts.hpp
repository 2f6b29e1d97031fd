// What a checkpoint of a module has beside its shards: its buffers, and an optimizer's state.
#pragma once

#include <torch/torch.h>

#include <string>
#include <utility>
#include <vector>

#include "fsdp/checkpoint.hpp"
#include "fsdp/torch/model_state.hpp"
#include "fsdp/torch/optimizer_state.hpp"

namespace fsdp::detail {

/// The C ABI's name of a buffer's type; throws UNSUPPORTED, naming the buffer, if it has none.
inline fsdp_dtype_t checkpoint_dtype(at::ScalarType type, const std::string& name) {
  switch (type) {
    case at::kBool: return {FSDP_DTYPE_BOOL, 8, 1};
    case at::kByte: return {FSDP_DTYPE_UINT, 8, 1};
    case at::kChar: return {FSDP_DTYPE_INT, 8, 1};
    case at::kShort: return {FSDP_DTYPE_INT, 16, 1};
    case at::kInt: return {FSDP_DTYPE_INT, 32, 1};
    case at::kLong: return {FSDP_DTYPE_INT, 64, 1};
    case at::kHalf: return {FSDP_DTYPE_FLOAT, 16, 1};
    case at::kBFloat16: return {FSDP_DTYPE_BFLOAT, 16, 1};
    case at::kFloat: return {FSDP_DTYPE_FLOAT, 32, 1};
    case at::kDouble: return {FSDP_DTYPE_FLOAT, 64, 1};
    default:
      throw Error(FSDP_ERR_UNSUPPORTED, "buffer '" + name + "' is " + c10::toString(type) +
                                            ", which checkpoints cannot have");
  }
}

/// A contiguous host tensor of a buffer's type and shape.
inline TensorView buffer_view(const at::Tensor& tensor, const std::string& name) {
  return TensorView(tensor.data_ptr(), checkpoint_dtype(tensor.scalar_type(), name),
                    tensor.sizes().vec());
}

/// The module's buffers by name, as they are; throws for one that is not dense or has no storage.
inline std::vector<std::pair<std::string, at::Tensor>> buffers_of(const torch::nn::Module& module) {
  std::vector<std::pair<std::string, at::Tensor>> buffers;
  for (const auto& item : module.named_buffers()) {
    if (!item.value().defined()) continue;
    if (item.value().is_meta() || item.value().layout() != at::kStrided) {
      throw Error(FSDP_ERR_UNSUPPORTED,
                  "buffer '" + item.key() + "' is no dense tensor, or has no storage");
    }
    buffers.emplace_back(item.key(), item.value());
  }
  return buffers;
}

/// What is saved. Local, but for an optimizer, of which ranks agree what it has.
struct CheckpointParts {
  CheckpointParts(const torch::nn::Module& module, ModelState& state, const std::string& metadata,
                  torch::optim::Optimizer* optimizer = nullptr) {
    state.require_current();
    state.settle();
    for (const auto& [name, buffer] : buffers_of(module)) {
      kept_.push_back(buffer.detach().cpu().contiguous());
      contents.tensors.emplace_back(name, buffer_view(kept_.back(), name));
    }
    contents.metadata[kUserMetadata] = metadata;
    if (optimizer == nullptr) return;
    snapshot_ = snapshot_optimizer(*optimizer, state);
    contents.states = snapshot_.states;
    contents.metadata[kOptimizerMetadata] = snapshot_.description;
  }
  CheckpointParts(const CheckpointParts&) = delete;
  CheckpointParts& operator=(const CheckpointParts&) = delete;

  CheckpointContents contents;

 private:
  std::vector<at::Tensor> kept_;
  OptimizerSnapshot snapshot_;
};

/// Where a checkpoint's buffers are read to, so that a failed load changes none.
class BuffersToLoad {
 public:
  explicit BuffersToLoad(const torch::nn::Module& module) : buffers_(buffers_of(module)) {
    for (const auto& [name, buffer] : buffers_) {
      read_.push_back(at::empty(buffer.sizes(), at::TensorOptions(buffer.scalar_type())));
      contents.tensors.emplace_back(name, buffer_view(read_.back(), name));
    }
  }
  BuffersToLoad(const BuffersToLoad&) = delete;
  BuffersToLoad& operator=(const BuffersToLoad&) = delete;

  /// Gives the module what was read.
  void install() {
    const torch::NoGradGuard no_grad;
    for (std::size_t i = 0; i < buffers_.size(); ++i) buffers_[i].second.copy_(read_[i]);
  }

  CheckpointContents contents;

 private:
  std::vector<std::pair<std::string, at::Tensor>> buffers_;
  std::vector<at::Tensor> read_;
};

}  // namespace fsdp::detail
