// A torch::nn module tree as a model description: its modules and parameters get numbers and names.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "fsdp/fsdp.hpp"

namespace fsdp::detail {

/// One module of the tree, in the order of the walk (parents before children).
struct WalkedModule {
  torch::nn::Module* module;
  std::uint32_t id;        ///< its number in the model description; 0 is the root
  std::string name;        ///< dotted from the root
  std::string class_name;  ///< as the compiler names it, with namespaces
  bool root = false;
  bool adopted = false;  ///< it is a part of a model that was sharded before
  bool unit = false;     ///< and a unit there

  /// Whether a policy that goes by class or asks a function is to be asked about it.
  bool can_be_named() const noexcept { return !root && (!adopted || unit); }
};

/// How messages call a module.
inline std::string module_label(const WalkedModule& walked) {
  return "'" + (walked.name.empty() ? std::string("(root)") : walked.name) + "' (" +
         walked.class_name + ")";
}

/// Walks a module tree into a Model. A module or parameter that is registered under several names
/// goes by its first; the model knows the others too.
class ModuleWalk {
 public:
  ModuleWalk(const ModuleWalk&) = delete;
  ModuleWalk& operator=(const ModuleWalk&) = delete;

  Model model;
  std::vector<WalkedModule> modules;    ///< each module once
  std::vector<std::uint32_t> parents;   ///< by module number; the root's own for the root
  std::vector<std::uint32_t> tree_end;  ///< by module number: one past the last descendant
  std::vector<at::Tensor> leaves;       ///< by parameter number
  std::vector<std::string> leaf_names;  ///< by parameter number
  /// By parameter number: the modules that registered it, by their first numbers.
  std::vector<std::vector<std::uint32_t>> owners;

  /// The walked module of that number or, for a second name of a module, null.
  const WalkedModule* find(std::uint32_t id) const {
    const auto known = by_id_.find(id);
    return known == by_id_.end() ? nullptr : &modules[known->second];
  }

  /// The walked module that `module` is, or null.
  const WalkedModule* find(const torch::nn::Module& module) const {
    const auto known = first_.find(&module);
    return known == first_.end() ? nullptr : &modules[known->second];
  }

 protected:
  explicit ModuleWalk(const torch::nn::Module& root) : model(root.name()) {}

  /// Leaves these out, and what is below the modules. Call before walk_root(). Throws for one that
  /// is not below `root`.
  void ignore(const torch::nn::Module& root,
              const std::vector<std::shared_ptr<torch::nn::Module>>& modules,
              const std::vector<at::Tensor>& parameters) {
    if (modules.empty() && parameters.empty()) return;
    const auto below = root.modules(/*include_self=*/false);
    for (const auto& module : modules) {
      if (std::find(below.begin(), below.end(), module) == below.end()) {
        throw Error(FSDP_ERR_INVALID_ARGUMENT,
                    "ignored_modules has " + (module ? "a " + module->name() : "null") +
                        ", which is not below the module that is sharded");
      }
      ignored_modules_.insert(module.get());
      for (const at::Tensor& tensor : module->parameters()) {
        ignored_tensors_.insert(tensor.unsafeGetTensorImpl());
      }
    }
    const std::vector<at::Tensor> all = root.parameters();
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const auto same = [&](const at::Tensor& known) { return known.is_same(parameters[i]); };
      if (std::none_of(all.begin(), all.end(), same)) {
        throw Error(FSDP_ERR_INVALID_ARGUMENT,
                    "ignored_parameters[" + std::to_string(i) +
                        "] is not a parameter of the module that is sharded");
      }
      ignored_tensors_.insert(parameters[i].unsafeGetTensorImpl());
    }
  }
  ~ModuleWalk() = default;

  /// Describes a parameter that has not been met before to the model and returns its number.
  virtual std::uint32_t add_parameter(std::uint32_t module, const std::string& key,
                                      const std::string& name, const at::Tensor& tensor) = 0;

  /// Adds `child`, with all that is below it, in a way of its own; false: it is walked like any
  /// other.
  virtual bool take_over(std::uint32_t /*parent*/, const std::string& /*key*/,
                         const std::string& /*prefix*/, torch::nn::Module& /*child*/) {
    return false;
  }

  /// Walks the root: called by the constructor of the derived class.
  void walk_root(torch::nn::Module& root) { walk(root, 0, 0, std::string()); }

  /// Returns the module's entry if this is its first name, else null.
  WalkedModule* note_module(torch::nn::Module& module, std::uint32_t id, std::uint32_t parent,
                            const std::string& prefix) {
    if (parents.size() <= id) parents.resize(id + 1);
    parents[id] = parent;
    if (!first_.emplace(&module, modules.size()).second) return nullptr;
    by_id_.emplace(id, modules.size());
    modules.push_back({&module, id, prefix.empty() ? prefix : prefix.substr(0, prefix.size() - 1),
                       module.name(), modules.empty()});
    return &modules.back();
  }

  /// Numbers are given in the order of the walk: all above `id` so far are its descendants.
  void note_end(std::uint32_t id) {
    if (tree_end.size() < parents.size()) tree_end.resize(parents.size());
    tree_end[id] = static_cast<std::uint32_t>(parents.size());
  }

  void note_parameter(std::uint32_t module, const std::string& name, const at::Tensor& tensor) {
    params_.emplace(tensor.unsafeGetTensorImpl(), static_cast<std::uint32_t>(leaves.size()));
    leaves.push_back(tensor);
    leaf_names.push_back(name);
    owners.push_back({module});
  }

  bool known_parameter(const at::Tensor& tensor) const {
    return params_.count(tensor.unsafeGetTensorImpl()) != 0;
  }

 private:
  void walk(torch::nn::Module& module, std::uint32_t id, std::uint32_t parent,
            const std::string& prefix) {
    note_module(module, id, parent, prefix);
    for (const auto& item : module.named_parameters(/*recurse=*/false)) {
      if (ignored_tensors_.count(item.value().unsafeGetTensorImpl()) != 0) continue;
      const auto known = params_.find(item.value().unsafeGetTensorImpl());
      if (known != params_.end()) {
        model.tie_parameter(id, item.key(), known->second);
        auto& modules_of = owners[known->second];
        const std::uint32_t owner = find(module)->id;
        if (std::find(modules_of.begin(), modules_of.end(), owner) == modules_of.end()) {
          modules_of.push_back(owner);
        }
        continue;
      }
      const std::string name = prefix + item.key();
      add_parameter(id, item.key(), name, item.value());
      note_parameter(id, name, item.value());
    }
    for (const auto& item : module.named_children()) {
      if (ignored_modules_.count(item.value().get()) != 0) continue;
      if (take_over(id, item.key(), prefix + item.key() + ".", *item.value())) continue;
      const std::uint32_t child = model.add_module(id, item.key(), item.value()->name());
      walk(*item.value(), child, id, prefix + item.key() + ".");
    }
    note_end(id);
  }

  std::unordered_map<const torch::nn::Module*, std::size_t> first_;  // index in `modules`
  std::unordered_map<std::uint32_t, std::size_t> by_id_;             // index in `modules`
  std::unordered_map<const c10::TensorImpl*, std::uint32_t> params_;
  std::unordered_set<const torch::nn::Module*> ignored_modules_;
  std::unordered_set<const c10::TensorImpl*> ignored_tensors_;
};

}  // namespace fsdp::detail
