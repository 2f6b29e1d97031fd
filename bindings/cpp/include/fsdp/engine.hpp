// The engine: a model cut over the ranks, its hooks, its shards and its checkpoints.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/communicator.hpp"
#include "fsdp/comm_hook.hpp"
#include "fsdp/error.hpp"
#include "fsdp/model.hpp"
#include "fsdp/trace.hpp"

namespace fsdp {

/// Counters and sizes of one rank; see fsdp_stats_t.
using Stats = fsdp_stats_t;
/// A unit's name, parameters and sizes; see fsdp_unit_info_t. Pointers live as long as the engine.
using UnitInfo = fsdp_unit_info_t;
/// A parameter's name, shape and place; see fsdp_param_info_t. Pointers live as long as the engine.
using ParamInfo = fsdp_param_info_t;
/// This rank's piece of a parameter and of its gradient; see fsdp_shard_t.
using Shard = fsdp_shard_t;

/// When units are resharded; see fsdp_engine_config_t.
enum class Strategy : std::int32_t {
  full_shard = FSDP_FULL_SHARD,        ///< after every forward and backward (ZeRO-3)
  shard_grad_op = FSDP_SHARD_GRAD_OP,  ///< after the backward only (ZeRO-2)
  no_shard = FSDP_NO_SHARD,            ///< never: every rank holds all parameters
  hybrid_shard = FSDP_HYBRID_SHARD,    ///< full_shard within groups of shard_size ranks
  hybrid_shard_grad_op = FSDP_HYBRID_SHARD_GRAD_OP,  ///< shard_grad_op within such groups
};

/// Values of Engine::set_reshard_after_forward besides a number of ranks.
inline constexpr std::int32_t kReshardDefault = FSDP_RESHARD_DEFAULT;
inline constexpr std::int32_t kReshardNever = FSDP_RESHARD_NEVER;
inline constexpr std::int32_t kReshardAlways = FSDP_RESHARD_ALWAYS;

/// What is done about ranks that run different forwards; see fsdp_engine_config_t.
enum class OrderCheck : std::int32_t {
  error = FSDP_ORDER_CHECK_ERROR,  ///< an error on every rank
  warn = FSDP_ORDER_CHECK_WARN,    ///< in the first training iteration; later one warning, right gradients
  off = FSDP_ORDER_CHECK_OFF,      ///< nothing
};

/// What an engine on a GPU has taken there and done; see fsdp_cuda_stats_t.
using CudaStats = fsdp_cuda_stats_t;

/// The GPU that an engine computes on, with FSDP_CUDA_CONFIG_INIT's values. What it points to is
/// borrowed, as fsdp_cuda_config_t says.
inline fsdp_cuda_config_t cuda_config(std::int32_t device) {
  fsdp_cuda_config_t config = FSDP_CUDA_CONFIG_INIT;
  config.device = device;
  return config;
}

/// Options of an engine, the same on every rank; see fsdp_engine_config_t.
struct EngineConfig {
  /// Buffers for units' full gradients; 0 is one more than the levels of nested units.
  std::uint32_t gradient_slots = 0;
  Strategy strategy = Strategy::full_shard;
  OrderCheck order_check = OrderCheck::error;
  /// The type gradients are rounded to before they are summed; all zero for float32.
  fsdp_dtype_t reduce_dtype{};
  /// The type parameters are computed in, unless the model says otherwise; all zero for the type
  /// each was registered with. Shards are float32 in every case.
  fsdp_dtype_t param_dtype{};
  /// Initializes parameters without storage, module by module, in place of the model's own
  /// initializers. Called by Engine's constructor only; what it throws is rethrown there.
  ModuleInit param_init_fn;
  /// Ranks of a shard group, a divisor of the world size, with the hybrid strategies; else 0.
  std::uint32_t shard_size = 0;
  /// Every rank starts from rank 0's values; what the others hold is not looked at.
  bool sync_module_states = false;
  /// Shards, gradient shards and optimizer state lie in host memory, apart from the unit buffers.
  bool cpu_offload = false;
  /// Gradients come, and are collected, in the 16-bit type that a unit's parameters are computed in.
  bool grads_in_param_dtype = false;
  /// The engine computes on this GPU (start from cuda_config()); unset: on the CPU.
  std::optional<fsdp_cuda_config_t> cuda = {};
};

/// An engine. Copies share it; the last one destroys it, after which no pointer obtained from it
/// may be used. One thread at a time. Which functions are collective is said in fsdp.h.
class Engine {
 public:
  /// Cuts the model over the communicator's ranks, copying this rank's piece of every parameter and
  /// initializing those without storage. What an initializer throws on this rank is rethrown.
  /// Collective: all ranks must describe the same model.
  Engine(const Model& model, const Communicator& comm, const EngineConfig& options = {})
      : comm_(comm) {
    fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
    config.gradient_slots = options.gradient_slots;
    config.strategy = static_cast<std::int32_t>(options.strategy);
    config.order_check = static_cast<std::int32_t>(options.order_check);
    config.reduce_dtype = options.reduce_dtype;
    config.param_dtype = options.param_dtype;
    config.shard_size = options.shard_size;
    config.sync_module_states = options.sync_module_states ? 1 : 0;
    config.cpu_offload = options.cpu_offload ? 1 : 0;
    config.grads_in_param_dtype = options.grads_in_param_dtype ? 1 : 0;
    config.cuda = options.cuda ? &*options.cuda : nullptr;
    struct Call {
      const ModuleInit& init;
      std::exception_ptr thrown;
    } call{options.param_init_fn, nullptr};
    if (options.param_init_fn) {
      config.param_init_fn = +[](const fsdp_module_init_t* init, void* user_data) -> std::int32_t {
        auto* call = static_cast<Call*>(user_data);
        try {
          call->init(*init);
          return 0;
        } catch (...) {
          call->thrown = std::current_exception();
          return -1;
        }
      };
      config.param_init_user_data = &call;
    }
    fsdp_engine_t* engine = nullptr;
    const fsdp_status_t status = fsdp_engine_create(model.get(), comm.get(), &config, &engine);
    if (call.thrown) std::rethrow_exception(call.thrown);
    model.rethrow();
    check(status, "cannot shard the model");
    handle_.reset(engine, fsdp_engine_destroy);
  }

