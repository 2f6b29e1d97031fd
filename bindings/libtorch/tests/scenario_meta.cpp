// Modules on the meta device: their parameters and buffers get values when they are sharded, by
// reset_parameters() or by param_init_fn, however they are wrapped; then they are, and train as,
// the same modules made the regular way, and as PyTorch's. What an initializer does wrong is an
// error on every rank that names it, and nothing has changed.
//
// Breaks: wrong_init, uninitialized, buffer_not_filled, no_error, no_average, reduced_as_float32.
#include "scenario_models.hpp"

namespace scenario_meta {
namespace {

using namespace scenario;
namespace nn = torch::nn;

/// What a user writes: resets a module that can be.
void init_with_reset(nn::Module& module) {
  dynamic_cast<fsdp::Resettable&>(module).reset_parameters();
}

template <class Holder>
void like_regular(const fsdp::Communicator& comm, const std::string& name) {
  for (std::size_t wrap = 0; wrap < 3; ++wrap) {
    check_like_regular(comm, name, Holder(at::kMeta), wrap, std::nullopt);
    check_like_regular(comm, name, Holder(at::kMeta), wrap, InitFunction(init_with_reset));
    // A function for a whole tree, which every module of the unit is given to.
    check_like_regular(comm, name, Holder(at::kMeta), wrap, InitFunction([](nn::Module& module) {
                         module.apply([](nn::Module& below) {
                           if (dynamic_cast<fsdp::Resettable*>(&below)) init_with_reset(below);
                         });
                       }));
    // One that replaces the data instead of writing it.
    check_like_regular(comm, name, Holder(at::kMeta), wrap, InitFunction([](nn::Module& module) {
                         init_with_reset(module);
                         for (auto& param : module.parameters(false)) {
                           param.set_data(param.t().clone().t());
                         }
                       }));
  }
}

// ---- mixed precision ----

struct MatrixImpl : nn::Module {
  MatrixImpl() : weight(register_parameter("weight", torch::empty({5, 5}, at::kMeta))) {}
  at::Tensor forward(const at::Tensor& x) { return torch::matmul(x, weight); }
  at::Tensor weight;
};
TORCH_MODULE(Matrix);

struct MixedImpl : nn::Module {
  MixedImpl()
      : lin1(register_module("lin1", nn::Linear(5, 5))),
        lin2(register_module("lin2", Matrix())) {
    fsdp::to_meta(*lin1);
  }
  at::Tensor forward(const at::Tensor& x) { return lin2(torch::relu(lin1(x))); }
  nn::Linear lin1;
  Matrix lin2;
};
TORCH_MODULE(Mixed);

void init_mixed(nn::Module& module) {
  torch::manual_seed(42);
  const at::Tensor weight1 = torch::empty({5, 5}).normal_(0, 0.1);
  const at::Tensor weight2 = torch::empty({5, 5}).normal_(0, 1);
  if (auto* linear = module.as<nn::LinearImpl>()) {
    linear->weight.copy_(weight1);
    linear->bias.zero_();
  } else if (auto* matrix = module.as<MatrixImpl>()) {
    matrix->weight.copy_(weight2);
  }
}

void mixed_precision(const fsdp::Communicator& comm) {
  const Data data("meta", comm.world_size());
  const int ranks = comm.world_size();
  for (const auto type : {at::kHalf, at::kFloat, at::kBFloat16}) {
    Mixed module;
    fsdp::ShardOptions options;
    options.comm = comm;
    options.wrap = fsdp::wrap_class("LinearImpl");
    options.mixed_precision.reduce_dtype = broken("reduced_as_float32") ? at::kFloat : type;
    options.param_init_fn = init_mixed;
    auto model = fsdp::fully_shard(module, options);
    check_file(model, data, "mixed.initial");

    // What each rank's gradients are rounded to before they are summed, in rank order.
    Mixed reference;
    const auto initial = full_parameters(model);
    for (std::size_t i = 0; i < initial.size(); ++i) {
      fsdp::detail::put_under(reference->parameters()[i], initial[i].clone());
    }
    const auto params = reference->parameters();
    std::vector<at::Tensor> sums(params.size());
    for (int rank = 0; rank < ranks; ++rank) {
      reference->zero_grad();
      reference->forward(data["mixed.input"][rank].clone()).sum().backward();
      for (std::size_t i = 0; i < params.size(); ++i) {
        const at::Tensor grad = params[i].grad().to(type).to(at::kFloat);
        sums[i] = rank == 0 ? grad : sums[i] + grad;
      }
    }
    for (std::size_t i = 0; i < params.size(); ++i) params[i].mutable_grad() = sums[i] / ranks;

    const at::Tensor loss = model.forward(data["mixed.input"][comm.rank()].clone()).sum();
    check_same(loss, data["mixed.loss"][comm.rank()], "loss", 1e-6);
    loss.backward();
    break_average(model);
    check_shards(model, params, true, "reduced as " + std::string(c10::toString(type)));
    if (type == at::kBFloat16) continue;
    // PyTorch also sums in the smaller type.
    const double tolerance = type == at::kHalf ? ranks * 0x1p-10 : 1e-6;
    check_file(model, data, type == at::kHalf ? "mixed.grad16" : "mixed.grad32", tolerance, true);
    plain_sgd(1e-3)(model.parameters())->step();
    if (type == at::kHalf) check_file(model, data, "mixed.trained", tolerance);
  }
  fsdp::ShardOptions options;
  options.comm = comm;
  options.param_init_fn = init_mixed;
  options.mixed_precision.param_dtype = at::kDouble;
  REQUIRE_THROWS(fsdp::fully_shard(Mixed(), options), "param_dtype", "Double", "not supported");
  options.mixed_precision = {at::kFloat, at::kDouble};
  REQUIRE_THROWS(fsdp::fully_shard(Mixed(), options), "reduce_dtype", "Double", "not supported");
}

// ---- what goes wrong ----

/// Fails with the parts in the message, when the function does wrong on every rank; when it does on
/// the last one only, the others name that rank and module `where`. Leaves the module as it was,
/// and the communicator usable.
void check_refused(const fsdp::Communicator& comm, const InitFunction& wrong,
                   const std::string& where, const std::vector<std::string>& parts) {
  for (const bool everywhere : {true, false}) {
    Nested module(at::kMeta);
    std::vector<std::pair<const c10::StorageImpl*, std::int64_t>> before;
    std::vector<at::Tensor> tensors = module->parameters();
    for (const at::Tensor& buffer : module->buffers()) tensors.push_back(buffer);
    for (const at::Tensor& tensor : tensors) {
      before.emplace_back(tensor.storage().unsafeGetStorageImpl(), tensor._version());
    }
    fsdp::ShardOptions options;
    options.comm = comm;
    options.wrap = fsdp::wrap_modules(module->units());
    const bool mine = everywhere || comm.rank() == comm.world_size() - 1;
    options.param_init_fn = mine && !broken("no_error") ? wrong : InitFunction(init_with_reset);
    std::vector<std::string> told = parts;
    if (!mine) told = {"rank " + std::to_string(comm.world_size() - 1), where};
    harness::expect_error(__FILE__, __LINE__, [&] { fsdp::fully_shard(module, options); }, told);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      REQUIRE(tensors[i].is_meta() && tensors[i]._version() == before[i].second);
      REQUIRE(tensors[i].storage().unsafeGetStorageImpl() == before[i].first);
      REQUIRE(tensors[i].requires_grad() == (i < module->parameters().size()));
    }
    options.param_init_fn = init_with_reset;
    fsdp::fully_shard(module, options);
  }
}

/// `init_with_reset`, but another function for one module of the nested model.
InitFunction but_for(const std::string& class_name, std::int64_t width,
                     std::function<void(nn::Module&)> instead) {
  return [=](nn::Module& module) {
    auto* layer = module.as<LayerImpl>();
    const bool match = class_name == "Buffer" ? module.as<BufferImpl>() != nullptr
                                              : layer != nullptr && layer->weight.size(0) == width;
    match ? instead(module) : init_with_reset(module);
  };
}

void what_is_refused(const fsdp::Communicator& comm) {
  const auto weight = [](nn::Module& module) { return module.as<LayerImpl>()->weight; };
  check_refused(comm, but_for("Layer", 3, [](nn::Module&) {}), "lin1",
                {"lin1.weight", "uninitialized"});
  check_refused(comm, but_for("Layer", 4, [&](nn::Module& module) {
                  weight(module).slice(0, 1).fill_(1);
                }), "l3.lin1", {"l3.lin1.weight", "uninitialized", "element 0"});
  check_refused(comm, but_for("Layer", 3, [&](nn::Module& module) {
                  weight(module).set_data(torch::ones({3, 3}));
                }), "lin1", {"lin1.weight", "param_init_fn", "[3, 3]", "[3, 2]"});
  check_refused(comm, but_for("Layer", 3, [&](nn::Module& module) {
                  weight(module).set_data(torch::ones({3, 2}, at::kDouble));
                }), "lin1", {"lin1.weight", "Double"});
  check_refused(comm, but_for("Buffer", 0, [](nn::Module&) {}), "l3.buf_mod",
                {"l3.buf_mod.buf", "uninitialized", "element 0"});
  check_refused(comm, but_for("Buffer", 0, [](nn::Module& module) {
                  module.as<BufferImpl>()->buf[2].zero_();
                }), "l3.buf_mod", {"l3.buf_mod.buf", "uninitialized"});
  check_refused(comm, but_for("Layer", 4, [](nn::Module&) {
                  throw std::runtime_error("no values today");
                }), "l3.lin1", {"no values today"});

  Nested module(at::kMeta);
  fsdp::ShardOptions options;
  options.comm = comm;
  options.param_init_fn = InitFunction();
  if (broken("no_error")) options.param_init_fn = init_with_reset;
  REQUIRE_THROWS(fsdp::fully_shard(module, options), "to be callable");
  // Deferred or not: it is looked at first.
  options.param_init_fn = InitFunction();
  REQUIRE_THROWS(fsdp::fully_shard(Nested(), options), "to be callable");
  REQUIRE_THROWS(fsdp::fully_shard(fsdp::deferred_init([] { return Nested(); }), options),
                 "to be callable");

  options.param_init_fn.reset();
  REQUIRE_THROWS(fsdp::fully_shard(Mixed(), options), "parameter 'lin2.weight'", "'lin2'",
                 "MatrixImpl", "fsdp::Resettable", "param_init_fn");
  struct CounterImpl : nn::Module {
    CounterImpl() { register_buffer("count", torch::zeros({}, at::kMeta)); }
  };
  REQUIRE_THROWS(fsdp::fully_shard(std::make_shared<CounterImpl>(), options), "buffer 'count'",
                 "CounterImpl");
  nn::BatchNorm1d half(3);
  fsdp::to_meta(*half);
  fsdp::detail::put_under(half->weight, torch::ones({3}));
  fsdp::detail::put_under(half->bias, torch::ones({3}));
  REQUIRE_THROWS(fsdp::fully_shard(half, options), "'running_mean'", "'weight'", "both");
  nn::Transformer transformer(nn::TransformerOptions(4, 2, 1, 1).dim_feedforward(8));
  fsdp::to_meta(*transformer);
  REQUIRE_THROWS(fsdp::fully_shard(transformer, options), "torch::nn::Transformer");
  REQUIRE_THROWS(fsdp::to_meta(*fsdp::fully_shard(nn::Linear(2, 2), options).module()),
                 "'weight'", "sharded");
}

// ---- LibTorch's own classes, and buffers of all types ----

struct ZooImpl : nn::Module {
  ZooImpl() {
    const auto add = [this](auto module) { register_module(std::to_string(count++), module); };
    add(nn::Linear(3, 4));
    add(nn::Bilinear(2, 3, 4));
    add(nn::Conv1d(nn::Conv1dOptions(2, 3, 2)));
    add(nn::Conv2d(nn::Conv2dOptions(4, 3, 2).groups(1).bias(false)));
    add(nn::Conv3d(nn::Conv3dOptions(2, 3, 2)));
    add(nn::ConvTranspose1d(nn::ConvTranspose1dOptions(2, 3, 2)));
    add(nn::ConvTranspose2d(nn::ConvTranspose2dOptions(2, 3, 2)));
    add(nn::ConvTranspose3d(nn::ConvTranspose3dOptions(2, 3, 2)));
    add(nn::Embedding(nn::EmbeddingOptions(5, 3).padding_idx(1)));
    add(nn::EmbeddingBag(5, 3));
    add(nn::LayerNorm(nn::LayerNormOptions({4})));
    add(nn::GroupNorm(2, 4));
    add(nn::BatchNorm1d(3));
    add(nn::BatchNorm2d(nn::BatchNorm2dOptions(3).affine(false)));
    add(nn::BatchNorm3d(3));
    add(nn::InstanceNorm1d(nn::InstanceNorm1dOptions(3).affine(true).track_running_stats(true)));
    add(nn::InstanceNorm2d(nn::InstanceNorm2dOptions(3).affine(true)));
    add(nn::InstanceNorm3d(nn::InstanceNorm3dOptions(3).affine(true)));
    add(nn::RNN(nn::RNNOptions(3, 4).num_layers(2)));
    add(nn::LSTM(nn::LSTMOptions(3, 4).bidirectional(true)));
    add(nn::GRU(3, 4));
    add(nn::RNNCell(3, 4));
    add(nn::LSTMCell(3, 4));
    add(nn::GRUCell(3, 4));
    add(nn::PReLU(nn::PReLUOptions().num_parameters(3).init(0.3)));
  }
  int count = 0;
};
TORCH_MODULE(Zoo);

void library_modules(const fsdp::Communicator& comm) {
  fsdp::ShardOptions options;
  options.comm = comm;
  for (const auto& wrap : {fsdp::WrapPolicy(), fsdp::wrap_always()}) {
    torch::manual_seed(5);
    Zoo reference;
    Zoo module = fsdp::deferred_init([] { return Zoo(); });
    fsdp::to_meta(*module);
    options.wrap = wrap;
    torch::manual_seed(5);
    auto model = fsdp::fully_shard(module, options);
    check_shards(model, reference->parameters(), false, "as constructed");
    const auto buffers = module->named_buffers();
    REQUIRE(buffers.size() == reference->buffers().size() && buffers.size() > 8);
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      REQUIRE(buffers[i].value().dtype() == reference->buffers()[i].dtype());
      REQUIRE_SAY(same_bits(buffers[i].value(), reference->buffers()[i]), buffers[i].key());
    }
  }
  // An attention initializes its output layer's bias.
  nn::MultiheadAttention attention(4, 2);
  fsdp::to_meta(*attention);
  options.wrap = fsdp::wrap_always();
  auto model = fsdp::fully_shard(attention, options);
  const auto full = full_parameters(model);
  const auto names = model.named_parameters().keys();
  for (std::size_t i = 0; i < full.size(); ++i) {
    const bool zero = full[i].eq(0).all().item<bool>();
    REQUIRE_SAY(zero == (names[i].find("bias") != std::string::npos), names[i]);
  }
}

