// Checkpoints with everything that they can hold, in the background, and as Hugging Face has them.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/engine.hpp"
#include "fsdp/error.hpp"
#include "fsdp/optimizer.hpp"
#include "fsdp/tensor_view.hpp"

namespace fsdp {

/// What a checkpoint holds beside the engine's shards. Everything it points at is borrowed for the
/// call that it is passed to.
struct CheckpointContents {
  /// An optimizer of the same engine, or null: its states and counts.
  const Optimizer* optimizer = nullptr;
  /// State of another optimizer: arrays as long as the shards of their parameters.
  std::vector<fsdp_state_t> states;
  /// Whole tensors by name, e.g. buffers: rank 0's are saved, every rank's are filled.
  std::vector<std::pair<std::string, TensorView>> tensors;
  /// Texts by key (rank 0's are kept). Not used in loading.
  std::map<std::string, std::string> metadata;
};

namespace detail {

/// The C description of contents; borrows them.
class CContents {
 public:
  explicit CContents(const CheckpointContents& from) {
    for (const auto& [name, view] : from.tensors) {
      tensors_.push_back({name.c_str(), view.c_tensor()});
    }
    for (const auto& [key, value] : from.metadata) texts_.push_back({key.c_str(), value.c_str()});
    c_.optimizer = from.optimizer == nullptr ? nullptr : from.optimizer->get();
    c_.states = from.states.data();
    c_.state_count = from.states.size();
    c_.tensors = tensors_.data();
    c_.tensor_count = tensors_.size();
    c_.metadata = texts_.data();
    c_.metadata_count = texts_.size();
  }
  CContents(const CContents&) = delete;
  CContents& operator=(const CContents&) = delete;
  const fsdp_checkpoint_contents_t* get() const noexcept { return &c_; }

 private:
  std::vector<fsdp_named_tensor_t> tensors_;
  std::vector<fsdp_metadata_t> texts_;
  fsdp_checkpoint_contents_t c_ = FSDP_CHECKPOINT_CONTENTS_INIT;
};

}  // namespace detail

/// A checkpoint that is being saved in the background. Copies share it; when the last one is
/// destroyed, it waits until the save has ended.
class CheckpointJob {
 public:
  /// Waits until the save has ended; throws if it failed. After it the checkpoint is complete. May
  /// be called again. Local.
  void wait() const { check(fsdp_checkpoint_job_wait(get())); }

  /// Whether the save has ended, well or not, so that wait() would not wait. Local.
  bool done() const {
    std::int32_t done = 0;
    check(fsdp_checkpoint_job_done(get(), &done));
    return done != 0;
  }

  /// The C handle, owned by this object.
  fsdp_checkpoint_job_t* get() const noexcept { return handle_.get(); }

  /// Takes over a C handle.
  explicit CheckpointJob(fsdp_checkpoint_job_t* handle)
      : handle_(handle, &fsdp_checkpoint_job_destroy) {}

 private:
  std::shared_ptr<fsdp_checkpoint_job_t> handle_;
};

/// Writes shards and `contents` to the new folder `dir`, complete or not at all. Collective.
inline void save_checkpoint(const Engine& engine, const std::string& dir,
                            const CheckpointContents& contents) {
  const detail::CContents c(contents);
  check(fsdp_checkpoint_save_contents(engine.get(), dir.c_str(), c.get()),
        "cannot save the checkpoint '" + dir + "'");
}

/// The same in the background: returns when this rank's part is copied. One save of an engine at a
/// time: while one runs, further ones throw INVALID_STATE on every rank. Collective.
inline CheckpointJob save_checkpoint_async(const Engine& engine, const std::string& dir,
                                           const CheckpointContents& contents) {
  const detail::CContents c(contents);
  fsdp_checkpoint_job_t* job = nullptr;
  check(fsdp_checkpoint_save_async(engine.get(), dir.c_str(), c.get(), &job),
        "cannot save the checkpoint '" + dir + "'");
  return CheckpointJob(job);
}

/// Fills shards and `contents` from a checkpoint of any world size, or from a model in Hugging
/// Face's layout (which has no states); on error nothing has changed. Collective.
inline void load_checkpoint(const Engine& engine, const std::string& dir,
                            const CheckpointContents& contents) {
  const detail::CContents c(contents);
  check(fsdp_checkpoint_load_contents(engine.get(), dir.c_str(), c.get()),
        "cannot load the checkpoint '" + dir + "'");
}

/// How consolidate_checkpoint writes; see fsdp_consolidate_config_t.
struct ConsolidateOptions {
  /// Bytes of tensors per file; 0 is 5 GB.
  std::uint64_t max_file_bytes = 0;
  /// What parameters are rounded to; all zero for as they are.
  fsdp_dtype_t dtype{};
};

/// Writes the checkpoint in `dir` into the new folder `out_dir` in Hugging Face's layout, without
/// states and texts. One process does it. Local.
inline void consolidate_checkpoint(const std::string& dir, const std::string& out_dir,
                                   const ConsolidateOptions& options = {}) {
  fsdp_consolidate_config_t config = FSDP_CONSOLIDATE_CONFIG_INIT;
  config.max_file_bytes = options.max_file_bytes;
  config.dtype = options.dtype;
  check(fsdp_checkpoint_consolidate(dir.c_str(), out_dir.c_str(), &config),
        "cannot consolidate the checkpoint '" + dir + "'");
}

}  // namespace fsdp
