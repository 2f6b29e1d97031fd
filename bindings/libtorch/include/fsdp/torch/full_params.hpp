// Whole parameters outside of forward and backward: PyTorch's summon_full_params, and state dicts of
// whole tensors under the names that the unsharded module has.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fsdp/full_params.hpp"
#include "fsdp/torch/checkpoint_parts.hpp"
#include "fsdp/torch/fused_optimizer.hpp"
#include "fsdp/torch/model_state.hpp"
#include "fsdp/torch/optimizer_state.hpp"
#include "fsdp/torch/tensor_backup.hpp"

namespace fsdp {

/// Options of ShardedModule::summon_full_params.
struct SummonOptions {
  /// What the parameters (and gradients) are at the end of the scope goes to the shards.
  bool writeback = true;
  /// Only rank 0 sees full parameters; with writeback its values are everybody's.
  bool rank0_only = false;
  /// `.grad` of the module's parameters holds the full gradients.
  bool with_grads = false;
};

/// A scope in which the module's own parameters are whole float32 tensors in host memory, whatever
/// they are computed in. While it is open the module must not be called through its handle.
class SummonedParams {
 public:
  /// Use ShardedModule::summon_full_params. `module`: the whole one or a part of it; whole units are
  /// summoned. Collective.
  SummonedParams(std::shared_ptr<detail::ModelState> state, const torch::nn::Module* module,
                 const SummonOptions& options)
      : state_(std::move(state)), options_(options), exceptions_(std::uncaught_exceptions()) {
    state_->require_current();
    state_->settle();
    std::optional<std::vector<std::uint32_t>> units;
    if (module != nullptr) units = units_of(*module);
    full_.emplace(state_->engine(),
                  FullParamsOptions{options.writeback, options.rank0_only, options.with_grads},
                  units ? &*units : nullptr);
    state_->writes->on_closed();
    const torch::NoGradGuard no_grad;
    for (std::uint32_t id = 0; id < state_->params.size(); ++id) {
      if (units && !has(*units, state_->params[id].unit->index)) continue;
      if (const at::Tensor value = tensor(full_->data(id)); value.defined()) summon(id, value);
    }
    state_->summoned = true;
  }
  SummonedParams(const SummonedParams&) = delete;
  SummonedParams& operator=(const SummonedParams&) = delete;
  SummonedParams(SummonedParams&& other) noexcept
      : state_(std::move(other.state_)),
        options_(other.options_),
        exceptions_(other.exceptions_),
        full_(std::exchange(other.full_, std::nullopt)),
        summoned_(std::move(other.summoned_)) {}
  SummonedParams& operator=(SummonedParams&&) = delete;

  /// close(), without its exceptions. Without writing back while an exception is on its way.
  ~SummonedParams() {
    if (!full_) return;
    try {
      if (std::uncaught_exceptions() > exceptions_) {
        restore();
      } else {
        close();
      }
    } catch (...) {
      // A broken communicator's error comes again at the next collective.
    }
  }

  /// Ends the scope: the module's parameters are sharded again. Collective with writeback.
  void close() {
    if (!full_) return;
    try {
      if (options_.writeback) {
        collect();
        state_->writes->before_write();
      }
    } catch (...) {
      restore();
      throw;
    }
    FullParams full = *full_;
    restore();
    full.close();
  }

 private:
  struct Summoned {
    std::uint32_t id;
    at::Tensor value;
    at::Tensor grad;
  };

  static at::Tensor tensor(const fsdp_tensor_t& from) {
    const at::IntArrayRef sizes(from.shape, static_cast<std::size_t>(from.ndim));
    if (from.data == nullptr && c10::multiply_integers(sizes) > 0) return {};
    return at::from_blob(from.data, sizes, at::kFloat);
  }

  static bool has(const std::vector<std::uint32_t>& units, std::uint32_t unit) {
    return std::find(units.begin(), units.end(), unit) != units.end();
  }

  std::vector<std::uint32_t> units_of(const torch::nn::Module& module) const {
    std::vector<std::uint32_t> units;
    for (const at::Tensor& tensor : module.parameters()) {
      for (const detail::ParamState& param : state_->params) {
        if (param.leaf.is_same(tensor) && !has(units, param.unit->index)) {
          units.push_back(param.unit->index);
        }
      }
    }
    return units;
  }

  void summon(std::uint32_t id, const at::Tensor& value) {
    detail::ParamState& param = state_->params[id];
    const at::Tensor grad = tensor(full_->grad(id));
    const bool has_grad = options_.with_grads && full_->grad(id).data != nullptr;
    detail::point_at(param.leaf, value);
    param.leaf.mutable_grad() = has_grad ? grad : at::Tensor();
    summoned_.push_back({id, value, has_grad ? grad : at::Tensor()});
  }

