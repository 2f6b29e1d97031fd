// The training data: bytes of text files, split into a training and a held-out part, and batches of
// both.
#pragma once

#include <torch/torch.h>

#include <c10/util/hash.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "options.hpp"

/// Sequences and what should follow each of their tokens: both int64 [rows, seq].
struct Batch {
  torch::Tensor tokens, targets;
};

/// The bytes of some files. A batch is a pure function of (seed, step): which ranks share it
/// changes nothing.
class Text {
 public:
  /// Reads every file whole; the last `val_fraction` of each is held out. Throws UsageError naming
  /// the file that is missing, unreadable or empty, or when a part is too short for one sequence.
  Text(const std::vector<std::string>& files, double val_fraction, std::int64_t seq,
       bool needs_held_out)
      : seq_(seq) {
    for (const auto& file : files) {
      const std::string bytes = read(file);
      const auto cut =
          static_cast<std::size_t>(static_cast<double>(bytes.size()) * (1.0 - val_fraction));
      train_.append(bytes, 0, cut);
      held_out_.append(bytes, cut, std::string::npos);
    }
    digest_ = c10::sha1(train_ + held_out_).str();
    require_length(train_, "for training");
    if (needs_held_out) require_length(held_out_, "held out for validation (--val-fraction)");
  }

  /// This rank's rows of the global batch of `step`: rank r takes rows [r * rows, (r + 1) * rows).
  Batch training(std::uint64_t seed, std::int64_t step, std::int64_t rows, int rank) const {
    const std::uint64_t starts = train_.size() - static_cast<std::size_t>(seq_);
    return batch(train_, rows, [&](std::int64_t row) {
      const auto global_row = static_cast<std::uint64_t>(rank * rows + row);
      return mix(mix(mix(seed) + static_cast<std::uint64_t>(step)) + global_row) % starts;
    });
  }

  /// This rank's rows of the `index`th of `count` held-out global batches, spread evenly and the
  /// same every time.
  Batch held_out(std::int64_t index, std::int64_t count, std::int64_t rows, int rank,
                 int world_size) const {
    const std::uint64_t starts = held_out_.size() - static_cast<std::size_t>(seq_);
    return batch(held_out_, rows, [&](std::int64_t row) {
      const auto global_row = static_cast<std::uint64_t>((index * world_size + rank) * rows + row);
      return global_row * starts / static_cast<std::uint64_t>(count * world_size * rows);
    });
  }

  std::size_t training_bytes() const { return train_.size(); }
  std::size_t held_out_bytes() const { return held_out_.size(); }
  /// SHA-1 of both parts, to recognize the text on resume.
  const std::string& digest() const { return digest_; }

 private:
  static std::string read(const std::string& file) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) throw UsageError("--text: cannot open '" + file + "'");
    if (std::filesystem::is_directory(file)) throw UsageError("--text: '" + file + "' is a folder");
    std::string bytes;
    try {
      bytes.assign(std::istreambuf_iterator<char>(stream), {});
    } catch (const std::ios_base::failure& error) {
      throw UsageError("--text: cannot read '" + file + "': " + error.what());
    }
    if (bytes.empty()) throw UsageError("--text: '" + file + "' is empty");
    return bytes;
  }

  void require_length(const std::string& part, const std::string& use) const {
    if (part.size() > static_cast<std::size_t>(seq_)) return;
    throw UsageError("--text: too short: " + std::to_string(part.size()) + " bytes " + use +
                     ", and a sequence takes " + std::to_string(seq_ + 1) + " (--seq " +
                     std::to_string(seq_) + " and the byte after it)");
  }

  template <class StartOfRow>
  Batch batch(const std::string& part, std::int64_t rows, StartOfRow start_of_row) const {
    Batch result{torch::empty({rows, seq_}, torch::kLong),
                 torch::empty({rows, seq_}, torch::kLong)};
    auto* tokens = result.tokens.data_ptr<std::int64_t>();
    auto* targets = result.targets.data_ptr<std::int64_t>();
    for (std::int64_t row = 0; row < rows; ++row) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(part.data()) + start_of_row(row);
      for (std::int64_t i = 0; i < seq_; ++i) {
        *tokens++ = bytes[i];
        *targets++ = bytes[i + 1];
      }
    }
    return result;
  }

  // SplitMix64's output function: neighbouring inputs give unrelated outputs.
  static std::uint64_t mix(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

  std::int64_t seq_;
  std::string train_, held_out_, digest_;
};
