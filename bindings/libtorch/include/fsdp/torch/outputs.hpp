// Finding the tensors in whatever a module's forward returns.
//
// Tensors alone, and in pair, tuple, optional, vector and array in any nesting, are found. In any
// other type none is, and the backward pass is then recognized at its first touch of a parameter.
#pragma once

#include <torch/torch.h>

#include <array>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace fsdp::detail {

template <class T>
struct OutputTensors {
  static constexpr bool known = false;
  template <class Visit>
  static void visit(const T&, Visit&&) {}
};

/// Calls `visit(const at::Tensor&)` for every defined tensor in `output`.
template <class T, class Visit>
void visit_outputs(const T& output, Visit&& visit) {
  OutputTensors<T>::visit(output, visit);
}

/// Whether all tensors in a T are found.
template <class T>
inline constexpr bool outputs_known = OutputTensors<std::decay_t<T>>::known;

template <>
struct OutputTensors<at::Tensor> {
  static constexpr bool known = true;
  template <class Visit>
  static void visit(const at::Tensor& tensor, Visit&& visit) {
    if (tensor.defined()) visit(tensor);
  }
};

template <class T>
struct OutputTensors<std::optional<T>> {
  static constexpr bool known = outputs_known<T>;
  template <class Visit>
  static void visit(const std::optional<T>& output, Visit&& visit) {
    if (output) visit_outputs(*output, visit);
  }
};

template <class... T>
struct OutputTensors<std::tuple<T...>> {
  static constexpr bool known = (outputs_known<T> && ...);
  template <class Visit>
  static void visit(const std::tuple<T...>& output, Visit&& visit) {
    std::apply([&](const T&... element) { (visit_outputs(element, visit), ...); }, output);
  }
};

template <class First, class Second>
struct OutputTensors<std::pair<First, Second>> {
  static constexpr bool known = outputs_known<First> && outputs_known<Second>;
  template <class Visit>
  static void visit(const std::pair<First, Second>& output, Visit&& visit) {
    visit_outputs(output.first, visit);
    visit_outputs(output.second, visit);
  }
};

template <class T>
struct OutputTensors<std::vector<T>> {
  static constexpr bool known = outputs_known<T>;
  template <class Visit>
  static void visit(const std::vector<T>& output, Visit&& visit) {
    for (const auto& element : output) visit_outputs<T>(element, visit);
  }
};

template <class T, std::size_t N>
struct OutputTensors<std::array<T, N>> {
  static constexpr bool known = outputs_known<T>;
  template <class Visit>
  static void visit(const std::array<T, N>& output, Visit&& visit) {
    for (const auto& element : output) visit_outputs(element, visit);
  }
};

}  // namespace fsdp::detail
