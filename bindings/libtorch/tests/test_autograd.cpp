// Backward passes out of the ordinary: recomputation, accumulation, hooks, several outputs,
// structures, graphs kept or stale, and what is refused.
#include "reference.hpp"

namespace test_autograd {
namespace {

using namespace harness;
namespace nn = torch::nn;

struct BlockImpl : nn::Module {
  explicit BlockImpl(int64_t width = 6)
      : up(register_module("up", nn::Linear(width, 11))),
        down(register_module("down", nn::Linear(11, width))) {}
  at::Tensor forward(const at::Tensor& x) { return x + down(torch::tanh(up(x))); }
  nn::Linear up, down;
};
TORCH_MODULE(Block);

at::Tensor batch_of(int step, int rank, at::IntArrayRef shape = {4, 6}) {
  torch::manual_seed(1000 * step + rank + 1);
  return torch::randn(shape);
}

/// Activation recomputation, reentrant: the backward of this function runs the block's forward
/// again and a backward pass of its own through it.
struct Recompute : torch::autograd::Function<Recompute> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            BlockImpl* block) {
    context->save_for_backward({x});
    context->saved_data["block"] = reinterpret_cast<std::int64_t>(block);
    return block->forward(x);  // gradients are disabled here
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    auto* block = reinterpret_cast<BlockImpl*>(context->saved_data["block"].toInt());
    const torch::AutoGradMode with_grad(true);
    const at::Tensor x = context->get_saved_variables()[0].detach().requires_grad_();
    const at::Tensor y = block->forward(x);
    torch::autograd::backward({y}, {gradients[0]});
    return {x.grad(), at::Tensor()};
  }
};

/// Blocks, of which the first is used twice; any of them may be recomputed.
struct DeepImpl : nn::Module {
  explicit DeepImpl(bool recompute)
      : recompute(recompute),
        in(register_module("in", nn::Linear(6, 6))),
        a(register_module("a", Block())),
        b(register_module("b", Block())),
        out(register_module("out", nn::Linear(6, 2))) {}
  at::Tensor block(Block& block, const at::Tensor& x) {
    return recompute ? Recompute::apply(x, block.get()) : block(x);
  }
  at::Tensor forward(const at::Tensor& x) { return out(block(a, block(b, block(a, in(x))))); }
  bool recompute;
  nn::Linear in;
  Block a, b;
  nn::Linear out;
};
TORCH_MODULE(Deep);

template <class Make>
auto shard(const fsdp::Communicator& comm, Make make, const fsdp::WrapPolicy& wrap) {
  torch::manual_seed(3);
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = wrap;
  return fsdp::fully_shard(make(), options);
}

template <class Make>
auto plain(Make make) {
  torch::manual_seed(3);
  return make();
}

fsdp::WrapPolicy by_block() { return fsdp::wrap_class("BlockImpl"); }

void recomputation(const fsdp::Communicator& comm) {
  for (const auto& wrap : {by_block(), fsdp::WrapPolicy(), fsdp::wrap_always()}) {
    auto reference = plain([] { return Deep(true); });
    auto unchecked = plain([] { return Deep(false); });
    auto model = shard(comm, [] { return Deep(true); }, wrap);
    auto optimizer = adamw()(model.parameters());
    auto full_optimizer = adamw()(reference->parameters());
    for (int step = 0; step < 3; ++step) {
      average_gradients(reference->parameters(), comm.world_size(), [&](int rank) {
        reference->forward(batch_of(step, rank)).pow(2).sum().backward();
      });
      if (step == 0) {
        average_gradients(unchecked->parameters(), comm.world_size(), [&](int rank) {
          unchecked->forward(batch_of(step, rank)).pow(2).sum().backward();
        });
        for (std::size_t i = 0; i < unchecked->parameters().size(); ++i) {
          REQUIRE(torch::allclose(unchecked->parameters()[i].grad(),
                                  reference->parameters()[i].grad(), 1e-4, 1e-5));
        }
      }
      model.forward(batch_of(step, comm.rank())).pow(2).sum().backward();
      // A block that is used and recomputed twice is reduced twice: sums of averages instead of
      // averages of sums, the same to rounding.
      check_shards(model, reference->parameters(), true, "recomputation", 1e-5);
      optimizer->step();
      full_optimizer->step();
      model.zero_grad();
      full_optimizer->zero_grad();
    }
  }
}

