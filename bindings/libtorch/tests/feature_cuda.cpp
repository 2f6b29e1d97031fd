// Sharded models on a GPU: every script of training here runs on the CPU and on the device, and
// what it leaves (losses, gradients, shards, state dicts) must be the same.
//
//   feature_cuda [RANKS]   on GPU 0; skipped (77), saying why, where there is none. Several ranks
//                          share it, as NCCL allows where each says that it is on another host.
//   FSDP_TEST_GPU=stand-in feature_cuda [RANKS]
//                          on devices that are the CPU; ranks are threads there, which meet in the
//                          NCCL that FSDP_NCCL_LIBRARY names
#include "cuda_trial.hpp"

#include <array>
#include <atomic>
#include <cmath>
#include <optional>
#include <set>
#include <stdexcept>

namespace {

using namespace harness;

// ---- training ----

/// Without an engine: how far the device itself is from the CPU.
void plain_libtorch(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Net net = trial.net();
    move(*net, trial.device);
    for (int step = 0; step < 2; ++step) {
      const at::Tensor loss = net->forward(trial.input(step)).pow(2).mean();
      trial.record.add("loss", loss);
      loss.backward();
    }
    for (const auto& item : net->named_parameters()) {
      trial.record.add(item.key(), item.value().grad());
    }
  });
}

void torch_optimizers(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    for (const at::Tensor& shard : model.parameters()) REQUIRE(shard.device() == trial.device);
    REQUIRE(model->scale.device() == trial.device && model->frozen.device() == trial.device);
    const auto sgd = harness::sgd()(model.parameters());
    trial.train(model, *sgd, 3);
    const auto adamw = harness::adamw()(model.parameters());
    trial.train(model, *adamw, 3);
  });
}

void engine_optimizers(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    fsdp::FusedOptimizer adamw = model.adamw();
    trial.train(model, adamw, 3);
    trial.record.add("exp_avg_sq", adamw.state("block1.up.weight", "exp_avg_sq"));
    fsdp::SgdConfig config;
    config.lr = 0.05;
    config.momentum = 0.9;
    fsdp::FusedOptimizer sgd = model.sgd(config);
    trial.train(model, sgd, 3);
  });
}

void model_on_the_device(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Net net = trial.net();
    move(*net, trial.device);
    fsdp::ShardOptions options = trial.options();
    options.device.reset();  // where the parameters are
    Model model = fsdp::fully_shard(net, options);
    REQUIRE(model.parameters()[0].device() == trial.device);
    const auto sgd = harness::sgd()(model.parameters());
    trial.train(model, *sgd, 2);
  });
}

void evaluation(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    model->eval();
    const torch::NoGradGuard no_grad;
    for (int step = 0; step < 3; ++step) trial.record.add("loss", trial.loss(model, step));
  });
}

void strategies(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    using fsdp::Strategy;
    std::vector<Strategy> all{Strategy::full_shard, Strategy::shard_grad_op, Strategy::no_shard};
    const int ranks = trial.comm.world_size();
    if (ranks % 2 == 0) {
      all.insert(all.end(), {Strategy::hybrid_shard, Strategy::hybrid_shard_grad_op});
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
      for (const bool ordered : {false, true}) {
        Net net = trial.net();
        fsdp::ShardOptions options = trial.options();
        options.strategy = all[i];
        if (i >= 3) options.shard_size = ranks / 2;
        options.prefetch_units = 2;
        if (ordered) {
          const auto turn = random_turn();
          options.prefetch_order =
              fsdp::trace_forward(net, [&] { net->forward(torch::zeros({6, 7})); });
        } else {
          options.reshard_after_forward = fsdp::kReshardNever;
        }
        Model model = fsdp::fully_shard(net, options);
        const auto sgd = harness::sgd()(model.parameters());
        trial.train(model, *sgd, 2);
        if (i < 2) continue;
        // Reduced within the shard groups first, then averaged together.
        model.zero_grad();
        model.set_requires_all_reduce(false);
        trial.backward(model, 10);
        model.set_requires_all_reduce(true);
        trial.backward(model, 11);
        trial.record.add_model("averaged together", model);
      }
    }
  });
}

