// Norms, clipping, communication hooks, the gradient scaler, descriptions, log levels and devices
// through the C++ layer: arguments and errors arrive, and so do exceptions. What they do is tested
// in C.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "harness.hpp"

namespace {

void backward(fsdp::Engine& engine, float value) {
  std::vector<float> grad(kSize, value);
  engine.zero_grad();
  engine.unshard(0);
  engine.accumulate_grad(0, fsdp::TensorView(grad.data(), {kSize}));
  engine.finish_backward();
}

void norms(const fsdp::Communicator& comm) {
  fsdp::Engine engine = make_engine(comm);
  REQUIRE(engine.grad_norm() == 0);
  backward(engine, 2);
  REQUIRE(engine.grad_norm(1) == 22);
  REQUIRE(engine.grad_norm(std::numeric_limits<double>::infinity()) == 2);
  std::vector<const float*> pieces;
  for (std::uint32_t p = 0; p < 2; ++p) pieces.push_back(engine.shard(p).data);
  REQUIRE(std::abs(engine.total_norm(pieces) - std::sqrt(2.0 * kSize)) < 1e-12);
  REQUIRE(engine.clip_grad_norm(11, 1) == 22);
  REQUIRE(std::abs(engine.grad_norm(1) - 11) < 1e-5);
  backward(engine, std::numeric_limits<float>::infinity());
  REQUIRE(status_of([&] { engine.clip_grad_norm(1, 2, true); }, "\"weight\"") ==
          FSDP_ERR_NONFINITE);
  REQUIRE(status_of([&] { engine.total_norm({}, 2); }, "0 pieces") == FSDP_ERR_INVALID_ARGUMENT);
}

void devices() {
  REQUIRE(fsdp::device_count(fsdp::DeviceType::cpu) == 1);
  REQUIRE(setenv("FSDP_CUDA_LIBRARY", "/nonexistent/libcuda.so.1", 1) == 0);
  REQUIRE(status_of([] { fsdp::device_count(fsdp::DeviceType::cuda); }, "/nonexistent") ==
          FSDP_ERR_UNSUPPORTED);
}

void together(const fsdp::Communicator& comm) {
  fsdp::Engine engine = make_engine(comm);
  std::vector<float> one(kSize, 1.0F), two(kSize, 2.0F);
  const std::vector<fsdp::TensorView> grads{{two.data(), {kSize}}, {one.data(), {kSize}}};
  engine.unshard(0);
  engine.accumulate_grads({1, 0}, grads);
  engine.accumulate_grads({}, {});
  REQUIRE(status_of([&] { engine.accumulate_grads({0}, grads); }, "1 parameters and 2 gradients") ==
          FSDP_ERR_INVALID_ARGUMENT);
  REQUIRE(status_of([&] { engine.accumulate_grads({0, 0}, grads); }, "\"weight\"") ==
          FSDP_ERR_INVALID_ARGUMENT);
  engine.finish_backward();
  for (std::uint32_t p = 0; p < 2; ++p) {
    const fsdp::Shard shard = engine.shard(p);
    for (std::int64_t i = 0; i < shard.numel; ++i) REQUIRE(shard.grad[i] == (p == 0 ? 1.0F : 2.0F));
  }
}

void hooks(const fsdp::Communicator& comm) {
  fsdp::Engine engine = make_engine(comm);
  const auto calls = std::make_shared<int>(0);
  engine.set_comm_hook([calls](const fsdp::UnitGradients& unit) {
    REQUIRE(unit.unit == 0 && unit.count == 1 && std::string(unit.name).empty());
    REQUIRE(unit.gradients[0].param == 0 && unit.gradients[0].numel == kSize);
    for (int i = 0; i < kSize; ++i) unit.gradients[0].data[i] *= 3;
    ++*calls;
  });
  fsdp::Engine copy = engine;  // has the same hook
  backward(copy, 2);
  REQUIRE(*calls == 1 && engine.grad_norm(1) == 66);
  engine.set_comm_hook({});
  REQUIRE(calls.use_count() == 1);
  backward(engine, 2);
  REQUIRE(*calls == 1 && engine.grad_norm(1) == 22);
}

void scaler(const fsdp::Communicator& comm) {
  fsdp::Engine engine = make_engine(comm);
  fsdp::SgdConfig sgd;
  sgd.lr = 1;
  fsdp::Optimizer optimizer(engine, sgd);
  fsdp::GradScaler scaler({8, 4, 0.25, 1, 0});
  REQUIRE(scaler.scale() == 8 && scaler.is_enabled());
  backward(engine, 8);
  REQUIRE(!scaler.unscale(engine));
  REQUIRE(engine.grad_norm(1) == kSize);
  REQUIRE(scaler.step(optimizer));
  scaler.update();
  REQUIRE(scaler.scale() == 32);
  const fsdp::Shard shard = engine.shard(0);
  for (std::int64_t i = 0; i < shard.numel; ++i) REQUIRE(shard.data[i] == 0);
  backward(engine, std::numeric_limits<float>::quiet_NaN());
  REQUIRE(!scaler.may_step(engine));
  scaler.update();
  const fsdp::GradScalerState state = scaler.state();
  REQUIRE(state.scale == 8 && state.growth_factor == 4 && state.backoff_factor == 0.25);
  REQUIRE(state.growth_interval == 1 && state.growth_tracker == 0);
  // Gradients of the host's own.
  std::vector<float> own(kSize, 16);
  std::vector<float*> pieces = {own.data(), nullptr};
  fsdp::GradScaler other;
  REQUIRE(other.scale() == 65536);
  other.set_state(state);
  REQUIRE(!other.unscale(engine, pieces));
  for (std::int64_t i = 0; i < kSize; ++i) REQUIRE(own[i] == (i < shard.numel ? 2 : 16));
  REQUIRE(other.may_step(engine, pieces));
  other.update();
  fsdp::GradScaler off({}, false);
  REQUIRE(off.scale() == 1 && !off.unscale(engine) && off.may_step(engine));
  REQUIRE(status_of([] { fsdp::GradScaler bad({-1}); }, "scale") == FSDP_ERR_INVALID_ARGUMENT);
}

void descriptions_and_logs(const fsdp::Communicator& comm) {
  std::vector<fsdp::LogLevel> levels;
  fsdp::set_log_callback(
      [&](fsdp::LogLevel level, const std::string&) { levels.push_back(level); });
  fsdp::set_log_level(fsdp::LogLevel::info);
  fsdp::Engine engine = make_engine(comm);
  backward(engine, 1);
  fsdp::set_log_level(fsdp::LogLevel::warning);
  fsdp::set_log_callback({});
  REQUIRE(levels.size() == 1 && levels[0] == fsdp::LogLevel::info);
  const std::string text = engine.describe();
  REQUIRE(text.front() == '{' && text.back() == '}');
  REQUIRE(text.find("\"weight\"") != std::string::npos);
  REQUIRE(engine.unit_info(0).all_gathers == 1 && engine.unit_info(0).reduce_scatters == 1);
}

/// What a hook throws is rethrown, once; last, because it breaks the communicator.
void hook_that_throws(const fsdp::Communicator& comm) {
  fsdp::Engine engine = make_engine(comm);
  engine.set_comm_hook([](const fsdp::UnitGradients&) { throw std::range_error("too big"); });
  comm.barrier();
  bool caught = false;
  try {
    backward(engine, 1);
  } catch (const std::range_error&) {
    caught = true;
  } catch (const fsdp::Error&) {
    caught = comm.world_size() > 1;  // another rank's hook was first
  }
  REQUIRE(caught);
  REQUIRE(status_of([&] { engine.finish_backward(); }, "hook") == FSDP_ERR_ABORTED);
}

}  // namespace

int main(int argc, char** argv) {
  const int failed = run_ranks(argc, argv, [](const fsdp::Communicator& comm) {
    norms(comm);
    together(comm);
    hooks(comm);
    scaler(comm);
    descriptions_and_logs(comm);
    devices();
  });
  const int failed_last = run_ranks(argc, argv, [](const fsdp::Communicator& comm) {
    hook_that_throws(comm);
    std::_Exit(0);  // a barrier cannot be had any more
  });
  return failed + failed_last;
}
