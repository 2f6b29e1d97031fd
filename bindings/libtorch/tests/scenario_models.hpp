// The models of the scenarios about modules without storage, and how their cases are checked.
#pragma once

#include <utility>

#include "scenario.hpp"

namespace scenario {

/// A linear layer whose values depend on its shape only.
struct LayerImpl : torch::nn::Module, fsdp::Resettable {
  LayerImpl(std::int64_t in, std::int64_t out, at::Device device)
      : weight(register_parameter("weight", torch::empty({out, in}, device))) {
    LayerImpl::reset_parameters();
  }
  void reset_parameters() override {
    torch::manual_seed(42);
    if (broken("uninitialized") && weight.size(0) == 3) return;
    torch::nn::init::xavier_uniform_(weight, 1.0);
    const torch::NoGradGuard no_grad;
    if (broken("wrong_init") && weight.size(0) == 3) weight.mul_(1.5);
  }
  at::Tensor forward(const at::Tensor& x) { return torch::linear(x, weight); }
  at::Tensor weight;
};
TORCH_MODULE(Layer);

/// A module that owns a buffer and no parameter.
struct BufferImpl : torch::nn::Module, fsdp::Resettable {
  explicit BufferImpl(at::Device device)
      : buf(register_buffer("buf", torch::empty({3, 3}, device))) {
    BufferImpl::reset_parameters();
  }
  void reset_parameters() override {
    if (broken("buffer_not_filled") && !buf.is_meta()) return;
    torch::manual_seed(42);
    torch::nn::init::xavier_uniform_(buf, 0.5);
  }
  at::Tensor buf;
};
TORCH_MODULE(Buffer);

struct SimpleImpl : torch::nn::Module {
  explicit SimpleImpl(at::Device device = at::kCPU)
      : lin1(register_module("lin1", Layer(2, 4, device))),
        lin2(register_module("lin2", Layer(4, 2, device))),
        buf_mod(register_module("buf_mod", Buffer(device))) {}
  at::Tensor forward(const at::Tensor& x) { return lin2(lin1(x)); }
  std::vector<const torch::nn::Module*> units() { return {}; }
  Layer lin1, lin2;
  Buffer buf_mod;
};
TORCH_MODULE(Simple);

struct NestedImpl : torch::nn::Module {
  explicit NestedImpl(at::Device device = at::kCPU)
      : lin1(register_module("lin1", Layer(2, 3, device))),
        lin2(register_module("lin2", Layer(3, 2, device))),
        l3(register_module("l3", Simple(device))) {}
  at::Tensor forward(const at::Tensor& x) { return l3(lin2(lin1(x))); }
  std::vector<const torch::nn::Module*> units() { return {lin1.get(), l3.get()}; }
  Layer lin1, lin2;
  Simple l3;
};
TORCH_MODULE(Nested);

using InitFunction = std::function<void(torch::nn::Module&)>;

/// The three ways to wrap: each module, none but the root, and by hand.
template <class Holder>
std::vector<std::pair<std::string, fsdp::WrapPolicy>> wraps(Holder& module) {
  return {{"always", fsdp::wrap_always()},
          {"one unit", fsdp::WrapPolicy()},
          {"by hand", fsdp::wrap_modules(module->units())}};
}

/// Shards `module`, whose values do not exist yet, and a regular one; both must have PyTorch's
/// initial values and, after a step, each other's and PyTorch's. `name` is the model's in the data.
template <class Holder>
void check_like_regular(const fsdp::Communicator& comm, const std::string& name, Holder module,
                        std::size_t wrap, const std::optional<InitFunction>& init) {
  const Data data("meta", comm.world_size());
  const int rank = comm.rank();
  torch::manual_seed(400 + rank);
  const at::Tensor x = torch::randn({10, 2});
  check_same(x, data[name + ".input"][rank], "input");

  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = wraps(module)[wrap].second;
  options.param_init_fn = init;
  auto model = REQUIRE_SUCCEEDS(fsdp::fully_shard(module, options));

  Holder regular_module, reference;
  fsdp::ShardOptions regular_options;
  regular_options.comm = comm;
  regular_options.wrap = wraps(regular_module)[wrap].second;
  auto regular = fsdp::fully_shard(regular_module, regular_options);

  const std::string what = name + ", " + wraps(module)[wrap].first;
  check_file(model, data, name + ".initial");
  const auto buffers = module->named_buffers();
  REQUIRE(buffers.size() == 1);
  for (const auto& item : buffers) {
    check_same(item.value(), data[name + ".initial." + item.key()], item.key());
  }
  const auto params = reference->parameters();
  check_shards(model, params, false, what);
  check_shards(regular, params, false, what + ", regular");

  average_gradients(params, comm.world_size(), [&](int r) {
    reference->forward(data[name + ".input"][r].clone()).sum().backward();
  });
  plain_sgd(1e-3)(params)->step();
  for (auto* sharded : {&model, &regular}) {
    auto optimizer = plain_sgd(1e-3)(sharded->parameters());
    const at::Tensor loss = sharded->forward(x).sum();
    check_same(loss, data[name + ".loss"][rank], what + ": loss", 1e-6);
    loss.backward();
    break_average(*sharded);
    check_shards(*sharded, params, true, what);
    optimizer->step();
    check_shards(*sharded, params, false, what + ", after a step");
    check_file(*sharded, data, name + ".trained", 1e-6);
  }
}

}  // namespace scenario
