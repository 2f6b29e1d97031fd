// A CUDA driver and a run-time compiler that are this machine's CPU: the functions that the engine calls, on host
// memory, each done when it returns. The kernels are the engine's own sources, compiled into this library; KERNELS(X)
// lists them.
//
// Strict where a driver is lenient: a call without a current context, an address that is not the device's, a stream or
// event that is not there, a launch of the wrong size, or of a kernel that was not loaded before, fail; writing past the end
// of memory ends the process.
//
// In the environment, FAKE_CUDA_DEVICES says how many GPUs there are (1). Each has 1 GiB.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "words.hpp"

#include KERNEL_SOURCES

namespace {

using Code = int;
constexpr Code kOk = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kNoDevice = 100, kInvalidDevice = 101,
               kInvalidContext = 201, kInvalidHandle = 400, kNotFound = 500, kNotReady = 600, kIllegalAddress = 700,
               kNotLoaded = 913;
constexpr size_t kGuard = 64;
constexpr unsigned char kCanary = 0xa5;

std::recursive_mutex lock;
bool initialized = false;
int retained = 0;
size_t used = 0;
std::map<char *, size_t> device_memory, pinned_memory;
std::set<void *> streams, events, modules;
std::map<std::string, long> calls;
int context_object = 0;
thread_local std::vector<void *> contexts;

long device_count() {
  const char *value = std::getenv("FAKE_CUDA_DEVICES");
  return value ? std::atol(value) : 1;
}

constexpr size_t kMemory = size_t{1} << 30;
std::string failing;
bool holding = false;

/// Counts the call; the failure that was asked for, or what a driver in this state answers.
Code enter(const char *name, bool needs_context = true) {
  calls[name]++;
  if (failing == name) return kIllegalAddress;
  if (!initialized) return kNotInitialized;
  return needs_context && contexts.empty() ? kInvalidContext : kOk;
}

#define ENTER(needs_context)                                       \
  std::lock_guard<std::recursive_mutex> guard(lock);               \
  if (Code code = enter(__func__, needs_context); code != kOk) return code

char *take(std::map<char *, size_t> &memory, size_t bytes) {
  char *at = static_cast<char *>(std::aligned_alloc(256, (bytes + kGuard + 255) / 256 * 256));
  std::memset(at, 0x7f, bytes);
  std::memset(at + bytes, kCanary, kGuard);
  memory[at] = bytes;
  return at;
}

bool give_back(std::map<char *, size_t> &memory, char *at) {
  auto found = memory.find(at);
  if (found == memory.end()) return false;
  for (size_t i = 0; i < kGuard; i++) {
    if (static_cast<unsigned char>(at[found->second + i]) == kCanary) continue;
    std::fprintf(stderr, "fake CUDA: %zu bytes of memory were written past their end\n", found->second);
    std::abort();
  }
  std::free(at);
  memory.erase(found);
  return true;
}

bool inside(const std::map<char *, size_t> &memory, const void *address, size_t bytes) {
  char *at = static_cast<char *>(const_cast<void *>(address));
  auto after = memory.upper_bound(at);
  if (after == memory.begin()) return false;
  const auto &[start, size] = *std::prev(after);
  return at + bytes <= start + size;
}

bool on_device(unsigned long long address, size_t bytes) {
  return inside(device_memory, reinterpret_cast<void *>(address), bytes);
}

bool is_stream(void *stream) { return stream == nullptr || streams.count(stream); }

void *add(std::set<void *> &things) { return *things.insert(std::malloc(1)).first; }

bool remove(std::set<void *> &things, void *thing) {
  if (!things.erase(thing)) return false;
  std::free(thing);
  return true;
}

/// Whether a kernel's threads wait for each other.
bool waits(const std::string &kernel) { return kernel.rfind("fsdp_norm_", 0) == 0; }

using Launcher = void (*)(void **);

struct Function {
  Launcher run;
  void *module;
  bool loaded;
};
std::map<void *, Function> functions;

const std::map<std::string, Launcher> &kernels() {
  static const std::map<std::string, Launcher> all = {
#define X(name) {#name, [](void **arguments) { launch(name, arguments, waits(#name)); }},
      KERNELS(X)
#undef X
  };
  return all;
}

}  // namespace

extern "C" {

/// The function of this name fails from here on, with CUDA_ERROR_ILLEGAL_ADDRESS; "": none does.
void fake_cuda_fail(const char *name) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  failing = name;
}

/// The GPU comes to no event from here on (1), or does again (0).
void fake_cuda_hold(int hold) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  holding = hold != 0;
}

/// How often a function was called.
long fake_cuda_calls(const char *name) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  return calls[name];
}

/// What exists now: bytes of device memory, pieces of pinned memory, streams, events, modules, retained contexts.
void fake_cuda_alive(long *counts) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  const size_t now[] = {used, pinned_memory.size(), streams.size(), events.size(), modules.size(), (size_t)retained};
  for (int i = 0; i < 6; i++) counts[i] = static_cast<long>(now[i]);
}

