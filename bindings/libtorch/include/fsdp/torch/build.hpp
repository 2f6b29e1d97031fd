// From a torch::nn module to an engine: describes the module tree, cuts it, and puts the sharded
// storage under the module's own parameters.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fsdp/torch/model_state.hpp"
#include "fsdp/torch/options.hpp"

namespace fsdp::detail {

/// Walks a module tree into a Model. Throws before anything is changed when a parameter cannot be
/// sharded, naming it.
class ModuleWalk {
 public:
  explicit ModuleWalk(const torch::nn::Module& root) : model(root.name()) {
    walk(root, 0, std::string());
  }

  /// Lets go of the full parameters' values, once an engine has read them.
  void release_data() { data_.clear(); }

  Model model;
  std::vector<WalkedModule> modules;    ///< each module once, by its first name
  std::vector<std::uint32_t> tree_end;  ///< by module number: one past the last descendant
  std::vector<at::Tensor> leaves;       ///< by parameter number
  std::vector<std::string> leaf_names;  ///< by parameter number

 private:
  void walk(const torch::nn::Module& module, std::uint32_t id, const std::string& prefix) {
    bool seen = false;
    for (const WalkedModule& walked : modules) seen = seen || walked.module == &module;
    if (!seen) {
      modules.push_back({&module, id, prefix.empty() ? prefix : prefix.substr(0, prefix.size() - 1),
                         module.name()});
    }
    for (const auto& item : module.named_parameters(/*recurse=*/false)) {
      add_parameter(id, item.key(), prefix + item.key(), item.value());
    }
    for (const auto& item : module.named_children()) {
      const std::uint32_t child = model.add_module(id, item.key(), item.value()->name());
      walk(*item.value(), child, prefix + item.key() + ".");
    }
    // Numbers are given in the order of the walk: all above `id` so far are its descendants.
    if (tree_end.size() <= id) tree_end.resize(id + 1);
    tree_end[id] = static_cast<std::uint32_t>(tree_end.size());
  }

  void add_parameter(std::uint32_t module, const std::string& key, const std::string& name,
                     const at::Tensor& tensor) {
    const auto known = params_.find(tensor.unsafeGetTensorImpl());
    if (known != params_.end()) {
      model.tie_parameter(module, key, known->second);
      return;
    }
    require(tensor, name);
    const at::Tensor data = tensor.detach().contiguous();
    const std::uint32_t param =
        model.add_parameter(module, key, TensorView(data.data_ptr<float>(), data.sizes().vec()),
                            tensor.requires_grad());
    params_.emplace(tensor.unsafeGetTensorImpl(), param);
    if (tensor.numel() > 0) {
      storages_.emplace(tensor.storage().unsafeGetStorageImpl(), name);
    }
    data_.push_back(data);
    leaves.push_back(tensor);
    leaf_names.push_back(name);
  }

  void require(const at::Tensor& tensor, const std::string& name) const {
    const auto refuse = [&](fsdp_status_t status, const std::string& why) {
      throw Error(status, "parameter '" + name + "' cannot be sharded: " + why);
    };
    if (tensor.layout() != at::kStrided) {
      refuse(FSDP_ERR_UNSUPPORTED, "its layout is not strided (dense)");
    }
    if (is_sharded(tensor)) {
      refuse(FSDP_ERR_INVALID_STATE,
             "it belongs to a sharded model already (a module can be sharded once)");
    }
    if (!tensor.device().is_cpu()) {
      refuse(FSDP_ERR_UNSUPPORTED,
             "it is on device " + tensor.device().str() + "; only the CPU is supported");
    }
    if (tensor.scalar_type() != at::kFloat) {
      refuse(FSDP_ERR_UNSUPPORTED, std::string("its type is ") +
                                       c10::toString(tensor.scalar_type()) +
                                       "; only Float is supported");
    }
    if (!tensor.is_leaf()) {
      refuse(FSDP_ERR_INVALID_ARGUMENT, "it is the result of a computation, not a leaf");
    }
    if (tensor.grad().defined()) {
      refuse(FSDP_ERR_INVALID_STATE, "it has a gradient; call zero_grad() on the module before");
    }
    if (tensor.numel() == 0) return;
    const auto shared = storages_.find(tensor.storage().unsafeGetStorageImpl());
    if (shared != storages_.end()) {
      refuse(FSDP_ERR_UNSUPPORTED, "it shares memory with parameter '" + shared->second +
                                       "' but is another tensor; tie parameters by registering "
                                       "the same tensor twice");
    }
  }

