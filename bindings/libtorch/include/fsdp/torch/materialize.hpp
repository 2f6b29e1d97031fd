// Values for parameters and buffers without storage (meta or deferred), while they are sharded.
//
// The engine asks module by module, one unit at a time, and gives the parameters' memory. It is put
// under the module's own tensors, in place, for as long as an initializer runs; afterwards they are
// what they were, so that nothing dangles whatever happens, and the shards take their place only
// when all has succeeded. Buffers get memory of their own, which stays.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fsdp/torch/deferred.hpp"
#include "fsdp/torch/module_walk.hpp"
#include "fsdp/torch/options.hpp"
#include "fsdp/torch/reset.hpp"
#include "fsdp/torch/tensor_backup.hpp"
#include "fsdp/torch/tensors.hpp"
#include "fsdp/torch/untouched.hpp"

namespace fsdp::detail {

/// Tells a model how its parameters without storage are initialized. Lives until the engine has
/// been made; unless keep_buffers() was called, everything is as before when it ends.
class Materializer {
 public:
  /// `walk` is described and wrapped, and outlives this object as `options` does. Throws when
  /// something has no initializer, naming it.
  Materializer(ModuleWalk& walk, const ShardOptions& options) : walk_(walk) {
    if (options.param_init_fn) {
      init_ = &*options.param_init_fn;
      if (!*init_) {
        throw Error(FSDP_ERR_INVALID_ARGUMENT,
                    "Expected param_init_fn to be callable, but it is an empty function");
      }
    }
    find_tensors();
    if (works_.empty()) return;
    if (init_ != nullptr) find_units();
    for (auto& [id, work] : works_) {
      init_ != nullptr ? use_init_function(work) : use_own_initializers(work);
    }
  }
  Materializer(const Materializer&) = delete;
  Materializer& operator=(const Materializer&) = delete;

  /// The model is sharded: the buffers keep the memory and values they got.
  void keep_buffers() {
    for (auto& [id, work] : works_) {
      for (Place& buffer : work.buffers) {
        if (buffer.backup) buffer.backup->keep();
      }
    }
  }

 private:
  /// A tensor without storage.
  struct Place {
    at::Tensor tensor;
    std::string name;
    DeferredRecordPtr record;  ///< null for a plain meta tensor
    std::uint32_t param = 0;
    std::optional<TensorBackup> backup;  ///< while it has memory
    at::Tensor memory;                   ///< what it was pointed at
    std::uint32_t version = 0;           ///< when it was
  };

  /// A module that registered such tensors.
  struct Work {
    const WalkedModule* walked;
    std::vector<Place> params;
    std::vector<Place> buffers;
    bool done = false;
  };

  void find_tensors() {
    for (std::uint32_t param = 0; param < walk_.leaves.size(); ++param) {
      const at::Tensor& leaf = walk_.leaves[param];
      if (!leaf.is_meta() || leaf.numel() == 0) continue;
      Place place{leaf, walk_.leaf_names[param], deferred_record(leaf), param, {}, {}, 0};
      work_of(walk_.owners[param].front()).params.push_back(std::move(place));
    }
    std::unordered_set<const c10::TensorImpl*> seen;
    for (const WalkedModule& walked : walk_.modules) {
      if (walked.adopted) continue;
      for (const auto& item : walked.module->named_buffers(/*recurse=*/false)) {
        const at::Tensor& buffer = item.value();
        if (!buffer.is_meta() || !seen.insert(buffer.unsafeGetTensorImpl()).second) continue;
        const std::string prefix = walked.name.empty() ? walked.name : walked.name + ".";
        Place place{buffer, prefix + item.key(), deferred_record(buffer), 0, {}, {}, 0};
        work_of(walked.id).buffers.push_back(std::move(place));
      }
    }
  }

  Work& work_of(std::uint32_t module) {
    return works_.try_emplace(module, Work{walk_.find(module), {}, {}, false}).first->second;
  }

  /// Which modules are no units: the policy has said so to the model, which asks about the others.
  void find_units() {
    walk_.model.wrap_if([this](const ModuleInfo& info) {
      inner_.insert(info.module);
      return false;
    });
  }

