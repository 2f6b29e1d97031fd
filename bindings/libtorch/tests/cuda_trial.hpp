// What feature_cuda.cpp runs its scripts with: a model, what a script records, and the same script
// on the CPU and on a device, which is a GPU or, with FSDP_TEST_GPU=stand-in, the CPU again.
#pragma once

#include "stand_in_device.hpp"

#include <c10/core/StreamGuard.h>

#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "models.hpp"
#include "reference.hpp"

namespace harness {

namespace nn = torch::nn;

inline bool on_stand_in() { return fsdp::detail::kGpu == stand_in::kType; }

/// A rank's GPU.
inline at::Device device_of(const fsdp::Communicator& comm) {
  return {fsdp::detail::kGpu, static_cast<c10::DeviceIndex>(on_stand_in() ? comm.rank() : 0)};
}

/// Ranks that are threads share LibTorch's generator of random numbers: one at a time.
inline std::unique_lock<std::mutex> random_turn() {
  static std::mutex mutex;
  return std::unique_lock<std::mutex>(mutex);
}

using models::Block;
using models::BlockImpl;

/// With a tied weight, a parameter that is never used, one that is frozen, and a buffer.
struct NetImpl : nn::Module {
  NetImpl()
      : in(register_module("in", nn::Linear(7, 24))),
        block1(register_module("block1", Block(24))),
        block2(register_module("block2", Block(24))),
        unused(register_module("unused", nn::Linear(3, 3))),
        frozen(register_parameter("frozen", torch::full({24}, 1.25), /*requires_grad=*/false)),
        tied(register_parameter("tied", in->weight)),
        scale(register_buffer("scale", torch::full({24}, 0.75))) {}
  at::Tensor forward(const at::Tensor& x) {
    return torch::linear(block2(block1(in(x)) * frozen) * scale, tied.t());
  }
  nn::Linear in;
  Block block1, block2;
  nn::Linear unused;
  at::Tensor frozen, tied, scale;
};
TORCH_MODULE(Net);

using Model = fsdp::ShardedModule<NetImpl>;

/// As module.to(device), which refuses some pairs of devices.
inline void move(nn::Module& module, at::Device device) {
  for (const at::Tensor& tensor : module.parameters()) {
    fsdp::detail::point_at(tensor, tensor.detach().to(device));
  }
  for (const at::Tensor& tensor : module.buffers()) {
    fsdp::detail::point_at(tensor, tensor.to(device));
  }
}

/// What a script leaves: tensors by name.
struct Record {
  std::vector<std::pair<std::string, at::Tensor>> tensors;

  void add(const std::string& name, const at::Tensor& tensor) {
    tensors.emplace_back(name, tensor.defined() ? tensor.detach().clone().cpu() : tensor);
  }
  void add(const std::string& name, double value) { add(name, torch::tensor(value, at::kDouble)); }
  void add_model(const std::string& when, Model& model) {
    for (const auto& item : model.named_parameters()) {
      add(when + ": " + item.key(), item.value());
      add(when + ": gradient of " + item.key(), item.value().grad());
    }
  }
};

/// A model on one device, and the data that it is trained on, the same on both.
struct Trial {
  fsdp::Communicator comm;
  at::Device device;
  Record record;

  fsdp::ShardOptions options() const {
    fsdp::ShardOptions options;
    options.comm = comm;
    options.device = device;
    options.wrap = fsdp::wrap_class("BlockImpl");
    return options;
  }

  static Net net(int seed = 3) {
    const auto turn = random_turn();
    torch::manual_seed(seed);
    return Net();
  }

  at::Tensor input(int step) const {
    const auto turn = random_turn();
    torch::manual_seed(1000 * step + comm.rank() + 1);
    return torch::randn({6, 7}).to(device);
  }

  at::Tensor loss(Model& model, int step) const {
    return model.forward(input(step)).to(at::kFloat).pow(2).mean();
  }

  /// Forward and backward; the loss is recorded.
  void backward(Model& model, int step) {
    const at::Tensor value = loss(model, step);
    record.add("loss of step " + std::to_string(step), value);
    value.backward();
  }

  template <class Optimizer>
  void train(Model& model, Optimizer& optimizer, int steps) {
    for (int step = 0; step < steps; ++step) {
      model.zero_grad();
      backward(model, step);
      record.add_model("backward " + std::to_string(step), model);
      optimizer.step();
      record.add_model("step " + std::to_string(step), model);
    }
  }
};

using Script = std::function<void(Trial&)>;

/// Runs the script on the CPU and on the device. Numbers may differ by `tolerance`, absolute and
/// relative: LibTorch composes some operators of others for a device than for the CPU.
inline void same_on_both(const fsdp::Communicator& comm, const Script& script,
                         double tolerance = 2e-4) {
  if (!on_stand_in()) {
    setenv("NCCL_HOSTID", ("fsdp-test-" + std::to_string(comm.rank())).c_str(), 1);
    fsdp::load_cuda();
  }
  Trial cpu{comm, at::Device(at::kCPU), {}}, gpu{comm, device_of(comm), {}};
  script(cpu);
  script(gpu);
  const auto& want = cpu.record.tensors;
  const auto& got = gpu.record.tensors;
  REQUIRE_SAY(want.size() == got.size() && !want.empty(), want.size() << " and " << got.size());
  for (std::size_t i = 0; i < want.size(); ++i) {
    const auto& [name, a] = want[i];
    const at::Tensor& b = got[i].second;
    REQUIRE(got[i].first == name);
    REQUIRE_SAY(a.defined() == b.defined(), name << " is there on one of both only");
    if (!a.defined()) continue;
    REQUIRE_SAY(a.sizes() == b.sizes() && a.scalar_type() == b.scalar_type(), name);
    REQUIRE_SAY(torch::allclose(a, b, tolerance, tolerance, /*equal_nan=*/true),
                name << " differs by up to "
                     << (a - b).abs().max().to(at::kDouble).item<double>());
  }
}

/// Whether there is a GPU; a process of its own asks, since CUDA does not survive fork().
inline bool gpu_here() {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    try {
      fsdp::load_cuda();
      fsdp::usable_device(at::Device(fsdp::detail::kGpu, 0));
      _exit(0);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "skipped: %s\n", error.what());
    }
    _exit(77);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/// `test` on so many threads, each with a communicator and a device of its own.
inline void on_threads(int ranks, const std::function<void(fsdp::Communicator)>& test) {
  if (ranks == 1) return test(fsdp::Communicator::single());
  stand_in::let_ranks_meet();
  const std::string job = "test-" + std::to_string(getpid());
  std::vector<std::exception_ptr> thrown(static_cast<std::size_t>(ranks));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        const auto comm = fsdp::Communicator::shm(job, rank, ranks);
        test(comm);
        comm.barrier();
      } catch (...) {
        thrown[static_cast<std::size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& one : thrown) {
    if (one) std::rethrow_exception(one);
  }
}

/// The parts as main_of() runs them: a process for each rank, or one for all where they are
/// threads.
inline std::vector<Part> as_they_run(std::vector<Part> parts, int ranks) {
  for (Part& part : parts) {
    if (!on_stand_in()) break;
    part.name += ", " + std::to_string(ranks) + " as threads of";
    part.run = [ranks, test = part.run](const fsdp::Communicator&) { on_threads(ranks, test); };
  }
  return parts;
}

}  // namespace harness
