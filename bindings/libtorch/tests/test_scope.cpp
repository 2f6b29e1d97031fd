// Where sharded parameters may be used and where not: every misuse is an error that names the
// parameter or unit, none leaves a broken state; other threads are unaffected.
#include <atomic>
#include <future>

#include "reference.hpp"

namespace test_scope {
namespace {

using namespace harness;
namespace nn = torch::nn;

struct BlockImpl : nn::Module {
  explicit BlockImpl(int64_t width = 6)
      : up(register_module("up", nn::Linear(width, 11))),
        down(register_module("down", nn::Linear(11, width))) {}
  at::Tensor forward(const at::Tensor& x) {
    if (before) before();
    return x + down(torch::tanh(up(x)));
  }
  nn::Linear up, down;
  std::function<void()> before;
};
TORCH_MODULE(Block);

struct NetImpl : nn::Module {
  NetImpl() : a(register_module("a", Block())), b(register_module("b", Block())) {}
  at::Tensor forward(const at::Tensor& x) { return b(a(x)); }
  Block a, b;
};
TORCH_MODULE(Net);

fsdp::ShardOptions options_of(const fsdp::Communicator& comm) {
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = fsdp::wrap_class("BlockImpl");
  return options;
}

auto shard(const fsdp::Communicator& comm) {
  torch::manual_seed(3);
  return fsdp::fully_shard(Net(), options_of(comm));
}

at::Tensor batch_of(int step, int rank) {
  torch::manual_seed(1000 * step + rank + 1);
  return torch::randn({4, 6});
}

/// Fails unless the model trains as the reference does from here on.
template <class Sharded>
void require_usable(Sharded& model, const fsdp::Communicator& comm) {
  model.zero_grad();
  torch::manual_seed(3);
  Net reference;
  const auto params = reference->parameters();
  for (int step = 0; step < 2; ++step) {
    average_gradients(params, comm.world_size(), [&](int rank) {
      reference->forward(batch_of(step, rank)).pow(2).sum().backward();
    });
    model.forward(batch_of(step, comm.rank())).pow(2).sum().backward();
    check_shards(model, params, true, "usable");
  }
  model.zero_grad();
}

void outside_of_scope(const fsdp::Communicator& comm) {
  auto model = shard(comm);
  const at::Tensor x = batch_of(0, comm.rank());
  const at::Tensor weight = model->a->up->weight;
  const at::Tensor view = model->b->down->bias;
  REQUIRE_THROWS(weight.sum(), "'a.up.weight'", "handle", "aten::sum");
  REQUIRE_THROWS(view.clone(), "'b.down.bias'");
  REQUIRE_THROWS(std::cout << weight, "'a.up.weight'");
  REQUIRE_THROWS(model->a->forward(x), "'a.up.weight'", "forward");
  REQUIRE_THROWS(model.module()->forward(x), "'a.up.weight'");
  REQUIRE_THROWS(torch::add(x, 1.0).copy_(weight.slice(0, 0, 4)), "'a.up.weight'");
  REQUIRE_THROWS(weight.data_ptr<float>(), "unit 'a'", "sharded");
  REQUIRE_THROWS(model.module()->clone(), "clone");
  REQUIRE_THROWS(torch::cat({x, weight}), "'a.up.weight'");
  REQUIRE_THROWS(model->to(at::kDouble), "'a.up.weight'");
  // Shapes and flags are no data.
  REQUIRE(weight.size(0) == 11 && weight.requires_grad() && weight.is_leaf());
  require_usable(model, comm);
}

void writing_the_modules_own(const fsdp::Communicator& comm) {
  auto model = shard(comm);
  model->a->before = [&] {
    const torch::NoGradGuard no_grad;
    model->a->up->weight.mul_(2);
  };
  REQUIRE_THROWS(model.forward(batch_of(0, 0)), "'a.up.weight'", "cannot be written",
                 "parameters()");
  model->a->before = nullptr;
  require_usable(model, comm);
}

void optimizer_on_the_modules_own(const fsdp::Communicator& comm) {
  for (const auto& make : {sgd(), adam(), adamw()}) {
    auto model = shard(comm);
    auto wrong = make(model->parameters());
    REQUIRE_THROWS(wrong->step(), "'a.up.weight'", "parameters()");
    REQUIRE_THROWS(wrong->zero_grad(), "'a.up.weight'", "zero_grad()");
    REQUIRE_THROWS(model->zero_grad(), "'a.up.weight'", "zero_grad()");
    model.forward(batch_of(0, comm.rank())).pow(2).sum().backward();
    REQUIRE_THROWS(wrong->step(), "'a.up.weight'", "parameters()");
    REQUIRE_THROWS(nn::utils::clip_grad_norm_(model->parameters(), 1.0), "'a.up.weight'");
    require_usable(model, comm);
  }
  struct PlainSgd {
    static void step(const std::vector<at::Tensor>& params) {
      const torch::NoGradGuard no_grad;
      for (const at::Tensor& param : params) {
        if (param.grad().defined()) param.grad().mul(0.1);
      }
    }
  };
  auto model = shard(comm);
  REQUIRE_THROWS(PlainSgd::step(model->parameters()), "gradient", "'a.up.weight'", "parameters()");
}

void after_the_handle(const fsdp::Communicator& comm) {
  Net net;
  at::Tensor loss;
  std::vector<at::Tensor> shards;
  {
    auto model = fsdp::fully_shard(net, options_of(comm));
    shards = model.parameters();
    model.forward(batch_of(0, comm.rank())).pow(2).sum().backward();
    loss = model.forward(batch_of(0, comm.rank())).pow(2).sum();
  }
  REQUIRE_THROWS(net->forward(batch_of(0, 0)), "'a.up.weight'", "destroyed");
  REQUIRE_THROWS(net->a->up->weight.data_ptr(), "unit 'a'", "destroyed");
  REQUIRE_THROWS(loss.backward(), "destroyed");
  REQUIRE_THROWS(fsdp::fully_shard(net, options_of(comm)), "\"a\"", "wrapped already");
  // The leaves stay readable and writable.
  comm.barrier();
  const torch::NoGradGuard no_grad;
  for (auto& leaf : shards) {
    leaf.add_(leaf.grad());
    REQUIRE(std::isfinite(leaf.sum().item<float>()));
  }
}

void exceptions(const fsdp::Communicator& comm) {
  auto model = shard(comm);
  struct Oops : std::runtime_error {
    Oops() : std::runtime_error("oops") {}
  };
  for (const bool backward : {false, true}) {
    // In forward, in the middle of a unit.
    model->b->before = [] { throw Oops(); };
    if (backward) {
      REQUIRE_THROWS(model.forward(batch_of(0, comm.rank())), "oops");
    } else {
      const torch::NoGradGuard no_grad;
      REQUIRE_THROWS(model.forward(batch_of(0, comm.rank())), "oops");
    }
    REQUIRE_THROWS(model->a->up->weight.sum(), "'a.up.weight'");
    model->b->before = nullptr;
    require_usable(model, comm);

    // In backward, after b's gradients were reduced, before a's.
    bool armed = true;
    const at::Tensor x = batch_of(0, comm.rank());
    const at::Tensor hidden = model->a->up->weight;
    const auto hook = hidden.register_hook([&armed](const at::Tensor&) {
      if (armed) throw Oops();
    });
    const at::Tensor loss = model.forward(x).pow(2).sum();
    REQUIRE_THROWS(loss.backward(), "oops");
    REQUIRE_THROWS(model->a->up->weight.sum(), "'a.up.weight'");
    armed = false;
    for (const auto& param : model.parameters()) REQUIRE(!param.grad().defined());
    require_usable(model, comm);

    // The optimizer right after a failed backward.
    armed = true;
    const at::Tensor again = model.forward(x).pow(2).sum();
    REQUIRE_THROWS(again.backward(), "oops");
    armed = false;
    {
      const torch::NoGradGuard no_grad;
      for (auto& param : model.parameters()) param.mul_(1.0);
    }
    hidden.remove_hook(hook);
    require_usable(model, comm);
  }
}

/// A backward that only one rank leaves by an exception: an error on every rank, at the latest when
/// that rank goes on; no rank hangs or trains on half a gradient.
void one_rank_fails(const fsdp::Communicator& comm) {
  if (comm.world_size() == 1) return;
  auto model = shard(comm);
  require_usable(model, comm);
  const at::Tensor x = batch_of(0, comm.rank());
  if (comm.rank() == 0) {
    model->a->up->weight.register_hook([](const at::Tensor&) { throw std::runtime_error("oops"); });
  }
  if (comm.rank() == 0) {
    const at::Tensor loss = model.forward(x).pow(2).sum();
    REQUIRE_THROWS(loss.backward(), "oops");
    REQUIRE_THROWS(model.forward(x), "rank");
  } else {
    REQUIRE_THROWS(model.forward(x).pow(2).sum().backward(), "rank 0");
  }
  REQUIRE_THROWS(model.forward(x), "rank");
  throw DoneWithBrokenCommunicator();
}

void foreign_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                      torch::jit::Stack* stack) {
  op.redispatchBoxed(
      keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::DeferredInit),
      stack);
}

