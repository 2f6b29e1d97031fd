/* fsdp_mpi.h: an fsdp communicator on the caller's MPI. C11 and C++; compiled with the caller's own
 * MPI, whichever it is, since implementations are not binary compatible: add fsdp_mpi.c to the
 * program, or link CMake's fsdp::mpi (find_package(fsdp COMPONENTS mpi)).
 *
 * What it needs: MPI 3.1, MPI_Init or MPI_Init_thread before, MPI_Finalize after the communicator
 * and the engines on it are destroyed. It makes communicators of its own; the caller's messages are
 * not touched.
 *
 * Threads: below MPI_THREAD_SERIALIZED only the thread that initialized MPI may use the
 * communicator; other threads get an error. From there on calls are made one at a time; with
 * MPI_THREAD_SERIALIZED the caller's own MPI calls in other threads must not be made meanwhile.
 * Saves in the background therefore need MPI_THREAD_MULTIPLE where the caller, too, uses MPI.
 *
 * Sums: float32 and float64 in the order that MPI chooses: the same bits as on shm with two
 * ranks, else equal up to rounding. float16 and bfloat16: each combination of two is computed in
 * float32 and rounded to 16 bits (nearest, ties to even), so a sum of W ranks is rounded up to W
 * - 1 times. Small all-reduces (64 KiB) are in rank order.
 *
 * Sizes: all-gathers of any; sums of at most 2^31 - 1 elements over all ranks, else
 * FSDP_ERR_CALLBACK.
 *
 * Errors: MPI's own are returned (FSDP_ERR_CALLBACK, with MPI's text), not fatal. A rank that MPI
 * itself sees die ends the job, as MPI does.
 */
#ifndef FSDP_MPI_H
#define FSDP_MPI_H

/* MPI's own C++ interface, long gone from the standard, would have to be linked. */
#ifndef OMPI_SKIP_MPICXX
#define OMPI_SKIP_MPICXX 1
#endif
#ifndef MPICH_SKIP_MPICXX
#define MPICH_SKIP_MPICXX 1
#endif

#include <fsdp.h>
#include <mpi.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Initialize with FSDP_MPI_CONFIG_INIT, then set what differs. */
typedef struct fsdp_mpi_config_t {
  /* sizeof(fsdp_mpi_config_t). */
  size_t struct_size;
  /* As of fsdp_host_comm_config_t. */
  int64_t timeout_ms;
  /* Milliseconds that the other ranks have to come to fsdp_comm_init_mpi; 0: 120,000. */
  int64_t rendezvous_timeout_ms;
  /* Not 0: a communicator that fails ends the whole job by MPI_Abort, with its error on stderr. */
  int32_t abort_job;
} fsdp_mpi_config_t;

#define FSDP_MPI_CONFIG_INIT {sizeof(fsdp_mpi_config_t), 0, 0, 0}

/* Makes a communicator of the ranks of `comm`, in their order. Collective over `comm`, which stays
 * the caller's. `config`: the same on all ranks; NULL: defaults. *out is owned by the caller:
 * fsdp_comm_destroy. Errors: FSDP_ERR_CALLBACK says what MPI said, that MPI is not initialized, or
 * that a rank did not come; else as of fsdp_comm_init_host. */
fsdp_status_t fsdp_comm_init_mpi(MPI_Comm comm, const fsdp_mpi_config_t *config, fsdp_comm_t **out);

#ifdef __cplusplus
}
#endif

#endif