  /// Takes what the module's parameters and gradients are now, also where they were replaced.
  void collect() {
    const torch::NoGradGuard no_grad;
    for (const Summoned& summoned : summoned_) {
      const detail::ParamState& param = state_->params[summoned.id];
      take(summoned.value, param.leaf.detach(), "parameter '" + param.name + "'");
      const at::Tensor grad = param.leaf.grad();
      if (grad.defined() && !summoned.grad.defined() && options_.with_grads) {
        throw Error(FSDP_ERR_UNSUPPORTED, "parameter '" + param.name +
                                              "' was given a gradient, and had none: gradients "
                                              "that exist can be changed");
      }
      if (!summoned.grad.defined()) continue;
      if (grad.defined()) {
        take(summoned.grad, grad, "the gradient of parameter '" + param.name + "'");
      } else {
        summoned.grad.zero_();
      }
    }
  }

  static void take(const at::Tensor& memory, const at::Tensor& now, const std::string& what) {
    if (now.sizes() != memory.sizes()) {
      throw Error(FSDP_ERR_INVALID_STATE, what + " has changed its shape");
    }
    const bool same = now.scalar_type() == at::kFloat && now.is_contiguous() &&
                      now.const_data_ptr() == memory.const_data_ptr();
    if (!same) at::Tensor(memory).copy_(now);
  }

  void restore() {
    full_.reset();
    state_->summoned = false;
    for (const Summoned& summoned : summoned_) {
      detail::ParamState& param = state_->params[summoned.id];
      detail::point_at(param.leaf,
                       param.unit->tensor_of(state_->engine().param_info(summoned.id)));
      param.leaf.mutable_grad() = param.poison;
    }
    summoned_.clear();
  }

