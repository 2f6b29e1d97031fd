// Decides what to do with an earlier run's files, and reads and writes a checkpoint's metadata.
#include "run_folder.hpp"

#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "metrics.hpp"

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

json model_json(const GptConfig& m) {
  return {{"d_model", m.d_model},
          {"layers", m.layers},
          {"heads", m.heads},
          {"seq", m.seq},
          {"tie_head", m.tie_head}};
}

json training_json(const Options& o, const std::string& text_sha1) {
  return {{"text_sha1", text_sha1},
          {"val_fraction", o.val_fraction},
          {"global_batch", o.global_batch},
          {"seed", o.seed},
          {"steps", o.steps},
          {"lr", o.lr},
          {"min_lr", o.min_lr},
          {"warmup", o.warmup},
          {"weight_decay", o.weight_decay},
          {"betas", {o.betas.first, o.betas.second}},
          {"optimizer", o.optimizer},
          {"eps", o.eps},
          {"clip", o.clip}};
}

/// The entries of `now` that `then` has otherwise, as "name 1 (here 2)".
std::vector<std::string> differences(const json& then, const json& now) {
  std::vector<std::string> result;
  for (const auto& [name, value] : now.items()) {
    const json before = then.value(name, json());
    if (before != value)
      result.push_back(name + " " + before.dump() + " (here " + value.dump() + ")");
  }
  return result;
}

/// The complete checkpoints below `folder` by their step; what is being written has another name.
std::map<std::int64_t, fs::path> checkpoints_in(const fs::path& folder) {
  std::map<std::int64_t, fs::path> found;
  if (!fs::is_directory(folder)) return found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const std::string digits = name.starts_with("step-") ? name.substr(5) : "";
    const bool number = !digits.empty() && digits.size() < 18 &&
                        digits.find_first_not_of("0123456789") == std::string::npos;
    if (number && entry.is_directory()) found[std::stoll(digits)] = entry.path();
  }
  return found;
}

}  // namespace

RunFolder::RunFolder(const Options& options, std::string text_sha1, const MetadataOf& metadata_of,
                     std::vector<std::string>& notes)
    : options_(options), text_sha1_(std::move(text_sha1)), out_(options.out) {
  if (fs::exists(out_) && !fs::is_directory(out_)) {
    throw UsageError("--out: '" + options.out + "' is not a folder");
  }
  const auto checkpoints = checkpoints_in(out_ / "checkpoints");
  if (!options.resume) {
    if ((fs::exists(metrics_file()) || !checkpoints.empty()) && !options.overwrite) {
      throw UsageError("--out: '" + options.out +
                       "' holds an earlier run; --resume goes on with it, --overwrite removes it");
    }
    return;
  }

  resume_from_ = options.resume_from;
  if (resume_from_.empty()) {
    if (checkpoints.empty())
      throw UsageError("--resume: no checkpoint in '" + (out_ / "checkpoints").string() + "'");
    resume_from_ = checkpoints.rbegin()->second.string();
  } else if (!fs::is_directory(resume_from_)) {
    throw UsageError("--resume: no checkpoint '" + resume_from_ + "'");
  }

  json saved;
  try {
    saved = json::parse(metadata_of(resume_from_));
    progress_ = {saved.at("step").get<std::int64_t>(), saved.at("first_loss").get<double>()};
    saved.at("model");
  } catch (const json::exception& error) {
    throw UsageError("--resume: '" + resume_from_ +
                     "' is no checkpoint of this trainer: " + error.what());
  }
  const auto other_model = differences(saved["model"], model_json(options.model));
  if (!other_model.empty()) {
    std::string list;
    for (const auto& difference : other_model) list += (list.empty() ? "" : ", ") + difference;
    throw UsageError("--resume: '" + resume_from_ + "' is of another model: " + list);
  }
  notes = differences(saved.value("training", json::object()), training_json(options, text_sha1_));
  if (progress_.step >= options.steps) {
    throw UsageError("--resume: '" + resume_from_ + "' has done " + std::to_string(progress_.step) +
                     " steps already; --steps " + std::to_string(options.steps) +
                     " leaves nothing to do");
  }
  if (!checkpoints.empty() && checkpoints.rbegin()->first > progress_.step && !options.overwrite) {
    throw UsageError("--resume: '" + options.out + "' holds checkpoints of later steps, up to '" +
                     checkpoints.rbegin()->second.string() +
                     "'; --overwrite removes those, or choose another --out");
  }
}

void RunFolder::prepare() const {
  fs::create_directories(out_ / "checkpoints");
  if (options_.overwrite) {
    for (const auto& [step, path] : checkpoints_in(out_ / "checkpoints")) {
      if (!options_.resume || step > progress_.step) fs::remove_all(path);
    }
  }
  for (const auto& file : {picture_file(), sample_file()}) fs::remove(file);
  truncate_metrics(metrics_file(), progress_.step);
}

std::string RunFolder::checkpoint(std::int64_t step) const {
  char name[32];
  std::snprintf(name, sizeof name, "step-%06lld", static_cast<long long>(step));
  return (out_ / "checkpoints" / name).string();
}

std::string RunFolder::metadata(const Progress& progress) const {
  return json{{"step", progress.step},
              {"first_loss", progress.first_loss},
              {"model", model_json(options_.model)},
              {"training", training_json(options_, text_sha1_)}}
      .dump();
}
