// --comm mpi: the ranks that mpirun started, on MPI's collectives. mpi.cpp alone knows MPI.
#pragma once

#include <fsdp/communicator.hpp>

/// Whether this program was built with MPI.
bool has_mpi();

/// The ranks of MPI_COMM_WORLD; initializes MPI. Collective; throws fsdp::Error, and
/// std::runtime_error where MPI cannot be initialized or this program was built without it.
fsdp::Communicator mpi_world();

/// Ends MPI where it was used, after its communicator has gone: with the whole job, if this rank
/// has failed (`status` is not 0). Returns `status`.
int finish_mpi(int status);
