/* The communicator's own collectives on several ranks: every dtype and operation, empty and large
 * tensors, and the same bits on every rank. Any world size. */
#include "ranks.h"

#define COLLECTIVES_OF(NAME, TYPE, CODE, BITS) \
  static void collectives_of_##NAME(const job_t *job, int64_t n) { \
    const int32_t world = job->world; \
    TYPE *values = (TYPE *)malloc(sizeof(TYPE) * (size_t)(n * world + 1)); \
    TYPE *all = (TYPE *)malloc(sizeof(TYPE) * (size_t)(n * world + 1)); \
    int64_t wide = n * world; \
    fsdp_tensor_t mine = tensor_of(values, 1, &n, CODE, BITS), \
                  whole = tensor_of(all, 1, &wide, CODE, BITS); \
    CHECK(values != NULL && all != NULL); \
    for (int32_t op = FSDP_REDUCE_SUM; op <= FSDP_REDUCE_MIN; op++) { \
      const int average = op == FSDP_REDUCE_AVG; \
      if (average && CODE != FSDP_DTYPE_FLOAT) continue; \
      for (int64_t i = 0; i < n; i++) values[i] = (TYPE)((i + job->rank) % 5); \
      CHECK_OK(fsdp_comm_all_reduce(job->comm, &mine, op)); \
      for (int64_t i = 0; i < wide; i++) all[i] = (TYPE)((i + 2 * job->rank) % 7); \
      for (int64_t i = 0; i < n; i++) CHECK(values[i] == NAME##_combined(world, i, 1, 5, op)); \
      CHECK_OK(fsdp_comm_reduce_scatter(job->comm, &whole, &mine, op)); \
      for (int64_t i = 0; i < n; i++) \
        CHECK(values[i] == NAME##_combined(world, job->rank * n + i, 2, 7, op)); \
    } \
    for (int64_t i = 0; i < n; i++) values[i] = (TYPE)(job->rank + i); \
    CHECK_OK(fsdp_comm_all_gather(job->comm, &mine, &whole)); \
    for (int32_t r = 0; r < world; r++) { \
      for (int64_t i = 0; i < n; i++) CHECK(all[r * n + i] == (TYPE)(r + i)); \
    } \
    for (int32_t root = 0; root < world; root++) { \
      for (int64_t i = 0; i < n; i++) values[i] = (TYPE)(7 * job->rank + i); \
      CHECK_OK(fsdp_comm_broadcast(job->comm, &mine, root)); \
      for (int64_t i = 0; i < n; i++) CHECK(values[i] == (TYPE)(7 * root + i)); \
    } \
    free(values); \
    free(all); \
  } \
  struct NAME##_needs_a_semicolon

/* What the ranks' values (i + step * rank) % modulus give together. */
#define COMBINED_OF(NAME, TYPE) \
  static TYPE NAME##_combined(int32_t world, int64_t i, int64_t step, int64_t modulus, \
                              int32_t op) { \
    TYPE result = (TYPE)(i % modulus); \
    for (int64_t r = 1; r < world; r++) { \
      const TYPE value = (TYPE)((i + step * r) % modulus); \
      if (op == FSDP_REDUCE_MAX) { \
        result = value > result ? value : result; \
      } else if (op == FSDP_REDUCE_MIN) { \
        result = value < result ? value : result; \
      } else { \
        result = (TYPE)(result + value); \
      } \
    } \
    return op == FSDP_REDUCE_AVG ? (TYPE)(result / (TYPE)world) : result; \
  } \
  struct NAME##_combined_needs_a_semicolon

COMBINED_OF(f32, float);
COMBINED_OF(f64, double);
COMBINED_OF(i32, int32_t);
COMBINED_OF(i64, int64_t);
COMBINED_OF(u8, uint8_t);
COLLECTIVES_OF(f32, float, FSDP_DTYPE_FLOAT, 32);
COLLECTIVES_OF(f64, double, FSDP_DTYPE_FLOAT, 64);
COLLECTIVES_OF(i32, int32_t, FSDP_DTYPE_INT, 32);
COLLECTIVES_OF(i64, int64_t, FSDP_DTYPE_INT, 64);
COLLECTIVES_OF(u8, uint8_t, FSDP_DTYPE_UINT, 8);

/* A sum whose bits depend on the order of its terms: rank order, on every rank. */
static void rank_order(const job_t *job) {
  enum { N = 1000 };
  static float values[N];
  int64_t n = N;
  fsdp_tensor_t t = tensor_f32(values, 1, &n);
  for (int i = 0; i < N; i++)
    values[i] = 1.0f / (float)(3 * job->rank + i + 1) * (job->rank % 2 ? -1e4f : 1.0f);
  CHECK_OK(fsdp_comm_all_reduce(job->comm, &t, FSDP_REDUCE_SUM));
  for (int i = 0; i < N; i++) {
    volatile float sum = 1.0f / (float)(i + 1);
    for (int32_t r = 1; r < job->world; r++) {
      volatile float term = 1.0f / (float)(3 * r + i + 1) * (r % 2 ? -1e4f : 1.0f);
      sum = sum + term;
    }
    CHECK(values[i] == sum);
  }
}