void frozen_and_unfrozen(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    const auto sgd = harness::sgd()(model.parameters());
    trial.train(model, *sgd, 1);
    model->block1->up->weight.set_requires_grad(false);
    model->frozen.set_requires_grad(true);
    trial.train(model, *sgd, 2);
    model->block1->up->weight.set_requires_grad(true);
    trial.train(model, *sgd, 1);
  });
}

/// A branch that only some ranks take: who has no gradient counts as zero.
void unused_on_some_ranks(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    const auto sgd = harness::sgd()(model.parameters());
    for (int step = 0; step < 2; ++step) {
      model.zero_grad();
      at::Tensor value = trial.loss(model, step);
      if (trial.comm.rank() == 0) value = value * 2;
      else value = value * 0;
      value.backward();
      trial.record.add_model("step", model);
      sgd->step();
    }
  });
}

void accumulation(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    const auto sgd = harness::sgd()(model.parameters());
    for (int step = 0; step < 2; ++step) {
      model.zero_grad();
      {
        const auto unreduced = model.no_sync();
        trial.backward(model, 10 * step);
        trial.backward(model, 10 * step + 1);
      }
      trial.backward(model, 10 * step + 2);
      trial.record.add_model("reduced together", model);
      trial.backward(model, 10 * step + 3);  // added to the shards
      trial.record.add_model("added", model);
      sgd->step();
    }
    model.zero_grad();
    model.set_is_last_backward(false);
    trial.backward(model, 100);
    model.set_is_last_backward(true);
    trial.backward(model, 101);
    trial.record.add_model("open iteration", model);
  });
}

void bfloat16(const fsdp::Communicator& comm) {
  for (const auto reduce : {at::kFloat, at::kBFloat16}) {
    same_on_both(
        comm,
        [&](Trial& trial) {
          fsdp::ShardOptions options = trial.options();
          options.mixed_precision.param_dtype = at::kBFloat16;
          options.mixed_precision.reduce_dtype = reduce;
          options.mixed_precision.output_dtype = at::kFloat;
          options.param_dtypes = {{"frozen", at::kFloat}};
          options.unit_mixed_precision["block2"].param_dtype = at::kHalf;
          options.mixed_precision.buffer_dtype = at::kBFloat16;
          Model model = fsdp::fully_shard(trial.net(), options);
          REQUIRE(model->in->weight.scalar_type() == at::kBFloat16);
          REQUIRE(model->scale.scalar_type() == at::kBFloat16);
          fsdp::FusedOptimizer adamw = model.adamw();
          trial.train(model, adamw, 2);
        },
        3e-2);
  }
}

// ---- gradients ----

void norms_and_clipping(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    fsdp::FusedOptimizer adamw = model.adamw();
    for (int step = 0; step < 3; ++step) {
      model.zero_grad();
      trial.backward(model, step);
      for (const double p : {1.0, 2.0, 3.0, HUGE_VAL}) trial.record.add("norm", model.grad_norm(p));
      trial.record.add("clipped from", model.clip_grad_norm_(0.01));
      trial.record.add("to", model.grad_norm());
      trial.record.add_model("clipped", model);
      adamw.step();
    }
    // A gradient of the user's own.
    model.zero_grad();
    trial.backward(model, 7);
    for (const auto& item : model.named_parameters()) {
      if (item.key() == "in.bias") item.value().mutable_grad() = item.value().grad() * 2;
    }
    trial.record.add("clipped from", model.clip_grad_norm_(0.01));
    trial.record.add_model("clipped", model);
    adamw.step();
    trial.record.add_model("stepped", model);
    for (const auto& item : model.named_parameters()) {
      if (item.key() == "in.bias") item.value().mutable_grad().fill_(HUGE_VAL);
    }
    REQUIRE_THROWS(model.clip_grad_norm_(1.0, 2.0, true), "in.bias");
  });
}