void key_in_use(const fsdp::Communicator& comm) {
  const auto registered = c10::Dispatcher::singleton().registerFallback(
      c10::DispatchKey::DeferredInit,
      c10::KernelFunction::makeFromBoxedFunction<&foreign_fallback>(), "somebody else");
  REQUIRE_THROWS(shard(comm), "DeferredInit", "another library");
}

void second_thread(const fsdp::Communicator& comm) {
  auto model = shard(comm);
  std::atomic<bool> stop{false};
  std::atomic<int> rounds{0};
  std::string failure;
  // Made here: the thread must not draw from the generator that this one seeds.
  nn::Linear own(5, 5);
  // Trains a small model of its own all the while, and may not touch the sharded one.
  std::thread other([&] {
    try {
      torch::optim::SGD optimizer(own->parameters(), 0.01);
      while (!stop) {
        own->forward(torch::ones({3, 5})).pow(2).mean().backward();
        optimizer.step();
        optimizer.zero_grad();
        REQUIRE_THROWS(model->a->up->weight.sum(), "'a.up.weight'");
        REQUIRE(!c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::DeferredInit));
        ++rounds;
      }
    } catch (const std::exception& error) {
      failure = error.what();
    }
  });
  const auto join = [&] {
    stop = true;
    other.join();
  };
  try {
    for (int round = 0; round < 20; ++round) require_usable(model, comm);
    while (rounds < 3 && failure.empty()) std::this_thread::yield();
  } catch (...) {
    join();
    throw;
  }
  join();
  REQUIRE_SAY(failure.empty(), failure);
  REQUIRE(!c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::DeferredInit));
  REQUIRE(!c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::DeferredInit));

  // A forward on a thread, its backward on another.
  auto forward = std::async(std::launch::async,
                            [&] { return model.forward(batch_of(0, comm.rank())).pow(2).sum(); });
  forward.get().backward();
  require_usable(model, comm);
}

