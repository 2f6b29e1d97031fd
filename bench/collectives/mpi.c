/* Open MPI's collectives, run under mpirun: MPI_Allgather and MPI_Reduce_scatter_block. MPI has no 16-bit floats: they are
 * gathered as 16-bit integers, and summed by an operation of ours that widens them, as a user would have to. */
#define _POSIX_C_SOURCE 200809L
#include <mpi.h>

#include "rows.h"

static float widened(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

/* To nearest even; the sums here are finite. */
static uint16_t narrowed(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void add_bf16(void *in, void *inout, int *count, MPI_Datatype *type) {
  const uint16_t *a = (const uint16_t *)in;
  uint16_t *b = (uint16_t *)inout;
  (void)type;
  for (int i = 0; i < *count; i++) b[i] = narrowed(widened(a[i]) + widened(b[i]));
}

int main(int argc, char **argv) {
  static double mine[MOST_TIMES + WARM_UP], slowest[MOST_TIMES + WARM_UP];
  int rank = 0, world = 0;
  MPI_Op add = MPI_OP_NULL;
  MPI_Init(&argc, &argv);
  const int large = large_repetitions(argc, argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &world);
  MPI_Op_create(add_bf16, 1, &add);
  if (rank == 0) printf("{\"rows\": [");
  for (int e = 0; e < 2; e++) {
    const MPI_Datatype type = e == 0 ? MPI_FLOAT : MPI_UINT16_T;
    for (int s = 0; s < SIZES; s++) {
      const int64_t bytes = sizes[s];
      const int part = (int)(bytes / elements[e].bytes / world), count = repetitions(large, bytes);
      void *whole = filled(bytes), *piece = filled(bytes / world);
      for (int reduce = 0; reduce < 2; reduce++) {
        for (int i = 0; i < count + WARM_UP; i++) {
          MPI_Barrier(MPI_COMM_WORLD);
          const double begin = begin_together();
          if (reduce) {
            MPI_Reduce_scatter_block(whole, piece, part, type, e == 0 ? MPI_SUM : add, MPI_COMM_WORLD);
          } else {
            MPI_Allgather(piece, part, type, whole, part, type, MPI_COMM_WORLD);
          }
          mine[i] = seconds_now() - begin;
        }
        MPI_Reduce(mine, slowest, count + WARM_UP, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
        if (rank == 0) {
          print_row(e + s + reduce == 0, reduce ? "reduce_scatter" : "all_gather", elements[e].name, bytes,
                    "open_mpi", slowest + WARM_UP, count);
        }
      }
      free(whole);
      free(piece);
    }
  }
  if (rank == 0) {
    printf("]}\n");
    fflush(stdout);
  }
  MPI_Op_free(&add);
  MPI_Finalize();
  return 0;
}
