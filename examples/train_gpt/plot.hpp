// Draws the loss curve by running plot_loss.py with the Python that the build found.
#pragma once

#include <spawn.h>
#include <sys/wait.h>

#include <cerrno>
#include <cstring>
#include <iostream>
#include <stdexcept>
#include <string>

extern char** environ;

/// Makes `picture` (PNG) from `metrics`. Where Python or matplotlib is missing it prints a warning;
/// any other failure throws.
inline void plot_loss(const std::string& metrics, const std::string& picture) {
  constexpr int kNoMatplotlib = 3;  // plot_loss.py's exit status
  std::string python = TRAIN_GPT_PYTHON, script = TRAIN_GPT_PLOT_SCRIPT, from = metrics,
              to = picture;
  char* arguments[] = {python.data(), script.data(), from.data(), to.data(), nullptr};
  pid_t child = 0;
  const int error = posix_spawnp(&child, python.c_str(), nullptr, nullptr, arguments, environ);
  if (error != 0) {
    std::cerr << "train_gpt: warning: no picture of the loss curve: cannot run " << python << ": "
              << std::strerror(error) << "\n";
    return;
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
  if (WIFEXITED(status) && WEXITSTATUS(status) == kNoMatplotlib) {
    std::cerr << "train_gpt: warning: no picture of the loss curve: " << python
              << " has no matplotlib; install it and run: " << python << " " << script << " "
              << metrics << " " << picture << "\n";
    return;
  }
  throw std::runtime_error("drawing the loss curve failed: " + python + " " + script + " " +
                           metrics + " " + picture);
}
