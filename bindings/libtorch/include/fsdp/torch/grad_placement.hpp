// Gradients of large weights, computed in the engine's gradient slot instead of copied there.
//
// When a linear layer or an embedding has run in forward, the autograd node that will compute its
// weight's gradient gets a hook. In backward the hook, right before the node, puts the tag's key into
// this thread's state, so that the node's operators come to the fallback; the one that computes a
// gradient of the weight's shape computes it in the weight's place in the slot. Autograd restores the
// state after each node, which takes the key out again.
//
// The guess may be wrong, and hooks of the user may hold or change anything. What counts as a gradient
// is only what arrives at the gradient node (model_state.hpp); it is left where it is if precisely this
// arrives and nobody else holds it. Else whatever lives in the place moves out first.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/node.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "fsdp/fsdp.hpp"
#include "fsdp/torch/accumulator.hpp"
#include "fsdp/torch/dispatch.hpp"

namespace fsdp::detail {

/// Below this many elements a copy in the caches is cheaper than all of this.
inline constexpr std::int64_t kLargeGradient = 1 << 16;

/// What was computed in one parameter's place in the slot and has not arrived yet.
class PlacedGradient {
 public:
  PlacedGradient() = default;
  PlacedGradient(PlacedGradient&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)),
        bytes_(other.bytes_),
        storage_(std::move(other.storage_)) {}
  PlacedGradient& operator=(PlacedGradient&&) = delete;
  ~PlacedGradient() { move_out(); }

  /// Nothing lives in the place.
  bool vacant() const noexcept { return data_ == nullptr || storage_.expired(); }

  /// A tensor in the place, which is at `data` and has room for it.
  at::Tensor make(float* data, at::IntArrayRef sizes) {
    at::Tensor tensor = at::from_blob(data, sizes, at::kFloat);
    data_ = data;
    bytes_ = tensor.nbytes();
    storage_ = tensor.storage().getWeakStorageImpl();
    return tensor;
  }

  /// Whether `gradient` is all of what was made, and held by its caller alone: then it needs no copy.
  /// Whatever else lives in the place has moved out. Nothing is known of the place from here on.
  bool arrives_in_place(const at::Tensor& gradient) {
    if (data_ == nullptr) return false;
    const bool in_place = gradient.has_storage() && gradient.storage().data() == data_ &&
                          gradient.nbytes() == bytes_ && gradient.is_contiguous() &&
                          !gradient.is_neg() && is_alone(gradient);
    if (!in_place) move_out();
    data_ = nullptr;
    return in_place;
  }

  /// What still lives in the place gets memory of its own. Nothing is known of it from here on.
  void move_out() {
    if (data_ == nullptr) return;
    if (const auto storage = storage_.lock()) {
      at::DataPtr own = c10::GetAllocator(c10::DeviceType::CPU)->allocate(bytes_);
      std::memcpy(own.get(), data_, bytes_);
      storage->set_data_ptr_noswap(std::move(own));
    }
    data_ = nullptr;
  }

 private:
  /// Whether nobody but the caller holds `tensor`, or the tensor that it is a view of.
  static bool is_alone(const at::Tensor& tensor) {
    if (tensor.use_count() != 1) return false;
    if (!tensor.is_view()) return tensor.storage().use_count() == 1;
    return tensor._base().use_count() == 1 && tensor.storage().use_count() == 2;
  }

  float* data_ = nullptr;
  std::size_t bytes_ = 0;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_{c10::intrusive_ptr<c10::StorageImpl>()};
};

