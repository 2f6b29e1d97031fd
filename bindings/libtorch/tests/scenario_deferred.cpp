// Modules constructed inside of deferred_init: sharding makes their parameters and buffers, one
// unit at a time, as the recorded constructors would have; they are, bit for bit, and train as, the
// same modules constructed eagerly from the same seed, however they are wrapped, with an init
// function and without.
//
// Breaks: other_seed, wrong_init, uninitialized, no_error, no_average.
#include "scenario_models.hpp"

namespace scenario_deferred {
namespace {

using namespace scenario;
namespace nn = torch::nn;

// ---- PyTorch's models ----

template <class Holder>
void like_regular(const fsdp::Communicator& comm, const std::string& name) {
  const auto make = [] { return fsdp::deferred_init([] { return Holder(); }); };
  for (std::size_t wrap = 0; wrap < 3; ++wrap) {
    REQUIRE(fsdp::is_deferred(*make()));
    check_like_regular(comm, name, make(), wrap, std::nullopt);
    for (const bool recurse : {true, false}) {
      check_like_regular(comm, name, make(), wrap, InitFunction([=](nn::Module& module) {
                           fsdp::materialize_module(module, recurse);
                         }));
    }
    // An init function of another kind takes the records' place.
    check_like_regular(comm, name, make(), wrap, InitFunction([](nn::Module& module) {
                         for (auto& param : module.parameters()) param.fill_(7);
                         dynamic_cast<fsdp::Resettable&>(module).reset_parameters();
                       }));
  }
}

// ---- any other model ----

/// A block with an initialization of its own.
struct BlockImpl : nn::Module {
  explicit BlockImpl(double gain)
      : norm(register_module("norm", nn::LayerNorm(nn::LayerNormOptions({6})))),
        linear(register_module("linear", nn::Linear(6, 6))) {
    nn::init::orthogonal_(linear->weight, gain);
    const torch::NoGradGuard no_grad;
    linear->bias.copy_(torch::linspace(-gain, gain, 6));
    norm->weight.add_(torch::randn({6}) * 0.1);
  }
  at::Tensor forward(const at::Tensor& x) { return x + torch::tanh(linear(norm(x))); }
  nn::LayerNorm norm;
  nn::Linear linear;
};
TORCH_MODULE(Block);

/// Most of what constructors do: layers of many kinds, a tied and a frozen parameter, buffers, a
/// rescaling of what the layers have initialized.
struct NetImpl : nn::Module {
  NetImpl()
      : embed(register_module("embed", nn::Embedding(11, 6))),
        norm(register_module("norm", nn::BatchNorm1d(6))),
        lstm(register_module("lstm", nn::LSTM(nn::LSTMOptions(6, 6).num_layers(2)))),
        attention(register_module("attention", nn::MultiheadAttention(6, 2))),
        blocks(register_module("blocks", nn::ModuleList())) {
    for (int i = 1; i <= 3; ++i) blocks->push_back(Block(1.0 / i));
    head = register_parameter("head", embed->weight);
    scale = register_parameter("scale", torch::rand({6}) + 0.5, /*requires_grad=*/false);
    positions = register_buffer("positions", torch::arange(6) * 0.01);
    register_buffer("steps", torch::zeros({}, at::kLong));
    const torch::NoGradGuard no_grad;
    for (auto& param : lstm->parameters()) param.mul_(0.5);
  }
  at::Tensor forward(const at::Tensor& tokens) {
    at::Tensor x = embed(tokens) * scale + positions;
    x = norm(x.reshape({-1, 6})).reshape(x.sizes());
    x = std::get<0>(lstm(x));
    x = x + std::get<0>(attention(x, x, x));
    for (const auto& block : *blocks) x = block->as<BlockImpl>()->forward(x);
    return torch::linear(x, head);
  }
  nn::Embedding embed;
  nn::BatchNorm1d norm;
  nn::LSTM lstm;
  nn::MultiheadAttention attention;
  nn::ModuleList blocks;
  at::Tensor head, scale, positions;
};
TORCH_MODULE(Net);

at::Tensor generator_state() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  return generator.get_state();
}

at::Tensor loss_of(std::function<at::Tensor(at::Tensor)> forward, int step, int rank) {
  torch::manual_seed(100 * step + rank);
  return forward(torch::randint(0, 11, {4, 3})).pow(2).mean();
}

void like_eager(const fsdp::Communicator& comm) {
  const std::vector<fsdp::WrapPolicy> policies = {
      fsdp::WrapPolicy(), fsdp::wrap_class("BlockImpl"), fsdp::wrap_always(), fsdp::wrap_size(60),
      // The units that are made last are those that were constructed first.
      fsdp::wrap_if([](const nn::Module&, const std::string& name) {
        return name == "embed" || name == "norm" || name == "lstm";
      })};
  for (const auto& wrap : policies) {
    torch::manual_seed(9);
    Net eager;
    const at::Tensor after = generator_state();
    torch::manual_seed(broken("other_seed") ? 10 : 9);
    Net module = fsdp::deferred_init([] { return Net(); });
    check_same(generator_state(), after, "generator after construction");

    fsdp::ShardOptions options;
    options.comm = comm;
    options.wrap = wrap;
    torch::manual_seed(77);
    torch::rand({5});
    const at::Tensor before = generator_state();
    auto model = fsdp::fully_shard(module, options);
    check_same(generator_state(), before, "generator after fully_shard");
    std::vector<at::Tensor> params;  // the tied one once
    for (const at::Tensor& param : eager->parameters()) {
      bool seen = false;
      for (const at::Tensor& known : params) seen = seen || known.is_same(param);
      if (!seen) params.push_back(param);
    }
    check_shards(model, params, false, "as constructed");
    const auto buffers = module->named_buffers();
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      const at::Tensor wanted = eager->buffers()[i];
      REQUIRE_SAY(buffers[i].value().dtype() == wanted.dtype() &&
                      same_bits(buffers[i].value(), wanted),
                  buffers[i].key());
    }
    REQUIRE(!fsdp::is_deferred(*module));
    // No more than the largest unit was there at once.
    std::uint64_t largest = 0;
    for (std::uint32_t unit = 0; unit < model.engine().unit_count(); ++unit) {
      largest = std::max<std::uint64_t>(largest, model.engine().unit_info(unit).unit_bytes);
    }
    REQUIRE(model.stats().materialized_peak_bytes <= largest);
    REQUIRE(model.stats().materialized_peak_bytes > 0);

    auto optimizer = adamw()(model.parameters());
    auto full_optimizer = adamw()(params);
    for (int step = 0; step < 2; ++step) {
      average_gradients(params, comm.world_size(), [&](int rank) {
        loss_of([&](const at::Tensor& x) { return eager->forward(x); }, step, rank).backward();
      });
      loss_of([&](const at::Tensor& x) { return model.forward(x); }, step, comm.rank()).backward();
      break_average(model);
      check_shards(model, params, true, "step");
      optimizer->step();
      full_optimizer->step();
      check_shards(model, params, false, "step");
      model.zero_grad();
      full_optimizer->zero_grad();
    }
  }
}

