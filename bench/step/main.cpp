// One rank of a system that bench/ measures: reads commands, runs training steps, prints their times and losses. The
// protocol is described in bench/harness/ranks.py.
//
// Systems: fsdp_shm (torch::optim::AdamW on the shards), fsdp_shm_fused (the engine's AdamW), bound (no communication
// and no engine: this rank computes alone and updates the 1/W of the parameters that would be its shard), plain (no optimizer
// either: for what activations take).
#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fsdp/torch.hpp>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../commands.hpp"
#include "data.hpp"
#include "models.hpp"
#include "plain.hpp"
#include "systems.hpp"

namespace {

using Clock = std::chrono::steady_clock;

template <class Work>
int serve(System<Work>& system, const Work& work) {
  std::int64_t step = 0;
  const auto run_steps = [&](std::int64_t count) {
    std::vector<double> seconds, losses, forward, backward, optimizer;
    for (std::int64_t i = 0; i < count; ++i, ++step) {
      const auto batch = work.batch(step);
      const auto start = Clock::now();
      const double loss = system.step(batch);
      seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
      losses.push_back(loss);
      forward.push_back(system.phases().forward);
      backward.push_back(system.phases().backward);
      optimizer.push_back(system.phases().optimizer);
    }
    say("{\"step_s\": " + json_list(seconds) + ", \"loss\": " + json_list(losses) +
        ", \"forward_s\": " + json_list(forward) + ", \"backward_s\": " + json_list(backward) +
        ", \"optimizer_s\": " + json_list(optimizer) + "}");
  };
  serve_commands(run_steps, {{"stats", [&] { say(system.stats()); }}});
  return 0;
}

template <class Work>
int run(const Arguments& args) {
  const Work work(args);
  if (args.system == "bound") {
    Bound<Work> system(args, work);
    return serve<Work>(system, work);
  }
  if (args.system == "plain") {
    Plain<Work> system(args, work);
    return serve<Work>(system, work);
  }
  Sharded<Work> system(args, work);
  return serve<Work>(system, work);
}

}  // namespace

int main(int argc, char** argv) try {
  at::set_num_threads(1);
  const Arguments args = parse(argc, argv);
  if (args.load_only) {
    (void)(torch::ones({2, 2}) + 1).sum().item<float>();
    (void)fsdp_version();
    serve_commands([](std::int64_t) { throw std::runtime_error("--load-only: no steps"); }, {});
    return 0;
  }
  if (args.workload == "gpt33m") return run<GptWork>(args);
  if (args.workload == "tiny200") return run<TinyWork>(args);
  throw std::runtime_error("--workload " + args.workload + ": gpt33m or tiny200 is expected");
} catch (const std::exception& error) {
  std::fprintf(stderr, "fsdp_bench_step: %s\n", error.what());
  return 1;
}