  /// How many units there are. Local.
  std::uint32_t unit_count() const {
    std::uint32_t count = 0;
    check(fsdp_engine_unit_count(get(), &count));
    return count;
  }

  /// How many parameters there are, tied ones counted once. Local.
  std::uint32_t param_count() const {
    std::uint32_t count = 0;
    check(fsdp_engine_param_count(get(), &count));
    return count;
  }

  /// About one unit. Local.
  UnitInfo unit_info(std::uint32_t unit) const {
    UnitInfo info{};
    info.struct_size = sizeof(info);
    check(fsdp_engine_unit_info(get(), unit, &info));
    return info;
  }

  /// About one parameter. Local.
  ParamInfo param_info(std::uint32_t param) const {
    ParamInfo info{};
    info.struct_size = sizeof(info);
    check(fsdp_engine_param_info(get(), param, &info));
    return info;
  }

  /// Everything about units, parameters, their places, states and counters as JSON; see
  /// fsdp_engine_describe. Local.
  std::string describe() const {
    std::size_t size = 0;
    check(fsdp_engine_describe(get(), nullptr, 0, &size));
    std::string text(size + 64, '\0');  // some room: counters may have grown by a digit
    check(fsdp_engine_describe(get(), text.data(), text.size(), &size));
    text.resize(size - 1);
    return text;
  }

  /// The unit that a module is, or whose parameters it has. Local.
  std::uint32_t unit_of_module(std::uint32_t module) const {
    std::uint32_t unit = 0;
    check(fsdp_engine_unit_of_module(get(), module, &unit));
    return unit;
  }

  /// Whether the next forwards are followed by a backward (the default) or not. Local.
  void set_grad_enabled(bool enabled) {
    check(fsdp_engine_set_grad_enabled(get(), enabled ? 1 : 0));
  }

