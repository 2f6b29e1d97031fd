// The handle of a sharded model: forward, sharded parameters, norms, checkpoints.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fsdp/torch/build.hpp"
#include "fsdp/torch/checkpoint_parts.hpp"
#include "fsdp/torch/comm_hook.hpp"
#include "fsdp/torch/full_params.hpp"
#include "fsdp/torch/fused_optimizer.hpp"
#include "fsdp/torch/gradients.hpp"
#include "fsdp/torch/optimizer_state.hpp"
#include "fsdp/torch/outputs.hpp"
#include "fsdp/torch/precision.hpp"

namespace fsdp {

namespace detail {

/// Opens a forward scope for as long as it lives.
class ForwardScope {
 public:
  ForwardScope(ModelState& state, bool training) : state_(state) {
    state_.begin_forward(training && at::GradMode::is_enabled());
  }
  ForwardScope(const ForwardScope&) = delete;
  ForwardScope& operator=(const ForwardScope&) = delete;
  ~ForwardScope() {
    if (!finished_) state_.abandon_forward();
  }
  /// The regular end; without it the forward counts as failed.
  void finish(bool backward_follows) {
    finished_ = true;
    state_.end_forward(backward_follows);
  }

 private:
  ModelState& state_;
  bool finished_ = false;
};

}  // namespace detail

/// A sharded module. Copies share it. When the last one is destroyed, using the module's parameters
/// is an error that names the parameter; their values stay as long as the module or a tensor of
/// parameters() does, and fully_shard goes on from them.
///
/// A sharded module may be sharded again, by itself or as a part of a bigger one: its units and the
/// values of its parameters and gradients stay as they are, and only the newest handle runs it. An
/// older handle that is still alive keeps its parameters(), which are the newer one's too (an
/// optimizer on them goes on), and throws INVALID_STATE when anything else is asked of it.
///
/// One training thread at a time. Other threads may run any operators on other tensors meanwhile.
/// Functions marked collective must be called by all ranks in the same order; all throw
/// fsdp::Error. After an exception out of forward or backward the handle may be used again; if
/// backward was left by one rank only, the next use is an error on every rank.
template <class Impl>
class ShardedModule {
 public:
  /// Made by fully_shard.
  ShardedModule(std::shared_ptr<Impl> module, std::shared_ptr<detail::ModelState> state)
      : module_(std::move(module)), state_(std::move(state)) {}

  /// Calls the module's forward with these arguments and returns what it returns. Units are
  /// unsharded when an operator touches their parameters. When gradients are enabled and the output
  /// requires them, a backward pass from the output reduces (averages over ranks) the gradients
  /// and fills `.grad` of parameters(), adding to what is there; otherwise the forward is complete
  /// in itself. Collective.
  template <class... Args>
  decltype(auto) forward(Args&&... args) {
    return call(detail::CastArgument<Args>(args, state_->input_type)...);
  }

  /// The same as forward(). Collective.
  template <class... Args>
  decltype(auto) operator()(Args&&... args) {
    return forward(std::forward<Args>(args)...);
  }

  /// The wrapped module, for everything but its parameters' values: train(), eval(), buffers,
  /// options. Its own forward must not be called directly.
  Impl* operator->() const noexcept { return module_.get(); }

  /// The wrapped module.
  const std::shared_ptr<Impl>& module() const noexcept { return module_; }

  /// The sharded leaves, in the order of the module's own parameters(), tied ones once: 1-D float
  /// tensors with this rank's piece of each flattened parameter (possibly empty). After a backward,
  /// `.grad` holds the piece of the averaged gradient, and is undefined where no rank has one.
  /// Build optimizers on them. Any in-place operator on them waits until no rank reads the old
  /// values (collective when it has to). Do not write through data_ptr(). Local.
  std::vector<at::Tensor> parameters() const {
    std::vector<at::Tensor> leaves;
    leaves.reserve(state_->params.size());
    for (const auto& param : state_->params) leaves.push_back(param.shard);
    return leaves;
  }

  /// parameters() with the names they have in the module's named_parameters(); a tied parameter
  /// goes by its first name. Local.
  torch::OrderedDict<std::string, at::Tensor> named_parameters() const {
    torch::OrderedDict<std::string, at::Tensor> named;
    for (const auto& param : state_->params) named.insert(param.name, param.shard);
    return named;
  }

  /// Makes every `.grad` of parameters() undefined. Local.
  void zero_grad() { state_->zero_grad(); }

  // ---- when units are resharded, and which backwards reduce ----

