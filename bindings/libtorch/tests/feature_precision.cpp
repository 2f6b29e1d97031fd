// Mixed precision of sharded models, bit for bit against an unsharded module in which the same
// rounding is done by hand: float32 masters, parameters and inputs in 16 bits, gradients widened,
// rounded to the reduce dtype, and averaged over the ranks in float32.
#include "reference.hpp"

namespace feature_precision {
namespace {

using namespace harness;
namespace nn = torch::nn;

using Types = std::map<std::string, at::ScalarType>;  // by parameter name; others are the default
using ToType = std::function<at::Tensor(const at::Tensor&)>;

const ToType kAsItIs = [](const at::Tensor& x) { return x; };

ToType to_type(at::ScalarType type) {
  return [type](const at::Tensor& x) { return x.to(type); };
}

at::Tensor batch_of(int step, int rank, at::IntArrayRef shape) {
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

fsdp::ShardOptions options_of(const fsdp::Communicator& comm, const fsdp::WrapPolicy& wrap = {}) {
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = wrap;
  return options;
}

auto all_in(at::ScalarType type) {
  return [type](const std::string&) { return type; };
}

auto vectors(at::ScalarType type) {
  return [type](int step, int rank, bool by_hand) {
    const at::Tensor x = batch_of(step, rank, {3, 13});
    return by_hand ? x.to(type) : x;
  };
}

at::Tensor tokens_of(int step, int rank, bool) {
  torch::manual_seed(1000 * step + rank + 1);
  return torch::randint(11, {2, 5});
}

// ---- a whole model in 16 bits ----

void mlp(const fsdp::Communicator& comm) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    for (const bool reduce_wide : {false, true}) {
      auto [module, reference] = twins<Mlp>();
      auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
      options.mixed_precision.param_dtype = type;
      if (reduce_wide) options.mixed_precision.reduce_dtype = at::kFloat;
      options.mixed_precision.output_dtype = at::kFloat;
      train_and_compare(comm, module, reference, options,
                        {type, {}, all_in(reduce_wide ? at::kFloat : type)}, vectors(type));
    }
  }
}

void transformer(const fsdp::Communicator& comm) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    auto [module, reference] = twins<Transformer>();
    auto options = options_of(comm, fsdp::wrap_class("BlockImpl"));
    options.mixed_precision.param_dtype = type;
    options.mixed_precision.output_dtype = at::kFloat;
    options.strategy =
        type == at::kHalf ? fsdp::Strategy::shard_grad_op : fsdp::Strategy::full_shard;
    train_and_compare(comm, module, reference, options, {type, {}, all_in(type)}, tokens_of);
    // The tied parameter is one tensor still, of the root's unit.
    REQUIRE(module->head->weight.is_same(module->embed->weight));
  }
}

/// Gradients of large weights, which are copied past the cache; and what slots for them take.
void large_weights(const fsdp::Communicator& comm) {
  for (const auto type : {at::kBFloat16, at::kHalf}) {
    const auto large = [] {
      torch::manual_seed(7);
      return Mlp(256);
    };
    const auto input = [type](int step, int rank, bool by_hand) {
      const at::Tensor x = batch_of(step, rank, {8, 256});
      return by_hand ? x.to(type) : x;
    };
    auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
    options.mixed_precision.param_dtype = type;
    options.mixed_precision.output_dtype = at::kFloat;
    train_and_compare(comm, large(), large(), options, {type, {}, all_in(type)}, input);

    Mlp module = large();
    auto model = fsdp::fully_shard(module, options);
    Mlp planned = large();
    const auto ranks = static_cast<std::uint32_t>(comm.world_size());
    const auto plan = fsdp::plan(*planned, options, ranks, 0);
    REQUIRE(plan.gradient_slot_bytes == model.stats().gradient_slot_bytes);
    // first, last and the root (a vector each of 769): two bytes an element, and padding.
    REQUIRE(plan.gradient_slot_bytes < 3 * (769 * 257 + 5 * 770 + 2 * 769));
  }
}

