// Execution-order tracing: which modules a forward enters and which parameters it uses, without
// data.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "fsdp/error.hpp"
#include "fsdp/model.hpp"

namespace fsdp {

/// Parameters that a module needed at one point of its forward.
struct ParamUsage {
  std::uint32_t module;               ///< the module it called, or itself for its own operations
  std::vector<std::uint32_t> params;  ///< all in and below the called one, or what was read
};

/// The recorded order of one forward. Copies share it. Local. One thread at a time.
class Trace {
 public:
  /// An empty trace of a forward of `model` as it is now.
  explicit Trace(const Model& model) {
    fsdp_trace_t* trace = nullptr;
    check(fsdp_trace_create(model.get(), &trace), "cannot create the trace");
    handle_.reset(trace, fsdp_trace_destroy);
  }

  /// The forward of `module` begins, inside that of the module entered last; the root's (0) first.
  void enter(std::uint32_t module) { check(fsdp_trace_enter(get(), module)); }
  /// One operation of the module entered last reads these parameters.
  void use(const std::vector<std::uint32_t>& params) {
    check(fsdp_trace_use(get(), params.data(), static_cast<std::uint32_t>(params.size())));
  }
  /// The forward of `module`, the one entered last, ends.
  void leave(std::uint32_t module) { check(fsdp_trace_leave(get(), module)); }

  /// The modules in the order they were entered, each as often as it was.
  std::vector<std::uint32_t> module_order() const { return list(fsdp_trace_module_order); }
  /// The parameters in the order of their first use.
  std::vector<std::uint32_t> param_order() const { return list(fsdp_trace_param_order); }

  /// Whether an operation used the parameter.
  bool visited(std::uint32_t param) const {
    std::int32_t visited = 0;
    check(fsdp_trace_visited(get(), param, &visited));
    return visited != 0;
  }

  /// What was used in the module's own forward, in its latest call, in order.
  std::vector<ParamUsage> usage(std::uint32_t module) const {
    std::uint32_t count = 0;
    check(fsdp_trace_usage_count(get(), module, &count));
    std::vector<ParamUsage> usages;
    for (std::uint32_t i = 0; i < count; ++i) {
      std::uint32_t used = 0;
      std::uint32_t length = 0;
      const std::uint32_t* params = nullptr;
      check(fsdp_trace_usage(get(), module, i, &used, &params, &length));
      usages.push_back({used, std::vector<std::uint32_t>(params, params + length)});
    }
    return usages;
  }

  /// The C handle, owned by this object.
  fsdp_trace_t* get() const noexcept { return handle_.get(); }

 private:
  using List = fsdp_status_t (*)(const fsdp_trace_t*, const std::uint32_t**, std::uint32_t*);

  std::vector<std::uint32_t> list(List read) const {
    const std::uint32_t* numbers = nullptr;
    std::uint32_t count = 0;
    check(read(get(), &numbers, &count));
    return std::vector<std::uint32_t>(numbers, numbers + count);
  }

  std::shared_ptr<fsdp_trace_t> handle_;
};

inline void Model::wrap_trace(const Trace& trace, std::uint64_t min_numel) {
  check(fsdp_model_wrap_trace(get(), trace.get(), min_numel), "wrap_trace");
}

}  // namespace fsdp
