// What a module will take when it is sharded, before it is.
#pragma once

#include <torch/torch.h>

#include <cstdint>

#include "fsdp/plan.hpp"
#include "fsdp/torch/options.hpp"
#include "fsdp/torch/precision.hpp"
#include "fsdp/torch/shard_walk.hpp"

namespace fsdp {

/// Bytes and collectives of fully_shard(module, options) over `world_size` ranks, with an
/// optimizer that keeps so many bytes per element. Neither storage nor the device is needed. Local.
inline Plan plan(torch::nn::Module& module, const ShardOptions& options, std::uint32_t world_size,
                 std::uint32_t optimizer_bytes_per_element) {
  const EngineConfig config = detail::engine_config(options);
  const at::Device device = detail::device_of(module, options);
  detail::ShardWalk walk(module, options, device);
  options.wrap.apply(walk.model, walk.modules);
  const detail::PrecisionPlan precision(options, walk);
  PlanRequest request;
  request.world_size = world_size;
  request.strategy = config.strategy;
  request.reduce_dtype = config.reduce_dtype;
  request.param_dtype = config.param_dtype;
  request.gradient_slots = config.gradient_slots;
  request.optimizer_bytes_per_element = optimizer_bytes_per_element;
  request.shard_size = config.shard_size;
  request.cpu_offload = config.cpu_offload;
  request.grads_in_param_dtype = device.is_cpu();
  request.device = device.is_cpu() ? DeviceType::cpu : DeviceType::cuda;
  request.prefetch = detail::units_ahead(options);
  return plan(walk.model, request);
}

}  // namespace fsdp
