// A LibTorch model that is sharded over MPI's ranks trains as the same model over shared memory:
// the same values with two ranks, else equal up to rounding. Checkpoints, saved in the background,
// and whole parameters go over MPI, too. torch_mpi_main.cpp makes the communicators.
#include <filesystem>

#include "harness.hpp"

namespace {

using namespace harness;
namespace nn = torch::nn;

struct BlockImpl : nn::Module {
  explicit BlockImpl(int width)
      : norm(nn::LayerNormOptions({width})), up(width, 3 * width), down(3 * width, width) {
    register_module("norm", norm);
    register_module("up", up);
    register_module("down", down);
  }
  at::Tensor forward(const at::Tensor& x) { return x + down(torch::gelu(up(norm(x)))); }
  nn::LayerNorm norm;
  nn::Linear up, down;
};
TORCH_MODULE(Block);

struct NetImpl : nn::Module {
  NetImpl() : in(11, 24), out(24, 5) {
    register_module("in", in);
    for (int i = 0; i < 3; ++i)
      blocks.push_back(register_module("block" + std::to_string(i), Block(24)));
    register_module("out", out);
  }
  at::Tensor forward(at::Tensor x) {
    x = in(x);
    for (auto& block : blocks) x = block(x);
    return out(x);
  }
  nn::Linear in, out;
  std::vector<Block> blocks;
};
TORCH_MODULE(Net);

struct Kind {
  std::string name;
  fsdp::Strategy strategy;
  int shard_size;
  bool bfloat16;
};

auto sharded(const fsdp::Communicator& comm, const Kind& kind) {
  torch::manual_seed(3);
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = fsdp::wrap_class("BlockImpl");
  options.strategy = kind.strategy;
  options.shard_size = static_cast<std::uint32_t>(kind.shard_size);
  if (kind.bfloat16) {
    options.mixed_precision.param_dtype = torch::kBFloat16;
    options.mixed_precision.reduce_dtype = torch::kFloat;
    options.mixed_precision.output_dtype = torch::kFloat;
  }
  return fsdp::fully_shard(Net(), options);
}

template <class Model>
std::vector<double> train(Model& model, torch::optim::Optimizer& optimizer, int rank, int first,
                          int last) {
  std::vector<double> seen;
  for (int step = first; step < last; ++step) {
    torch::manual_seed(100 * step + rank);
    const auto x = torch::randn({6, 11});
    model.zero_grad();
    const auto loss = (model.forward(x) - x.slice(1, 0, 5)).square().mean();
    loss.backward();
    seen.push_back(loss.template item<double>());
    seen.push_back(model.clip_grad_norm_(1.0));
    optimizer.step();
  }
  return seen;
}

void compare(const fsdp::Communicator& mpi, const fsdp::Communicator& shm, const Kind& kind,
             const std::string& folder) {
  const int rank = mpi.rank(), ranks = mpi.world_size();
  const bool bits = ranks == 2;
  auto a = sharded(mpi, kind);
  auto b = sharded(shm, kind);
  torch::optim::AdamW optimizer_a(a.parameters(), 1e-3), optimizer_b(b.parameters(), 1e-3);
  const auto seen_a = train(a, optimizer_a, rank, 0, 4), seen_b = train(b, optimizer_b, rank, 0, 4);
  for (std::size_t i = 0; i < seen_a.size(); ++i) {
    const double allowed = bits ? 0 : (kind.bfloat16 ? 2e-2 : 1e-4) * (1 + std::abs(seen_b[i]));
    REQUIRE_SAY(std::abs(seen_a[i] - seen_b[i]) <= allowed,
                kind.name << ", " << i << ": " << seen_a[i] << " and " << seen_b[i]);
  }
  auto job = a.save_checkpoint_async(folder, optimizer_a);
  const auto full_a = a.full_state_dict(), full_b = b.full_state_dict();
  job.wait();
  REQUIRE(full_a.size() == full_b.size() && full_a.size() > 10);
  for (const auto& item : full_a) {
    const auto& other = full_b[item.key()];
    REQUIRE_SAY(bits ? item.value().equal(other)
                     : item.value().allclose(other, 1e-2, kind.bfloat16 ? 5e-3 : 2e-4),
                kind.name << ": " << item.key());
  }
  // From the checkpoint another model goes on as the first one does.
  auto c = sharded(mpi, kind);
  torch::optim::AdamW optimizer_c(c.parameters(), 1e-3);
  c.load_checkpoint(folder, optimizer_c);
  REQUIRE(train(a, optimizer_a, rank, 4, 6) == train(c, optimizer_c, rank, 4, 6));
}

}  // namespace

void run(const fsdp::Communicator& mpi, const fsdp::Communicator& shm, const std::string& folder) {
  at::set_num_threads(1);
  REQUIRE(mpi.rank() == shm.rank() && mpi.world_size() == shm.world_size());
  if (mpi.rank() == 0) std::filesystem::remove_all(folder);
  if (mpi.rank() == 0) std::filesystem::create_directories(folder);
  mpi.barrier();
  std::vector<Kind> kinds{{"full", fsdp::Strategy::full_shard, 0, false},
                          {"full, bfloat16", fsdp::Strategy::full_shard, 0, true},
                          {"no shard", fsdp::Strategy::no_shard, 0, false}};
  if (mpi.world_size() == 4) kinds.push_back({"hybrid", fsdp::Strategy::hybrid_shard, 2, false});
  for (const auto& kind : kinds) compare(mpi, shm, kind, folder + "/" + kind.name);
}
