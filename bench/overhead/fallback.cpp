// What an operator costs more when one of its arguments is a parameter of a sharded unit, within forward: prints
// {"plain_ns", "sharded_ns"}, medians of the time of one `parameter.t()` without autograd: what every linear layer
// does with its weight. World size 1.
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <fsdp/torch.hpp>
#include <vector>

namespace {

constexpr int kTurns = 301, kOperators = 1000;

/// Its forward times the operator on its parameter and on a tensor that is nobody's, in turns.
struct TimedImpl : torch::nn::Module {
  TimedImpl() : weight(register_parameter("weight", torch::zeros({16, 16}))) {}

  torch::Tensor forward(const torch::Tensor& plain) {
    const torch::NoGradGuard no_grad;
    for (int turn = 0; turn < kTurns; ++turn) {
      plain_ns.push_back(time(plain));
      sharded_ns.push_back(time(weight));
    }
    return plain.clone();
  }

  static double time(const torch::Tensor& tensor) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kOperators; ++i) tensor.t();
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count() / kOperators;
  }

  torch::Tensor weight;
  std::vector<double> plain_ns, sharded_ns;
};
TORCH_MODULE(Timed);

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + kTurns / 2, values.end());
  return values[kTurns / 2];
}

}  // namespace

int main() try {
  at::set_num_threads(1);
  Timed net;
  fsdp::ShardOptions options;
  options.comm = fsdp::Communicator::single();
  auto model = fsdp::fully_shard(net, options);
  model.forward(torch::zeros({16, 16}));
  std::printf("{\"plain_ns\": %.1f, \"sharded_ns\": %.1f}\n", median(net->plain_ns), median(net->sharded_ns));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "fsdp_bench_fallback: %s\n", error.what());
  return 1;
}
