// Execution order without data: a forward on meta tensors, and what it enters and reads.
//
//   auto trace = fsdp::trace_forward(model, [&] {
//     model->forward(torch::empty({8, 6}, at::kMeta));
//   });
//   options.wrap = fsdp::wrap_traced(trace, 1 << 20);
//   options.prefetch_order = trace;
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "fsdp/torch/module_walk.hpp"
#include "fsdp/torch/tensor_backup.hpp"
#include "fsdp/torch/trace_recorder.hpp"

namespace fsdp {

/// What a forward did, as PyTorch's FSDP records it of a symbolically traced one. Names are dotted.
/// The modules must outlive it; the parameters' tensors (not their data) are kept.
struct ExecutionTrace {
  struct Module {
    std::string name;  ///< from the root, "" for the root
    torch::nn::Module* module;
  };
  struct Param {
    std::string name;  ///< from the root, or from the module it is listed with
    at::Tensor param;
  };
  /// A module that was called, with all parameters in and below it, or the module whose own
  /// operator it was, with the parameters that this one read. Names are from that module.
  struct Usage {
    Module module;
    std::vector<Param> params;
  };

  /// One entry per call of a module, in order.
  std::vector<Module> module_forward_order;
  /// For each module that was called: what its last call used, in order.
  std::unordered_map<const torch::nn::Module*, std::vector<Usage>> module_to_param_usage_infos;
  /// Parameters in the order of their first use.
  std::vector<Param> param_forward_order;
  /// Those parameters.
  std::unordered_set<const c10::TensorImpl*> visited_params;
  /// The same, for the engine.
  Trace order;
};

namespace detail {

/// Describes a module for tracing: any parameters will do, no data is looked at.
class TraceWalk final : public ModuleWalk {
 public:
  explicit TraceWalk(torch::nn::Module& root) : ModuleWalk(root) { walk_root(root); }

 private:
  std::uint32_t add_parameter(std::uint32_t module, const std::string& key, const std::string& name,
                              const at::Tensor& tensor) override {
    if (is_sharded(tensor)) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "the module cannot be traced: its parameter '" + name +
                      "' is sharded; trace it before fsdp::fully_shard");
    }
    if (tensor.layout() != at::kStrided) {
      throw Error(FSDP_ERR_UNSUPPORTED, "the module cannot be traced: the layout of parameter '" +
                                            name + "' is not strided (dense)");
    }
    return model.add_parameter(
        module, key, TensorView(static_cast<float*>(nullptr), tensor.sizes().vec()),
        tensor.requires_grad());
  }
};

/// The tracer of this thread; null when nothing is traced.
inline thread_local Tracer* active_tracer = nullptr;

/// Puts meta tensors under a module's parameters and buffers, and has the thread's operators
/// recorded, for as long as it lives; afterwards they, and the random numbers, are as before.
class TraceScope {
 public:
  TraceScope(const TraceWalk& walk, Tracer& tracer)
      : slots_(dispatch_table().thread_slots()),
        outer_recorder_(slots_.recorder),
        outer_tracer_(active_tracer),
        random_(random_state()),
        recorder_(tracer) {
    if (c10::impl::tls_is_dispatch_key_excluded(kTagKey)) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "fsdp::trace_forward was called from inside an operator on a sharded or deferred "
                  "tensor");
    }
    slots_.recorder = nullptr;
    try {
      for (std::uint32_t param = 0; param < walk.leaves.size(); ++param) {
        put_meta(walk.leaves[param]);
        recorder_.add(param, walk.leaves[param]);
      }
      std::unordered_set<const c10::TensorImpl*> seen;
      for (const WalkedModule& walked : walk.modules) {
        for (const at::Tensor& buffer : walked.module->buffers(/*recurse=*/false)) {
          if (seen.insert(buffer.unsafeGetTensorImpl()).second) put_meta(buffer);
        }
      }
    } catch (...) {
      end();
      throw;
    }
    slots_.recorder = &recorder_;
    active_tracer = &tracer;
  }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;
  ~TraceScope() { end(); }

 private:
  void put_meta(const at::Tensor& tensor) {
    const at::Tensor meta = at::empty_strided(tensor.sizes(), tensor.strides(),
                                              tensor.options().device(at::kMeta));
    backups_.emplace_back(tensor);
    point_at(tensor, meta);
  }

  static at::Tensor random_state() {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    const std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.get_state();
  }

  void end() noexcept {
    slots_.recorder = nullptr;
    active_tracer = outer_tracer_;
    while (!backups_.empty()) backups_.pop_back();  // a tensor may be both parameter and buffer
    {
      at::Generator generator = at::detail::getDefaultCPUGenerator();
      const std::lock_guard<std::mutex> lock(generator.mutex());
      generator.set_state(random_);
    }
    slots_.recorder = outer_recorder_;
  }

  ThreadSlots& slots_;
  OperatorRecorder* const outer_recorder_;
  Tracer* const outer_tracer_;
  const at::Tensor random_;
  TraceRecorder recorder_;
  std::vector<TensorBackup> backups_;
  const c10::impl::IncludeDispatchKeyGuard seen_{kTagKey};
};

