// at::Tensor in the C ABI's terms: what the communicator and the engine accept.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/fsdp.hpp"

namespace fsdp {

namespace detail {

/// The C ABI's name of a floating type that parameters can have, or nothing.
inline std::optional<fsdp_dtype_t> param_dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return fsdp_dtype_t{FSDP_DTYPE_FLOAT, 32, 1};
    case at::kHalf:
      return fsdp_dtype_t{FSDP_DTYPE_FLOAT, 16, 1};
    case at::kBFloat16:
      return fsdp_dtype_t{FSDP_DTYPE_BFLOAT, 16, 1};
    default:
      return std::nullopt;
  }
}

/// LibTorch's name of such a type.
inline at::ScalarType scalar_type_of(fsdp_dtype_t dtype) {
  if (dtype.code == FSDP_DTYPE_BFLOAT) return at::kBFloat16;
  return dtype.bits == 16 ? at::kHalf : at::kFloat;
}

}  // namespace detail

/// Lets Communicator::all_reduce, broadcast and the rest take at::Tensor. The tensor must be a
/// contiguous CPU tensor of float, double, half, bfloat16, int32 or int64; anything else throws.
/// The view borrows the tensor's memory.
template <>
struct TensorAccess<at::Tensor> {
  static TensorView view(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu() || tensor.layout() != at::kStrided ||
        !tensor.is_contiguous()) {
      throw Error(FSDP_ERR_INVALID_ARGUMENT, "a contiguous CPU tensor is needed here");
    }
    std::vector<std::int64_t> shape = tensor.sizes().vec();
    switch (tensor.scalar_type()) {
      case at::kFloat:
        return TensorView(tensor.data_ptr<float>(), std::move(shape));
      case at::kDouble:
        return TensorView(tensor.data_ptr<double>(), std::move(shape));
      case at::kInt:
        return TensorView(tensor.data_ptr<std::int32_t>(), std::move(shape));
      case at::kLong:
        return TensorView(tensor.data_ptr<std::int64_t>(), std::move(shape));
      default:
        if (const auto dtype = detail::param_dtype_of(tensor.scalar_type())) {
          return TensorView(tensor.data_ptr(), *dtype, std::move(shape));
        }
        throw Error(FSDP_ERR_UNSUPPORTED,
                    std::string("tensors of type ") + c10::toString(tensor.scalar_type()) +
                        " cannot be communicated: float, double, half, bfloat16, int32 or int64 "
                        "can");
    }
  }
};

}  // namespace fsdp
