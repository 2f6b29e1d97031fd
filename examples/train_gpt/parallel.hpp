// The model as the training loop sees it, sharded over the ranks or whole: all that differs is in
// this file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fsdp/torch.hpp>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>

#include "gpt.hpp"
#include "optimizer.hpp"
#include "ranks.hpp"

/// What the parameters, their gradients and the buffers around them take, in bytes.
struct ModelBytes {
  std::uint64_t parameters = 0;      ///< this rank's, padding included
  std::uint64_t gradients = 0;       ///< this rank's, padding included
  std::uint64_t padding = 0;         ///< of it, bytes that only round the shards up
  std::uint64_t unit_buffers = 0;    ///< shared by all ranks of the host
  std::uint64_t gradient_slots = 0;  ///< full gradients of units that wait for their reduction
};

/// A model being trained. Except `named_parameters` and `bytes` every function is collective.
class TrainedModel {
 public:
  virtual ~TrainedModel() = default;
  virtual torch::Tensor forward(const torch::Tensor& tokens) = 0;
  /// What the optimizer updates, by the original names: this rank's shards, or the whole
  /// parameters.
  virtual torch::OrderedDict<std::string, torch::Tensor> named_parameters() = 0;
  virtual void zero_grad() = 0;
  /// Whether the next backwards are followed by others of the same step.
  virtual void set_more_to_come(bool more) = 0;
  /// Scales all gradients so that their norm over all parameters and ranks is at most `limit`;
  /// returns what it was.
  virtual double clip_gradients(double limit) = 0;
  /// AdamW as the options say. Collective.
  virtual TrainOptimizer make_optimizer(const Shapes& shapes, const Options& options) = 0;
  virtual ModelBytes bytes() = 0;
  /// Writes parameters, optimizer state and `metadata` (JSON) to `folder`, which is complete or
  /// absent; perhaps in the background, after what an earlier call began.
  virtual void save(const std::string& folder, TrainOptimizer& optimizer,
                    const std::string& metadata) = 0;
  /// Returns when everything is saved; throws what went wrong since.
  virtual void finish_saving() = 0;
  /// Reads what save wrote; throws when it does not fit this model or is not complete.
  virtual void load(const std::string& folder, TrainOptimizer& optimizer) = 0;
};

/// Sharded over the ranks by fsdp; each transformer block is a unit.
class ShardedModel final : public TrainedModel {
 public:
  ShardedModel(Gpt gpt, const Ranks& ranks, const Options& o)
      : device_(ranks.device()), model_(fsdp::fully_shard(gpt, options(ranks, o))) {}

  torch::Tensor forward(const torch::Tensor& tokens) override {
    return model_.forward(tokens.to(device_));
  }
  torch::OrderedDict<std::string, torch::Tensor> named_parameters() override {
    return model_.named_parameters();
  }
  void zero_grad() override { model_.zero_grad(); }
  void set_more_to_come(bool more) override { model_.set_requires_gradient_sync(!more); }
  double clip_gradients(double limit) override { return model_.clip_grad_norm_(limit); }
  TrainOptimizer make_optimizer(const Shapes& shapes, const Options& o) override {
    if (o.optimizer == "fused") return make_fused_adamw(model_, shapes, o);
    return make_torch_adamw(named_parameters(), shapes, o);
  }
  ModelBytes bytes() override {
    const auto stats = model_.stats();
    return {stats.param_shard_bytes, stats.grad_shard_bytes, stats.padding_bytes,
            stats.unit_buffer_bytes + stats.compute_buffer_bytes, stats.gradient_slot_bytes};
  }
  void save(const std::string& folder, TrainOptimizer& optimizer,
            const std::string& metadata) override {
    finish_saving();
    saving_ = std::visit(
        [&](auto& any) { return model_.save_checkpoint_async(folder, any, metadata); }, optimizer);
  }
  void finish_saving() override {
    if (saving_) saving_->wait();
    saving_.reset();
  }
  void load(const std::string& folder, TrainOptimizer& optimizer) override {
    std::visit([&](auto& any) { model_.load_checkpoint(folder, any); }, optimizer);
  }
  static std::string metadata(const std::string& folder) {
    return fsdp::checkpoint_metadata(folder);
  }

