// A plain data-parallel loop to compare with: full parameters, one process doing every rank's part.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "harness.hpp"

namespace harness {

/// How an optimizer is made from parameters; used for the reference and for the sharded model.
using MakeOptimizer =
    std::function<std::unique_ptr<torch::optim::Optimizer>(std::vector<at::Tensor>)>;

inline MakeOptimizer sgd() {
  return [](std::vector<at::Tensor> params) -> std::unique_ptr<torch::optim::Optimizer> {
    return std::make_unique<torch::optim::SGD>(
        std::move(params), torch::optim::SGDOptions(0.05).momentum(0.9).weight_decay(0.01));
  };
}

inline MakeOptimizer adam() {
  return [](std::vector<at::Tensor> params) -> std::unique_ptr<torch::optim::Optimizer> {
    return std::make_unique<torch::optim::Adam>(std::move(params),
                                                torch::optim::AdamOptions(1e-2).weight_decay(0.01));
  };
}

inline MakeOptimizer adamw() {
  return [](std::vector<at::Tensor> params) -> std::unique_ptr<torch::optim::Optimizer> {
    return std::make_unique<torch::optim::AdamW>(
        std::move(params), torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
  };
}

/// Makes `.grad` of `params` the average over ranks of what `backward(rank)` leaves there: summed
/// in rank order, divided by the number of ranks. A parameter that no rank has a gradient for gets
/// none; one that some lack counts as zero there. Existing gradients are added to.
inline void average_gradients(const std::vector<at::Tensor>& params, int ranks,
                              const std::function<void(int rank)>& backward) {
  std::vector<at::Tensor> before(params.size()), sum(params.size());
  for (std::size_t i = 0; i < params.size(); ++i) before[i] = params[i].grad();
  for (int rank = 0; rank < ranks; ++rank) {
    for (const at::Tensor& param : params) param.mutable_grad().reset();
    backward(rank);
    for (std::size_t i = 0; i < params.size(); ++i) {
      const at::Tensor grad = params[i].grad();
      if (!grad.defined()) continue;
      sum[i] = sum[i].defined() ? sum[i] + grad : grad.clone();
    }
  }
  for (std::size_t i = 0; i < params.size(); ++i) {
    at::Tensor& grad = params[i].mutable_grad();
    grad = before[i];
    if (!sum[i].defined()) continue;
    const at::Tensor average = sum[i] / ranks;
    grad = grad.defined() ? grad + average : average;
  }
}

/// Whether two tensors have the same bits (so NaN equals itself).
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() != b.numel()) return false;
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return a.numel() == 0 ||
         std::memcmp(x.data_ptr(), y.data_ptr(), static_cast<std::size_t>(x.nbytes())) == 0;
}

/// Fails unless this rank's shard (or gradient shard) of every parameter is, bit for bit, its piece
/// of the reference's. `tolerance` > 0 allows that much relative difference instead.
template <class Sharded>
void check_shards(const Sharded& model, const std::vector<at::Tensor>& reference, bool gradients,
                  const std::string& when, double tolerance = 0) {
  const torch::NoGradGuard no_grad;
  const auto shards = model.named_parameters();
  REQUIRE_SAY(shards.size() == reference.size(),
              shards.size() << " shards, " << reference.size() << " reference parameters");
  for (std::size_t i = 0; i < reference.size(); ++i) {
    const auto info = model.engine().param_info(static_cast<std::uint32_t>(i));
    const at::Tensor shard = gradients ? shards[i].value().grad() : shards[i].value().detach();
    const at::Tensor full = gradients ? reference[i].grad() : reference[i].detach();
    const std::string what =
        when + ": " + (gradients ? "gradient of '" : "parameter '") + shards[i].key() + "'";
    REQUIRE_SAY(shard.defined() == full.defined(), what << " defined here: " << shard.defined());
    if (!full.defined()) continue;
    const at::Tensor piece =
        full.reshape({-1}).narrow(0, info.shard_offset, info.shard_numel).clone();
    const at::Tensor mine = shard.clone().cpu();
    if (tolerance > 0) {
      REQUIRE_SAY(torch::allclose(mine, piece, tolerance, tolerance), what << " differs");
    } else if (!same_bits(mine, piece)) {
      const at::Tensor difference = (mine - piece).abs();
      REQUIRE_SAY(false, what << " differs in " << (mine != piece).sum().item<std::int64_t>()
                              << " of " << mine.numel() << " elements, by at most "
                              << difference.max().item<float>() << ", first at element "
                              << (mine != piece).nonzero()[0].item<std::int64_t>());
    }
  }
}

}  // namespace harness
