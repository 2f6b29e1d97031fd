// What the programs of mixed precision share: models, an unsharded one in which the same rounding is
// done by hand, and options.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "reference.hpp"

namespace precision {

using namespace harness;
namespace nn = torch::nn;

using Types = std::map<std::string, at::ScalarType>;  // by parameter name; others are the default
using ToType = std::function<at::Tensor(const at::Tensor&)>;

inline const ToType kAsItIs = [](const at::Tensor& x) { return x; };

inline ToType to_type(at::ScalarType type) {
  return [type](const at::Tensor& x) { return x.to(type); };
}

inline at::Tensor batch_of(int step, int rank, at::IntArrayRef shape) {
  torch::manual_seed(1000 * step + rank + 1);
  return torch::randn(shape);
}

/// A block of a transformer. `in` is what the reference does to the inputs of operators on its
/// parameters; sharded, they are left as they come.
struct BlockImpl : nn::Module {
  explicit BlockImpl(std::int64_t width)
      : norm1(register_module("norm1", nn::LayerNorm(nn::LayerNormOptions({width})))),
        norm2(register_module("norm2", nn::LayerNorm(nn::LayerNormOptions({width})))),
        qkv(register_module("qkv", nn::Linear(width, 3 * width))),
        out(register_module("out", nn::Linear(width, width))),
        up(register_module("up", nn::Linear(width, 3 * width + 1))),
        down(register_module("down", nn::Linear(3 * width + 1, width))) {}
  at::Tensor forward(const at::Tensor& x) {
    const auto parts = qkv(in(norm1(in(x)))).chunk(3, -1);
    const at::Tensor scores = torch::matmul(parts[0], parts[1].transpose(-2, -1)) * 0.3;
    const at::Tensor h = x + out(in(torch::matmul(torch::softmax(scores, -1), parts[2])));
    return h + down(in(torch::gelu(up(in(norm2(in(h)))))));
  }
  ToType in = kAsItIs;
  nn::LayerNorm norm1, norm2;
  nn::Linear qkv, out, up, down;
};
TORCH_MODULE(Block);

struct HeadImpl : nn::Module {
  explicit HeadImpl(const at::Tensor& shared) : weight(register_parameter("weight", shared)) {}
  at::Tensor forward(const at::Tensor& x) { return torch::linear(x, weight); }
  at::Tensor weight;
};
TORCH_MODULE(Head);

/// Token embedding, blocks, a head whose weight is the embedding's.
struct TransformerImpl : nn::Module {
  explicit TransformerImpl(std::int64_t width = 8, std::int64_t depth = 2)
      : embed(register_module("embed", nn::Embedding(11, width))),
        blocks(register_module("blocks", nn::ModuleList())),
        head(register_module("head", Head(embed->weight))) {
    for (std::int64_t i = 0; i < depth; ++i) blocks->push_back(Block(width));
  }
  at::Tensor forward(const at::Tensor& tokens) {
    at::Tensor x = embed(tokens);
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return head(in(x));
  }
  BlockImpl& block(std::size_t i) { return *blocks[i]->as<BlockImpl>(); }
  ToType in = kAsItIs;
  nn::Embedding embed;
  nn::ModuleList blocks;
  Head head;
};
TORCH_MODULE(Transformer);

struct MlpImpl : nn::Module {
  explicit MlpImpl(std::int64_t width = 13)
      : first(register_module("first", nn::Linear(width, 3 * width + 1))),
        norm(register_module("norm", nn::LayerNorm(nn::LayerNormOptions({3 * width + 1})))),
        last(register_module("last", nn::Linear(3 * width + 1, 5))) {}
  at::Tensor forward(const at::Tensor& x) {
    return last(in(norm(in(torch::tanh(first(in(x)))))));
  }
  ToType in = kAsItIs;
  nn::Linear first;
  nn::LayerNorm norm;
  nn::Linear last;
};
TORCH_MODULE(Mlp);

/// The unsharded module with float32 masters of its parameters.
struct Masters {
  std::vector<std::string> names;
  std::vector<at::Tensor> params;   // the module's own
  std::vector<at::Tensor> masters;  // leaves in float32, with gradients
  std::vector<at::ScalarType> types;

  Masters(nn::Module& module, std::optional<at::ScalarType> type, const Types& own) {
    for (const auto& item : module.named_parameters()) {
      bool tied = false;
      for (const at::Tensor& known : params) tied = tied || known.is_same(item.value());
      if (tied) continue;
      names.push_back(item.key());
      params.push_back(item.value());
      masters.push_back(item.value().detach().to(at::kFloat).clone().requires_grad_());
      const auto found = own.find(item.key());
      types.push_back(found != own.end() ? found->second
                                         : type.value_or(item.value().scalar_type()));
    }
    round();
  }

