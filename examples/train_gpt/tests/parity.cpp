// The trainer's GPT, sharded, against a straightforward data-parallel loop in plain LibTorch: losses, averaged gradients
// and parameters after each of 20 AdamW steps, bit for bit, at any world size. Started as ranks by `fsdp run`.
#include <fsdp/torch.hpp>

#include <iostream>

#include "../gpt.hpp"
#include "reference.hpp"

namespace {

torch::Tensor loss_of(const torch::Tensor& logits, const torch::Tensor& targets) {
  return torch::nn::functional::cross_entropy(logits.reshape({-1, kVocabulary}), targets.reshape(-1));
}

void train(const fsdp::Communicator& comm, const GptConfig& config) {
  constexpr std::int64_t kRows = 2;
  torch::manual_seed(7);
  Gpt whole(config);
  torch::manual_seed(7);
  Gpt cut(config);
  fsdp::ShardOptions options;
  options.comm = comm;
  options.wrap = fsdp::wrap_class("BlockImpl");
  auto model = fsdp::fully_shard(cut, options);

  const auto parameters = whole->parameters();
  const auto make = harness::adamw();
  const auto reference_step = make(parameters);
  const auto sharded_step = make(model.parameters());
  for (int step = 0; step < 20; ++step) {
    const std::string when = "step " + std::to_string(step);
    torch::manual_seed(100 + step);
    const auto text = torch::randint(kVocabulary, {comm.world_size() * kRows, config.seq + 1}, torch::kLong);
    const auto part = [&](int rank, std::int64_t shift) {
      return text.narrow(0, rank * kRows, kRows).narrow(1, shift, config.seq).contiguous();
    };

    torch::Tensor expected;
    reference_step->zero_grad();
    harness::average_gradients(parameters, comm.world_size(), [&](int rank) {
      const auto loss = loss_of(whole->forward(part(rank, 0)), part(rank, 1));
      loss.backward();
      if (rank == comm.rank()) expected = loss.detach();
    });
    model.zero_grad();
    const auto loss = loss_of(model.forward(part(comm.rank(), 0)), part(comm.rank(), 1));
    loss.backward();

    REQUIRE_SAY(harness::same_bits(loss.detach(), expected), when << ": loss " << loss << " and " << expected);
    harness::check_shards(model, parameters, /*gradients=*/true, when);
    reference_step->step();
    sharded_step->step();
    harness::check_shards(model, parameters, /*gradients=*/false, when);
  }
}

}  // namespace

int main() {
  try {
    at::set_num_threads(1);
    const auto comm = fsdp::Communicator::from_env();
    train(comm, {.d_model = 40, .layers = 2, .heads = 4, .seq = 13});
    train(comm, {.d_model = 40, .layers = 2, .heads = 4, .seq = 13, .tie_head = true});
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "parity: " << error.what() << "\n";
    return 1;
  }
}
