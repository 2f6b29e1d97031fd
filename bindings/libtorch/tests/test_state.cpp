// The handle's state: names, sizes, gradient norms, and checkpoints with optimizer state that
// resume training at the same and at another world size.
#include <cstdlib>
#include <filesystem>

#include "reference.hpp"

namespace test_state {
namespace {

using namespace harness;
namespace nn = torch::nn;

struct TiedHeadImpl : nn::Module {
  explicit TiedHeadImpl(at::Tensor shared) : weight(register_parameter("weight", shared)) {}
  at::Tensor weight;
};
TORCH_MODULE(TiedHead);

struct NetImpl : nn::Module {
  explicit NetImpl(int64_t width = 7)
      : embed(register_module("embed", nn::Embedding(width, 5))),
        a(register_module("a", nn::Linear(5, 9))),
        unused(register_module("unused", nn::Linear(2, 2))),
        b(register_module("b", nn::Linear(9, 5))),
        head(register_module("head", TiedHead(embed->weight))) {}
  at::Tensor forward(const at::Tensor& tokens) {
    return torch::linear(b(torch::relu(a(embed(tokens)))), head->weight);
  }
  nn::Embedding embed;
  nn::Linear a, unused, b;
  TiedHead head;
};
TORCH_MODULE(Net);

auto shard(const fsdp::Communicator& comm, const fsdp::WrapPolicy& wrap, int seed = 3,
           int64_t width = 7) {
  torch::manual_seed(seed);
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = wrap;
  return fsdp::fully_shard(Net(width), options);
}

std::vector<at::Tensor> unique_parameters(const Net& net) {
  auto params = net->parameters();
  params.pop_back();  // the tied one's second name
  return params;
}

/// The loss of one rank's part; `ranks` parts together are the same global batch at every world
/// size.
template <class Model>
at::Tensor loss_of(Model&& model, int step, int rank, int ranks) {
  torch::manual_seed(1000 + step);
  const at::Tensor tokens = torch::randint(0, 7, {12, 4}).chunk(ranks)[rank];
  return model->forward(tokens).pow(2).mean();
}

/// So that the reference's holder and the handle can be called alike.
template <class Model>
struct Arrow {
  Model& model;
  Arrow* operator->() { return this; }
  at::Tensor forward(const at::Tensor& x) { return model.forward(x); }
};

template <class Model>
void train(Model& model, torch::optim::Optimizer& optimizer, int first, int last,
           const fsdp::Communicator& comm) {
  for (int step = first; step < last; ++step) {
    loss_of(Arrow<Model>{model}, step, comm.rank(), comm.world_size()).backward();
    model.clip_grad_norm_(0.5);
    optimizer.step();
    model.zero_grad();
  }
}

void names_and_sizes(const fsdp::Communicator& comm) {
  for (const auto& wrap : {fsdp::WrapPolicy(), fsdp::wrap_always()}) {
    auto model = shard(comm, wrap);
    Net plain;
    const auto named = model.named_parameters();
    const std::vector<std::string> wanted = {"embed.weight", "a.weight", "a.bias", "unused.weight",
                                             "unused.bias",  "b.weight", "b.bias"};
    REQUIRE(named.keys() == wanted);
    REQUIRE(model.parameters().size() == wanted.size());
    std::int64_t mine = 0;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const at::Tensor& shard = named[wanted[i]];
      REQUIRE(shard.is_same(model.parameters()[i]));
      REQUIRE(shard.dim() == 1 && shard.is_leaf() && shard.requires_grad());
      mine += shard.numel();
    }
    std::int64_t all = mine;
    comm.all_reduce(&all, 1, fsdp::ReduceOp::sum);
    std::int64_t numel = 0;
    for (const auto& param : unique_parameters(plain)) numel += param.numel();
    REQUIRE(all == numel);

    // A rank's parameters and gradients are 1/W of the model's plus its part of the padding.
    const fsdp::Stats stats = model.stats();
    const std::uint64_t ranks = static_cast<std::uint64_t>(comm.world_size());
    REQUIRE(stats.param_shard_bytes * ranks ==
            static_cast<std::uint64_t>(numel) * 4 + stats.padding_bytes);
    REQUIRE(stats.unit_buffer_bytes >= stats.param_shard_bytes * ranks);
    REQUIRE(model.rank_state_bytes() == stats.param_shard_bytes + stats.grad_shard_bytes);
  }
}

void communicator_tensors(const fsdp::Communicator& comm) {
  at::Tensor values = torch::full({3, 2}, static_cast<double>(comm.rank() + 1), at::kDouble);
  comm.all_reduce(values, fsdp::ReduceOp::sum);
  const int ranks = comm.world_size();
  REQUIRE(values.eq(ranks * (ranks + 1) / 2.0).all().item<bool>());
  float mean = static_cast<float>(comm.rank());
  comm.all_reduce(&mean, 1, fsdp::ReduceOp::avg);
  REQUIRE(mean == (ranks - 1) / 2.0F);
  at::Tensor sent = torch::arange(4) * (comm.rank() + 1);
  comm.broadcast(sent, ranks - 1);
  REQUIRE(torch::equal(sent, torch::arange(4) * ranks));
  REQUIRE_THROWS(comm.all_reduce(torch::zeros({4, 4}).t(), fsdp::ReduceOp::sum), "contiguous");
  at::Tensor half = torch::full({4}, comm.rank() + 1, at::kHalf);
  comm.all_reduce(half, fsdp::ReduceOp::sum);
  REQUIRE(half.eq(ranks * (ranks + 1) / 2).all().item<bool>());
  REQUIRE_THROWS(comm.all_reduce(torch::zeros({4}, at::kBool), fsdp::ReduceOp::sum), "Bool");
}

void gradient_norm(const fsdp::Communicator& comm) {
  for (const double max_norm : {0.01, 1e6}) {
    auto model = shard(comm, fsdp::wrap_always());
    torch::manual_seed(3);
    Net reference;
    const auto params = unique_parameters(reference);
    average_gradients(params, comm.world_size(),
                      [&](int rank) { loss_of(reference, 0, rank, comm.world_size()).backward(); });
    loss_of(Arrow<decltype(model)>{model}, 0, comm.rank(), comm.world_size()).backward();
    const double wanted = nn::utils::clip_grad_norm_(params, max_norm);
    const double norm = model.clip_grad_norm_(max_norm);
    REQUIRE_SAY(std::abs(norm - wanted) <= 1e-6 * wanted, norm << ", not " << wanted);
    check_shards(model, params, true, "clipped", 1e-6);
    double lowest = norm, highest = norm;
    comm.all_reduce(&lowest, 1, fsdp::ReduceOp::min);
    comm.all_reduce(&highest, 1, fsdp::ReduceOp::max);
    REQUIRE(lowest == highest);
  }
  auto model = shard(comm, fsdp::wrap_always());
  REQUIRE(model.clip_grad_norm_(1.0) == 0);
  loss_of(Arrow<decltype(model)>{model}, 0, comm.rank(), comm.world_size()).backward();
  if (comm.rank() == 0) model.parameters()[0].grad().fill_(std::nan(""));
  REQUIRE(std::isnan(model.clip_grad_norm_(1.0)));
  for (const auto& param : model.parameters()) {
    if (param.grad().defined() && param.numel() > 0)
      REQUIRE(param.grad().isnan().all().item<bool>());
  }
}

MakeOptimizer optimizer_named(const std::string& name) {
  if (name == "SGD") return sgd();
  return name == "Adam" ? adam() : adamw();
}

void resume_at_the_same_size(const fsdp::Communicator& comm) {
  for (const std::string name : {"SGD", "Adam", "AdamW"}) {
    const auto make = optimizer_named(name);
    const std::string dir = scratch() + "/same-" + name + std::to_string(comm.world_size());
    auto model = shard(comm, fsdp::wrap_always());
    auto optimizer = make(model.parameters());
    train(model, *optimizer, 0, 3, comm);
    model.save_checkpoint(dir, *optimizer, R"({"step": 3, "note": "a \"quoted\" , {text}"})");
    train(model, *optimizer, 3, 6, comm);

    auto resumed = shard(comm, fsdp::WrapPolicy(), /*seed=*/99);
    auto resumed_optimizer = make(resumed.parameters());
    // State it has already is replaced.
    train(resumed, *resumed_optimizer, 0, 1, comm);
    resumed.load_checkpoint(dir, *resumed_optimizer);
    train(resumed, *resumed_optimizer, 3, 6, comm);
    // Bitwise although the units differ, only through clipping's sum over other cuts of parameters.
    double worst = 0;
    for (std::uint32_t i = 0; i < model.parameters().size(); ++i) {
      const auto mine = model.engine().param_info(i);
      const auto other = resumed.engine().param_info(i);
      const auto begin = std::max(mine.shard_offset, other.shard_offset);
      const auto end =
          std::min(mine.shard_offset + mine.shard_numel, other.shard_offset + other.shard_numel);
      if (begin >= end) continue;
      const torch::NoGradGuard no_grad;
      const at::Tensor x = model.parameters()[i].narrow(0, begin - mine.shard_offset, end - begin);
      const at::Tensor y =
          resumed.parameters()[i].narrow(0, begin - other.shard_offset, end - begin);
      worst = std::max(worst, (x - y).abs().max().item<double>());
    }
    REQUIRE_SAY(worst < 1e-6, name << " differs by " << worst);

    // With the same units: the same bits.
    auto exact = shard(comm, fsdp::wrap_always(), /*seed=*/98);
    auto exact_optimizer = make(exact.parameters());
    exact.load_checkpoint(dir, *exact_optimizer);
    train(exact, *exact_optimizer, 3, 6, comm);
    for (std::size_t i = 0; i < model.parameters().size(); ++i) {
      const torch::NoGradGuard no_grad;
      REQUIRE(same_bits(model.parameters()[i].clone(), exact.parameters()[i].clone()));
    }
    const std::string metadata = fsdp::checkpoint_metadata(dir);
    REQUIRE_SAY(metadata.find("\"step\"") != std::string::npos, metadata);
  }
}