  /// What happens to the unit that `module` is (or that owns its parameters) after a forward that a
  /// backward follows: kReshardDefault, kReshardNever, kReshardAlways, or a number of ranks that it
  /// is resharded over. Collective; not inside of an iteration.
  void set_reshard_after_forward(const torch::nn::Module& module,
                                 std::int32_t reshard_after_forward) {
    state_->require_current();
    state_->settle();
    state_->engine().set_reshard_after_forward(detail::unit_of_module(*state_, module),
                                               reshard_after_forward);
  }

  /// Whether backwards from here on reduce their gradients. Those that do not leave them unsharded,
  /// in memory as large as the model, `.grad` as it was; the next one that does adds its own and
  /// reduces all. The same on every rank. Local.
  void set_requires_gradient_sync(bool required) {
    state_->require_current();
    state_->engine().set_requires_gradient_sync(required);
  }

  /// set_requires_gradient_sync(false) for as long as the result lives.
  [[nodiscard]] detail::NoSync no_sync() {
    set_requires_gradient_sync(false);
    return detail::NoSync(state_);
  }

  /// Whether backwards from here on end the iteration. Those that do not wait for no rank; `.grad` is
  /// filled, and shards may be written, after the next one that does. For the micro-batches of a
  /// step, all but the last. The same on every rank. Local.
  void set_is_last_backward(bool last) {
    state_->require_current();
    state_->engine().set_is_last_backward(last);
    state_->is_last_backward = last;
  }

  /// Whether backwards from here on average gradients over the replicas of a hybrid or unsharded
  /// model, or leave that to a later one. The same on every rank. Local.
  void set_requires_all_reduce(bool required) {
    state_->require_current();
    state_->engine().set_requires_all_reduce(required);
  }

  // ---- whole parameters ----

  /// Opens a scope in which the module's own parameters are whole float32 tensors, which can be read
  /// and changed in place: those of `module` (of whole units), or of all. Collective, and so is its
  /// end with writeback. Throws INVALID_STATE in a forward or backward.
  [[nodiscard]] SummonedParams summon_full_params(const SummonOptions& options = {},
                                                  const torch::nn::Module* module = nullptr) {
    return SummonedParams(state_, module, options);
  }

  /// Calls `function(torch::nn::Module&)` with every module, children first, as Module::apply does,
  /// with whole parameters that it may change. Every rank must do the same. Collective.
  template <class Function>
  void apply(Function&& function) {
    SummonedParams scope = summon_full_params();
    const torch::NoGradGuard no_grad;
    module_->apply([&](torch::nn::Module& module) { function(module); });
    scope.close();
  }

  /// Whole parameters (float32) and buffers by name, as the unsharded module has them, gathered one
  /// unit at a time: copies, on every rank or (empty elsewhere) on rank 0. Collective.
  StateDict full_state_dict(bool rank0_only = false) {
    return detail::full_state_dict(*module_, *state_, rank0_only);
  }

  /// Takes the values of such a dict, which must have exactly the module's names and shapes; of any
  /// floating type. With `rank0_only` rank 0's, which it broadcasts; others pass anything.
  /// Collective; on an error nothing has changed.
  void load_full_state_dict(const StateDict& dict, bool rank0_only = false) {
    detail::load_full_state_dict(dict, *module_, state_, rank0_only);
  }

  /// The whole state of an optimizer on parameters(), or of one of adamw() or sgd(): by parameter,
  /// its arrays by name and its "step". On every rank, or (empty elsewhere) on rank 0. Collective.
  template <class Optimizer>
  OptimStateDict full_optim_state_dict(Optimizer& optimizer, bool rank0_only = false) {
    return detail::full_optim_state_dict(optimizer, *state_, rank0_only);
  }

  /// The norm of order `norm_type` (any but NaN; infinity too) of the gradients over all parameters
  /// and ranks, in double, a parameter counted once: what torch.nn.utils.get_total_norm gives for
  /// the unsharded gradients. Every rank gets the same bits. Collective.
  double grad_norm(double norm_type = 2.0) const {
    return detail::total_grad_norm(*state_, norm_type, false);
  }

  /// Scales the gradients so that their norm (see grad_norm) is at most `max_norm`, and returns
  /// what it was. The factor is min(1, max_norm / (norm + 1e-6)), as in torch::nn::utils::
  /// clip_grad_norm_. A norm that is not finite makes the gradients so too, or, with
  /// `error_if_nonfinite`, throws NONFINITE on every rank, names the first such parameter, and
  /// leaves the gradients alone. Collective.
  double clip_grad_norm_(double max_norm, double norm_type = 2.0,
                         bool error_if_nonfinite = false) {
    return detail::clip_gradients(*state_, max_norm, norm_type, error_if_nonfinite);
  }

