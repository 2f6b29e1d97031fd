// The systems that fsdp_bench_step runs: one training step each, the same but for who communicates.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <fsdp/torch.hpp>
#include <memory>
#include <string>
#include <vector>

#include "data.hpp"

inline torch::optim::AdamWOptions adamw_options() {
  return torch::optim::AdamWOptions(1e-3).betas({0.9, 0.95}).eps(1e-8).weight_decay(0.1);
}

/// Seconds of the parts of a step.
struct Phases {
  double forward = 0, backward = 0, optimizer = 0;
};

/// Runs the parts of a step and times each.
template <class Forward, class Backward, class Optimizer>
double timed_step(Phases& phases, Forward&& forward, Backward&& backward, Optimizer&& optimizer) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](auto from, auto to) {
    return std::chrono::duration<double>(to - from).count();
  };
  const auto start = Clock::now();
  const torch::Tensor loss = forward();
  const auto forwarded = Clock::now();
  backward(loss);
  const auto reduced = Clock::now();
  optimizer();
  phases = {seconds(start, forwarded), seconds(forwarded, reduced), seconds(reduced, Clock::now())};
  return loss.item<double>();
}

template <class Work>
class System {
 public:
  virtual ~System() = default;
  /// One step on this rank's batch; its loss.
  virtual double step(const typename Work::Batch& batch) = 0;
  /// Of the last step.
  const Phases& phases() const { return phases_; }
  /// A line of JSON.
  virtual std::string stats() = 0;

 protected:
  Phases phases_;
};

/// Our engine: every block a unit, the default strategy.
template <class Work>
class Sharded final : public System<Work> {
 public:
  Sharded(const Arguments& args, const Work& work) : work_(work), model_(make(args)) {
    if (args.system != "fsdp_shm_fused") {
      adamw_ = std::make_unique<torch::optim::AdamW>(model_.parameters(), adamw_options());
      return;
    }
    fsdp::AdamWConfig config;
    config.lr = 1e-3;
    config.beta1 = 0.9;
    config.beta2 = 0.95;
    config.eps = 1e-8;
    config.weight_decay = 0.1;
    fused_ = std::make_unique<fsdp::FusedOptimizer>(model_.adamw(config));
  }

  double step(const typename Work::Batch& batch) override {
    return timed_step(
        this->phases_,
        [&] {
          model_.zero_grad();
          return work_.loss(model_, batch);
        },
        [](const torch::Tensor& loss) { loss.backward(); },
        [&] {
          if (fused_) fused_->step();
          else adamw_->step();
        });
  }

  std::string stats() override {
    const fsdp::Stats s = model_.stats();
    const auto number = [](const char* name, std::uint64_t value) {
      return std::string("\"") + name + "\": " + std::to_string(value);
    };
    return "{" + number("param_shard_bytes", s.param_shard_bytes) + ", " +
           number("grad_shard_bytes", s.grad_shard_bytes) + ", " +
           number("unit_buffer_bytes", s.unit_buffer_bytes) + ", " +
           number("gradient_slot_bytes", s.gradient_slot_bytes) + ", " +
           number("optimizer_bytes", adamw_ ? 2 * largest_shard_bytes() : 0) + "}";
  }

 private:
  using Model = decltype(fsdp::fully_shard(std::declval<typename Work::Module>(),
                                           std::declval<fsdp::ShardOptions>()));

  static Model make(const Arguments& args) {
    typename Work::Module module;
    load_parameters(*module, args.data);
    fsdp::ShardOptions options;
    options.comm = fsdp::Communicator::from_env();
    options.wrap = fsdp::wrap_class(Work::kUnit);
    return fsdp::fully_shard(module, options);
  }

  /// torch::optim::AdamW allocates two tensors as large as a parameter while it updates it: the root of the second moment,
  /// and the same divided by its correction.
  std::uint64_t largest_shard_bytes() {
    std::uint64_t bytes = 0;
    for (const auto& param : model_.parameters()) bytes = std::max<std::uint64_t>(bytes, param.nbytes());
    return bytes;
  }

  const Work& work_;
  Model model_;
  std::unique_ptr<torch::optim::AdamW> adamw_;
  std::unique_ptr<fsdp::FusedOptimizer> fused_;
};

/// What no engine can beat: each process computes its batch alone, and updates 1/W of the parameters.
template <class Work>
class Bound final : public System<Work> {
 public:
  Bound(const Arguments& args, const Work& work) : args_(args), work_(work) {
    load_parameters(*module_, args_.data);
    all_ = module_->parameters();
    for (const auto& param : all_) {
      shards_.push_back(shard_of(param.detach().view({-1})).set_requires_grad(true));
    }
    adamw_ = std::make_unique<torch::optim::AdamW>(shards_, adamw_options());
  }

  double step(const typename Work::Batch& batch) override {
    return timed_step(
        this->phases_,
        [&] {
          module_->zero_grad();
          return work_.loss(*module_, batch);
        },
        [](const torch::Tensor& loss) { loss.backward(); },
        [&] {
          for (std::size_t i = 0; i < shards_.size(); ++i) {
            shards_[i].mutable_grad() = shard_of(all_[i].grad().view({-1}));
          }
          adamw_->step();
        });
  }

  std::string stats() override { return "{}"; }

 private:
  /// This rank's W-th of a flat tensor, a view.
  torch::Tensor shard_of(const torch::Tensor& flat) const {
    const auto numel = flat.size(0), begin = numel * args_.rank / args_.world_size;
    return flat.narrow(0, begin, numel * (args_.rank + 1) / args_.world_size - begin);
  }

  const Arguments& args_;
  const Work& work_;
  typename Work::Module module_;
  std::vector<torch::Tensor> all_, shards_;
  std::unique_ptr<torch::optim::AdamW> adamw_;
};
