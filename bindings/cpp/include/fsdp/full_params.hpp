// Whole parameters outside of an iteration: a scope that holds them, and streams of them.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fsdp/engine.hpp"
#include "fsdp/error.hpp"
#include "fsdp/optimizer.hpp"

namespace fsdp {

/// What a scope of full parameters holds; see fsdp_full_params_config_t.
struct FullParamsOptions {
  bool writeback = false;   ///< what the scope holds when it is closed goes to the shards
  bool rank0_only = false;  ///< only rank 0 holds it
  bool with_grads = false;  ///< gradients too
};

/// A scope that holds full float32 parameters. Copies share it; the last one ends it, without
/// writing back.
class FullParams {
 public:
  /// Gathers the parameters of `units`, of all if null. Collective.
  explicit FullParams(Engine& engine, const FullParamsOptions& options = {},
                      const std::vector<std::uint32_t>* units = nullptr) {
    fsdp_full_params_config_t config = FSDP_FULL_PARAMS_CONFIG_INIT;
    config.writeback = options.writeback ? 1 : 0;
    config.rank0_only = options.rank0_only ? 1 : 0;
    config.with_grads = options.with_grads ? 1 : 0;
    fsdp_full_params_t* full = nullptr;
    const std::uint32_t none = 0;
    const std::uint32_t* list = nullptr;
    if (units != nullptr) list = units->empty() ? &none : units->data();
    check(fsdp_full_params_open(engine.get(), list, units == nullptr ? 0 : units->size(), &config,
                                &full),
          "cannot open full parameters");
    handle_.reset(full, fsdp_full_params_destroy);
  }

  /// The full value of a parameter, writable until close(); null data where only rank 0 holds it.
  /// Local.
  fsdp_tensor_t data(std::uint32_t param) const {
    fsdp_tensor_t tensor{};
    check(fsdp_full_params_data(get(), param, &tensor));
    return tensor;
  }

  /// The same for its gradient; null data if there is none. Local.
  fsdp_tensor_t grad(std::uint32_t param) const {
    fsdp_tensor_t tensor{};
    check(fsdp_full_params_grad(get(), param, &tensor));
    return tensor;
  }

  /// Ends the scope, after writing back if it was opened so. Collective with writeback.
  void close() { check(fsdp_full_params_close(get()), "cannot close full parameters"); }

  /// The C handle, owned by this object.
  fsdp_full_params_t* get() const noexcept { return handle_.get(); }

 private:
  std::shared_ptr<fsdp_full_params_t> handle_;
};

/// Receives a full tensor, borrowed for the call: a parameter (`state` empty) or the state of an
/// optimizer that belongs to it. May throw; must not use the engine.
using FullState = std::function<void(std::uint32_t param, const std::string& name,
                                     const std::string& state, const fsdp_tensor_t& tensor)>;

namespace detail {

/// Streams with `stream(fn, user_data)`; what `take` throws is rethrown on its rank.
template <class Stream>
void stream_full_state(const FullState& take, const char* what, Stream stream) {
  struct Call {
    const FullState& take;
    std::exception_ptr thrown;
  } call{take, nullptr};
  const fsdp_full_state_fn fn = [](std::uint32_t param, const char* name, const char* state,
                                   const fsdp_tensor_t* tensor, void* user_data) -> std::int32_t {
    auto* call = static_cast<Call*>(user_data);
    try {
      call->take(param, name, state == nullptr ? "" : state, *tensor);
      return 0;
    } catch (...) {
      call->thrown = std::current_exception();
      return -1;
    }
  };
  const fsdp_status_t status = stream(fn, &call);
  if (call.thrown) std::rethrow_exception(call.thrown);
  check(status, what);
}

}  // namespace detail

/// Calls `take` with every full parameter, gathered one unit at a time; with `rank0_only` on rank 0
/// only. Collective.
inline void full_state(Engine& engine, bool rank0_only, const FullState& take) {
  detail::stream_full_state(take, "cannot gather the full state", [&](auto fn, void* user_data) {
    return fsdp_engine_full_state(engine.get(), rank0_only ? 1 : 0, fn, user_data);
  });
}

/// Calls `take` with every state of every parameter that has taken a step; with `rank0_only` on rank
/// 0 only. Collective.
inline void full_state(Optimizer& optimizer, bool rank0_only, const FullState& take) {
  detail::stream_full_state(
      take, "cannot gather the optimizer's state", [&](auto fn, void* user_data) {
        return fsdp_optimizer_full_state(optimizer.get(), rank0_only ? 1 : 0, fn, user_data);
      });
}

}  // namespace fsdp