void wrong_modules(const fsdp::Communicator& comm) {
  const auto refuse = [&](auto module, const std::string& name, const std::string& why) {
    REQUIRE_THROWS(fsdp::fully_shard(module, options_of(comm)), "'" + name + "'", why);
    // Unchanged: still an ordinary module.
    for (const at::Tensor& param : module->parameters()) param.detach().clone();
    REQUIRE(!module->parameters().empty());
  };
  {
    Net net;
    net->b->to(at::kDouble);
    refuse(net, "b.up.weight", "Double");
  }
  {
    Net net;
    net->a->up->weight.mutable_grad() = torch::ones({11, 6});
    refuse(net, "a.up.weight", "gradient");
  }
  struct MetaImpl : nn::Module {
    MetaImpl() {
      register_parameter("p", torch::empty({4}, at::kMeta));
      register_module("block", Block());
    }
  };
  refuse(std::make_shared<MetaImpl>(), "p", "reset_parameters()");
  struct OverlapImpl : nn::Module {
    OverlapImpl() {
      const at::Tensor base = torch::zeros({8});
      register_parameter("p", base.slice(0, 0, 4).detach());
      register_parameter("q", base.slice(0, 4, 8).detach());
      register_module("block", Block());
    }
  };
  refuse(std::make_shared<OverlapImpl>(), "q", "'p'");

  fsdp::ShardOptions options;
  Net net;
  REQUIRE_THROWS(fsdp::fully_shard(net, options), "comm");
  options.comm = comm;
  options.wrap = fsdp::wrap_class("NoSuchImpl");
  REQUIRE_THROWS(fsdp::fully_shard(net, options), "NoSuchImpl");
  options.wrap = fsdp::wrap_modules({net->a.get(), Block().get()});
  REQUIRE_THROWS(fsdp::fully_shard(net, options), "wrap_modules");
  options.wrap = fsdp::wrap_if(
      [](const nn::Module&, const std::string&) -> bool { throw std::runtime_error("no idea"); });
  REQUIRE_THROWS(fsdp::fully_shard(net, options), "no idea");
  auto model = fsdp::fully_shard(net, options_of(comm));
  REQUIRE_THROWS(fsdp::fully_shard(net, options_of(comm)), "\"a\"", "wrapped already");
}