void accumulation(const fsdp::Communicator& comm) {
  auto reference = plain([] { return Deep(false); });
  auto model = shard(comm, [] { return Deep(false); }, by_block());
  const auto both = [&](int step) {
    average_gradients(reference->parameters(), comm.world_size(), [&](int rank) {
      reference->forward(batch_of(step, rank)).pow(2).sum().backward();
    });
    model.forward(batch_of(step, comm.rank())).pow(2).sum().backward();
    check_shards(model, reference->parameters(), true, "accumulation " + std::to_string(step));
  };
  both(0);
  both(1);  // adds to what is there
  for (auto& param : reference->parameters()) param.grad().zero_();
  for (auto& param : model.parameters()) param.grad().zero_();  // kept, as zero_grad(false) does
  both(2);
  reference->zero_grad();
  model.zero_grad();
  both(3);  // replaces
  // A gradient tensor of the user's own is added to.
  for (auto& param : reference->parameters()) param.mutable_grad() = torch::ones_like(param);
  for (auto& param : model.parameters()) param.mutable_grad() = torch::ones_like(param);
  both(4);
}

void parameter_hooks(const fsdp::Communicator& comm) {
  auto reference = plain([] { return Deep(false); });
  auto model = shard(comm, [] { return Deep(false); }, by_block());
  int calls = 0;
  const auto doubled = [&calls](const at::Tensor& grad) {
    ++calls;
    return grad * 2;
  };
  reference->a->up->weight.register_hook(doubled);
  model->a->up->weight.register_hook(doubled);
  average_gradients(reference->parameters(), comm.world_size(), [&](int rank) {
    reference->forward(batch_of(0, rank)).pow(2).sum().backward();
  });
  model.forward(batch_of(0, comm.rank())).pow(2).sum().backward();
  REQUIRE(calls == comm.world_size() + 1);
  check_shards(model, reference->parameters(), true, "hooks");
}

/// What forward may return.
struct ManyImpl : nn::Module {
  ManyImpl() : a(register_module("a", Block())), b(register_module("b", Block())) {}
  std::tuple<at::Tensor, std::vector<at::Tensor>, std::optional<at::Tensor>> forward(
      const at::Tensor& x) {
    const at::Tensor first = a(x);
    return {first, {b(first), at::Tensor()}, std::nullopt};
  }
  Block a, b;
};
TORCH_MODULE(Many);

void several_outputs(const fsdp::Communicator& comm) {
  auto reference = plain([] { return Many(); });
  auto model = shard(comm, [] { return Many(); }, fsdp::wrap_always());
  const auto params = reference->parameters();
  // Through the second output, then only through the first: b has no gradient there.
  for (const bool deep : {true, false}) {
    const auto loss = [&](auto&& output) {
      return (deep ? std::get<1>(output)[0] : std::get<0>(output)).pow(2).sum();
    };
    average_gradients(params, comm.world_size(),
                      [&](int rank) { loss(reference->forward(batch_of(0, rank))).backward(); });
    loss(model.forward(batch_of(0, comm.rank()))).backward();
    check_shards(model, params, true, "several outputs");
    reference->zero_grad();
    model.zero_grad();
  }
}

struct Named {
  at::Tensor logits;
};

struct StructImpl : nn::Module {
  StructImpl() : a(register_module("a", Block())), b(register_module("b", Block())) {}
  Named forward(const at::Tensor& x) { return {b(a(x))}; }
  Block a, b;
};
TORCH_MODULE(Struct);

void output_in_a_struct(const fsdp::Communicator& comm) {
  auto reference = plain([] { return Struct(); });
  auto model = shard(comm, [] { return Struct(); }, fsdp::wrap_always());
  auto optimizer = sgd()(model.parameters());
  auto full_optimizer = sgd()(reference->parameters());
  for (int step = 0; step < 3; ++step) {
    average_gradients(reference->parameters(), comm.world_size(), [&](int rank) {
      reference->forward(batch_of(step, rank)).logits.pow(2).sum().backward();
    });
    model(batch_of(step, comm.rank())).logits.pow(2).sum().backward();
    check_shards(model, reference->parameters(), true, "struct");
    optimizer->step();
    full_optimizer->step();
    check_shards(model, reference->parameters(), false, "struct");
    model.zero_grad();
    full_optimizer->zero_grad();
  }
}

