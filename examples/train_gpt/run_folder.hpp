// The folder of a run (--out): what an earlier run left there, its checkpoints, and what a
// checkpoint remembers.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "options.hpp"

/// What a run needs besides parameters and optimizer state to go on where it stopped. Batches and
/// the sample are functions of (seed, step), so the step is also the position in the data and no
/// generator's state is kept.
struct Progress {
  std::int64_t step = 0;    ///< steps done
  double first_loss = 0.0;  ///< of step 1
};

class RunFolder {
 public:
  /// The metadata that the checkpoint in a folder was saved with.
  using MetadataOf = std::function<std::string(const std::string& folder)>;

  /// Decides from the options what to do, without changing anything, so that every rank can do so
  /// (`text_sha1`: of the text that it trains on, see Text::digest):
  /// throws UsageError when an earlier run would be overwritten, or the checkpoint to resume from
  /// is missing or of another model. `notes` receives a line for each training option that the
  /// checkpoint had different.
  RunFolder(const Options& options, std::string text_sha1, const MetadataOf& metadata_of,
            std::vector<std::string>& notes);

  /// The checkpoint to load; empty when the run starts from the beginning.
  const std::string& resume_from() const { return resume_from_; }
  /// Where that checkpoint stopped.
  const Progress& progress() const { return progress_; }

  /// Makes the folder ready: removes what --overwrite allows to, and metrics after the checkpoint's
  /// step. On one rank only, after every rank has constructed its RunFolder and loaded the
  /// checkpoint.
  void prepare() const;

  std::string metrics_file() const { return (out_ / "metrics.jsonl").string(); }
  std::string picture_file() const { return (out_ / "loss.png").string(); }
  std::string sample_file() const { return (out_ / "sample.txt").string(); }
  /// checkpoints/step-000100
  std::string checkpoint(std::int64_t step) const;
  /// The metadata to save with it.
  std::string metadata(const Progress& progress) const;

 private:
  const Options& options_;
  std::string text_sha1_;
  std::filesystem::path out_;
  std::string resume_from_;
  Progress progress_;
};
