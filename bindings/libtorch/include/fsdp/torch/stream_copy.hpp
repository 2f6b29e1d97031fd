// Copies a large gradient past the cache.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fsdp::detail {

/// Copies `bytes` (the ranges do not overlap) on as many threads as torch has. Any thread. Stores
/// bypass the cache where the processor has such stores: what is copied is not read again on this
/// core soon, and fetching the lines only to overwrite them would cost as much as the copy.
inline void stream_copy(void* target, const void* source, std::size_t bytes) {
  auto* const to = static_cast<char*>(target);
  const auto* const from = static_cast<const char*>(source);
  const auto count = static_cast<std::int64_t>(bytes);
  at::parallel_for(0, count, 1 << 20, [&](std::int64_t begin, std::int64_t end) {
#if defined(__SSE2__)
    constexpr std::int64_t kLine = 64;
    const auto address = reinterpret_cast<std::uintptr_t>(to + begin);
    const auto past = static_cast<std::int64_t>(address % kLine);
    const std::int64_t head = std::min(end, begin + (kLine - past) % kLine);
    std::memcpy(to + begin, from + begin, static_cast<std::size_t>(head - begin));
    begin = head;
    for (; begin + kLine <= end; begin += kLine) {
      const auto* lines = reinterpret_cast<const __m128i*>(from + begin);
      auto* targets = reinterpret_cast<__m128i*>(to + begin);
      for (int i = 0; i < 4; ++i) _mm_stream_si128(targets + i, _mm_loadu_si128(lines + i));
    }
    _mm_sfence();
#endif
    std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin));
  });
}

}  // namespace fsdp::detail