void what_is_refused(const fsdp::Communicator& comm) {
  fsdp::ShardOptions options;
  options.comm = comm;
  // A constructor that looks at values; nothing of it remains.
  struct CuriousImpl : nn::Module {
    CuriousImpl() {
      register_module("linear", nn::Linear(3, 3));
      if (!broken("no_error") && parameters()[0].sum().item<float>() > 0) return;
    }
  };
  REQUIRE_THROWS(fsdp::deferred_init([] { return std::make_shared<CuriousImpl>(); }), "aten::item");
  // One that leaves a parameter without values; a buffer may be.
  struct ForgetfulImpl : nn::Module {
    ForgetfulImpl() {
      register_module("linear", nn::Linear(3, 3));
      register_buffer("scratch", torch::empty({4}));
      register_parameter("forgotten", broken("no_error") ? torch::ones({2}) : torch::empty({2}));
    }
  };
  const auto forgetful = [] {
    return fsdp::deferred_init([] { return std::make_shared<ForgetfulImpl>(); });
  };
  REQUIRE_THROWS(fsdp::fully_shard(forgetful(), options), "\"forgotten\"", "uninitialized");
  options.param_init_fn = [](nn::Module& module) {
    fsdp::materialize_module(module);
    for (auto& buffer : module.buffers()) buffer.zero_();
    if (module.as<ForgetfulImpl>()) module.named_parameters(false)["forgotten"].fill_(1);
  };
  fsdp::fully_shard(forgetful(), options);

  // On one rank only: an error on all; the module is deferred as before, and can be sharded.
  Nested module = fsdp::deferred_init([] { return Nested(); });
  const bool mine = comm.rank() == comm.world_size() - 1;
  options.param_init_fn = [&](nn::Module& each) {
    fsdp::materialize_module(each);
    if (mine && &each == module->l3->lin2.get()) throw std::runtime_error("not this one");
  };
  REQUIRE_THROWS(fsdp::fully_shard(module, options), mine ? "not this one" : "l3.lin2");
  REQUIRE(fsdp::is_deferred(*module) && fsdp::is_deferred(module->l3->buf_mod->buf));
  options.param_init_fn = std::function<void(nn::Module&)>();
  REQUIRE_THROWS(fsdp::fully_shard(module, options), "to be callable");
  options.param_init_fn.reset();
  auto model = REQUIRE_SUCCEEDS(fsdp::fully_shard(module, options));
  const Nested plain;
  check_shards(model, plain->parameters(), false, "after errors");

  // A model that a deferred module's constructor shards is a real one.
  struct WrapperImpl : nn::Module {
    explicit WrapperImpl(const fsdp::ShardOptions& options)
        : handle(fsdp::fully_shard(register_module("inner", nn::Linear(2, 2)), options)) {}
    fsdp::ShardedModule<nn::LinearImpl> handle;
  };
  auto wrapper = fsdp::deferred_init([&] { return std::make_shared<WrapperImpl>(options); });
  wrapper->handle.forward(torch::ones({1, 2})).sum().backward();
  // And shards again, with what is deferred around it.
  nn::Sequential around(wrapper->handle.module());
  around->push_back(fsdp::deferred_init([] { return nn::Linear(2, 2); }));
  auto bigger = fsdp::fully_shard(around, options);
  bigger.forward(torch::ones({1, 2})).sum().backward();
  for (const at::Tensor& shard : bigger.parameters()) REQUIRE(shard.grad().defined());
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv,
                 {{"one level", [](auto comm) { like_regular<Simple>(comm, "simple"); }},
                  {"nested", [](auto comm) { like_regular<Nested>(comm, "nested"); }},
                  {"as constructed eagerly", like_eager},
                  {"what is refused", what_is_refused}});
}

const harness::Program program("scenario_deferred", run_program);

}  // namespace
}  // namespace scenario_deferred
