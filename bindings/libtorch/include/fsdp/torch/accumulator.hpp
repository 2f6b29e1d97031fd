// The autograd node that receives the full gradient of one module parameter.
//
// It stands where AccumulateGrad would, and hands the gradient to the engine instead of keeping it
// in `.grad`. Hooks registered on the parameter (Tensor::register_hook) run before it, as usual.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/fsdp.hpp"

namespace fsdp::detail {

/// Takes complete (per graph task) gradients. Implemented by ModelState.
class GradientSink {
 public:
  /// Consumes the full-size, dense float gradient of parameter `param`.
  virtual void accept_gradient(std::uint32_t param, const at::Tensor& gradient) = 0;
  /// The autograd node that runs next on this thread computes it.
  virtual void expect_gradient(std::uint32_t param) = 0;

 protected:
  ~GradientSink() = default;
};

class GradientNode final : public torch::autograd::Node {
 public:
  /// Runs, like AccumulateGrad, as soon as it is ready. `sink` may be gone when the node runs.
  GradientNode(at::Tensor leaf, std::string parameter, std::uint32_t param,
               std::weak_ptr<GradientSink> sink)
      : Node(/*sequence_nr=*/UINT64_MAX),
        leaf_(std::move(leaf)),
        parameter_(std::move(parameter)),
        param_(param),
        sink_(std::move(sink)) {
    add_input_metadata(leaf_);
  }

  /// The leaf refers weakly to this node, which keeps the node's memory: without this, node and
  /// leaf (and with it the shards) would keep each other.
  void release_resources() override {
    leaf_.reset();
    Node::release_resources();
  }

  const at::Tensor& leaf() const noexcept { return leaf_; }

  /// Says that the node which runs next computes what arrives here. Nothing if nobody listens.
  void expect() const {
    if (const std::shared_ptr<GradientSink> sink = sink_.lock()) sink->expect_gradient(param_);
  }

  std::string name() const override { return "fsdp::GradientNode(" + parameter_ + ")"; }

  std::vector<std::unique_ptr<torch::autograd::FunctionPreHook>>& tensor_pre_hooks() noexcept
      override {
    return torch::autograd::impl::hooks(leaf_);
  }

 protected:
  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const at::Tensor gradient = std::move(gradients.at(0));
    // As AccumulateGrad: a parameter frozen since the forward gets none.
    if (!gradient.defined() || !leaf_.requires_grad()) return {};
    const std::shared_ptr<GradientSink> sink = sink_.lock();
    if (!sink) {
      throw Error(FSDP_ERR_INVALID_STATE,
                  "a gradient of parameter '" + parameter_ +
                      "' arrived after the sharded model it belongs to was destroyed");
    }
    if (at::GradMode::is_enabled()) {
      throw Error(FSDP_ERR_UNSUPPORTED,
                  "backward with create_graph=true (double backward) reached parameter '" +
                      parameter_ + "', which is sharded: gradients of gradients are not supported");
    }
    if (gradient.layout() != at::kStrided || gradient.device() != leaf_.device()) {
      throw Error(FSDP_ERR_UNSUPPORTED,
                  "the gradient of parameter '" + parameter_ + "' is not a dense tensor on " +
                      leaf_.device().str() +
                      " (a sparse embedding?): sharded parameters need dense gradients");
    }
    sink->accept_gradient(param_, gradient);
    return {};
  }

 private:
  at::Tensor leaf_;
  std::string parameter_;
  std::uint32_t param_;
  std::weak_ptr<GradientSink> sink_;
};

/// Puts the node behind `leaf`, which only keeps a weak reference: the caller owns it.
inline c10::intrusive_ptr<torch::autograd::Node> install_gradient_node(
    const at::Tensor& leaf, const std::string& parameter, std::uint32_t param,
    std::weak_ptr<GradientSink> sink) {
  c10::intrusive_ptr<torch::autograd::Node> node =
      c10::make_intrusive<GradientNode>(leaf, parameter, param, std::move(sink));
  torch::autograd::impl::set_grad_accumulator(leaf,
                                              c10::weak_intrusive_ptr<torch::autograd::Node>(node));
  return node;
}

}  // namespace fsdp::detail
