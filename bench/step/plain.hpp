// Forward and backward of the unsharded model, each process by itself and without an optimizer. A gradient is freed as soon
// as it is there, so that the memory beyond the parameters is what a step computes with, the activations (and the
// gradient of one parameter at a time).
#pragma once

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "systems.hpp"

/// Frees a parameter's gradient after it was accumulated.
class FreeGradient final : public torch::autograd::FunctionPostHook {
 public:
  explicit FreeGradient(const torch::Tensor& param) : param_(param.getIntrusivePtr()) {}

  torch::autograd::variable_list operator()(const torch::autograd::variable_list& outputs,
                                            const torch::autograd::variable_list&) override {
    if (const auto param = param_.lock()) torch::Tensor(param).mutable_grad().reset();
    return outputs;
  }

 private:
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> param_;
};

template <class Work>
class Plain final : public System<Work> {
 public:
  Plain(const Arguments& args, const Work& work) : args_(args), work_(work) {
    load_parameters(*module_, args_.data);
    fsdp::detail::HostHeap::install();
    for (const auto& param : module_->parameters()) {
      accumulators_.push_back(torch::autograd::impl::grad_accumulator(param));
      accumulators_.back()->add_post_hook(std::make_unique<FreeGradient>(param));
    }
  }

  double step(const typename Work::Batch& batch) override {
    const torch::Tensor loss = work_.loss(*module_, batch);
    loss.backward();
    return loss.template item<double>();
  }

  std::string stats() override {
    return "{\"heap_bytes\": " + std::to_string(fsdp::heap_stats().peak_bytes) + "}";
  }

 private:
  const Arguments& args_;
  const Work& work_;
  typename Work::Module module_;
  // A parameter holds its own weakly.
  std::vector<decltype(torch::autograd::impl::grad_accumulator(torch::Tensor()))> accumulators_;
};
