// Which devices there are.
#pragma once

#include <fsdp.h>

#include <cstdint>

#include "fsdp/error.hpp"

namespace fsdp {

/// A kind of device, as DLPack numbers them.
enum class DeviceType : std::int32_t { cpu = FSDP_DEVICE_CPU, cuda = FSDP_DEVICE_CUDA };

/// How many of them this process sees: one CPU; GPUs perhaps none. Throws UNSUPPORTED, with what
/// was looked for and where, for GPUs on a machine without CUDA's driver. Local.
inline int device_count(DeviceType type) {
  std::int32_t count = 0;
  check(fsdp_device_count(static_cast<std::int32_t>(type), &count));
  return count;
}

}  // namespace fsdp