  std::shared_ptr<detail::ModelState> state_;
  SummonOptions options_;
  int exceptions_;
  std::optional<FullParams> full_;
  std::vector<Summoned> summoned_;
};

/// Whole tensors by name.
using StateDict = torch::OrderedDict<std::string, at::Tensor>;
/// An optimizer's whole state: by parameter, its arrays by name, and its "step" (a double scalar).
using OptimStateDict = torch::OrderedDict<std::string, StateDict>;

namespace detail {

/// A copy of a tensor of the C ABI.
inline at::Tensor copy_of(const fsdp_tensor_t& tensor) {
  const at::IntArrayRef sizes(tensor.shape, static_cast<std::size_t>(tensor.ndim));
  return at::from_blob(tensor.data, sizes, at::kFloat).clone();
}

/// A copy of a whole tensor in host memory.
inline at::Tensor host_copy(const at::Tensor& tensor) {
  return tensor.is_cpu() ? tensor.detach().clone() : tensor.detach().cpu();
}

/// Parameters (float32) and buffers of the module, in the order of its own named_parameters() and
/// named_buffers(), tied ones under each of their names; ignored ones as they are. Collective.
inline StateDict full_state_dict(const torch::nn::Module& module, ModelState& state,
                                 bool rank0_only) {
  state.require_current();
  state.settle();
  const torch::NoGradGuard no_grad;
  std::vector<at::Tensor> full(state.params.size());
  full_state(state.engine(), rank0_only,
             [&](std::uint32_t param, const std::string&, const std::string&,
                 const fsdp_tensor_t& tensor) { full[param] = copy_of(tensor); });
  state.writes->on_closed();
  StateDict dict;
  if (rank0_only && state.engine().communicator().rank() != 0) return dict;
  std::unordered_map<const c10::TensorImpl*, std::uint32_t> ids;
  for (std::uint32_t id = 0; id < full.size(); ++id) {
    ids.emplace(state.params[id].leaf.unsafeGetTensorImpl(), id);
  }
  for (const auto& item : module.named_parameters()) {
    const auto known = ids.find(item.value().unsafeGetTensorImpl());
    dict.insert(item.key(),
                known == ids.end() ? host_copy(item.value()) : full[known->second]);
  }
  for (const auto& item : module.named_buffers()) {
    if (item.value().defined()) dict.insert(item.key(), host_copy(item.value()));
  }
  return dict;
}

/// Throws on every rank what `check` throws on one of them. Collective.
template <class Check>
void agree(const Communicator& comm, Check check) {
  std::int64_t fine = 1;
  std::exception_ptr thrown;
  try {
    check();
  } catch (...) {
    thrown = std::current_exception();
    fine = 0;
  }
  comm.all_reduce(&fine, 1, ReduceOp::min);
  if (thrown) std::rethrow_exception(thrown);
  if (fine == 0) throw Error(FSDP_ERR_INVALID_ARGUMENT, "another rank has refused its arguments");
}

/// Throws unless `dict` has exactly the names, and their shapes, of the module.
inline void require_fitting(const StateDict& dict, const torch::nn::Module& module) {
  std::size_t known = 0;
  const auto fits = [&](const std::string& name, const at::Tensor& tensor) {
    const at::Tensor* given = dict.find(name);
    if (given == nullptr) {
      throw Error(FSDP_ERR_INVALID_ARGUMENT, "the state dict has no '" + name + "'");
    }
    if (given->sizes() != tensor.sizes()) {
      std::ostringstream text;
      text << "'" << name << "' is of shape " << given->sizes() << " in the state dict, and "
           << tensor.sizes() << " in the module";
      throw Error(FSDP_ERR_INVALID_ARGUMENT, text.str());
    }
    ++known;
  };
  for (const auto& item : module.named_parameters()) fits(item.key(), item.value());
  for (const auto& item : module.named_buffers()) {
    if (item.value().defined()) fits(item.key(), item.value());
  }
  if (known == dict.size()) return;
  for (const auto& item : dict) {
    if (module.named_parameters().find(item.key()) == nullptr &&
        module.named_buffers().find(item.key()) == nullptr) {
      throw Error(FSDP_ERR_INVALID_ARGUMENT, "the module has no '" + item.key() + "'");
    }
  }
}

/// Collective; on an error nothing has changed.
inline void load_full_state_dict(const StateDict& dict, torch::nn::Module& module,
                                 const std::shared_ptr<ModelState>& state, bool rank0_only) {
  state->require_current();
  state->settle();
  const Communicator& comm = state->engine().communicator();
  const bool gives = !rank0_only || comm.rank() == 0;
  agree(comm, [&] {
    if (gives) require_fitting(dict, module);
  });
  const torch::NoGradGuard no_grad;
  SummonedParams scope(state, nullptr, {/*writeback=*/true, rank0_only, /*with_grads=*/false});
  // What every rank holds whole: buffers, and parameters that were ignored.
  const auto take = [&](const std::string& name, at::Tensor tensor) {
    const auto host = at::TensorOptions(tensor.scalar_type()).device(at::kCPU);
    at::Tensor value = gives ? dict[name].to(host).contiguous().clone()
                             : at::empty(tensor.sizes(), host);
    if (rank0_only) {
      const auto bytes = static_cast<std::int64_t>(value.nbytes());
      comm.broadcast(TensorView(value.data_ptr(), {FSDP_DTYPE_UINT, 8, 1}, {bytes}), 0);
    }
    tensor.copy_(value);
  };
  for (const auto& item : module.named_parameters()) {
    const auto sharded = [&](const ParamState& param) { return param.leaf.is_same(item.value()); };
    if (std::none_of(state->params.begin(), state->params.end(), sharded)) {
      take(item.key(), item.value());
    } else if (gives) {
      at::Tensor(item.value()).copy_(dict[item.key()]);
    }
  }
  for (const auto& item : module.named_buffers()) {
    if (item.value().defined()) take(item.key(), item.value());
  }
  scope.close();
}

/// The whole state of a torch::optim optimizer. Collective.
inline OptimStateDict full_optim_state_dict(torch::optim::Optimizer& optimizer, ModelState& state,
                                            bool rank0_only) {
  state.require_current();
  state.settle();
  const torch::NoGradGuard no_grad;
  const bool takes = !rank0_only || state.engine().communicator().rank() == 0;
  const OptimizerSnapshot snapshot = snapshot_optimizer(optimizer, state);
  OptimStateDict dict;
  for (const fsdp_state_t& array : snapshot.states) {
    const ParamState& param = state.params.at(array.param);
    at::Tensor whole = at::empty(param.leaf.sizes(), at::kFloat);
    state.engine().gather(array.param, static_cast<const float*>(array.data),
                          whole.data_ptr<float>());
    if (!takes) continue;
    if (dict.find(param.name) == nullptr) dict.insert(param.name, StateDict());
    dict[param.name].insert(array.name, whole);
  }
  for (const auto& [name, step] : snapshot.steps) {
    if (StateDict* arrays = dict.find(name)) {
      arrays->insert("step", at::scalar_tensor(static_cast<double>(step), at::kDouble));
    }
  }
  return dict;
}

/// The same of the engine's own optimizer. Collective.
inline OptimStateDict full_optim_state_dict(FusedOptimizer& optimizer, ModelState& state,
                                            bool rank0_only) {
  state.require_current();
  state.settle();
  OptimStateDict dict;
  full_state(optimizer.engine_optimizer(), rank0_only,
             [&](std::uint32_t, const std::string& name, const std::string& array,
                 const fsdp_tensor_t& tensor) {
               if (dict.find(name) == nullptr) {
                 dict.insert(name, StateDict());
                 const auto steps = static_cast<double>(optimizer.step_count(name));
                 dict[name].insert("step", at::scalar_tensor(steps, at::kDouble));
               }
               dict[name].insert(array, copy_of(tensor));
             });
  return dict;
}

}  // namespace detail
}  // namespace fsdp