/// What micro-batches leave unsharded is summed in float32, whatever it is reduced in.
void accumulated(const fsdp::Communicator& comm) {
  constexpr int kMicroBatches = 3;
  for (const auto reduce : {at::kBFloat16, at::kFloat}) {
    auto [module, reference] = twins<Mlp>();
    const auto input = vectors(at::kBFloat16);
    Masters full(*reference, at::kBFloat16, {});
    for (int rank = 0; rank < comm.world_size(); ++rank) {
      std::vector<at::Tensor> own(full.params.size());
      for (int micro = 0; micro < kMicroBatches; ++micro) {
        full.round();
        const at::Tensor output = reference->forward(input(micro, rank, true)).to(at::kFloat);
        (output * output).mean().backward();
        for (std::size_t i = 0; i < own.size(); ++i) {
          const at::Tensor grad = full.params[i].grad().to(at::kFloat);
          own[i] = micro == 0 ? grad : own[i] + grad;
        }
      }
      for (std::size_t i = 0; i < own.size(); ++i) {
        at::Tensor& mean = full.masters[i].mutable_grad();
        const at::Tensor term = own[i].to(reduce).to(at::kFloat);
        mean = rank == 0 ? term : mean + term;
      }
    }
    for (const at::Tensor& master : full.masters) master.mutable_grad() /= comm.world_size();

    auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
    options.mixed_precision.param_dtype = at::kBFloat16;
    options.mixed_precision.reduce_dtype = reduce;
    options.mixed_precision.output_dtype = at::kFloat;
    auto model = fsdp::fully_shard(module, options);
    const auto backward = [&](int micro) {
      const at::Tensor output = model.forward(input(micro, comm.rank(), false));
      (output * output).mean().backward();
    };
    {
      const auto quiet = model.no_sync();
      for (int micro = 0; micro + 1 < kMicroBatches; ++micro) backward(micro);
    }
    backward(kMicroBatches - 1);
    check_shards(model, full.masters, true, "after three micro-batches");
  }
}

/// The embedding and the head are units of their own; their one weight belongs to the root.
void tied_across_units(const fsdp::Communicator& comm) {
  auto [module, reference] = twins<Transformer>();
  auto options = options_of(comm, fsdp::wrap_if([](const nn::Module&, const std::string& name) {
                              return name == "embed" || name == "head" || name == "blocks.1";
                            }));
  options.mixed_precision.param_dtype = at::kBFloat16;
  options.mixed_precision.reduce_dtype = at::kHalf;
  options.mixed_precision.output_dtype = at::kFloat;
  train_and_compare(comm, module, reference, options, {at::kBFloat16, {}, all_in(at::kHalf)},
                    tokens_of);
}

// ---- overrides ----

/// The weights of normalizations stay in float32 inside units in bfloat16.
void parameters_of_their_own(const fsdp::Communicator& comm) {
  auto [module, reference] = twins<Transformer>();
  auto options = options_of(comm, fsdp::wrap_class("BlockImpl"));
  options.mixed_precision.param_dtype = at::kBFloat16;
  options.mixed_precision.output_dtype = at::kFloat;
  Types own;
  for (const auto& item : module->named_parameters()) {
    if (item.key().find("norm") != std::string::npos) own[item.key()] = at::kFloat;
  }
  REQUIRE(own.size() == 8);
  options.param_dtypes = own;
  train_and_compare(comm, module, reference, options,
                    {at::kBFloat16, own, all_in(at::kBFloat16)}, tokens_of);
}

/// One block in float32, one in float16, the rest in bfloat16: inputs follow.
void units_of_their_own(const fsdp::Communicator& comm) {
  auto [module, reference] = twins<Transformer>();
  auto options = options_of(comm, fsdp::wrap_class("BlockImpl"));
  options.mixed_precision.param_dtype = at::kBFloat16;
  options.mixed_precision.output_dtype = at::kFloat;
  options.unit_mixed_precision["blocks.0"].param_dtype = at::kFloat;
  options.unit_mixed_precision["blocks.1"].param_dtype = at::kHalf;
  options.unit_mixed_precision["blocks.1"].reduce_dtype = at::kFloat;
  Types own;
  for (const auto& item : module->named_parameters()) {
    if (item.key().rfind("blocks.0", 0) == 0) own[item.key()] = at::kFloat;
    if (item.key().rfind("blocks.1", 0) == 0) own[item.key()] = at::kHalf;
  }
  reference->block(0).in = to_type(at::kFloat);
  reference->block(1).in = to_type(at::kHalf);
  reference->in = to_type(at::kBFloat16);
  const auto reduce = [](const std::string& name) {
    return name.rfind("blocks.", 0) == 0 ? at::kFloat : at::kBFloat16;
  };
  train_and_compare(comm, module, reference, options, {at::kBFloat16, own, reduce}, tokens_of);
}

