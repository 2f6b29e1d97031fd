// Finding out whether an initializer has written a tensor.
//
// Memory is filled with a pattern that no initializer writes: signalling NaNs, of which arithmetic
// changes no more than sign and quiet bit; for integers an unlikely number. Where the pattern might
// be a value (8 and 16 bits), all of the tensor must have it, and no operator have written it.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "fsdp/fsdp.hpp"

namespace fsdp::detail {

/// How one element type is marked.
struct UntouchedMark {
  std::uint64_t bits;
  std::uint64_t changeable;  ///< bits that do not count
  std::size_t size;          ///< bytes that the pattern covers; an element may be several patterns
  bool may_be_a_value;
};

inline UntouchedMark untouched_mark(at::ScalarType type, const std::string& name) {
  switch (type) {
    case at::kFloat:
    case at::kComplexFloat:
      return {0x7fa5f5d9, 0x80400000, 4, false};
    case at::kDouble:
    case at::kComplexDouble:
      return {0x7ff5a5f5d9c3a7b1, 0x8008000000000000, 8, false};
    case at::kHalf:
    case at::kComplexHalf:
      return {0x7da5, 0x8200, 2, false};
    case at::kBFloat16:
      return {0x7fa5, 0x8040, 2, false};
    case at::kLong:
      return {0xa5f5d9c3a7b1c5e3, 0, 8, false};
    case at::kInt:
      return {0xa5f5d9c3, 0, 4, false};
    case at::kShort:
      return {0xa5f5, 0, 2, true};
    case at::kChar:
    case at::kByte:
      return {0xa5, 0, 1, true};
    case at::kBool:
      return {0xa5, 0, 1, false};
    default:
      throw Error(FSDP_ERR_UNSUPPORTED,
                  "buffer '" + name + "' cannot be initialized: its type is " +
                      std::string(c10::toString(type)));
  }
}

/// A tensor on the CPU, sizes and type of `like`, that is marked as untouched.
inline at::Tensor untouched_like(const at::Tensor& like, const std::string& name) {
  const UntouchedMark mark = untouched_mark(like.scalar_type(), name);
  at::Tensor tensor =
      at::empty(like.sizes(), at::TensorOptions().dtype(like.dtype()).device(at::kCPU));
  auto* bytes = static_cast<unsigned char*>(tensor.data_ptr());
  for (std::size_t at = 0; at < tensor.nbytes(); at += mark.size) {
    std::memcpy(bytes + at, &mark.bits, mark.size);  // little-endian
  }
  return tensor;
}

/// The first element of `tensor` (contiguous, made by untouched_like) that was not written.
/// `written`: whether an operator wrote any.
inline std::optional<std::int64_t> first_untouched(const at::Tensor& tensor, bool written,
                                                   const std::string& name) {
  const UntouchedMark mark = untouched_mark(tensor.scalar_type(), name);
  const auto* bytes = static_cast<const unsigned char*>(tensor.const_data_ptr());
  const std::size_t count = tensor.nbytes() / mark.size;
  const auto untouched = [&](std::size_t i) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, bytes + i * mark.size, mark.size);
    return (bits | mark.changeable) == (mark.bits | mark.changeable);
  };
  if (mark.may_be_a_value) {
    for (std::size_t i = 0; i < count; ++i) {
      if (written || !untouched(i)) return std::nullopt;
    }
    return count == 0 ? std::nullopt : std::optional<std::int64_t>(0);
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (untouched(i)) {
      return static_cast<std::int64_t>(i * mark.size / static_cast<std::size_t>(tensor.itemsize()));
    }
  }
  return std::nullopt;
}

}  // namespace fsdp::detail
