// A user's C++ program: sums rank + 1 over the ranks.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fsdp/fsdp.hpp>

int main() {
  try {
    const auto comm = fsdp::Communicator::from_env();
    std::int32_t sum = comm.rank() + 1;
    comm.all_reduce(&sum, 1, fsdp::ReduceOp::sum);
    std::printf("world size %d, sum %d, fsdp %s\n", comm.world_size(), int(sum), fsdp_version());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
