// A model with two paths, of which one is frozen, whose ranks take different paths: in the first
// iteration an error on every rank; later an error everywhere, or one warning on the ranks that
// deviate and right gradients, as order_check says. Paths that change on all ranks together train
// as in PyTorch; training and evaluating in turns gives no warning. With both strategies.
//
// Breaks: swapped_order, no_average, no_error, no_warning, two_warnings, missing_zero,
// warned_in_eval.
#include <chrono>

#include "scenario.hpp"

namespace scenario_exec_order {
namespace {

using namespace scenario;
namespace nn = torch::nn;
using fsdp::OrderCheck;
using fsdp::Strategy;

struct ModelImpl : nn::Module {
  ModelImpl()
      : layer0(register_module("layer0", nn::Linear(5, 6))),
        layer1(register_module("layer1", nn::Linear(nn::LinearOptions(6, 6).bias(false)))),
        layer2(register_module("layer2", nn::Sequential())) {
    // One after the other: arguments of a function are evaluated in any order.
    layer2->push_back(nn::Linear(nn::LinearOptions(6, 3).bias(false)));
    layer2->push_back(nn::ReLU());
    layer2->push_back(nn::Linear(nn::LinearOptions(3, 6).bias(false)));
    take(0);
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor z = torch::relu(layer0(x));
    at::Tensor y = torch::relu(path == 0 ? layer1(z) : layer2->forward(z));
    if (also_skipped) {
      // The same value, other gradients.
      const at::Tensor other = torch::relu(path == 0 ? layer2->forward(z) : layer1(z));
      y = y + (other - other.detach());
    }
    return y;
  }
  /// Takes one path and freezes the other.
  void take(int new_path) {
    path = new_path;
    for (auto& param : layer1->parameters()) param.set_requires_grad(path == 0 || also_skipped);
    for (auto& param : layer2->parameters()) param.set_requires_grad(path == 1 || also_skipped);
  }
  nn::Linear layer0, layer1;
  nn::Sequential layer2;
  int path = 0;
  bool also_skipped = false;  // for a break: the rank does not really skip the other path
};
TORCH_MODULE(Model);

// ---- what is logged ----

std::vector<std::string> logged;

void collect_log() {
  logged.clear();
  fsdp::set_log_callback([](fsdp::LogLevel level, const std::string& message) {
    logged.push_back(level == fsdp::LogLevel::warning ? message : "not a warning: " + message);
    if (broken("two_warnings")) logged.push_back(logged.back());
  });
}

// ---- cases ----

/// A sharded model and the plain one that it must equal.
class Case {
 public:
  Case(const fsdp::Communicator& comm, Strategy strategy, OrderCheck order_check)
      : comm(comm),
        data("exec_order", comm.world_size()),
        module(make()),
        reference(make()),
        model(shard(strategy, order_check)),
        params(reference->parameters()) {
    collect_log();
    torch::manual_seed(300 + comm.rank());
    for (int i = 0; i < 6; ++i) {
      check_same(torch::randn({8, 5}), data["input"][i][comm.rank()], "input");
    }
    check_file(model, data, "initial");
  }

  at::Tensor input(int i, int rank) const { return data["input"][i][rank].clone(); }

  /// Forward and backward of the sharded model on the path of this rank.
  at::Tensor iterate(int i, int first, int others) {
    const int path = comm.rank() == 0 ? first : others;
    if (path != module->path) module->take(path);
    const at::Tensor loss = model.forward(input(i, comm.rank())).sum();
    loss.backward();
    break_average(model);
    return loss.detach();
  }

  /// The same in both models; their gradients must agree.
  at::Tensor iterate_both(int i, int first, int others) {
    if (first != others && comm.rank() != 0 && broken("missing_zero")) {
      module->also_skipped = true;
      module->take(others);
    }
    const at::Tensor loss = iterate(i, first, others);
    // Which parameters are frozen is not the same on all ranks: gradients of before stay.
    average_gradients(params, comm.world_size(), [&](int rank) {
      reference->take(rank == 0 ? first : others);
      const at::Tensor wanted = reference->forward(input(i, rank)).sum();
      wanted.backward();
      if (rank == comm.rank()) check_same(loss, wanted.detach(), "loss");
    });
    check_shards(model, params, true, "input " + std::to_string(i));
    return loss;
  }

  void zero_grad() {
    model.zero_grad();
    reference->zero_grad();
  }

 private:
  static Model make() {
    torch::manual_seed(0);
    return Model();
  }

  fsdp::ShardedModule<ModelImpl> shard(Strategy strategy, OrderCheck order_check) const {
    fsdp::ShardOptions options;
    options.comm = comm;
    options.strategy = strategy;
    options.order_check = order_check;
    options.wrap = fsdp::wrap_modules({module->layer1.get(), module->layer2.ptr().get()});
    return fsdp::fully_shard(module, options);
  }

