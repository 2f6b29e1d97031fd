// LibTorch's large CPU tensors in fsdp's heap, which gradient shards share: activations and temporaries
// of optimizers are there while gradients are not, and the other way round.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstddef>

#include "fsdp/heap.hpp"

namespace fsdp::detail {

/// LibTorch's allocator for CPU tensors once a model was sharded: blocks of 64 KiB and more come from
/// the heap, all others, those that the heap has no room for, and all while LibTorch's profiler
/// watches memory, from LibTorch's default allocator. Lives as long as the process: tensors outlive
/// whatever owned it.
class HostHeap final : public c10::Allocator {
 public:
  /// Does nothing where the program has an allocator of its own. Local; not while other threads make
  /// tensors (c10::SetCPUAllocator).
  static void install() {
    static const bool once = [] {
      if (c10::GetCPUAllocator() == c10::GetDefaultCPUAllocator()) {
        c10::SetCPUAllocator(new HostHeap);
      }
      return true;
    }();
    (void)once;
  }

  c10::DataPtr allocate(std::size_t bytes) override {
    void* block = nullptr;
    if (bytes < kLeast || c10::memoryProfilingEnabled() ||
        fsdp_heap_alloc(bytes, &block) != FSDP_OK) {
      block = c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
    }
    return {block, block, &release, c10::Device(c10::DeviceType::CPU)};
  }

  /// oneDNN's memory comes and goes without a DataPtr.
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static constexpr std::size_t kLeast = 64 << 10;

  static void release(void* block) {
    if (!heap_release(block)) c10::GetDefaultCPUAllocator()->raw_deallocate(block);
  }
};

}  // namespace fsdp::detail