/// Types as registered, several of them in one unit; nothing is cast.
void registered_types(const fsdp::Communicator& comm) {
  for (const bool wrapped : {false, true}) {
    auto [module, reference] = twins<Mlp>();
    for (Mlp net : {module, reference}) {
      net->first->to(at::kBFloat16);
      net->last->to(at::kHalf);
      net->in = [calls = std::make_shared<std::size_t>(0)](const at::Tensor& x) {
        static constexpr at::ScalarType types[] = {at::kBFloat16, at::kFloat, at::kHalf};
        return x.to(types[(*calls)++ % 3]);
      };
    }
    auto options = options_of(comm, wrapped ? fsdp::wrap_class("LinearImpl") : fsdp::WrapPolicy());
    options.mixed_precision.output_dtype = at::kFloat;
    train_and_compare(comm, module, reference, options, {std::nullopt, {}, all_in(at::kFloat)},
                      vectors(at::kFloat));
  }
}

// ---- buffers, inputs, outputs ----

struct BufferedImpl : nn::Module {
  BufferedImpl()
      : lin(register_module("lin", nn::Linear(6, 6))),
        norm(register_module("norm", nn::BatchNorm1d(6))),
        scale(register_buffer("scale", torch::linspace(0.1, 2, 6))),
        steps(register_buffer("steps", torch::arange(3))) {}
  at::Tensor forward(const at::Tensor& x) { return norm(lin(x)) * scale; }
  nn::Linear lin;
  nn::BatchNorm1d norm;
  at::Tensor scale, steps;
};
TORCH_MODULE(Buffered);

void buffers(const fsdp::Communicator& comm) {
  auto [module, reference] = twins<Buffered>();
  auto options = options_of(comm, fsdp::wrap_class("BatchNorm1dImpl"));
  options.mixed_precision.param_dtype = at::kBFloat16;
  options.mixed_precision.buffer_dtype = at::kBFloat16;
  // Batch normalization on the CPU takes 16-bit inputs, but parameters and statistics in float32.
  options.param_dtypes = {{"norm.weight", at::kFloat}, {"norm.bias", at::kFloat}};
  options.unit_mixed_precision["norm"].buffer_dtype = at::kFloat;
  auto model = fsdp::fully_shard(module, options);
  REQUIRE(module->buffers().size() == 5);
  REQUIRE(module->scale.scalar_type() == at::kBFloat16 && module->steps.scalar_type() == at::kLong);
  REQUIRE(module->norm->running_mean.scalar_type() == at::kFloat);
  REQUIRE(module->norm->num_batches_tracked.scalar_type() == at::kLong);

  reference->lin->to(at::kBFloat16);
  reference->scale.set_data(reference->scale.to(at::kBFloat16));
  for (int step = 0; step < 3; ++step) {
    const at::Tensor x = batch_of(step, comm.rank(), {4, 6});
    const at::Tensor wanted = reference->forward(x.to(at::kBFloat16));
    const at::Tensor output = model.forward(x);
    REQUIRE(output.scalar_type() == at::kBFloat16 && same_bits(output.detach(), wanted.detach()));
    output.sum().backward();
    model.zero_grad();
    // The operator wrote the buffers themselves.
    REQUIRE(same_bits(module->norm->running_mean, reference->norm->running_mean));
    REQUIRE(same_bits(module->norm->running_var, reference->norm->running_var));
    REQUIRE(module->norm->num_batches_tracked.item<int>() == step + 1);
  }
}

using Pair = std::pair<at::Tensor, std::optional<at::Tensor>>;

