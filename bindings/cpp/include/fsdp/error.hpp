// The exception of the C++ layer, and the check that turns a status into it.
#pragma once

#include <fsdp.h>

#include <stdexcept>
#include <string>

namespace fsdp {

/// What every failing function of this layer throws. `what()` names the status and carries the
/// library's message, which names the parameter, unit, rank or file at fault.
class Error : public std::runtime_error {
 public:
  /// An error with one of the FSDP_ERR_* codes.
  Error(fsdp_status_t status, const std::string& message)
      : std::runtime_error(message), status_(status) {}

  /// The FSDP_ERR_* code.
  fsdp_status_t status() const noexcept { return status_; }

 private:
  fsdp_status_t status_;
};

/// Throws Error with the thread's last message unless `status` is FSDP_OK. `context`, when given,
/// says what was being done and is put in front; a plain string, since most calls succeed.
inline void check(fsdp_status_t status, const char* context = nullptr) {
  if (status == FSDP_OK) return;
  std::string message = context == nullptr ? std::string() : context + std::string(": ");
  message += fsdp_last_error_message();
  throw Error(status, message + " [" + fsdp_status_name(status) + "]");
}

/// The same with a context that was put together.
inline void check(fsdp_status_t status, const std::string& context) {
  check(status, context.c_str());
}

}  // namespace fsdp
