// A user's LibTorch program: sums rank + 1 over the ranks as the gradient of a sharded module.
#include <cstdio>
#include <exception>
#include <fsdp/torch.hpp>
#include <torch/torch.h>

int main() {
  try {
    const auto comm = fsdp::Communicator::from_env();
    fsdp::ShardOptions options;
    options.comm = comm;
    torch::nn::Linear linear(torch::nn::LinearOptions(1, 1).bias(false));
    auto model = fsdp::fully_shard(linear, options);
    // d loss / d weight is rank + 1 here; the ranks' gradients are averaged into rank 0's shard.
    model.forward(torch::full({1, 1}, comm.rank() + 1.0)).sum().backward();
    double sum = 0;
    for (const auto& parameter : model.parameters()) {
      if (parameter.numel() > 0) sum = parameter.grad().sum().item<double>() * comm.world_size();
    }
    comm.all_reduce(&sum, 1, fsdp::ReduceOp::max);
    std::printf("world size %d, sum %d, fsdp %s\n", comm.world_size(), int(sum), fsdp_version());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