void kept_and_stale_graphs(const fsdp::Communicator& comm) {
  auto reference = plain([] { return Deep(false); });
  auto model = shard(comm, [] { return Deep(false); }, by_block());
  const auto params = reference->parameters();
  // One graph, two backward passes.
  std::vector<at::Tensor> losses;
  for (int rank = 0; rank < comm.world_size(); ++rank) {
    losses.push_back(reference->forward(batch_of(0, rank)).pow(2).sum());
  }
  const at::Tensor loss = model.forward(batch_of(0, comm.rank())).pow(2).sum();
  for (int pass = 0; pass < 2; ++pass) {
    average_gradients(params, comm.world_size(),
                      [&](int rank) { losses[rank].backward({}, /*retain_graph=*/true); });
    loss.backward({}, /*retain_graph=*/true);
    check_shards(model, params, true, "kept graph");
  }
  // Two forwards, then their backward passes, the first one's with a forward without gradients
  // in between.
  reference->zero_grad();
  model.zero_grad();
  const at::Tensor second = model.forward(batch_of(1, comm.rank())).pow(2).sum();
  {
    const torch::NoGradGuard no_grad;
    model.forward(batch_of(2, comm.rank()));
  }
  average_gradients(params, comm.world_size(), [&](int rank) {
    reference->forward(batch_of(1, rank)).pow(2).sum().backward();
  });
  second.backward();
  check_shards(model, params, true, "forward in between");
  // Parameters written since the forward: autograd must notice, as without sharding.
  {
    const torch::NoGradGuard no_grad;
    for (auto& param : model.parameters()) param.mul_(0.5);
  }
  REQUIRE_THROWS(loss.backward(), "modified by an inplace operation");
}

void gradients_of_inputs(const fsdp::Communicator& comm) {
  auto reference = plain([] { return Deep(false); });
  auto model = shard(comm, [] { return Deep(false); }, by_block());
  const at::Tensor x = batch_of(0, comm.rank()).requires_grad_();
  const at::Tensor y = batch_of(0, comm.rank()).requires_grad_();
  const at::Tensor wanted = torch::autograd::grad({reference->forward(x).pow(2).sum()}, {x})[0];
  const at::Tensor got = torch::autograd::grad({model.forward(y).pow(2).sum()}, {y})[0];
  REQUIRE(same_bits(wanted, got));
  for (const auto& param : model.parameters()) REQUIRE(!param.grad().defined());
  // And a whole backward still works.
  average_gradients(reference->parameters(), comm.world_size(), [&](int rank) {
    reference->forward(batch_of(1, rank)).pow(2).sum().backward();
  });
  model.forward(batch_of(1, comm.rank())).pow(2).sum().backward();
  check_shards(model, reference->parameters(), true, "after grad()");
}

void only_a_linear_layer(const fsdp::Communicator& comm) {
  // Its backward reads no parameter at all.
  const auto make = [] { return nn::Linear(6, 3); };
  auto reference = plain(make);
  auto model = shard(comm, make, fsdp::WrapPolicy());
  const at::Tensor first = model.forward(batch_of(0, comm.rank())).pow(2).sum();
  const at::Tensor second = model.forward(batch_of(1, comm.rank())).pow(2).sum();
  for (int step = 0; step < 2; ++step) {
    average_gradients(reference->parameters(), comm.world_size(), [&](int rank) {
      reference->forward(batch_of(step, rank)).pow(2).sum().backward();
    });
  }
  first.backward();
  second.backward();
  check_shards(model, reference->parameters(), true, "linear");
}

void refused(const fsdp::Communicator& comm) {
  {
    auto model = shard(comm, [] { return Deep(false); }, by_block());
    const at::Tensor loss = model.forward(batch_of(0, comm.rank())).pow(2).sum();
    REQUIRE_THROWS(loss.backward({}, std::nullopt, /*create_graph=*/true), "create_graph", "out.");
    // All ranks failed alike: the next iteration works.
    auto reference = plain([] { return Deep(false); });
    average_gradients(reference->parameters(), comm.world_size(), [&](int rank) {
      reference->forward(batch_of(1, rank)).pow(2).sum().backward();
    });
    model.forward(batch_of(1, comm.rank())).pow(2).sum().backward();
    check_shards(model, reference->parameters(), true, "after create_graph");
  }
  struct SparseImpl : nn::Module {
    SparseImpl()
        : embed(register_module("embed", nn::Embedding(nn::EmbeddingOptions(5, 3).sparse(true)))) {}
    at::Tensor forward(const at::Tensor& x) { return embed(x); }
    nn::Embedding embed;
  };
  auto model = shard(comm, [] { return std::make_shared<SparseImpl>(); }, fsdp::WrapPolicy());
  const at::Tensor loss = model.forward(torch::arange(4)).pow(2).sum();
  REQUIRE_THROWS(loss.backward(), "embed.weight", "sparse");
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv,
                 {{"activation recomputation", recomputation},
                  {"gradient accumulation", accumulation},
                  {"hooks on parameters", parameter_hooks},
                  {"several outputs", several_outputs},
                  {"output in a struct", output_in_a_struct},
                  {"kept and stale graphs", kept_and_stale_graphs},
                  {"gradients of inputs", gradients_of_inputs},
                  {"backward that reads no parameter", only_a_linear_layer},
                  {"refused", refused}});
}

const harness::Program program("test_autograd", run_program);

}  // namespace
}  // namespace test_autograd
