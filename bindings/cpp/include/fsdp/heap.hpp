// Large blocks of memory that come and go within an iteration, in the heap that gradient shards share.
#pragma once

#include <fsdp.h>

#include <cstddef>

#include "fsdp/error.hpp"

namespace fsdp {

/// A block of one owner, aligned to 64 bytes, contents undefined: fsdp_heap_alloc. Local; any thread.
inline void* heap_alloc(std::size_t bytes) {
  void* block = nullptr;
  check(fsdp_heap_alloc(bytes, &block));
  return block;
}

/// One owner more of the block that `address` lies in; false if it lies in none. Local; any thread.
inline bool heap_retain(const void* address) noexcept { return fsdp_heap_retain(address) != 0; }

/// One owner less of the block that `address` lies in, whom the last one frees; false if it lies in
/// none. Local; any thread.
inline bool heap_release(const void* address) noexcept { return fsdp_heap_release(address) != 0; }

/// Gives what is free in the heap back to the system. Local; any thread.
inline void heap_trim() noexcept { fsdp_heap_trim(); }

/// What the heap has; see fsdp_heap_stats_t.
using HeapStats = fsdp_heap_stats_t;

/// Local; any thread.
inline HeapStats heap_stats() {
  HeapStats stats{};
  stats.struct_size = sizeof stats;
  check(fsdp_heap_stats(&stats));
  return stats;
}

}  // namespace fsdp
