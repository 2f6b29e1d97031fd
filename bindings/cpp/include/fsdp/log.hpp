// Where the library's messages for a person go.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "fsdp/error.hpp"

namespace fsdp {

/// How important a message is.
enum class LogLevel : std::int32_t {
  debug = FSDP_LOG_DEBUG,      ///< the steps of an iteration, many
  info = FSDP_LOG_INFO,        ///< what happens seldom, e.g. that an engine was made
  warning = FSDP_LOG_WARNING,  ///< nothing failed, but what happens may not be what was meant
  off = FSDP_LOG_OFF,          ///< for set_log_level: no messages
};

/// Messages below `level` are not made from now on; at first FSDP_LOG in the environment says it.
inline void set_log_level(LogLevel level) {
  check(fsdp_set_log_level(static_cast<std::int32_t>(level)));
}

/// Receives a message, one line without its end. Called in any thread that calls fsdp, from within
/// that call, by several at once; it may call fsdp. What it throws is dropped.
using LogCallback = std::function<void(LogLevel, const std::string&)>;

namespace detail {

struct Log {
  std::mutex mutex;
  std::shared_ptr<const LogCallback> callback;
};

/// The process's, never destroyed: messages may come while the process ends.
inline Log& log() {
  static Log* const log = new Log;
  return *log;
}

inline void call_log(std::int32_t level, const char* message, void* /*user_data*/) {
  std::shared_ptr<const LogCallback> callback;
  {
    const std::lock_guard<std::mutex> lock(log().mutex);
    callback = log().callback;
  }
  if (!callback) return;
  try {
    (*callback)(static_cast<LogLevel>(level), message);
  } catch (...) {
    // There is nobody to tell: a message about the failure would come back here.
  }
}

}  // namespace detail

/// Sends the messages of this process to `callback` from now on; an empty one: back to a line each
/// on standard error. The one before it is destroyed when the last call of it has returned.
inline void set_log_callback(LogCallback callback) {
  std::shared_ptr<const LogCallback> shared;
  if (callback) shared = std::make_shared<const LogCallback>(std::move(callback));
  const std::lock_guard<std::mutex> lock(detail::log().mutex);
  fsdp_set_log_callback(shared ? &detail::call_log : nullptr, nullptr);
  detail::log().callback.swap(shared);
}

}  // namespace fsdp
