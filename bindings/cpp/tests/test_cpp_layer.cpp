// The C++ layer without any framework: collectives, a model with two units trained through the
// hooks, shared ownership, errors, a checkpoint.
//
// usage: test_cpp_layer [RANKS]
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "fsdp/fsdp.hpp"
#include "harness.hpp"

namespace {

void collectives(const fsdp::Communicator& comm) {
  const int ranks = comm.world_size();
  const int rank = comm.rank();
  double values[2] = {1.0 + rank, -1.0 * rank};
  comm.all_reduce(values, 2, fsdp::ReduceOp::sum);
  REQUIRE(values[0] == ranks * (ranks + 1) / 2.0 && values[1] == -ranks * (ranks - 1) / 2.0);
  std::int32_t largest = rank;
  comm.all_reduce(&largest, 1, fsdp::ReduceOp::max);
  REQUIRE(largest == ranks - 1);
  std::int64_t sent = 10 + rank;
  comm.broadcast(&sent, 1, ranks - 1);
  REQUIRE(sent == 9 + ranks);
  float mine = static_cast<float>(rank);
  std::vector<float> all(static_cast<std::size_t>(ranks));
  comm.all_gather(fsdp::TensorView(&mine, {1}), fsdp::TensorView(all.data(), {ranks}));
  for (int r = 0; r < ranks; ++r) REQUIRE(all[static_cast<std::size_t>(r)] == r);
  comm.reduce_scatter(fsdp::TensorView(all.data(), {ranks}), fsdp::TensorView(&mine, {1}),
                      fsdp::ReduceOp::avg);
  REQUIRE(mine == rank);
  const fsdp::Communicator copy = comm;
  copy.barrier();
  REQUIRE(copy.get() == comm.get());
  status_of([] { fsdp::Communicator().barrier(); }, "");
  REQUIRE(status_of([&] { comm.broadcast(&sent, 1, ranks); }, "") == FSDP_ERR_INVALID_ARGUMENT);
}

/// y = b * (a . x), with a in the root and b in a unit of its own.
struct Net {
  std::vector<float> a{0.5F, -1.0F, 2.0F, 0.25F, 1.5F};
  float b = 3.0F;