  std::uint32_t unit_of(std::uint32_t module) const {
    while (inner_.count(module) != 0) module = walk_.parents[module];
    return module;
  }

  void use_init_function(Work& work) {
    if (work.params.empty()) require_no_parameters(work, work.buffers.front());
    walk_.model.set_reset(work.walked->id, [this, &work](const fsdp_module_init_t& init) {
      DeferredScope deferred;
      open_unit(work, deferred);
      run(work, init, "param_init_fn", [&] { (*init_)(*work.walked->module); });
    });
  }

  void use_own_initializers(Work& work) {
    for (Place& param : work.params) {
      if (!param.record) continue;
      walk_.model.set_param_init(
          param.param, [record = param.record](std::uint32_t, const fsdp_tensor_t& memory) {
            replay_into(*record, blob_of(memory));
          });
    }
    for (Place& buffer : work.buffers) {
      if (!buffer.record) continue;
      buffer.backup.emplace(buffer.tensor);
      materialize_in_place(buffer.tensor);
    }
    const auto plain = [](const Place& place) { return place.record == nullptr; };
    const auto param = std::find_if(work.params.begin(), work.params.end(), plain);
    const auto buffer = std::find_if(work.buffers.begin(), work.buffers.end(), plain);
    std::string what;
    if (param != work.params.end()) {
      what = "parameter '" + param->name + "'";
    } else if (buffer != work.buffers.end()) {
      require_no_parameters(work, *buffer);
      what = "buffer '" + buffer->name + "'";
    } else {
      return;
    }
    const auto reset = find_reset(work, what);
    walk_.model.set_reset(work.walked->id, [this, &work, reset](const fsdp_module_init_t& init) {
      run(work, init, "reset_parameters()", reset);
    });
  }

  /// `what` needs it.
  std::function<void()> find_reset(const Work& work, std::string what) const {
    what += " has no storage, and module " + module_label(*work.walked);
    const std::string remedy =
        "set ShardOptions::param_init_fn, or construct the model inside of fsdp::deferred_init";
    for (std::uint32_t m = work.walked->id; m != 0; m = walk_.parents[m]) {
      const WalkedModule* around = walk_.find(walk_.parents[m]);
      if (around != nullptr && dynamic_cast<torch::nn::TransformerImpl*>(around->module)) {
        throw Error(FSDP_ERR_INVALID_ARGUMENT,
                    what + " is a part of torch::nn::Transformer, which initializes its layers "
                           "together: " + remedy);
      }
    }
    const WalkedModule* parent =
        work.walked->root ? nullptr : walk_.find(walk_.parents[work.walked->id]);
    auto reset = reset_of(*work.walked->module, parent == nullptr ? nullptr : parent->module);
    if (!reset) {
      throw Error(FSDP_ERR_INVALID_ARGUMENT,
                  what + " has no reset_parameters() that is known: derive it from "
                         "fsdp::Resettable, " + remedy);
    }
    return reset;
  }

  /// The engine calls modules that need it for their parameters, or have none at all.
  static void require_no_parameters(const Work& work, const Place& buffer) {
    const auto own = work.walked->module->named_parameters(/*recurse=*/false);
    if (own.is_empty()) return;
    throw Error(FSDP_ERR_UNSUPPORTED, "buffer '" + buffer.name + "' of module " +
                                          module_label(*work.walked) +
                                          " has no storage, but its parameter '" + own[0].key() +
                                          "' has: give both storage, or none");
  }

  /// Puts memory under everything in the unit whose module's turn has not come. Parameters get
  /// memory that is not the engine's; it takes no pages until a function writes it.
  /// `deferred` learns what can be replayed there.
  void open_unit(const Work& work, DeferredScope& deferred) {
    const std::uint32_t unit = unit_of(work.walked->id);
    for (auto& [id, other] : works_) {
      if (unit_of(id) != unit) continue;
      for (Place& buffer : other.buffers) {
        put_buffer(buffer);
        if (buffer.record) deferred.add(buffer.tensor, buffer.record);
      }
      for (Place& param : other.params) {
        if (!other.done && !param.backup) {
          param.memory = at::empty(param.tensor.sizes(),
                                    at::TensorOptions(param.tensor.scalar_type()));
          put(param);
        }
        if (param.backup && param.record) deferred.add(param.tensor, param.record);
      }
    }
  }

