// What happens to gradients between backward and step: norms and clipping, communication hooks, the
// gradient scaler, and the engine's own optimizers; each compared with torch's on the unsharded
// module.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <limits>

#include "models.hpp"
#include "reference.hpp"

namespace feature_gradients {
namespace {

using namespace harness;
namespace nn = torch::nn;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

using models::Block;

/// With a tied weight, a parameter that is never used and one that is frozen.
struct NetImpl : nn::Module {
  NetImpl()
      : in(register_module("in", nn::Linear(5, 11))),
        block1(register_module("block1", Block(11))),
        block2(register_module("block2", Block(11))),
        unused(register_module("unused", nn::Linear(3, 3))),
        frozen(register_parameter("frozen", torch::ones({11}), /*requires_grad=*/false)),
        tied(register_parameter("tied", in->weight)) {}
  at::Tensor forward(const at::Tensor& x) {
    return torch::linear(block2(block1(in(x)) * frozen), tied.t());
  }
  nn::Linear in;
  Block block1, block2;
  nn::Linear unused;
  at::Tensor frozen, tied;
};
TORCH_MODULE(Net);

Net make_net() {
  torch::manual_seed(3);
  return Net();
}

template <class Model>
at::Tensor loss_of(Model&& forward, int step, int rank) {
  torch::manual_seed(1000 * step + rank + 1);
  return forward(torch::randn({6, 5})).pow(2).mean();
}

using Sharded = fsdp::ShardedModule<NetImpl>;

Sharded shard(const fsdp::Communicator& comm, fsdp::ShardOptions options = {}) {
  options.comm = comm;
  options.wrap = fsdp::wrap_class("BlockImpl");
  return fsdp::fully_shard(make_net(), options);
}

/// Parameters of the unsharded net as the handle counts them: tied ones once.
std::vector<at::Tensor> parameters_of(const Net& net) {
  std::vector<at::Tensor> unique;
  for (const at::Tensor& param : net->parameters()) {
    bool seen = false;
    for (const at::Tensor& known : unique) seen = seen || known.is_same(param);
    if (!seen) unique.push_back(param);
  }
  return unique;
}

/// The sharded model's backward, and the mean gradients of the unsharded one.
void backward(Sharded& model, Net& net, const std::vector<at::Tensor>& params, int step) {
  const auto& comm = model.engine().communicator();
  model.zero_grad();
  for (const at::Tensor& param : params) param.mutable_grad().reset();
  average_gradients(params, comm.world_size(), [&](int rank) {
    loss_of([&](const at::Tensor& x) { return net->forward(x); }, step, rank).backward();
  });
  loss_of([&](const at::Tensor& x) { return model.forward(x); }, step, comm.rank()).backward();
}

void require_near(double got, double wanted, double tolerance, const std::string& what) {
  REQUIRE_SAY(std::abs(got - wanted) <= tolerance * std::abs(wanted),
              what << " is " << got << ", not " << wanted);
}

// ---- norms ----

void clipping(const fsdp::Communicator& comm) {
  Sharded model = shard(comm);
  Net net = make_net();
  const auto params = parameters_of(net);
  REQUIRE(model.clip_grad_norm_(1.0) == 0.0);
  int step = 0;
  for (const double p : {2.0, 1.0, kInfinity, 3.0, 0.5}) {
    const std::string what = "the norm of order " + std::to_string(p);
    for (const double part : {0.3, 5.0}) {
      backward(model, net, params, ++step);
      check_shards(model, params, true, what);
      const double norm = model.grad_norm(p);
      REQUIRE(norm > 0);
      check_shards(model, params, true, what + " changes nothing");
      REQUIRE(model.clip_grad_norm_(part * norm, p, true) == norm);
      const double wanted = nn::utils::clip_grad_norm_(params, part * norm, p, true);
      require_near(norm, wanted, 1e-5, what);
      check_shards(model, params, true, what, 1e-6);
      double range[2] = {norm, -norm};
      comm.all_reduce(range, 2, fsdp::ReduceOp::max);
      REQUIRE(range[0] == -range[1]);
    }
  }
  // Torch's C++ function counts parameters where its Python counts those that are not all zero.
  backward(model, net, params, ++step);
  double with_gradient = 0;
  double smallest = kInfinity;
  for (const at::Tensor& param : params) {
    if (!param.grad().defined()) continue;
    with_gradient += param.grad().count_nonzero().item<int64_t>() > 0;
    smallest = std::min(smallest, param.grad().abs().min().item<double>());
  }
  REQUIRE(model.grad_norm(0) == with_gradient);
  REQUIRE(model.grad_norm(-kInfinity) == smallest);
  REQUIRE_THROWS(model.grad_norm(std::nan("")), "NaN");
  REQUIRE_THROWS(model.clip_grad_norm_(-1), "max_norm");
}

/// Gradients that the user has put in the place of ours, of whatever type, count too.
void clipping_own_gradients(const fsdp::Communicator& comm) {
  Sharded model = shard(comm);
  Net net = make_net();
  const auto params = parameters_of(net);
  backward(model, net, params, 1);
  auto shards = model.named_parameters();
  for (std::size_t i = 0; i < params.size(); ++i) {
    if (!params[i].grad().defined()) continue;
    params[i].mutable_grad() = params[i].grad() * 3;
    at::Tensor& grad = shards[i].value().mutable_grad();
    grad = i % 2 == 0 ? grad * 3 : torch::stack({grad * 3, grad}, 1).select(1, 0);
  }
  const double norm = model.clip_grad_norm_(0.5);
  require_near(norm, nn::utils::clip_grad_norm_(params, 0.5), 1e-5, "the norm");
  check_shards(model, params, true, "own gradients", 1e-6);
}

void not_finite(const fsdp::Communicator& comm) {
  for (const float bad : {std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN()}) {
    Sharded model = shard(comm);
    Net net = make_net();
    const auto params = parameters_of(net);
    backward(model, net, params, 1);
    const auto names = model.named_parameters().keys();
    const auto leaves = model.parameters();
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (names[i] != "block2.up.weight" && names[i] != "block2.down.weight") continue;
      const auto info = model.engine().param_info(static_cast<std::uint32_t>(i));
      params[i].grad().view(-1)[7].fill_(bad);
      if (info.shard_offset <= 7 && 7 < info.shard_offset + info.shard_numel) {
        leaves[i].grad()[7 - info.shard_offset].fill_(bad);
      }
    }
    REQUIRE_THROWS(model.clip_grad_norm_(1.0, 2.0, true), "\"block2.up.weight\"", "not finite");
    check_shards(model, params, true, "after the error");
    const double norm = model.clip_grad_norm_(1.0);
    const double wanted = nn::utils::clip_grad_norm_(params, 1.0);
    REQUIRE(!std::isfinite(norm) && std::isnan(norm) == std::isnan(wanted));
    for (std::size_t i = 0; i < params.size(); ++i) {
      if (!params[i].grad().defined()) continue;
      const auto info = model.engine().param_info(static_cast<std::uint32_t>(i));
      const auto full = params[i].grad().reshape({-1});
      REQUIRE(leaves[i].grad().equal(full.narrow(0, info.shard_offset, info.shard_numel)) ||
              torch::allclose(leaves[i].grad(),
                              full.narrow(0, info.shard_offset, info.shard_numel), 0, 0, true));
    }
  }
}

// ---- communication hooks ----

void hooks(const fsdp::Communicator& comm) {
  fsdp::ShardOptions in_bfloat16;
  in_bfloat16.mixed_precision.reduce_dtype = at::kBFloat16;
  Sharded hooked = shard(comm), rounded = shard(comm, in_bfloat16);
  std::vector<std::string> seen;
  hooked.register_comm_hook([&](fsdp::UnitGradientTensors& unit) {
    seen.push_back(unit.name);
    REQUIRE(unit.names.size() == unit.gradients.size());
    for (std::size_t i = 0; i < unit.names.size(); ++i) {
      if (unit.names[i] == "block1.up.weight") REQUIRE(unit.gradients[i].size(0) == 34);
      unit.gradients[i].copy_(unit.gradients[i].to(at::kBFloat16));
    }
  });
  const auto run = [&](Sharded& model, int step) {
    loss_of([&](const at::Tensor& x) { return model.forward(x); }, step, comm.rank()).backward();
  };
  for (int step = 0; step < 3; ++step) {
    seen.clear();
    run(hooked, step);
    run(rounded, step);
    REQUIRE((seen == std::vector<std::string>{"block2", "block1", ""}));
    for (std::size_t i = 0; i < hooked.parameters().size(); ++i) {
      const at::Tensor a = hooked.parameters()[i].grad(), b = rounded.parameters()[i].grad();
      REQUIRE(a.defined() == b.defined());
      REQUIRE(!a.defined() || same_bits(a, b));
    }
  }
  Net net = make_net();
  const auto params = parameters_of(net);
  hooked.register_comm_hook([](fsdp::UnitGradientTensors& unit) {
    for (at::Tensor& gradient : unit.gradients) gradient.mul_(4);
  });
  backward(hooked, net, params, 9);
  for (const at::Tensor& param : params) {
    if (param.grad().defined()) param.grad().mul_(4);
  }
  check_shards(hooked, params, true, "a hook that scales");
  hooked.register_comm_hook({});
  backward(hooked, net, params, 10);
  check_shards(hooked, params, true, "without a hook");
}

/// What one rank's hook throws ends every rank's backward.
void failing_hook(const fsdp::Communicator& comm) {
  Sharded model = shard(comm);
  const bool fails = comm.rank() == comm.world_size() - 1;
  model.register_comm_hook([&](fsdp::UnitGradientTensors& unit) {
    if (fails && unit.name == "block1") throw std::runtime_error("the compressor is full");
  });
  const at::Tensor loss =
      loss_of([&](const at::Tensor& x) { return model.forward(x); }, 1, comm.rank());
  comm.barrier();
  if (fails) {
    REQUIRE_THROWS(loss.backward(), "the compressor is full");
  } else {
    REQUIRE_THROWS(loss.backward(), "block1", "communication hook");
  }
  throw DoneWithBrokenCommunicator();
}

/// A hook that uses the model is refused, not waited for.
void hook_that_calls_back(const fsdp::Communicator& comm) {
  Sharded model = shard(comm);
  model.register_comm_hook([&](fsdp::UnitGradientTensors&) { model.stats(); });
  const at::Tensor loss =
      loss_of([&](const at::Tensor& x) { return model.forward(x); }, 1, comm.rank());
  comm.barrier();
  REQUIRE_THROWS(loss.backward(), "hook");
  throw DoneWithBrokenCommunicator();
}

// ---- the gradient scaler ----

/// Whether a step is to overflow on one rank, and torch.amp.GradScaler's scale after it, with
/// growth_factor 4, backoff_factor 0.5 and growth_interval 2, from 8.
const std::vector<std::pair<bool, double>> kScales = {
    {false, 8}, {false, 32}, {true, 16}, {false, 16}, {true, 8}, {false, 8}, {false, 32}};

template <class MakeAny>
void scaler_with(const fsdp::Communicator& comm, MakeAny make_any, bool clip) {
  Sharded model = shard(comm);
  Net net = make_net();
  const auto params = parameters_of(net);
  auto optimizer = make_any(model);
  auto full_optimizer = torch::optim::SGD(params, torch::optim::SGDOptions(0.05).momentum(0.9));
  const fsdp::GradScalerState options{8, 4, 0.5, 2, 0};
  fsdp::ShardedGradScaler scaler(model, options);
  for (std::size_t step = 0; step < kScales.size(); ++step) {
    const auto [overflows, scale_after] = kScales[step];
    const std::string when = "step " + std::to_string(step);
    backward(model, net, params, static_cast<int>(step));
    model.zero_grad();
    at::Tensor loss = loss_of([&](const at::Tensor& x) { return model.forward(x); },
                              static_cast<int>(step), comm.rank());
    const bool here = static_cast<int>(step) % comm.world_size() == comm.rank();
    if (overflows && here) loss = loss * kInfinity;
    scaler.scale(loss).backward();
    if (clip) {
      REQUIRE(scaler.unscale_() == overflows);
      REQUIRE_THROWS(scaler.unscale_(), "already");
      if (!overflows) {
        check_shards(model, params, true, when, 1e-5);
        model.clip_grad_norm_(0.1);
        nn::utils::clip_grad_norm_(params, 0.1);
      }
    }
    REQUIRE(scaler.step(optimizer) == !overflows);
    REQUIRE_THROWS(scaler.step(optimizer), "already");
    if (!overflows) full_optimizer.step();
    check_shards(model, params, false, when, 1e-6);
    scaler.update();
    REQUIRE_SAY(scaler.get_scale() == scale_after, when << ": the scale is " << scaler.get_scale());
    REQUIRE_THROWS(scaler.update(), "unscaled");
  }
  const fsdp::GradScalerState state = scaler.state();
  fsdp::ShardedGradScaler other(model);
  REQUIRE(other.get_scale() == 65536);
  other.set_state(state);
  REQUIRE(other.get_scale() == 32 && other.state().growth_interval == 2);
  fsdp::ShardedGradScaler disabled(model, {}, false);
  REQUIRE(disabled.get_scale() == 1 && disabled.scale(params[0]).is_same(params[0]));
  REQUIRE(disabled.step(optimizer));
  disabled.update();
}

void scaler(const fsdp::Communicator& comm) {
  for (const bool clip : {false, true}) {
    scaler_with(
        comm,
        [](Sharded& model) {
          return torch::optim::SGD(model.parameters(),
                                   torch::optim::SGDOptions(0.05).momentum(0.9));
        },
        clip);
    scaler_with(
        comm,
        [](Sharded& model) {
          fsdp::SgdConfig config;
          config.lr = 0.05;
          config.momentum = 0.9;
          return model.sgd(config);
        },
        clip);
  }
}

// ---- optimizers in the engine ----

/// Of two groups of parameters, the second has half the learning rate and no weight decay.
bool in_second_group(const std::string& name) { return name.find("bias") != std::string::npos; }

template <class Config, class Full, class Options>
void fused(const fsdp::Communicator& comm, const Config& config, Options options,
           const std::string& what) {
  Sharded model = shard(comm);
  Net net = make_net();
  const auto params = parameters_of(net);
  const auto names = model.named_parameters().keys();
  auto make = [&](Sharded& sharded) {
    fsdp::FusedOptimizer optimizer = [&] {
      if constexpr (std::is_same_v<Config, fsdp::AdamWConfig>) {
        return sharded.adamw(config);
      } else {
        return sharded.sgd(config);
      }
    }();
    for (const auto& name : names) {
      if (in_second_group(name)) optimizer.set_param_options(name, 0.5, 0);
    }
    return optimizer;
  };
  auto optimizer = make(model);
  std::vector<at::Tensor> first, second;
  for (std::size_t i = 0; i < params.size(); ++i) {
    (in_second_group(names[i]) ? second : first).push_back(params[i]);
  }
  auto slower = options;
  slower.weight_decay(0).lr(options.lr() / 2);
  Full full({torch::optim::OptimizerParamGroup(first, std::make_unique<Options>(options)),
             torch::optim::OptimizerParamGroup(second, std::make_unique<Options>(slower))},
            Options(options.lr()));  // a group's 0 would be replaced by another default

  const std::string folder = "/tmp/fsdp_feature_gradients_" + std::to_string(getppid()) + what;
  std::vector<at::Tensor> at_save;
  constexpr int kSteps = 6, kSaved = 3;
  const auto train = [&](Sharded& sharded, fsdp::FusedOptimizer& mine, int from, bool with_full) {
    for (int step = from; step < kSteps; ++step) {
      backward(sharded, net, params, step);
      sharded.clip_grad_norm_(0.7);
      if (with_full) nn::utils::clip_grad_norm_(params, 0.7);
      const double lr = mine.lr() * (step == 4 ? 0.5 : 1);
      mine.set_lr(lr);
      mine.step();
      if (with_full) {
        for (auto& group : full.param_groups()) {
          if (step == 4) group.options().set_lr(group.options().get_lr() * 0.5);
        }
        full.step();
        check_shards(sharded, params, false, what + ", step " + std::to_string(step), 2e-6);
      }
      if (with_full && step + 1 == kSaved) sharded.save_checkpoint(folder, mine, "after three");
    }
  };
  train(model, optimizer, 0, true);
  REQUIRE(optimizer.step_count("in.bias") == kSteps);
  REQUIRE(optimizer.step_count("unused.weight") == 0);
  REQUIRE(optimizer.step_count("frozen") == 0);
  REQUIRE_THROWS(optimizer.step_count("nothing"), "'nothing'");
  REQUIRE(fsdp::checkpoint_metadata(folder) == "after three");

  // Without a gradient nothing is stepped.
  std::vector<at::Tensor> before;
  for (const at::Tensor& leaf : model.parameters()) before.push_back(leaf.detach().clone());
  optimizer.zero_grad();
  optimizer.step();
  for (std::size_t i = 0; i < before.size(); ++i) {
    REQUIRE(same_bits(model.parameters()[i].detach().clone(), before[i]));
  }
  REQUIRE(optimizer.step_count("in.bias") == kSteps);

  // Resumed by another model with other units, it goes on bit for bit. The reference net has
  // trained on: only the resumed model's own batches matter.
  fsdp::ShardOptions whole;
  whole.comm = comm;
  auto resumed = fsdp::fully_shard(make_net(), whole);
  auto resumed_optimizer = make(resumed);
  resumed.load_checkpoint(folder, resumed_optimizer);
  REQUIRE(resumed_optimizer.step_count("in.bias") == kSaved);
  train(resumed, resumed_optimizer, kSaved, false);
  check_shards(resumed, params, false, what + " resumed with other units", 2e-6);
  Sharded again = shard(comm);
  auto again_optimizer = make(again);
  again.load_checkpoint(folder, again_optimizer);
  train(again, again_optimizer, kSaved, false);
  for (std::size_t i = 0; i < before.size(); ++i) {
    REQUIRE_SAY(same_bits(again.parameters()[i].detach().clone(), before[i]),
                what << ": " << names[i]);
  }
  comm.barrier();
  if (comm.rank() == 0) REQUIRE(std::system(("rm -r '" + folder + "'").c_str()) == 0);
}

void fused_optimizers(const fsdp::Communicator& comm) {
  fsdp::AdamWConfig adamw;
  adamw.lr = 0.01;
  adamw.weight_decay = 0.1;
  fused<fsdp::AdamWConfig, torch::optim::AdamW>(
      comm, adamw, torch::optim::AdamWOptions(0.01).weight_decay(0.1), "adamw");
  fsdp::SgdConfig sgd;
  sgd.lr = 0.05;
  sgd.momentum = 0.9;
  sgd.weight_decay = 0.01;
  fused<fsdp::SgdConfig, torch::optim::SGD>(
      comm, sgd, torch::optim::SGDOptions(0.05).momentum(0.9).weight_decay(0.01), "sgd");
}

/// A gradient that the user has put in the place of ours is what is stepped with; one that no
/// backward made is refused.
void fused_with_own_gradients(const fsdp::Communicator& comm) {
  Sharded model = shard(comm);
  Net net = make_net();
  const auto params = parameters_of(net);
  fsdp::SgdConfig config;
  config.lr = 1;
  auto optimizer = model.sgd(config);
  backward(model, net, params, 1);
  const auto leaves = model.parameters();
  leaves[1].mutable_grad() = torch::ones_like(leaves[1].detach());
  const at::Tensor before = leaves[1].detach().clone();
  optimizer.step();
  REQUIRE(same_bits(leaves[1].detach().clone(), before - 1));
  model.zero_grad();
  optimizer.step();
  REQUIRE(same_bits(leaves[1].detach().clone(), before - 1));
  leaves[1].mutable_grad() = torch::ones_like(leaves[1].detach());
  REQUIRE_THROWS(optimizer.step(), "not made by a backward");
}

// ---- the timeline ----

std::size_t count_of(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++count;
  }
  return count;
}

