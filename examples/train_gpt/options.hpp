// The trainer's options: what each means, its default, and the checks that need no other rank.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gpt_config.hpp"

/// An option or input that cannot be used; what() names it and says what would be right.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  GptConfig model;

  std::vector<std::string> text;
  double val_fraction = 0.05;
  std::int64_t val_every = 50;  ///< steps between validations; 0: none
  std::int64_t val_batches = 4;

  std::int64_t batch = 8;         ///< sequences per rank; with global_batch: what that gives
  std::int64_t global_batch = 0;  ///< sequences of all ranks together; 0: batch * world size
  std::int64_t micro_batches = 1;  ///< backwards of a step, each on a part of the rank's batch
  std::int64_t steps = 500;
  double lr = 1e-3;
  double min_lr = 1e-4;
  std::int64_t warmup = 50;
  double weight_decay = 0.1;
  std::pair<double, double> betas{0.9, 0.95};
  double eps = 1e-8;
  std::string optimizer = "torch";  ///< whose AdamW: "torch" or "fused"
  std::string precision = "float32";  ///< what the sharded model computes in, or "bfloat16"
  bool cpu_offload = false;           ///< shards and optimizer state in host memory
  double clip = 1.0;  ///< 0: gradients are not clipped
  std::uint64_t seed = 1;

  std::string out = "out";
  std::int64_t save_every = 0;  ///< steps between checkpoints; 0: only at the end
  bool resume = false;
  std::string resume_from;  ///< empty: the latest checkpoint in `out`
  bool overwrite = false;
  bool picture = true;  ///< of the loss curve, at the end

  std::string prompt = "In the ";
  std::int64_t sample_tokens = 300;
  double temperature = 0.8;

  std::string comm = "env";  ///< shared memory between the launcher's ranks, or "mpi"
  std::string strategy = "full-shard";  ///< as of fsdp::Strategy
  std::int64_t shard_size = 0;          ///< ranks of a shard group, for the hybrid strategies
  std::string device = "cpu";  ///< "cpu", "cuda" (the rank's own GPU) or "cuda:N"
  bool no_shard = false;
  int threads = 0;  ///< 0: the machine's cores over the world size
  bool quiet = false;
};

/// Reads the command line. Prints --help or --version and exits 0 when asked for; throws UsageError
/// for an unknown option, a bad value, or values that do not fit together.
Options parse_options(int argc, char** argv);

/// Fixes `batch` and `global_batch` for this world size; throws UsageError when they do not divide.
void fit_batch(Options& options, int world_size);