Code cuInit(unsigned flags) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  if (flags != 0) return kInvalidValue;
  initialized = true;
  return enter("cuInit", false);
}

Code cuDriverGetVersion(int *version) {
  ENTER(false);
  *version = 13020;
  return kOk;
}

Code cuGetErrorName(Code code, const char **text) {
  *text = code == kIllegalAddress ? "CUDA_ERROR_ILLEGAL_ADDRESS" : code == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : nullptr;
  return *text ? kOk : kInvalidValue;
}

Code cuGetErrorString(Code code, const char **text) {
  *text = code == kIllegalAddress ? "an illegal memory access was encountered" : code == kOutOfMemory ? "out of memory" : nullptr;
  return *text ? kOk : kInvalidValue;
}

Code cuDeviceGetCount(int *count) {
  ENTER(false);
  *count = static_cast<int>(device_count());
  return *count ? kOk : kNoDevice;
}

Code cuDeviceGet(int *device, int ordinal) {
  ENTER(false);
  *device = ordinal;
  return ordinal < device_count() ? kOk : kInvalidDevice;
}

Code cuDeviceGetName(char *name, int length, int) {
  ENTER(false);
  std::snprintf(name, static_cast<size_t>(length), "Fake GPU");
  return kOk;
}

Code cuDeviceGetAttribute(int *value, int attribute, int) {
  ENTER(false);
  // Multiprocessors, compute capability (major, minor), memory pools.
  const std::map<int, int> values = {{16, 4}, {75, 9}, {76, 0}, {115, 1}};
  auto found = values.find(attribute);
  if (found == values.end()) return kInvalidValue;
  *value = found->second;
  return kOk;
}

Code cuDeviceTotalMem_v2(size_t *bytes, int) {
  ENTER(false);
  *bytes = kMemory;
  return kOk;
}

Code cuDeviceGetDefaultMemPool(void **pool, int) {
  ENTER(false);
  *pool = &context_object;
  return kOk;
}

Code cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
  ENTER(false);
  return pool == &context_object && attribute == 4 && value ? kOk : kInvalidValue;
}

Code cuDevicePrimaryCtxRetain(void **context, int) {
  ENTER(false);
  retained++;
  *context = &context_object;
  return kOk;
}

Code cuDevicePrimaryCtxRelease_v2(int) {
  ENTER(false);
  retained--;
  return kOk;
}

Code cuCtxGetCurrent(void **context) {
  ENTER(false);
  *context = contexts.empty() ? nullptr : contexts.back();
  return kOk;
}

Code cuCtxPushCurrent_v2(void *context) {
  ENTER(false);
  contexts.push_back(context);
  return retained > 0 ? kOk : kInvalidContext;
}

Code cuCtxPopCurrent_v2(void **context) {
  ENTER(true);
  *context = contexts.back();
  contexts.pop_back();
  return kOk;
}

Code cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  ENTER(true);
  *least = 0, *greatest = -5;
  return kOk;
}

Code cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  ENTER(true);
  if (flags != 1 || priority > 0 || priority < -5) return kInvalidValue;
  *stream = add(streams);
  return kOk;
}

Code cuStreamDestroy_v2(void *stream) {
  ENTER(true);
  return remove(streams, stream) ? kOk : kInvalidHandle;
}

Code cuStreamSynchronize(void *stream) {
  ENTER(true);
  return is_stream(stream) ? kOk : kInvalidHandle;
}

Code cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
  ENTER(true);
  return is_stream(stream) && events.count(event) && flags == 0 ? kOk : kInvalidHandle;
}

Code cuEventCreate(void **event, unsigned flags) {
  ENTER(true);
  if (flags != 2) return kInvalidValue;
  *event = add(events);
  return kOk;
}

Code cuEventDestroy_v2(void *event) {
  ENTER(true);
  return remove(events, event) ? kOk : kInvalidHandle;
}

Code cuEventRecord(void *event, void *stream) {
  ENTER(true);
  return is_stream(stream) && events.count(event) ? kOk : kInvalidHandle;
}

Code cuEventQuery(void *event) {
  ENTER(true);
  return !events.count(event) ? kInvalidHandle : holding ? kNotReady : kOk;
}

Code cuEventSynchronize(void *event) {
  ENTER(true);
  return events.count(event) ? kOk : kInvalidHandle;
}

Code cuMemGetInfo_v2(size_t *free, size_t *total) {
  ENTER(true);
  *total = kMemory;
  *free = *total - used;
  return kOk;
}

Code cuMemAllocAsync(unsigned long long *address, size_t bytes, void *stream) {
  ENTER(true);
  if (bytes == 0 || !is_stream(stream)) return kInvalidValue;
  if (bytes > kMemory - used) return kOutOfMemory;
  used += bytes;
  *address = reinterpret_cast<unsigned long long>(take(device_memory, bytes));
  return kOk;
}

