// Where a sharded model computes: the CPU, or a GPU as LibTorch knows it. What the binding needs of
// GPUs beyond operators (the current stream, memory, whether there are any) goes through c10's
// interfaces for any kind of device, so that it compiles without CUDA's headers and links with a
// LibTorch without CUDA.
#pragma once

#include <ATen/Context.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <link.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

#include "fsdp/fsdp.hpp"

/// LibTorch's kind of device that engines' GPUs are: an expression; tests have another one.
#ifndef FSDP_TORCH_GPU
#define FSDP_TORCH_GPU c10::DeviceType::CUDA
#endif

namespace fsdp {

namespace detail {

inline const c10::DeviceType kGpu = FSDP_TORCH_GPU;

/// How many GPUs the driver has. Throws UNSUPPORTED, saying why `what` needs it and what was looked
/// for, without a driver.
inline int gpu_count(const std::string& what) {
  try {
    return device_count(DeviceType::cuda);
  } catch (const Error& error) {
    throw Error(error.status(), what + ": " + error.what());
  }
}

}  // namespace detail

/// Loads LibTorch's CUDA library into a program that is not linked with it: libtorch_cuda.so, from
/// the folder of its libtorch_cpu.so. To be called before anything else of LibTorch. Does nothing
/// if the program has it. Throws UNSUPPORTED, saying what was looked for and where, without CUDA's
/// driver or where the library cannot be loaded. Local.
inline void load_cuda() {
  if (c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA)) return;
  detail::gpu_count("no GPU can be used");
  std::string path = "libtorch_cuda.so";
  link_map* cpu = nullptr;
  void* const loaded = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  if (loaded != nullptr && dlinfo(loaded, RTLD_DI_LINKMAP, &cpu) == 0) {
    const std::string here = cpu->l_name;
    path = here.substr(0, here.rfind('/') + 1) + path;
  }
  // Never closed: it registers operators that stay.
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw Error(FSDP_ERR_UNSUPPORTED,
                std::string("LibTorch's CUDA library cannot be loaded: ") + dlerror());
  }
}

/// The device that `wanted` means, a GPU with its number (if it has none, the current one's), ready
/// to be used. Throws UNSUPPORTED for one that is not here, or that models cannot be sharded on,
/// saying why. Local.
inline at::Device usable_device(at::Device wanted) {
  if (wanted.is_cpu()) return at::Device(at::kCPU);
  const std::string device = "device " + wanted.str() + " cannot be used";
  if (wanted.type() != detail::kGpu) {
    throw Error(FSDP_ERR_UNSUPPORTED, device + ": models are sharded on the CPU or on CUDA's GPUs");
  }
  const int count = detail::gpu_count(device);
  if (!c10::impl::hasDeviceGuardImpl(detail::kGpu)) {
    throw Error(FSDP_ERR_UNSUPPORTED,
                device + ": LibTorch's CUDA library is not in this program; link libtorch_cuda, or "
                         "call fsdp::load_cuda() at its start");
  }
  const auto* devices = c10::impl::getDeviceGuardImpl(detail::kGpu);
  const int seen = devices->deviceCount();
  int index = wanted.index();
  if (!wanted.has_index()) index = seen > 0 ? devices->getDevice().index() : 0;
  if (index >= std::min(count, seen)) {
    throw Error(FSDP_ERR_UNSUPPORTED, device + ": GPUs that the driver sees: " +
                                          std::to_string(count) + ", that LibTorch sees: " +
                                          std::to_string(seen));
  }
  // A program's first tensor on a GPU does so, but its memory may be lent before there is one.
  at::globalContext().lazyInitDevice(detail::kGpu);
  return at::Device(detail::kGpu, static_cast<c10::DeviceIndex>(index));
}

namespace detail {

/// A device in the C ABI's terms.
inline fsdp_device_t c_device(at::Device device) {
  if (device.is_cpu()) return {FSDP_DEVICE_CPU, 0};
  return {FSDP_DEVICE_CUDA, device.index()};
}

/// A tensor over memory on `device` that it does not own.
inline at::Tensor tensor_at(void* data, at::IntArrayRef sizes, at::ScalarType type,
                            at::Device device) {
  return at::for_blob(data, sizes)
      .options(at::TensorOptions(type).device(device))
      .target_device(device)
      .make_tensor();
}

/// The stream that the calling thread's operators on a GPU go to, as the driver knows it.
inline void* current_stream(at::Device device) {
  const auto* devices = c10::impl::getDeviceGuardImpl(device.type());
  return devices->getStreamNativeHandle(devices->getStream(device));
}

/// A stream of the driver's on a GPU, which LibTorch has not made, as LibTorch knows it. Throws
/// UNSUPPORTED with a LibTorch that does not know it so.
inline c10::Stream stream_at(void* stream, at::Device device) {
  // CUDA's getStreamFromExternal() says the same: the number of such a stream is its address.
  const c10::Stream known(c10::Stream::UNSAFE, device, reinterpret_cast<c10::StreamId>(stream));
  if (c10::impl::getDeviceGuardImpl(device.type())->getStreamNativeHandle(known) != stream) {
    throw Error(FSDP_ERR_UNSUPPORTED, "this LibTorch has another number than its address for a "
                                      "stream of the engine's on " + device.str());
  }
  return known;
}

/// LibTorch's memory of one GPU, lent to engines, so that one allocator has all of it. There for
/// ever: whoever borrows may give back at any time. Any thread.
class LentMemory {
 public:
  /// That of `device`.
  static LentMemory& of(at::Device device) {
    static std::mutex mutex;
    static auto* all = new std::map<c10::DeviceIndex, LentMemory*>;
    const std::lock_guard<std::mutex> lock(mutex);
    LentMemory*& memory = (*all)[device.index()];
    if (memory == nullptr) memory = new LentMemory(device);
    return *memory;
  }

  /// `bytes` for work on `stream`, the calling thread's current one: LibTorch lends to no other.
  /// Null, with a warning that says why, if there are none.
  void* take(std::size_t bytes, void* stream) noexcept {
    try {
      const c10::DeviceGuard guard(device_);
      TORCH_CHECK(stream == current_stream(device_),
                  "the engine computes on another stream than the calling thread");
      at::DataPtr data = c10::GetAllocator(device_.type())->allocate(bytes);
      void* const address = data.get();
      const std::lock_guard<std::mutex> lock(mutex_);
      lent_.emplace(address, std::move(data));
      return address;
    } catch (const std::exception& error) {
      TORCH_WARN("memory for a sharded model: ", error.what());
      return nullptr;
    }
  }

  /// What take() has given: work that is launched later on the stream it was taken on may use it.
  void give_back(void* address) noexcept {
    at::DataPtr data;  // given back after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = lent_.find(address);
    if (found == lent_.end()) return;
    data = std::move(found->second);
    lent_.erase(found);
  }

 private:
  explicit LentMemory(at::Device device) : device_(device) {}

  const at::Device device_;
  std::mutex mutex_;
  std::unordered_map<void*, at::DataPtr> lent_;
};

}  // namespace detail
}  // namespace fsdp
