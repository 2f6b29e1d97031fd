// metrics.jsonl: one JSON object per step, appended whole lines at a time.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

/// What is known after a step. Bytes are bytes, times seconds.
struct StepMetrics {
  std::int64_t step = 0;
  double loss = 0.0;               ///< mean over the global batch
  std::optional<double> val_loss;  ///< when it was measured after this step
  double lr = 0.0;
  double grad_norm = 0.0;              ///< over all parameters, before clipping
  double step_s = 0.0;                 ///< without validation and checkpoint
  double tokens_per_s = 0.0;           ///< of all ranks together
  std::uint64_t rank_state_bytes = 0;  ///< this rank's parameters, gradients and Adam state
  std::uint64_t host_peak_bytes = 0;  ///< highest proportional set size seen, summed over the ranks
};

/// Keeps the whole lines of the steps up to `last_step`; the file is replaced at once, or made
/// empty.
void truncate_metrics(const std::string& file, std::int64_t last_step);

/// Appends to metrics.jsonl. Each line is one write, so a kill at any time leaves whole lines.
class MetricsWriter {
 public:
  explicit MetricsWriter(const std::string& file);
  ~MetricsWriter();
  MetricsWriter(const MetricsWriter&) = delete;
  MetricsWriter& operator=(const MetricsWriter&) = delete;

  /// Throws std::system_error when the line cannot be written.
  void write(const StepMetrics& metrics);

 private:
  int fd_;
};