void gradient_scaler(const fsdp::Communicator& comm) {
  same_on_both(
      comm,
      [](Trial& trial) {
        fsdp::ShardOptions options = trial.options();
        options.mixed_precision.param_dtype = at::kHalf;
        options.mixed_precision.reduce_dtype = at::kFloat;
        Model model = fsdp::fully_shard(trial.net(), options);
        fsdp::FusedOptimizer adamw = model.adamw();
        fsdp::ShardedGradScaler scaler(model, fsdp::GradScalerState{1024.0});
        for (int step = 0; step < 4; ++step) {
          model.zero_grad();
          at::Tensor value = trial.loss(model, step);
          if (step == 2 && trial.comm.rank() == 0) value = value * HUGE_VAL;
          scaler.scale(value).backward();
          scaler.unscale_();
          if (step != 2) trial.record.add_model("unscaled", model);
          trial.record.add("stepped", scaler.step(adamw) ? 1.0 : 0.0);
          scaler.update();
          trial.record.add("scale", scaler.get_scale());
        }
        trial.record.add("all", model.parameters()[0]);
      },
      3e-2);
}

/// A block that was sharded and trained before is a part of the whole model.
void a_part_first(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Net net = trial.net();
    fsdp::ShardedModule<BlockImpl> block = fsdp::fully_shard(net->block1, trial.options());
    const auto first = harness::sgd()(block.parameters());
    for (int step = 0; step < 2; ++step) {
      block.zero_grad();
      const at::Tensor input = torch::full({6, 24}, 0.5 + step).to(trial.device);
      block.forward(input).pow(2).mean().backward();
      first->step();
    }
    fsdp::ShardOptions options = trial.options();
    options.wrap = {};  // the block is a unit already
    Model model = fsdp::fully_shard(net, options);
    trial.record.add_model("whole", model);
    const auto adamw = harness::adamw()(model.parameters());
    trial.train(model, *adamw, 3);
  });
}

// ---- values ----

void without_storage(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    auto turn = random_turn();
    torch::manual_seed(5);
    Net deferred = fsdp::deferred_init([] { return Net(); });
    turn.unlock();
    Model model = fsdp::fully_shard(deferred, trial.options());
    REQUIRE(model->scale.device() == trial.device);
    trial.record.add_model("deferred", model);
    const auto sgd = harness::sgd()(model.parameters());
    trial.train(model, *sgd, 1);

    fsdp::ShardOptions options = trial.options();
    options.param_init_fn = [](nn::Module& module) {
      for (at::Tensor& tensor : module.parameters(false)) tensor.fill_(0.125);
      for (at::Tensor& tensor : module.buffers(false)) tensor.fill_(0.5);
    };
    Net meta = trial.net();
    move(*meta, at::kMeta);
    Model filled = fsdp::fully_shard(meta, options);
    trial.record.add_model("filled", filled);
    trial.record.add("buffer", filled->scale);
    trial.backward(filled, 1);
    trial.record.add_model("backward", filled);
  });
}

void whole_parameters(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    const auto adamw = harness::adamw()(model.parameters());
    fsdp::FusedOptimizer fused = model.adamw();
    trial.train(model, *adamw, 1);
    trial.train(model, fused, 1);
    const auto add = [&](const fsdp::StateDict& dict) {
      for (const auto& item : dict) {
        REQUIRE(item.value().device().is_cpu());
        trial.record.add(item.key(), item.value());
      }
    };
    fsdp::StateDict whole = model.full_state_dict();
    add(whole);
    for (const auto& item : model.full_optim_state_dict(*adamw)) add(item.value());
    for (const auto& item : model.full_optim_state_dict(fused)) add(item.value());
    {
      fsdp::SummonOptions options;
      options.with_grads = true;
      auto scope = model.summon_full_params(options);
      const torch::NoGradGuard no_grad;
      trial.record.add("summoned", model->in->weight);
      trial.record.add("its gradient", model->in->weight.grad());
      model->in->bias.add_(1);
      scope.close();
    }
    model.apply([](nn::Module& module) {
      if (auto* linear = module.as<nn::LinearImpl>()) linear->bias.mul_(0.5);
    });
    trial.backward(model, 5);
    trial.record.add_model("after changes", model);
    model.load_full_state_dict(whole);
    trial.backward(model, 6);
    trial.record.add_model("loaded", model);
  });
}