 private:
  static fsdp::ShardOptions options(const Ranks& ranks, const Options& o) {
    fsdp::ShardOptions options;
    options.comm = ranks.communicator();
    options.device = ranks.device();
    options.cpu_offload = o.cpu_offload;
    options.wrap = fsdp::wrap_class("BlockImpl");
    using fsdp::Strategy;
    for (const auto& [name, strategy] :
         {std::pair("full-shard", Strategy::full_shard),
          std::pair("shard-grad-op", Strategy::shard_grad_op),
          std::pair("no-shard", Strategy::no_shard),
          std::pair("hybrid-shard", Strategy::hybrid_shard),
          std::pair("hybrid-shard-grad-op", Strategy::hybrid_shard_grad_op)}) {
      if (o.strategy == name) options.strategy = strategy;
    }
    options.shard_size = static_cast<std::uint32_t>(o.shard_size);
    if (o.precision == "bfloat16") {
      options.mixed_precision.param_dtype = torch::kBFloat16;
      options.mixed_precision.reduce_dtype = torch::kFloat;
      options.mixed_precision.output_dtype = torch::kFloat;  // for the loss
    }
    return options;
  }

  at::Device device_;
  decltype(fsdp::fully_shard(std::declval<Gpt>(), std::declval<fsdp::ShardOptions>())) model_;
  std::optional<fsdp::CheckpointJob> saving_;
};

/// The same model whole on one rank, in plain LibTorch, for comparison.
class WholeModel final : public TrainedModel {
 public:
  WholeModel(Gpt gpt, at::Device device) : device_(device), gpt_(std::move(gpt)) {
    gpt_->to(device_);
  }

  torch::Tensor forward(const torch::Tensor& tokens) override {
    return gpt_->forward(tokens.to(device_));
  }
  torch::OrderedDict<std::string, torch::Tensor> named_parameters() override {
    return gpt_->named_parameters();
  }
  void set_more_to_come(bool) override {}  // LibTorch adds gradients up by itself
  void zero_grad() override { gpt_->zero_grad(); }
  double clip_gradients(double limit) override {
    return torch::nn::utils::clip_grad_norm_(gpt_->parameters(), limit);
  }
  TrainOptimizer make_optimizer(const Shapes& shapes, const Options& o) override {
    return make_torch_adamw(named_parameters(), shapes, o);
  }
  ModelBytes bytes() override {
    ModelBytes bytes;
    for (const auto& parameter : gpt_->parameters()) bytes.parameters += parameter.nbytes();
    bytes.gradients = bytes.parameters;
    return bytes;
  }
  void save(const std::string& folder, TrainOptimizer& optimizer,
            const std::string& metadata) override {
    namespace fs = std::filesystem;
    const std::string aside = folder + ".partial";
    fs::remove_all(aside);
    fs::create_directories(aside);
    torch::save(gpt_, aside + "/model.pt");
    torch::save(std::get<torch::optim::AdamW>(optimizer), aside + "/optimizer.pt");
    if (!(std::ofstream(aside + "/metadata.json") << metadata << std::flush)) {
      throw std::runtime_error("cannot write '" + aside + "/metadata.json'");
    }
    fs::rename(aside, folder);
  }
  void finish_saving() override {}
  void load(const std::string& folder, TrainOptimizer& optimizer) override {
    torch::load(gpt_, folder + "/model.pt", device_);
    torch::load(std::get<torch::optim::AdamW>(optimizer), folder + "/optimizer.pt", device_);
  }
  static std::string metadata(const std::string& folder) {
    std::ifstream stream(folder + "/metadata.json");
    if (!stream) {
      throw UsageError("--resume: '" + folder + "' is no checkpoint of a --no-shard run");
    }
    return std::string(std::istreambuf_iterator<char>(stream), {});
  }

 private:
  at::Device device_;
  Gpt gpt_;
};

inline std::unique_ptr<TrainedModel> make_model(const Gpt& gpt, const Ranks& ranks,
                                                const Options& options) {
  if (options.no_shard) return std::make_unique<WholeModel>(gpt, ranks.device());
  return std::make_unique<ShardedModel>(gpt, ranks, options);
}

/// The metadata that the checkpoint in `folder` was saved with. Local.
inline std::string checkpoint_metadata(const std::string& folder, bool no_shard) {
  return no_shard ? WholeModel::metadata(folder) : ShardedModel::metadata(folder);
}
