// Reads the command line into Options.
#include "options.hpp"

#include <CLI/CLI.hpp>

#include <cmath>
#include <cstdlib>
#include <iostream>

#include "mpi.hpp"

namespace {

void require(bool good, const std::string& message) {
  if (!good) throw UsageError(message);
}

void check(const Options& o) {
  require(o.model.d_model % o.model.heads == 0, "--heads " + std::to_string(o.model.heads) +
                                                    " does not divide --d-model " +
                                                    std::to_string(o.model.d_model));
  for (const auto& [name, value] :
       {std::pair("--lr", o.lr), std::pair("--min-lr", o.min_lr),
        std::pair("--weight-decay", o.weight_decay),
        std::pair("--betas", o.betas.first + o.betas.second), std::pair("--eps", o.eps),
        std::pair("--clip", o.clip), std::pair("--val-fraction", o.val_fraction),
        std::pair("--temperature", o.temperature)}) {
    require(std::isfinite(value), std::string(name) + " is not a finite number");
  }
  require(o.min_lr <= o.lr, "--min-lr is larger than --lr");
  require(o.warmup < o.steps, "--warmup " + std::to_string(o.warmup) +
                                  " leaves nothing of --steps " + std::to_string(o.steps));
  require(o.betas.first < 1 && o.betas.second < 1, "--betas must be below 1");
  require(o.sample_tokens == 0 || !o.prompt.empty(), "--prompt must hold at least one byte");
  require(!o.out.empty(), "--out is empty");
  require(o.optimizer != "fused" || !o.no_shard,
          "--optimizer fused is for shards: not with --no-shard");
  require(o.precision == "float32" || !o.no_shard,
          "--precision bfloat16 is for shards: not with --no-shard");
  require(!o.cpu_offload || !o.no_shard, "--cpu-offload is for shards: not with --no-shard");
  require(o.comm == "env" || !o.no_shard, "--comm mpi is for shards: not with --no-shard");
  require(o.comm == "env" || has_mpi(), "--comm mpi: this train_gpt was built without MPI");
  require(o.strategy == "full-shard" || !o.no_shard,
          "--strategy is for shards: not with --no-shard");
}

}  // namespace

