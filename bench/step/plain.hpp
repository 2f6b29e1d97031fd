// Forward and backward of the unsharded model, each process by itself and without an optimizer: its memory beyond
// parameters and gradients is what a step computes with, the activations.
#pragma once

#include "systems.hpp"

template <class Work>
class Plain final : public System<Work> {
 public:
  Plain(const Arguments& args, const Work& work) : args_(args), work_(work) {
    load_parameters(*module_, args_.data);
  }

  double step(const typename Work::Batch& batch) override {
    module_->zero_grad();
    const torch::Tensor loss = work_.loss(*module_, batch);
    loss.backward();
    return loss.template item<double>();
  }

  std::string stats() override { return "{}"; }

 private:
  const Arguments& args_;
  const Work& work_;
  typename Work::Module module_;
};
