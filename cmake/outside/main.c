/* A user's C program: sums rank + 1 over the ranks. */
#include <fsdp.h>
#include <stdio.h>
#ifdef WITH_MPI
#include <fsdp_mpi.h>
#endif

/* The launcher's ranks. */
static fsdp_status_t join(fsdp_comm_t **comm) {
#ifdef WITH_MPI
  MPI_Init(NULL, NULL);
  return fsdp_comm_init_mpi(MPI_COMM_WORLD, NULL, comm);
#else
  return fsdp_comm_init_env(comm);
#endif
}

int main(void) {
  fsdp_comm_t *comm = NULL;
  int32_t rank = 0, world_size = 0;
  int32_t sum = 0;
  int64_t shape[1] = {1};
  fsdp_tensor_t tensor = {0};
  if (join(&comm) != FSDP_OK || fsdp_comm_rank(comm, &rank) != FSDP_OK ||
      fsdp_comm_world_size(comm, &world_size) != FSDP_OK) {
    fprintf(stderr, "%s\n", fsdp_last_error_message());
    return 1;
  }
  sum = rank + 1;
  tensor.data = &sum;
  tensor.device.device_type = 1;
  tensor.ndim = 1;
  tensor.dtype.bits = 32;
  tensor.dtype.lanes = 1;
  tensor.shape = shape;
  if (fsdp_comm_all_reduce(comm, &tensor, FSDP_REDUCE_SUM) != FSDP_OK) {
    fprintf(stderr, "%s\n", fsdp_last_error_message());
    return 1;
  }
  printf("world size %d, sum %d, fsdp %s\n", (int)world_size, (int)sum, fsdp_version());
  fsdp_comm_destroy(comm);
#ifdef WITH_MPI
  MPI_Finalize();
#endif
  return 0;
}
