// Random numbers in deferred construction: generator states, and drawing without keeping.
//
// A recorded operator that draws keeps the state its generator had, so that its replay draws the
// same numbers at any time. While recording, the generator is brought to the state that the
// operator would have left, so that whatever draws next, recorded or not, is the same as well.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>

#include "fsdp/torch/dispatch.hpp"

namespace fsdp::detail {

/// A copy of the state of a CPU generator.
inline at::Tensor state_of(at::Generator generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

inline void set_state(at::Generator generator, const at::Tensor& state) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

/// Puts the default CPU generator back into the state it had.
class DefaultGeneratorGuard {
 public:
  DefaultGeneratorGuard() : state_(state_of(at::detail::getDefaultCPUGenerator())) {}
  DefaultGeneratorGuard(const DefaultGeneratorGuard&) = delete;
  DefaultGeneratorGuard& operator=(const DefaultGeneratorGuard&) = delete;
  ~DefaultGeneratorGuard() { set_state(at::detail::getDefaultCPUGenerator(), state_); }

 private:
  at::Tensor state_;
};

/// Operators whose draws depend on nothing but the number, type and (normal) contiguity of the
/// elements that they fill.
enum class Fill { none, uniform, normal };

inline Fill fill_of(const c10::OperatorHandle& op, at::ScalarType type) {
  if (!at::isFloatingType(type)) return Fill::none;
  const std::string& name = op.operator_name().name;
  if (name == "aten::uniform_" || name == "aten::rand" || name == "aten::rand_like") {
    return Fill::uniform;
  }
  if (name == "aten::normal_" || name == "aten::randn" || name == "aten::randn_like") {
    return Fill::normal;
  }
  return Fill::none;
}

/// Draws from `generator` what `fill` would draw for `like`, in bounded memory. LibTorch fills a
/// contiguous tensor of at least 16 elements with normal numbers in blocks of 16, drawing a last
/// block twice when it is not full, and any other one by one, in pairs of which the generator keeps
/// the second. So the pieces are multiples of 16, and the last has at least 16 elements.
inline void draw(Fill fill, const at::Tensor& like, const at::Generator& generator) {
  constexpr std::int64_t kBlock = 16;
  constexpr std::int64_t kPiece = kBlock * 4096;
  std::int64_t left = like.numel();
  if (left == 0) return;
  const std::int64_t spacing = like.is_contiguous() ? 1 : 2;  // keeps the piece non-contiguous, too
  const at::Tensor scratch = at::empty({std::min(left, kPiece) * spacing},
                                       at::TensorOptions().dtype(like.scalar_type()));
  while (left > 0) {
    std::int64_t count = std::min(left, kPiece);
    if (left > kPiece && left - count < kBlock) count -= kBlock;
    at::Tensor piece = scratch.slice(0, 0, count * spacing, spacing);
    if (fill == Fill::uniform) {
      piece.uniform_(0, 1, generator);
    } else {
      piece.normal_(0, 1, generator);
    }
    left -= count;
  }
}

}  // namespace fsdp::detail
