// The communicators of feature_torch_mpi.cpp: MPI's, and shared memory's between the same ranks.
// This file alone knows MPI, so that the rest is compiled once for all implementations of it.
// Argument: a folder.
#include <chrono>
#include <cstdio>
#include <exception>
#include <fsdp/mpi.hpp>
#include <string>

void run(const fsdp::Communicator& mpi, const fsdp::Communicator& shm, const std::string& folder);

int main(int argc, char** argv) {
  int level = 0, status = 1;
  if (argc != 2 || MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level) != MPI_SUCCESS)
    return 2;
  try {
    const auto mpi = fsdp::mpi_communicator(MPI_COMM_WORLD, std::chrono::seconds(60));
    run(mpi, fsdp::Communicator::from_env(), argv[1]);
    status = 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  if (status != 0) MPI_Abort(MPI_COMM_WORLD, status);
  MPI_Finalize();
  return status;
}
