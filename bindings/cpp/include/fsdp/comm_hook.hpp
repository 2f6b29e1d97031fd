// A function of the host's that sees gradients before they are reduced.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <utility>

namespace fsdp {

/// The gradients that this rank has for a unit, to be changed in place; see fsdp_unit_gradients_t.
using UnitGradients = fsdp_unit_gradients_t;

/// Called with each unit's gradients just before they are rounded and reduced.
using CommHook = std::function<void(const UnitGradients&)>;

namespace detail {

/// The hook of one engine, and what it threw.
struct HookState {
  CommHook hook;
  std::exception_ptr thrown;

  static std::int32_t call(const fsdp_unit_gradients_t* gradients, void* user_data) {
    auto* state = static_cast<HookState*>(user_data);
    try {
      state->hook(*gradients);
      return 0;
    } catch (...) {
      state->thrown = std::current_exception();
      return -1;
    }
  }

  /// Throws what the hook threw, once.
  void rethrow() {
    if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
  }
};

}  // namespace detail
}  // namespace fsdp
