// The C++ layer's model description: initializers and what they throw, a trace, a sharded model in
// a bigger one, a plan, and the messages that engines send.
//
// usage: test_cpp_model [RANKS]
#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fsdp/fsdp.hpp"
#include "harness.hpp"

namespace {

void fill(const fsdp_tensor_t& tensor, float value) {
  std::int64_t numel = 1;
  for (std::int32_t d = 0; d < tensor.ndim; ++d) numel *= tensor.shape[d];
  std::fill_n(static_cast<float*>(tensor.data), numel, value);
}

/// An initializer that writes `value` everywhere.
fsdp::ModuleInit all(float value) {
  return [=](const fsdp_module_init_t& init) {
    for (std::uint32_t i = 0; i < init.param_count; ++i) fill(init.tensors[i], value);
  };
}

/// root: a [5] > child (unit): b [3], c [2]; none has storage.
fsdp::Model unfilled() {
  float* const none = nullptr;
  fsdp::Model model("Net");
  const auto child = model.add_module(0, "child", "Child");
  REQUIRE(model.add_parameter(0, "a", fsdp::TensorView(none, {5})) == 0);
  REQUIRE(model.add_parameter(child, "b", fsdp::TensorView(none, {3})) == 1);
  REQUIRE(model.add_parameter(child, "c", fsdp::TensorView(none, {2})) == 2);
  model.wrap_module(child);
  return model;
}

/// Every element of the parameter's piece on this rank is `value`.
bool holds(const fsdp::Engine& engine, std::uint32_t param, float value) {
  const fsdp::Shard shard = engine.shard(param);
  return std::all_of(shard.data, shard.data + shard.numel, [=](float v) { return v == value; });
}

void initializing(const fsdp::Communicator& comm) {
  std::string calls;
  const fsdp::ModuleInit reset = [&](const fsdp_module_init_t& init) {
    calls += std::string("reset ") + init.fqn + " " + init.class_name + ";";
    for (std::uint32_t i = 0; i < init.param_count; ++i) {
      fill(init.tensors[i], static_cast<float>(init.params[i] + 1));
    }
  };
  std::optional<fsdp::Model> model = unfilled();
  REQUIRE(status_of([&] { fsdp::Engine(*model, comm); }, "\"a\" has no storage") ==
          FSDP_ERR_INVALID_ARGUMENT);
  model->set_reset(0, reset);
  model->set_reset(1, [](const fsdp_module_init_t&) { throw std::logic_error("replaced below"); });
  fsdp::Model copy = *model;
  copy.set_reset(1, reset);
  copy.set_param_init(2, [&](std::uint32_t param, const fsdp_tensor_t& tensor) {
    calls += "param " + std::to_string(param) + ";";
    fill(tensor, 9.0F);
  });
  model.reset();  // the copy keeps the functions
  {
    const fsdp::Engine engine(copy, comm);
    REQUIRE(calls == "reset  Net;param 2;reset child Child;");
    REQUIRE(holds(engine, 0, 1.0F) && holds(engine, 1, 2.0F) && holds(engine, 2, 9.0F));
    REQUIRE(engine.stats().materialized_peak_bytes == 5 * sizeof(float));
  }
  fsdp::EngineConfig config;
  config.param_init_fn = all(4.0F);
  {
    const fsdp::Engine engine(copy, comm, config);
    for (std::uint32_t p = 0; p < 3; ++p) REQUIRE(holds(engine, p, 4.0F));
  }

  // What an initializer throws comes out on its rank, and is an error on the others.
  const auto fails = [&](const std::string& what) {
    try {
      fsdp::Engine(copy, comm);
    } catch (const std::logic_error& error) {
      return comm.rank() == 0 && std::string(error.what()) == what;
    } catch (const fsdp::Error& error) {
      return comm.rank() != 0 && error.status() == FSDP_ERR_CALLBACK;
    }
    return false;
  };
  copy.set_reset(1, [&](const fsdp_module_init_t& init) {
    reset(init);
    if (comm.rank() == 0) throw std::logic_error("module");
  });
  REQUIRE(fails("module"));
  copy.set_reset(1, reset);
  copy.set_param_init(1, [&](std::uint32_t, const fsdp_tensor_t& tensor) {
    fill(tensor, 0.0F);
    if (comm.rank() == 0) throw std::logic_error("param");
  });
  REQUIRE(fails("param"));
  copy.rethrow();  // nothing is left to throw
  REQUIRE(status_of([&] { copy.set_reset(1, nullptr); }, "to be callable") ==
          FSDP_ERR_INVALID_ARGUMENT);
  REQUIRE(status_of([&] { copy.set_param_init(1, nullptr); }, "to be callable") ==
          FSDP_ERR_INVALID_ARGUMENT);
}

void tracing(const fsdp::Communicator& comm) {
  using Numbers = std::vector<std::uint32_t>;
  fsdp::Model model = unfilled();
  const auto relu = model.add_module(0, "relu", "ReLU");
  fsdp::Trace trace(model);
  REQUIRE(trace.module_order().empty() && trace.param_order().empty());
  trace.enter(0);
  for (int i = 0; i < 2; ++i) {
    trace.enter(1);
    trace.use({2, 1});
    trace.leave(1);
    trace.enter(relu);
    trace.use({});
    trace.leave(relu);
  }
  REQUIRE(status_of([&] { model.wrap_trace(trace, 1); }, "not complete") == FSDP_ERR_INVALID_STATE);
  trace.leave(0);
  const fsdp::Trace copy = trace;
  REQUIRE((copy.module_order() == Numbers{0, 1, relu, 1, relu}));
  REQUIRE((copy.param_order() == Numbers{2, 1}));
  REQUIRE(!copy.visited(0) && copy.visited(1));
  const auto usage = copy.usage(0);
  REQUIRE(usage.size() == 2 && usage[0].module == 1 && (usage[0].params == Numbers{1, 2}));
  REQUIRE(copy.usage(1).size() == 1 && (copy.usage(1)[0].params == Numbers{2, 1}));
  REQUIRE(copy.usage(relu).empty());
  REQUIRE(status_of([&] { trace.enter(1); }, "after the root") == FSDP_ERR_INVALID_STATE);

  // The same model with storage and without units: child becomes one, because all of it was used.
  float data[5] = {};
  fsdp::Model twin("Net");
  twin.add_module(0, "child", "Child");
  twin.add_module(0, "relu", "ReLU");
  twin.add_parameter(0, "a", fsdp::TensorView(data, {5}));
  twin.add_parameter(1, "b", fsdp::TensorView(data, {3}));
  twin.add_parameter(1, "c", fsdp::TensorView(data, {2}));
  twin.wrap_trace(trace, 5);
  fsdp::Engine engine(twin, comm);
  REQUIRE(engine.unit_count() == 2 && std::string(engine.unit_info(1).name) == "child");

  // The trace as the order of prefetching: the root is unsharded, child is gathered ahead.
  engine.set_prefetch_order(trace);
  engine.pre_forward(0);
  REQUIRE(engine.stats().prefetches == 1);
  engine.finish_forward();
  engine.begin_write();

  // A sharded model as a part of a bigger one.
  fsdp::Model outer("Outer");
  outer.add_parameter(0, "own", fsdp::TensorView(data, {1}));
  const fsdp::AddedModel added = outer.add_sharded(0, "inner", engine);
  REQUIRE(added.module == 1 && added.param == 1);
  const fsdp::Engine both(outer, comm);
  REQUIRE(both.unit_count() == 3 && both.param_count() == 4);
  REQUIRE(std::string(both.param_info(added.param + 1).name) == "inner.child.b");
  REQUIRE(both.shard(added.param).data == engine.shard(0).data);
}

void planning(const fsdp::Communicator& comm) {
  const fsdp::Model model = unfilled();
  fsdp::PlanRequest request;
  request.world_size = static_cast<std::uint32_t>(comm.world_size());
  request.strategy = fsdp::Strategy::shard_grad_op;
  request.reduce_dtype = request.param_dtype = {FSDP_DTYPE_BFLOAT, 16, 1};
  request.gradient_slots = 1;
  request.optimizer_bytes_per_element = 4;
  request.rank = static_cast<std::uint32_t>(comm.rank());
  const std::uint64_t wide = fsdp::plan(model, request).gradient_slot_bytes;
  request.grads_in_param_dtype = true;
  const fsdp::Plan plan = fsdp::plan(model, request);
  REQUIRE(2 * plan.gradient_slot_bytes == wide);

  fsdp::EngineConfig config;
  config.strategy = request.strategy;
  config.reduce_dtype = request.reduce_dtype;
  config.param_dtype = request.param_dtype;
  config.grads_in_param_dtype = true;
  config.gradient_slots = request.gradient_slots;
  config.param_init_fn = all(1.0F);
  fsdp::Engine engine(model, comm, config);
  for (const std::uint32_t unit : {0U, 1U}) engine.pre_forward(unit);
  for (const std::uint32_t unit : {1U, 0U}) engine.post_forward(unit);
  for (const std::uint32_t unit : {0U, 1U}) engine.pre_backward(unit);
  for (const std::uint32_t unit : {1U, 0U}) engine.post_backward(unit);
  const fsdp::Stats stats = engine.stats();
  REQUIRE(plan.param_shard_bytes == stats.param_shard_bytes);
  REQUIRE(plan.grad_shard_bytes == stats.grad_shard_bytes);
  REQUIRE(plan.gradient_slot_bytes == stats.gradient_slot_bytes);
  REQUIRE(plan.unit_buffer_bytes == stats.unit_buffer_bytes);
  REQUIRE(plan.padding_bytes == stats.padding_bytes);
  REQUIRE(plan.all_gathers == 2 && stats.all_gathers == 2);
  REQUIRE(plan.reduce_scatters == 2 && stats.reduce_scatters == 2);
  REQUIRE(plan.reduce_scatter_bytes == stats.reduce_scatter_bytes);
  std::uint64_t elements = 0;
  for (std::uint32_t p = 0; p < 3; ++p) {
    elements += static_cast<std::uint64_t>(engine.shard(p).numel);
  }
  REQUIRE(plan.optimizer_bytes == 4 * elements);
  const fsdp::PlanUnit unit = fsdp::plan_unit(model, request, 1);
  REQUIRE(unit.unit_bytes == engine.unit_info(1).unit_bytes && unit.numel == 5);

  // The rank with the most is the first: units are filled from there.
  request.rank.reset();
  REQUIRE(fsdp::plan(model, request).rank == 0);
  request.rank = 0xffffffffU;
  REQUIRE(status_of([&] { fsdp::plan(model, request); }, "does not exist in a world") ==
          FSDP_ERR_INVALID_ARGUMENT);
  REQUIRE(status_of([&] { fsdp::plan_unit(model, fsdp::PlanRequest{}, 2); }, "unit 2") ==
          FSDP_ERR_INVALID_ARGUMENT);
}

/// What a GPU's engine is asked of one on the CPU, a plan for a GPU, and a machine without a driver.
void gpus(const fsdp::Communicator& comm) {
  fsdp::EngineConfig config;
  config.param_init_fn = all(1.0F);
  fsdp::Engine engine(unfilled(), comm, config);
  const fsdp_status_t unsupported = FSDP_ERR_UNSUPPORTED;
  const std::string why = "computes on the CPU";
  REQUIRE(status_of([&] { engine.set_compute_stream(nullptr); }, why) == unsupported);
  REQUIRE(status_of([&] { engine.cuda_stats(); }, why) == unsupported);
  engine.synchronize();
  engine.async_error();

  const fsdp::Model model = unfilled();
  fsdp::PlanRequest request;
  REQUIRE(fsdp::plan(model, request).pool_bytes == 0);
  request.device = fsdp::DeviceType::cuda;
  const std::uint64_t ahead = fsdp::plan(model, request).pool_bytes;
  request.prefetch = 0;
  REQUIRE(fsdp::plan(model, request).pool_bytes > 0);
  REQUIRE(fsdp::plan(model, request).pool_bytes <= ahead);

  setenv("FSDP_CUDA_LIBRARY", "/nowhere/libcuda.so.1", 1);
  config.cuda = fsdp::cuda_config(0);
  const auto alone = fsdp::Communicator::single();
  REQUIRE(status_of([&] { fsdp::Engine(unfilled(), alone, config); }, "/nowhere/libcuda.so.1") ==
          unsupported);
}

/// Two training forwards of one unit each, the second of another unit than the first.
void deviate(const fsdp::Communicator& comm) {
  fsdp::EngineConfig config;
  config.order_check = fsdp::OrderCheck::warn;
  config.param_init_fn = all(0.0F);
  fsdp::Engine engine(unfilled(), comm, config);
  for (std::uint32_t unit = 0; unit < 2; ++unit) {
    engine.begin_forward(/*training=*/true);
    engine.unshard(unit);
    engine.finish_backward();
  }
}

void logging(const fsdp::Communicator& comm) {
  std::vector<std::string> heard;
  const auto kept = std::make_shared<int>(0);
  fsdp::set_log_callback([&, kept](fsdp::LogLevel level, const std::string& message) {
    heard.push_back(level == fsdp::LogLevel::warning ? message : "of another level");
    fsdp::set_log_callback([&](fsdp::LogLevel, const std::string& later) {
      heard.push_back("later: " + later);
      throw std::runtime_error("dropped");
    });
  });
  REQUIRE(kept.use_count() == 2);
  deviate(comm);
  REQUIRE(kept.use_count() == 1);
  deviate(comm);
  fsdp::set_log_callback({});
  REQUIRE(heard.size() == 2 && heard[0].rfind("Forward order differs", 0) == 0);
  REQUIRE(heard[1] == "later: " + heard[0]);
}

}  // namespace

int main(int argc, char** argv) {
  return run_ranks(argc, argv, [](const fsdp::Communicator& comm) {
    initializing(comm);
    tracing(comm);
    planning(comm);
    logging(comm);
    gpus(comm);
  });
}