/// Says what it was given.
struct NestedImpl : nn::Module {
  NestedImpl() : lin(register_module("lin", nn::Linear(4, 4))) {}
  std::tuple<std::vector<at::Tensor>, Pair, at::Tensor> forward(
      const at::Tensor& x, std::vector<at::Tensor> more, const Pair& pair,
      std::array<at::Tensor, 2>& both, int factor) {
    for (const at::Tensor& tensor : {x, more.at(0), pair.first, *pair.second, both[0]}) {
      types.push_back(tensor.scalar_type());
    }
    types.push_back(more.at(1).scalar_type());
    types.push_back(both[1].scalar_type());
    const at::Tensor y = lin(x + more[0]) * factor;
    return {{y, more[1]}, {pair.first + y, pair.second}, both[1]};
  }
  nn::Linear lin;
  std::vector<at::ScalarType> types;
};
TORCH_MODULE(Nested);

void inputs_and_outputs(const fsdp::Communicator& comm) {
  const at::Tensor x = torch::ones({2, 4}).requires_grad_();
  const std::vector<at::Tensor> more = {torch::ones({2, 4}, at::kDouble), torch::arange(3)};
  const Pair pair = {torch::ones({2, 4}, at::kHalf), torch::ones({1})};
  std::array<at::Tensor, 2> both = {torch::ones({1}), torch::ones({1}, at::kBool)};
  {
    Nested module;
    auto options = options_of(comm);
    options.mixed_precision.param_dtype = at::kBFloat16;
    options.mixed_precision.output_dtype = at::kDouble;
    auto model = fsdp::fully_shard(module, options);
    const auto [list, second, third] = model.forward(x, more, pair, both, 2);
    using V = std::vector<at::ScalarType>;
    REQUIRE((module->types == V{at::kBFloat16, at::kBFloat16, at::kBFloat16, at::kBFloat16,
                                at::kBFloat16, at::kLong, at::kBool}));
    REQUIRE((V{list[0].scalar_type(), list[1].scalar_type(), second.first.scalar_type(),
               second.second->scalar_type(), third.scalar_type()} ==
             V{at::kDouble, at::kLong, at::kDouble, at::kDouble, at::kBool}));
    // Back through both casts.
    list[0].sum().backward();
    REQUIRE(x.grad().scalar_type() == at::kFloat && x.grad().abs().sum().item<float>() > 0);
    REQUIRE(more[0].scalar_type() == at::kDouble && both[0].scalar_type() == at::kFloat);
    REQUIRE(model.parameters()[0].grad().scalar_type() == at::kFloat);
    model.zero_grad();
  }
  {
    // Without casts, operators see what they are given.
    Nested module;
    auto options = options_of(comm);
    options.mixed_precision.param_dtype = at::kBFloat16;
    options.mixed_precision.cast_forward_inputs = false;
    auto model = fsdp::fully_shard(module, options);
    REQUIRE_THROWS(model.forward(x, more, pair, both, 2), "dtype");
    REQUIRE(module->types.at(0) == at::kFloat && module->types.at(1) == at::kDouble);
  }
  {
    // What the handle does not see, operators on parameters cast; what they write they do not.
    struct InsideImpl : nn::Module {
      InsideImpl() : weight(register_parameter("weight", torch::ones({4}))) {}
      at::Tensor forward(std::shared_ptr<at::Tensor> sum) {
        const at::Tensor wide = torch::ones({4}) / 3;
        REQUIRE((wide * weight).scalar_type() == at::kHalf);
        REQUIRE(same_bits((wide * weight).detach(), wide.to(at::kHalf)));
        REQUIRE(torch::cat({wide, weight}).scalar_type() == at::kHalf);
        REQUIRE((weight * 0.1).scalar_type() == at::kHalf);
        REQUIRE((wide * other(weight)).scalar_type() == at::kFloat);
        sum->add_(weight.detach());
        return weight.sum();
      }
      static at::Tensor other(const at::Tensor& weight) { return weight * 2; }
      at::Tensor weight;
    };
    auto options = options_of(comm);
    options.mixed_precision.param_dtype = at::kHalf;
    auto model = fsdp::fully_shard(std::make_shared<InsideImpl>(), options);
    const auto sum = std::make_shared<at::Tensor>(torch::ones({4}));
    REQUIRE(model.forward(sum).scalar_type() == at::kHalf);
    REQUIRE(sum->scalar_type() == at::kFloat && (*sum == 2).all().item<bool>());
  }
  {
    struct ReferringImpl : nn::Module {
      ReferringImpl() : lin(register_module("lin", nn::Linear(4, 4))) {}
      at::Tensor& forward(const at::Tensor& x) { return last = lin(x); }
      nn::Linear lin;
      at::Tensor last;
    };
    auto options = options_of(comm);
    options.mixed_precision.output_dtype = at::kHalf;
    auto model = fsdp::fully_shard(std::make_shared<ReferringImpl>(), options);
    REQUIRE_THROWS(model.forward(x.detach()), "output_dtype", "by value");
  }
}