Code cuMemFreeAsync(unsigned long long address, void *stream) {
  ENTER(true);
  char *at = reinterpret_cast<char *>(address);
  auto found = device_memory.find(at);
  if (!is_stream(stream) || found == device_memory.end()) return kInvalidValue;
  used -= found->second;
  return give_back(device_memory, at) ? kOk : kInvalidValue;
}

Code cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
  ENTER(true);
  if (bytes == 0 || flags != 1) return kInvalidValue;
  *address = take(pinned_memory, bytes);
  return kOk;
}

Code cuMemFreeHost(void *address) {
  ENTER(true);
  return give_back(pinned_memory, static_cast<char *>(address)) ? kOk : kInvalidValue;
}

Code cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t bytes, void *stream) {
  ENTER(true);
  if (!is_stream(stream) || !on_device(to, bytes)) return kInvalidValue;
  std::memcpy(reinterpret_cast<void *>(to), from, bytes);
  return kOk;
}

Code cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t bytes, void *stream) {
  ENTER(true);
  if (!is_stream(stream) || !on_device(from, bytes)) return kInvalidValue;
  std::memcpy(to, reinterpret_cast<void *>(from), bytes);
  return kOk;
}

Code cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void *stream) {
  ENTER(true);
  if (!is_stream(stream) || !on_device(from, bytes) || !on_device(to, bytes)) return kInvalidValue;
  std::memcpy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes);
  return kOk;
}

Code cuMemsetD8Async(unsigned long long to, unsigned char value, size_t bytes, void *stream) {
  ENTER(true);
  if (!is_stream(stream) || !on_device(to, bytes)) return kInvalidValue;
  std::memset(reinterpret_cast<void *>(to), value, bytes);
  return kOk;
}

Code cuModuleLoadData(void **module, const void *image) {
  ENTER(true);
  if (std::string(static_cast<const char *>(image)) != "fake image") return 209;
  *module = add(modules);
  return kOk;
}

Code cuModuleUnload(void *module) {
  ENTER(true);
  for (auto at = functions.begin(); at != functions.end();) {
    if (at->second.module != module) {
      ++at;
      continue;
    }
    std::free(at->first);
    at = functions.erase(at);
  }
  return remove(modules, module) ? kOk : kInvalidHandle;
}

Code cuModuleGetFunction(void **function, void *module, const char *name) {
  ENTER(true);
  auto found = kernels().find(name);
  if (!modules.count(module) || found == kernels().end()) return kNotFound;
  *function = std::malloc(1);
  functions[*function] = {found->second, module, false};
  return kOk;
}

Code cuFuncLoad(void *function) {
  ENTER(true);
  auto found = functions.find(function);
  if (found == functions.end()) return kInvalidHandle;
  found->second.loaded = true;
  return kOk;
}

Code cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                    void *stream, void **arguments, void **extra) {
  ENTER(true);
  if (!is_stream(stream) || extra || shared || gx == 0 || gy == 0 || gz != 1 || bx != 256 || by != 1 || bz != 1) return kInvalidValue;
  gridDim = {gx, gy, gz};
  blockDim = {bx, by, bz};
  auto found = functions.find(function);
  if (found == functions.end()) return kInvalidHandle;
  if (!found->second.loaded) return kNotLoaded;
  found->second.run(arguments);
  return kOk;
}

// ---- the compiler ----

Code nvrtcVersion(int *major, int *minor) {
  *major = 13, *minor = 2;
  return kOk;
}

const char *nvrtcGetErrorString(Code code) { return code == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }

Code nvrtcGetNumSupportedArchs(int *count) {
  *count = 3;
  return kOk;
}

Code nvrtcGetSupportedArchs(int *architectures) {
  architectures[0] = 75, architectures[1] = 80, architectures[2] = 90;
  return kOk;
}

Code nvrtcCreateProgram(void **program, const char *source, const char *, int, const char *const *, const char *const *) {
  *program = new std::string(source);
  return kOk;
}

Code nvrtcDestroyProgram(void **program) {
  delete static_cast<std::string *>(*program);
  return kOk;
}

Code nvrtcCompileProgram(void *program, int, const char *const *) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  calls["nvrtcCompileProgram"]++;
  for (const auto &kernel : kernels())
    if (static_cast<std::string *>(program)->find(kernel.first + "(") == std::string::npos) return 6;
  return kOk;
}

Code nvrtcGetProgramLogSize(void *, size_t *size) {
  *size = sizeof "kernels.cu(1): error: fake";
  return kOk;
}

Code nvrtcGetProgramLog(void *, char *log) {
  std::strcpy(log, "kernels.cu(1): error: fake");
  return kOk;
}

Code nvrtcGetCUBINSize(void *, size_t *size) {
  *size = sizeof "fake image";
  return kOk;
}

Code nvrtcGetCUBIN(void *, char *image) {
  std::strcpy(image, "fake image");
  return kOk;
}

Code nvrtcGetPTXSize(void *program, size_t *size) { return nvrtcGetCUBINSize(program, size); }
Code nvrtcGetPTX(void *program, char *image) { return nvrtcGetCUBIN(program, image); }

}  // extern "C"
