// Training a sharded model gives, bit for bit, the parameters of a plain data-parallel loop over
// the same per-rank batches: many kinds of modules, SGD, Adam and AdamW.
#include "models.hpp"
#include "reference.hpp"

namespace feature_training {
namespace {

using namespace harness;
namespace nn = torch::nn;
namespace F = torch::nn::functional;

constexpr int kSteps = 4;

at::Tensor batch_of(int step, int rank, at::IntArrayRef shape) {
  torch::manual_seed(1000 * step + rank + 1);
  return torch::randn(shape);
}

/// Trains `make()` sharded and in the reference loop, comparing outputs, gradients and parameters
/// at every step. `loss(module_forward, step, rank)` computes one rank's loss.
template <class Make, class Loss>
void train_and_compare(const fsdp::Communicator& comm, Make make, Loss loss,
                       const MakeOptimizer& make_optimizer, const fsdp::WrapPolicy& wrap) {
  torch::manual_seed(7);
  auto reference = make();
  torch::manual_seed(7);
  auto module = make();

  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = wrap;
  auto model = fsdp::fully_shard(module, options);
  auto optimizer = make_optimizer(model.parameters());

  const std::vector<at::Tensor> full = [&] {
    std::vector<at::Tensor> unique;
    for (const at::Tensor& param : reference->parameters()) {
      bool seen = false;
      for (const at::Tensor& known : unique) seen = seen || known.is_same(param);
      if (!seen) unique.push_back(param);
    }
    return unique;
  }();
  auto full_optimizer = make_optimizer(full);
  check_shards(model, full, false, "after fully_shard");

  const int ranks = comm.world_size();
  for (int step = 0; step < kSteps; ++step) {
    const std::string when = "step " + std::to_string(step);
    at::Tensor wanted;
    // Buffers such as batch-norm statistics see only this rank's batch, as in a data-parallel job.
    std::vector<at::Tensor> buffers, buffers_after;
    for (const at::Tensor& buffer : reference->buffers()) buffers.push_back(buffer.clone());
    average_gradients(full, ranks, [&](int rank) {
      const torch::NoGradGuard outer;
      for (std::size_t i = 0; i < buffers.size(); ++i) reference->buffers()[i].copy_(buffers[i]);
      const torch::AutoGradMode with_grad(true);
      const at::Tensor value =
          loss([&](auto&&... args) { return reference->forward(args...); }, step, rank);
      value.backward();
      if (rank == comm.rank()) {
        wanted = value.detach();
        for (const at::Tensor& buffer : reference->buffers())
          buffers_after.push_back(buffer.clone());
      }
    });
    for (std::size_t i = 0; i < buffers.size(); ++i)
      reference->buffers()[i].copy_(buffers_after[i]);

    const at::Tensor value =
        loss([&](auto&&... args) { return model.forward(args...); }, step, comm.rank());
    REQUIRE_SAY(same_bits(value.detach(), wanted),
                when << ": loss " << value.item<float>() << ", reference " << wanted.item<float>());
    value.backward();
    check_shards(model, full, true, when);
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      REQUIRE_SAY(same_bits(model->buffers()[i], reference->buffers()[i]),
                  when << ": buffer " << i);
    }
    optimizer->step();
    full_optimizer->step();
    check_shards(model, full, false, when);
    model.zero_grad();
    full_optimizer->zero_grad();
  }

