// The engine's optimizers through the C++ layer: every option reaches the C side, groups, learning
// rates, states, errors, and a checkpoint that is gone on from. The arithmetic is tested in C.
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "harness.hpp"

namespace {

/// One backward in which every rank has the gradient `value` everywhere.
void backward(fsdp::Engine& engine, float value) {
  std::vector<float> grad(kSize, value);
  engine.zero_grad();
  engine.unshard(0);
  for (std::uint32_t p = 0; p < 2; ++p)
    engine.accumulate_grad(p, fsdp::TensorView(grad.data(), {kSize}));
  engine.finish_backward();
}

/// Every element of this rank's shard is about `value`.
bool all_about(const fsdp::Engine& engine, std::uint32_t param, double value) {
  const fsdp::Shard shard = engine.shard(param);
  for (std::int64_t i = 0; i < shard.numel; ++i)
    if (std::abs(shard.data[i] - value) > 1e-6) return false;
  return true;
}

void sgd(const fsdp::Communicator& comm) {
  fsdp::Engine engine = make_engine(comm);
  fsdp::SgdConfig config;
  config.lr = 0.1;
  config.momentum = 0.5;
  config.dampening = 0.25;
  config.weight_decay = 0.5;
  config.maximize = true;
  fsdp::Optimizer optimizer(engine, config);
  optimizer.set_param_options(1, 2.0, 0.0);
  backward(engine, 1.0F);
  optimizer.step();
  // weight: g = -1 + 0.5 * 1 = b; bias: g = -1 = b, twice the learning rate.
  REQUIRE(all_about(engine, 0, 1.05) && all_about(engine, 1, 1.2));
  backward(engine, 1.0F);
  optimizer.set_lr(0.2);
  REQUIRE(optimizer.lr() == 0.2);
  optimizer.step();
  // weight: g = -1 + 0.5 * 1.05, b = 0.5 * -0.5 + 0.75 g; bias: b = -0.5 - 0.75.
  REQUIRE(all_about(engine, 0, 1.05 - 0.2 * (-0.25 + 0.75 * -0.475)));
  REQUIRE(all_about(engine, 1, 1.2 + 0.4 * 1.25));
  REQUIRE(optimizer.step_count(0) == 2);
  const float* buffer = optimizer.state(1, "momentum_buffer");
  if (engine.shard(1).numel > 0) REQUIRE(std::abs(buffer[0] + 1.25F) < 1e-6F);
  optimizer.zero_grad();
  REQUIRE(engine.shard(0).grad == nullptr);
  REQUIRE(status_of([&] { optimizer.state(0, "exp_avg"); }, "exp_avg") ==
          FSDP_ERR_INVALID_ARGUMENT);
  REQUIRE(status_of([&] { optimizer.set_lr(-1); }, "lr cannot be -1") ==
          FSDP_ERR_INVALID_ARGUMENT);

  config.dampening = 0;
  config.nesterov = true;
  config.maximize = false;
  config.weight_decay = 0;
  engine = make_engine(comm);
  fsdp::Optimizer nesterov(engine, config);
  backward(engine, 1.0F);
  nesterov.step();
  REQUIRE(all_about(engine, 0, 1 - 0.1 * 1.5));
  config.momentum = 0;
  REQUIRE(status_of([&] { fsdp::Optimizer(engine, config); }, "nesterov needs a momentum") ==
          FSDP_ERR_INVALID_ARGUMENT);
}

void adamw(const fsdp::Communicator& comm) {
  fsdp::Engine engine = make_engine(comm);
  fsdp::AdamWConfig config;
  config.lr = 0.1;
  config.beta1 = 0.5;
  config.beta2 = 0.75;
  config.eps = 1.0;
  config.weight_decay = 0.2;
  config.maximize = true;
  const fsdp::Optimizer first(engine, config);
  fsdp::Optimizer optimizer = first;
  REQUIRE(optimizer.get() == first.get() && optimizer.engine().get() == engine.get());
  REQUIRE(optimizer.state(0, "exp_avg") == nullptr);
  backward(engine, 1.0F);
  optimizer.step();
  // Both averages are 1 in magnitude once corrected: 1 / (1 + eps).
  REQUIRE(all_about(engine, 0, 1 - 0.1 * 0.2 + 0.1 * 0.5));
  if (engine.shard(0).numel > 0) {
    REQUIRE(optimizer.state(0, "exp_avg")[0] == -0.5F);
    REQUIRE(optimizer.state(0, "exp_avg_sq")[0] == 0.25F);
  }

  std::int64_t pid = getpid();
  comm.broadcast(&pid, 1, 0);
  const std::string dir =
      (std::filesystem::temp_directory_path() / ("fsdp-cpp-optimizer-" + std::to_string(pid)))
          .string();
  optimizer.save_checkpoint(dir, {}, {{"epoch", "4"}});
  REQUIRE(fsdp::checkpoint_metadata(dir, "epoch") == "4");
  backward(engine, 3.0F);
  optimizer.step();
  const fsdp::Shard want = engine.shard(0);

  fsdp::Engine again = make_engine(comm);
  fsdp::Optimizer resumed(again, config);
  resumed.load_checkpoint(dir);
  REQUIRE(resumed.step_count(0) == 1);
  backward(again, 3.0F);
  resumed.step();
  for (std::int64_t i = 0; i < want.numel; ++i) REQUIRE(again.shard(0).data[i] == want.data[i]);

  fsdp::Optimizer other(again, fsdp::SgdConfig{});
  REQUIRE(status_of([&] { other.load_checkpoint(dir); }, "cannot load the checkpoint") ==
          FSDP_ERR_CHECKPOINT);
  comm.barrier();
  if (comm.rank() == 0) std::filesystem::remove_all(dir);
}

}  // namespace

int main() {
  try {
    const fsdp::Communicator comm = fsdp::Communicator::from_env();
    sgd(comm);
    adamw(comm);
    comm.barrier();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "FAILED: %s\n", error.what());
    return 1;
  }
  return 0;
}