 public:
  const fsdp::Communicator comm;
  const Data data;
  Model module, reference;
  fsdp::ShardedModule<ModelImpl> model;
  const std::vector<at::Tensor> params;
};

/// 3 steps on one path, and 6 on paths that change on all ranks together.
void train(const fsdp::Communicator& comm, Strategy strategy, OrderCheck order_check, bool flip) {
  Case c(comm, strategy, order_check);
  const std::string run = flip ? "flipped" : "unflipped";
  const int paths[] = {0, 0, 1, 1, 0, 1};
  auto optimizer = plain_sgd(0.01)(c.model.parameters());
  auto full_optimizer = plain_sgd(0.01)(c.params);
  for (int step = 0; step < (flip ? 6 : 3); ++step) {
    const int path = flip ? paths[step] : 0;
    if (flip) REQUIRE(c.data["flipped.path"][step].item<int>() == path);
    const int others = broken("swapped_order") ? 1 - path : path;
    check_same(c.iterate_both(step, path, others), c.data[run + ".loss"][step][comm.rank()],
               run + ": loss", 1e-6);
    for (std::size_t i = 0; i < c.params.size(); ++i) {
      REQUIRE(c.model.parameters()[i].requires_grad() ==
              c.module->parameters()[i].requires_grad());
    }
    optimizer->step();
    full_optimizer->step();
    c.zero_grad();
  }
  check_file(c.model, c.data, run, 1e-6);
  // A change on all ranks is a deviation from the first iteration, but from no other rank.
  const std::size_t warnings = flip && order_check == OrderCheck::warn ? 1 : 0;
  REQUIRE_SAY(logged.size() == warnings, run << ": " << logged.size() << " warnings");
}

/// An iteration in which ranks differ fails on every rank within a second.
[[noreturn]] void check_order_error(Case& c) {
  c.comm.barrier();
  const auto start = std::chrono::steady_clock::now();
  const std::string message = REQUIRE_THROWS(
      c.iterate(0, 0, broken("no_error") ? 0 : 1), "rank 0 ", "layer1.weight", "layer2.0.weight",
      "layer2.2.weight");
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
  REQUIRE_SAY(passed.count() < 1, "the error took " << passed.count() << " s");
  const std::string pytorch = "Forward order differs across ranks";
  REQUIRE(c.data.about("/texts/error").compare(0, pytorch.size(), pytorch) == 0);
  REQUIRE_SAY(message.compare(0, pytorch.size(), pytorch) == 0, message);
  bool names_another = false;
  for (int rank = 1; rank < c.comm.world_size(); ++rank) {
    const std::string name = "rank " + std::to_string(rank) + " ";
    names_another = names_another || message.find(name) != std::string::npos;
  }
  REQUIRE_SAY(names_another, message);
  REQUIRE(logged.empty());
  throw DoneWithBrokenCommunicator();
}

void first_iteration(const fsdp::Communicator& comm, Strategy strategy, OrderCheck order_check) {
  if (comm.world_size() == 1) return;
  Case c(comm, strategy, order_check);
  if (order_check != OrderCheck::off) check_order_error(c);
  c.iterate_both(0, 0, 1);
  check_file(c.model, c.data, "deviating.grad", 1e-6, true);
  REQUIRE(logged.empty());
}

void later_iteration(const fsdp::Communicator& comm, Strategy strategy, OrderCheck order_check,
                     int before) {
  if (comm.world_size() == 1) return;
  const bool warns = order_check == OrderCheck::warn;
  Case c(comm, strategy, warns && broken("no_warning") ? OrderCheck::off : order_check);
  for (int i = 0; i < before; ++i) c.iterate_both(1 + i, 0, 0);
  c.zero_grad();
  REQUIRE(logged.empty());
  if (order_check == OrderCheck::error) check_order_error(c);

  c.iterate_both(0, 0, 1);
  const std::size_t wanted = warns && comm.rank() != 0 ? 1 : 0;
  REQUIRE_SAY(logged.size() == wanted, logged.size() << " warnings");
  if (wanted == 1) {
    const std::string pytorch = "Forward order differs from that of the first iteration on rank ";
    REQUIRE(c.data.about("/texts/warning").compare(0, pytorch.size(), pytorch) == 0);
    const std::string start =
        pytorch + std::to_string(comm.rank()) + ". Collectives are matched by unit";
    REQUIRE_SAY(logged[0].compare(0, start.size(), start) == 0, logged[0]);
  }
  check_file(c.model, c.data, "deviating.grad", 1e-6, true);
  // Once more, from other values, then one path for all: no second warning, right gradients.
  auto optimizer = plain_sgd(0.01)(c.model.parameters());
  auto full_optimizer = plain_sgd(0.01)(c.params);
  for (int i = 4; i < 6; ++i) {
    optimizer->step();
    full_optimizer->step();
    c.zero_grad();
    c.iterate_both(i, 0, i == 4 ? 1 : 0);
    REQUIRE_SAY(logged.size() == wanted, logged.size() << " warnings after iteration " << i);
  }
}

/// Two epochs of 3 iterations of training and 3 of evaluation, which may take any path.
void train_and_evaluate(const fsdp::Communicator& comm, Strategy strategy,
                        OrderCheck order_check) {
  Case c(comm, strategy, order_check);
  for (int epoch = 0; epoch < 2; ++epoch) {
    c.module->train();
    for (int i = 0; i < 3; ++i) c.iterate_both(i, 0, 0);
    c.zero_grad();
    c.module->eval();
    if (broken("warned_in_eval")) c.module->train();
    for (int i = 3; i < 6; ++i) {
      // With gradients enabled and without, on both paths; no backward.
      const torch::AutoGradMode with_grad(i != 4 || broken("warned_in_eval"));
      for (const int path : {1, 0}) {
        c.module->path = c.reference->path = path;
        check_same(c.model.forward(c.input(i, comm.rank())),
                   c.reference->forward(c.input(i, comm.rank())), "evaluation");
        if (broken("warned_in_eval")) {
          c.model.forward(c.input(i, comm.rank())).sum().backward();
          c.zero_grad();
        }
      }
    }
  }
  REQUIRE_SAY(logged.empty(), logged.size() << " warnings: " << logged[0]);
}

/// What the strategies differ in: all-gathers, and what the engine keeps between forward and
/// backward. What a module's parameters let one do is the same.
void unsharded_between(const fsdp::Communicator& comm, Strategy strategy) {
  Case c(comm, strategy, OrderCheck::error);
  const bool keeps = strategy == Strategy::shard_grad_op;
  const auto states = [&] {
    std::vector<std::int32_t> states;
    for (std::uint32_t unit = 0; unit < 2; ++unit) {
      states.push_back(c.model.engine().unit_info(unit).state);
    }
    return states;
  };
  const auto both = [](std::int32_t state) { return std::vector<std::int32_t>(2, state); };
  REQUIRE(unit_names(c.model.engine()) == std::vector<std::string>({"", "layer1", "layer2"}));
  const auto before = c.model.stats().all_gathers;
  const at::Tensor loss = c.model.forward(c.input(0, comm.rank())).sum();
  REQUIRE(c.model.stats().all_gathers == before + 2);
  // The root stays unsharded in any case.
  auto wanted = both(FSDP_UNIT_UNSHARDED);
  if (!keeps) wanted[1] = FSDP_UNIT_SHARDED;
  REQUIRE(states() == wanted);
  REQUIRE_THROWS(c.module->layer1->weight.sum(), "'layer1.weight'", "outside");
  REQUIRE_THROWS(c.module->layer1->weight.data_ptr(), "sharded");
  loss.backward();
  REQUIRE(states() == both(FSDP_UNIT_SHARDED));
  // The root's weight is not needed again, layer1's is.
  REQUIRE(c.model.stats().all_gathers == before + (keeps ? 2 : 3));
  {
    const torch::NoGradGuard no_grad;
    c.model.forward(c.input(1, comm.rank()));
    REQUIRE(states() == both(FSDP_UNIT_SHARDED));
  }
  // A forward that no backward follows, then writing: nothing is kept.
  c.model.forward(c.input(1, comm.rank()));
  const torch::NoGradGuard no_grad;
  for (at::Tensor& shard : c.model.parameters()) shard.mul_(0.5);
  REQUIRE(states() == both(FSDP_UNIT_SHARDED));
}

int run_program(int argc, char** argv) {
  std::vector<Part> parts;
  const auto add = [&](const std::string& name, std::function<void(fsdp::Communicator)> run) {
    parts.push_back({name, std::move(run)});
  };
  const std::pair<std::string, Strategy> strategies[] = {
      {"FULL_SHARD", Strategy::full_shard}, {"SHARD_GRAD_OP", Strategy::shard_grad_op}};
  const std::pair<std::string, OrderCheck> checks[] = {
      {"error", OrderCheck::error}, {"warn", OrderCheck::warn}, {"off", OrderCheck::off}};
  for (const auto& [strategy_name, strategy] : strategies) {
    const auto s = strategy;
    add(strategy_name + ": between forward and backward",
        [=](auto comm) { unsharded_between(comm, s); });
    for (const auto& [check_name, check] : checks) {
      const auto o = check;
      const std::string start = strategy_name + ", " + check_name + ": ";
      add(start + "train", [=](auto comm) {
        train(comm, s, o, false);
        train(comm, s, o, true);
        train_and_evaluate(comm, s, o);
      });
      add(start + "first iteration", [=](auto comm) { first_iteration(comm, s, o); });
      for (const int before : {1, 3}) {
        add(start + "after " + std::to_string(before),
            [=](auto comm) { later_iteration(comm, s, o, before); });
      }
    }
  }
  return main_of(argc, argv, parts);
}

const harness::Program program("scenario_exec_order", run_program);

}  // namespace
}  // namespace scenario_exec_order