/// Places the gradient that comes next on a thread.
class GradPlacement final : public ResultPlacer,
                            public std::enable_shared_from_this<GradPlacement> {
 public:
  /// The node that runs now on this thread computes the gradient of `param`. `engine`, `leaf` and
  /// `placed`, the parameter's, live as long as this.
  void expect(Engine& engine, std::uint32_t param, const at::Tensor& leaf,
              PlacedGradient& placed) {
    node_ = torch::autograd::get_current_node().get();
    engine_ = &engine;
    param_ = param;
    leaf_ = &leaf;
    placed_ = &placed;
    dispatch_table().thread_slots().placer = weak_from_this();
    c10::impl::tls_set_dispatch_key_included(kTagKey, true);
  }

  bool compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) override {
    static const c10::OperatorHandle product = find("aten::mm");
    static const c10::OperatorHandle rows = find("aten::embedding_backward");
    // What this was told may be of an earlier node, of which nothing came.
    if (torch::autograd::get_current_node().get() != node_) return done();
    if (op == product) {
      const at::Tensor a = torch::jit::peek(*stack, 0, 2).toTensor();
      const at::Tensor b = torch::jit::peek(*stack, 1, 2).toTensor();
      if (!is_plain(a) || !is_plain(b) || !fits(a.size(0), b.size(1))) return false;
      std::optional<at::Tensor> place = reserve();
      if (!place) return done();
      at::mm_out(*place, a, b);
      return give(stack, 2, std::move(*place));
    }
    if (op == rows) {
      const at::Tensor grad = torch::jit::peek(*stack, 0, 6).toTensor();
      const at::Tensor indices = torch::jit::peek(*stack, 1, 6).toTensor();
      const std::int64_t count = torch::jit::peek(*stack, 2, 6).toSymInt().expect_int();
      const std::int64_t padding = torch::jit::peek(*stack, 3, 6).toSymInt().expect_int();
      const bool scaled = torch::jit::peek(*stack, 4, 6).toBool();
      const bool sparse = torch::jit::peek(*stack, 5, 6).toBool();
      if (grad.dim() == 0 || !is_plain(grad) || padding >= 0 || scaled || sparse ||
          !fits(count, grad.size(-1))) {
        return false;
      }
      std::optional<at::Tensor> place = reserve();
      if (!place) return done();
      // As embedding_dense_backward: row by row, in the order of the indices.
      place->zero_().index_add_(0, indices.reshape(-1), grad.reshape({-1, grad.size(-1)}));
      return give(stack, 6, std::move(*place));
    }
    return false;
  }

 private:
  static c10::OperatorHandle find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  }

  static bool is_plain(const at::Tensor& tensor) {
    return tensor.layout() == at::kStrided && tensor.device().is_cpu() &&
           tensor.scalar_type() == at::kFloat;
  }

  bool fits(std::int64_t rows, std::int64_t columns) const {
    return leaf_->size(0) == rows && leaf_->size(1) == columns;
  }

  /// The place, if no gradient is there to add to.
  std::optional<at::Tensor> reserve() {
    const auto [region, accumulate] = engine_->reserve_grad(param_);
    if (accumulate) return std::nullopt;
    char* const data = static_cast<char*>(region.data) + region.byte_offset;
    return placed_->make(reinterpret_cast<float*>(data), leaf_->sizes());
  }

  bool give(torch::jit::Stack* stack, std::size_t arguments, at::Tensor result) {
    torch::jit::drop(*stack, arguments);
    torch::jit::push(*stack, std::move(result));
    done();
    return true;
  }

  bool done() {
    dispatch_table().thread_slots().placer.reset();
    return false;
  }

  const torch::autograd::Node* node_ = nullptr;
  Engine* engine_ = nullptr;
  std::uint32_t param_ = 0;
  const at::Tensor* leaf_ = nullptr;
  PlacedGradient* placed_ = nullptr;
};

/// Runs before the autograd node that computes a weight's gradient.
class ExpectGradient final : public torch::autograd::FunctionPreHook {
 public:
  explicit ExpectGradient(c10::intrusive_ptr<torch::autograd::Node> node)
      : node_(std::move(node)) {}

  torch::autograd::variable_list operator()(
      const torch::autograd::variable_list& gradients) override {
    static_cast<const GradientNode&>(*node_).expect();
    return gradients;
  }

 private:
  c10::intrusive_ptr<torch::autograd::Node> node_;  // a GradientNode
};

/// Whether `op` may give a result that follow_gradients() knows.
inline bool is_weighted(const c10::OperatorHandle& op) {
  static const auto find = [](const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  };
  static const std::array operators{find("aten::linear"), find("aten::mm"), find("aten::addmm"),
                                    find("aten::matmul"), find("aten::embedding")};
  return std::find(operators.begin(), operators.end(), op) != operators.end();
}

/// Puts a hook on the autograd node that computes a large weight's gradient, if `result` is of one of
/// the operators above and has such a node behind it, perhaps behind views.
inline void follow_gradients(const at::Tensor& result) {
  torch::autograd::Node* node = result.defined() ? result.grad_fn().get() : nullptr;
  for (int views = 0; node != nullptr && views < 3; ++views) {
    for (const torch::autograd::Edge& edge : node->next_edges()) {
      c10::intrusive_ptr<torch::autograd::Node> next = edge.function;
      if (next && next->name() == "TBackward0") next = next->next_edge(0).function;
      const auto* leaf = dynamic_cast<const GradientNode*>(next.get());
      if (leaf == nullptr) continue;
      if (leaf->leaf().dim() == 2 && leaf->leaf().numel() >= kLargeGradient) {
        node->add_pre_hook(std::make_unique<ExpectGradient>(std::move(next)));
      }
      return;
    }
    node = node->num_outputs() > 0 ? node->next_edge(0).function.get() : nullptr;
  }
}

}  // namespace fsdp::detail
