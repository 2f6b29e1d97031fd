// What a model will take and move when it is sharded, before anything is allocated.
#pragma once

#include <fsdp.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "fsdp/device.hpp"
#include "fsdp/engine.hpp"
#include "fsdp/error.hpp"
#include "fsdp/model.hpp"

namespace fsdp {

/// Bytes on a rank and on a host, and the collectives of a step; see fsdp_plan_t.
using Plan = fsdp_plan_t;
/// The same of one unit; see fsdp_plan_unit_t.
using PlanUnit = fsdp_plan_unit_t;

/// What to plan; see fsdp_plan_request_t.
struct PlanRequest {
  std::uint32_t world_size = 1;
  Strategy strategy = Strategy::full_shard;
  /// All zero for float32.
  fsdp_dtype_t reduce_dtype{};
  /// All zero for the types that parameters are registered with.
  fsdp_dtype_t param_dtype{};
  std::uint32_t gradient_slots = 0;
  /// Optimizer state per element of a trained parameter.
  std::uint32_t optimizer_bytes_per_element = 0;
  /// Whose bytes to tell; empty for the rank with the most.
  std::optional<std::uint32_t> rank;
  /// As in EngineConfig.
  std::uint32_t shard_size = 0;
  bool cpu_offload = false;
  bool grads_in_param_dtype = false;
  /// Where the engine will compute, and how many units it gathers ahead there (on a GPU).
  DeviceType device = DeviceType::cpu;
  std::uint32_t prefetch = 1;

  /// The C struct.
  fsdp_plan_request_t c_request() const {
    fsdp_plan_request_t request = FSDP_PLAN_REQUEST_INIT;
    request.world_size = world_size;
    request.strategy = static_cast<std::int32_t>(strategy);
    request.reduce_dtype = reduce_dtype;
    request.param_dtype = param_dtype;
    request.shard_size = shard_size;
    request.cpu_offload = cpu_offload ? 1 : 0;
    request.grads_in_param_dtype = grads_in_param_dtype ? 1 : 0;
    request.device_type = static_cast<std::int32_t>(device);
    request.prefetch = prefetch;
    request.gradient_slots = gradient_slots;
    request.optimizer_bytes_per_element = optimizer_bytes_per_element;
    constexpr std::uint32_t most = std::numeric_limits<std::int32_t>::max();
    if (rank) request.rank = static_cast<std::int32_t>(std::min(*rank, most));
    return request;
  }
};

/// Says what an engine on the model, as it is wrapped by now, would take and move. Its parameters
/// need no storage. Local.
inline Plan plan(const Model& model, const PlanRequest& options) {
  const fsdp_plan_request_t request = options.c_request();
  Plan plan{};
  plan.struct_size = sizeof(plan);
  check(fsdp_plan(model.get(), &request, &plan), "cannot plan the model");
  return plan;
}

/// The same for one unit: 0 is the root, the others follow as in an engine. Local.
inline PlanUnit plan_unit(const Model& model, const PlanRequest& options, std::uint32_t unit) {
  const fsdp_plan_request_t request = options.c_request();
  PlanUnit plan{};
  plan.struct_size = sizeof(plan);
  check(fsdp_plan_unit(model.get(), &request, unit, &plan), "cannot plan the model");
  return plan;
}

}  // namespace fsdp
