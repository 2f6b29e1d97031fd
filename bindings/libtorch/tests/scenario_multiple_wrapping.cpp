// A module that contains a unit is trained, wrapped again under a new root, and gives the same
// output; the first root's handle may be alive or destroyed. A bigger module around it trains on
// with PyTorch's numbers, with the optimizer of before if one likes. What cannot be wrapped again
// says why.
//
// Breaks: stale_values, no_error, no_average.
#include "scenario.hpp"

namespace scenario_multiple_wrapping {
namespace {

using namespace scenario;
namespace nn = torch::nn;

struct InnerModelImpl : nn::Module {
  InnerModelImpl() : layers(register_module("layers", nn::Sequential(nn::Linear(5, 5)))) {}
  at::Tensor forward(const at::Tensor& x) {
    if (inside) inside();
    return layers->forward(x);
  }
  nn::Module* layer() const { return layers->ptr(0).get(); }
  nn::Sequential layers;
  std::function<void()> inside;
};
TORCH_MODULE(InnerModel);

struct NewRootImpl : nn::Module {
  explicit NewRootImpl(InnerModel inner)
      : inner(register_module("inner", inner)), head(register_module("head", nn::Linear(5, 5))) {}
  at::Tensor forward(const at::Tensor& x) { return head(inner(x)); }
  InnerModel inner;
  nn::Linear head;
};
TORCH_MODULE(NewRoot);

using Names = std::vector<std::string>;

/// A sharded model and the plain one that it must equal.
struct Pair {
  fsdp::ShardedModule<InnerModelImpl> model;
  InnerModel reference;
};

fsdp::ShardOptions options_of(const fsdp::Communicator& comm) {
  fsdp::ShardOptions options;
  options.comm = comm;
  return options;
}

std::vector<at::Tensor> inputs_of(int rank, const Data& data) {
  torch::manual_seed(200 + rank);
  std::vector<at::Tensor> inputs;
  for (int i = 0; i < 6; ++i) {
    inputs.push_back(torch::rand({1, 5}));
    check_same(inputs.back(), data["input"][i][rank], "input");
  }
  return inputs;
}

Pair make(const fsdp::Communicator& comm, const InnerModel& module) {
  torch::manual_seed(0);
  InnerModel reference;
  fsdp::ShardOptions options = options_of(comm);
  options.wrap = fsdp::wrap_modules({module->layer()});
  return {fsdp::fully_shard(module, options), reference};
}

InnerModel inner_model() {
  torch::manual_seed(0);
  return InnerModel();
}

/// One step of both on input `i`; the loss of this rank.
template <class Model, class Reference>
at::Tensor step_both(Model& model, Reference& reference, torch::optim::Optimizer& optimizer,
                     torch::optim::Optimizer& full_optimizer, const fsdp::Communicator& comm,
                     const Data& data, int i) {
  const auto params = reference->parameters();
  average_gradients(params, comm.world_size(), [&](int rank) {
    reference->forward(data["input"][i][rank].clone()).sum().backward();
  });
  const at::Tensor x = inputs_of(comm.rank(), data)[i].set_requires_grad(true);
  const at::Tensor loss = model.forward(x).sum();
  loss.backward();
  break_average(model);
  check_shards(model, params, true, "step on input " + std::to_string(i));
  optimizer.step();
  full_optimizer.step();
  check_shards(model, params, false, "step on input " + std::to_string(i));
  optimizer.zero_grad();
  full_optimizer.zero_grad();
  return loss.detach();
}

/// Wrapping again under a root of its own and under a bigger one, with the first handle alive or
/// destroyed, and with the first optimizer or new ones.
void wrap_again(const fsdp::Communicator& comm, bool destroyed, bool same_optimizer) {
  const Data data("multiple_wrapping", comm.world_size());
  const int rank = comm.rank();
  const auto inputs = inputs_of(rank, data);
  InnerModel inner = inner_model();
  check_same(inner->parameters()[0], data["initial.layers.0.weight"], "initial weight");
  check_same(inner->parameters()[1], data["initial.layers.0.bias"], "initial bias");

  // Training under the first root.
  std::optional<Pair> first = make(comm, inner);
  InnerModel reference = first->reference;
  auto optimizer = plain_sgd(0.1)(first->model.parameters());
  auto full_optimizer = plain_sgd(0.1)(reference->parameters());
  for (int i = 0; i < 3; ++i) {
    check_same(step_both(first->model, reference, *optimizer, *full_optimizer, comm, data, i),
               data["loss"][i][rank], "loss", 1e-6);
  }
  check_file(first->model, data, "trained", 1e-6);
  const at::Tensor before = first->model.forward(inputs[3]);
  check_same(before, data["output.before"][rank], "output", 1e-6);
  if (broken("stale_values")) {
    step_both(first->model, reference, *optimizer, *full_optimizer, comm, data, 0);
  }

  // Inference under a new root; `before` has a graph whose backward never comes.
  const auto old_shards = first->model.parameters();
  if (destroyed) {
    first.reset();
    REQUIRE_THROWS(inner->forward(inputs[3]), "'layers.0.weight'", "destroyed");
  }
  auto second = fsdp::fully_shard(inner, options_of(comm));
  check_same(second.forward(inputs[3]), before, "output after wrapping again");
  check_same(second.forward(inputs[3]), data["output.after"][rank], "output, PyTorch", 1e-6);
  // Names, units and the optimizer's tensors are as before.
  REQUIRE(second.named_parameters().keys() == Names({"layers.0.weight", "layers.0.bias"}));
  REQUIRE(second.engine().param_info(0).name == std::string("layers.0.weight"));
  REQUIRE(unit_names(second.engine()) == Names({"", "", "layers.0"}));
  for (std::size_t i = 0; i < old_shards.size(); ++i) {
    REQUIRE(second.parameters()[i].is_same(old_shards[i]));
  }
  if (!destroyed) {
    const auto old = [&] { return &first->model; };
    REQUIRE_THROWS(old()->forward(inputs[3]), "re-wrapped", "newer handle");
    REQUIRE_THROWS(old()->clip_grad_norm_(1.0), "re-wrapped");
    REQUIRE_THROWS(old()->stats(), "re-wrapped");
    REQUIRE_THROWS(old()->save_checkpoint("nowhere"), "re-wrapped");
    REQUIRE(old()->parameters()[0].is_same(old_shards[0]));
  }

  // Training under a third, around the second.
  torch::manual_seed(1);
  NewRoot root(inner);
  torch::manual_seed(1);
  NewRoot root_reference(reference);
  check_same(root->head->weight, data["root.initial.head.weight"], "initial head");
  auto third = fsdp::fully_shard(root, options_of(comm));
  REQUIRE(third.named_parameters().keys() == Names({"inner.layers.0.weight", "inner.layers.0.bias",
                                                    "head.weight", "head.bias"}));
  check_file(third, data, "root.initial", 1e-6);
  REQUIRE_THROWS(second.forward(inputs[3]), "re-wrapped");
  if (same_optimizer) {
    // The new layer's are all that the optimizer lacks.
    optimizer->add_param_group(torch::optim::OptimizerParamGroup(
        {third.parameters()[2], third.parameters()[3]},
        std::make_unique<torch::optim::SGDOptions>(0.1)));
  } else {
    optimizer = plain_sgd(0.1)(third.parameters());
  }
  full_optimizer = plain_sgd(0.1)(root_reference->parameters());
  for (int i = 0; i < 2; ++i) {
    check_same(step_both(third, root_reference, *optimizer, *full_optimizer, comm, data, 4 + i),
               data["root.loss"][i][rank], "loss of the third root", 1e-6);
  }
  check_file(third, data, "root.trained", 1e-6);
  first.reset();
  const torch::NoGradGuard no_grad;
  check_same(third.forward(inputs[3]), root_reference->forward(inputs[3]), "inference");
}

/// Momentum, gradients that were not applied yet, and frozen parameters come along.
void state_comes_along(const fsdp::Communicator& comm) {
  const Data data("multiple_wrapping", comm.world_size());
  InnerModel inner = inner_model();
  Pair pair = make(comm, inner);
  auto optimizer = sgd()(pair.model.parameters());  // with momentum
  auto full_optimizer = sgd()(pair.reference->parameters());
  step_both(pair.model, pair.reference, *optimizer, *full_optimizer, comm, data, 0);
  average_gradients(pair.reference->parameters(), comm.world_size(), [&](int rank) {
    pair.reference->forward(data["input"][1][rank].clone()).sum().backward();
  });
  const at::Tensor mine = data["input"][1][comm.rank()].clone();
  const at::Tensor unused = pair.model.forward(mine).sum();
  pair.model.forward(mine).sum().backward();

  auto second = fsdp::fully_shard(inner, options_of(comm));
  check_shards(second, pair.reference->parameters(), true, "gradients of before");
  // A second backward adds to them.
  average_gradients(pair.reference->parameters(), comm.world_size(), [&](int rank) {
    pair.reference->forward(data["input"][2][rank].clone()).sum().backward();
  });
  second.forward(data["input"][2][comm.rank()].clone()).sum().backward();
  check_shards(second, pair.reference->parameters(), true, "gradients of before and after");
  optimizer->step();
  full_optimizer->step();
  check_shards(second, pair.reference->parameters(), false, "with the optimizer of before");
  optimizer->zero_grad();
  full_optimizer->zero_grad();

  // Frozen under one handle, trained under another.
  for (auto* module : {&inner, &pair.reference}) {
    (*module)->parameters()[1].set_requires_grad(false);
  }
  step_both(second, pair.reference, *optimizer, *full_optimizer, comm, data, 3);
  auto third = fsdp::fully_shard(inner, options_of(comm));
  REQUIRE(!third.parameters()[1].requires_grad());
  step_both(third, pair.reference, *optimizer, *full_optimizer, comm, data, 4);
  for (auto* module : {&inner, &pair.reference}) {
    (*module)->parameters()[1].set_requires_grad(true);
  }
  step_both(third, pair.reference, *optimizer, *full_optimizer, comm, data, 5);
  // A graph of the first handle is of no use any more, and does no harm.
  REQUIRE_THROWS(unused.backward(), "re-wrapped");
  step_both(third, pair.reference, *optimizer, *full_optimizer, comm, data, 0);
}

void what_is_refused(const fsdp::Communicator& comm) {
  InnerModel inner = inner_model();
  fsdp::ShardOptions twice = options_of(comm);
  twice.wrap = fsdp::wrap_modules({inner->layer(), inner->layer()});
  REQUIRE_THROWS(fsdp::fully_shard(inner, twice), "\"layers.0\"", "wrapped already");
  Pair pair = make(comm, inner);
  const at::Tensor x = torch::ones({1, 5});
  const at::Tensor wanted = pair.model.forward(x);

  for (const auto& wrap : {fsdp::wrap_modules({inner->layer()}), fsdp::wrap_class("LinearImpl"),
                           fsdp::wrap_if([](const nn::Module&, const std::string& name) {
                             return name == "layers.0";
                           })}) {
    fsdp::ShardOptions options = options_of(comm);
    if (!broken("no_error")) options.wrap = wrap;
    REQUIRE_THROWS(fsdp::fully_shard(inner, options), "\"layers.0\"", "wrapped already");
  }
  // The sharded module's part: neither alone nor in another model.
  REQUIRE_THROWS(fsdp::fully_shard(inner->layers, options_of(comm)), "'0.weight'",
                 "sharded already");
  struct ThiefImpl : nn::Module {
    explicit ThiefImpl(const InnerModel& inner)
        : own(register_module("own", nn::Linear(5, 5))),
          taken(register_module("taken", inner->layers)) {}
    nn::Linear own;
    nn::Sequential taken;
  };
  REQUIRE_THROWS(fsdp::fully_shard(std::make_shared<ThiefImpl>(inner), options_of(comm)),
                 "'taken.0.weight'", "sharded already");
  // Tied to a parameter outside.
  struct TiedImpl : nn::Module {
    explicit TiedImpl(InnerModel inner) {
      register_module("inner", inner);
      register_parameter("tied", inner->parameters()[0]);
    }
  };
  REQUIRE_THROWS(fsdp::fully_shard(std::make_shared<TiedImpl>(inner), options_of(comm)), "tied");
  // Twice in one model.
  struct DoubleImpl : nn::Module {
    explicit DoubleImpl(InnerModel inner) {
      register_module("one", inner);
      register_module("two", inner);
    }
  };
  REQUIRE_THROWS(fsdp::fully_shard(std::make_shared<DoubleImpl>(inner), options_of(comm)), "'two'",
                 "twice");
  REQUIRE_THROWS(fsdp::trace_forward(inner, [] {}), "'layers.0.weight'", "sharded");
  // All of these left the model as it was.
  check_same(pair.model.forward(x), wanted, "output after errors");
  // Inside of its own forward; and with a module more.
  inner->inside = [&] {
    REQUIRE_THROWS(fsdp::fully_shard(inner, options_of(comm)), "inside of its forward");
  };
  check_same(pair.model.forward(x), wanted, "output after an error inside");
  inner->inside = nullptr;
  inner->layers->push_back(nn::Identity());
  REQUIRE_THROWS(fsdp::fully_shard(inner, options_of(comm)), "has changed since");
  check_same(pair.model.forward(x), wanted, "output after an error");
}

int run_program(int argc, char** argv) {
  return main_of(
      argc, argv,
      {{"first handle alive", [](auto comm) { wrap_again(comm, false, false); }},
       {"first handle destroyed", [](auto comm) { wrap_again(comm, true, false); }},
       {"first handle alive, its optimizer", [](auto comm) { wrap_again(comm, false, true); }},
       {"first handle destroyed, its optimizer", [](auto comm) { wrap_again(comm, true, true); }},
       {"optimizer state and gradients", state_comes_along},
       {"what is refused", what_is_refused}});
}

const harness::Program program("scenario_multiple_wrapping", run_program);

}  // namespace
}  // namespace scenario_multiple_wrapping
