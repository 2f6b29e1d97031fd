/* What the machine can do: two processes on shared memory, without a library. "memcpy" is an all-gather by copying the
 * whole unit into memory of one's own; "plain_loop" is a reduce-scatter as a loop that reads two operands, adds them and
 * writes the sum: each process its half. 16-bit operands are widened, the sum is float32, as in the engine. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rows.h"

enum { RANKS = 2 };

typedef struct {
  pthread_barrier_t barrier;
  double times[RANKS][MOST_TIMES + WARM_UP];
} shared_t;

static void *map_shared(int64_t bytes) {
  void *memory = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    perror("mmap");
    exit(1);
  }
  return memory;
}

static void add_f32(const float *restrict a, const float *restrict b, float *restrict out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = a[i] + b[i];
}

static inline float widened(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

static void add_bf16(const uint16_t *restrict a, const uint16_t *restrict b, float *restrict out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = widened(a[i]) + widened(b[i]);
}

/* The buffers of a collective: each process's operand, shared, and what a process writes. */
typedef struct {
  char *operands[RANKS];
  char *outputs[RANKS];
} buffers_t;

/* `reduce` 0: copies; else adds. Each of the two processes calls it with its rank. */
static void run(shared_t *shared, const buffers_t *at, int rank, int reduce, const element_t *element,
                int64_t bytes, int count) {
  const int64_t mine = bytes / element->bytes / RANKS, begin = mine * rank;
  for (int i = 0; i < count + WARM_UP; i++) {
    memset(at->operands[rank], 0, (size_t)bytes);  /* as a backward has just written it */
    pthread_barrier_wait(&shared->barrier);
    const double start = begin_together();
    if (!reduce) {
      memcpy(at->outputs[rank], at->operands[1 - rank], (size_t)bytes);
    } else if (element->bytes == 4) {
      add_f32((const float *)at->operands[0] + begin, (const float *)at->operands[1] + begin,
              (float *)at->outputs[rank], mine);
    } else {
      add_bf16((const uint16_t *)at->operands[0] + begin, (const uint16_t *)at->operands[1] + begin,
               (float *)at->outputs[rank], mine);
    }
    shared->times[rank][i] = seconds_now() - start;
  }
  pthread_barrier_wait(&shared->barrier);
}

int main(int argc, char **argv) {
  const int large = large_repetitions(argc, argv);
  shared_t *shared = (shared_t *)map_shared(sizeof *shared);
  buffers_t at;
  for (int rank = 0; rank < RANKS; rank++) {
    at.operands[rank] = (char *)map_shared(sizes[SIZES - 1]);
    at.outputs[rank] = (char *)map_shared(sizes[SIZES - 1]);
    memset(at.outputs[rank], 0, (size_t)sizes[SIZES - 1]);
  }
  pthread_barrierattr_t attributes;
  pthread_barrierattr_init(&attributes);
  pthread_barrierattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
  pthread_barrier_init(&shared->barrier, &attributes, RANKS);
  const pid_t child = fork();
  if (child < 0) {
    perror("fork");
    return 1;
  }
  if (child == 0) prctl(PR_SET_PDEATHSIG, SIGKILL);
  const int rank = child == 0;
  if (rank == 0) printf("{\"rows\": [");
  for (int e = 0; e < 2; e++) {
    for (int s = 0; s < SIZES; s++) {
      for (int reduce = 0; reduce < 2; reduce++) {
        const int count = repetitions(large, sizes[s]);
        run(shared, &at, rank, reduce, &elements[e], sizes[s], count);
        if (rank == 0) {
          double times[MOST_TIMES];
          for (int i = 0; i < count; i++) {
            const double *own = shared->times[0] + WARM_UP, *other = shared->times[1] + WARM_UP;
            times[i] = own[i] > other[i] ? own[i] : other[i];
          }
          print_row(e + s + reduce == 0, reduce ? "reduce_scatter" : "all_gather", elements[e].name, sizes[s],
                    reduce ? "plain_loop" : "memcpy", times, count);
        }
        pthread_barrier_wait(&shared->barrier);
      }
    }
  }
  if (rank != 0) return 0;
  printf("]}\n");
  int status = 0;
  return waitpid(child, &status, 0) == child && status == 0 ? 0 : 1;
}