void buffers_of_all_types(const fsdp::Communicator& comm) {
  struct ManyImpl : nn::Module {
    ManyImpl() {
      register_parameter("p", torch::empty({2}, at::kMeta));
      for (const auto type :
           {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
            at::kChar, at::kByte, at::kBool, at::kComplexFloat}) {
        register_buffer(c10::toString(type),
                        torch::empty({3}, torch::dtype(type).device(at::kMeta)));
      }
      register_buffer("empty", torch::empty({0}, at::kMeta));
    }
  };
  fsdp::ShardOptions options;
  options.comm = comm;
  const auto fill = [](nn::Module& module, const std::string& but, double value) {
    module.named_parameters()["p"].fill_(1);
    for (const auto& item : module.named_buffers()) {
      if (item.key() != but) item.value().fill_(value);
    }
  };
  // 0xa5 and 0xa5f5 are values, too, when somebody writes them.
  for (const double value : {0.0, 1.0, -91.0, -23051.0}) {
    auto module = std::make_shared<ManyImpl>();
    options.param_init_fn = [&](nn::Module& m) {
      fill(m, "", 0);
      for (const auto& item : m.named_buffers()) {
        if (item.key() == "Byte") item.value().fill_(0xa5);
        else if (item.key() == "Char") item.value().fill_(std::max(value, -91.0));
        else if (item.key() != "Bool") item.value().fill_(value);
      }
    };
    fsdp::fully_shard(module, options);
    REQUIRE(module->named_buffers()["Short"].eq(value).all().item<bool>());
    REQUIRE(module->named_buffers()["Byte"].eq(0xa5).all().item<bool>());
  }
  for (const auto& item : ManyImpl().named_buffers()) {
    if (item.key() == "empty") continue;
    options.param_init_fn = [&](nn::Module& m) { fill(m, item.key(), 1); };
    if (broken("no_error")) options.param_init_fn = [&](nn::Module& m) { fill(m, "", 1); };
    REQUIRE_THROWS(fsdp::fully_shard(std::make_shared<ManyImpl>(), options),
                   "buffer '" + item.key() + "'", "uninitialized");
  }
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv,
                 {{"one level", [](auto comm) { like_regular<Simple>(comm, "simple"); }},
                  {"nested", [](auto comm) { like_regular<Nested>(comm, "nested"); }},
                  {"mixed precision", mixed_precision},
                  {"what is refused", what_is_refused},
                  {"LibTorch's modules", library_modules},
                  {"buffers of all types", buffers_of_all_types}});
}

const harness::Program program("scenario_meta", run_program);

}  // namespace
}  // namespace scenario_meta
