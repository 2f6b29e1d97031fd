// One rank of a system that `make gpu-bench` measures: reads commands, runs training steps, prints
// their times and losses. The protocol is that of bench/harness/ranks.py, with these besides:
//
//     steps N     also "host_s": until everything is launched, before the host waits for the loss
//     stats       bytes: the highest of LibTorch's allocator since the last reset, the GPU's as its
//                 driver says, and the engine's own beside its plan's
//     reset       the highest bytes are those of now
//
// usage: fsdp_bench_gpu --system fsdp|plain --model 124m|774m|tiny --batch B --tokens T
//                       [--device cuda|cpu]
#include <ATen/DeviceAccelerator.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../commands.hpp"
#include "systems.hpp"

namespace {

using Clock = std::chrono::steady_clock;

Arguments parse(int argc, char** argv) {
  Arguments args;
  std::string device = "cuda";
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--system") args.system = value;
    else if (name == "--model") args.model = value;
    else if (name == "--batch") args.batch = std::stoll(value);
    else if (name == "--tokens") args.tokens = std::stoll(value);
    else if (name == "--device") device = value;
    else throw std::runtime_error("unknown argument " + name);
  }
  if (argc % 2 == 0) throw std::runtime_error(std::string(argv[argc - 1]) + " needs a value");
  args.device = torch::Device(device);
  if (!args.device.is_cpu()) {
    fsdp::load_cuda();
    args.device = fsdp::usable_device(args.device);
  }
  return args;
}

std::string stats(System& system, torch::Device device) {
  std::ostringstream out;
  std::int64_t allocated = 0, reserved = 0;
  std::uint64_t used = 0;
  if (!device.is_cpu()) {
    const auto bytes = at::accelerator::getDeviceStats(device.index());
    allocated = bytes.allocated_bytes[0].peak;
    reserved = bytes.reserved_bytes[0].peak;
    const auto [free, total] = at::accelerator::getMemoryInfo(device.index());
    used = total - free;
  }
  out << "{\"allocated_peak_bytes\": " << allocated << ", \"reserved_peak_bytes\": " << reserved
      << ", \"driver_used_bytes\": " << used << system.memory() << "}";
  return out.str();
}

void serve(System& system, const Arguments& args) {
  const Gpt2Config config = gpt2_config(args.model);
  const auto synchronize = [&] {
    if (!args.device.is_cpu()) at::accelerator::synchronizeDevice(args.device.index());
  };
  std::int64_t step = 0;
  const auto run_steps = [&](std::int64_t count) {
    std::vector<double> seconds, host, losses;
    for (std::int64_t i = 0; i < count; ++i, ++step) {
      const auto tokens = tokens_of(config, step, args.batch, args.tokens, args.device);
      synchronize();
      const auto start = Clock::now();
      const torch::Tensor loss = system.step(tokens);
      const auto launched = Clock::now();
      losses.push_back(loss.item<double>());
      synchronize();
      seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
      host.push_back(std::chrono::duration<double>(launched - start).count());
    }
    say("{\"step_s\": " + json_list(seconds) + ", \"host_s\": " + json_list(host) +
        ", \"loss\": " + json_list(losses) + "}");
  };
  const auto reset = [&] {
    synchronize();
    if (!args.device.is_cpu()) at::accelerator::resetPeakStats(args.device.index());
    say("{\"reset\": true}");
  };
  serve_commands(run_steps, {{"stats", [&] { say(stats(system, args.device)); }}, {"reset", reset}});
}

}  // namespace

int main(int argc, char** argv) try {
  const Arguments args = parse(argc, argv);
  std::unique_ptr<System> system;
  if (args.system == "fsdp") system = std::make_unique<Sharded>(args);
  else if (args.system == "plain") system = std::make_unique<Plain>(args);
  else throw std::runtime_error("--system " + args.system + ": fsdp or plain is expected");
  serve(*system, args);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "fsdp_bench_gpu: %s\n", error.what());
  return 1;
}