  static at::Tensor blob_of(const fsdp_tensor_t& memory) {
    return at::from_blob(static_cast<char*>(memory.data) + memory.byte_offset,
                         at::IntArrayRef(memory.shape, static_cast<std::size_t>(memory.ndim)),
                         scalar_type_of(memory.dtype));
  }

  static std::uint32_t version_of(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->version_counter().current_version();
  }

  /// Points the tensor at `place.memory`.
  static void put(Place& place) {
    if (!place.backup) place.backup.emplace(place.tensor);
    point_at(place.tensor, place.memory);
    place.version = version_of(place.tensor);
  }

  static void put_buffer(Place& buffer) {
    if (buffer.backup) return;  // it has memory, or was made from its record
    buffer.memory = untouched_like(buffer.tensor, buffer.name);
    put(buffer);
  }

  static bool has(const Place& place, const at::Tensor& memory) {
    return place.tensor.const_data_ptr() == memory.const_data_ptr() &&
           place.tensor.is_contiguous();
  }

  /// One module's turn: `init` has the memory of its parameters.
  void run(Work& work, const fsdp_module_init_t& init, const std::string& who,
           const std::function<void()>& call) {
    const std::string what = who + " of module " + module_label(*work.walked);
    for (Place& buffer : work.buffers) put_buffer(buffer);
    for (std::uint32_t i = 0; i < init.param_count; ++i) {
      Place& param = place_of(work, init.params[i]);
      const at::Tensor memory = blob_of(init.tensors[i]);
      if (param.backup) take(param, memory, what);  // another module's turn may have written it
      param.memory = memory;
      put(param);
    }
    call();
    for (std::uint32_t i = 0; i < init.param_count; ++i) {
      Place& param = place_of(work, init.params[i]);
      take(param, param.memory, what);
      param.backup.reset();
      param.memory.reset();
    }
    for (const Place& buffer : work.buffers) check_buffer(buffer, what);
    work.done = true;
  }

  static Place& place_of(Work& work, std::uint32_t param) {
    for (Place& place : work.params) {
      if (place.param == param) return place;
    }
    throw Error(FSDP_ERR_INVALID_STATE, "the engine asks for a parameter of another module");
  }

  /// Brings what was written to `param` into `memory`, if it is not there.
  static void take(const Place& param, const at::Tensor& memory, const std::string& what) {
    const at::Tensor& tensor = param.tensor;
    if (!tensor.device().is_cpu() || tensor.scalar_type() != memory.scalar_type() ||
        tensor.layout() != at::kStrided || tensor.sizes() != memory.sizes()) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  what + " made parameter '" + param.name + "' a tensor of another kind: " +
                      tensor.toString() + " " + c10::str(tensor.sizes()) + " instead of " +
                      c10::toString(memory.scalar_type()) + " " + c10::str(memory.sizes()) +
                      " on the CPU");
    }
    if (has(param, memory)) return;
    const bool untouched = has(param, param.memory) && version_of(tensor) == param.version;
    if (!untouched) memory.copy_(tensor.detach());
  }

  static void check_buffer(const Place& buffer, const std::string& what) {
    if (buffer.tensor.is_meta()) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "buffer '" + buffer.name + "' has no storage after " + what);
    }
    if (!buffer.memory.defined() || !has(buffer, buffer.memory) ||
        buffer.tensor.dtype() != buffer.memory.dtype()) {
      return;  // not ours any more
    }
    const bool written = version_of(buffer.tensor) != buffer.version;
    if (const auto element = first_untouched(buffer.memory, written, buffer.name)) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "buffer '" + buffer.name + "' was left uninitialized by " + what + " (element " +
                      std::to_string(*element) + ")");
    }
  }

  ModuleWalk& walk_;
  const std::function<void(torch::nn::Module&)>* init_ = nullptr;
  std::map<std::uint32_t, Work> works_;  // by module number, hence in the order of the walk
  std::set<std::uint32_t> inner_;        // modules that are no units
};

}  // namespace fsdp::detail