std::vector<std::string> unit_names(const fsdp::Engine& engine) {
  std::vector<std::string> names;
  for (std::uint32_t unit = 0; unit < engine.unit_count(); ++unit) {
    names.push_back(engine.unit_info(unit).name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

void policies(const fsdp::Communicator& comm) {
  const auto units_with = [&](const fsdp::WrapPolicy& wrap, Net net = Net()) {
    fsdp::ShardOptions options;
    options.comm = comm;
    options.wrap = wrap;
    return unit_names(fsdp::fully_shard(net, options).engine());
  };
  using Names = std::vector<std::string>;
  REQUIRE(units_with(fsdp::WrapPolicy()) == Names({""}));
  REQUIRE(units_with(fsdp::wrap_class("BlockImpl")) == Names({"", "a", "b"}));
  REQUIRE(units_with(fsdp::wrap_class("test_scope::(anonymous namespace)::BlockImpl")) ==
          Names({"", "a", "b"}));
  REQUIRE(units_with(fsdp::wrap_if([](const nn::Module&, const std::string& fqn) {
            return fqn == "b.down";
          })) == Names({"", "b.down"}));
  REQUIRE(units_with(fsdp::wrap_if([](const nn::Module& module, const std::string&) {
            return dynamic_cast<const nn::LinearImpl*>(&module) != nullptr;
          })) == Names({"", "a.down", "a.up", "b.down", "b.up"}));
  Net net;
  REQUIRE(units_with(fsdp::wrap_modules({net->b.get()}), net) == Names({"", "b"}));
  REQUIRE(units_with(fsdp::wrap_size(100)).size() > 1);
  REQUIRE(units_with(fsdp::wrap_always()).size() >= 5);
}

/// A unit is resharded when a sibling is touched, so that at most a path of units is unsharded.
void resharding(const fsdp::Communicator& comm) {
  auto model = shard(comm);
  const auto state_of = [&](const std::string& name) {
    for (std::uint32_t unit = 0; unit < model.engine().unit_count(); ++unit) {
      if (model.engine().unit_info(unit).name == name) return model.engine().unit_info(unit).state;
    }
    throw Failure("no unit " + name);
  };
  bool seen = false;
  model->b->before = [&] {
    seen = true;
    REQUIRE(state_of("a") == FSDP_UNIT_UNSHARDED && state_of("b") == FSDP_UNIT_SHARDED);
    model->b->up->bias.sum();
    REQUIRE(state_of("a") == FSDP_UNIT_SHARDED && state_of("b") == FSDP_UNIT_UNSHARDED);
    // An operator that needs both has both.
    const at::Tensor both = torch::cat({model->a->up->bias, model->b->up->bias});
    REQUIRE(both.numel() == 22);
  };
  const at::Tensor loss = model.forward(batch_of(0, comm.rank())).pow(2).sum();
  REQUIRE(seen);
  model->b->before = nullptr;
  REQUIRE(state_of("a") == FSDP_UNIT_SHARDED && state_of("b") == FSDP_UNIT_SHARDED);
  loss.backward();
  REQUIRE(state_of("a") == FSDP_UNIT_SHARDED && state_of("b") == FSDP_UNIT_SHARDED);
  REQUIRE(model.stats().all_gather_bytes_moved == 0);
  REQUIRE(model.stats().all_gathers > 0);
  require_usable(model, comm);
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv,
                 {{"use outside of the scope", outside_of_scope},
                  {"writing the module's own parameters", writing_the_modules_own},
                  {"optimizer on the module's own parameters", optimizer_on_the_modules_own},
                  {"after the handle is destroyed", after_the_handle},
                  {"exceptions", exceptions},
                  {"one rank fails alone", one_rank_fails},
                  {"dispatch key in use", key_in_use},
                  {"a second thread", second_thread},
                  {"modules that cannot be sharded", wrong_modules},
                  {"wrap policies", policies},
                  {"resharding", resharding}});
}

const harness::Program program("test_scope", run_program);

}  // namespace
}  // namespace test_scope
