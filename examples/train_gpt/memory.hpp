// What memory the run takes: this process's share of the host's, and the report printed at the
// start.
#pragma once

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>

#include "optimizer.hpp"
#include "parallel.hpp"

/// This process's proportional set size in bytes: shared pages count by halves, thirds, ... so that
/// the sum over the ranks is what they take together. 0 where the kernel does not tell.
inline std::uint64_t proportional_set_size() {
  std::ifstream rollup("/proc/self/smaps_rollup");
  for (std::string line; std::getline(rollup, line);) {
    if (line.starts_with("Pss:")) return std::stoull(line.substr(4)) * 1024;
  }
  return 0;
}

/// "12.3 MiB"
inline std::string human(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  for (; bytes >= 1024 && unit < 4; ++unit) bytes /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", bytes, units[unit]);
  return text;
}

/// Bytes of this rank's parameters, gradients and Adam state.
inline std::uint64_t rank_state_bytes(TrainedModel& model, TrainOptimizer& optimizer) {
  const ModelBytes bytes = model.bytes();
  return bytes.parameters + bytes.gradients +
         state_bytes(optimizer, model.named_parameters().keys());
}

/// The report: 16 bytes per parameter (value, gradient, two Adam averages; 4 bytes each), whole and
/// on a rank.
inline std::string memory_report(TrainedModel& model, const Shapes& shapes, int world_size) {
  std::uint64_t parameters = 0;
  for (const auto& [name, shape] : shapes) {
    std::uint64_t numel = 1;
    for (const auto size : shape) numel *= static_cast<std::uint64_t>(size);
    parameters += numel;
  }
  const ModelBytes bytes = model.bytes();
  const double whole = 16.0 * static_cast<double>(parameters);
  std::ostringstream report;
  report << "parameters            " << parameters << "\n"
         << "state, unsharded      " << human(whole) << "  = 16 bytes x parameters\n"
         << "state, a rank of " << world_size << "    " << human(whole / world_size)
         << "  = that / " << world_size << ", and " << human(static_cast<double>(bytes.padding))
         << " of padding per copy of the parameters\n"
         << "unit buffers          " << human(static_cast<double>(bytes.unit_buffers))
         << " on the host, shared by its ranks\n"
         << "gradient slots        " << human(static_cast<double>(bytes.gradient_slots)) << "\n";
  return report.str();
}