/// Shards, gradients and state in host memory.
void cpu_offload(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    fsdp::ShardOptions options = trial.options();
    options.cpu_offload = true;
    Model model = fsdp::fully_shard(trial.net(), options);
    for (const at::Tensor& shard : model.parameters()) REQUIRE(shard.is_cpu());
    REQUIRE(model->in->weight.device() == trial.device);
    const auto adamw = harness::adamw()(model.parameters());
    trial.train(model, *adamw, 2);
    fsdp::FusedOptimizer fused = model.adamw();
    for (int step = 5; step < 7; ++step) {
      model.zero_grad();
      trial.backward(model, step);
      trial.record.add("norm", model.clip_grad_norm_(0.01));
      fused.step();
      trial.record.add_model("fused", model);
    }
  });
}

/// What one device saves, the other loads.
void checkpoints(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    const std::string folder = scratch() + (trial.device.is_cpu() ? "/cpu" : "/gpu");
    const auto make_torch = [](Model& model) { return harness::adamw()(model.parameters()); };
    const auto make_fused = [](Model& model) {
      return std::make_unique<fsdp::FusedOptimizer>(model.adamw());
    };
    const auto both = [&](const std::string& name, const auto& make) {
      Model model = fsdp::fully_shard(trial.net(), trial.options());
      auto optimizer = make(model);
      trial.train(model, *optimizer, 2);
      model.save_checkpoint(folder + name, *optimizer);
      model.save_checkpoint_async(folder + name + "-async", *optimizer).wait();
      // On the device that has not saved it, too.
      for (const at::Device device : {at::Device(at::kCPU), device_of(trial.comm)}) {
        Trial other{trial.comm, device, {}};
        Model loaded = fsdp::fully_shard(other.net(99), other.options());
        auto again = make(loaded);
        loaded.load_checkpoint(folder + name + (device.is_cpu() ? "" : "-async"), *again);
        other.train(loaded, *again, 2);
        if (device == trial.device) trial.record.tensors = other.record.tensors;
      }
    };
    both("/torch", make_torch);
    both("/fused", make_fused);
  });
}

/// Of each GPU: how many times gradients were copied together.
std::array<std::atomic<int>, 16> copied_together;

/// The gradients of a unit are copied into its slot together, those that come again are added.
void gradients_together(const fsdp::Communicator& comm) {
  static const auto counting = at::addGlobalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& function) {
        if (std::string(function.name()) == "aten::_foreach_copy_") {
          const at::Device device = function.inputs()[0].toTensorVector().at(0).device();
          if (!device.is_cpu()) ++copied_together.at(device.index());
        }
        return std::unique_ptr<at::ObserverContext>();
      }).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  (void)counting;
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    std::vector<int> counts;
    for (int step = 0; step < 3; ++step) {
      std::optional<fsdp::detail::NoSync> no_sync;
      if (step == 1) no_sync.emplace(model.no_sync());
      const int before = trial.device.is_cpu() ? 0 : copied_together.at(trial.device.index()).load();
      trial.loss(model, step).backward();
      if (trial.device.is_cpu()) continue;
      counts.push_back(copied_together.at(trial.device.index()) - before);
    }
    trial.record.add_model("in the end", model);
    // The root, one of whose parameters gets none, and two blocks.
    if (!trial.device.is_cpu()) REQUIRE((counts == std::vector<int>{3, 3, 0}));
  });
}

