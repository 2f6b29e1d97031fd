// Putting other data under a tensor for a while: what it was, and how it becomes that again.
#pragma once

#include <torch/torch.h>

#include <utility>

namespace fsdp::detail {

/// Points `tensor` (the same TensorImpl, whoever shares it) at the storage, sizes and type of
/// `data`, whatever its device. Gradients, hooks and requires_grad stay; no operator runs.
inline void point_at(const at::Tensor& tensor, const at::Tensor& data) {
  tensor.unsafeGetTensorImpl()->shallow_copy_from(data.getIntrusivePtr());
}

/// Remembers what a tensor points at and its version; puts both back when it ends, unless the
/// change is to stay. In between the tensor has a version counter of its own.
class TensorBackup {
 public:
  explicit TensorBackup(at::Tensor tensor)
      : tensor_(std::move(tensor)),
        version_(impl()->version_counter()),
        saved_(impl()->shallow_copy_and_detach(version_, /*allow_tensor_metadata_change=*/true)) {
    if (version_.enabled()) {
      impl()->set_version_counter(c10::VariableVersion(version_.current_version()));
    }
  }
  TensorBackup(TensorBackup&& other) noexcept
      : tensor_(std::move(other.tensor_)),
        version_(std::move(other.version_)),
        saved_(std::move(other.saved_)) {}
  TensorBackup& operator=(TensorBackup&&) = delete;
  ~TensorBackup() { restore(); }

  const at::Tensor& tensor() const noexcept { return tensor_; }

  /// Everything is as it was.
  void restore() {
    if (!saved_) return;
    impl()->shallow_copy_from(saved_);
    impl()->set_version_counter(version_);
    saved_.reset();
  }

  /// What the tensor points at now stays.
  void keep() {
    if (!saved_) return;
    impl()->set_version_counter(version_);
    saved_.reset();
  }

 private:
  c10::TensorImpl* impl() const { return tensor_.unsafeGetTensorImpl(); }

  at::Tensor tensor_;
  c10::VariableVersion version_;
  c10::intrusive_ptr<c10::TensorImpl> saved_;
};

}  // namespace fsdp::detail
