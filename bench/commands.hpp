// What a rank in C++ is told, and how it answers: the protocol of harness/ranks.py, line by line.
#pragma once

#include <cstdint>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

/// `[a,b,...]` with enough digits for a float or a time.
inline std::string json_list(const std::vector<double>& values) {
  std::ostringstream out;
  out.precision(9);
  for (std::size_t i = 0; i < values.size(); ++i) out << (i == 0 ? "[" : ",") << values[i];
  out << (values.empty() ? "[]" : "]");
  return out.str();
}

inline void say(const std::string& line) { std::cout << line << std::endl; }

/// Says that it is ready, then runs `steps` for "steps N", and of `others` what a line names, until
/// "quit" or the end of the input. Throws for any other line.
inline void serve_commands(const std::function<void(std::int64_t)>& steps,
                           const std::map<std::string, std::function<void()>>& others) {
  say("{\"ready\": true}");
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    const auto other = others.find(command);
    if (command == "steps") {
      std::int64_t count = 0;
      if (!(words >> count) || count < 0) throw std::runtime_error("steps: a number is expected");
      steps(count);
    } else if (command == "quit") {
      return;
    } else if (other != others.end()) {
      other->second();
    } else {
      throw std::runtime_error("unknown command '" + line + "'");
    }
  }
}