  /// Calls `hook` with each unit's gradients on this rank just before they are reduced; an empty
  /// one removes it. It runs inside backward, on a GPU with the stream current that they are reduced
  /// on (what it does on other streams it orders after and before that one), and may not touch the
  /// model's parameters or this handle.
  /// What it throws ends this rank's backward, and aborts the communicator, so that every other
  /// rank gets an error that names the unit. Lost when the module is sharded again. Local; see
  /// fsdp_engine_set_comm_hook.
  void register_comm_hook(TensorCommHook hook) {
    detail::register_comm_hook(state_, std::move(hook));
  }

  /// The engine's own AdamW on this model's parameters, with the meaning of torch::optim::AdamW.
  /// Collective: the same options on every rank.
  FusedOptimizer adamw(const AdamWConfig& options = {}) const {
    state_->require_current();
    return FusedOptimizer(state_, options);
  }

  /// The engine's own SGD, with the meaning of torch::optim::SGD. Collective.
  FusedOptimizer sgd(const SgdConfig& options) const {
    state_->require_current();
    return FusedOptimizer(state_, options);
  }

  /// Writes parameters and buffers (rank 0's) to directory `dir`, complete or not at all.
  /// `metadata` is any text of the caller's, which checkpoint_metadata(dir) returns. Collective.
  void save_checkpoint(const std::string& dir, const std::string& metadata = "") {
    const detail::CheckpointParts parts(*module_, *state_, metadata);
    fsdp::save_checkpoint(engine(), dir, parts.contents);
  }

  /// As above with the state of an AdamW, Adam or SGD built on parameters(), its step counts
  /// included; learning rates and other options are the caller's to save. Collective.
  void save_checkpoint(const std::string& dir, torch::optim::Optimizer& optimizer,
                       const std::string& metadata = "") {
    const detail::CheckpointParts parts(*module_, *state_, metadata, &optimizer);
    fsdp::save_checkpoint(engine(), dir, parts.contents);
  }

  /// save_checkpoint in the background: returns when this rank's part is copied; wait() on the
  /// result says how it ended. While one runs, further saves throw INVALID_STATE on every rank.
  /// Collective.
  CheckpointJob save_checkpoint_async(const std::string& dir, const std::string& metadata = "") {
    const detail::CheckpointParts parts(*module_, *state_, metadata);
    return fsdp::save_checkpoint_async(engine(), dir, parts.contents);
  }

  /// As above with the state of the optimizer. Collective.
  CheckpointJob save_checkpoint_async(const std::string& dir, torch::optim::Optimizer& optimizer,
                                      const std::string& metadata = "") {
    const detail::CheckpointParts parts(*module_, *state_, metadata, &optimizer);
    return fsdp::save_checkpoint_async(engine(), dir, parts.contents);
  }

  /// Reads parameters and buffers from a checkpoint of the same model, at any world size and
  /// wrapping, or from a folder in Hugging Face's layout (which may have more in it). On error
  /// nothing has changed. Collective.
  void load_checkpoint(const std::string& dir) {
    state_->require_current();
    state_->settle();
    detail::BuffersToLoad buffers(*module_);
    state_->writes->before_write();
    fsdp::load_checkpoint(engine(), dir, buffers.contents);
    buffers.install();
  }

  /// As above with the state of the optimizer, which must be of the kind that was saved.
  /// Collective.
  void load_checkpoint(const std::string& dir, torch::optim::Optimizer& optimizer) {
    state_->require_current();
    state_->settle();
    auto target = detail::prepare_optimizer_load(
        checkpoint_metadata(dir, detail::kOptimizerMetadata), optimizer, *state_);
    detail::BuffersToLoad buffers(*module_);
    buffers.contents.states = target.states;
    state_->writes->before_write();
    fsdp::load_checkpoint(engine(), dir, buffers.contents);
    buffers.install();
    detail::install_optimizer_state(target, optimizer, *state_);
  }

  /// As above with the states and step counts of an optimizer of adamw() or sgd(). Collective.
  void save_checkpoint(const std::string& dir, FusedOptimizer& optimizer,
                       const std::string& metadata = "") {
    detail::CheckpointParts parts(*module_, *state_, metadata);
    parts.contents.optimizer = &optimizer.engine_optimizer();
    fsdp::save_checkpoint(engine(), dir, parts.contents);
  }

  /// That in the background. Collective.
  CheckpointJob save_checkpoint_async(const std::string& dir, FusedOptimizer& optimizer,
                                      const std::string& metadata = "") {
    detail::CheckpointParts parts(*module_, *state_, metadata);
    parts.contents.optimizer = &optimizer.engine_optimizer();
    return fsdp::save_checkpoint_async(engine(), dir, parts.contents);
  }

