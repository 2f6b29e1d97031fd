// Copies a large gradient past the cache.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fsdp::detail {

/// Copies `count` floats (the ranges do not overlap) on as many threads as torch has. Any thread.
/// Stores bypass the
/// cache where the processor has such stores: what is copied is not read again on this core soon, and
/// fetching the lines only to overwrite them would cost as much as the copy.
inline void stream_copy(float* to, const float* from, std::int64_t count) {
  at::parallel_for(0, count, 1 << 18, [&](std::int64_t begin, std::int64_t end) {
#if defined(__SSE2__)
    constexpr std::int64_t kLine = 16;  // floats in a cache line
    const auto address = reinterpret_cast<std::uintptr_t>(to + begin) / sizeof(float);
    const auto past = static_cast<std::int64_t>(address % kLine);
    const std::int64_t head = std::min(end, begin + (kLine - past) % kLine);
    std::memcpy(to + begin, from + begin, static_cast<std::size_t>(head - begin) * sizeof(float));
    begin = head;
    for (; begin + kLine <= end; begin += kLine) {
      for (int i = 0; i < kLine; i += 4) {
        _mm_stream_ps(to + begin + i, _mm_loadu_ps(from + begin + i));
      }
    }
    _mm_sfence();
#endif
    std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin) * sizeof(float));
  });
}

}  // namespace fsdp::detail
