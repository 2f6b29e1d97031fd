// What fully_shard is told: the communicator, which modules become units, when units are unsharded,
// how gradients are reduced, and how parameters without storage get their values.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "fsdp/torch/trace.hpp"
#include "fsdp/torch/wrap.hpp"

namespace fsdp {

/// The types of what ranks exchange. Parameters, their shards and gradient shards are float32.
struct MixedPrecision {
  /// What units are unsharded to: kFloat; others throw UNSUPPORTED.
  at::ScalarType param_dtype = at::kFloat;
  /// What each rank rounds its gradients to (to nearest even) before they are summed in float32:
  /// kFloat, kHalf or kBFloat16.
  at::ScalarType reduce_dtype = at::kFloat;
};

/// The options of fully_shard; the same on every rank.
struct ShardOptions {
  /// The ranks to shard over; required.
  Communicator comm = {};
  /// Which modules become units.
  WrapPolicy wrap = {};
  /// Buffers for units' full gradients; 0 is the engine's default, one more than the levels of
  /// nested units. A unit that finds all taken collects in memory of its own.
  std::uint32_t gradient_slots = 0;
  /// Whether a unit is resharded after each use, or stays unsharded from its forward until its
  /// backward has ended; and how many ranks it is spread over. The root stays unsharded between its
  /// forward and its backward in any case.
  Strategy strategy = Strategy::full_shard;
  /// Ranks of a shard group, a divisor of the world size, with the hybrid strategies; else 0.
  std::uint32_t shard_size = 0;
  /// What is done about ranks that run different forwards. Only forwards in training mode
  /// (train()) with gradients enabled are compared with the first iteration.
  OrderCheck order_check = OrderCheck::error;
  MixedPrecision mixed_precision = {};
  /// Initializes what has no storage (meta or deferred), instead of reset_parameters() and of the
  /// records of deferred_init. Called once on every rank for each module that itself registered
  /// such a parameter or buffer: unit by unit, the root first; within a unit in the order of
  /// registration. All of them in the module's unit have memory during the call (those of other
  /// units do not), gradients are disabled, and each element must be written by the time that its
  /// own module's call ends. Values may be written in place, by set_data(), or by
  /// fsdp::materialize_module(). An exception on one rank is an error on every rank. An empty
  /// function throws INVALID_ARGUMENT.
  std::optional<std::function<void(torch::nn::Module&)>> param_init_fn = {};
  /// The order in which units are unsharded: each one's all-gather is issued when the one before it
  /// is unsharded. A trace of the same module, from trace_forward, the same on every rank.
  std::optional<ExecutionTrace> prefetch_order = {};
};

namespace detail {

/// The engine's part of the options. Throws for what cannot be done.
inline EngineConfig engine_config(const ShardOptions& options) {
  EngineConfig config;
  config.gradient_slots = options.gradient_slots;
  config.strategy = options.strategy;
  config.shard_size = options.shard_size;
  config.order_check = options.order_check;
  if (options.mixed_precision.param_dtype != at::kFloat) {
    throw Error(FSDP_ERR_UNSUPPORTED,
                std::string("MixedPrecision::param_dtype = ") +
                    c10::toString(options.mixed_precision.param_dtype) +
                    " is not supported: only Float is");
  }
  switch (options.mixed_precision.reduce_dtype) {
    case at::kFloat:
      break;
    case at::kHalf:
      config.reduce_dtype = {FSDP_DTYPE_FLOAT, 16, 1};
      break;
    case at::kBFloat16:
      config.reduce_dtype = {FSDP_DTYPE_BFLOAT, 16, 1};
      break;
    default:
      throw Error(FSDP_ERR_UNSUPPORTED,
                  std::string("MixedPrecision::reduce_dtype = ") +
                      c10::toString(options.mixed_precision.reduce_dtype) +
                      " is not supported: Float, Half and BFloat16 are");
  }
  return config;
}

}  // namespace detail
}  // namespace fsdp
