// A unit used twice in one forward, below another one: 3 steps of SGD give the parameters of
// PyTorch's DistributedDataParallel and FullyShardedDataParallel, bit for bit where those two
// agree, and of a plain loop. The unit is reduced once, after its last use.
//
// Breaks: missing_second_use, reduced_too_early, no_average.
#include "scenario.hpp"

namespace scenario_multiple_forward {
namespace {

using namespace scenario;
namespace nn = torch::nn;

struct ModelImpl : nn::Module {
  ModelImpl()
      : inner(register_module("inner", nn::Linear(4, 4))),
        outer(register_module("outer", nn::Linear(4, 5))) {}
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor i = inner(x);
    at::Tensor j = inner(x);
    if (is_sharded && broken("missing_second_use")) j = j.detach();
    return outer(i + j);
  }
  nn::Linear inner, outer;
  bool is_sharded = false;
};
TORCH_MODULE(Model);

/// The model and the input that is drawn right after its construction.
std::pair<Model, at::Tensor> make() {
  torch::manual_seed(0);
  Model model;
  return {model, torch::rand({64, 4})};
}

template <class Forward>
void backward(Forward forward, const at::Tensor& x) {
  if (!broken("reduced_too_early")) {
    forward(x).sum().backward();
    return;
  }
  // Half of the gradients, twice: the unit is reduced when it has the first half.
  for (int half = 0; half < 2; ++half) (forward(x).sum() / 2).backward();
}

void train(const fsdp::Communicator& comm, const Data& data, const std::string& which,
           fsdp::Strategy strategy) {
  const int ranks = comm.world_size();
  auto [module, same_input] = make();
  auto reference = make().first;
  const std::string prefix = "initial.";
  for (const auto& item : module->named_parameters()) {
    check_same(item.value(), data[prefix + item.key()], prefix + item.key());
  }

  // The same seeds give the file's inputs.
  std::vector<at::Tensor> inputs;
  for (int rank = 0; rank < ranks; ++rank) {
    torch::manual_seed(100 + rank);
    inputs.push_back(which == "same" ? same_input.clone() : torch::rand({64, 4}));
    check_same(inputs.back(), which == "same" ? data["same.input"] : data["each.input"][rank],
               "input");
    inputs.back().set_requires_grad(true);
  }

  fsdp::ShardOptions options;
  options.comm = comm;
  options.strategy = strategy;
  options.wrap = fsdp::wrap_modules({module->inner.get()});
  module->is_sharded = true;
  auto model = fsdp::fully_shard(module, options);
  REQUIRE(unit_names(model.engine()) == std::vector<std::string>({"", "inner"}));
  auto optimizer = plain_sgd(0.1)(model.parameters());
  auto full_optimizer = plain_sgd(0.1)(reference->parameters());

  // When the gradient of the inner unit arrives, it is that of both uses.
  std::uint64_t reductions_before = 0;
  int arrivals = 0;
  module->inner->weight.register_hook([&](const at::Tensor&) {
    ++arrivals;
    const auto started = model.stats().reduce_scatters - reductions_before;
    REQUIRE_SAY(started == 1, started << " units were reduced before the inner one's last use");
  });

  const at::Tensor losses = data[which + ".loss.ddp"];
  // Where PyTorch's two systems agree bitwise, so do their losses.
  const bool bitwise = data.is_true("/bitwise/" + which);
  for (int step = 0; step < 3; ++step) {
    const std::string when = which + ", step " + std::to_string(step);
    at::Tensor wanted;
    average_gradients(reference->parameters(), ranks, [&](int rank) {
      const at::Tensor loss = reference->forward(inputs[rank]).sum();
      loss.backward();
      if (rank == comm.rank()) wanted = loss.detach();
    });
    inputs[comm.rank()].mutable_grad().reset();
    reductions_before = model.stats().reduce_scatters;
    at::Tensor loss;
    backward([&](const at::Tensor& x) {
      const at::Tensor y = model.forward(x);
      loss = y.detach().sum();
      return y;
    }, inputs[comm.rank()]);
    break_average(model);
    check_same(loss, wanted, when + ": loss");
    check_same(loss, losses[step][comm.rank()], when + ": loss, PyTorch", bitwise ? 0 : 1e-6);
    // Outer and inner, once each.
    const auto reductions = model.stats().reduce_scatters - reductions_before;
    REQUIRE_SAY(reductions == 2 && arrivals == step + 1,
                when << ": " << reductions << " reductions, " << arrivals << " arrivals");
    check_shards(model, reference->parameters(), true, when);
    REQUIRE(inputs[comm.rank()].grad().defined());
    optimizer->step();
    full_optimizer->step();
    check_shards(model, reference->parameters(), false, when);
    model.zero_grad();
    full_optimizer->zero_grad();
  }
  for (const std::string system : {"ddp", "fsdp"}) {
    check_file(model, data, which + "." + system, bitwise ? 0 : 1e-6);
  }
}

void run(const fsdp::Communicator& comm) {
  const Data data("multiple_forward", comm.world_size());
  for (const auto strategy : {fsdp::Strategy::full_shard, fsdp::Strategy::shard_grad_op}) {
    for (const std::string which : {"same", "each"}) train(comm, data, which, strategy);
  }
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv, {{"a unit used twice in one forward", run}});
}

const harness::Program program("scenario_multiple_forward", run_program);

}  // namespace
}  // namespace scenario_multiple_forward
