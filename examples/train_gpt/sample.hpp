// Generates text with the model being trained.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "options.hpp"
#include "parallel.hpp"

/// The prompt and `sample_tokens` bytes after it, each drawn from the model's distribution at
/// `temperature`. The draws depend on the seed only. Collective: every rank runs each forward.
inline std::string sample(TrainedModel& model, const Options& o) {
  torch::NoGradGuard no_grad;
  auto generator = at::detail::createCPUGenerator(o.seed);
  std::string text = o.prompt;
  for (std::int64_t i = 0; i < o.sample_tokens; ++i) {
    const auto context =
        std::min<std::int64_t>(static_cast<std::int64_t>(text.size()), o.model.seq);
    const auto tokens = torch::empty({1, context}, torch::kLong);
    for (std::int64_t j = 0; j < context; ++j) {
      tokens.data_ptr<std::int64_t>()[j] =
          static_cast<unsigned char>(text[text.size() - static_cast<std::size_t>(context - j)]);
    }
    const auto logits = model.forward(tokens)[0][context - 1].cpu();
    const auto next = at::multinomial(at::softmax(logits / o.temperature, -1), 1, false, generator);
    text.push_back(static_cast<char>(next.item<std::int64_t>()));
  }
  return text;
}

/// `text` without the control characters that could confuse a terminal.
inline std::string printable(std::string text) {
  std::replace_if(
      text.begin(), text.end(),
      [](unsigned char c) { return (c < 0x20 && c != '\n' && c != '\t') || c == 0x7f; }, '?');
  return text;
}
