// From a torch::nn module to an engine: describes the module tree, cuts it, and puts the sharded
// storage under the module's own parameters.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/torch/host_heap.hpp"
#include "fsdp/torch/materialize.hpp"
#include "fsdp/torch/model_state.hpp"
#include "fsdp/torch/options.hpp"
#include "fsdp/torch/precision.hpp"
#include "fsdp/torch/shard_walk.hpp"
#include "fsdp/torch/synced_buffers.hpp"

namespace fsdp::detail {

inline std::vector<std::shared_ptr<UnitStorage>> make_units(
    ModelState& state, const std::shared_ptr<ShardedRoot>& root, const ShardWalk& walk,
    const PrecisionPlan& precision) {
  std::vector<std::shared_ptr<UnitStorage>> units;
  Engine& engine = state.engine();
  for (std::uint32_t index = 0; index < engine.unit_count(); ++index) {
    const UnitInfo info = engine.unit_info(index);
    const bool on_cpu = walk.device().is_cpu();
    UnitFace buffer{on_cpu ? info.unit_bytes : info.buffer_bytes, {}, {}};
    UnitFace copies{on_cpu ? info.compute_bytes : info.buffer_bytes, {}, {}};
    std::vector<std::uint32_t> ids(info.params, info.params + info.param_count);
    for (std::uint32_t id : ids) {
      const ParamInfo param = engine.param_info(id);
      const std::int64_t offset = UnitStorage::storage_offset(param, walk.device());
      (param.dtype.bits != 32 ? copies : buffer)
          .params.push_back({walk.leaf_names[id], id, offset, param.numel});
    }
    for (UnitFace* face : {&buffer, &copies}) {
      std::sort(face->params.begin(), face->params.end(),
                [](const UnitParam& a, const UnitParam& b) { return a.offset < b.offset; });
    }
    auto* unit =
        new UnitStorage(&state, root, index, info.name, std::move(buffer), std::move(copies),
                        walk.device());
    if (const auto type = precision.input_type(info.module)) {
      unit->set_input_cast({*type, &state.buffers});
      root->input_types[info.module] = *type;
    }
    unit->retain();
    unit->tree_begin = info.module;
    unit->tree_end = walk.tree_end.at(info.module);
    unit->param_ids = std::move(ids);
    units.emplace_back(unit, [](UnitStorage* unit) { unit->release(); });
  }
  return units;
}

/// The sharded leaf of a parameter: that of the model it was sharded in before, if there is one, so
/// that optimizers go on with it.
inline at::Tensor shard_leaf_of(ModelState& state, const ShardWalk& walk, std::uint32_t id) {
  for (const ShardWalk::Adopted& adopted : walk.adopted) {
    if (id < adopted.param || id - adopted.param >= adopted.root->params.size()) continue;
    return adopted.root->params[id - adopted.param].shard;
  }
  return make_shard_leaf(state.writes, id, walk.leaves[id].requires_grad());
}

inline void install_parameters(const std::shared_ptr<ModelState>& state,
                               const std::shared_ptr<ShardedRoot>& root, const ShardWalk& walk) {
  Engine& engine = state->engine();
  for (std::uint32_t id = 0; id < walk.leaves.size(); ++id) {
    const ParamInfo info = engine.param_info(id);
    ParamState param;
    param.name = walk.leaf_names[id];
    param.unit = state->units.at(info.unit).get();
    param.leaf = walk.leaves[id];
    param.requires_grad = param.leaf.requires_grad();
    param.shard = shard_leaf_of(*state, walk, id);
    param.shard.set_requires_grad(param.requires_grad);
    engine.set_requires_grad(id, param.requires_grad);
    param.poison = make_poison_grad(param.name, param.unit->tensor_of(info));
    root->params.push_back({param.name, param.leaf.unsafeGetTensorImpl(), param.shard});
    state->params.push_back(std::move(param));
  }
  // From here on nothing fails: the module changes as a whole.
  for (const ShardWalk::Adopted& adopted : walk.adopted) {
    if (const auto old = adopted.root->state.lock()) {
      old->replace(state->writes);
    } else {
      adopted.root->writes->hand_over(state->writes);
    }
  }
  for (std::uint32_t id = 0; id < state->params.size(); ++id) {
    ParamState& param = state->params[id];
    const ParamInfo info = engine.param_info(id);
    point_at(param.leaf, param.unit->tensor_of(info));
    param.node =
        install_gradient_node(param.leaf, param.name, id, std::weak_ptr<GradientSink>(state));
    param.leaf.mutable_grad() = param.poison;
  }
  state->writes->attach(walk.leaves, [weak = std::weak_ptr<ModelState>(state)] {
    if (const auto locked = weak.lock()) locked->settle();
  });
}

/// Shards `module` in place over `options.comm` and returns what runs it. Collective. On error the
/// module is unchanged.
inline std::shared_ptr<ModelState> shard_module(torch::nn::Module& module,
                                                const ShardOptions& options) {
  if (!options.comm) {
    throw Error(FSDP_ERR_INVALID_ARGUMENT,
                "fully_shard needs ShardOptions::comm (Communicator::from_env() or single())");
  }
  const torch::NoGradGuard no_grad;
  const DeferredPause real_tensors;
  EngineConfig config = engine_config(options);
  ShardWalk walk(module, options, usable_device(device_of(module, options)));
  if (!walk.device().is_cpu()) config.cuda = gpu_config(walk.device(), options);
  config.grads_in_param_dtype = walk.device().is_cpu();
  options.wrap.apply(walk.model, walk.modules);
  const PrecisionPlan precision(options, walk);
  const bool receives = options.sync_module_states && options.comm.rank() != 0;
  std::optional<Materializer> materializer;
  if (!receives) materializer.emplace(walk, options);
  for (const ShardWalk::Adopted& adopted : walk.adopted) {
    ShardWrites& writes = *adopted.root->writes;
    if (const auto old = adopted.root->state.lock()) {
      old->prepare_replacement();
    } else if (writes.reading()) {
      writes.engine().finish_forward();  // its handle was destroyed in the middle of a backward
      writes.on_closed();
    }
  }
  Engine engine(walk.model, options.comm, config);
  walk.release_data();
  if (options.host_heap && walk.device().is_cpu()) HostHeap::install();
  std::optional<SyncedBuffers> buffers;
  if (options.sync_module_states) buffers.emplace(walk, options.comm);
  if (options.reshard_after_forward) {
    for (std::uint32_t unit = 1; unit < engine.unit_count(); ++unit) {
      engine.set_reshard_after_forward(unit, *options.reshard_after_forward);
    }
  }
  if (options.prefetch_order) engine.set_prefetch_order(options.prefetch_order->order);
  const at::Device shards = options.cpu_offload ? at::Device(at::kCPU) : walk.device();
  auto state =
      std::make_shared<ModelState>(std::make_shared<ShardWrites>(engine, walk.device(), shards));
  auto root = std::make_shared<ShardedRoot>();
  root->module = &module;
  root->first_module = walk.modules.front().id;
  root->module_count = static_cast<std::uint32_t>(walk.parents.size());
  root->writes = state->writes;
  root->state = state;
  state->units = make_units(*state, root, walk, precision);
  for (const WalkedModule& walked : walk.modules) {
    state->module_units.emplace(walked.module, engine.unit_of_module(walked.id));
  }
  install_parameters(state, root, walk);
  if (materializer) materializer->keep_buffers();
  if (buffers) buffers->install();
  precision.finish(*state);
  return state;
}

}  // namespace fsdp::detail
