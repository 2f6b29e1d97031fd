/* What the programs of bench/collectives share: the sizes, how often each is repeated, and how times are printed.
 *
 * A program prints one line, {"rows": [{"collective", "dtype", "bytes", "system", "times": [...]}, ...]}; where every rank
 * prints, the harness takes the slowest rank of each repetition. `bytes` is the size of a whole unit in its dtype: the
 * output of an all-gather, the input of a reduce-scatter. */
#ifndef FSDP_BENCH_ROWS_H
#define FSDP_BENCH_ROWS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SIZES = 5, WARM_UP = 2, MOST_TIMES = 1024 };
static const int64_t sizes[SIZES] = {64 << 10, 1 << 20, 4 << 20, 12 << 20, 64 << 20};

/* A type of elements. Both have the exponent of float32. */
typedef struct {
  const char *name;
  int64_t bytes;
} element_t;
static const element_t elements[2] = {{"float32", 4}, {"bfloat16", 2}};

static inline double seconds_now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Waits, without sleeping, for the next whole millisecond that is not too near, and returns the time. After a barrier, which
 * some ranks leave later than others, all begin at once. */
static inline double begin_together(void) {
  const double now = seconds_now(), milliseconds = now * 1e3 + 0.3;
  const double begin = ((double)(int64_t)milliseconds + 1) / 1e3;
  while (seconds_now() < begin) {
  }
  return seconds_now();
}

/* Repetitions of a collective of `bytes`, from those of a large one (the program's argument). */
static inline int repetitions(int large, int64_t bytes) {
  const int count = bytes < 4 << 20 ? 5 * large : large;
  return count < MOST_TIMES ? count : MOST_TIMES;
}

static inline int large_repetitions(int argc, char **argv) {
  const int large = argc == 2 ? atoi(argv[1]) : 0;
  if (large < 1) {
    fprintf(stderr, "usage: %s REPETITIONS\n", argv[0]);
    exit(2);
  }
  return large;
}

/* All memory is written before it is used, so that no time is that of a page fault. */
static inline void *filled(int64_t bytes) {
  void *memory = aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64));
  if (memory == NULL) {
    fprintf(stderr, "no memory for %lld bytes\n", (long long)bytes);
    exit(1);
  }
  memset(memory, 0, (size_t)bytes);
  return memory;
}

static inline void print_row(int first, const char *collective, const char *dtype, int64_t bytes,
                             const char *system, const double *times, int count) {
  printf("%s{\"collective\": \"%s\", \"dtype\": \"%s\", \"bytes\": %lld, \"system\": \"%s\", \"times\": [",
         first ? "" : ", ", collective, dtype, (long long)bytes, system);
  for (int i = 0; i < count; i++) printf("%s%.9f", i == 0 ? "" : ", ", times[i]);
  printf("]}");
}

#endif
