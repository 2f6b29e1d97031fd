// The little JSON the binding needs: one member of flat strings, put into and taken out of an
// object that is otherwise the user's and kept as text.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fsdp/fsdp.hpp"

namespace fsdp::detail {

using StringMembers = std::vector<std::pair<std::string, std::string>>;

/// Reads JSON text that some JSON library has written. Throws CHECKPOINT at the first thing it does
/// not understand.
class JsonText {
 public:
  explicit JsonText(const std::string& text) : text_(text) {}

  /// The text of the value of member `key` of the object, or nothing.
  std::optional<std::string> member(const std::string& key) {
    std::optional<std::string> found;
    object([&](const std::string& name) {
      const std::size_t begin = at_;
      skip_value();
      if (name == key) found = text_.substr(begin, at_ - begin);
    });
    return found;
  }

  /// All members of an object whose values are strings.
  StringMembers strings() {
    StringMembers members;
    object([&](const std::string& name) { members.emplace_back(name, string()); });
    return members;
  }

 private:
  template <class OnMember>
  void object(OnMember&& on_member) {
    at_ = 0;
    expect('{');
    if (peek() == '}') {
      expect('}');
    } else {
      do {
        const std::string name = string();
        expect(':');
        peek();
        on_member(name);
      } while (peek() == ',' && ++at_);
      expect('}');
    }
    if (peek() != '\0') fail();
  }

  /// The next character that is not white space, without taking it.
  char peek() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r')) {
      ++at_;
    }
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  void expect(char wanted) {
    if (peek() != wanted) fail();
    ++at_;
  }

  std::string string() {
    expect('"');
    std::string value;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] == '\\') ++at_;
      if (at_ < text_.size()) value += text_[at_++];
    }
    if (at_ == text_.size()) fail();
    ++at_;
    return value;
  }

  void skip_value() {
    int depth = 0;
    do {
      switch (peek()) {
        case '\0':
          fail();
        case '"':
          string();
          break;
        case '{':
        case '[':
          ++depth;
          ++at_;
          break;
        case '}':
        case ']':
          if (depth == 0) return;
          --depth;
          ++at_;
          break;
        case ',':
          if (depth == 0) return;
          ++at_;
          break;
        default:
          ++at_;
      }
    } while (depth > 0 || (peek() != ',' && peek() != '}' && peek() != '\0'));
  }

  [[noreturn]] void fail() const {
    throw Error(FSDP_ERR_CHECKPOINT,
                "the metadata is not a JSON object the binding can read (at "
                "byte " +
                    std::to_string(at_) + ")");
  }

  const std::string& text_;
  std::size_t at_ = 0;
};

inline std::string json_string(const std::string& value) {
  std::string quoted = "\"";
  for (char c : value) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

/// `object` (JSON text of an object) with a first member `key` that is an object of strings.
/// Throws INVALID_ARGUMENT when `object` is not an object or has that member already.
inline std::string with_member(const std::string& object, const std::string& key,
                               const StringMembers& members) {
  bool taken = false;
  try {
    taken = JsonText(object).member(key).has_value();
  } catch (const Error&) {
    throw Error(FSDP_ERR_INVALID_ARGUMENT, "the checkpoint's metadata is not a JSON object");
  }
  if (taken) {
    throw Error(FSDP_ERR_INVALID_ARGUMENT,
                "the checkpoint's metadata must not have a member \"" + key + "\" of its own");
  }
  std::string value = "{";
  for (const auto& [name, text] : members) {
    if (value.size() > 1) value += ",";
    value += json_string(name) + ":" + json_string(text);
  }
  const std::size_t open = object.find('{');
  const bool empty = object.find_first_not_of(" \t\r\n", open + 1) == object.rfind('}');
  return "{" + json_string(key) + ":" + value + "}" + (empty ? "" : ",") + object.substr(open + 1);
}

}  // namespace fsdp::detail
