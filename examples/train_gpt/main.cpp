// The trainer: reads the options, builds text, model and optimizer, and runs the training loop.
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <limits>
#include <optional>
#include <thread>

#include "gpt.hpp"
#include "memory.hpp"
#include "metrics.hpp"
#include "mpi.hpp"
#include "optimizer.hpp"
#include "options.hpp"
#include "parallel.hpp"
#include "plot.hpp"
#include "progress.hpp"
#include "ranks.hpp"
#include "run_folder.hpp"
#include "sample.hpp"
#include "text.hpp"

namespace {

torch::Tensor loss_of(TrainedModel& model, const Batch& batch) {
  const auto logits = model.forward(batch.tokens);
  return torch::nn::functional::cross_entropy(logits.reshape({-1, kVocabulary}),
                                              batch.targets.reshape(-1).to(logits.device()));
}

/// The loss over the held-out batches. Collective.
double validate(TrainedModel& model, const Text& text, const Options& o, Ranks& ranks) {
  torch::NoGradGuard no_grad;
  double sum = 0.0;
  for (std::int64_t i = 0; i < o.val_batches; ++i) {
    sum +=
        loss_of(model, text.held_out(i, o.val_batches, o.batch, ranks.rank(), ranks.world_size()))
            .item<double>();
  }
  return ranks.sum({sum})[0] / static_cast<double>(o.val_batches * ranks.world_size());
}

/// One optimizer step over the global batch; fills all of the metrics but val_loss. Collective.
StepMetrics train_step(TrainedModel& model, TrainOptimizer& optimizer, const Text& text,
                       const Options& o, Ranks& ranks, std::int64_t step) {
  const auto start = std::chrono::steady_clock::now();
  StepMetrics m;
  m.step = step;
  m.lr = learning_rate(o, step);
  set_learning_rate(optimizer, m.lr);

  model.zero_grad();
  const Batch batch = text.training(o.seed, step, o.batch, ranks.rank());
  const std::int64_t part = o.batch / o.micro_batches;
  double loss = 0.0;
  for (std::int64_t i = 0; i < o.micro_batches; ++i) {
    model.set_more_to_come(i + 1 < o.micro_batches);
    const auto mean = loss_of(model, {batch.tokens.narrow(0, i * part, part),
                                      batch.targets.narrow(0, i * part, part)}) /
                      static_cast<double>(o.micro_batches);
    mean.backward();
    loss += mean.item<double>();
  }
  m.grad_norm = model.clip_gradients(o.clip > 0 ? o.clip : std::numeric_limits<double>::infinity());
  step_with(optimizer);

  m.loss = ranks.sum({loss})[0] / ranks.world_size();
  m.step_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  m.tokens_per_s = static_cast<double>(o.global_batch * o.model.seq) / m.step_s;
  m.rank_state_bytes = rank_state_bytes(model, optimizer);
  if (!std::isfinite(m.loss) || !std::isfinite(m.grad_norm)) {
    throw std::runtime_error("step " + std::to_string(step) + ": the loss is " +
                             std::to_string(m.loss) + " and the gradient norm " +
                             std::to_string(m.grad_norm) + "; a smaller --lr may help");
  }
  return m;
}

/// Follows the highest memory use of all ranks together. Reading it takes milliseconds, so most
/// steps do not.
class PeakMemory {
 public:
  /// Collective: all ranks call it with the same `step` and `first`.
  std::uint64_t after(std::int64_t step, std::int64_t first, Ranks& ranks) {
    if (step < first + 3 || step % 10 == 0) {
      peak_ = std::max(peak_, static_cast<std::uint64_t>(
                                  ranks.sum({static_cast<double>(proportional_set_size())})[0]));
    }
    return peak_;
  }