// ---- parameters without storage, sharding again, errors ----

void without_storage(const fsdp::Communicator& comm) {
  for (const bool registered : {false, true}) {
    torch::manual_seed(5);
    Mlp eager;
    if (registered) {
      // reset_parameters() then draws in bfloat16.
      eager->to(at::kBFloat16);
      torch::manual_seed(5);
      eager->first->reset_parameters();
      eager->norm->reset_parameters();
      eager->last->reset_parameters();
    }
    Mlp module;
    if (registered) module->to(at::kBFloat16);
    fsdp::to_meta(*module);
    torch::manual_seed(5);
    auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
    if (!registered) options.mixed_precision.param_dtype = at::kBFloat16;
    // The units' order of initialization is the root first: draw as it does.
    options.param_init_fn = [](nn::Module& m) {
      if (auto* linear = m.as<nn::LinearImpl>()) linear->reset_parameters();
      if (auto* norm = m.as<nn::LayerNormImpl>()) norm->reset_parameters();
    };
    auto model = fsdp::fully_shard(module, options);
    std::vector<at::Tensor> masters;
    for (const at::Tensor& p : eager->parameters()) masters.push_back(p.detach().to(at::kFloat));
    check_shards(model, masters, false, registered ? "registered" : "param_dtype");
    REQUIRE(module->first->weight.scalar_type() == at::kBFloat16);
    const at::Tensor x = batch_of(0, 0, {3, 13});
    if (!registered) eager->to(at::kBFloat16);
    const at::Tensor wanted = eager->forward(x.to(at::kBFloat16));
    REQUIRE(same_bits(model.forward(registered ? x.to(at::kBFloat16) : x).detach(),
                      wanted.detach()));
  }
}

/// A deferred module that was moved to bfloat16 gets the values of an eager one.
void deferred(const fsdp::Communicator& comm) {
  const auto make = [] {
    torch::manual_seed(5);
    Mlp net;
    net->to(at::kBFloat16);
    return net;
  };
  const Mlp eager = make();
  Mlp module = fsdp::deferred_init(make);
  auto model = fsdp::fully_shard(module, options_of(comm, fsdp::wrap_class("LinearImpl")));
  std::vector<at::Tensor> masters;
  for (const at::Tensor& p : eager->parameters()) masters.push_back(p.detach().to(at::kFloat));
  check_shards(model, masters, false, "deferred");
  REQUIRE(module->last->bias.scalar_type() == at::kBFloat16);
}

