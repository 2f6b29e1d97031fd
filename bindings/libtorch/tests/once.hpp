// What the three parts of test_once share: one small training run.
#pragma once

#include "reference.hpp"

namespace once {

using Linear = fsdp::ShardedModule<torch::nn::LinearImpl>;

/// A sharded linear layer; the same values every time.
inline Linear make(const fsdp::Communicator& comm) {
  torch::manual_seed(1);
  fsdp::ShardOptions options;
  options.comm = comm;
  return fsdp::fully_shard(torch::nn::Linear(5, 3), options);
}

/// Trains it for a step and compares with a plain one.
inline void train(Linear& model, const fsdp::Communicator& comm) {
  torch::manual_seed(1);
  torch::nn::Linear reference(5, 3);
  const at::Tensor x = torch::ones({2, 5});
  harness::average_gradients(reference->parameters(), comm.world_size(),
                             [&](int) { reference->forward(x).pow(2).sum().backward(); });
  model.forward(x).pow(2).sum().backward();
  harness::check_shards(model, reference->parameters(), true, "once");
  REQUIRE_THROWS(model->weight.sum(), "'weight'");
  auto optimizer = harness::sgd()(model.parameters());
  auto full_optimizer = harness::sgd()(reference->parameters());
  optimizer->step();
  full_optimizer->step();
  harness::check_shards(model, reference->parameters(), false, "once");
}

/// The table the other translation unit sees.
const void* table_of_second_unit();
void train_in_second_unit(const fsdp::Communicator& comm);

}  // namespace once