/// A hook sees gradients on the device, with the stream current that reduces them; what it leaves
/// there is reduced.
void hooks(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    const auto sgd = harness::sgd()(model.parameters());
    std::vector<std::string> seen;
    std::set<void*> streams;
    void* outside = nullptr;
    const auto hook = [&](fsdp::UnitGradientTensors& unit) {
      for (std::size_t i = 0; i < unit.names.size(); ++i) {
        seen.push_back(unit.name + ": " + unit.names[i]);
        at::Tensor& gradient = unit.gradients[i];
        REQUIRE(gradient.device() == trial.device && gradient.scalar_type() == at::kFloat);
        REQUIRE(unit.names[i] != "block1.up.weight" || gradient.size(0) == 73);
        gradient.copy_((gradient * 0.5).add_(0.25));  // memory of its own on the way
      }
      if (!trial.device.is_cpu()) streams.insert(fsdp::detail::current_stream(trial.device));
    };
    const auto train = [&] {
      if (!trial.device.is_cpu()) outside = fsdp::detail::current_stream(trial.device);
      model.register_comm_hook(hook);
      trial.train(model, *sgd, 2);
      if (trial.device.is_cpu()) return;
      REQUIRE(fsdp::detail::current_stream(trial.device) == outside);
      REQUIRE(streams.size() == 1 && streams.count(outside) == 0 && streams.count(nullptr) == 0);
    };
    train();
    if (trial.device.is_cpu()) {
      train();
    } else {
      const auto* devices = c10::impl::getDeviceGuardImpl(trial.device.type());
      const c10::StreamGuard another(devices->getStreamFromGlobalPool(trial.device));
      train();
    }
    {
      const auto unreduced = model.no_sync();
      const std::size_t before = seen.size();
      trial.backward(model, 20);
      REQUIRE(seen.size() == before);
    }
    trial.backward(model, 21);
    trial.record.add_model("reduced together", model);
    model.register_comm_hook({});
    const std::size_t calls = seen.size();
    trial.train(model, *sgd, 1);
    REQUIRE(seen.size() == calls);
    trial.record.add("gradients seen", static_cast<double>(calls));

    // What it has rounded is what is reduced: exactly, where there is one rank.
    model.register_comm_hook([](fsdp::UnitGradientTensors& unit) {
      for (at::Tensor& g : unit.gradients) g.copy_(g.to(at::kBFloat16));
    });
    model.zero_grad();
    trial.loss(model, 30).backward();
    for (const at::Tensor& shard : model.parameters()) {
      if (!shard.grad().defined() || trial.comm.world_size() > 1) continue;
      const at::Tensor rounded = shard.grad().to(at::kBFloat16).to(at::kFloat);
      REQUIRE(rounded.cpu().equal(shard.grad().cpu()));
    }
  });
}

/// What one rank's hook throws ends every rank's backward. Where ranks wait for each other in each
/// launch, as NCCL's do not, each is alone.
void failing_hook(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    trial.record.add("nothing", 0.0);
    if (trial.device.is_cpu()) return;
    const int rank = trial.comm.rank();
    Trial other{trial.comm.split(on_stand_in() ? rank : 0, rank), trial.device, {}};
    Model model = fsdp::fully_shard(other.net(), other.options());
    const bool fails = other.comm.rank() == other.comm.world_size() - 1;
    model.register_comm_hook([&](fsdp::UnitGradientTensors& unit) {
      if (fails && unit.name == "block1") throw std::runtime_error("the compressor is full");
    });
    const at::Tensor loss = other.loss(model, 1);
    if (fails) {
      REQUIRE_THROWS(loss.backward(), "the compressor is full");
    } else {
      REQUIRE_THROWS(loss.backward(), "block1", "communication hook");
    }
  });
}

// ---- streams, memory, errors ----

/// Training on other streams and threads than the model was made on.
void streams(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    Model model = fsdp::fully_shard(trial.net(), trial.options());
    const auto sgd = harness::sgd()(model.parameters());
    const auto step = [&] { trial.train(model, *sgd, 2); };
    const auto on_another_stream = [&] {
      if (trial.device.is_cpu()) return step();
      const auto* devices = c10::impl::getDeviceGuardImpl(trial.device.type());
      const c10::StreamGuard guard(devices->getStreamFromGlobalPool(trial.device));
      step();
    };
    step();
    on_another_stream();
    step();
    std::exception_ptr thrown;
    std::thread([&] {
      try {
        on_another_stream();
      } catch (...) {
        thrown = std::current_exception();
      }
    }).join();
    if (thrown) std::rethrow_exception(thrown);
    trial.record.add_model("in the end", model);
  });
}