  std::unordered_map<const c10::TensorImpl*, std::uint32_t> params_;
  std::unordered_map<const c10::StorageImpl*, std::string> storages_;
  std::vector<at::Tensor> data_;  // what the model description points at
};

inline std::vector<std::shared_ptr<UnitStorage>> make_units(ModelState& state,
                                                            const ModuleWalk& walk) {
  std::vector<std::shared_ptr<UnitStorage>> units;
  Engine& engine = state.engine();
  for (std::uint32_t index = 0; index < engine.unit_count(); ++index) {
    const UnitInfo info = engine.unit_info(index);
    std::vector<UnitParam> params;
    std::vector<std::uint32_t> ids(info.params, info.params + info.param_count);
    for (std::uint32_t id : ids) {
      const ParamInfo param = engine.param_info(id);
      params.push_back({walk.leaf_names[id], param.unit_offset, param.numel});
    }
    std::sort(params.begin(), params.end(),
              [](const UnitParam& a, const UnitParam& b) { return a.offset < b.offset; });
    auto* unit = new UnitStorage(&state, index, info.name, info.unit_bytes, std::move(params));
    unit->retain();
    unit->tree_begin = info.module;
    unit->tree_end = walk.tree_end.at(info.module);
    unit->param_ids = std::move(ids);
    units.emplace_back(unit, [](UnitStorage* unit) { unit->release(); });
  }
  return units;
}

inline void install_parameters(const std::shared_ptr<ModelState>& state, const ModuleWalk& walk) {
  for (std::uint32_t id = 0; id < walk.leaves.size(); ++id) {
    const ParamInfo info = state->engine().param_info(id);
    ParamState param;
    param.name = walk.leaf_names[id];
    param.unit = state->units.at(info.unit).get();
    param.leaf = walk.leaves[id];
    param.shard = make_shard_leaf(state->writes, id, param.leaf.requires_grad());
    param.poison = make_poison_grad(param.name, param.leaf.sizes());
    param.leaf.set_data(tagged_tensor(param.unit->storage(), info.unit_offset, param.leaf.sizes()));
    param.node =
        install_gradient_node(param.leaf, param.name, id, std::weak_ptr<GradientSink>(state));
    state->params.push_back(std::move(param));
  }
  state->restore_poison();
  state->writes->attach(walk.leaves, [weak = std::weak_ptr<ModelState>(state)] {
    if (const auto locked = weak.lock()) locked->settle();
  });
}

/// Shards `module` in place over `options.comm` and returns what runs it. Collective. On error the
/// module is unchanged.
inline std::shared_ptr<ModelState> shard_module(const torch::nn::Module& module,
                                                const ShardOptions& options) {
  if (!options.comm) {
    throw Error(FSDP_ERR_INVALID_ARGUMENT,
                "fully_shard needs ShardOptions::comm (Communicator::from_env() or single())");
  }
  const torch::NoGradGuard no_grad;
  dispatch_table();
  ModuleWalk walk(module);
  options.wrap.apply(walk.model, walk.modules);
  const Engine engine(walk.model, options.comm, options.gradient_slots);
  walk.release_data();
  auto state = std::make_shared<ModelState>(engine);
  state->units = make_units(*state, walk);
  install_parameters(state, walk);
  return state;
}

}  // namespace fsdp::detail