inline ExecutionTrace describe_trace(const TraceWalk& walk, const Trace& order) {
  ExecutionTrace result{{}, {}, {}, {}, order};
  const auto module_of = [&](std::uint32_t id) {
    const WalkedModule& walked = *walk.find(id);
    return ExecutionTrace::Module{walked.name, walked.module};
  };
  for (std::uint32_t id : order.module_order()) {
    result.module_forward_order.push_back(module_of(id));
    auto& usages = result.module_to_param_usage_infos[result.module_forward_order.back().module];
    if (!usages.empty()) continue;
    for (const auto& usage : order.usage(id)) {
      ExecutionTrace::Usage told{module_of(usage.module), {}};
      const auto named = told.module.module->named_parameters();
      for (std::uint32_t param : usage.params) {
        std::string name = walk.leaf_names[param];
        for (const auto& item : named) {
          if (!item.value().is_same(walk.leaves[param])) continue;
          name = item.key();
          break;
        }
        told.params.push_back({std::move(name), walk.leaves[param]});
      }
      usages.push_back(std::move(told));
    }
  }
  for (std::uint32_t param : order.param_order()) {
    result.param_forward_order.push_back({walk.leaf_names[param], walk.leaves[param]});
    result.visited_params.insert(walk.leaves[param].unsafeGetTensorImpl());
  }
  return result;
}

}  // namespace detail

/// Says inside a module's forward that this forward runs, for trace_forward; does nothing when
/// nothing is traced on this thread.
///
///   at::Tensor forward(const at::Tensor& x) {
///     fsdp::ModuleScope scope(*this);
///     ...
///
/// Needed for modules without parameters to appear in the order, and for modules that read a
/// parameter more than once in one forward (else each time counts as another call).
class ModuleScope {
 public:
  explicit ModuleScope(const torch::nn::Module& module)
      : tracer_(detail::active_tracer != nullptr && detail::active_tracer->announce(module)
                    ? detail::active_tracer
                    : nullptr) {}
  ModuleScope(const ModuleScope&) = delete;
  ModuleScope& operator=(const ModuleScope&) = delete;
  ~ModuleScope() {
    if (tracer_ != nullptr) tracer_->end_announced();
  }

 private:
  detail::Tracer* tracer_;
};

/// Runs `forward`, which calls `module`'s forward with meta tensors, and returns which modules it
/// entered and which parameters it read. While it runs, the module's parameters and buffers are
/// meta tensors, whatever they were, and gradients are disabled; afterwards everything is as before
/// (data, versions, random numbers), also when `forward` throws. What meets them becomes meta as
/// well; operators for which LibTorch has no shape function in C++ run once on memory that is
/// thrown away, of the size of their arguments.
///
/// A call of a module is seen when it reads a parameter that the module itself registered, or when
/// its forward has a ModuleScope. The modules around it are entered before it and left when
/// something is read that is not below them; a parameter that is read again means that its module
/// is called again. A forward that looks at values (item(), data_ptr(), nonzero()) cannot be
/// traced, and what it does on other threads is not seen. Local. Throws INVALID_STATE for a sharded
/// module, and what `forward` throws.
inline ExecutionTrace trace_forward(torch::nn::Module& module,
                                    const std::function<void()>& forward) {
  const torch::NoGradGuard no_grad;
  const detail::TraceWalk walk(module);
  detail::Tracer tracer(walk);
  {
    const detail::TraceScope scope(walk, tracer);
    forward();
  }
  return detail::describe_trace(walk, tracer.finish());
}

/// As above.
template <class Impl>
ExecutionTrace trace_forward(const std::shared_ptr<Impl>& module,
                             const std::function<void()>& forward) {
  return trace_forward(static_cast<torch::nn::Module&>(*module), forward);
}

/// As above, for a module holder, as TORCH_MODULE makes them.
template <class Impl>
ExecutionTrace trace_forward(const torch::nn::ModuleHolder<Impl>& module,
                             const std::function<void()>& forward) {
  return trace_forward(static_cast<torch::nn::Module&>(*module.ptr()), forward);
}

}  // namespace fsdp
