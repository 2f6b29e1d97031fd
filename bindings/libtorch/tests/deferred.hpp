// What the tests of deferred construction share: eager and deferred results side by side, bit by
// bit.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>

#include "fsdp/torch/deferred.hpp"
#include "harness.hpp"

namespace harness {

using Named = std::vector<std::pair<std::string, at::Tensor>>;

inline at::Tensor default_state() {
  return fsdp::detail::state_of(at::detail::getDefaultCPUGenerator());
}

inline std::string described(const at::Tensor& tensor) {
  std::ostringstream said;
  said << tensor.toString() << " " << tensor.sizes() << " strides " << tensor.strides();
  return said.str();
}

/// Fails unless both are real and have the same kind, shape, strides and bits.
inline void require_same(const at::Tensor& expected, const at::Tensor& got,
                         const std::string& name) {
  REQUIRE_SAY(!fsdp::is_deferred(got) && got.device().is_cpu(), name);
  REQUIRE_SAY(described(expected) == described(got),
              name << " is " << described(got) << ", not " << described(expected));
  REQUIRE_SAY(expected.requires_grad() == got.requires_grad(), name);
  const at::Tensor a = at::_conj_physical(expected.detach()).resolve_conj().contiguous();
  const at::Tensor b = at::_conj_physical(got.detach()).resolve_conj().contiguous();
  const bool same =
      a.numel() == 0 || std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
  REQUIRE_SAY(same, name << " has other values");
}

inline Named tensors_of(const torch::nn::Module& module) {
  Named named;
  for (const auto& item : module.named_parameters()) named.emplace_back(item.key(), item.value());
  for (const auto& item : module.named_buffers()) named.emplace_back(item.key(), item.value());
  return named;
}

enum class Order { forward, reverse, shuffled };

inline std::vector<std::size_t> indices(std::size_t count, Order order) {
  std::vector<std::size_t> result(count);
  for (std::size_t i = 0; i < count; ++i) result[i] = i;
  if (order == Order::reverse) std::reverse(result.begin(), result.end());
  if (order == Order::shuffled) std::shuffle(result.begin(), result.end(), std::mt19937(5));
  return result;
}

/// `make` returns a pointer to a module. Constructs it eagerly and deferred from one seed; both
/// must leave the generator alike, and give the same bits whatever is made first. `all_deferred`:
/// every tensor of it must have been, for a while.
template <class Make>
void check_same(const std::string& name, const Make& make, bool all_deferred = true) {
  torch::manual_seed(7);
  const auto eager = make();
  const at::Tensor state = default_state();
  const Named expected = tensors_of(*eager);
  for (const Order order : {Order::forward, Order::reverse, Order::shuffled}) {
    torch::manual_seed(7);
    const auto deferred = fsdp::deferred_init(make);
    REQUIRE_SAY(torch::equal(state, default_state()), name << " leaves another generator state");
    REQUIRE_SAY(fsdp::is_deferred(*deferred), name);
    Named tensors = tensors_of(*deferred);
    REQUIRE_SAY(tensors.size() == expected.size(), name);
    // What is drawn meanwhile must not matter, and not be disturbed.
    torch::manual_seed(1234);
    const at::Tensor outside = default_state();
    for (const std::size_t i : indices(tensors.size(), order)) {
      const bool was_deferred = fsdp::is_deferred(tensors[i].second);
      REQUIRE_SAY(was_deferred || !all_deferred, name << ": " << tensors[i].first);
      const at::Tensor real = fsdp::materialize_tensor(tensors[i].second);
      require_same(expected[i].second, real, name + ": " + tensors[i].first);
      REQUIRE(fsdp::is_deferred(tensors[i].second) == was_deferred);
    }
    auto modules = deferred->modules();
    for (const std::size_t i : indices(modules.size(), order)) {
      fsdp::materialize_module(*modules[i], /*recurse=*/false);
    }
    REQUIRE_SAY(!fsdp::is_deferred(*deferred), name);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      require_same(expected[i].second, tensors[i].second, name + ": " + tensors[i].first);
    }
    REQUIRE_SAY(torch::equal(outside, default_state()), name << " disturbs the generator");
  }
}

/// A module whose constructor is a function.
struct Made : torch::nn::Module {
  explicit Made(const std::function<void(Made&)>& construct) { construct(*this); }
};

inline std::function<std::shared_ptr<Made>()> made(std::function<void(Made&)> construct) {
  return [construct = std::move(construct)] { return std::make_shared<Made>(construct); };
}

}  // namespace harness
