// The module tree that is to be sharded, as a model description: what may be sharded, and models
// in it that have been sharded before.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fsdp/torch/device.hpp"
#include "fsdp/torch/model_state.hpp"
#include "fsdp/torch/module_walk.hpp"
#include "fsdp/torch/options.hpp"
#include "fsdp/torch/tensors.hpp"

namespace fsdp::detail {

/// Where a module will compute: what the options say, or where its first parameter with storage is.
inline at::Device device_of(const torch::nn::Module& root, const ShardOptions& options) {
  if (options.device) return *options.device;
  for (const at::Tensor& tensor : root.parameters()) {
    if (!tensor.is_meta()) return tensor.device();
  }
  return at::Device(at::kCPU);
}

/// Walks a module tree. Throws, before anything is changed, when a parameter cannot be sharded,
/// naming it.
class ShardWalk final : public ModuleWalk {
 public:
  /// A model that was sharded before, and the numbers of its first module and parameter here.
  struct Adopted {
    std::shared_ptr<ShardedRoot> root;
    std::uint32_t module;
    std::uint32_t param;
  };

  /// `device`: where the model will compute.
  ShardWalk(torch::nn::Module& root, const ShardOptions& options, at::Device device)
      : ModuleWalk(root), device_(device) {
    ignore(root, options.ignored_modules, options.ignored_parameters);
    for (const at::Tensor& tensor : root.parameters()) {
      UnitStorage* unit = unit_of(tensor);
      if (unit != nullptr && unit->root()) known_.emplace(unit->root()->module, unit->root());
    }
    if (const auto known = known_.find(&root); known != known_.end()) {
      // Below a new root, without a name of its own, so that parameters keep theirs.
      parents.push_back(0);
      adopt(known->second, 0, "", "", root);
      note_end(0);
    } else {
      walk_root(root);
    }
  }

  /// Lets go of the full parameters' values, once an engine has read them.
  void release_data() { data_.clear(); }

  /// Where the model computes.
  at::Device device() const noexcept { return device_; }

  std::vector<Adopted> adopted;

 private:
  bool take_over(std::uint32_t parent, const std::string& key, const std::string& prefix,
                 torch::nn::Module& child) override {
    const auto known = known_.find(&child);
    if (known == known_.end()) return false;
    adopt(known->second, parent, key, prefix, child);
    return true;
  }

  void adopt(const std::shared_ptr<ShardedRoot>& root, std::uint32_t parent, const std::string& key,
             const std::string& prefix, torch::nn::Module& module) {
    const std::string name = prefix.empty() ? "(root)" : prefix.substr(0, prefix.size() - 1);
    for (const Adopted& other : adopted) {
      if (other.root == root) {
        throw Error(FSDP_ERR_UNSUPPORTED, "module '" + name +
                                              "' is registered twice and was sharded before: it "
                                              "can be a part of a bigger model once only");
      }
    }
    if (root->writes->device() != device_) {
      throw Error(FSDP_ERR_UNSUPPORTED, "module '" + name + "' was sharded on device " +
                                            root->writes->device().str() +
                                            " before and stays there: the model around it cannot "
                                            "be sharded on " + device_.str());
    }
    const auto [first_module, first_param] = model.add_sharded(parent, key, root->writes->engine());
    adopted.push_back({root, first_module, first_param});
    std::vector<bool> units(root->module_count, false);
    const Engine& engine = root->writes->engine();
    for (std::uint32_t unit = 0; unit < engine.unit_count(); ++unit) {
      const std::uint32_t unit_module = engine.unit_info(unit).module;
      units.at(unit_module) = true;
    }
    if (leaves.size() != first_param) {
      throw Error(FSDP_ERR_INVALID_STATE, "parameters are not numbered in the order of the walk");
    }
    // Sharded again as it was, the module has roots above it in the engine's model.
    std::uint32_t next = first_module;
    for (; next < first_module + root->first_module; ++next) {
      parents.resize(next + 1);
      parents[next] = parent;
      parent = next;
    }
    const AdoptedTree tree{*root, name, first_module, units};
    walk_adopted(tree, module, next, parent, prefix);
    if (next != first_module + root->module_count ||
        leaves.size() != first_param + root->params.size()) {
      throw changed(tree);
    }
    for (std::uint32_t above = 0; above < root->first_module; ++above) {
      note_end(first_module + above);
    }
  }

  struct AdoptedTree {
    const ShardedRoot& root;
    const std::string& name;
    std::uint32_t first_module;
    const std::vector<bool>& units;
  };

  static Error changed(const AdoptedTree& tree) {
    return Error(FSDP_ERR_INVALID_STATE,
                 "module '" + tree.name +
                     "' was sharded before and has changed since: its modules and parameters must "
                     "be the same when it is sharded again");
  }

  void walk_adopted(const AdoptedTree& tree, torch::nn::Module& module, std::uint32_t& next,
                    std::uint32_t parent, const std::string& prefix) {
    const std::uint32_t id = next++;
    if (id - tree.first_module >= tree.root.module_count) throw changed(tree);
    if (WalkedModule* walked = note_module(module, id, parent, prefix)) {
      walked->adopted = true;
      walked->unit = tree.units[id - tree.first_module];
    }
    const std::size_t first_param = adopted.back().param;
    for (const auto& item : module.named_parameters(/*recurse=*/false)) {
      if (known_parameter(item.value())) continue;
      const std::size_t at = leaves.size() - first_param;
      if (at >= tree.root.params.size() ||
          tree.root.params[at].leaf != item.value().unsafeGetTensorImpl()) {
        throw changed(tree);
      }
      note_parameter(id, prefix + item.key(), item.value());
    }
    for (const auto& item : module.named_children()) {
      walk_adopted(tree, *item.value(), next, id, prefix + item.key() + ".");
    }
    note_end(id);
  }

  std::uint32_t add_parameter(std::uint32_t module, const std::string& key, const std::string& name,
                              const at::Tensor& tensor) override {
    require(tensor, name);
    const bool meta = tensor.is_meta();
    const at::Tensor data = meta ? tensor : tensor.detach().contiguous();
    const std::uint32_t param = model.add_parameter(
        module, key,
        TensorView(meta ? nullptr : data.data_ptr(), *param_dtype_of(tensor.scalar_type()),
                   tensor.sizes().vec(), c_device(meta ? at::Device(at::kCPU) : data.device())),
        tensor.requires_grad());
    if (tensor.numel() > 0) {
      storages_.emplace(tensor.storage().unsafeGetStorageImpl(), name);
    }
    data_.push_back(data);
    return param;
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
             "it is sharded already, as a part of a model that is not a part of this one as a "
             "whole: shard the module that was sharded, or one that contains it");
    }
    if (!tensor.device().is_cpu() && !tensor.is_meta() && tensor.device() != device_) {
      refuse(FSDP_ERR_UNSUPPORTED, "it is on device " + tensor.device().str() +
                                       ", and the model is sharded on " + device_.str() +
                                       " (ShardOptions::device)");
    }
    if (!param_dtype_of(tensor.scalar_type())) {
      refuse(FSDP_ERR_UNSUPPORTED, std::string("its type is ") +
                                       c10::toString(tensor.scalar_type()) +
                                       "; only Float, Half and BFloat16 are supported");
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

  std::unordered_map<const torch::nn::Module*, std::shared_ptr<ShardedRoot>> known_;
  std::unordered_map<const c10::StorageImpl*, std::string> storages_;
  std::vector<at::Tensor> data_;  // what the model description points at
  const at::Device device_;
};

}  // namespace fsdp::detail
