// sync_module_states for buffers: all ranks get rank 0's.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fsdp/torch/deferred.hpp"
#include "fsdp/torch/module_walk.hpp"

namespace fsdp::detail {

/// Rank 0's buffers of all modules of a walk, until they are installed.
class SyncedBuffers {
 public:
  /// Broadcasts them; throws MISMATCH where ranks have other buffers. Collective.
  SyncedBuffers(const ModuleWalk& walk, const Communicator& comm) {
    std::unordered_set<const c10::TensorImpl*> seen;
    for (const WalkedModule& walked : walk.modules) {
      for (const auto& item : walked.module->named_buffers(/*recurse=*/false)) {
        const at::Tensor& buffer = item.value();
        if (!buffer.defined() || !seen.insert(buffer.unsafeGetTensorImpl()).second) continue;
        at::Tensor value = at::empty(buffer.sizes(), at::TensorOptions(buffer.scalar_type()));
        if (comm.rank() == 0) value.copy_(buffer);
        const auto bytes = static_cast<std::int64_t>(value.nbytes());
        comm.broadcast(TensorView(value.data_ptr(), {FSDP_DTYPE_UINT, 8, 1}, {bytes}), 0);
        received_.emplace_back(buffer, std::move(value));
      }
    }
    is_source_ = comm.rank() == 0;
  }

  /// Gives the other ranks' buffers what was received.
  void install() {
    if (is_source_) return;
    for (auto& [buffer, value] : received_) {
      if (buffer.is_meta()) {
        put_under(buffer, value);
      } else {
        buffer.copy_(value);
      }
    }
  }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> received_;
  bool is_source_ = false;
};

}  // namespace fsdp::detail
