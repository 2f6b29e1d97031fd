// Gradients that are computed in the engine's gradient slot: that they are, and that neither a wrong
// guess nor a user who keeps what is there changes a bit.
#include "reference.hpp"

namespace test_placement {
namespace {

using namespace harness;
namespace nn = torch::nn;

constexpr std::int64_t kWidth = 256, kWords = 300;  // 65,536 elements and more are placed

/// Weights of every kind. As many rows as columns everywhere, so that all products look alike.
struct WideImpl : nn::Module {
  WideImpl()
      : words(register_module("words", nn::Embedding(kWords, kWidth))),
        padded(register_module(
            "padded", nn::Embedding(nn::EmbeddingOptions(kWords, kWidth).padding_idx(1)))),
        a(register_module("a", nn::Linear(kWidth, kWidth))),
        b(register_module("b", nn::Linear(nn::LinearOptions(kWidth, kWidth).bias(false)))),
        twice(register_module("twice", nn::Linear(kWidth, kWidth))),
        raw(register_parameter("raw", 0.05 * torch::randn({kWidth, kWidth}))),
        small(register_module("small", nn::Linear(kWidth, 5))) {}

  /// `ids` is (batch, tokens). What the embedding shares with the last layer is summed by autograd.
  at::Tensor forward(const at::Tensor& ids) {
    at::Tensor h = words(ids) + padded(ids);
    h = h + torch::tanh(a(h));
    h = h + torch::tanh(b(h.reshape({-1, kWidth}))).view_as(h);
    h = h + torch::tanh(twice(torch::tanh(twice(h))));
    h = h + torch::tanh(torch::matmul(h, raw));
    return nn::functional::linear(h, words->weight).square().mean() + small(h).square().mean();
  }