  /// What happens to a unit after a forward that a backward follows: kReshardDefault, kReshardNever,
  /// kReshardAlways, or a number of ranks to reshard it over. Collective.
  void set_reshard_after_forward(std::uint32_t unit, std::int32_t reshard_after_forward) {
    check(fsdp_engine_set_reshard_after_forward(get(), unit, reshard_after_forward));
  }

  /// Whether backwards from here on reduce their gradients, or leave them unsharded for a later one
  /// to add to and reduce. The same on every rank. Local.
  void set_requires_gradient_sync(bool required) {
    check(fsdp_engine_set_requires_gradient_sync(get(), required ? 1 : 0));
  }

  /// Whether backwards from here on end the iteration; the last one of a step must. The same on
  /// every rank. Local.
  void set_is_last_backward(bool last) {
    check(fsdp_engine_set_is_last_backward(get(), last ? 1 : 0));
  }

  /// Whether backwards from here on average gradients over replicas. The same on every rank. Local.
  void set_requires_all_reduce(bool required) {
    check(fsdp_engine_set_requires_all_reduce(get(), required ? 1 : 0));
  }

  /// Whether a parameter gets gradients from the next iteration on. Local.
  void set_requires_grad(std::uint32_t param, bool requires_grad) {
    check(fsdp_engine_set_requires_grad(get(), param, requires_grad ? 1 : 0));
  }

  /// Issues all-gathers one unit ahead, in the order that was traced; the same on every rank. Local.
  void set_prefetch_order(const Trace& trace) {
    check(fsdp_engine_set_prefetch_order(get(), trace.get()));
  }

  /// A forward of the whole model begins; for hosts that do not call pre_forward of the root. The
  /// order of a `training` one is compared. Local.
  void begin_forward(bool training) { check(fsdp_engine_begin_forward(get(), training ? 1 : 0)); }
  /// It has ended: what is unsharded from here on is for a backward. Local.
  void end_forward() { check(fsdp_engine_end_forward(get())); }

  /// The hook before a unit's forward: its parameters can be read afterwards. Collective.
  void pre_forward(std::uint32_t unit) { check(fsdp_engine_pre_forward(get(), unit)); }
  /// The hook after a unit's forward.
  void post_forward(std::uint32_t unit) { check(fsdp_engine_post_forward(get(), unit)); }
  /// The hook before a unit's backward: its parameters can be read afterwards. Collective.
  void pre_backward(std::uint32_t unit) { check(fsdp_engine_pre_backward(get(), unit)); }
  /// The hook after a unit's backward: its gradients are complete. Collective.
  void post_backward(std::uint32_t unit) { reduced(fsdp_engine_post_backward(get(), unit)); }

  /// Makes a unit's parameters readable and returns the unit buffer. Collective.
  float* unshard(std::uint32_t unit) {
    void* buffer = nullptr;
    check(fsdp_engine_unshard(get(), unit, &buffer));
    return static_cast<float*>(buffer);
  }
  /// Ends reading a unit until its backward: reshards it as set_reshard_after_forward says. Local.
  void reshard_after_forward(std::uint32_t unit) {
    check(fsdp_engine_reshard_after_forward(get(), unit));
  }
  /// Ends reading a unit. Local.
  void reshard(std::uint32_t unit) { check(fsdp_engine_reshard(get(), unit)); }
  /// Starts reducing a unit's gradients, which are complete. Collective.
  void reduce(std::uint32_t unit) { reduced(fsdp_engine_reduce(get(), unit)); }
  /// Ends a forward that no backward follows.
  void finish_forward() { check(fsdp_engine_finish_forward(get())); }
  /// Ends a backward: every gradient shard is complete and shards may be written. Collective.
  void finish_backward() { reduced(fsdp_engine_finish_backward(get())); }
  /// Waits until this rank's shards may be written. Collective.
  void begin_write() { check(fsdp_engine_begin_write(get())); }

  /// On a GPU: what the host launches from here on, it launches on `stream`, a CUstream. Local; see
  /// fsdp_engine_set_compute_stream.
  void set_compute_stream(void* stream) {
    check(fsdp_engine_set_compute_stream(get(), stream));
  }
  /// Throws what has broken the engine's communicators, if anything has. Local; does not wait.
  void async_error() { check(fsdp_engine_async_error(get())); }
  /// Waits until the GPU has done what this engine gave it. Local; see fsdp_engine_synchronize.
  void synchronize() { check(fsdp_engine_synchronize(get())); }

