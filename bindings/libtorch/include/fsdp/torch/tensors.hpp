// at::Tensor in the C ABI's terms: what the communicator and the engine accept.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "fsdp/fsdp.hpp"

namespace fsdp {

/// Lets Communicator::all_reduce, broadcast and the rest take at::Tensor. The tensor must be a
/// contiguous CPU tensor of float, double, int32 or int64; anything else throws INVALID_ARGUMENT.
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
        throw Error(FSDP_ERR_UNSUPPORTED,
                    std::string("tensors of type ") + c10::toString(tensor.scalar_type()) +
                        " cannot be communicated: float, double, int32 or int64 can");
    }
  }
};

}  // namespace fsdp