void wrong_checkpoints(const fsdp::Communicator& comm) {
  const std::string dir = scratch() + "/wrong" + std::to_string(comm.world_size());
  auto model = shard(comm, fsdp::wrap_always());
  auto optimizer = adamw()(model.parameters());
  train(model, *optimizer, 0, 1, comm);
  model.save_checkpoint(dir, *optimizer);
  model.save_checkpoint(dir + "-plain", R"({"by": "hand"})");
  REQUIRE(fsdp::checkpoint_metadata(dir + "-plain") == R"({"by": "hand"})");
  REQUIRE(fsdp::checkpoint_metadata(dir).empty());
  REQUIRE(fsdp::checkpoint_metadata(dir, "no such key").empty());

  auto other = shard(comm, fsdp::wrap_always(), 5);
  const auto before = [&] {
    const torch::NoGradGuard no_grad;
    std::vector<at::Tensor> copies;
    for (const auto& param : other.parameters()) copies.push_back(param.clone());
    return copies;
  }();
  auto adam_optimizer = adam()(other.parameters());
  auto right = adamw()(other.parameters());
  REQUIRE_THROWS(other.load_checkpoint(dir, *adam_optimizer), "AdamW", "Adam");
  REQUIRE_THROWS(other.load_checkpoint(dir + "-plain", *right), "without an optimizer");
  REQUIRE_THROWS(other.load_checkpoint(dir + "-none"), "-none");
  REQUIRE_THROWS(other.load_checkpoint(dir, *optimizer), "not one of this sharded model's");
  torch::optim::RMSprop rms(other.parameters());
  REQUIRE_THROWS(other.save_checkpoint(dir + "-bad", rms), "AdamW, Adam and SGD");
  const torch::NoGradGuard no_grad;
  for (std::size_t i = 0; i < before.size(); ++i) {
    REQUIRE(same_bits(before[i], other.parameters()[i].clone()));
  }
  REQUIRE(right->state().empty());
  auto wider = shard(comm, fsdp::wrap_always(), 5, /*width=*/8);
  REQUIRE_THROWS(wider.load_checkpoint(dir), "embed.weight");
  // Parameters alone may be read from a checkpoint that has more.
  other.load_checkpoint(dir);
  for (std::size_t i = 0; i < before.size(); ++i) {
    REQUIRE(same_bits(model.parameters()[i].clone(), other.parameters()[i].clone()));
  }
}