  nn::Embedding words, padded;
  nn::Linear a, b, twice;
  at::Tensor raw;
  nn::Linear small;
};
TORCH_MODULE(Wide);

at::Tensor ids_of(int step, int rank) {
  torch::manual_seed(100 * step + rank + 1);
  return torch::randint(0, kWords, {2, kWidth / 2});
}

Wide make() {
  torch::manual_seed(5);
  return Wide();
}

struct Pair {
  explicit Pair(const fsdp::Communicator& comm) : module(make()), reference(make()) {
    fsdp::ShardOptions options;
    options.comm = comm;
    options.wrap = fsdp::wrap_class("LinearImpl");
    model.emplace(fsdp::fully_shard(module, options));
  }
  Wide module, reference;
  std::optional<fsdp::ShardedModule<WideImpl>> model;
};

/// The number of the parameter of this name.
std::uint32_t number_of(const Pair& pair, const std::string& name) {
  for (std::uint32_t i = 0; i < pair.model->engine().param_count(); ++i) {
    if (pair.model->engine().param_info(i).name == name) return i;
  }
  throw Failure("no parameter " + name);
}

/// A backward of the sharded model and of the reference must leave the same gradients.
void compare(Pair& pair, const fsdp::Communicator& comm, int step) {
  average_gradients(pair.reference->parameters(), comm.world_size(), [&](int rank) {
    pair.reference->forward(ids_of(step, rank)).backward();
  });
  pair.model->forward(ids_of(step, comm.rank())).backward();
  check_shards(*pair.model, pair.reference->parameters(), true, "step " + std::to_string(step));
}

void zero(Pair& pair) {
  for (const at::Tensor& param : pair.model->parameters()) param.mutable_grad().reset();
  pair.reference->zero_grad();
}

/// Whether the gradient of `name`, as it arrives, lies where the engine collects it.
bool arrives_in_place(Pair& pair, const fsdp::Communicator& comm, const std::string& name) {
  const std::uint32_t param = number_of(pair, name);
  const at::Tensor leaf = pair.module->named_parameters()[name];
  bool in_place = false, seen = false;
  const unsigned hook = leaf.register_hook([&](const at::Tensor& gradient) {
    fsdp::Engine engine = pair.model->engine();
    const auto [region, accumulate] = engine.reserve_grad(param);
    REQUIRE(!accumulate);
    in_place = gradient.data_ptr() == region.data;
    seen = true;
  });
  pair.model->forward(ids_of(1, comm.rank())).backward();
  leaf.remove_hook(hook);
  REQUIRE(seen);
  zero(pair);
  return in_place;
}

void places(const fsdp::Communicator& comm) {
  Pair pair(comm);
  for (const char* name : {"a.weight", "b.weight", "raw"}) {
    REQUIRE_SAY(arrives_in_place(pair, comm, name), name);
  }
  // A padding index needs another loop; small ones are copied; the first of two uses was in place.
  for (const char* name : {"padded.weight", "small.weight", "a.bias"}) {
    REQUIRE_SAY(!arrives_in_place(pair, comm, name), name);
  }
}

/// An embedding that nothing else shares.
struct LookupImpl : nn::Module {
  LookupImpl() : words(register_module("words", nn::Embedding(kWords, kWidth))) {}
  at::Tensor forward(const at::Tensor& ids) { return words(ids).pow(3).sum(); }
  nn::Embedding words;
};
TORCH_MODULE(Lookup);

void places_rows(const fsdp::Communicator& comm) {
  const auto build = [] {
    torch::manual_seed(7);
    return Lookup();
  };
  Lookup module = build(), reference = build();
  fsdp::ShardOptions options;
  options.comm = comm;
  auto model = fsdp::fully_shard(module, options);
  bool in_place = false;
  module->words->weight.register_hook([&](const at::Tensor& gradient) {
    fsdp::Engine engine = model.engine();
    in_place = gradient.data_ptr() == engine.reserve_grad(0).first.data;
  });
  average_gradients(reference->parameters(), comm.world_size(), [&](int rank) {
    reference->forward(ids_of(2, rank)).backward();
  });
  model.forward(ids_of(2, comm.rank())).backward();
  REQUIRE(in_place);
  check_shards(model, reference->parameters(), true, "embedding");
}

void same_gradients(const fsdp::Communicator& comm) {
  Pair pair(comm);
  for (int step = 0; step < 3; ++step) {
    compare(pair, comm, step);
    if (step == 1) zero(pair);  // else they are added to
  }
  zero(pair);
  {
    const auto no_sync = pair.model->no_sync();
    pair.model->forward(ids_of(7, comm.rank())).backward();
  }
  average_gradients(pair.reference->parameters(), comm.world_size(), [&](int rank) {
    pair.reference->forward(ids_of(7, rank)).backward();
    pair.reference->forward(ids_of(8, rank)).backward();
  });
  pair.model->forward(ids_of(8, comm.rank())).backward();
  check_shards(*pair.model, pair.reference->parameters(), true, "after no_sync");
}

/// What hooks keep of a gradient stays what it was, whatever happens to the slot; what they return
/// is what is reduced.
void kept_by_hooks(const fsdp::Communicator& comm) {
  Pair pair(comm);
  std::vector<at::Tensor> kept, copies;
  const std::vector<std::string> names = {"a.weight", "b.weight", "raw", "words.weight"};
  for (const std::string& name : names) {
    pair.module->named_parameters()[name].register_hook([&](const at::Tensor& gradient) {
      kept.push_back(kept.size() % 2 == 0 ? gradient : gradient.t());
      copies.push_back(kept.back().clone());
    });
  }
  pair.module->twice->weight.register_hook(
      [](const at::Tensor& gradient) { return gradient.mul_(2); });
  pair.reference->twice->weight.register_hook(
      [](const at::Tensor& gradient) { return gradient * 2; });
  for (int step = 0; step < 3; ++step) {
    compare(pair, comm, step);
    zero(pair);
  }
  REQUIRE(kept.size() == 3 * names.size());
  for (std::size_t i = 0; i < kept.size(); ++i) {
    REQUIRE_SAY(same_bits(kept[i], copies[i]), "what the hooks kept, number " << i);
  }
}

/// A product with a weight whose own backward computes something of the weight's shape first, and
/// keeps it.
struct Misleading : torch::autograd::Function<Misleading> {
  static inline std::vector<at::Tensor> kept, copies;
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& weight) {
    context->save_for_backward({x, weight});
    return x.mm(weight);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor other = gradients[0].mm(saved[0]);
    if (torch::autograd::get_current_node()->name().find("Misleading") != std::string::npos) {
      kept.push_back(other);
      copies.push_back(other.clone());
    }
    return {gradients[0].mm(saved[1].t()), saved[0].t().mm(gradients[0])};
  }
};

struct OddImpl : nn::Module {
  OddImpl() : raw(register_parameter("raw", 0.05 * torch::randn({kWidth, kWidth}))) {}
  at::Tensor forward(const at::Tensor& x) {
    return (Misleading::apply(x, raw) + torch::mm(x, raw)).square().mean();
  }
  at::Tensor raw;
};
TORCH_MODULE(Odd);

void misled(const fsdp::Communicator& comm) {
  const auto build = [] {
    torch::manual_seed(6);
    return Odd();
  };
  const auto batch = [](int step, int rank) {
    torch::manual_seed(100 * step + rank + 1);
    return torch::randn({kWidth, kWidth});
  };
  Odd module = build(), reference = build();
  fsdp::ShardOptions options;
  options.comm = comm;
  auto model = fsdp::fully_shard(module, options);
  for (int step = 0; step < 2; ++step) {
    average_gradients(reference->parameters(), comm.world_size(), [&](int rank) {
      reference->forward(batch(step, rank)).backward();
    });
    model.forward(batch(step, comm.rank())).backward();
    check_shards(model, reference->parameters(), true, "step " + std::to_string(step));
  }
  for (std::size_t i = 0; i < Misleading::kept.size(); ++i) {
    REQUIRE(same_bits(Misleading::kept[i], Misleading::copies[i]));
  }
  REQUIRE(!Misleading::kept.empty());
}

/// A backward that throws with gradients in their places, one for chosen inputs, and a graph that is
/// gone through twice.
void interrupted(const fsdp::Communicator& comm) {
  Pair pair(comm);
  at::Tensor kept;
  bool fails = true;
  pair.module->b->weight.register_hook([&](const at::Tensor& gradient) {
    if (!fails) return;
    kept = gradient;
    throw std::runtime_error("on purpose");
  });
  const at::Tensor loss = pair.model->forward(ids_of(0, comm.rank()));
  REQUIRE_THROWS(loss.backward(), "on purpose");
  const at::Tensor copy = kept.clone();
  fails = false;
  compare(pair, comm, 1);
  zero(pair);
  REQUIRE(same_bits(kept, copy));

  const at::Tensor again = pair.model->forward(ids_of(2, comm.rank()));
  again.backward({}, /*retain_graph=*/true);
  again.backward();
  average_gradients(pair.reference->parameters(), comm.world_size(), [&](int rank) {
    const at::Tensor full = pair.reference->forward(ids_of(2, rank));
    full.backward();
  });
  average_gradients(pair.reference->parameters(), comm.world_size(), [&](int rank) {
    pair.reference->forward(ids_of(2, rank)).backward();
  });
  check_shards(*pair.model, pair.reference->parameters(), true, "a graph gone through twice");
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv,
                 {{"gradients are computed in place", places},
                  {"an embedding's rows too", places_rows},
                  {"gradients are the same", same_gradients},
                  {"kept by hooks", kept_by_hooks},
                  {"misled", misled},
                  {"interrupted", interrupted}});
}

const harness::Program program("test_placement", run_program);

}  // namespace
}  // namespace test_placement