  /// The full parameter in the type it is computed in; an error while its unit is sharded. Local.
  fsdp_tensor_t param_data(std::uint32_t param) const {
    fsdp_tensor_t tensor{};
    check(fsdp_engine_param_data(get(), param, &tensor));
    return tensor;
  }

  /// The full-size gradient region of a parameter (float32, unless grads_in_param_dtype), and whether
  /// to add to it (true) or to write it (false: its contents are undefined). Marks the gradient
  /// present.
  std::pair<fsdp_tensor_t, bool> param_grad(std::uint32_t param) {
    fsdp_tensor_t tensor{};
    std::int32_t accumulate = 0;
    check(fsdp_engine_param_grad(get(), param, &tensor, &accumulate));
    return {tensor, accumulate != 0};
  }

  /// The same region, for an operator that is about to compute the gradient there. Nothing counts
  /// as present before param_grad.
  std::pair<fsdp_tensor_t, bool> reserve_grad(std::uint32_t param) {
    fsdp_tensor_t tensor{};
    std::int32_t accumulate = 0;
    check(fsdp_engine_reserve_grad(get(), param, &tensor, &accumulate));
    return {tensor, accumulate != 0};
  }

  /// Writes or adds a full-size gradient, float32 or of the type that the parameter is computed in,
  /// into its region.
  void accumulate_grad(std::uint32_t param, const TensorView& grad) {
    const fsdp_tensor_t c_tensor = grad.c_tensor();
    check(fsdp_engine_accumulate_grad(get(), param, &c_tensor));
  }

  /// The same for several parameters, each once: grads[i] is that of params[i]. On a GPU one launch
  /// for each type. Nothing has changed if it throws INVALID_ARGUMENT or INVALID_STATE.
  void accumulate_grads(const std::vector<std::uint32_t>& params,
                        const std::vector<TensorView>& grads) {
    if (params.size() != grads.size()) {
      throw Error(FSDP_ERR_INVALID_ARGUMENT,
                  std::to_string(params.size()) + " parameters and " +
                      std::to_string(grads.size()) + " gradients [" +
                      fsdp_status_name(FSDP_ERR_INVALID_ARGUMENT) + "]");
    }
    std::vector<fsdp_tensor_t> c_tensors;
    for (const TensorView& grad : grads) c_tensors.push_back(grad.c_tensor());
    check(fsdp_engine_accumulate_grads(get(), params.data(), c_tensors.data(), params.size()));
  }

  /// This rank's piece of a parameter and of its gradient (null while absent). Local.
  Shard shard(std::uint32_t param) const {
    Shard shard{};
    check(fsdp_engine_shard(get(), param, &shard));
    return shard;
  }

  /// Gathers into `out` (the parameter's numel floats) a tensor of which each rank gives its `piece`,
  /// as long as its shard. Collective.
  void gather(std::uint32_t param, const float* piece, float* out) {
    check(fsdp_engine_gather(get(), param, piece, out), "cannot gather");
  }

  /// Forgets a parameter's gradient shard. Local.
  void clear_grad(std::uint32_t param) { check(fsdp_engine_clear_grad(get(), param)); }
  /// Forgets every gradient shard. Local.
  void zero_grad() { check(fsdp_engine_zero_grad(get())); }

  /// The norm of order `p` of the gradients of all parameters and ranks; see fsdp_engine_grad_norm.
  /// Collective.
  double grad_norm(double p = 2) const {
    double norm = 0;
    check(fsdp_engine_grad_norm(get(), p, &norm));
    return norm;
  }

  /// Scales the gradients so that their norm is at most `max_norm`, and returns what it was. A norm
  /// that is not finite throws NONFINITE if `error_if_nonfinite`. Collective.
  double clip_grad_norm(double max_norm, double p = 2, bool error_if_nonfinite = false) {
    double norm = 0;
    check(fsdp_engine_clip_grad_norm(get(), max_norm, p, error_if_nonfinite ? 1 : 0, &norm));
    return norm;
  }