  fsdp::Engine shard(const fsdp::Communicator& comm) {
    fsdp::Model model("Net");
    const auto child = model.add_module(0, "scale", "Scale");
    REQUIRE(model.add_parameter(0, "a", fsdp::TensorView(a.data(), {5})) == 0);
    REQUIRE(model.add_parameter(child, "b", fsdp::TensorView(&b, {})) == 1);
    const auto head = model.add_module(0, "head", "Head");
    model.tie_parameter(head, "a", 0);
    model.wrap_class("Scale");
    return fsdp::Engine(model, comm);
  }
};

void training(const fsdp::Communicator& comm) {
  Net reference;
  std::optional<fsdp::Engine> kept;
  {
    const fsdp::Communicator copy = comm;
    Net net;
    kept = net.shard(copy);
  }
  fsdp::Engine engine = *kept;
  REQUIRE(engine.unit_count() == 2 && engine.param_count() == 2);
  REQUIRE(engine.communicator().get() == comm.get());
  const std::uint32_t outer = engine.unit_of_module(0);
  const std::uint32_t inner = engine.unit_of_module(1);
  REQUIRE(std::string(engine.unit_info(inner).name) == "scale");
  REQUIRE(std::string(engine.param_info(0).name) == "a" && engine.param_info(0).numel == 5);
  REQUIRE(status_of([&] { engine.unit_info(7); }, "7") == FSDP_ERR_INVALID_ARGUMENT);

  const int ranks = comm.world_size();
  for (int step = 0; step < 3; ++step) {
    // Gradients of 0.5 y^2 for x_r = (r + 1, r + 2, ...), averaged in rank order.
    std::vector<float> grad_a(5, 0.0F);
    float grad_b = 0.0F;
    for (int rank = 0; rank < ranks; ++rank) {
      float dot = 0.0F;
      for (int i = 0; i < 5; ++i) dot += reference.a[static_cast<std::size_t>(i)] * (rank + 1 + i);
      const float y = reference.b * dot;
      grad_b += y * dot;
      for (int i = 0; i < 5; ++i)
        grad_a[static_cast<std::size_t>(i)] += y * reference.b * (rank + 1 + i);
    }

    engine.pre_forward(outer);
    const auto* a = static_cast<const float*>(engine.param_data(0).data);
    float dot = 0.0F;
    for (int i = 0; i < 5; ++i) dot += a[i] * static_cast<float>(comm.rank() + 1 + i);
    engine.pre_forward(inner);
    REQUIRE(engine.unit_info(inner).state == FSDP_UNIT_UNSHARDED);
    float y = *static_cast<const float*>(engine.param_data(1).data) * dot;
    engine.post_forward(inner);
    engine.post_forward(outer);
    REQUIRE(status_of([&] { engine.param_data(1); }, "scale") == FSDP_ERR_INVALID_STATE);

    engine.pre_backward(outer);
    engine.pre_backward(inner);
    const float b = *static_cast<const float*>(engine.param_data(1).data);
    const auto [region, accumulate] = engine.param_grad(1);
    REQUIRE(!accumulate);
    *static_cast<float*>(region.data) = y * dot;
    engine.post_backward(inner);
    float full[5];
    for (int i = 0; i < 5; ++i) full[i] = y * b * static_cast<float>(comm.rank() + 1 + i);
    engine.accumulate_grad(0, fsdp::TensorView(full, {5}));
    engine.post_backward(outer);

    const auto update = [&](std::uint32_t param, float* reference_data, const float* wanted) {
      const fsdp::Shard shard = engine.shard(param);
      const auto offset = engine.param_info(param).shard_offset;
      for (std::int64_t i = 0; i < shard.numel; ++i) {
        REQUIRE(shard.grad[i] == wanted[offset + i] / static_cast<float>(ranks));
        shard.data[i] -= 1e-5F * shard.grad[i];
      }
      for (std::int64_t i = 0; i < engine.param_info(param).numel; ++i) {
        reference_data[i] -= 1e-5F * (wanted[i] / static_cast<float>(ranks));
      }
    };
    update(0, reference.a.data(), grad_a.data());
    update(1, &reference.b, &grad_b);
    engine.zero_grad();
    REQUIRE(engine.shard(0).grad == nullptr);
  }

  // What a checkpoint brings back, with a state, is what was saved.
  const std::string dir = (std::filesystem::temp_directory_path() /
                           ("fsdp-cpp-" + std::to_string(getppid()) + "-" + std::to_string(ranks)))
                              .string();
  const auto size = static_cast<std::size_t>(engine.shard(0).numel);
  std::vector<float> state(size + 1, 7.5F);
  engine.save_checkpoint(dir, {{0, "momentum", state.data()}}, {{"step", "3"}});
  REQUIRE(fsdp::checkpoint_metadata(dir, "step") == "3");
  REQUIRE(fsdp::checkpoint_metadata(dir, "other").empty());
  Net other;
  other.b = 0.0F;
  fsdp::Engine loaded = other.shard(comm);
  std::vector<float> back(size + 1, 0.0F);
  loaded.load_checkpoint(dir, {{0, "momentum", back.data()}});
  for (std::size_t i = 0; i < size; ++i) REQUIRE(back[i] == 7.5F);
  const fsdp::Shard scale = loaded.shard(1);
  if (scale.numel == 1) REQUIRE(*scale.data == reference.b);

  // The same with a whole tensor, in the background; and consolidated.
  double seconds = 2.5;
  fsdp::CheckpointContents contents;
  contents.tensors.emplace_back("seconds", fsdp::TensorView(&seconds, {}));
  contents.metadata["step"] = "4";
  fsdp::CheckpointJob job = fsdp::save_checkpoint_async(engine, dir + "/a", contents);
  seconds = 0;
  job.wait();
  REQUIRE(job.done());
  fsdp::save_checkpoint(engine, dir + "/b", contents);
  fsdp::load_checkpoint(loaded, dir + "/a", contents);
  REQUIRE(seconds == 2.5);
  if (comm.rank() == 0) fsdp::consolidate_checkpoint(dir + "/b", dir + "/whole");
  comm.barrier();
  fsdp::load_checkpoint(loaded, dir + "/whole", contents);
  REQUIRE(seconds == 0);
  REQUIRE(status_of([&] { fsdp::save_checkpoint(engine, dir + "/b", contents); }, dir) ==
          FSDP_ERR_CHECKPOINT);
  comm.barrier();
  if (comm.rank() == 0) std::filesystem::remove_all(dir);
  status_of([&] { fsdp::checkpoint_metadata(dir + "-none"); }, dir);
}

void wrapping(const fsdp::Communicator& comm) {
  const auto units = [&](const std::function<void(fsdp::Model&)>& wrap) {
    float data[4] = {1, 2, 3, 4};
    fsdp::Model model("Root");
    const auto a = model.add_module(0, "a", "Layer");
    const auto b = model.add_module(a, "b", "Layer");
    model.add_parameter(0, "w", fsdp::TensorView(data, {1}));
    model.add_parameter(a, "w", fsdp::TensorView(data, {2}));
    model.add_parameter(b, "w", fsdp::TensorView(data, {2, 2}), /*requires_grad=*/false);
    wrap(model);
    fsdp::EngineConfig config;
    config.gradient_slots = 2;
    return fsdp::Engine(model, comm, config).unit_count();
  };
  REQUIRE(units([](fsdp::Model&) {}) == 1);
  REQUIRE(units([](fsdp::Model& model) { model.wrap_always(); }) == 3);
  REQUIRE(units([](fsdp::Model& model) { model.wrap_class("Layer"); }) == 3);
  REQUIRE(units([](fsdp::Model& model) { model.wrap_module(2); }) == 2);
  REQUIRE(units([](fsdp::Model& model) { model.wrap_size(3); }) == 2);
  REQUIRE(units([](fsdp::Model& model) {
            model.wrap_if([](const fsdp::ModuleInfo& info) {
              return info.name == "a.b" && info.class_name == "Layer" && info.numel == 4;
            });
          }) == 2);
  bool thrown = false;
  try {
    units([](fsdp::Model& model) {
      model.wrap_if([](const fsdp::ModuleInfo&) -> bool { throw std::logic_error("mine"); });
    });
  } catch (const std::logic_error& error) {
    thrown = std::string(error.what()) == "mine";
  }
  REQUIRE(thrown);
  REQUIRE(status_of([&] { units([](fsdp::Model& model) { model.wrap_class("Nothing"); }); },
                    "Nothing") == FSDP_ERR_INVALID_ARGUMENT);
  status_of(
      [&] {
        units([](fsdp::Model& model) {
          model.wrap_module(1);
          model.wrap_module(1);
        });
      },
      "a");
}

/// Collectives lent by C++: those of `comm`.
void lent(const fsdp::Communicator& comm) {
  fsdp_host_comm_config_t config = FSDP_HOST_COMM_CONFIG_INIT;
  fsdp_host_collectives_t table = FSDP_HOST_COLLECTIVES_INIT;
  config.rank = comm.rank();
  config.world_size = comm.world_size();
  auto missing = table;
  try {
    fsdp::Communicator::host(config, missing, nullptr);
    REQUIRE(false);
  } catch (const fsdp::Error& error) {
    REQUIRE(std::string(error.what()).find("callbacks.all_gather is NULL") != std::string::npos);
  }
  using Bytes = std::vector<std::uint8_t>;
  table.all_gather = [](void* self, std::int32_t, const void* input, void* output, std::size_t bytes,
                        void**) -> std::int32_t {
    const auto* world = static_cast<const fsdp::Communicator*>(self);
    const auto* first = static_cast<const std::uint8_t*>(input);
    Bytes in(first, first + bytes);
    const auto n = static_cast<std::int64_t>(bytes);
    std::int64_t in_shape = n, out_shape = n * world->world_size();
    fsdp_tensor_t from{}, to{};
    from.data = in.data();
    to.data = output;
    from.device.device_type = to.device.device_type = FSDP_DEVICE_CPU;
    from.ndim = to.ndim = 1;
    from.dtype = to.dtype = fsdp_dtype_t{FSDP_DTYPE_UINT, 8, 1};
    from.shape = &in_shape;
    to.shape = &out_shape;
    return fsdp_comm_all_gather(world->get(), &from, &to);
  };
  table.reduce_scatter = [](void*, std::int32_t, const void*, void*, std::size_t, fsdp_dtype_t,
                            std::int32_t, void**) -> std::int32_t { return 1; };
  table.all_reduce = [](void*, std::int32_t, void*, std::size_t, fsdp_dtype_t, std::int32_t,
                        void**) -> std::int32_t { return 1; };
  table.broadcast = [](void*, std::int32_t, void*, std::size_t, std::int32_t,
                       void**) -> std::int32_t { return 1; };
  table.barrier = [](void* self, std::int32_t, void**) -> std::int32_t {
    return fsdp_comm_barrier(static_cast<const fsdp::Communicator*>(self)->get());
  };
  auto inner = comm;
  {
    const auto lent = fsdp::Communicator::host(config, table, &inner);
    float value = static_cast<float>(lent.rank() + 1);
    lent.all_reduce(&value, 1, fsdp::ReduceOp::sum);
    const auto world = static_cast<float>(comm.world_size());
    REQUIRE(value == world * (world + 1) / 2);
    REQUIRE(lent.world_size() == comm.world_size());
  }
  fsdp_comm_t* handle = nullptr;
  REQUIRE(fsdp_comm_init_single(&handle) == FSDP_OK);
  REQUIRE(fsdp::Communicator::adopt(handle).get() == handle);
}

}  // namespace

int main(int argc, char** argv) {
  return run_ranks(argc, argv, [](const fsdp::Communicator& comm) {
    collectives(comm);
    lent(comm);
    training(comm);
    wrapping(comm);
  });
}