void sharded_again(const fsdp::Communicator& comm) {
  struct OuterImpl : nn::Module {
    OuterImpl(const Mlp& mlp)
        : mlp(register_module("mlp", mlp)), lin(register_module("lin", nn::Linear(5, 3))) {}
    at::Tensor forward(const at::Tensor& x) { return lin(mlp->forward(x)); }
    Mlp mlp;
    nn::Linear lin;
  };
  auto [module, reference] = twins<Mlp>();
  auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
  options.mixed_precision.param_dtype = at::kBFloat16;
  auto inner = fsdp::fully_shard(module, options);
  reference->to(at::kBFloat16);
  const at::Tensor x = batch_of(0, comm.rank(), {3, 13});
  const at::Tensor middle = reference->forward(x.to(at::kBFloat16)).detach();
  REQUIRE(same_bits(inner.forward(x).detach(), middle));

  // By itself, with the same types and with none: they stay.
  options.wrap = {};
  inner = fsdp::fully_shard(module, options);
  REQUIRE(same_bits(inner.forward(x).detach(), middle));
  inner = fsdp::fully_shard(module, options_of(comm));
  REQUIRE(module->first->weight.scalar_type() == at::kBFloat16);
  REQUIRE(same_bits(inner.forward(x).detach(), middle));

  // As a part of a model in float16.
  torch::manual_seed(3);
  auto outer = std::make_shared<OuterImpl>(module);
  nn::Linear lin(5, 3);
  lin->weight.set_data(outer->lin->weight.detach().to(at::kHalf));
  lin->bias.set_data(outer->lin->bias.detach().to(at::kHalf));
  options = options_of(comm);
  options.mixed_precision.param_dtype = at::kHalf;
  options.mixed_precision.cast_forward_inputs = true;
  options.param_dtypes = {{"mlp.first.weight", at::kFloat}};
  REQUIRE_THROWS(fsdp::fully_shard(outer, options), "mlp.first.weight", "sharded already");
  options.param_dtypes = {{"mlp.first.weight", at::kBFloat16}};
  auto model = fsdp::fully_shard(outer, options);
  REQUIRE(module->first->weight.scalar_type() == at::kBFloat16);
  REQUIRE(outer->lin->weight.scalar_type() == at::kHalf);
  // The handle casts to float16, the inner unit's operators to bfloat16.
  const at::Tensor inner_input = x.to(at::kHalf).to(at::kBFloat16);
  const at::Tensor wanted = lin(reference->forward(inner_input).to(at::kHalf));
  const at::Tensor output = model.forward(x);
  REQUIRE(output.scalar_type() == at::kHalf && same_bits(output.detach(), wanted.detach()));
  output.sum().backward();
  for (const at::Tensor& shard : model.parameters()) REQUIRE(shard.grad().defined());
}

/// Whole parameters are the float32 masters; what is written to them is computed with afterwards.
void whole_parameters(const fsdp::Communicator& comm) {
  auto [module, reference] = twins<Mlp>();
  auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
  options.mixed_precision.param_dtype = at::kBFloat16;
  auto model = fsdp::fully_shard(module, options);
  const at::Tensor x = batch_of(0, comm.rank(), {3, 13});
  model.forward(x).sum().backward();
  model.zero_grad();
  {
    const torch::NoGradGuard no_grad;
    const auto scope = model.summon_full_params();
    REQUIRE(module->first->weight.scalar_type() == at::kFloat);
    REQUIRE(same_bits(module->first->weight, reference->first->weight));
    module->first->weight.mul_(0.3);
    reference->first->weight.mul_(0.3);
  }
  REQUIRE(module->first->weight.scalar_type() == at::kBFloat16);
  reference->to(at::kBFloat16);
  REQUIRE(same_bits(model.forward(x).detach(), reference->forward(x.to(at::kBFloat16)).detach()));
}

/// Each of two groups of ranks has copies of its own.
void hybrid(const fsdp::Communicator& comm) {
  if (comm.world_size() != 4) return;
  auto [module, reference] = twins<Mlp>();
  auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
  options.strategy = fsdp::Strategy::hybrid_shard;
  options.shard_size = 2;
  options.mixed_precision.param_dtype = at::kBFloat16;
  options.mixed_precision.reduce_dtype = at::kFloat;
  options.mixed_precision.output_dtype = at::kFloat;
  Masters full(*reference, at::kBFloat16, {});
  auto model = fsdp::fully_shard(module, options);
  auto optimizer = sgd()(model.parameters());
  auto full_optimizer = sgd()(full.masters);
  const auto input = vectors(at::kBFloat16);
  const std::vector<at::ScalarType> reduce(full.names.size(), at::kFloat);
  for (int step = 0; step < 3; ++step) {
    at::Tensor wanted;
    full.average(comm.world_size(), reduce, [&](int rank) {
      const at::Tensor output = reference->forward(input(step, rank, true)).to(at::kFloat);
      (output * output).mean().backward();
      if (rank == comm.rank()) wanted = output.detach();
    });
    const at::Tensor output = model.forward(input(step, comm.rank(), false));
    // Gradients are summed group by group, so later masters may differ in their last bits.
    const double tolerance = step == 0 ? 0 : 2e-2;
    REQUIRE(torch::allclose(output.detach(), wanted, tolerance, tolerance));
    (output * output).mean().backward();
    optimizer->step();
    full_optimizer->step();
    check_shards(model, full.masters, false, "hybrid", 1e-2);
    model.zero_grad();
    full_optimizer->zero_grad();
  }
}

