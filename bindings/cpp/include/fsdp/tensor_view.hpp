// A borrowed tensor in the C ABI's description: pointer, shape, element type.
#pragma once

#include <fsdp.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace fsdp {

namespace detail {

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr fsdp_dtype_t value{2, 32, 1};
};
template <>
struct DtypeOf<double> {
  static constexpr fsdp_dtype_t value{2, 64, 1};
};
template <>
struct DtypeOf<std::int32_t> {
  static constexpr fsdp_dtype_t value{0, 32, 1};
};
template <>
struct DtypeOf<std::int64_t> {
  static constexpr fsdp_dtype_t value{0, 64, 1};
};

}  // namespace detail

/// A contiguous tensor, on the CPU if nothing else is said, that somebody else owns. It must outlive
/// every call it is passed to; the view itself may be copied and moved freely.
class TensorView {
 public:
  /// `data` points at the product of `shape` elements of float, double, int32_t or int64_t, laid
  /// out row-major. A zero-element tensor may have a null pointer.
  template <class T>
  TensorView(T* data, std::vector<std::int64_t> shape)
      : data_(data), dtype_(detail::DtypeOf<T>::value), shape_(std::move(shape)) {}

  /// The same for elements of a type that C++ has no name for.
  TensorView(void* data, fsdp_dtype_t dtype, std::vector<std::int64_t> shape)
      : data_(data), dtype_(dtype), shape_(std::move(shape)) {}

  /// The same on the device given, where the function that gets it takes such memory.
  TensorView(void* data, fsdp_dtype_t dtype, std::vector<std::int64_t> shape, fsdp_device_t device)
      : data_(data), dtype_(dtype), shape_(std::move(shape)), device_(device) {}

  /// The C description. Borrows this view: valid until it is changed or destroyed.
  fsdp_tensor_t c_tensor() const {
    fsdp_tensor_t tensor{};
    tensor.data = data_;
    tensor.device = device_;
    tensor.ndim = static_cast<std::int32_t>(shape_.size());
    tensor.dtype = dtype_;
    tensor.shape = const_cast<std::int64_t*>(shape_.data());
    return tensor;
  }

 private:
  void* data_;
  fsdp_dtype_t dtype_;
  std::vector<std::int64_t> shape_;
  fsdp_device_t device_{FSDP_DEVICE_CPU, 0};
};

/// How the communicator reads a framework's tensor type: specialize it with
/// `static TensorView view(const Tensor&)`, which throws when the tensor cannot be described.
template <class Tensor>
struct TensorAccess;

}  // namespace fsdp