 private:
  std::uint64_t peak_ = 0;
};

/// Trains from `progress` to the last step and returns the last loss. Collective.
double train(TrainedModel& model, TrainOptimizer& optimizer, const Text& text,
             const Options& o, Ranks& ranks, const RunFolder& run, Progress progress) {
  std::optional<MetricsWriter> metrics;
  if (ranks.first()) metrics.emplace(run.metrics_file());
  ProgressBar bar(progress.step, o.steps, ranks.first() && !o.quiet);
  PeakMemory memory;
  const std::int64_t first = progress.step + 1;
  double last_loss = 0.0;
  for (std::int64_t step = first; step <= o.steps; ++step) {
    StepMetrics m = train_step(model, optimizer, text, o, ranks, step);
    m.host_peak_bytes = memory.after(step, first, ranks);
    if (o.val_every > 0 && (step % o.val_every == 0 || step == o.steps)) {
      m.val_loss = validate(model, text, o, ranks);
    }
    if (step == 1) progress.first_loss = m.loss;
    progress.step = step;
    last_loss = m.loss;
    if (metrics) metrics->write(m);
    bar.update(m);
    if (step == o.steps || (o.save_every > 0 && step % o.save_every == 0)) {
      model.save(run.checkpoint(step), optimizer, run.metadata(progress));
    }
  }
  model.finish_saving();
  bar.finish();
  if (ranks.first()) {
    std::printf("trained to step %lld: loss %.4f, first %.4f (%.2f of it)\n",
                static_cast<long long>(o.steps), last_loss, progress.first_loss,
                last_loss / progress.first_loss);
  }
  return last_loss;
}

/// The whole program on this rank. Collective.
void run(Options o, Ranks& ranks) {
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  at::set_num_threads(o.threads > 0 ? o.threads : std::max(1, cores / ranks.world_size()));
  fit_batch(o, ranks.world_size());
  const Text text(o.text, o.val_fraction, o.model.seq, o.val_every > 0);
  std::vector<std::string> notes;
  const RunFolder folder(
      o, text.digest(),
      [&](const std::string& checkpoint) { return checkpoint_metadata(checkpoint, o.no_shard); },
      notes);

  torch::manual_seed(o.seed);
  Gpt gpt(o.model);
  const Shapes shapes = shapes_of(*gpt);
  const auto model = make_model(gpt, ranks, o);
  auto optimizer = model->make_optimizer(shapes, o);
  if (!folder.resume_from().empty()) {
    model->load(folder.resume_from(), optimizer);
    configure(optimizer, o);
  }
  ranks.barrier();
  if (ranks.first()) folder.prepare();
  ranks.barrier();

  if (ranks.first() && !o.quiet) {
    std::cout << memory_report(*model, shapes, ranks.world_size()) << "text                  "
              << text.training_bytes() << " bytes to train on, " << text.held_out_bytes()
              << " held out\n"
              << "global batch          " << o.global_batch << " x " << o.model.seq << " tokens, "
              << o.batch << " sequences a rank\n";
    if (o.resume)
      std::cout << "going on after step   " << folder.progress().step << " of "
                << folder.resume_from() << "\n";
    for (const auto& note : notes) std::cout << "the checkpoint had    " << note << "\n";
    std::cout << std::flush;
  }
  train(*model, optimizer, text, o, ranks, folder, folder.progress());

  if (o.sample_tokens > 0) {
    const std::string generated = sample(*model, o);
    if (ranks.first()) {
      std::ofstream(folder.sample_file(), std::ios::binary) << generated << "\n";
      std::cout << "sample:\n" << printable(generated) << "\n";
    }
  }
  ranks.barrier();  // what follows concerns only this rank's files
  if (ranks.first()) {
    if (o.picture) plot_loss(folder.metrics_file(), folder.picture_file());
    std::cout << (o.picture ? "metrics, picture" : "metrics") << ", sample and checkpoints are in "
              << o.out << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::optional<Ranks> ranks;
  std::string problem;
  try {
    Options options = parse_options(argc, argv);
    ranks.emplace(options);
    run(std::move(options), *ranks);
    ranks.reset();
    return finish_mpi(0);
  } catch (const c10::Error& error) {
    problem = error.what_without_backtrace();
  } catch (const std::exception& error) {
    problem = error.what();
  }
  const std::string rank = ranks ? " rank " + std::to_string(ranks->rank()) + ":" : "";
  std::cerr << "train_gpt: error:" << rank << " " << problem << std::endl;
  if (ranks) ranks->abort(problem);
  return finish_mpi(1);
}