  /// Gives the module's parameters the masters' values in their types.
  void round() {
    const torch::NoGradGuard no_grad;
    for (std::size_t i = 0; i < params.size(); ++i) {
      params[i].mutable_grad().reset();
      params[i].set_data(masters[i].detach().to(types[i]).clone());
    }
  }

  /// The mean over ranks of the gradients that `backward(rank)` leaves, rounded to `reduce` before
  /// they are summed (by parameter: one type for each).
  void average(int ranks, const std::vector<at::ScalarType>& reduce,
               const std::function<void(int)>& backward) {
    std::vector<at::Tensor> sums(params.size());
    for (int rank = 0; rank < ranks; ++rank) {
      round();
      backward(rank);
      for (std::size_t i = 0; i < params.size(); ++i) {
        const at::Tensor grad = params[i].grad();
        REQUIRE_SAY(grad.defined(), names[i]);
        REQUIRE(grad.scalar_type() == types[i]);
        const at::Tensor own = grad.to(at::kFloat).to(reduce[i]).to(at::kFloat);
        sums[i] = rank == 0 ? own : sums[i] + own;
      }
    }
    for (std::size_t i = 0; i < params.size(); ++i) masters[i].mutable_grad() = sums[i] / ranks;
  }
};

struct Case {
  std::optional<at::ScalarType> type;
  Types own;                                     // of parameters, in the reference
  std::function<at::ScalarType(const std::string&)> reduce;  // by parameter name
};

/// Trains `sharded` and the reference with AdamW, comparing outputs, gradients and masters.
template <class Module, class Input>
void train_and_compare(const fsdp::Communicator& comm, Module module, Module reference,
                       const fsdp::ShardOptions& options, const Case& c, Input input) {
  Masters full(*reference, c.type, c.own);
  auto model = fsdp::fully_shard(module, options);
  auto optimizer = adamw()(model.parameters());
  auto full_optimizer = adamw()(full.masters);
  check_shards(model, full.masters, false, "after fully_shard");
  std::vector<at::ScalarType> reduce;
  for (const std::string& name : full.names) reduce.push_back(c.reduce(name));
  const auto own = module->named_parameters();
  for (std::size_t i = 0; i < full.names.size(); ++i) {
    REQUIRE_SAY(own[full.names[i]].scalar_type() == full.types[i], full.names[i]);
    REQUIRE(model.parameters()[i].scalar_type() == at::kFloat);
  }
  for (int step = 0; step < 3; ++step) {
    const std::string when = "step " + std::to_string(step);
    at::Tensor wanted;
    full.average(comm.world_size(), reduce, [&](int rank) {
      const at::Tensor output = reference->forward(input(step, rank, true)).to(at::kFloat);
      (output * output).mean().backward();
      if (rank == comm.rank()) wanted = output.detach();
    });
    const at::Tensor output = model.forward(input(step, comm.rank(), false));
    REQUIRE(output.scalar_type() == at::kFloat);
    REQUIRE_SAY(same_bits(output.detach(), wanted),
                when << ": " << (output.detach() - wanted).abs().max().item<float>());
    (output * output).mean().backward();
    check_shards(model, full.masters, true, when);
    optimizer->step();
    full_optimizer->step();
    check_shards(model, full.masters, false, when);
    model.zero_grad();
    full_optimizer->zero_grad();
  }
  const auto stats = model.stats();
  REQUIRE(stats.all_gather_bytes_moved > 0 && stats.compute_buffer_bytes > 0);
}

template <class Module>
std::pair<Module, Module> twins() {
  torch::manual_seed(7);
  Module a;
  torch::manual_seed(7);
  Module b;
  return {a, b};
}

inline fsdp::ShardOptions options_of(const fsdp::Communicator& comm,
                                     const fsdp::WrapPolicy& wrap = {}) {
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = wrap;
  return options;
}

inline auto all_in(at::ScalarType type) {
  return [type](const std::string&) { return type; };
}

inline auto vectors(at::ScalarType type) {
  return [type](int step, int rank, bool by_hand) {
    const at::Tensor x = batch_of(step, rank, {3, 13});
    return by_hand ? x.to(type) : x;
  };
}

inline at::Tensor tokens_of(int step, int rank, bool) {
  torch::manual_seed(1000 * step + rank + 1);
  return torch::randint(11, {2, 5});
}

}  // namespace precision