void save_for_other_sizes(const fsdp::Communicator& comm) {
  auto model = shard(comm, fsdp::wrap_always());
  auto optimizer = adamw()(model.parameters());
  train(model, *optimizer, 0, 3, comm);
  model.save_checkpoint(scratch() + "/resize", *optimizer);
}

/// Goes on from save_for_other_sizes at another world size; equal to a run that never stopped.
void resume_at_another_size(const fsdp::Communicator& comm) {
  auto model = shard(comm, fsdp::wrap_always(), /*seed=*/77);
  auto optimizer = adamw()(model.parameters());
  model.load_checkpoint(scratch() + "/resize", *optimizer);
  train(model, *optimizer, 3, 6, comm);

  torch::manual_seed(3);
  Net reference;
  const auto params = unique_parameters(reference);
  auto full_optimizer = adamw()(params);
  for (int step = 0; step < 6; ++step) {
    loss_of(reference, step, 0, 1).backward();
    nn::utils::clip_grad_norm_(params, 0.5);
    full_optimizer->step();
    full_optimizer->zero_grad();
  }
  check_shards(model, params, false, "resumed at another size", 2e-5);
}

int run_program(int argc, char** argv) {
  return main_with_scratch(argc, argv,
                           {{"names and sizes", names_and_sizes},
                            {"collectives on tensors", communicator_tensors},
                            {"gradient norm", gradient_norm},
                            {"resume at the same size", resume_at_the_same_size},
                            {"wrong checkpoints", wrong_checkpoints},
                            {"save for other sizes", save_for_other_sizes}},
                           resume_at_another_size);
}

const harness::Program program("test_state", run_program);

}  // namespace
}  // namespace test_state
