// What deferred construction promises besides values: errors that name the operator and leave
// nothing behind, scopes, threads, memory, and filling memory that somebody else provides.
#include <atomic>
#include <fstream>
#include <thread>

#include "deferred.hpp"

namespace test_deferred_rules {
namespace {

using namespace harness;
namespace nn = torch::nn;
using fsdp::deferred_init;
using fsdp::is_deferred;
using fsdp::materialize_module;
using fsdp::materialize_tensor;

/// `action`, inside deferred_init and on a deferred tensor afterwards, throws an error with these
/// parts; the generator is as before, and the tensor that it got is none the worse.
void refuses(const std::function<void(at::Tensor)>& action, const std::vector<std::string>& parts) {
  torch::manual_seed(3);
  const at::Tensor expected = torch::randn({3, 4});
  for (const bool inside : {true, false}) {
    torch::manual_seed(3);
    at::Tensor tensor = deferred_init([] { return torch::randn({3, 4}); });
    const at::Tensor state = default_state();
    harness::expect_error(
        __FILE__, __LINE__,
        [&] { inside ? deferred_init([&] { action(tensor); }) : action(tensor); }, parts);
    REQUIRE(torch::equal(state, default_state()));
    REQUIRE(!c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::DeferredInit));
    REQUIRE(!is_deferred(torch::ones({2})));
    require_same(expected, materialize_tensor(tensor), parts.at(0));
  }
}

void errors(const fsdp::Communicator&) {
  at::Tensor real = torch::ones({3, 4});
  const auto values = [](const std::function<void(at::Tensor)>& action, const std::string& op) {
    refuses(action, {"aten::" + op + " cannot be recorded by fsdp::deferred_init", "values"});
  };
  values([](at::Tensor t) { t.sum().item<float>(); }, "item");
  values([](at::Tensor t) { torch::equal(t, t); }, "equal");
  values([](at::Tensor t) { torch::allclose(t, t + 1); }, "allclose");
  values([](at::Tensor t) { (void)t.sum().is_nonzero(); }, "is_nonzero");
  values([](at::Tensor t) { torch::nonzero(t); }, "nonzero");
  values([](at::Tensor t) { t.index({t > 0}); }, "index");
  values([](at::Tensor t) { torch::masked_select(t, t > 0); }, "masked_select");
  values([](at::Tensor t) { torch::_unique2(t); }, "_unique2");
  values([](at::Tensor t) { torch::bincount(t.to(torch::kLong)); }, "bincount");
  values([](at::Tensor t) { torch::repeat_interleave(t[0].to(torch::kLong)); },
         "repeat_interleave");
  for (const at::Device device : {at::Device("cuda:1"), at::Device("xpu")}) {
    refuses([&](at::Tensor t) { t.to(device); }, {"aten::to", device.str()});
    refuses([&](at::Tensor t) { torch::zeros_like(t, device); },
            {"aten::zeros_like", device.str()});
  }
  REQUIRE_THROWS(deferred_init([] { torch::ones({4}, torch::kCUDA); }), "aten::ones", "cuda");
  refuses([&](at::Tensor t) { real.copy_(t); }, {"aten::copy_", "has data"});
  refuses([&](at::Tensor t) { real[0].add_(t[1]); }, {"aten::add_", "has data"});
  refuses([&](at::Tensor t) { torch::mul_out(real, t, t); }, {"aten::mul", "has data"});
  refuses([&](at::Tensor t) { t.set_(real); }, {"aten::set_", "has data"});
  refuses([&](at::Tensor t) { t.set_data(real); }, {"set_data"});
  refuses([&](at::Tensor t) { real.set_data(t); }, {"set_data"});
  REQUIRE(torch::equal(real, torch::ones({3, 4})));
  refuses([](at::Tensor t) { t.to_sparse(); }, {"aten::to_sparse", "dense"});
  refuses([&](at::Tensor t) { t.mul(real.to_sparse()); }, {"aten::mul", "dense"});
  refuses([](at::Tensor t) { t.add(torch::ones({5})); }, {"aten::add", "size"});
  refuses([](at::Tensor t) { t.add_(torch::ones({5})); }, {"aten::add_", "size"});
  refuses([](at::Tensor t) { t.normal_(0, -1); }, {"aten::normal_", "std"});
  refuses([](at::Tensor t) { t.uniform_(1, 0); }, {"aten::uniform_"});
  refuses([](at::Tensor t) { t.exponential_(-1); }, {"aten::exponential_"});
  refuses([](at::Tensor t) { torch::multinomial(t - 100, 2); }, {"aten::multinomial"});
  const at::Tensor trained = torch::ones({4}).requires_grad_();
  refuses([&](at::Tensor t) { t.mul(trained); }, {"aten::mul", "gradient"});
  refuses([](at::Tensor t) { t.clone().requires_grad_().fill_(1); }, {"aten::fill_", "leaf"});
  // Pointers to data.
  refuses([](at::Tensor t) { t.data_ptr<float>(); }, {"no data yet", "fsdp::deferred_init"});
  refuses([](at::Tensor t) { t.const_data_ptr<float>(); }, {"no data yet"});
  refuses([](at::Tensor t) { t.accessor<float, 2>(); }, {"no data yet"});
  refuses([](at::Tensor t) { t.view(-1).slice(0, 1).data_ptr(); }, {"no data yet"});
  refuses([](at::Tensor t) { std::ostringstream() << t; }, {"no data yet"});
  REQUIRE_THROWS(deferred_init([] { torch::zeros({4}).data_ptr(); }), "no data yet");
}

void large_shapes(const fsdp::Communicator&) {
  // No meta kernel says the shape, and it is not worth so much memory.
  at::Tensor t = deferred_init([] { return torch::zeros({64 << 20}); });
  REQUIRE_THROWS(torch::where(t > 0, t, t), "aten::where", "cannot be recorded");
}

void scopes(const fsdp::Communicator&) {
  struct Oops : std::runtime_error {
    Oops() : std::runtime_error("oops") {}
  };
  const auto plain = [] {
    return !is_deferred(torch::ones({2})) && !is_deferred(nn::Linear(2, 2)->weight);
  };
  REQUIRE(plain());
  const std::size_t before = fsdp::detail::deferred_log().size();
  REQUIRE_THROWS(deferred_init([]() -> nn::Linear {
                   nn::Linear made(3, 3);
                   throw Oops();
                 }),
                 "oops");
  REQUIRE(plain() && fsdp::detail::deferred_log().size() == before);
  deferred_init([&] {
    REQUIRE(is_deferred(torch::ones({2})));
    const at::Tensor inner = deferred_init([] { return torch::ones({2}); });
    REQUIRE(is_deferred(inner) && is_deferred(torch::ones({2})));
    REQUIRE_THROWS(deferred_init([] { throw Oops(); }), "oops");
    REQUIRE(is_deferred(torch::ones({2})));
    {
      const fsdp::detail::DeferredPause pause;
      REQUIRE(plain());
      REQUIRE(is_deferred(inner + 1));
      REQUIRE(is_deferred(deferred_init([] { return torch::ones({2}); })));
    }
    REQUIRE(is_deferred(torch::ones({2})));
    // Making tensors inside of the scope.
    const at::Tensor made = materialize_tensor(inner * 3);
    REQUIRE(made.sum().item<float>() == 6);
    nn::Linear layer(2, 3);
    materialize_module(*layer);
    REQUIRE(!is_deferred(*layer));
  });
  REQUIRE(plain());
  // What make() returns comes back as it is.
  nn::Linear known(2, 2);
  nn::Linear& reference = deferred_init([&]() -> nn::Linear& { return known; });
  REQUIRE(&reference == &known);
  REQUIRE(deferred_init([] { return std::make_unique<int>(4); }) != nullptr);
  REQUIRE(!is_deferred(at::Tensor()) && !is_deferred(*known));
  REQUIRE(materialize_tensor(known->weight).is_same(known->weight));
  // The record of a module that is gone is gone.
  for (int i = 0; i < 3; ++i) {
    deferred_init([] { return nn::Transformer(nn::TransformerOptions(8, 2, 2, 2)); });
    REQUIRE(fsdp::detail::deferred_log().size() == before);
  }
  // And what only temporaries needed goes sooner or later.
  const at::Tensor sum = deferred_init([] {
    at::Tensor result = torch::zeros({3});
    for (int i = 0; i < 5000; ++i) (torch::rand({3}) + i).mul_(2);
    return result.add_(torch::ones({3}));
  });
  REQUIRE(fsdp::detail::deferred_log().size() < before + 1000);
  REQUIRE(torch::equal(materialize_tensor(sum), torch::ones({3})));
}

void later_operators(const fsdp::Communicator&) {
  torch::manual_seed(5);
  nn::Linear eager(6, 17);
  nn::init::orthogonal_(eager->weight);
  nn::init::uniform_(eager->bias, -1, 1);
  torch::manual_seed(5);
  nn::Linear layer = deferred_init([] { return nn::Linear(6, 17); });
  const fsdp::detail::DeferredRecordPtr record = fsdp::detail::deferred_record(layer->weight);
  nn::init::orthogonal_(layer->weight);
  nn::init::uniform_(layer->bias, -1, 1);
  const at::Tensor state = default_state();
  const at::Tensor twice = layer->weight.detach() * 2;
  REQUIRE(is_deferred(twice));
  materialize_module(*layer);
  require_same(eager->weight, layer->weight, "weight");
  require_same(eager->bias, layer->bias, "bias");
  require_same(eager->weight.detach() * 2, materialize_tensor(twice), "twice");
  REQUIRE(torch::equal(state, default_state()));
  at::Tensor filled = torch::zeros({17, 6});
  fsdp::detail::replay_into(*record, filled);
  require_same(eager->weight.detach(), filled, "record");
  // The module trains like any other.
  for (nn::Linear& module : std::vector<nn::Linear>{eager, layer}) {
    torch::optim::SGD optimizer(module->parameters(), 0.1);
    module->forward(torch::ones({2, 6})).pow(2).sum().backward();
    optimizer.step();
  }
  require_same(eager->weight, layer->weight, "trained");
}

void sharing(const fsdp::Communicator&) {
  nn::Linear layer = deferred_init([] {
    nn::Linear made(4, 4);
    const torch::NoGradGuard no_grad;
    made->register_buffer("row", made->weight[1]);
    made->register_parameter("tied", made->weight);
    return made;
  });
  const at::Tensor stale = layer->weight.detach().view(-1);
  at::Tensor row = layer->named_buffers()["row"];
  materialize_module(*layer);
  REQUIRE(layer->named_parameters()["tied"].is_same(layer->weight) && layer->weight.is_leaf());
  {
    const torch::NoGradGuard no_grad;
    row.fill_(7);  // still a view of the weight
  }
  REQUIRE(layer->weight[1].eq(7).all().item<bool>() && layer->weight.eq(7).sum().item<int>() == 4);
  // A view that was left behind says so, rather than to write into the void.
  REQUIRE_THROWS(at::Tensor(stale).fill_(1), "aten::fill_", "made real");

  // A gradient accumulator from before expects gradients on the right device.
  at::Tensor weight = deferred_init([] { return torch::ones({3}).requires_grad_(); });
  const at::Tensor graph = weight * 2;
  struct Holder : nn::Module {
    explicit Holder(at::Tensor t) { register_parameter("t", std::move(t)); }
  } holder(weight);
  materialize_module(holder);
  (weight * 3).sum().backward();
  REQUIRE(torch::equal(weight.grad(), torch::full({3}, 3.f)));
}

void copies(const fsdp::Communicator&) {
  nn::Linear layer = deferred_init([] { return nn::Linear(4, 3); });
  // Outside, the copy's constructor makes real parameters, which cannot become deferred.
  REQUIRE_THROWS(layer->clone(), "set_data");
  nn::Linear twin = deferred_init(
      [&] { return nn::Linear(std::dynamic_pointer_cast<nn::LinearImpl>(layer->clone())); });
  layer->to(torch::kDouble);
  REQUIRE(is_deferred(*twin) && layer->weight.scalar_type() == torch::kDouble);
  materialize_module(*layer);
  materialize_module(*twin);
  REQUIRE(torch::equal(twin->weight.to(torch::kDouble), layer->weight));
  REQUIRE(twin->weight.scalar_type() == torch::kFloat);
  // As LibTorch does for meta tensors: saved without values; loading them into real ones fails.
  nn::Linear unmade = deferred_init([] { return nn::Linear(4, 3); });
  std::ostringstream out;
  torch::save(unmade, out);
  std::istringstream in(out.str());
  REQUIRE_THROWS(torch::load(twin, in), "set_data");
}

void fill_memory(const fsdp::Communicator&) {
  using namespace fsdp::detail;
  torch::manual_seed(9);
  nn::Linear eager(5, 7);
  torch::manual_seed(9);
  nn::Linear layer = deferred_init([] { return nn::Linear(5, 7); });
  const DeferredRecordPtr weight = deferred_record(layer->weight);
  const DeferredRecordPtr bias = deferred_record(layer->bias);
  REQUIRE(weight && bias && !deferred_record(eager->weight) && !deferred_record(at::Tensor()));
  const auto expect = [&](const at::Tensor& got, const std::string& what) {
    REQUIRE_SAY(torch::equal(eager->weight, got), what);
  };
  at::Tensor memory = torch::full({7, 5}, 5.f);
  const void* data = memory.data_ptr();
  const auto version = memory._version();
  replay_into(*weight, memory);
  expect(memory, "contiguous");
  REQUIRE(memory.data_ptr() == data && memory._version() > version);
  memory = torch::zeros({5, 7}).t();
  replay_into(*weight, memory);
  expect(memory, "transposed");
  memory = torch::zeros({9, 5}).narrow(0, 1, 7);
  replay_into(*weight, memory);
  expect(memory, "in the middle");
  REQUIRE_THROWS(replay_into(*weight, torch::zeros({5, 7})), "replay_into", "[7, 5]");
  REQUIRE_THROWS(replay_into(*weight, torch::zeros({7, 5}, torch::kDouble)), "Float");
  REQUIRE_THROWS(replay_into(*weight, torch::zeros({7, 5}, torch::kMeta)), "CPU");
  REQUIRE_THROWS(replay_into(*weight, at::Tensor()), "CPU");

  torch::manual_seed(9);
  const at::Tensor drawn = deferred_init([] { return torch::randn({4, 5}); });
  torch::manual_seed(9);
  memory = torch::zeros({4, 5});
  replay_into(*deferred_record(drawn), memory);
  require_same(torch::randn({4, 5}), memory, "a factory that computes");

  // What was never written stays as it is; what was written in part, in the rest.
  for (const bool partly : {false, true}) {
    const at::Tensor raw = deferred_init([&] {
      at::Tensor made = torch::empty({4});
      if (partly) made[1].fill_(2);
      return made;
    });
    memory = torch::full({4}, 5.f);
    const auto untouched = memory._version();
    replay_into(*deferred_record(raw), memory);
    REQUIRE(memory[0].item<float>() == 5 && memory[3].item<float>() == 5);
    REQUIRE(memory[1].item<float>() == (partly ? 2 : 5));
    REQUIRE((memory._version() > untouched) == partly);
  }

  // As in an init function: the leaves point at memory, materialize_module fills it.
  at::Tensor space = torch::zeros({7, 5});
  const fsdp::detail::TensorBackup backup(layer->weight);
  point_at(layer->weight, space);
  materialize_module(*layer, /*recurse=*/false);
  REQUIRE(space.eq(0).all().item<bool>());  // without a scope an ordinary tensor
  {
    DeferredScope outer;
    outer.add(layer->weight, weight);
    const DeferredScope inner;
    materialize_module(*layer);
    std::thread([&] { REQUIRE(DeferredScope::find(layer->weight) == nullptr); }).join();
  }
  expect(space, "scope");
  REQUIRE(DeferredScope::find(layer->weight) == nullptr);
  REQUIRE(torch::equal(layer->bias, eager->bias));
}

class TestTag final : public fsdp::detail::StorageTag {
 public:
  void before_operator(const c10::OperatorHandle&, const c10::TensorImpl&, bool) override {
    ++touches;
  }
  int touches = 0;
};

/// Sharded tensors inside deferred_init are tensors with data.
void with_sharded(const fsdp::Communicator&) {
  using namespace fsdp::detail;
  std::vector<float> data = {1, 2, 3};
  auto* tag = new TestTag();
  tag->retain();
  {
    const at::Tensor sharded =
        tagged_tensor(tagged_storage(data.data(), data.size() * sizeof(float), tag, at::kCPU), 0,
                      {3});
    REQUIRE(is_sharded(sharded) && !is_deferred(sharded));
    deferred_init([&] {
      REQUIRE(sharded.sum().item<float>() == 6 && tag->touches == 1);
      const at::Tensor deferred = torch::ones({3});
      REQUIRE(!is_sharded(deferred));
      REQUIRE_THROWS(deferred + sharded, "aten::add", "sharded", "deferred");
      REQUIRE_THROWS(torch::stack({sharded, deferred}), "aten::stack", "sharded", "deferred");
      REQUIRE_THROWS(at::Tensor(sharded).copy_(deferred), "aten::copy_", "sharded", "deferred");
    });
  }
  tag->release();
}

void threads(const fsdp::Communicator&) {
  torch::manual_seed(21);
  const nn::Linear eager(33, 9);
  std::atomic<bool> failed{false};
  const auto work = [&](int index) {
    try {
      for (int round = 0; round < 40; ++round) {
        at::Tensor value;
        const auto make = [&] {
          at::Tensor t = torch::full({9}, index);
          at::Generator own = at::make_generator<at::CPUGeneratorImpl>(17);
          return torch::empty({33}).normal_(0, 1, own) * t.sum();
        };
        if (index == 0) {  // the other thread records all the while
          REQUIRE(!is_deferred(torch::ones({2})));
          continue;
        }
        const at::Tensor deferred = deferred_init(make);
        REQUIRE(is_deferred(deferred));
        REQUIRE(torch::equal(materialize_tensor(deferred), make()));
      }
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      failed = true;
    }
  };
  std::vector<std::thread> running;
  for (int index = 0; index < 3; ++index) running.emplace_back(work, index);
  for (std::thread& thread : running) thread.join();
  REQUIRE(!failed);
  // Made on one thread, replayed on another.
  torch::manual_seed(21);
  nn::Linear layer = deferred_init([] { return nn::Linear(33, 9); });
  std::thread([&] { materialize_module(*layer); }).join();
  REQUIRE(torch::equal(eager->weight, layer->weight) && torch::equal(eager->bias, layer->bias));
}

std::int64_t kib(const std::string& field) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind(field + ":", 0) == 0) return std::stoll(line.substr(field.size() + 1));
  }
  throw Failure("no " + field);
}

