// The state of a torch::optim optimizer in checkpoints: per-parameter arrays and step counts.
//
// The arrays (exp_avg, exp_avg_sq, max_exp_avg_sq, momentum_buffer) are saved as states of their
// parameters. Kind of optimizer, step counts and which arrays exist are a text in the checkpoint's
// metadata: a line with the kind, then a line NAME<tab>STEP<tab>STATE<tab>STATE... per parameter.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fsdp/torch/model_state.hpp"

namespace fsdp::detail {

inline constexpr const char* kOptimizerMetadata = "optimizer";

/// One parameter's state in an optimizer, whatever the optimizer.
struct ParamOptimizerState {
  std::int64_t step = -1;  ///< -1: the parameter has no state
  std::vector<std::pair<std::string, at::Tensor>> arrays;
};

/// How one kind of optimizer keeps its state. `names` are all arrays it may have.
class OptimizerKind {
 public:
  virtual ~OptimizerKind() = default;
  virtual std::string type() const = 0;
  virtual std::vector<std::string> names() const = 0;
  virtual ParamOptimizerState get(const torch::optim::OptimizerParamState& state) const = 0;
  virtual std::unique_ptr<torch::optim::OptimizerParamState> make(
      const ParamOptimizerState& state) const = 0;
};

template <class State>
class AdamKind final : public OptimizerKind {
 public:
  explicit AdamKind(std::string type) : type_(std::move(type)) {}
  std::string type() const override { return type_; }
  std::vector<std::string> names() const override {
    return {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  }
  ParamOptimizerState get(const torch::optim::OptimizerParamState& base) const override {
    const auto& state = static_cast<const State&>(base);
    ParamOptimizerState result;
    result.step = state.step();
    result.arrays = {{"exp_avg", state.exp_avg()}, {"exp_avg_sq", state.exp_avg_sq()}};
    if (state.max_exp_avg_sq().defined()) {
      result.arrays.emplace_back("max_exp_avg_sq", state.max_exp_avg_sq());
    }
    return result;
  }
  std::unique_ptr<torch::optim::OptimizerParamState> make(
      const ParamOptimizerState& source) const override {
    auto state = std::make_unique<State>();
    state->step(source.step);
    for (const auto& [name, array] : source.arrays) {
      if (name == "exp_avg") state->exp_avg(array);
      if (name == "exp_avg_sq") state->exp_avg_sq(array);
      if (name == "max_exp_avg_sq") state->max_exp_avg_sq(array);
    }
    return state;
  }

 private:
  std::string type_;
};

class SgdKind final : public OptimizerKind {
 public:
  std::string type() const override { return "SGD"; }
  std::vector<std::string> names() const override { return {"momentum_buffer"}; }
  ParamOptimizerState get(const torch::optim::OptimizerParamState& base) const override {
    const auto& state = static_cast<const torch::optim::SGDParamState&>(base);
    ParamOptimizerState result;
    if (state.momentum_buffer().defined()) {
      result.step = 0;
      result.arrays = {{"momentum_buffer", state.momentum_buffer()}};
    }
    return result;
  }
  std::unique_ptr<torch::optim::OptimizerParamState> make(
      const ParamOptimizerState& source) const override {
    auto state = std::make_unique<torch::optim::SGDParamState>();
    for (const auto& [name, array] : source.arrays) state->momentum_buffer(array);
    return state;
  }
};

inline std::unique_ptr<OptimizerKind> kind_of(const torch::optim::Optimizer& optimizer) {
  if (dynamic_cast<const torch::optim::AdamW*>(&optimizer)) {
    return std::make_unique<AdamKind<torch::optim::AdamWParamState>>("AdamW");
  }
  if (dynamic_cast<const torch::optim::Adam*>(&optimizer)) {
    return std::make_unique<AdamKind<torch::optim::AdamParamState>>("Adam");
  }
  if (dynamic_cast<const torch::optim::SGD*>(&optimizer)) return std::make_unique<SgdKind>();
  throw Error(FSDP_ERR_UNSUPPORTED,
              "only torch::optim::AdamW, Adam and SGD can be saved in a checkpoint");
}

/// Throws when `optimizer` was not built on the sharded leaves of `model`.
inline void require_our_parameters(torch::optim::Optimizer& optimizer, const ModelState& model) {
  std::unordered_set<const c10::TensorImpl*> ours;
  for (const ParamState& param : model.params) ours.insert(param.shard.unsafeGetTensorImpl());
  for (auto& group : optimizer.param_groups()) {
    for (const at::Tensor& param : group.params()) {
      if (ours.count(param.unsafeGetTensorImpl()) == 0) {
        throw Error(FSDP_ERR_INVALID_ARGUMENT,
                    "the optimizer has a parameter that is not one of this sharded model's "
                    "parameters()");
      }
    }
  }
}

/// What a checkpoint gets from an optimizer: arrays to write and text for the metadata.
struct OptimizerSnapshot {
  std::vector<std::string> names;    ///< keeps the strings that `states` points at
  std::vector<fsdp_state_t> states;  ///< borrow the optimizer's tensors
  std::vector<std::pair<std::string, std::int64_t>> steps;  ///< by parameter name
  std::string description;
};

/// Agrees over the ranks on which parameters have which arrays (a rank whose piece of a parameter
/// is empty may have none) and lists them. Collective.
inline OptimizerSnapshot snapshot_optimizer(torch::optim::Optimizer& optimizer, ModelState& model) {
  require_our_parameters(optimizer, model);
  const auto kind = kind_of(optimizer);
  OptimizerSnapshot snapshot;
  snapshot.names = kind->names();
  const std::size_t width = snapshot.names.size() + 1;

  std::vector<ParamOptimizerState> local(model.params.size());
  std::vector<std::int64_t> table(model.params.size() * width, -1);
  for (std::size_t i = 0; i < model.params.size(); ++i) {
    const auto found = optimizer.state().find(model.params[i].shard.unsafeGetTensorImpl());
    if (found == optimizer.state().end()) continue;
    local[i] = kind->get(*found->second);
    table[i * width] = local[i].step;
    for (const auto& [name, array] : local[i].arrays) {
      for (std::size_t n = 0; n < snapshot.names.size(); ++n) {
        if (snapshot.names[n] == name) table[i * width + n + 1] = 1;
      }
    }
  }
  model.engine().communicator().all_reduce(table.data(), static_cast<std::int64_t>(table.size()),
                                           ReduceOp::max);

  snapshot.description = kind->type() + "\n";
  for (std::size_t i = 0; i < model.params.size(); ++i) {
    if (table[i * width] < 0) continue;
    const ParamState& param = model.params[i];
    snapshot.steps.emplace_back(param.name, table[i * width]);
    snapshot.description += param.name + "\t" + std::to_string(table[i * width]);
    for (std::size_t n = 0; n < snapshot.names.size(); ++n) {
      if (table[i * width + n + 1] < 0) continue;
      snapshot.description += "\t" + snapshot.names[n];
      void* data = nullptr;
      for (auto& [name, array] : local[i].arrays) {
        if (name == snapshot.names[n]) data = array.data_ptr<float>();
      }
      if (data == nullptr && param.shard.numel() > 0) {
        throw Error(FSDP_ERR_CHECKPOINT, "the optimizer has no " + snapshot.names[n] +
                                             " of parameter '" + param.name +
                                             "' on this rank, but has on another");
      }
      snapshot.states.push_back({static_cast<std::uint32_t>(i), snapshot.names[n].c_str(), data});
    }
    snapshot.description += "\n";
  }
  return snapshot;
}

/// What loading a checkpoint fills, before it is given to the optimizer.
struct OptimizerTarget {
  std::unique_ptr<OptimizerKind> kind;
  std::vector<std::string> names;
  std::vector<fsdp_state_t> states;
  std::vector<ParamOptimizerState> params;  ///< by parameter number
};

/// Reads from `description` which arrays a checkpoint has and allocates them. Local; throws CHECKPOINT when the
/// checkpoint has no optimizer, another kind of optimizer, or a parameter this model lacks.
inline OptimizerTarget prepare_optimizer_load(const std::string& description,
                                              torch::optim::Optimizer& optimizer,
                                              ModelState& model) {
  require_our_parameters(optimizer, model);
  OptimizerTarget target;
  target.kind = kind_of(optimizer);
  target.names = target.kind->names();
  target.params.resize(model.params.size());
  if (description.empty()) {
    throw Error(FSDP_ERR_CHECKPOINT, "the checkpoint was saved without an optimizer");
  }
  std::istringstream lines(description);
  std::string line, name;
  std::getline(lines, line);
  if (line != target.kind->type()) {
    throw Error(FSDP_ERR_CHECKPOINT, "the checkpoint has the state of optimizer " + line +
                                         ", not of " + target.kind->type());
  }
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    std::getline(words, name, '\t');
    std::size_t i = 0;
    while (i < model.params.size() && model.params[i].name != name) ++i;
    if (i == model.params.size()) {
      throw Error(FSDP_ERR_CHECKPOINT, "the checkpoint has optimizer state of parameter '" + name +
                                           "', which this model does not have");
    }
    words >> target.params[i].step;
    for (std::string word; words >> word;) {
      for (const std::string& known : target.names) {
        if (known != word) continue;
        at::Tensor array = at::zeros({model.params[i].shard.numel()},
                                     at::TensorOptions(at::kFloat).device(
                                         model.params[i].shard.device()));
        target.states.push_back(
            {static_cast<std::uint32_t>(i), known.c_str(), array.data_ptr<float>()});
        target.params[i].arrays.emplace_back(word, std::move(array));
      }
    }
  }
  return target;
}

/// Replaces the optimizer's state by what was loaded.
inline void install_optimizer_state(OptimizerTarget& target, torch::optim::Optimizer& optimizer,
                                    const ModelState& model) {
  optimizer.state().clear();
  for (std::size_t i = 0; i < model.params.size(); ++i) {
    if (target.params[i].step < 0) continue;
    optimizer.state()[model.params[i].shard.unsafeGetTensorImpl()] =
        target.kind->make(target.params[i]);
  }
}

}  // namespace fsdp::detail