void wrong_options(const fsdp::Communicator& comm) {
  const auto refuse = [&](const std::function<void(fsdp::ShardOptions&)>& set,
                          const std::vector<std::string>& told) {
    Mlp module;
    auto options = options_of(comm, fsdp::wrap_class("LinearImpl"));
    set(options);
    harness::expect_error(__FILE__, __LINE__, [&] { fsdp::fully_shard(module, options); }, told);
    REQUIRE(module->forward(torch::ones({1, 13})).scalar_type() == at::kFloat);  // unchanged
  };
  using Options = fsdp::ShardOptions;
  refuse([](Options& o) { o.mixed_precision.param_dtype = at::kDouble; },
         {"param_dtype", "Double"});
  refuse([](Options& o) { o.mixed_precision.reduce_dtype = at::kInt; }, {"reduce_dtype", "Int"});
  refuse([](Options& o) { o.mixed_precision.buffer_dtype = at::kLong; }, {"buffer_dtype", "Long"});
  refuse([](Options& o) { o.mixed_precision.output_dtype = at::kBool; }, {"output_dtype", "Bool"});
  refuse([](Options& o) { o.param_dtypes["first.wait"] = at::kHalf; },
         {"param_dtypes", "'first.wait'"});
  refuse([](Options& o) { o.param_dtypes["first.bias"] = at::kChar; }, {"'first.bias'", "Char"});
  refuse([](Options& o) { o.unit_mixed_precision["third"].param_dtype = at::kHalf; },
         {"unit_mixed_precision", "'third'"});
  refuse([](Options& o) { o.unit_mixed_precision["norm"].param_dtype = at::kHalf; },
         {"\"norm\"", "no unit"});
  refuse([](Options& o) { o.unit_mixed_precision["last"].reduce_dtype = at::kDouble; },
         {"'last'", "reduce_dtype", "Double"});
  Mlp module;
  module->norm->to(at::kDouble);
  REQUIRE_THROWS(fsdp::fully_shard(module, options_of(comm)), "'norm.weight'", "Double");
  // Outside of a forward the parameters in 16 bits are named like others.
  Mlp narrow;
  auto options = options_of(comm);
  options.mixed_precision.param_dtype = at::kHalf;
  options.param_dtypes = {{"norm.weight", at::kFloat}, {"norm.bias", at::kFloat}};
  {
    auto model = fsdp::fully_shard(narrow, options);
    REQUIRE_THROWS(narrow->last->weight.sum(), "'last.weight'");
    REQUIRE_THROWS(narrow->norm->weight.sum(), "'norm.weight'");
    model.forward(torch::ones({1, 13}));
  }
  REQUIRE_THROWS(narrow->norm->bias.sum(), "'norm.bias'", "destroyed");
}

int run_program(int argc, char** argv) {
  return harness::main_of(argc, argv,
                          {{"mlp", mlp},
                           {"transformer", transformer},
                           {"large weights", large_weights},
                           {"accumulated", accumulated},
                           {"tied across units", tied_across_units},
                           {"parameters of their own", parameters_of_their_own},
                           {"units of their own", units_of_their_own},
                           {"registered types", registered_types},
                           {"buffers", buffers},
                           {"inputs and outputs", inputs_and_outputs},
                           {"without storage", without_storage},
                           {"deferred", deferred},
                           {"sharded again", sharded_again},
                           {"whole parameters", whole_parameters},
                           {"hybrid", hybrid},
                           {"wrong options", wrong_options}});
}

const harness::Program program("feature_precision", run_program);

}  // namespace
}  // namespace feature_precision