Options parse_options(int argc, char** argv) {
  Options o;
  CLI::App app(
      "Trains a GPT on the bytes of text files, sharded over the ranks that a launcher started.\n"
      "One rank: train_gpt --text FILE. Four: fsdp run -n 4 train_gpt --text FILE.",
      "train_gpt");
  // An option given twice has its last value, so that scripts can be overridden by appending.
  app.option_defaults()->always_capture_default()->multi_option_policy(
      CLI::MultiOptionPolicy::TakeLast);
  const auto positive = CLI::Range(std::int64_t{1}, std::int64_t{1} << 40);
  const auto not_negative = CLI::Range(std::int64_t{0}, std::int64_t{1} << 40);
  const auto any_size = CLI::Range(0.0, 1e300);

  app.add_option("--d-model", o.model.d_model, "width of the model")
      ->check(positive)
      ->group("Model");
  app.add_option("--layers", o.model.layers, "transformer blocks")->check(positive)->group("Model");
  app.add_option("--heads", o.model.heads, "attention heads; divides --d-model")
      ->check(positive)
      ->group("Model");
  app.add_option("--seq", o.model.seq, "tokens per sequence")->check(positive)->group("Model");
  app.add_flag("--tie-head", o.model.tie_head, "the output head is the token embedding")
      ->group("Model");

  app.add_option("--text", o.text, "text files, read as bytes")
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->required()
      ->group("Data");
  app.add_option("--val-fraction", o.val_fraction, "end of each file that is held out")
      ->check(CLI::Range(0.0, 0.9))
      ->group("Data");
  app.add_option("--val-every", o.val_every, "steps between validations; 0: none")
      ->check(not_negative)
      ->group("Data");
  app.add_option("--val-batches", o.val_batches, "global batches per validation")
      ->check(positive)
      ->group("Data");

  auto* batch = app.add_option("--batch", o.batch, "sequences per rank and step")
                    ->check(positive)
                    ->group("Training");
  app.add_option("--global-batch", o.global_batch,
                 "sequences per step of all ranks together, instead of --batch")
      ->check(positive)
      ->excludes(batch)
      ->always_capture_default(false)
      ->group("Training");
  app.add_option("--micro-batches", o.micro_batches,
                 "backwards per step, each over so much less; their gradients are reduced together")
      ->check(positive)
      ->group("Training");
  app.add_option("--strategy", o.strategy, "how parameters are sharded over the ranks")
      ->check(CLI::IsMember(
          {"full-shard", "shard-grad-op", "no-shard", "hybrid-shard", "hybrid-shard-grad-op"}))
      ->group("Training");
  app.add_option("--shard-size", o.shard_size, "ranks of a shard group, for hybrid strategies")
      ->check(not_negative)
      ->group("Training");
  app.add_option("--steps", o.steps, "optimizer steps in all, those before --resume included")
      ->check(positive)
      ->group("Training");
  app.add_option("--lr", o.lr, "highest learning rate")->check(any_size)->group("Training");
  app.add_option("--min-lr", o.min_lr, "learning rate at the end of the cosine decay")
      ->check(any_size)
      ->group("Training");
  app.add_option("--warmup", o.warmup, "steps of linear warm-up")
      ->check(not_negative)
      ->group("Training");
  app.add_option("--weight-decay", o.weight_decay,
                 "of matrices; none for biases, LayerNorms, embeddings")
      ->check(any_size)
      ->group("Training");
  app.add_option("--optimizer", o.optimizer,
                 "whose AdamW: LibTorch's on the shards, or the engine's own")
      ->check(CLI::IsMember({"torch", "fused"}))
      ->group("Training");
  app.add_option("--precision,--dtype", o.precision,
                 "what the sharded model computes in; shards and optimizer state are float32")
      ->check(CLI::IsMember({"float32", "bfloat16", "fp32", "bf16"}))
      ->group("Training");
  app.add_flag("--cpu-offload", o.cpu_offload,
               "shards, their gradients and optimizer state are in host memory")
      ->group("Training");
  app.add_option("--betas", o.betas, "AdamW's two averaging factors")
      ->check(CLI::Range(0.0, 1.0))
      ->group("Training");
  app.add_option("--eps", o.eps, "AdamW's epsilon")->check(any_size)->group("Training");
  app.add_option("--clip,--clip-norm", o.clip, "highest global gradient norm; 0: no clipping")
      ->check(any_size)
      ->group("Training");
  app.add_option("--seed", o.seed, "of the initial model, the batches and the sample")
      ->group("Training");

  app.add_option("--out", o.out, "folder for metrics, picture, sample and checkpoints")
      ->group("Output");
  app.add_flag("--picture,!--no-picture", o.picture, "draw the loss curve at the end (default)")
      ->group("Output");
  app.add_option("--save-every", o.save_every, "steps between checkpoints; 0: only at the end")
      ->check(not_negative)
      ->group("Output");
  auto* resume = app.add_option("--resume", o.resume_from,
                                "go on from this checkpoint; alone or 'latest': the last in --out")
                     ->expected(0, 1)
                     ->always_capture_default(false)
                     ->group("Output");
  app.add_flag("--overwrite", o.overwrite, "remove what an earlier run left in --out")
      ->group("Output");
  app.add_option("--prompt", o.prompt, "start of the sample")->group("Output");
  app.add_option("--sample-tokens", o.sample_tokens, "bytes to generate at the end")
      ->check(not_negative)
      ->group("Output");
  app.add_option("--temperature", o.temperature, "of the sample")
      ->check(CLI::Range(0.01, 100.0))
      ->group("Output");
  app.add_flag("--quiet", o.quiet, "print only warnings, errors and the last lines")
      ->group("Output");

  app.add_option("--comm", o.comm,
                 "what connects the ranks: shared memory (env: as the launcher says), or mpi")
      ->check(CLI::IsMember({"env", "mpi"}))
      ->group("Process");
  app.add_option("--device", o.device,
                 "where the model computes: cpu, cuda (each rank on the GPU of its number on the "
                 "host) or cuda:N")
      ->check(CLI::Validator(
          [](const std::string& device) {
            const bool cuda = device.starts_with("cuda:") && device.size() <= 8 &&
                              device.find_first_not_of("0123456789", 5) == std::string::npos &&
                              device.size() > 5;
            return device == "cpu" || device == "cuda" || cuda
                       ? std::string()
                       : "'" + device + "' is no device: cpu, cuda or cuda:N is expected";
          },
          "cpu|cuda|cuda:N"))
      ->group("Process");
  app.add_flag("--no-shard", o.no_shard, "train unsharded on one rank, for comparison")
      ->group("Process");
  app.add_option("--threads", o.threads,
                 "compute threads per rank; 0: the machine's cores over the ranks")
      ->check(CLI::Range(0, 1024))
      ->group("Process");

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& request) {  // --help
    std::exit(app.exit(request));
  } catch (const CLI::ParseError& error) {
    throw UsageError(std::string(error.what()) + " (--help lists the options)");
  }
  o.resume = resume->count() > 0;
  if (o.resume_from == "latest" || o.resume_from == "true") o.resume_from.clear();
  if (o.precision == "bf16") o.precision = "bfloat16";
  if (o.precision == "fp32") o.precision = "float32";
  check(o);
  return o;
}

void fit_batch(Options& o, int world_size) {
  if (o.global_batch == 0) {
    o.global_batch = o.batch * world_size;
  } else if (o.global_batch % world_size != 0) {
    throw UsageError("--global-batch " + std::to_string(o.global_batch) +
                     " is not divisible by the world size " + std::to_string(world_size));
  }
  o.batch = o.global_batch / world_size;
  if (o.batch % o.micro_batches != 0) {
    throw UsageError("--micro-batches " + std::to_string(o.micro_batches) +
                     " does not divide the " + std::to_string(o.batch) + " sequences of a rank");
  }
}
