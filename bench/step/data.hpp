// What a step trains on: the files of the data folder, and a model with a loss on them.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "models.hpp"

/// The command line, and the rank's place from the environment.
struct Arguments {
  std::string system, workload, data;
  std::int64_t batch = 1, tokens = 16, rank = 0, world_size = 1;
  bool load_only = false;
};

inline std::int64_t environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) throw std::runtime_error(std::string(name) + " is not set");
  return std::stoll(value);
}

inline Arguments parse(int argc, char** argv) {
  Arguments args;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--load-only") {
      args.load_only = true;
      continue;
    }
    if (i + 1 == argc) throw std::runtime_error(name + " needs a value");
    const std::string value = argv[++i];
    if (name == "--system") args.system = value;
    else if (name == "--workload") args.workload = value;
    else if (name == "--data") args.data = value;
    else if (name == "--batch") args.batch = std::stoll(value);
    else if (name == "--tokens") args.tokens = std::stoll(value);
    else throw std::runtime_error("unknown argument " + name);
  }
  if (args.load_only) return args;
  if (args.system != "bound" && args.system != "plain" && args.system != "fsdp_shm" &&
      args.system != "fsdp_shm_fused") {
    throw std::runtime_error("--system " + args.system +
                             ": fsdp_shm, fsdp_shm_fused, bound or plain is expected");
  }
  args.rank = environment("RANK");
  args.world_size = environment("WORLD_SIZE");
  return args;
}

/// A whole file of little-endian elements as a tensor of `shape`.
inline torch::Tensor read_file(const std::string& path, torch::ScalarType type,
                               std::vector<std::int64_t> shape) {
  torch::Tensor data = torch::empty(shape, type);
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(data.data_ptr()), static_cast<std::streamsize>(data.nbytes()));
  if (!file || file.peek() != std::ifstream::traits_type::eof()) {
    throw std::runtime_error(path + ": " + std::to_string(data.nbytes()) + " bytes are expected");
  }
  return data;
}

/// Sets the parameters of a module to what params.f32 holds, one after the other.
inline void load_parameters(torch::nn::Module& module, const std::string& folder) {
  const torch::NoGradGuard no_grad;
  std::int64_t numel = 0;
  for (const auto& param : module.parameters()) numel += param.numel();
  const auto values = read_file(folder + "/params.f32", torch::kFloat, {numel});
  std::int64_t offset = 0;
  for (auto& param : module.parameters()) {
    param.copy_(values.narrow(0, offset, param.numel()).view(param.sizes()));
    offset += param.numel();
  }
}

/// How many different batches the data folder holds, and for how many ranks.
inline constexpr std::int64_t kSteps = 64, kRanks = 8;

/// Next-token prediction.
struct GptWork {
  using Module = Gpt;
  static constexpr const char* kUnit = "BlockImpl";
  struct Batch {
    torch::Tensor inputs, targets;
  };

  explicit GptWork(const Arguments& args)
      : rank(args.rank),
        rows(read_file(args.data + "/tokens.i64", torch::kLong,
                       {kSteps, kRanks, args.batch, args.tokens + 1})) {}

  Batch batch(std::int64_t step) const {
    const auto row = rows[step % kSteps][rank];
    const auto tokens = row.size(1) - 1;
    return {row.narrow(1, 0, tokens).contiguous(), row.narrow(1, 1, tokens).contiguous()};
  }
  template <class Model>
  torch::Tensor loss(Model& model, const Batch& batch) const {
    const torch::Tensor logits = model.forward(batch.inputs);
    return torch::nn::functional::cross_entropy(logits.view({-1, kVocabulary}),
                                                batch.targets.view({-1}));
  }

  std::int64_t rank;
  torch::Tensor rows;
};

/// The mean square of the output.
struct TinyWork {
  using Module = Tiny;
  static constexpr const char* kUnit = "LayerImpl";
  using Batch = torch::Tensor;

  explicit TinyWork(const Arguments& args)
      : rank(args.rank),
        rows(read_file(args.data + "/inputs.f32", torch::kFloat,
                       {kSteps, kRanks, kTinyBatch, kTinyWidth})) {}

  Batch batch(std::int64_t step) const { return rows[step % kSteps][rank].clone(); }
  template <class Model>
  torch::Tensor loss(Model& model, const Batch& batch) const {
    return model.forward(batch).square().mean();
  }

  std::int64_t rank;
  torch::Tensor rows;
};
