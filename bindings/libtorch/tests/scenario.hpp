// What the scenario tests share: PyTorch's numbers (scripts/make_scenario_data.py says what is in
// the files), comparing a sharded model with them, and the switch that breaks a property.
//
// FSDP_TEST_BREAK=NAME in the environment makes a program do one thing wrong where it asks
// broken("NAME"), so that capi_tests/scenario_red.py can show that its checks notice.
#pragma once

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "reference.hpp"
#include "safetensors_file.h"

namespace scenario {

using namespace harness;

inline bool broken(const char* name) {
  const char* wanted = std::getenv("FSDP_TEST_BREAK");
  return wanted != nullptr && std::strcmp(wanted, name) == 0;
}

/// What `action` returns; a failure of the check when it throws.
template <class Action>
auto succeeds(const char* file, int line, Action action) {
  try {
    return action();
  } catch (const fsdp::Error& error) {
    fail(file, line, std::string("no error was expected, but: ") + error.what());
    throw;
  }
}

#define REQUIRE_SUCCEEDS(...) \
  scenario::succeeds(__FILE__, __LINE__, [&] { return __VA_ARGS__; })

/// One file of expected numbers.
class Data {
 public:
  /// `world` 0: the file is the same for all world sizes.
  explicit Data(const std::string& name, int world) {
    const std::string suffix = world == 0 ? "" : "_w" + std::to_string(world);
    const std::string path =
        std::string(FSDP_SCENARIO_DATA) + "/" + name + suffix + ".safetensors";
    file_.reset(safetensors_open(path.c_str()), safetensors_close);
    REQUIRE_SAY(file_ != nullptr, safetensors_error());
  }

  /// A float or int64 tensor; borrows the file's memory.
  at::Tensor operator[](const std::string& name) const {
    safetensors_tensor_t found{};
    REQUIRE_SAY(safetensors_tensor(file_.get(), name.c_str(), &found) == 0, safetensors_error());
    const bool is_float = std::strcmp(found.dtype, "F32") == 0;
    REQUIRE_SAY(is_float || std::strcmp(found.dtype, "I64") == 0, name << " is " << found.dtype);
    return at::from_blob(const_cast<void*>(found.data),
                         at::IntArrayRef(found.shape, static_cast<std::size_t>(found.ndim)),
                         is_float ? at::kFloat : at::kLong);
  }

  /// The text or compact JSON at a JSON pointer of what the file says about itself.
  std::string about(const std::string& pointer) const {
    const char* text = safetensors_about(file_.get(), pointer.c_str());
    REQUIRE_SAY(text != nullptr, safetensors_error());
    return text;
  }

  bool is_true(const std::string& pointer) const { return about(pointer) == "true"; }

 private:
  std::shared_ptr<safetensors_t> file_;
};

/// Fails unless the tensors have the same bits or, with a tolerance, differ by at most that part of
/// the largest magnitude wanted.
inline void check_same(const at::Tensor& got, const at::Tensor& wanted, const std::string& what,
                       double tolerance = 0) {
  REQUIRE_SAY(got.sizes() == wanted.sizes(), what << ": " << got.sizes() << ", not "
                                                  << wanted.sizes());
  if (got.numel() == 0) return;
  const at::Tensor a = got.detach().contiguous(), b = wanted.detach().contiguous();
  if (tolerance == 0 && same_bits(a, b)) return;
  const double worst = (a - b).abs().max().item<double>();
  const double largest = b.abs().max().item<double>();
  REQUIRE_SAY(tolerance > 0 && worst <= tolerance * largest,
              what << " differs by " << worst << " of " << largest);
}

/// The full tensor of which every rank has its piece of parameter `index`. Collective.
template <class Sharded>
at::Tensor gather(const Sharded& model, std::size_t index, const at::Tensor& piece) {
  const torch::NoGradGuard no_grad;
  const auto info = model.engine().param_info(static_cast<std::uint32_t>(index));
  // As integers, so that every bit arrives.
  at::Tensor bits = torch::zeros({info.numel}, at::kInt);
  if (info.shard_numel > 0) {
    bits.narrow(0, info.shard_offset, info.shard_numel).copy_(piece.clone().view(at::kInt));
  }
  model.engine().communicator().all_reduce(bits, fsdp::ReduceOp::sum);
  return bits.view(at::kFloat).reshape(at::IntArrayRef(info.shape, info.ndim));
}

/// Full parameters, or gradients (undefined where there is none), in order. Collective.
template <class Sharded>
std::vector<at::Tensor> full_parameters(const Sharded& model, bool gradients = false) {
  std::vector<at::Tensor> full;
  const auto shards = model.parameters();
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const at::Tensor piece = gradients ? shards[i].grad() : shards[i].detach();
    full.push_back(piece.defined() ? gather(model, i, piece) : at::Tensor());
  }
  return full;
}

/// Fails unless the full parameters (or gradients) are the file's PREFIX.NAME. Collective.
template <class Sharded>
void check_file(const Sharded& model, const Data& data, const std::string& prefix,
                double tolerance = 0, bool gradients = false) {
  const auto full = full_parameters(model, gradients);
  const auto names = model.named_parameters().keys();
  for (std::size_t i = 0; i < full.size(); ++i) {
    const std::string name = prefix + "." + names[i];
    REQUIRE_SAY(full[i].defined(), name << ": no gradient");
    check_same(full[i], data[name], name, tolerance);
  }
}

/// With the break "no_average", gradients are the sum over ranks instead of the mean.
template <class Sharded>
void break_average(const Sharded& model) {
  if (!broken("no_average")) return;
  for (const at::Tensor& shard : model.parameters()) {
    if (shard.grad().defined()) shard.grad().mul_(model.engine().communicator().world_size());
  }
}

/// Names of an engine's units, in their order.
inline std::vector<std::string> unit_names(const fsdp::Engine& engine) {
  std::vector<std::string> names;
  for (std::uint32_t unit = 0; unit < engine.unit_count(); ++unit) {
    names.push_back(engine.unit_info(unit).name);
  }
  return names;
}

inline MakeOptimizer plain_sgd(double lr) {
  return [lr](std::vector<at::Tensor> params) -> std::unique_ptr<torch::optim::Optimizer> {
    return std::make_unique<torch::optim::SGD>(std::move(params), torch::optim::SGDOptions(lr));
  };
}

}  // namespace scenario
