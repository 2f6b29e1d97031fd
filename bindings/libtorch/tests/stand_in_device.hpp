// A device of LibTorch's that is the CPU, over memory of the driver that stands in for CUDA's
// (tests/cuda/fake_driver.cpp): on it the binding's code for GPUs runs where there is no GPU.
// Include it before fsdp/torch.hpp. FSDP_TEST_GPU=stand-in makes it the binding's kind of GPU.
//
// LibTorch calls the device PrivateUse1. Operators run on the CPU, on copies (LibTorch's own
// cpu_fallback), each done when it returns; streams are the driver's, of which every thread has a
// current one; a backward has a thread of its own for each device, as on a GPU.
#pragma once

#define FSDP_TORCH_GPU stand_in::chosen_type()

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <torch/library.h>
#include <torch/torch.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

namespace stand_in {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 4;
constexpr c10::StreamId kStreams = 3;  // 0 is the legacy default stream

/// The kind of device that FSDP_TEST_GPU names.
inline c10::DeviceType chosen_type() {
  const char* chosen = std::getenv("FSDP_TEST_GPU");
  return chosen != nullptr && std::string(chosen) == "stand-in" ? kType : c10::DeviceType::CUDA;
}

/// A function of the driver that FSDP_CUDA_LIBRARY names.
template <class Function>
Function* driver(const char* name) {
  static void* const library = [] {
    const char* path = std::getenv("FSDP_CUDA_LIBRARY");
    void* opened = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) throw std::runtime_error("FSDP_CUDA_LIBRARY names no library");
    return opened;
  }();
  void* const found = dlsym(library, name);
  if (found == nullptr) throw std::runtime_error(std::string("the driver has no ") + name);
  return reinterpret_cast<Function*>(found);
}

/// Ranks of NCCL communicators that are made from here on are threads of this process.
inline void let_ranks_meet() {
  const char* path = std::getenv("FSDP_NCCL_LIBRARY");
  void* const library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* const found = library == nullptr ? nullptr : dlsym(library, "fake_nccl_meet");
  if (found == nullptr) throw std::runtime_error("FSDP_NCCL_LIBRARY names no stand-in for NCCL");
  reinterpret_cast<void (*)(int)>(found)(1);
}

/// Makes the GPU's context current on the calling thread, as CUDA's run-time library does by
/// itself.
inline void enter() {
  static thread_local bool entered = false;
  if (entered) return;
  entered = true;
  void* context = nullptr;
  driver<int(unsigned)>("cuInit")(0);
  driver<int(void**, int)>("cuDevicePrimaryCtxRetain")(&context, 0);
  driver<int(void*)>("cuCtxPushCurrent_v2")(context);
}

inline int calls(const char* name) {
  return static_cast<int>(driver<long(const char*)>("fake_cuda_calls")(name));
}

inline void require(int code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string(what) + " failed: " + std::to_string(code));
}

inline void release(void* memory) {
  if (memory == nullptr) return;
  enter();
  require(driver<int(unsigned long long, void*)>("cuMemFreeAsync")(
              reinterpret_cast<unsigned long long>(memory), nullptr),
          "giving memory back");
}

inline thread_local c10::DeviceIndex current_device = 0;
inline thread_local c10::StreamId current_streams[kDevices] = {};

/// What LibTorch starts with a GPU's first tensor; memory is taken after that only.
inline std::atomic<bool> initialized{false};

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device(kType, current_device);
    if (!initialized) throw std::runtime_error("the allocator has not been initialized");
    if (bytes == 0) return {nullptr, device};
    enter();
    unsigned long long address = 0;
    require(driver<int(unsigned long long*, std::size_t, void*)>("cuMemAllocAsync")(
                &address, bytes, nullptr),
            "taking memory");
    void* const memory = reinterpret_cast<void*>(address);
    return {memory, memory, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

inline Allocator allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kType, current_device}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    const c10::DeviceIndex index = device.has_index() ? device.index() : current_device;
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, index), current_streams[index]);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return c10::Stream(c10::Stream::UNSAFE, getStream(device).device(), 1);
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    static void* const streams[kStreams] = {nullptr, make(), make()};
    // One that LibTorch has not made has its address for its number, as for CUDA.
    if (stream.id() >= kStreams) return reinterpret_cast<void*>(stream.id());
    return streams[stream.id()];
  }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  // All is done when it was launched.
  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }

 private:
  static void* make() {
    enter();
    void* stream = nullptr;
    require(driver<int(void**, unsigned, int)>("cuStreamCreateWithPriority")(&stream, 1, 0),
            "making a stream");
    return stream;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override { initialized = true; }
};

/// Makes it the process's accelerator, which autograd has a thread and streams for.
inline const bool registered = [] {
  if (chosen_type() != kType) return false;
  c10::register_privateuse1_backend("stand_in");
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

/// The same memory as a tensor of the CPU's.
inline at::Tensor as_cpu(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       at::TensorOptions(tensor.scalar_type()));
}

inline at::Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> type,
                        std::optional<at::Layout>, std::optional<at::Device> device,
                        std::optional<bool>, std::optional<at::MemoryFormat> format) {
  at::globalContext().lazyInitDevice(kType);
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(sizes, &allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   type.value_or(at::kFloat), format);
}

inline at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides,
                                std::optional<at::ScalarType> type, std::optional<at::Layout>,
                                std::optional<at::Device> device, std::optional<bool>) {
  at::globalContext().lazyInitDevice(kType);
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(sizes, strides, &allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           type.value_or(at::kFloat));
}

inline at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (to.numel() > 0) as_cpu(to).copy_(as_cpu(from));
  return to;
}

inline at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

inline at::Scalar local_scalar(const at::Tensor& tensor) { return as_cpu(tensor).item(); }

inline void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack);
}

}  // namespace stand_in

C10_REGISTER_GUARD_IMPL(PrivateUse1, stand_in::Guard)
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &stand_in::allocator)

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", stand_in::empty);
  m.impl("empty_strided", stand_in::empty_strided);
  m.impl("_copy_from", stand_in::copy_from);
  m.impl("_copy_from_and_resize", stand_in::copy_from_and_resize);
  m.impl("_local_scalar_dense", stand_in::local_scalar);
  m.impl("view", at::native::view);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&stand_in::on_the_cpu>());
}