void memory(const fsdp::Communicator&) {
  // Whatever LibTorch allocates once is not to be counted.
  materialize_module(*deferred_init([] { return nn::Linear(64, 64); }));
  const std::int64_t before = kib("VmRSS");
  constexpr std::int64_t kAllowed = 32 << 10;  // KiB
  const auto model = deferred_init([] {
    const torch::NoGradGuard no_grad;
    auto module = std::make_shared<nn::Module>();
    at::Tensor w = module->register_parameter("w", torch::empty({32 << 10, 32 << 10}));  // 4 GiB
    w.uniform_(-1, 1);
    w.mul_(0.5).add_(w.exp()).narrow(0, 5, 7).zero_();
    module->register_parameter("product", w.matmul(w));
    module->register_buffer("normal", torch::randn({16 << 20}));
    return module;
  });
  REQUIRE(is_deferred(*model));
  REQUIRE(model->parameters()[0].nbytes() == std::size_t{4} << 30);
  REQUIRE_SAY(kib("VmHWM") - before < kAllowed, kib("VmHWM") - before << " KiB more at the peak");
  REQUIRE_SAY(kib("VmRSS") - before < kAllowed, kib("VmRSS") - before << " KiB more");

  // A replay lets go of what is not needed any more: here 20 tensors of 64 MiB.
  const at::Tensor chain = deferred_init([] {
    at::Tensor link = torch::zeros({16 << 20});
    for (int i = 0; i < 20; ++i) link = link + 1;
    return link;
  });
  REQUIRE(materialize_tensor(chain)[5].item<float>() == 20);
  REQUIRE_SAY(kib("VmHWM") - before < (256 << 10), kib("VmHWM") - before << " KiB at the peak");
}

int run_program(int argc, char** argv) {
  return main_of(argc, argv,
                 {{"errors", errors},
                  {"large shapes", large_shapes},
                  {"scopes", scopes},
                  {"operators after deferred_init", later_operators},
                  {"sharing", sharing},
                  {"copies", copies},
                  {"filling memory", fill_memory},
                  {"with sharded tensors", with_sharded},
                  {"threads", threads},
                  {"memory", memory}});
}

const harness::Program program("test_deferred_rules", run_program);

}  // namespace
}  // namespace test_deferred_rules
