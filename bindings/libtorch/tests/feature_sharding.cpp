// Strategies, gradient accumulation, whole parameters, state dicts, rank 0's states and ignored
// parts, each compared with a plain data-parallel loop over the whole module.
#include "reference.hpp"

namespace feature_sharding {
namespace {

using namespace harness;
namespace nn = torch::nn;

/// Two linear layers of odd sizes around a block, a parameter of its own and a buffer.
struct NetImpl : nn::Module {
  NetImpl() {
    first = register_module("first", nn::Linear(7, 13));
    block = register_module("block", nn::Sequential(nn::Linear(13, 13), nn::Tanh(),
                                                    nn::LayerNorm(nn::LayerNormOptions({13}))));
    head = register_module("head", nn::Linear(nn::LinearOptions(13, 3).bias(false)));
    gain = register_parameter("gain", torch::rand({1}) + 1);
    shift = register_buffer("shift", torch::randn({3}));
  }
  at::Tensor forward(const at::Tensor& x) {
    return head->forward(block->forward(torch::tanh(first->forward(x)))) * gain + shift;
  }
  nn::Linear first{nullptr}, head{nullptr};
  nn::Sequential block{nullptr};
  at::Tensor gain, shift;
};
TORCH_MODULE(Net);

Net make_net(int seed = 7) {
  torch::manual_seed(seed);
  return Net();
}

fsdp::WrapPolicy units(const std::vector<std::string>& names) {
  return fsdp::wrap_if([names](const nn::Module&, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  });
}

fsdp::ShardOptions options_for(const fsdp::Communicator& comm) {
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = units({"first", "block", "head"});
  return options;
}

at::Tensor input(int step, int rank, int micro = 0) {
  torch::manual_seed(10000 + 1000 * step + 100 * micro + rank);
  return torch::randn({4, 7});
}

/// How the backwards of a step are run.
enum class Accumulate { in_shards, no_sync, open, open_no_sync };

/// Trains with `micro` backwards a step and compares at every step.
void train(const fsdp::ShardOptions& options, Accumulate how, int micro, double tolerance = 0) {
  const fsdp::Communicator& comm = options.comm;
  Net reference = make_net(), module = make_net();
  auto model = fsdp::fully_shard(module, options);
  auto optimizer = adamw()(model.parameters());
  const std::vector<at::Tensor> full = reference->parameters();
  auto full_optimizer = adamw()(full);
  const bool unsharded = how == Accumulate::no_sync || how == Accumulate::open_no_sync;
  const bool open = how == Accumulate::open || how == Accumulate::open_no_sync;
  for (int step = 0; step < 3; ++step) {
    const std::string when = "step " + std::to_string(step);
    model.zero_grad();
    full_optimizer->zero_grad();
    for (int m = 0; m < micro; ++m) {
      const bool last = m + 1 == micro;
      const auto before = model.stats();
      if (open) model.set_is_last_backward(last);
      std::optional<fsdp::detail::NoSync> no_sync;
      if (unsharded && !last) no_sync.emplace(model.no_sync());
      model.forward(input(step, comm.rank(), m)).square().sum().backward();
      if (unsharded && !last) {
        REQUIRE(model.stats().reduce_scatters == before.reduce_scatters);
        for (const at::Tensor& param : model.parameters()) REQUIRE(!param.grad().defined());
      }
      if (!last && how == Accumulate::no_sync) {
        // A forward in between keeps what has come together.
        const torch::NoGradGuard no_grad;
        model.forward(input(50 + step, comm.rank()));
      }
      if (!unsharded) {
        average_gradients(full, comm.world_size(), [&](int rank) {
          reference->forward(input(step, rank, m)).square().sum().backward();
        });
        if (last || !open) check_shards(model, full, true, when, tolerance);
      }
    }
    if (unsharded) {
      average_gradients(full, comm.world_size(), [&](int rank) {
        for (int m = 0; m < micro; ++m) {
          reference->forward(input(step, rank, m)).square().sum().backward();
        }
      });
      check_shards(model, full, true, when, tolerance);
    }
    optimizer->step();
    full_optimizer->step();
    check_shards(model, full, false, when, tolerance);
  }
}

void strategies(const fsdp::Communicator& comm) {
  using fsdp::Strategy;
  for (const auto how : {Accumulate::in_shards, Accumulate::no_sync, Accumulate::open,
                         Accumulate::open_no_sync}) {
    const int micro = how == Accumulate::in_shards ? 2 : 3;
    for (const auto strategy : {Strategy::full_shard, Strategy::shard_grad_op, Strategy::no_shard}) {
      fsdp::ShardOptions options = options_for(comm);
      options.strategy = strategy;
      // Replicas average the sum of what has come together, the reference each micro-batch's.
      options.cpu_offload = micro == 2;
      const bool rounds = micro > 1 && strategy == Strategy::no_shard &&
                          (how == Accumulate::in_shards || how == Accumulate::open);
      train(options, how, micro, rounds ? 1e-5 : 0);
    }
    for (const auto strategy : {Strategy::hybrid_shard, Strategy::hybrid_shard_grad_op}) {
      if (comm.world_size() % 2 != 0) continue;
      fsdp::ShardOptions options = options_for(comm);
      options.strategy = strategy;
      options.shard_size = 2;
      train(options, how, micro, 1e-5);
    }
  }
}

/// All-gathers of a step: the root's once, the units' three, once or twice.
void resharding(const fsdp::Communicator& comm) {
  const auto gathers = [&](const fsdp::ShardOptions& options, auto prepare) {
    auto model = fsdp::fully_shard(make_net(), options);
    prepare(model);
    model.forward(input(0, comm.rank())).sum().backward();
    return model.stats().all_gathers;
  };
  const auto nothing = [](auto&) {};
  fsdp::ShardOptions options = options_for(comm);
  // The head's backward directly follows its forward: it is still there when it is touched next.
  const auto always = gathers(options, nothing);
  options.reshard_after_forward = fsdp::kReshardNever;
  const auto never = gathers(options, nothing);
  REQUIRE_SAY(never == 4, never);
  REQUIRE_SAY(always > never, always);
  options.reshard_after_forward = {};
  const auto one = gathers(options, [](auto& model) {
    model.set_reshard_after_forward(*model->block, fsdp::kReshardNever);
  });
  REQUIRE_SAY(one == always - 1, one);
  options.strategy = fsdp::Strategy::no_shard;
  REQUIRE(gathers(options, nothing) == 4);
  if (comm.world_size() % 2 != 0) return;
  options.strategy = fsdp::Strategy::full_shard;
  options.reshard_after_forward = 2;
  REQUIRE(gathers(options, nothing) == always);
  train(options, Accumulate::in_shards, 1);
}

/// Whole parameters can be read and changed; nothing else works meanwhile.
void summoning(const fsdp::Communicator& comm, bool low_precision) {
  fsdp::ShardOptions options = options_for(comm);
  if (low_precision) options.mixed_precision.param_dtype = at::kBFloat16;
  Net reference = make_net(), module = make_net();
  auto model = fsdp::fully_shard(module, options);
  const std::vector<at::Tensor> full = reference->parameters();
  model.forward(input(0, comm.rank())).square().sum().backward();
  if (!low_precision) {
    average_gradients(full, comm.world_size(), [&](int rank) {
      reference->forward(input(0, rank)).square().sum().backward();
    });
  }
  const torch::NoGradGuard no_grad;
  {
    auto scope = model.summon_full_params({true, false, !low_precision});
    for (std::size_t i = 0; i < full.size(); ++i) {
      at::Tensor mine = module->parameters()[i];
      REQUIRE(mine.scalar_type() == at::kFloat && same_bits(mine.detach(), full[i].detach()));
      if (!low_precision) {
        REQUIRE(same_bits(mine.grad(), full[i].grad()));
        mine.grad().mul_(2);
        full[i].grad().mul_(2);
      }
      mine.mul_(1.5);
      full[i].mul_(1.5);
    }
    // A replaced tensor counts like a changed one.
    module->gain.set_data(at::full({1}, 3.0));
    reference->gain.fill_(3);
    REQUIRE_THROWS(model.forward(input(0, 0)), "full parameters are open");
    REQUIRE_THROWS(auto second = model.summon_full_params(), "open already");
    scope.close();
  }
  REQUIRE_THROWS(module->gain.sum(), "'gain'", "sharded");
  check_shards(model, full, false, "written back");
  if (!low_precision) check_shards(model, full, true, "written back");
  {
    // Rank 0 alone sees and changes them.
    auto scope = model.summon_full_params({true, true, false});
    if (comm.rank() == 0) {
      module->gain.fill_(4);
    } else {
      REQUIRE_THROWS(module->gain.sum(), "'gain'", "sharded");
    }
    reference->gain.fill_(4);
  }
  check_shards(model, full, false, "rank 0's");
  {
    // Not written back, of one unit only.
    auto scope = model.summon_full_params({false, false, false}, module->block.get());
    module->block->parameters()[0].fill_(9);
    REQUIRE_THROWS(module->gain.sum(), "'gain'", "sharded");
    scope.close();
  }
  check_shards(model, full, false, "not written back");
  try {
    auto scope = model.summon_full_params();
    module->gain.fill_(9);
    throw std::runtime_error("on its way");
  } catch (const std::runtime_error&) {
    // Dropped, as in a scope that is left by an exception.
  }
  check_shards(model, full, false, "left by an exception");
  const auto halve = [](nn::Module& part) {
    if (auto* linear = part.as<nn::Linear>()) linear->weight.mul_(0.5);
  };
  model.apply(halve);
  reference->apply([&](nn::Module& part) { halve(part); });
  check_shards(model, full, false, "applied");
  // The model goes on.
  const torch::AutoGradMode with_grad(true);
  model.forward(input(1, comm.rank())).square().sum().backward();
}

void state_dicts(const fsdp::Communicator& comm) {
  Net reference = make_net(3), module = make_net(3);
  auto model = fsdp::fully_shard(module, options_for(comm));
  const auto same = [&](const fsdp::StateDict& dict) {
    std::size_t known = 0;
    const auto compare = [&](const auto& item) {
      const at::Tensor* mine = dict.find(item.key());
      REQUIRE(mine != nullptr && same_bits(*mine, item.value().detach()));
      REQUIRE(mine->sizes() == item.value().sizes());
      ++known;
    };
    for (const auto& item : reference->named_parameters()) compare(item);
    for (const auto& item : reference->named_buffers()) compare(item);
    REQUIRE(known == dict.size());
  };
  same(model.full_state_dict());
  const auto on_rank_0 = model.full_state_dict(true);
  if (comm.rank() == 0) same(on_rank_0);
  REQUIRE(comm.rank() == 0 || on_rank_0.is_empty());

  // Into a model with other values: every rank's dict, then rank 0's.
  auto other = fsdp::fully_shard(make_net(4), options_for(comm));
  const auto old = other.full_state_dict();
  const auto dict = model.full_state_dict();
  other.load_full_state_dict(dict);
  same(other.full_state_dict());
  other.load_full_state_dict(old);
  other.load_full_state_dict(on_rank_0, true);
  same(other.full_state_dict());
  fsdp::StateDict wrong;
  for (const auto& item : dict) {
    if (item.key() != "head.weight") wrong.insert(item.key(), item.value());
  }
  REQUIRE_THROWS(other.load_full_state_dict(wrong), "no 'head.weight'");
  wrong.insert("head.weight", torch::zeros({2, 2}));
  REQUIRE_THROWS(other.load_full_state_dict(wrong), "'head.weight' is of shape [2, 2]");
  wrong["head.weight"] = dict["head.weight"];
  wrong.insert("tail.weight", torch::zeros({1}));
  REQUIRE_THROWS(other.load_full_state_dict(wrong), "no 'tail.weight'");
  same(other.full_state_dict());

  // Optimizers: torch's and the engine's own have the reference's state.
  const std::vector<at::Tensor> full = reference->parameters();
  auto full_optimizer = adamw()(full);
  auto optimizer = adamw()(model.parameters());
  auto fused = other.adamw({.lr = 1e-2, .weight_decay = 0.1});
  for (int step = 0; step < 2; ++step) {
    model.zero_grad();
    other.zero_grad();
    full_optimizer->zero_grad();
    model.forward(input(step, comm.rank())).square().sum().backward();
    other.forward(input(step, comm.rank())).square().sum().backward();
    average_gradients(full, comm.world_size(), [&](int rank) {
      reference->forward(input(step, rank)).square().sum().backward();
    });
    optimizer->step();
    fused.step();
    full_optimizer->step();
  }
  const auto check_states = [&](const fsdp::OptimStateDict& states, double tolerance) {
    REQUIRE(states.size() == full.size());
    const auto named = reference->named_parameters();
    for (std::size_t i = 0; i < full.size(); ++i) {
      const auto& wanted = static_cast<const torch::optim::AdamWParamState&>(
          *full_optimizer->state().at(full[i].unsafeGetTensorImpl()));
      const fsdp::StateDict& mine = states[named[i].key()];
      REQUIRE(mine["step"].item<double>() == 2);
      REQUIRE(torch::allclose(mine["exp_avg"], wanted.exp_avg(), tolerance, tolerance));
      REQUIRE(torch::allclose(mine["exp_avg_sq"], wanted.exp_avg_sq(), tolerance, tolerance));
    }
  };
  check_states(model.full_optim_state_dict(*optimizer), 0);
  check_states(other.full_optim_state_dict(fused), 1e-5);
  const auto states_on_rank_0 = model.full_optim_state_dict(*optimizer, true);
  REQUIRE(states_on_rank_0.is_empty() == (comm.rank() != 0));
}

/// All ranks start from rank 0's values, whatever they hold, or hold nothing.
void from_rank_0(const fsdp::Communicator& comm) {
  Net reference = make_net(0);
  for (const bool meta : {false, true}) {
    Net module = meta && comm.rank() != 0 ? fsdp::deferred_init([] { return make_net(99); })
                                          : make_net(comm.rank());
    fsdp::ShardOptions options = options_for(comm);
    options.sync_module_states = true;
    auto model = fsdp::fully_shard(module, options);
    check_shards(model, reference->parameters(), false, "from rank 0");
    REQUIRE(same_bits(module->shift, reference->shift));
  }
}

/// Ignored parts stay whole and local; the rest is as ever.
void ignoring(const fsdp::Communicator& comm) {
  Net reference = make_net(), module = make_net();
  fsdp::ShardOptions options = options_for(comm);
  options.wrap = units({"first", "block"});
  options.ignored_modules = {module->head.ptr()};
  options.ignored_parameters = {module->gain};
  auto model = fsdp::fully_shard(module, options);
  const auto names = model.named_parameters();
  REQUIRE(names.find("head.weight") == nullptr && names.find("gain") == nullptr);
  REQUIRE(names.size() == 6);
  REQUIRE(same_bits(module->head->weight.detach(), reference->head->weight.detach()));
  model.forward(input(0, comm.rank())).square().sum().backward();
  reference->forward(input(0, comm.rank())).square().sum().backward();
  // Not reduced: this rank's own.
  REQUIRE(same_bits(module->head->weight.grad(), reference->head->weight.grad()));
  REQUIRE(same_bits(module->gain.grad(), reference->gain.grad()));
  const auto dict = model.full_state_dict();
  REQUIRE(dict.size() == 9);
  REQUIRE(same_bits(dict["gain"], reference->gain.detach()));
  fsdp::StateDict changed;
  for (const auto& item : dict) changed.insert(item.key(), item.value() * 2);
  model.load_full_state_dict(comm.rank() == 0 ? changed : fsdp::StateDict(), true);
  REQUIRE(same_bits(module->gain.detach(), reference->gain.detach() * 2));
  fsdp::ShardOptions wrong = options_for(comm);
  wrong.ignored_modules = {nn::Linear(1, 1).ptr()};
  REQUIRE_THROWS(fsdp::fully_shard(make_net(), wrong), "ignored_modules", "not below");
  wrong.ignored_modules = {};
  wrong.ignored_parameters = {torch::zeros({1})};
  REQUIRE_THROWS(fsdp::fully_shard(make_net(), wrong), "ignored_parameters[0]");
}

int run_program(int argc, char** argv) {
  const int ranks = argc > 1 ? std::atoi(argv[1]) : 1;
  return run_ranks(ranks, [](const fsdp::Communicator& comm) {
    strategies(comm);
    resharding(comm);
    summoning(comm, false);
    summoning(comm, true);
    state_dicts(comm);
    from_rank_0(comm);
    ignoring(comm);
  });
}

const harness::Program program("feature_sharding", run_program);

}  // namespace
}  // namespace feature_sharding
