/* fsdp_comm_init_host: its arguments, and one rank on callbacks of a few lines. */
#include "test.h"

static int calls, released;

static int32_t gather(void *self, int32_t lane, const void *input, void *output, size_t bytes,
                      void **request) {
  CHECK(self == &calls && lane >= 0 && lane < FSDP_HOST_LANES && *request == NULL);
  calls++;
  if (input != output) memcpy(output, input, bytes);
  return 0;
}

static int32_t scatter(void *self, int32_t lane, const void *input, void *output, size_t count,
                       fsdp_dtype_t dtype, int32_t op, void **request) {
  CHECK_EQ(op, FSDP_REDUCE_SUM);
  return gather(self, lane, input, output, count * dtype.bits / 8, request);
}

static int32_t reduce(void *self, int32_t lane, void *data, size_t count, fsdp_dtype_t dtype,
                      int32_t op, void **request) {
  (void)op;
  return gather(self, lane, data, data, count * dtype.bits / 8, request);
}

static int32_t broadcast(void *self, int32_t lane, void *data, size_t bytes, int32_t root,
                         void **request) {
  CHECK_EQ(root, 0);
  return gather(self, lane, data, data, bytes, request);
}

static int32_t barrier(void *self, int32_t lane, void **request) {
  return gather(self, lane, NULL, NULL, 0, request);
}

static int32_t returns_a_request(void *self, int32_t lane, void **request) {
  (void)lane;
  *request = self;
  return 0;
}

static int32_t fails(void *self, int32_t lane, void **request) {
  (void)self;
  (void)lane;
  (void)request;
  return -77;
}

static int32_t test(void *self, void *request, int32_t *done) {
  (void)self;
  (void)request;
  *done = 1;
  return 0;
}

static int32_t wait_for(void *self, void *request, int64_t timeout_ms, int32_t *done) {
  (void)timeout_ms;
  return test(self, request, done);
}

static int32_t post(void *self, int32_t rank, const void *message) {
  (void)self;
  (void)rank;
  (void)message;
  return 0;
}

static void *lend(void *self, size_t bytes) {
  (void)self;
  return malloc(bytes);
}

static void release(void *self) {
  CHECK(self == &calls);
  released++;
}

static fsdp_host_collectives_t table(void) {
  fsdp_host_collectives_t t = FSDP_HOST_COLLECTIVES_INIT;
  t.all_gather = gather;
  t.reduce_scatter = scatter;
  t.all_reduce = reduce;
  t.broadcast = broadcast;
  t.barrier = barrier;
  t.release = release;
  return t;
}

