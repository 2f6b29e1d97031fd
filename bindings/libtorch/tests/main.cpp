// The main() of a binary of several test programs, each in a file and namespace of its own:
// `BINARY NAME [ARGUMENTS]`.
#include "harness.hpp"

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  for (const auto& [name, run] : harness::Program::all()) {
    if (name == wanted) return run(argc - 1, argv + 1);
  }
  std::fprintf(stderr, "usage: %s NAME [ARGUMENTS], with NAME one of:", argv[0]);
  for (const auto& program : harness::Program::all()) {
    std::fprintf(stderr, " %s", program.first.c_str());
  }
  std::fprintf(stderr, "\n");
  return 2;
}
