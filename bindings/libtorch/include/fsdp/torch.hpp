// The LibTorch binding: shards any torch::nn module over ranks without touching its code.
//
//   fsdp::ShardOptions options;
//   options.comm = fsdp::Communicator::from_env();
//   options.wrap = fsdp::wrap_class("BlockImpl");
//   auto model = fsdp::fully_shard(my_module, options);
//   torch::optim::AdamW optimizer(model.parameters(), 3e-4);
//   auto loss = torch::nn::functional::cross_entropy(model.forward(x), y);
//   loss.backward();
//   optimizer.step();
//   model.zero_grad();
//
// Header-only C++20 (as LibTorch 2.15's own headers); link LibTorch and libfsdp. A shared library
// that includes this header must not be unloaded (dlclose) once it has called fully_shard or
// deferred_init: it may hold the process's dispatcher fallback.
#pragma once

#include "fsdp/fsdp.hpp"
#include "fsdp/torch/deferred.hpp"
#include "fsdp/torch/options.hpp"
#include "fsdp/torch/plan.hpp"
#include "fsdp/torch/reset.hpp"
#include "fsdp/torch/sharded_grad_scaler.hpp"
#include "fsdp/torch/sharded_module.hpp"
#include "fsdp/torch/tensors.hpp"
#include "fsdp/torch/trace.hpp"