static void arguments(void) {
  fsdp_host_comm_config_t config = FSDP_HOST_COMM_CONFIG_INIT;
  fsdp_host_collectives_t t = table();
  fsdp_comm_t *comm = NULL;
#define REFUSED(text) \
  do { \
    CHECK_ERR(fsdp_comm_init_host(&config, &t, &calls, &comm), FSDP_ERR_INVALID_ARGUMENT, text); \
    const fsdp_host_comm_config_t good_ = FSDP_HOST_COMM_CONFIG_INIT; \
    config = good_; \
    t = table(); \
  } while (0)
  CHECK_ERR(fsdp_comm_init_host(NULL, &t, &calls, &comm), FSDP_ERR_INVALID_ARGUMENT,
            "fsdp_host_comm_config_t is NULL");
  CHECK_ERR(fsdp_comm_init_host(&config, NULL, &calls, &comm), FSDP_ERR_INVALID_ARGUMENT,
            "callbacks is NULL");
  CHECK_ERR(fsdp_comm_init_host(&config, &t, &calls, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out is NULL");
  config.struct_size = 3;
  REFUSED("fsdp_host_comm_config_t.struct_size is 3");
  t.struct_size -= sizeof(void *);
  REFUSED("fsdp_host_collectives_t.struct_size is");
  config.rank = -1;
  REFUSED("rank is -1");
  config.rank = 1;
  REFUSED("rank 1 is out of range for world size 1");
  config.world_size = 0;
  REFUSED("world size 0");
  config.world_size = INT32_MAX;
  REFUSED("world size 2147483647 is larger than 1048576");
  config.timeout_ms = -5;
  REFUSED("timeout_ms is -5");
  t.all_gather = NULL;
  REFUSED("callbacks.all_gather is NULL");
  t.reduce_scatter = NULL;
  REFUSED("callbacks.reduce_scatter is NULL");
  t.all_reduce = NULL;
  REFUSED("callbacks.all_reduce is NULL");
  t.broadcast = NULL;
  REFUSED("callbacks.broadcast is NULL");
  t.barrier = NULL;
  REFUSED("callbacks.barrier is NULL");
  t.wait = wait_for;
  REFUSED("callbacks.test is NULL, but wait is not");
  t.post = post;
  REFUSED("callbacks.poll is NULL, but post is not");
  t.alloc = lend;
  REFUSED("callbacks.free is NULL, but alloc is not");
  t.barrier = fails;
  CHECK_ERR(fsdp_comm_init_host(&config, &t, &calls, &comm), FSDP_ERR_CALLBACK,
            "barrier returned -77");
  t.barrier = returns_a_request;
  CHECK_ERR(fsdp_comm_init_host(&config, &t, &calls, &comm), FSDP_ERR_CALLBACK,
            "callbacks.test is NULL");
  t.test = test;
  CHECK(comm == NULL);
  CHECK_EQ(released, 0); /* what failed was not taken over */
}

/* A table of a later header: what this library does not know must be NULL. */
static void longer_tables(void) {
  struct {
    fsdp_host_collectives_t known;
    void *unknown;
  } later;
  fsdp_host_comm_config_t config = FSDP_HOST_COMM_CONFIG_INIT;
  fsdp_comm_t *comm = NULL;
  later.known = table();
  later.known.struct_size = sizeof later;
  later.unknown = &calls;
  CHECK_ERR(fsdp_comm_init_host(&config, &later.known, &calls, &comm), FSDP_ERR_UNSUPPORTED,
            "fsdp_host_collectives_t");
  later.unknown = NULL;
  CHECK_OK(fsdp_comm_init_host(&config, &later.known, &calls, &comm));
  fsdp_comm_destroy(comm);
  CHECK_EQ(released, 1);
}

static void one_rank(void) {
  fsdp_host_comm_config_t config = FSDP_HOST_COMM_CONFIG_INIT;
  const fsdp_host_collectives_t t = table();
  fsdp_comm_t *comm = NULL, *part = NULL;
  float values[3] = {1, 2, 3}, out[3] = {0, 0, 0};
  int64_t shape[1] = {3};
  fsdp_tensor_t from = tensor_f32(values, 1, shape), to = tensor_f32(out, 1, shape);
  int32_t number = -1;
  CHECK_OK(fsdp_comm_init_host(&config, &t, &calls, &comm));
  CHECK_OK(fsdp_comm_rank(comm, &number));
  CHECK_EQ(number, 0);
  CHECK_OK(fsdp_comm_world_size(comm, &number));
  CHECK_EQ(number, 1);
  calls = 0;
  CHECK_OK(fsdp_comm_all_gather(comm, &from, &to));
  CHECK_EQ(calls, 2); /* announced, and run */
  CHECK(memcmp(values, out, sizeof out) == 0);
  values[0] = 7;
  CHECK_OK(fsdp_comm_reduce_scatter(comm, &from, &to, FSDP_REDUCE_AVG));
  CHECK(memcmp(values, out, sizeof out) == 0);
  CHECK_OK(fsdp_comm_all_reduce(comm, &from, FSDP_REDUCE_MAX));
  CHECK_OK(fsdp_comm_broadcast(comm, &from, 0));
  CHECK_EQ(values[0], 7);
  CHECK_ERR(fsdp_comm_broadcast(comm, &from, 1), FSDP_ERR_INVALID_ARGUMENT, "root");
  CHECK_ERR(fsdp_comm_split(comm, 0, 0, &part), FSDP_ERR_UNSUPPORTED, "no split");
  CHECK_OK(fsdp_comm_barrier(comm));
  CHECK_OK(fsdp_comm_async_error(comm));
  CHECK_OK(fsdp_comm_abort(comm, "enough"));
  CHECK_ERR(fsdp_comm_barrier(comm), FSDP_ERR_ABORTED, "rank 0 aborted: enough");
  CHECK_ERR(fsdp_comm_async_error(comm), FSDP_ERR_ABORTED, "enough");
  released = 0;
  fsdp_comm_destroy(comm);
  CHECK_EQ(released, 1);
}

/* ---- requests that end, and then do not ---- */

static int stuck, lent, taken_back;
static char lent_memory[4096];
static void *under_way;

static int32_t starts(void *self, int32_t lane, const void *input, void *output, size_t bytes,
                      void **request) {
  if (!stuck) return gather(self, lane, input, output, bytes, request);
  under_way = output;
  *request = self;
  return 0;
}

static int32_t ends(void *self, void *request, int32_t *done) {
  CHECK(self == &calls && request == &calls);
  *done = !stuck;
  return 0;
}

/* What a request that never ends may still write stays, and so does what it was called with. */
static void a_request_never_ends(void) {
  fsdp_host_comm_config_t config = FSDP_HOST_COMM_CONFIG_INIT;
  fsdp_host_collectives_t t = table();
  fsdp_comm_t *comm = NULL;
  t.all_gather = starts;
  t.test = ends;
  config.timeout_ms = 100;
  CHECK_OK(fsdp_comm_init_host(&config, &t, &calls, &comm));
  released = 0;
  stuck = 1;
  CHECK_ERR(fsdp_comm_barrier(comm), FSDP_ERR_TIMEOUT, "barrier did not end within 100 ms");
  CHECK_ERR(fsdp_comm_async_error(comm), FSDP_ERR_TIMEOUT, "barrier");
  fsdp_comm_destroy(comm);
  CHECK_EQ(released, 0);
  CHECK(under_way != NULL);
  memset(under_way, 1, 64); /* a sanitizer would say if it had gone */
  stuck = 0;
  CHECK_OK(fsdp_comm_init_host(&config, &t, &calls, &comm));
  fsdp_comm_destroy(comm);
  CHECK_EQ(released, 1);
}

static void *lend_crooked(void *self, size_t bytes) {
  CHECK(self == &calls && bytes <= sizeof lent_memory - 128);
  lent++;
  return lent_memory + (64 - (uintptr_t)lent_memory % 64) + 4;
}

static void take_back(void *self, void *memory, size_t bytes) {
  (void)bytes;
  CHECK(self == &calls && (char *)memory > lent_memory);
  taken_back++;
}

/* Sums go to lent memory, of which this is none. */
static void lent_memory_is_aligned(void) {
  fsdp_host_comm_config_t config = FSDP_HOST_COMM_CONFIG_INIT;
  fsdp_host_collectives_t t = table();
  fsdp_comm_t *comm = NULL;
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  float values[8] = {0};
  int64_t shape[1] = {8};
  const fsdp_tensor_t value = tensor_f32(values, 1, shape);
  fsdp_tensor_t grad;
  int32_t accumulate = 0;
  uint32_t param = 0;
  void *buffer = NULL;
  t.alloc = lend_crooked;
  t.free = take_back;
  CHECK_OK(fsdp_comm_init_host(&config, &t, &calls, &comm));
  CHECK_OK(fsdp_model_create("Net", &model));
  CHECK_OK(fsdp_model_add_parameter(model, 0, "w", &value, 1, &param));
  CHECK_OK(fsdp_engine_create(model, comm, NULL, &engine));
  CHECK_OK(fsdp_engine_unshard(engine, 0, &buffer));
  CHECK_OK(fsdp_engine_param_grad(engine, param, &grad, &accumulate));
  memset(grad.data, 0, sizeof values);
  CHECK_ERR(fsdp_engine_reduce(engine, 0), FSDP_ERR_CALLBACK, "is not 64-byte aligned");
  CHECK_ERR(fsdp_comm_barrier(comm), FSDP_ERR_CALLBACK, "rank 0: reduce-scatter of unit");
  fsdp_engine_destroy(engine);
  fsdp_model_destroy(model);
  fsdp_comm_destroy(comm);
  CHECK(lent > 0);
  CHECK_EQ(lent, taken_back);
}

int main(void) {
  arguments();
  longer_tables();
  one_rank();
  a_request_never_ends();
  lent_memory_is_aligned();
  return 0;
}