/// What the engine takes on the device is what the plan says, whoever's memory it is.
void memory_of(const fsdp::Communicator& comm, bool registered) {
  same_on_both(comm, [registered](Trial& trial) {
    trial.record.add("nothing", 0.0);
    if (trial.device.is_cpu()) return;
    Net net = trial.net();
    fsdp::ShardOptions options = trial.options();
    options.mixed_precision.param_dtype = at::kBFloat16;
    options.mixed_precision.reduce_dtype = at::kFloat;
    options.registered_buffers = registered;
    const auto ranks = static_cast<std::uint32_t>(trial.comm.world_size());
    const fsdp::Plan plan = fsdp::plan(*net, options, ranks, /*optimizer_bytes_per_element=*/8);
    Model model = fsdp::fully_shard(net, options);
    fsdp::FusedOptimizer adamw = model.adamw();
    for (int step = 0; step < 2; ++step) {
      model.zero_grad();
      trial.loss(model, step).backward();
      adamw.step();
    }
    const fsdp::CudaStats stats = model.engine().cuda_stats();
    REQUIRE(stats.pool_bytes == plan.pool_bytes && stats.overflows == 0);
    const bool known = stats.registered_bytes >= stats.pool_bytes;
    REQUIRE(registered && ranks > 1 ? known : stats.registered_bytes == 0);
    // What it takes besides is small: a model of these sizes is, too.
    REQUIRE_SAY(stats.device_bytes_peak >= plan.device_peak_bytes &&
                    stats.device_bytes_peak <= plan.device_peak_bytes + 4096,
                stats.device_bytes_peak << " bytes, planned " << plan.device_peak_bytes);
  });
}

void memory(const fsdp::Communicator& comm) { memory_of(comm, false); }

void registered_memory(const fsdp::Communicator& comm) { memory_of(comm, true); }

void errors(const fsdp::Communicator& comm) {
  same_on_both(comm, [](Trial& trial) {
    trial.record.add("nothing", 0.0);
    if (trial.device.is_cpu()) return;
    fsdp::ShardOptions options = trial.options();
    options.device = at::Device(trial.device.type(), 77);
    REQUIRE_THROWS(fsdp::fully_shard(trial.net(), options), ":77", "cannot be used", "GPUs");
    options.device = at::Device(at::kXLA, 0);
    REQUIRE_THROWS(fsdp::fully_shard(trial.net(), options), "xla:0", "cannot be used");
    options.device = at::Device(at::kCPU);
    Net there = trial.net();
    move(*there->block1, trial.device);
    REQUIRE_THROWS(fsdp::fully_shard(there, options), "block1.norm.weight", trial.device.str());

    Model model = fsdp::fully_shard(trial.net(), trial.options());
    REQUIRE_THROWS(model->forward(trial.input(1)), "is sharded", "outside");
    // None of it is in the way of training.
    trial.loss(model, 1).backward();
    REQUIRE(model.named_parameters()["tied"].grad().defined());
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (!on_stand_in() && !gpu_here()) return 77;
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 1;
  if (on_stand_in()) argc = 1;
  const std::vector<Part> parts = {
      // First: LibTorch has no tensor on the device yet.
      {"torch's optimizers", torch_optimizers},
      {"plain LibTorch", plain_libtorch},
      {"the engine's optimizers", engine_optimizers},
      {"a model on the device", model_on_the_device},
      {"evaluation", evaluation},
      {"strategies and prefetching", strategies},
      {"frozen and unfrozen parameters", frozen_and_unfrozen},
      {"unused on some ranks", unused_on_some_ranks},
      {"accumulation", accumulation},
      {"bfloat16 and float16", bfloat16},
      {"norms and clipping", norms_and_clipping},
      {"the gradient scaler", gradient_scaler},
      {"models without storage", without_storage},
      {"whole parameters", whole_parameters},
      {"CPU offload", cpu_offload},
      {"a part first", a_part_first},
      {"checkpoints", checkpoints},
      {"gradients of a unit together", gradients_together},
      {"communication hooks", hooks},
      {"a hook that fails", failing_hook},
      {"streams and threads", streams},
      {"memory as planned", memory},
      {"memory that NCCL knows", registered_memory},
      {"errors", errors},
  };
  return main_with_scratch(argc, argv, as_they_run(parts, ranks),
                           [](const fsdp::Communicator&) {});
}