  /// The norm of `pieces`, this rank's of each parameter, null where it has none; see
  /// fsdp_engine_total_norm. Collective.
  double total_norm(const std::vector<const float*>& pieces, double p = 2,
                    bool error_if_nonfinite = false) const {
    double norm = 0;
    check(fsdp_engine_total_norm(get(), pieces.data(), pieces.size(), p, error_if_nonfinite ? 1 : 0,
                                 &norm));
    return norm;
  }

  /// Calls `hook` with each unit's gradients on this rank just before they are reduced; an empty
  /// one: nothing. It may not call this engine. What it throws is rethrown by the call that started
  /// the reduction, and aborts the communicator. Local; see fsdp_engine_set_comm_hook.
  void set_comm_hook(CommHook hook) {
    const bool none = !hook;
    check(fsdp_engine_set_comm_hook(get(), none ? nullptr : &detail::HookState::call,
                                    none ? nullptr : hook_.get()));
    hook_->hook = std::move(hook);
  }

  /// Sizes and counters of this rank. Local.
  Stats stats() const {
    Stats stats{};
    stats.struct_size = sizeof(stats);
    check(fsdp_engine_stats(get(), &stats));
    return stats;
  }

  /// What the engine has taken on its GPU and done there; throws UNSUPPORTED on the CPU. Local.
  CudaStats cuda_stats() const {
    CudaStats stats{};
    stats.struct_size = sizeof(stats);
    check(fsdp_engine_cuda_stats(get(), &stats));
    return stats;
  }

  /// Writes shards and `states` (per-parameter arrays as long as the shard) to `dir`, complete or
  /// not at all, with texts of the caller's by key. Every rank names the same states in the same
  /// order. Collective.
  void save_checkpoint(const std::string& dir, const std::vector<fsdp_state_t>& states = {},
                       const std::map<std::string, std::string>& metadata = {}) const {
    std::vector<fsdp_metadata_t> texts;
    for (const auto& [key, value] : metadata) texts.push_back({key.c_str(), value.c_str()});
    check(fsdp_checkpoint_save(get(), dir.c_str(), states.data(), states.size(), texts.data(),
                               texts.size()),
          "cannot save the checkpoint '" + dir + "'");
  }

  /// Fills shards and `states` from a checkpoint of any world size; on error nothing has changed.
  /// Collective.
  void load_checkpoint(const std::string& dir, const std::vector<fsdp_state_t>& states = {}) {
    check(fsdp_checkpoint_load(get(), dir.c_str(), states.data(), states.size()),
          "cannot load the checkpoint '" + dir + "'");
  }

  /// The communicator this engine was made on.
  const Communicator& communicator() const noexcept { return comm_; }

  /// The C handle, owned by this object.
  fsdp_engine_t* get() const noexcept { return handle_.get(); }

 private:
  /// After a call that may have run the hook.
  void reduced(fsdp_status_t status) const {
    hook_->rethrow();
    check(status);
  }

  Communicator comm_;
  // Outlives the C engine, which calls it.
  std::shared_ptr<detail::HookState> hook_ = std::make_shared<detail::HookState>();
  std::shared_ptr<fsdp_engine_t> handle_;
};

/// The key of the text that a caller of the LibTorch binding keeps with a checkpoint.
inline constexpr const char* kUserMetadata = "user";

/// The text that the checkpoint in `dir` keeps under `key`, "" if it has none. Local; throws when
/// there is no complete checkpoint.
inline std::string checkpoint_metadata(const std::string& dir,
                                       const std::string& key = kUserMetadata) {
  const std::string context = "cannot read the metadata of the checkpoint '" + dir + "'";
  std::size_t size = 0;
  check(fsdp_checkpoint_metadata(dir.c_str(), key.c_str(), nullptr, 0, &size), context);
  std::vector<char> text(size + 1, '\0');
  check(fsdp_checkpoint_metadata(dir.c_str(), key.c_str(), text.data(), text.size(), &size),
        context);
  return std::string(text.data());
}

}  // namespace fsdp
