// Gradients on a GPU that wait for the others of their unit, to be copied into its slot together: a
// launch for each of them would take longer than the copying.
#pragma once

#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

namespace fsdp::detail {

/// Of one unit. What waits is kept alive, and is computed on one stream, where it is copied, too: so
/// its memory is given back in the order of the work that uses it.
class PendingGradients {
 public:
  /// No more than this waits, so that it takes little memory.
  static constexpr std::size_t kMostBytes = std::size_t{32} << 20;

  bool empty() const noexcept { return batches_.empty(); }

  /// Whether `gradient`, which was computed on the current stream, can wait besides what waits.
  bool fits(const at::Tensor& gradient) const {
    return gradient.is_contiguous() && !gradient.is_neg() && !gradient.is_conj() &&
           bytes_ + gradient.nbytes() <= kMostBytes &&
           (empty() || stream_ == current(gradient.device()));
  }

  /// Keeps what fits() until it is copied to `target`.
  void add(at::Tensor target, at::Tensor gradient) {
    stream_ = current(gradient.device());
    bytes_ += gradient.nbytes();
    const at::ScalarType type = gradient.scalar_type();
    const auto same = [&](const Batch& batch) { return batch.type == type; };
    auto batch = std::find_if(batches_.begin(), batches_.end(), same);
    if (batch == batches_.end()) batch = batches_.insert(batch, Batch{type, {}, {}});
    batch->targets.push_back(std::move(target));
    batch->gradients.push_back(std::move(gradient));
  }

  /// The stream that copy() is to be called on; something waits.
  c10::Stream stream() const { return *stream_; }

  /// Copies what waits, each type at once.
  void copy() {
    for (Batch& batch : batches_) at::_foreach_copy_(batch.targets, batch.gradients);
    drop();
  }

  /// Forgets what waits.
  void drop() noexcept {
    batches_.clear();
    bytes_ = 0;
  }

 private:
  struct Batch {
    at::ScalarType type;
    std::vector<at::Tensor> targets, gradients;
  };

  static c10::Stream current(at::Device device) {
    return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  }

  std::vector<Batch> batches_;
  std::optional<c10::Stream> stream_;
  std::size_t bytes_ = 0;
};

}  // namespace fsdp::detail