/// Every rank has, in one file, an unshard for every all-gather and its part of every reduction.
/// capi_tests/feature_timeline.py looks into such a file more closely.
void timeline(const fsdp::Communicator& comm) {
  const std::string path = "/tmp/fsdp_feature_gradients_" + std::to_string(getppid()) + ".json";
  REQUIRE(setenv("FSDP_TIMELINE", path.c_str(), 1) == 0);
  std::vector<std::uint64_t> counts;
  std::weak_ptr<fsdp::detail::ShardWrites> shards;
  {
    Sharded model = shard(comm);
    shards = model.state()->writes;
    auto optimizer = model.adamw();
    for (int step = 0; step < 3; ++step) {
      model.zero_grad();
      loss_of([&](const at::Tensor& x) { return model.forward(x); }, step, comm.rank()).backward();
      optimizer.step();
    }
    REQUIRE(model.engine().describe().find("\"block1.up.weight\"") != std::string::npos);
    counts = {model.stats().all_gathers, model.stats().reduce_scatters};
  }
  unsetenv("FSDP_TIMELINE");
  REQUIRE(shards.expired());  // as handle and module: the file is whole
  comm.barrier();
  std::ifstream file(path);
  const std::string text(std::istreambuf_iterator<char>(file), {});
  for (int rank = 0; rank < comm.world_size(); ++rank) {
    const std::string pid = "\"cat\": \"fsdp\", \"pid\": " + std::to_string(rank) + ",";
    const auto events = [&](const char* name) {
      return count_of(text, "\"ph\": \"X\", \"name\": \"" + std::string(name) + "\", " + pid);
    };
    REQUIRE_SAY(events("unshard") == counts[0], events("unshard") << " unshards");
    REQUIRE_SAY(events("reduce") == counts[1], events("reduce") << " reductions");
    REQUIRE(events("forward") >= 3 * 3 && events("backward") >= 3);
  }
  REQUIRE(text.substr(text.size() - 4) == "\n]}\n");
  comm.barrier();
  if (comm.rank() == 0) REQUIRE(std::remove(path.c_str()) == 0);
}

int run_program(int argc, char** argv) {
  return harness::main_of(argc, argv,
                          {{"clipping", clipping},
                           {"clipping own gradients", clipping_own_gradients},
                           {"norms that are not finite", not_finite},
                           {"hooks", hooks},
                           {"a hook that fails", failing_hook},
                           {"a hook that calls back", hook_that_calls_back},
                           {"gradient scaler", scaler},
                           {"fused optimizers", fused_optimizers},
                           {"fused with own gradients", fused_with_own_gradients},
                           {"timeline", timeline}});
}

const harness::Program program("feature_gradients", run_program);

}  // namespace
}  // namespace feature_gradients