  /// Reads what those have written, at any world size and wrapping. Collective.
  void load_checkpoint(const std::string& dir, FusedOptimizer& optimizer) {
    state_->require_current();
    state_->settle();
    detail::BuffersToLoad buffers(*module_);
    buffers.contents.optimizer = &optimizer.engine_optimizer();
    state_->writes->before_write();
    fsdp::load_checkpoint(engine(), dir, buffers.contents);
    buffers.install();
  }

  /// Sizes and counters of this rank. Local.
  Stats stats() const { return engine().stats(); }

  /// Bytes of this rank's share of parameters and gradients, padding included; an optimizer adds
  /// its own, in proportion to parameters(). Local.
  std::uint64_t rank_state_bytes() const {
    const Stats values = stats();
    return values.param_shard_bytes + values.grad_shard_bytes;
  }

  /// The engine behind this model, for what only the C++ layer offers. Unsharding, resharding and
  /// reducing through it is not for users of this handle.
  const Engine& engine() const {
    state_->require_current();
    return state_->engine();
  }

  /// For the other classes of the binding.
  const std::shared_ptr<detail::ModelState>& state() const noexcept { return state_; }

 private:
  template <class... Args>
  decltype(auto) call(detail::CastArgument<Args>&&... args) {
    detail::ForwardScope scope(*state_, module_->is_training());
    using Output = decltype(module_->forward(args.get()...));
    detail::require_castable_output<Output>(state_->output_type);
    if constexpr (std::is_void_v<Output>) {
      module_->forward(args.get()...);
      scope.finish(at::GradMode::is_enabled());
    } else if constexpr (std::is_reference_v<Output>) {
      Output output = module_->forward(args.get()...);
      scope.finish(watch(output));
      return static_cast<Output>(output);
    } else {
      Output output = module_->forward(args.get()...);
      detail::cast_output(output, state_->output_type);
      scope.finish(watch(output));
      return output;
    }
  }

  /// Arranges that a backward from `output` is recognized from its start; whether one may come.
  template <class Output>
  bool watch(const Output& output) {
    if (!at::GradMode::is_enabled()) return false;
    if constexpr (!detail::outputs_known<Output>) {
      return true;
    } else {
      bool any = false;
      const std::weak_ptr<detail::ModelState> weak = state_;
      detail::visit_outputs(output, [&](const at::Tensor& tensor) {
        if (!tensor.requires_grad()) return;
        any = true;
        tensor.register_hook([weak](const at::Tensor&) {
          if (const auto state = weak.lock()) state->enter_backward();
        });
      });
      return any;
    }
  }

  std::shared_ptr<Impl> module_;
  std::shared_ptr<detail::ModelState> state_;
};

/// Shards `module` in place over `options.comm`: each rank keeps its cut of every parameter and
/// the memory of the full ones is freed. The module's code does not change; afterwards it is called
/// through the returned handle. Each rank cuts the values its own module has, so initialize all
/// ranks alike (same seed).
///
/// Parameters without storage (on the meta device, or deferred by deferred_init) get their values
/// here, one unit at a time: by ShardOptions::param_init_fn, else from their deferred_init, else by
/// their module's reset_parameters() (LibTorch's own classes, or a Resettable). Buffers likewise;
/// they stay whole. What an initializer leaves unwritten is an error that names it, and an error on
/// one rank is an error on all.
///
/// A module that is sharded already, or contains one that is, is taken over as it is (see
/// ShardedModule); a part of a sharded module alone cannot be sharded again.
///
/// Parameters must be Float, Half or BFloat16, on the CPU, meta or where the model is to compute
/// (ShardOptions::device); any wrong one is an error that names it. Their shards are float32; the
/// module's own tensors become what ShardOptions::mixed_precision says, or stay what they are. On
/// error the module is unchanged. Collective.
///
/// On a GPU the operators of forward and backward, and writes of shards, go to LibTorch's current
/// streams, which may be others from call to call.
template <class Impl>
ShardedModule<Impl> fully_shard(std::shared_ptr<Impl> module, const ShardOptions& options) {
  if (module == nullptr) throw Error(FSDP_ERR_INVALID_ARGUMENT, "fully_shard: the module is null");
  auto state = detail::shard_module(*module, options);
  return ShardedModule<Impl>(std::move(module), std::move(state));
}

/// As above for a module holder, as TORCH_MODULE makes them. Collective.
template <class Impl>
ShardedModule<Impl> fully_shard(const torch::nn::ModuleHolder<Impl>& module,
                                const ShardOptions& options) {
  if (module.is_empty()) {
    throw Error(FSDP_ERR_INVALID_ARGUMENT, "fully_shard: the module holder is empty");
  }
  return fully_shard(module.ptr(), options);
}

}  // namespace fsdp
