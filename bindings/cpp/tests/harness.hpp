// What the tests of the C++ layer share: a check, what an error must say, an engine, and forked
// ranks.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fsdp/fsdp.hpp"

#define REQUIRE(condition)                                                            \
  do {                                                                                \
    if (!(condition)) {                                                               \
      throw std::runtime_error(std::string(__FILE__ ":") + std::to_string(__LINE__) + \
                               ": " #condition);                                      \
    }                                                                                 \
  } while (false)

/// The status of the Error that `action` throws, whose message must contain `part`.
inline fsdp_status_t status_of(const std::function<void()>& action, const std::string& part) {
  try {
    action();
  } catch (const fsdp::Error& error) {
    const std::string message = error.what();
    if (message.find(part) == std::string::npos) {
      throw std::runtime_error("\"" + part + "\" is not in: " + message);
    }
    REQUIRE(message.find(fsdp_status_name(error.status())) != std::string::npos);
    return error.status();
  }
  throw std::runtime_error("an error about \"" + part + "\" was expected");
}

/// An engine on two parameters of kSize ones: "weight" and "bias".
constexpr int kSize = 11;
inline fsdp::Engine make_engine(const fsdp::Communicator& comm) {
  std::vector<float> ones(kSize, 1.0F);
  fsdp::Model model("Net");
  model.add_parameter(0, "weight", fsdp::TensorView(ones.data(), {kSize}));
  model.add_parameter(0, "bias", fsdp::TensorView(ones.data(), {kSize}));
  return fsdp::Engine(model, comm);
}

/// Runs `test` on as many ranks as the first argument says (1 without), each a forked process that
/// has a minute. Returns what main() should.
inline int run_ranks(int argc, char** argv,
                     const std::function<void(const fsdp::Communicator&)>& test) {
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::string job = "cpp-layer-" + std::to_string(getpid());
  const auto run = [&](int rank) {
    try {
      const auto comm = ranks == 1 ? fsdp::Communicator::single()
                                   : fsdp::Communicator::shm(job, rank, ranks, 20000, 20000);
      REQUIRE(comm.rank() == rank && comm.world_size() == ranks);
      test(comm);
      comm.barrier();
      return 0;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "rank %d of %d: %s\n", rank, ranks, error.what());
      return 1;
    }
  };
  int failed = 0;
  std::vector<pid_t> children;
  for (int rank = 0; rank < ranks; ++rank) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      _exit(run(rank));
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    failed += !WIFEXITED(status) || WEXITSTATUS(status) != 0;
  }
  std::printf("%s on %d rank(s)\n", failed == 0 ? "ok    " : "FAILED", ranks);
  return failed == 0 ? 0 : 1;
}
