// What mixed precision does around training: types of buffers, inputs and outputs, parameters
// without storage, sharding again, whole parameters, and what is refused.
#include "precision_trial.hpp"

namespace feature_precision_module {
namespace {

using namespace precision;

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
                          {{"buffers", buffers},
                           {"inputs and outputs", inputs_and_outputs},
                           {"without storage", without_storage},
                           {"deferred", deferred},
                           {"sharded again", sharded_again},
                           {"whole parameters", whole_parameters},
                           {"wrong options", wrong_options}});
}

const harness::Program program("feature_precision_module", run_program);

}  // namespace
}  // namespace feature_precision_module
