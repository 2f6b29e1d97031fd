// The progress display: a line that redraws itself on a terminal, now and then a plain line
// elsewhere.
#pragma once

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

#include "memory.hpp"
#include "metrics.hpp"

/// Shows steps on stderr. Local; an object that is not `shown` prints nothing.
class ProgressBar {
 public:
  ProgressBar(std::int64_t done, std::int64_t steps, bool shown)
      : start_(done), steps_(steps), shown_(shown), terminal_(isatty(STDERR_FILENO) != 0) {}
  ~ProgressBar() { finish(); }

  void update(const StepMetrics& m) {
    if (!shown_) return;
    val_loss_ = m.val_loss.value_or(val_loss_);
    seconds_per_step_ = m.step == start_ + 1 ? m.step_s : 0.9 * seconds_per_step_ + 0.1 * m.step_s;
    if (terminal_) {
      const std::string line = facts(m);
      std::fprintf(stderr, "\r\x1b[K%s",
                   (bar(m.step, columns() - 1 - static_cast<int>(line.size())) + line).c_str());
      drawn_ = true;
    } else if (m.step % std::max<std::int64_t>(1, steps_ / 25) == 0 || m.step == start_ + 1 ||
               m.step == steps_) {
      std::fprintf(stderr, "%s\n", facts(m).c_str());
    }
    std::fflush(stderr);
  }

  /// Ends the redrawn line, so that other output starts on a new one.
  void finish() {
    if (drawn_) std::fputc('\n', stderr);
    drawn_ = false;
  }

 private:
  std::string facts(const StepMetrics& m) const {
    char text[200];
    int size =
        std::snprintf(text, sizeof text, "step %lld/%lld  loss %.4f",
                      static_cast<long long>(m.step), static_cast<long long>(steps_), m.loss);
    if (!std::isnan(val_loss_))
      size += std::snprintf(text + size, sizeof text - size, "  val %.4f", val_loss_);
    const auto left = static_cast<long>(seconds_per_step_ * static_cast<double>(steps_ - m.step));
    std::snprintf(text + size, sizeof text - size, "  %.0f tokens/s  %s  %ld:%02ld left",
                  m.tokens_per_s, human(static_cast<double>(m.host_peak_bytes)).c_str(), left / 60,
                  left % 60);
    return text;
  }

  std::string bar(std::int64_t step, int room) const {
    const int width = std::min(room - 3, 40);
    if (width < 5) return "";
    const auto full = static_cast<int>(width * step / steps_);
    return "[" + std::string(full, '#') + std::string(width - full, '.') + "] ";
  }

  static int columns() {
    winsize size{};
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
  }

  std::int64_t start_, steps_;
  bool shown_, terminal_, drawn_ = false;
  double seconds_per_step_ = 0.0;
  double val_loss_ = std::nan("");  // the last one measured
};
