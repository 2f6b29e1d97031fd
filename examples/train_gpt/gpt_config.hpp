// What the model is made from; needs no LibTorch, whose headers take long to compile.
#pragma once

#include <cstdint>

/// The vocabulary is the 256 byte values.
inline constexpr std::int64_t kVocabulary = 256;

/// What determines the model's parameters and their shapes.
struct GptConfig {
  std::int64_t d_model = 256;
  std::int64_t layers = 4;
  std::int64_t heads = 4;
  std::int64_t seq = 128;  ///< longest sequence, in tokens
  bool tie_head = false;   ///< the head uses the token embedding's weight
};
