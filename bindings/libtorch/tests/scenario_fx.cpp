// Execution order without data: tracing a forward on meta tensors gives PyTorch's records of the
// same model, whatever its parameters are, and leaves nothing changed. The order serves as the
// engine's prefetch order and as its wrap policy.
//
// Breaks: missing_second_use, swapped_order, unannounced_leaf, leaves_trace, no_prefetch,
// no_average.
#include "scenario.hpp"

namespace scenario_fx {
namespace {

using namespace scenario;
namespace nn = torch::nn;

/// A module that owns no parameters and says when it runs.
struct ReluImpl : nn::Module {
  at::Tensor forward(const at::Tensor& x) {
    if (broken("unannounced_leaf")) return torch::relu(x);
    const fsdp::ModuleScope scope(*this);
    return torch::relu(x);
  }
};
TORCH_MODULE(Relu);

struct ModelImpl : nn::Module {
  ModelImpl()
      : weight1(register_parameter("weight1", torch::randn({6, 6}))),
        weight2(register_parameter("weight2", torch::randn({6, 6}))),
        weight_unused(register_parameter("weight_unused", torch::randn({2, 2}))),
        layer0(register_module("layer0", nn::Linear(6, 6))),
        layer1(register_module("layer1", nn::Linear(nn::LinearOptions(6, 6).bias(false)))),
        layer2(register_module("layer2", nn::Sequential())),
        relu(register_module("relu", Relu())) {
    layer2->push_back(nn::Linear(nn::LinearOptions(6, 3).bias(false)));
    layer2->push_back(Relu());
    layer2->push_back(nn::Linear(nn::LinearOptions(3, 6).bias(false)));
    register_buffer("calls", torch::zeros({}, at::kLong));
  }
  at::Tensor forward(const at::Tensor& x, bool run_all_layers) {
    const fsdp::ModuleScope scope(*this);
    named_buffers()["calls"].add_(1);
    at::Tensor z = relu(layer0(x));
    const auto mix = [&] { z = z.matmul(weight1); };
    if (broken("swapped_order")) mix();
    z = relu(layer2->forward(z));
    if (!broken("swapped_order")) mix();
    if (run_all_layers) {
      z = relu(layer1(z));
      z = z.matmul(weight2);
      if (!broken("missing_second_use")) z = relu(layer0(x));
    }
    return z;
  }
  at::Tensor weight1, weight2, weight_unused;
  nn::Linear layer0, layer1;
  nn::Sequential layer2;
  Relu relu;
};
TORCH_MODULE(Model);

Model make() {
  torch::manual_seed(0);
  return Model();
}

// ---- comparing with PyTorch ----

std::string quoted(const std::string& text) { return '"' + text + '"'; }

template <class Items, class Text>
std::string json(const Items& items, Text text) {
  std::string list = "[";
  for (const auto& item : items) {
    if (list.size() > 1) list += ',';
    list += text(item);
  }
  list += ']';
  return list;
}

void check_trace(const fsdp::ExecutionTrace& trace, const Model& model, const Data& data,
                 const std::string& which) {
  const auto equal = [&](const std::string& got, const std::string& what) {
    const std::string wanted = data.about("/traces/" + which + "/" + what);
    REQUIRE_SAY(got == wanted, which << ", " << what << ": " << got << ", not " << wanted);
  };
  const auto name = [](const auto& named) { return quoted(named.name); };
  equal(json(trace.module_forward_order, name), "module_forward_order");
  equal(json(trace.param_forward_order, name), "param_forward_order");
  for (const auto& module : trace.module_forward_order) {
    REQUIRE(module.name.empty() ? module.module == model.get()
                                : module.module == model->named_modules()[module.name].get());
    const auto& usages = trace.module_to_param_usage_infos.at(module.module);
    equal(json(usages,
               [&](const auto& usage) {
                 return '[' + quoted(usage.module.name) + ',' + json(usage.params, name) + ']';
               }),
          "module_to_param_usage_infos/" + module.name);
    for (const auto& usage : usages) {
      for (const auto& param : usage.params) {
        REQUIRE(param.param.is_same(usage.module.module->named_parameters()[param.name]));
      }
    }
  }
  REQUIRE(trace.visited_params.size() == trace.param_forward_order.size());
  std::vector<std::string> visited;
  for (const auto& item : model->named_parameters()) {
    if (trace.visited_params.count(item.value().unsafeGetTensorImpl()) != 0) {
      visited.push_back(quoted(item.key()));
    }
  }
  std::sort(visited.begin(), visited.end());
  equal(json(visited, [](const std::string& text) { return text; }), "visited_params");
}

/// All that tracing might change.
struct State {
  explicit State(const Model& model) {
    std::vector<at::Tensor> tensors = model->parameters();
    for (const at::Tensor& buffer : model->buffers()) tensors.push_back(buffer);
    for (const at::Tensor& tensor : tensors) {
      said << tensor.unsafeGetTensorImpl() << " " << tensor.storage().unsafeGetStorageImpl() << " "
           << tensor.storage_offset() << " " << tensor.strides() << tensor.toString() << " "
           << tensor.unsafeGetTensorImpl()->key_set() << " " << tensor._version() << " "
           << tensor.requires_grad() << tensor.is_leaf() << tensor.grad().defined() << "\n";
      if (!tensor.is_meta()) said << tensor.detach() << "\n";
    }
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    said << generator.get_state().to(at::kLong).sum().item<std::int64_t>() << " "
         << at::GradMode::is_enabled() << (fsdp::detail::active_tracer == nullptr)
         << c10::impl::tls_local_dispatch_key_set().included_
         << c10::impl::tls_local_dispatch_key_set().excluded_;
  }
  std::ostringstream said;
};

fsdp::ExecutionTrace trace_of(Model model, bool run_all_layers) {
  return fsdp::trace_forward(model, [&] {
    const at::Tensor y = model->forward(torch::empty({8, 6}, at::kMeta), run_all_layers);
    REQUIRE(y.is_meta() && y.sizes() == at::IntArrayRef({8, 6}) && !y.requires_grad());
    torch::rand({3});  // a model may draw numbers
  });
}

void records(const fsdp::Communicator&) {
  const Data data("fx", 0);
  Model meta = make();
  fsdp::to_meta(*meta);
  for (const Model& model : {make(), meta, fsdp::deferred_init([] { return make(); })}) {
    for (const bool all : {true, false}) {
      const State before(model);
      const auto trace = trace_of(model, all);
      if (broken("leaves_trace")) model->weight1.unsafeGetTensorImpl()->bump_version();
      const State after(model);
      REQUIRE_SAY(before.said.str() == after.said.str(),
                  before.said.str() << "\nbecame\n" << after.said.str());
      check_trace(trace, model, data, all ? "all" : "some");
    }
  }
  // A deferred model is as good as before.
  Model deferred = fsdp::deferred_init([] { return make(); });
  trace_of(deferred, true);
  fsdp::materialize_module(*deferred);
  Model eager = make();
  for (std::size_t i = 0; i < eager->parameters().size(); ++i) {
    check_same(deferred->parameters()[i], eager->parameters()[i], "deferred parameter");
    check_same(eager->parameters()[i], data["initial." + eager->named_parameters()[i].key()],
               "initial parameter");
  }
}

/// A forward that throws in the middle of a module leaves nothing behind either; nor does one that
/// looks at values.
void failures(const fsdp::Communicator&) {
  Model model = make();
  const State before(model);
  const auto unchanged = [&] {
    const State after(model);
    REQUIRE_SAY(before.said.str() == after.said.str(), after.said.str());
  };
  REQUIRE_THROWS(fsdp::trace_forward(model, [&] {
    const fsdp::ModuleScope scope(*model->relu);
    model->layer2->forward(torch::empty({8, 6}, at::kMeta));
    throw std::runtime_error("in the middle");
  }), "in the middle");
  unchanged();
  REQUIRE_THROWS(fsdp::trace_forward(model, [&] { model->weight1.sum().item<float>(); }),
                 "aten::item", "values");
  unchanged();
  REQUIRE_THROWS(fsdp::trace_forward(model, [&] { model->weight1.data_ptr<float>()[0] = 1; }), "");
  unchanged();
  // Scopes outside of a trace, of other modules, and of a trace inside another one do nothing.
  const fsdp::ModuleScope outside(*model->relu);
  Model other = make();
  const auto trace = fsdp::trace_forward(model, [&] {
    const fsdp::ModuleScope foreign(*other->relu);
    REQUIRE(trace_of(other, true).module_forward_order.size() == 12 ||
            broken("missing_second_use") || broken("unannounced_leaf"));
    model->layer1(torch::empty({2, 6}, at::kMeta));
  });
  REQUIRE(trace.module_forward_order.size() == 2 && trace.param_forward_order.size() == 1);
  unchanged();
  // A view that outlives the trace is an ordinary meta tensor.
  at::Tensor kept;
  fsdp::trace_forward(model, [&] { kept = model->weight1.t(); });
  REQUIRE(kept.is_meta() && kept.add(1).is_meta());
  unchanged();
}

/// What the tracer infers for LibTorch's modules, tied parameters and repeated calls.
struct LanguageImpl : nn::Module {
  struct HeadImpl : nn::Module {
    explicit HeadImpl(const at::Tensor& shared)
        : weight(register_parameter("weight", shared)) {}
    at::Tensor forward(const at::Tensor& x) { return torch::linear(x, weight); }
    at::Tensor weight;
  };
  LanguageImpl()
      : embed(register_module("embed", nn::Embedding(11, 6))),
        blocks(register_module("blocks", nn::ModuleList())),
        head(register_module("head", std::make_shared<HeadImpl>(embed->weight))) {
    for (int i = 0; i < 2; ++i) {
      nn::Sequential block;
      block->push_back("norm", nn::BatchNorm1d(6));
      block->push_back("linear", nn::Linear(6, 6));
      block->push_back("act", nn::Functional([](const at::Tensor& x) {
                         return torch::dropout(x, 0.5, true);
                       }));
      blocks->push_back(block);
    }
  }
  at::Tensor forward(const at::Tensor& tokens) {
    at::Tensor x = embed(tokens);
    for (const int i : {0, 1, 0}) x = blocks->ptr<nn::SequentialImpl>(i)->forward(x);
    return head->forward(x);
  }
  nn::Embedding embed;
  nn::ModuleList blocks;
  std::shared_ptr<HeadImpl> head;
};
TORCH_MODULE(Language);

void inferred(const fsdp::Communicator&) {
  Language model;
  const auto buffers = model->buffers();
  const at::Tensor mean = buffers[0].clone();
  const auto trace = fsdp::trace_forward(model, [&] {
    model->forward(torch::empty({4}, torch::dtype(at::kLong).device(at::kMeta)));
  });
  std::vector<std::string> order;
  for (const auto& module : trace.module_forward_order) order.push_back(module.name);
  const std::vector<std::string> wanted = {
      "",        "embed",           "blocks",   "blocks.0",      "blocks.0.norm", "blocks.0.linear",
      "blocks.1", "blocks.1.norm", "blocks.1.linear", "blocks.0", "blocks.0.norm",
      "blocks.0.linear", "head"};
  REQUIRE_SAY(order == wanted, c10::Join(" ", order));
  // The tied weight counts where it was used first.
  REQUIRE(trace.param_forward_order.size() == 9);
  REQUIRE(trace.param_forward_order[0].name == "embed.weight");
  REQUIRE(same_bits(buffers[0], mean) && buffers[2].item<std::int64_t>() == 0);
}

// ---- the order in use ----

void prefetch_and_wrap(const fsdp::Communicator& comm) {
  const Data data("fx", 0);
  const int ranks = comm.world_size();
  Model reference = make();
  const auto params = reference->parameters();
  average_gradients(params, ranks, [&](int rank) {
    reference->forward(data["input"][rank].clone(), false).sum().backward();
  });
  for (const auto strategy : {fsdp::Strategy::full_shard, fsdp::Strategy::shard_grad_op}) {
    for (const bool prefetch : {true, false}) {
      Model module = make();
      const auto trace = trace_of(module, false);
      fsdp::ShardOptions options;
      options.comm = comm;
      options.strategy = strategy;
      // layer0 has 42 elements, layer2 36 in two modules of 18; layer1 was not called.
      options.wrap = fsdp::wrap_traced(trace, 20);
      if (prefetch && !broken("no_prefetch")) options.prefetch_order = trace;
      auto model = fsdp::fully_shard(module, options);
      REQUIRE(unit_names(model.engine()) == std::vector<std::string>({"", "layer0", "layer2"}));
      for (int step = 0; step < 2; ++step) {
        model.zero_grad();
        const at::Tensor loss =
            model.forward(data["input"][comm.rank()].clone(), false).sum();
        check_same(loss, data["loss"][comm.rank()], "loss", 1e-6);
        loss.backward();
        break_average(model);
        check_shards(model, params, true, "traced");
      }
      REQUIRE_SAY((model.stats().prefetches > 0) == prefetch,
                  model.stats().prefetches << " prefetches");
      const auto names = model.named_parameters().keys();
      const auto full = full_parameters(model, true);
      for (std::size_t i = 0; i < full.size(); ++i) {
        if (!params[i].grad().defined()) continue;
        const at::Tensor wanted = data["grad." + names[i]].slice(0, 0, ranks).mean(0);
        check_same(full[i], wanted, "gradient of " + names[i], 1e-6);
      }
      REQUIRE_THROWS(trace_of(module, true), "is sharded");
    }
  }
  // The order of a module of another shape.
  fsdp::ShardOptions options;
  options.comm = comm;
  nn::Linear small(2, 2);
  options.prefetch_order =
      fsdp::trace_forward(small, [&] { small(torch::empty({1, 2}, at::kMeta)); });
  REQUIRE_THROWS(fsdp::fully_shard(make(), options), "trace");
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv,
                 {{"what is recorded", records},
                  {"failures", failures},
                  {"what is inferred", inferred},
                  {"prefetch order and wrap policy", prefetch_and_wrap}});
}

const harness::Program program("scenario_fx", run_program);

}  // namespace
}  // namespace scenario_fx
