// Checkpoints of a module with buffers of several types: saved at once and in the background,
// loaded at other world sizes, consolidated and loaded again; what fails changes nothing.
#include <cstdlib>
#include <filesystem>

#include "reference.hpp"

namespace feature_checkpoint {
namespace {

using namespace harness;
namespace nn = torch::nn;

struct NetImpl : nn::Module {
  explicit NetImpl(int seed)
      : conv((torch::manual_seed(seed), register_module("conv", nn::Conv2d(3, 5, 3)))),
        norm(register_module("norm", nn::BatchNorm2d(5))),
        head(register_module("head", nn::Linear(5 * 16, 4))) {
    mask = register_buffer("mask", (torch::arange(6) % 2 == seed % 2).reshape({2, 3}));
    turned = register_buffer("turned", (torch::arange(6, at::kDouble) * seed).reshape({2, 3}).t());
    half = register_buffer("half", torch::full({3}, seed, at::kHalf));
  }
  at::Tensor forward(const at::Tensor& x) {
    const at::Tensor h = torch::relu(norm(conv(x)));
    return head(h.flatten(1)) * mask.sum() + turned.sum().to(at::kFloat);
  }
  nn::Conv2d conv;
  nn::BatchNorm2d norm;
  nn::Linear head;
  at::Tensor mask, turned, half;
};
TORCH_MODULE(Net);

auto shard(const fsdp::Communicator& comm, int seed,
           const fsdp::WrapPolicy& wrap = fsdp::wrap_always()) {
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = wrap;
  return fsdp::fully_shard(Net(seed), options);
}

using Model = decltype(shard(std::declval<const fsdp::Communicator&>(), 0));

/// Every rank has data of its own, so that running statistics differ.
template <class Optimizer>
double train_step(Model& model, Optimizer& optimizer, int step, int rank) {
  torch::manual_seed(100 * step + rank);
  const at::Tensor loss = model.forward(torch::randn({2, 3, 6, 6})).pow(2).mean();
  loss.backward();
  optimizer.step();
  model.zero_grad();
  return loss.item<double>();
}

at::Tensor evaluate(Model& model) {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(7);
  model->eval();
  at::Tensor y = model.forward(torch::randn({2, 3, 6, 6})).clone();
  model->train();
  return y;
}

std::vector<at::Tensor> copies(Model& model) {
  const torch::NoGradGuard no_grad;
  std::vector<at::Tensor> result;
  for (const auto& param : model.parameters()) result.push_back(param.clone());
  for (const auto& buffer : model->buffers()) result.push_back(buffer.clone());
  return result;
}

void require_same(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  REQUIRE(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) REQUIRE_SAY(same_bits(a[i], b[i]), "tensor " << i);
}

std::string path(const std::string& name) { return scratch() + "/" + name; }

void buffers_are_rank_zeros(const fsdp::Communicator& comm) {
  auto model = shard(comm, 3);
  torch::optim::SGD optimizer(model.parameters(), 0.01);
  for (int step = 0; step < 3; ++step) train_step(model, optimizer, step, comm.rank());
  model.save_checkpoint(path("buffers"), "a note");
  REQUIRE(fsdp::checkpoint_metadata(path("buffers")) == "a note");
  const at::Tensor mine = model->norm->running_mean;
  at::Tensor wanted = mine.clone();
  comm.broadcast(wanted, 0);
  if (comm.rank() > 0) REQUIRE(!torch::equal(mine, wanted));

  auto loaded = shard(comm, 4, fsdp::WrapPolicy());
  const at::Tensor turned = loaded->turned;
  loaded.load_checkpoint(path("buffers"));
  REQUIRE(same_bits(loaded->norm->running_mean, wanted));
  REQUIRE(loaded->norm->num_batches_tracked.item<std::int64_t>() == 3);
  REQUIRE(torch::equal(loaded->mask, (torch::arange(6) % 2 == 1).reshape({2, 3})));
  // In place, in whatever layout the buffer has.
  REQUIRE(turned.data_ptr() == loaded->turned.data_ptr() && !turned.is_contiguous());
  REQUIRE(torch::equal(turned, (torch::arange(6, at::kDouble) * 3).reshape({2, 3}).t()));
  REQUIRE(torch::equal(loaded->half, torch::full({3}, 3, at::kHalf)));
  loaded.load_checkpoint(path("buffers"));
  const at::Tensor y = evaluate(loaded);
  at::Tensor first = y.clone();
  comm.broadcast(first, 0);
  REQUIRE(same_bits(y, first));
}

/// Saving in the background takes the values of its call; going on from them gives the same bits.
template <class MakeOptimizer>
void goes_on(const fsdp::Communicator& comm, const std::string& dir, const MakeOptimizer& make) {
  auto model = shard(comm, 5);
  auto optimizer = make(model);
  for (int step = 0; step < 3; ++step) train_step(model, optimizer, step, comm.rank());
  const std::vector<at::Tensor> saved = copies(model);
  auto job = model.save_checkpoint_async(dir, optimizer, "three");
  std::vector<double> losses;
  for (int step = 3; step < 6; ++step) {
    losses.push_back(train_step(model, optimizer, step, comm.rank()));
  }
  job.wait();
  REQUIRE(job.done());
  job.wait();

  auto resumed = shard(comm, 6);
  auto resumed_optimizer = make(resumed);
  resumed.load_checkpoint(dir, resumed_optimizer);
  REQUIRE(fsdp::checkpoint_metadata(dir) == "three");
  for (std::size_t i = 0; i < model.parameters().size(); ++i) {
    REQUIRE(same_bits(resumed.parameters()[i].detach().clone(), saved[i]));
  }
  for (int step = 3; step < 6; ++step) {
    const double loss = train_step(resumed, resumed_optimizer, step, comm.rank());
    REQUIRE(loss == losses[static_cast<std::size_t>(step - 3)]);
  }
  model.save_checkpoint(dir + "-end", optimizer);
}

void in_the_background(const fsdp::Communicator& comm) {
  goes_on(comm, path("async"), [](Model& model) {
    return torch::optim::AdamW(model.parameters(), torch::optim::AdamWOptions(1e-2));
  });
  goes_on(comm, path("fused"), [](Model& model) {
    fsdp::AdamWConfig config;
    config.lr = 1e-2;
    return model.adamw(config);
  });
  // The job keeps what it needs.
  auto last = [&] {
    auto gone = shard(comm, 8);
    return gone.save_checkpoint_async(path("gone"));
  }();
  last.wait();
  auto model = shard(comm, 9);
  REQUIRE_THROWS(model.save_checkpoint_async(path("gone")), "exists already", "gone");
}

void consolidated(const fsdp::Communicator& comm) {
  auto model = shard(comm, 9);
  model.save_checkpoint(path("whole"));
  if (comm.rank() == 0) {
    fsdp::ConsolidateOptions options;
    options.max_file_bytes = 700;
    fsdp::consolidate_checkpoint(path("whole"), path("hf"), options);
    options = {};
    options.dtype = {FSDP_DTYPE_BFLOAT, 16, 1};
    fsdp::consolidate_checkpoint(path("whole"), path("hf16"), options);
  }
  comm.barrier();
  auto loaded = shard(comm, 10, fsdp::WrapPolicy());
  loaded.load_checkpoint(path("hf"));
  REQUIRE(same_bits(evaluate(model), evaluate(loaded)));
  loaded.load_checkpoint(path("hf16"));
  REQUIRE(same_bits(loaded->turned.contiguous(), model->turned.contiguous()));
  auto again = shard(comm, 10, fsdp::WrapPolicy());
  again.load_checkpoint(path("hf"));
  const torch::NoGradGuard no_grad;
  for (std::size_t i = 0; i < loaded.parameters().size(); ++i) {
    const at::Tensor rounded = again.parameters()[i].detach().to(at::kBFloat16).to(at::kFloat);
    REQUIRE(same_bits(loaded.parameters()[i].detach().clone(), rounded));
  }
  torch::optim::AdamW optimizer(loaded.parameters(), 1e-2);
  REQUIRE_THROWS(loaded.load_checkpoint(path("hf"), optimizer), "hf");
}

struct OtherMaskImpl : NetImpl {
  explicit OtherMaskImpl(int seed) : NetImpl(seed) { register_buffer("more", torch::zeros({2})); }
};
TORCH_MODULE(OtherMask);

struct ComplexImpl : nn::Module {
  ComplexImpl() : a(register_module("a", nn::Linear(2, 2))) {
    register_buffer("phase", torch::zeros({2}, at::kComplexFloat));
  }
  at::Tensor forward(const at::Tensor& x) { return a(x); }
  nn::Linear a;
};
TORCH_MODULE(Complex);

void failures_change_nothing(const fsdp::Communicator& comm) {
  shard(comm, 3).save_checkpoint(path("good"));
  fsdp::ShardOptions options;
  options.comm = comm;
  auto more = fsdp::fully_shard(OtherMask(4), options);
  const torch::NoGradGuard no_grad;
  const at::Tensor mean = more->norm->running_mean.clone(), weight = more.parameters()[0].clone();
  REQUIRE_THROWS(more.load_checkpoint(path("good")), "has no tensor \"more\"");
  REQUIRE(same_bits(more->norm->running_mean, mean));
  REQUIRE(same_bits(more.parameters()[0].clone(), weight));
  if (comm.rank() == 0) {
    const std::string world = std::to_string(comm.world_size());
    std::filesystem::resize_file(path("good/shard-00001-of-0000" + world + ".safetensors"), 900);
  }
  comm.barrier();
  auto model = shard(comm, 4);
  const auto before = copies(model);
  REQUIRE_THROWS(model.load_checkpoint(path("good")), "shard-00001", "900 bytes",
                 "\"conv.weight\"");
  require_same(before, copies(model));
  auto odd = fsdp::fully_shard(Complex(), options);
  REQUIRE_THROWS(odd.save_checkpoint(path("odd")), "'phase'", "ComplexFloat");
}

void save_for_other_sizes(const fsdp::Communicator& comm) {
  auto model = shard(comm, 11);
  model.save_checkpoint_async(path("resize")).wait();
}

void load_at_another_size(const fsdp::Communicator& comm) {
  auto model = shard(comm, 12);
  model.load_checkpoint(path("resize"));
  Net plain(11);
  const auto params = plain->parameters();
  check_shards(model, params, false, "loaded at another size");
  for (const auto& item : plain->named_buffers()) {
    REQUIRE_SAY(torch::equal(model->named_buffers()[item.key()], item.value()), item.key());
  }
}

int run_program(int argc, char** argv) {
  return main_with_scratch(argc, argv,
                           {{"buffers are rank 0's", buffers_are_rank_zeros},
                            {"in the background", in_the_background},
                            {"consolidated", consolidated},
                            {"failures change nothing", failures_change_nothing},
                            {"save for other sizes", save_for_other_sizes}},
                           load_at_another_size);
}

const harness::Program program("feature_checkpoint", run_program);

}  // namespace
}  // namespace feature_checkpoint