  // Evaluation after training: same output, and no backward is waited for.
  {
    const torch::NoGradGuard no_grad;
    reference->eval();
    model->eval();
    const at::Tensor wanted =
        loss([&](auto&&... args) { return reference->forward(args...); }, 99, comm.rank());
    const at::Tensor value =
        loss([&](auto&&... args) { return model.forward(args...); }, 99, comm.rank());
    REQUIRE(same_bits(value, wanted));
  }
}

using models::Block;
using models::BlockImpl;

struct MlpImpl : nn::Module {
  explicit MlpImpl(int64_t width = 13, int depth = 3)
      : blocks(register_module("blocks", nn::ModuleList())),
        head(register_module("head", nn::Linear(width, 5))) {
    for (int i = 0; i < depth; ++i) blocks->push_back(Block(width));
  }
  at::Tensor forward(at::Tensor x) {
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return head(x);
  }
  nn::ModuleList blocks;
  nn::Linear head;
};
TORCH_MODULE(Mlp);

template <class Forward>
at::Tensor mlp_loss(Forward forward, int step, int rank) {
  const at::Tensor x = batch_of(step, rank, {6, 13});
  return forward(x).pow(2).mean();
}

void mlp(const fsdp::Communicator& comm, const MakeOptimizer& optimizer) {
  for (const auto& wrap : {fsdp::WrapPolicy(), fsdp::wrap_class("BlockImpl"), fsdp::wrap_always(),
                           fsdp::wrap_size(400)}) {
    train_and_compare(
        comm, [] { return Mlp(); },
        [](auto forward, int step, int rank) { return mlp_loss(forward, step, rank); }, optimizer,
        wrap);
  }
}

/// Large enough for vectorized kernels with all kinds of tails.
void wide(const fsdp::Communicator& comm, const MakeOptimizer& optimizer) {
  train_and_compare(
      comm, [] { return Mlp(67, 2); },
      [](auto forward, int step, int rank) {
        return forward(batch_of(step, rank, {9, 67})).pow(2).mean();
      },
      optimizer, fsdp::wrap_class("BlockImpl"));
}

struct ConvNetImpl : nn::Module {
  ConvNetImpl()
      : conv1(register_module("conv1", nn::Conv2d(nn::Conv2dOptions(3, 7, 3).padding(1)))),
        norm(register_module("norm", nn::BatchNorm2d(7))),
        conv2(register_module("conv2", nn::Conv2d(nn::Conv2dOptions(7, 4, 3).bias(false)))),
        head(register_module("head", nn::Linear(4, 3))) {}
  at::Tensor forward(const at::Tensor& x) {
    return head(conv2(torch::relu(norm(conv1(x)))).mean({2, 3}));
  }
  nn::Conv2d conv1;
  nn::BatchNorm2d norm;
  nn::Conv2d conv2;
  nn::Linear head;
};
TORCH_MODULE(ConvNet);

void conv_and_batch_norm(const fsdp::Communicator& comm) {
  for (const auto& wrap : {fsdp::WrapPolicy(), fsdp::wrap_always()}) {
    train_and_compare(
        comm, [] { return ConvNet(); },
        [](auto forward, int step, int rank) {
          return forward(batch_of(step, rank, {4, 3, 8, 8})).pow(2).mean();
        },
        adamw(), wrap);
  }
}

/// An output layer that uses somebody else's weight.
struct TiedHeadImpl : nn::Module {
  explicit TiedHeadImpl(at::Tensor shared) : weight(register_parameter("weight", shared)) {}
  at::Tensor forward(const at::Tensor& x) { return F::linear(x, weight); }
  at::Tensor weight;
};
TORCH_MODULE(TiedHead);

/// A language model in small: the embedding's weight is also the output layer's, in another unit.
struct TiedImpl : nn::Module {
  TiedImpl()
      : embed(register_module("embed", nn::Embedding(11, 6))),
        block(register_module("block", Block(6))),
        head(register_module("head", TiedHead(embed->weight))) {}
  at::Tensor forward(const at::Tensor& tokens) { return head(block(embed(tokens))); }
  nn::Embedding embed;
  Block block;
  TiedHead head;
};
TORCH_MODULE(Tied);

void tied_weights(const fsdp::Communicator& comm) {
  for (const auto& wrap :
       {fsdp::WrapPolicy(), fsdp::wrap_class("BlockImpl"), fsdp::wrap_always()}) {
    train_and_compare(
        comm, [] { return Tied(); },
        [](auto forward, int step, int rank) {
          torch::manual_seed(1000 * step + rank + 1);
          const at::Tensor tokens = torch::randint(0, 11, {3, 8});
          const at::Tensor logits = forward(tokens.narrow(1, 0, 7));
          return F::cross_entropy(logits.reshape({-1, 11}), tokens.narrow(1, 1, 7).reshape({-1}));
        },
        adamw(), wrap);
  }
}

/// The same inner module used twice in one forward.
struct TwiceImpl : nn::Module {
  TwiceImpl()
      : inner(register_module("inner", Block(5))),
        outer(register_module("outer", nn::Linear(5, 5))) {}
  at::Tensor forward(const at::Tensor& x) { return inner(outer(inner(x)).tanh()); }
  Block inner;
  nn::Linear outer;
};
TORCH_MODULE(Twice);

void module_called_twice(const fsdp::Communicator& comm) {
  for (const auto& wrap :
       {fsdp::WrapPolicy(), fsdp::wrap_class("BlockImpl"), fsdp::wrap_always()}) {
    train_and_compare(
        comm, [] { return Twice(); },
        [](auto forward, int step, int rank) {
          return forward(batch_of(step, rank, {4, 5})).pow(2).mean();
        },
        sgd(), wrap);
  }
}

/// Two forwards of the whole model before one backward.
void model_called_twice(const fsdp::Communicator& comm) {
  train_and_compare(
      comm, [] { return Mlp(); },
      [](auto forward, int step, int rank) {
        return forward(batch_of(step, rank, {6, 13})).pow(2).mean() +
               forward(batch_of(step + 50, rank, {3, 13})).pow(2).mean();
      },
      adam(), fsdp::wrap_class("BlockImpl"));
}

/// A parameter that is never used, a branch used in some steps, and a parameter without elements.
struct PartialImpl : nn::Module {
  PartialImpl()
      : always(register_module("always", nn::Linear(5, 5))),
        sometimes(register_module("sometimes", nn::Linear(5, 5))),
        never(register_module("never", nn::Linear(5, 5))),
        empty(register_parameter("empty", torch::zeros({0, 3}))),
        scale(register_parameter("scale", torch::ones({}))) {}
  at::Tensor forward(const at::Tensor& x, bool branch) {
    at::Tensor y = always(x) * scale;
    return (branch ? sometimes(y) : y) + empty.sum();
  }
  nn::Linear always, sometimes, never;
  at::Tensor empty, scale;
};
TORCH_MODULE(Partial);

void unused_parameters(const fsdp::Communicator& comm) {
  for (const auto& wrap : {fsdp::WrapPolicy(), fsdp::wrap_always()}) {
    train_and_compare(
        comm, [] { return Partial(); },
        [](auto forward, int step, int rank) {
          return forward(batch_of(step, rank, {4, 5}), step % 2 == 1).pow(2).mean();
        },
        adamw(), wrap);
  }
}

/// A branch that only some ranks take: what they have not used counts as zero there.
void unused_on_some_ranks(const fsdp::Communicator& comm) {
  train_and_compare(
      comm, [] { return Partial(); },
      [](auto forward, int step, int rank) {
        return forward(batch_of(step, rank, {4, 5}), (step + rank) % 2 == 1).pow(2).mean();
      },
      sgd(), fsdp::WrapPolicy());
}

/// Parameters are frozen and trained in turns; a frozen one keeps its value and its momentum.
void requires_grad_flips(const fsdp::Communicator& comm) {
  for (const auto& wrap : {fsdp::WrapPolicy(), fsdp::wrap_class("BlockImpl")}) {
    torch::manual_seed(7);
    Mlp reference;
    torch::manual_seed(7);
    Mlp module;
    fsdp::ShardOptions options;
    options.comm = comm;
    options.wrap = wrap;
    auto model = fsdp::fully_shard(module, options);
    const std::vector<at::Tensor> full = reference->parameters();
    auto optimizer = sgd()(model.parameters());
    auto full_optimizer = sgd()(full);
    for (int step = 0; step < 2 * kSteps; ++step) {
      const std::string when = "step " + std::to_string(step);
      for (std::size_t i = 0; i < full.size(); ++i) {
        const bool trained = (i + static_cast<std::size_t>(step)) % 3 != 0;
        full[i].set_requires_grad(trained);
        module->parameters()[i].set_requires_grad(trained);
      }
      model.zero_grad();
      full_optimizer->zero_grad();
      average_gradients(full, comm.world_size(), [&](int rank) {
        reference->forward(batch_of(step, rank, {6, 13})).pow(2).mean().backward();
      });
      model.forward(batch_of(step, comm.rank(), {6, 13})).pow(2).mean().backward();
      check_shards(model, full, true, when);
      optimizer->step();
      full_optimizer->step();
      check_shards(model, full, false, when);
    }
  }
}

/// Frozen and trainable parameters in one unit, and a unit that is frozen as a whole.
struct FrozenImpl : nn::Module {
  FrozenImpl()
      : first(register_module("first", Block(5))),
        frozen(register_module("frozen", Block(5))),
        last(register_module("last", Block(5))) {
    for (auto& param : frozen->parameters()) param.set_requires_grad(false);
    first->up->weight.set_requires_grad(false);
  }
  at::Tensor forward(const at::Tensor& x) { return last(frozen(first(x))); }
  Block first, frozen, last;
};
TORCH_MODULE(Frozen);

void frozen_parameters(const fsdp::Communicator& comm) {
  for (const auto& wrap : {fsdp::WrapPolicy(), fsdp::wrap_class("BlockImpl")}) {
    train_and_compare(
        comm, [] { return Frozen(); },
        [](auto forward, int step, int rank) {
          return forward(batch_of(step, rank, {4, 5})).pow(2).mean();
        },
        sgd(), wrap);
  }
}

void recurrent(const fsdp::Communicator& comm) {
  struct TaggerImpl : nn::Module {
    TaggerImpl()
        : lstm(register_module("lstm", nn::LSTM(nn::LSTMOptions(4, 6).num_layers(2)))),
          attention(register_module("attention", nn::MultiheadAttention(6, 2))) {}
    at::Tensor forward(const at::Tensor& x) {
      const at::Tensor hidden = std::get<0>(lstm(x));
      return std::get<0>(attention(hidden, hidden, hidden));
    }
    nn::LSTM lstm;
    nn::MultiheadAttention attention;
  };
  train_and_compare(
      comm, [] { return std::make_shared<TaggerImpl>(); },
      [](auto forward, int step, int rank) {
        return forward(batch_of(step, rank, {5, 2, 4})).pow(2).mean();
      },
      adam(), fsdp::wrap_always());
}

/// One module registered under two names, and a parameter that is not laid out row by row.
struct SharedImpl : nn::Module {
  SharedImpl() : layers(register_module("layers", nn::Sequential())) {
    nn::Linear shared(5, 5);
    layers->push_back(shared);
    layers->push_back(nn::Tanh());
    layers->push_back(shared);
    scale = register_parameter("scale", torch::randn({5, 4}).t());
  }
  at::Tensor forward(const at::Tensor& x) { return layers->forward(x) * scale; }
  nn::Sequential layers;
  at::Tensor scale;
};
TORCH_MODULE(Shared);

void shared_modules(const fsdp::Communicator& comm) {
  for (const auto& wrap : {fsdp::WrapPolicy(), fsdp::wrap_class("LinearImpl")}) {
    train_and_compare(
        comm, [] { return Shared(); },
        [](auto forward, int step, int rank) {
          return forward(batch_of(step, rank, {4, 5})).pow(2).mean();
        },
        sgd(), wrap);
  }
}

void library_containers(const fsdp::Communicator& comm) {
  train_and_compare(
      comm, [] { return nn::Sequential(nn::Linear(4, 9), nn::PReLU(), nn::Linear(9, 2)); },
      [](auto forward, int step, int rank) {
        return forward(batch_of(step, rank, {3, 4})).pow(2).mean();
      },
      sgd(), fsdp::wrap_always());
}

/// Large tensors and gradient shards share a heap; a gradient that somebody keeps stays what it was.
void gradients_that_are_kept(const fsdp::Communicator& comm) {
  const std::int64_t size = 512 * comm.world_size();
  fsdp::ShardOptions options;
  options.comm = comm;
  auto model = fsdp::fully_shard(nn::Linear(512, size), options);
  const auto in_heap = [](const at::Tensor& tensor) {
    const void* data = tensor.const_data_ptr();
    return fsdp::heap_retain(data) && fsdp::heap_release(data);
  };
  REQUIRE(in_heap(at::ones({512, 512})));
  REQUIRE(!in_heap(at::ones({16})));
  const auto backward = [&](int step) {
    model.forward(batch_of(step, comm.rank(), {4, 512})).pow(2).sum().backward();
  };
  at::Tensor weight = model.parameters().front();
  backward(0);
  const at::Tensor kept = weight.grad();
  REQUIRE(kept.defined() && in_heap(kept));
  const at::Tensor wanted = kept.clone();
  model.zero_grad();
  // Takes what was freed, if the gradient's memory was.
  const at::Tensor other = at::full({kept.numel()}, 7.0f);
  backward(1);
  REQUIRE(same_bits(kept, wanted));
  REQUIRE(weight.grad().const_data_ptr() != kept.const_data_ptr());
  REQUIRE(!same_bits(weight.grad(), wanted));
  // Two backwards add where the first one's gradient is.
  const at::Tensor first = weight.grad().clone();
  const void* place = weight.grad().const_data_ptr();
  backward(1);
  REQUIRE(weight.grad().const_data_ptr() == place);
  REQUIRE(at::allclose(weight.grad(), 2 * first));
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv,
                 {{"MLP with SGD", [](auto comm) { mlp(comm, sgd()); }},
                  {"MLP with Adam", [](auto comm) { mlp(comm, adam()); }},
                  {"MLP with AdamW", [](auto comm) { mlp(comm, adamw()); }},
                  {"wide MLP with SGD", [](auto comm) { wide(comm, sgd()); }},
                  {"wide MLP with AdamW", [](auto comm) { wide(comm, adamw()); }},
                  {"convolution and batch norm", conv_and_batch_norm},
                  {"tied weights", tied_weights},
                  {"module called twice", module_called_twice},
                  {"model called twice", model_called_twice},
                  {"unused parameters", unused_parameters},
                  {"unused on some ranks", unused_on_some_ranks},
                  {"frozen parameters", frozen_parameters},
                  {"requires_grad flips", requires_grad_flips},
                  {"LSTM and attention", recurrent},
                  {"shared modules", shared_modules},
                  {"Sequential", library_containers},
                  {"gradients that are kept", gradients_that_are_kept}});
}

const harness::Program program("feature_training", run_program);

}  // namespace
}  // namespace feature_training
