// What fully_shard is told: the communicator, which modules become units, when units are unsharded,
// how gradients are reduced, and how parameters without storage get their values.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fsdp/torch/device.hpp"
#include "fsdp/torch/input_cast.hpp"
#include "fsdp/torch/tensors.hpp"
#include "fsdp/torch/trace.hpp"
#include "fsdp/torch/wrap.hpp"

namespace fsdp {

/// The types that a module computes and communicates in. The shards that optimizers see, and their
/// gradients, are float32 in every case.
///
/// Parameters, inputs and outputs can be Float, Half and BFloat16; outputs and buffers Double too.
struct MixedPrecision {
  /// What parameters are unsharded to; the module's own parameters are tensors of this type. Unset:
  /// the type each was registered with.
  std::optional<at::ScalarType> param_dtype = {};
  /// What each rank rounds its gradients to (to nearest even) before they are summed in float32, in
  /// rank order. Unset: as param_dtype; float32 if that is unset too.
  std::optional<at::ScalarType> reduce_dtype = {};
  /// What floating tensors that the handle's forward returns are cast to. Unset: they stay.
  std::optional<at::ScalarType> output_dtype = {};
  /// What the module's floating buffers are cast to by fully_shard. Unset: they stay.
  std::optional<at::ScalarType> buffer_dtype = {};
  /// Whether floating tensors among the arguments of the handle's forward are cast to param_dtype,
  /// and, at an operator of the forward that gets a unit's parameter, its other floating arguments
  /// to that unit's param_dtype (so that units of different types can follow each other).
  /// Arguments that it writes, the module's parameters and its buffers stay as they are.
  bool cast_forward_inputs = true;
};

/// The same for one unit; what is unset is as in ShardOptions::mixed_precision (an unset
/// reduce_dtype that is unset there too: as the unit's param_dtype).
struct UnitMixedPrecision {
  std::optional<at::ScalarType> param_dtype = {};
  std::optional<at::ScalarType> reduce_dtype = {};
  std::optional<at::ScalarType> buffer_dtype = {};
  std::optional<bool> cast_forward_inputs = {};
};

/// The options of fully_shard; the same on every rank.
struct ShardOptions {
  /// The ranks to shard over; required.
  Communicator comm = {};
  /// Which modules become units.
  WrapPolicy wrap = {};
  /// Where the model computes: the CPU or, with or without a number, a GPU (at::kCUDA). Unset: where
  /// its parameters are, the CPU for those without storage. Parameters and buffers may be there, on
  /// the CPU (from where they are brought to it), or without storage. Each rank has its own GPU.
  std::optional<at::Device> device = {};
  /// Buffers for units' full gradients; 0 is the engine's default, one more than the levels of
  /// nested units. A unit that finds all taken collects in memory of its own.
  std::uint32_t gradient_slots = 0;
  /// Whether a unit is resharded after each use, or stays unsharded from its forward until its
  /// backward has ended; and how many ranks it is spread over. The root stays unsharded between its
  /// forward and its backward in any case.
  Strategy strategy = Strategy::full_shard;
  /// Ranks of a shard group, a divisor of the world size, with the hybrid strategies; else 0.
  std::uint32_t shard_size = 0;
  /// What happens to every unit but the root after a forward that a backward follows:
  /// kReshardNever, kReshardAlways, or a number of ranks (a divisor of the shard group's) that it is
  /// resharded over. Unset: as the strategy says. ShardedModule::set_reshard_after_forward chooses
  /// for single units.
  std::optional<std::int32_t> reshard_after_forward = {};
  /// Every rank starts from rank 0's parameters and buffers, which it broadcasts; what the others
  /// hold is not looked at, and may be without storage. Only rank 0 initializes what has none.
  bool sync_module_states = false;
  /// parameters(), their gradients and the state of adamw() and sgd() lie in host memory, apart from
  /// the unit buffers on the device. On the CPU: a second copy of the shards, and the same results.
  bool cpu_offload = false;
  /// Sharding a model on the CPU lets the process's CPU tensors of 64 KiB and more come from the heap
  /// of fsdp.h (fsdp_heap_alloc) from then on, since activations then make room for gradients; its
  /// memory stays with the process. False leaves LibTorch's allocator; so does an allocator of the
  /// program's own, and memory is then higher by up to a rank's gradient shards.
  bool host_heap = true;
  /// Modules that are left alone with all that is below them, and parameters likewise: they stay
  /// whole on every rank, and their gradients are not reduced. parameters() leaves them out; state
  /// dicts of whole tensors have them, checkpoints do not.
  std::vector<std::shared_ptr<torch::nn::Module>> ignored_modules = {};
  std::vector<at::Tensor> ignored_parameters = {};
  /// What is done about ranks that run different forwards. Only forwards in training mode
  /// (train()) with gradients enabled are compared with the first iteration.
  OrderCheck order_check = OrderCheck::error;
  MixedPrecision mixed_precision = {};
  /// Types of single units, by the dotted names of their modules. A part that was sharded before
  /// keeps the types it computes in.
  std::map<std::string, UnitMixedPrecision> unit_mixed_precision = {};
  /// What single parameters are unsharded to, by dotted name (a tied one by its first), whatever
  /// their unit's param_dtype; e.g. Float for the weights of normalizations. Inputs go by the unit.
  std::map<std::string, at::ScalarType> param_dtypes = {};
  /// Initializes what has no storage (meta or deferred), instead of reset_parameters() and of the
  /// records of deferred_init. Called once on every rank for each module that itself registered
  /// such a parameter or buffer: unit by unit, the root first; within a unit in the order of
  /// registration. All of them in the module's unit have memory during the call (those of other
  /// units do not), gradients are disabled, and each element must be written by the time that its
  /// own module's call ends. Values may be written in place, by set_data(), or by
  /// fsdp::materialize_module(). An exception on one rank is an error on every rank. An empty
  /// function throws INVALID_ARGUMENT.
  std::optional<std::function<void(torch::nn::Module&)>> param_init_fn = {};
  /// On a GPU: how many units are gathered ahead of their use at most, given an order (below); each
  /// may take a unit buffer.
  std::uint32_t prefetch_units = 1;
  /// On a GPU: how many unit buffers there are at most; a unit that needs one more is an error. 0:
  /// what the deepest path of nested units needs, and those for units ahead; where that is too few,
  /// memory is taken and given back as units come and go.
  std::uint32_t max_units_in_flight = 0;
  /// On GPUs with several ranks: the fixed unit buffers are memory of NCCL's own, not of LibTorch's
  /// allocator, and registered with NCCL, which then copies nothing in between. An error where NCCL's
  /// version cannot do that, and where ranks do not unshard and reshard units in the same order; see
  /// fsdp_cuda_config_t.registered_buffers.
  bool registered_buffers = false;
  /// The order in which units are unsharded: each one's all-gather is issued when the one before it
  /// is unsharded. A trace of the same module, from trace_forward, the same on every rank.
  std::optional<ExecutionTrace> prefetch_order = {};
};

namespace detail {

/// A type as the C ABI calls it; all zero for unset. Throws for one that parameters cannot have.
inline fsdp_dtype_t c_dtype(std::optional<at::ScalarType> type, const std::string& option) {
  if (!type) return {};
  if (const auto dtype = param_dtype_of(*type)) return *dtype;
  throw Error(FSDP_ERR_UNSUPPORTED, option + " = " + c10::toString(*type) +
                                        " is not supported: Float, Half and BFloat16 are");
}

/// Throws for a type that floating tensors are not cast to.
inline void require_castable(std::optional<at::ScalarType> type, const std::string& option) {
  if (!type || is_castable(*type)) return;
  throw Error(FSDP_ERR_UNSUPPORTED, option + " = " + c10::toString(*type) +
                                        " is not supported: Float, Half, BFloat16 and Double are");
}

/// The engine's part of the options. Throws for what cannot be done.
inline EngineConfig engine_config(const ShardOptions& options) {
  EngineConfig config;
  config.gradient_slots = options.gradient_slots;
  config.strategy = options.strategy;
  config.shard_size = options.shard_size;
  config.sync_module_states = options.sync_module_states;
  config.cpu_offload = options.cpu_offload;
  config.order_check = options.order_check;
  const MixedPrecision& types = options.mixed_precision;
  config.param_dtype = c_dtype(types.param_dtype, "MixedPrecision::param_dtype");
  config.reduce_dtype = c_dtype(types.reduce_dtype, "MixedPrecision::reduce_dtype");
  if (!types.reduce_dtype) config.reduce_dtype = config.param_dtype;
  require_castable(types.output_dtype, "MixedPrecision::output_dtype");
  require_castable(types.buffer_dtype, "MixedPrecision::buffer_dtype");
  return config;
}

/// How many units are gathered ahead: none without an order, so that no buffer is kept for them.
inline std::uint32_t units_ahead(const ShardOptions& options) {
  return options.prefetch_order ? options.prefetch_units : 0;
}

/// The GPU an engine is made on, with the calling thread's current stream and LibTorch's memory.
inline fsdp_cuda_config_t gpu_config(at::Device device, const ShardOptions& options) {
  fsdp_cuda_config_t config = cuda_config(device.index());
  config.prefetch = units_ahead(options);
  config.max_units_in_flight = options.max_units_in_flight;
  config.registered_buffers = options.registered_buffers ? FSDP_REGISTERED_BUFFERS_ALWAYS
                                                         : FSDP_REGISTERED_BUFFERS_NEVER;
  config.compute_stream = current_stream(device);
  config.alloc = [](void* memory, std::size_t bytes, void* stream) {
    return static_cast<LentMemory*>(memory)->take(bytes, stream);
  };
  config.free = [](void* memory, void* address, std::size_t, void*) {
    static_cast<LentMemory*>(memory)->give_back(address);
  };
  config.allocator_user_data = &LentMemory::of(device);
  return config;
}

}  // namespace detail
}  // namespace fsdp
