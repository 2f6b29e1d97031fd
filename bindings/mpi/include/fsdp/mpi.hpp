// fsdp::mpi_communicator: a communicator on the caller's MPI. See fsdp_mpi.h for what it needs;
// link fsdp::mpi.
#pragma once

#include <fsdp_mpi.h>

#include <chrono>
#include <fsdp/communicator.hpp>

namespace fsdp {

/// A communicator of the ranks of `comm`. Collective over it; throws fsdp::Error.
inline Communicator mpi_communicator(
    MPI_Comm comm, std::chrono::milliseconds timeout = std::chrono::milliseconds(0),
    bool abort_job = false) {
  fsdp_mpi_config_t config = FSDP_MPI_CONFIG_INIT;
  config.timeout_ms = timeout.count();
  config.abort_job = abort_job;
  fsdp_comm_t* out = nullptr;
  check(fsdp_comm_init_mpi(comm, &config, &out));
  return Communicator::adopt(out);
}

}  // namespace fsdp