/* Nobody leaves a barrier before everybody has come. */
static void barriers(const job_t *job) {
  for (int round = 0; round < job->world; round++) {
    double late = 0;
    int64_t one = 1;
    fsdp_tensor_t t = tensor_of(&late, 1, &one, FSDP_DTYPE_FLOAT, 64);
    if (round == job->rank) {
      sleep_ms(30);
      late = now_seconds();
    }
    CHECK_OK(fsdp_comm_barrier(job->comm));
    const double after = now_seconds();
    CHECK_OK(fsdp_comm_broadcast(job->comm, &t, round));
    CHECK(after >= late);
  }
}

/* Ranks of one parity form a group, in reverse order; the groups work independently of each other
 * and of the whole, which may go first. */
static void split(const job_t *job) {
  const int32_t parity = job->rank % 2;
  job_t part = {NULL, -1, -1};
  for (int round = 0; round < 2; round++) {
    CHECK_OK(fsdp_comm_split(job->comm, parity, -job->rank, &part.comm));
    CHECK_OK(fsdp_comm_rank(part.comm, &part.rank));
    CHECK_OK(fsdp_comm_world_size(part.comm, &part.world));
    CHECK_EQ(part.world, (job->world + 1 - parity) / 2);
    CHECK_EQ(part.rank, part.world - 1 - job->rank / 2);
    for (int i = 0; i < 3 + 4 * parity; i++) {
      float value = (float)job->rank;
      int64_t one = 1;
      fsdp_tensor_t t = tensor_f32(&value, 1, &one);
      CHECK_OK(fsdp_comm_all_reduce(part.comm, &t, FSDP_REDUCE_MIN));
      CHECK(value == (float)parity);
    }
    collectives_of_f32(&part, 4096);
    if (round == 0) {
      /* A group that breaks leaves the others alone. */
      if (parity == 0) CHECK_OK(fsdp_comm_abort(part.comm, "of no use"));
      const fsdp_status_t status = fsdp_comm_barrier(part.comm);
      CHECK_EQ(status, parity == 0 ? FSDP_ERR_ABORTED : FSDP_OK);
    }
    CHECK_OK(fsdp_comm_barrier(job->comm));
    fsdp_comm_destroy(part.comm);
  }
}

/* More than a collective gathers to combine it itself: whole numbers, exact in every order and type. */
static void large(const job_t *job) {
  enum { LARGE = 50000 };
  static float values[LARGE];
  static uint16_t halves[LARGE];
  int64_t n = LARGE;
  fsdp_tensor_t t = tensor_f32(values, 1, &n);
  const int world = job->world, sum = world * (world - 1) / 2;
  for (int op = FSDP_REDUCE_SUM; op <= FSDP_REDUCE_MIN; op++) {
    for (int i = 0; i < LARGE; i++) values[i] = (float)(world * (i % 50 + job->rank));
    CHECK_OK(fsdp_comm_all_reduce(job->comm, &t, op));
    for (int i = 0; i < LARGE; i++) {
      const int all = world * (i % 50) + sum;
      const int want = op == FSDP_REDUCE_SUM   ? world * all
                       : op == FSDP_REDUCE_AVG ? all
                       : op == FSDP_REDUCE_MAX ? world * (i % 50 + world - 1)
                                               : world * (i % 50);
      CHECK(values[i] == (float)want);
    }
  }
  t = tensor_of(halves, 1, &n, FSDP_DTYPE_BFLOAT, 16);
  for (int i = 0; i < LARGE; i++) halves[i] = job->rank == 0 ? 0x4040 : 0; /* 3 */
  CHECK_OK(fsdp_comm_all_reduce(job->comm, &t, FSDP_REDUCE_SUM));
  for (int i = 0; i < LARGE; i++) CHECK_EQ(halves[i], 0x4040);
  for (int i = 0; i < LARGE; i++) halves[i] = job->rank == world - 1 ? (uint16_t)i : 0;
  CHECK_OK(fsdp_comm_broadcast(job->comm, &t, world - 1));
  for (int i = 0; i < LARGE; i++) CHECK_EQ(halves[i], (uint16_t)i);
}

int main(void) {
  const job_t job = join_job();
  const int64_t sizes[] = {0, 1, 5, 4096, 100003};
  for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
    collectives_of_f32(&job, sizes[i]);
    collectives_of_f64(&job, sizes[i]);
    collectives_of_i32(&job, sizes[i]);
    collectives_of_i64(&job, sizes[i]);
    collectives_of_u8(&job, sizes[i]);
  }
  rank_order(&job);
  barriers(&job);
  split(&job);
  large(&job);
  fsdp_comm_destroy(job.comm);
  return 0;
}
