// What the tests share: checks that stop with a message, and running a function on several ranks.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <torch/torch.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fsdp/torch.hpp"

namespace harness {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Thrown by a test that has succeeded with a communicator that is broken on purpose.
struct DoneWithBrokenCommunicator {};

inline void fail(const char* file, int line, const std::string& message) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + message);
}

#define REQUIRE(condition)                                           \
  do {                                                               \
    if (!(condition)) harness::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define REQUIRE_SAY(condition, message)              \
  do {                                               \
    if (!(condition)) {                              \
      std::ostringstream said;                       \
      said << #condition << ": " << message;         \
      harness::fail(__FILE__, __LINE__, said.str()); \
    }                                                \
  } while (false)

/// The message of the exception that `action` throws; fails when it throws none or when the message
/// lacks one of `parts`.
inline std::string expect_error(const char* file, int line, const std::function<void()>& action,
                                const std::vector<std::string>& parts) {
  std::string message;
  try {
    action();
  } catch (const Failure&) {
    throw;
  } catch (const std::exception& error) {
    message = error.what();
  }
  if (message.empty()) fail(file, line, "an error was expected, but nothing was thrown");
  for (const std::string& part : parts) {
    if (message.find(part) == std::string::npos) {
      fail(file, line, "the error should contain \"" + part + "\" but is: " + message);
    }
  }
  return message;
}

#define REQUIRE_THROWS(action, ...) \
  harness::expect_error(__FILE__, __LINE__, [&] { action; }, {__VA_ARGS__})

/// Runs `test(communicator)` on `ranks` forked processes and returns 0 when all succeed in time.
/// Call it before anything of LibTorch has run in this process.
inline int run_ranks(int ranks, const std::function<void(fsdp::Communicator)>& test,
                     int deadline_s = 240) {
  std::fflush(nullptr);
  static int runs = 0;
  const std::string job = "test-" + std::to_string(getpid()) + "-" + std::to_string(runs++);
  std::vector<pid_t> children;
  for (int rank = 0; rank < ranks; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      int code = 1;
      try {
        at::set_num_threads(1);
        fsdp::Communicator comm =
            ranks == 1 ? fsdp::Communicator::single() : fsdp::Communicator::shm(job, rank, ranks);
        test(comm);
        comm.barrier();
        code = 0;
      } catch (const DoneWithBrokenCommunicator&) {
        code = 0;
      } catch (const std::exception& error) {
        const std::string what = error.what();  // LibTorch's go on with a stack trace
        std::fprintf(stderr, "rank %d of %d: %s\n", rank, ranks,
                     what.substr(0, what.find("\nframe #0")).c_str());
      }
      std::fflush(nullptr);
      _exit(code);
    }
    children.push_back(child);
  }
  int failed = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(deadline_s);
  while (!children.empty()) {
    for (std::size_t i = 0; i < children.size();) {
      int status = 0;
      if (waitpid(children[i], &status, WNOHANG) == 0) {
        ++i;
        continue;
      }
      if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) ++failed;
      children.erase(children.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (std::chrono::steady_clock::now() > deadline) {
      std::fprintf(stderr, "%zu of %d ranks did not end within %d s\n", children.size(), ranks,
                   deadline_s);
      for (const pid_t child : children) kill(child, SIGKILL);
      for (const pid_t child : children) waitpid(child, nullptr, 0);
      return 1;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return failed == 0 ? 0 : 1;
}

/// One named part of a test program.
struct Part {
  std::string name;
  std::function<void(fsdp::Communicator)> run;
};

/// The main() of a test program: `program [RANKS]` runs every part on that many ranks (default 1).
inline int main_of(int argc, char** argv, const std::vector<Part>& parts) {
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 1;
  if (ranks < 1 || ranks > 64) {
    std::fprintf(stderr, "usage: %s [RANKS]\n", argv[0]);
    return 2;
  }
  int failed = 0;
  for (const Part& part : parts) {
    const int code = run_ranks(ranks, part.run);
    std::printf("%s %s on %d rank%s\n", code == 0 ? "ok    " : "FAILED", part.name.c_str(), ranks,
                ranks == 1 ? "" : "s");
    std::fflush(stdout);
    failed += code != 0;
  }
  return failed == 0 ? 0 : 1;
}

/// A test program of those that a binary holds: `BINARY NAME [ARGUMENTS]` runs it (main.cpp).
class Program {
 public:
  /// `run` is its main(), with NAME as argv[0]. The names live as long as the binary runs.
  Program(const char* name, int (*run)(int, char**)) { all().emplace_back(name, run); }

  static std::vector<std::pair<std::string, int (*)(int, char**)>>& all() {
    static std::vector<std::pair<std::string, int (*)(int, char**)>> programs;
    return programs;
  }
};

/// A folder of this run: main_with_scratch makes it before the ranks are forked.
inline std::string& scratch() {
  static std::string folder;
  return folder;
}

/// main_of with a scratch folder. Afterwards, if all went well, `elsewhere` runs on those of 1, 2 and 3
/// ranks that were not asked for: on what the parts have left in the folder.
inline int main_with_scratch(int argc, char** argv, const std::vector<Part>& parts,
                             const std::function<void(fsdp::Communicator)>& elsewhere) {
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 1;
  std::string pattern = (std::filesystem::temp_directory_path() / "fsdp-test-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) {
    std::perror("a folder for the test");
    return 1;
  }
  scratch() = pattern;
  int code = main_of(argc, argv, parts);
  for (const int other : {1, 2, 3}) {
    if (code == 0 && other != ranks) {
      code = run_ranks(other, elsewhere);
      std::printf("%s then on %d ranks\n", code == 0 ? "ok    " : "FAILED", other);
    }
  }
  std::filesystem::remove_all(scratch());
  return code;
}

}  // namespace harness
