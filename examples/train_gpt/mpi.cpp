// See mpi.hpp.
#include "mpi.hpp"

#include <stdexcept>

#ifdef TRAIN_GPT_WITH_MPI

#include <fsdp/mpi.hpp>

bool has_mpi() { return true; }

fsdp::Communicator mpi_world() {
  int level = MPI_THREAD_SINGLE;
  // Checkpoints are saved in the background: another thread.
  if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level) != MPI_SUCCESS)
    throw std::runtime_error("MPI cannot be initialized");
  return fsdp::mpi_communicator(MPI_COMM_WORLD);
}

int finish_mpi(int status) {
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (initialized && status != 0) MPI_Abort(MPI_COMM_WORLD, status);
  if (initialized) MPI_Finalize();
  return status;
}

#else

bool has_mpi() { return false; }

fsdp::Communicator mpi_world() {
  throw std::runtime_error("--comm mpi: this train_gpt was built without MPI");
}

int finish_mpi(int status) { return status; }

#endif
