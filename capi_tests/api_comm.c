/* The communicator: making and destroying it, and each collective's arguments. World size 1; what
 * several ranks compute together is in feature_collectives.c. */
#include "test.h"

static fsdp_comm_t *single(void) {
  fsdp_comm_t *comm = NULL;
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK(comm != NULL);
  return comm;
}

/* A destroyed communicator, a model, and a number that was never a handle: what every function must
 * refuse. */
typedef struct {
  fsdp_comm_t *destroyed;
  fsdp_comm_t *model;
  fsdp_comm_t *nothing;
} bad_handles_t;

static bad_handles_t bad_handles(fsdp_model_t *model) {
  bad_handles_t bad;
  bad.destroyed = single();
  fsdp_comm_destroy(bad.destroyed);
  bad.model = (fsdp_comm_t *)(void *)model;
  bad.nothing = NO_SUCH_HANDLE(fsdp_comm_t);
  return bad;
}

#define CHECK_BAD_HANDLES(bad, call) \
  do { \
    fsdp_comm_t *comm = NULL; \
    CHECK_ERR(call, FSDP_ERR_INVALID_ARGUMENT, "communicator is NULL"); \
    comm = (bad).destroyed; \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "destroyed"); \
    comm = (bad).model; \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "a model"); \
    comm = (bad).nothing; \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "communicator"); \
  } while (0)

static void making_and_destroying(bad_handles_t bad) {
  fsdp_comm_t *first = single(), *other = single();
  int32_t value = -7;
  CHECK(first != other);
  CHECK_ERR(fsdp_comm_init_single(NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_OK(fsdp_comm_rank(first, &value));
  CHECK_EQ(value, 0);
  CHECK_OK(fsdp_comm_world_size(first, &value));
  CHECK_EQ(value, 1);
  CHECK_OK(fsdp_comm_barrier(first));
  CHECK_OK(fsdp_comm_async_error(first));
  CHECK_ERR(fsdp_comm_rank(first, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_comm_world_size(first, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  value = -7;
  CHECK_BAD_HANDLES(bad, fsdp_comm_rank(comm, &value));
  CHECK_BAD_HANDLES(bad, fsdp_comm_world_size(comm, &value));
  CHECK_EQ(value, -7);
  CHECK_BAD_HANDLES(bad, fsdp_comm_barrier(comm));
  CHECK_BAD_HANDLES(bad, fsdp_comm_async_error(comm));
  fsdp_comm_destroy(first);
  CHECK_ERR(fsdp_comm_barrier(first), FSDP_ERR_INVALID_HANDLE, "destroyed");
  CHECK_OK(fsdp_comm_barrier(other));
  /* None of these does anything. */
  fsdp_comm_destroy(NULL);
  fsdp_comm_destroy(first);
  fsdp_comm_destroy(bad.model);
  fsdp_comm_destroy(bad.nothing);
  /* A new communicator is not mistaken for the destroyed one. */
  fsdp_comm_t *third = single();
  CHECK(third != first);
  CHECK_ERR(fsdp_comm_barrier(first), FSDP_ERR_INVALID_HANDLE, "destroyed");
  fsdp_comm_destroy(third);
  fsdp_comm_destroy(other);
}

static void shm_configuration(void) {
  fsdp_shm_config_t config = FSDP_SHM_CONFIG_INIT;
  fsdp_comm_t *comm = NO_SUCH_HANDLE(fsdp_comm_t);
  int32_t value = -7;
  CHECK_EQ(config.struct_size, sizeof config);
  CHECK_EQ(config.world_size, 1);
  CHECK_ERR(fsdp_comm_init_shm(NULL, &comm), FSDP_ERR_INVALID_ARGUMENT,
            "fsdp_shm_config_t is NULL");
  CHECK_ERR(fsdp_comm_init_shm(&config, &comm), FSDP_ERR_INVALID_ARGUMENT, "job is NULL");
  config.job = "api_comm";
  CHECK_ERR(fsdp_comm_init_shm(&config, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  config.job = "";
  CHECK_ERR(fsdp_comm_init_shm(&config, &comm), FSDP_ERR_INVALID_ARGUMENT, "job");
  config.job = "not UTF-8: \xff";
  CHECK_ERR(fsdp_comm_init_shm(&config, &comm), FSDP_ERR_INVALID_ARGUMENT, "job");
  config.job = "api_comm";
  config.rank = -1;
  CHECK_ERR(fsdp_comm_init_shm(&config, &comm), FSDP_ERR_INVALID_ARGUMENT, "rank");
  config.rank = 1;
  CHECK_ERR(fsdp_comm_init_shm(&config, &comm), FSDP_ERR_INVALID_ARGUMENT, "rank");
  config.rank = 0;
  config.world_size = 0;
  CHECK_ERR(fsdp_comm_init_shm(&config, &comm), FSDP_ERR_INVALID_ARGUMENT, "world");
  config.world_size = -3;
  CHECK_ERR(fsdp_comm_init_shm(&config, &comm), FSDP_ERR_INVALID_ARGUMENT, "world_size");
  config.world_size = 1;
  config.timeout_ms = -1;
  CHECK_ERR(fsdp_comm_init_shm(&config, &comm), FSDP_ERR_INVALID_ARGUMENT, "timeout_ms");
  config.timeout_ms = 0;
  config.rendezvous_timeout_ms = -1;
  CHECK_ERR(fsdp_comm_init_shm(&config, &comm), FSDP_ERR_INVALID_ARGUMENT, "rendezvous_timeout_ms");
  config.rendezvous_timeout_ms = 0;
  CHECK(comm == NO_SUCH_HANDLE(fsdp_comm_t));
  CHECK_OK(fsdp_comm_init_shm(&config, &comm));
  CHECK_OK(fsdp_comm_world_size(comm, &value));
  CHECK_EQ(value, 1);
  CHECK_OK(fsdp_comm_barrier(comm));
  fsdp_comm_destroy(comm);
}

static void shm_configuration_of_another_size(void) {
  struct {
    fsdp_shm_config_t config;
    unsigned char newer[32];
  } big;
  const fsdp_shm_config_t defaults = FSDP_SHM_CONFIG_INIT;
  fsdp_comm_t *comm = NO_SUCH_HANDLE(fsdp_comm_t);
  memset(&big, 0, sizeof big);
  big.config = defaults;
  big.config.job = "api_comm_size";
  const size_t wrong[] = {0, 1, sizeof(size_t), sizeof defaults - 1, 1 << 20, SIZE_MAX};
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    big.config.struct_size = wrong[i];
    CHECK_ERR(fsdp_comm_init_shm(&big.config, &comm), FSDP_ERR_INVALID_ARGUMENT,
              "fsdp_shm_config_t.struct_size");
  }
  big.config.struct_size = sizeof big;
  big.newer[31] = 1;
  CHECK_ERR(fsdp_comm_init_shm(&big.config, &comm), FSDP_ERR_UNSUPPORTED, "fsdp_shm_config_t");
  CHECK(comm == NO_SUCH_HANDLE(fsdp_comm_t));
  big.newer[31] = 0;
  CHECK_OK(fsdp_comm_init_shm(&big.config, &comm));
  fsdp_comm_destroy(comm);
}

static void all_reduce_arguments(bad_handles_t bad) {
  fsdp_comm_t *good = single();
  float values[6] = {1, -2, 3, 4, 5, 6};
  int64_t shape[2] = {2, 3};
  fsdp_tensor_t t = tensor_f32(values, 2, shape);
  for (int32_t op = FSDP_REDUCE_SUM; op <= FSDP_REDUCE_MIN; op++)
    CHECK_OK(fsdp_comm_all_reduce(good, &t, op));
  CHECK(values[0] == 1 && values[1] == -2 && values[5] == 6);
  CHECK_ERR(fsdp_comm_all_reduce(good, NULL, FSDP_REDUCE_SUM), FSDP_ERR_INVALID_ARGUMENT,
            "tensor is NULL");
  CHECK_ERR(fsdp_comm_all_reduce(good, &t, -1), FSDP_ERR_INVALID_ARGUMENT, "op -1");
  CHECK_ERR(fsdp_comm_all_reduce(good, &t, 4), FSDP_ERR_INVALID_ARGUMENT, "op 4");
  CHECK_BAD_HANDLES(bad, fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM));
  int64_t integers[1] = {5}, one = 1;
  fsdp_tensor_t i64 = tensor_of(integers, 1, &one, FSDP_DTYPE_INT, 64);
  CHECK_OK(fsdp_comm_all_reduce(good, &i64, FSDP_REDUCE_SUM));
  CHECK_ERR(fsdp_comm_all_reduce(good, &i64, FSDP_REDUCE_AVG), FSDP_ERR_INVALID_ARGUMENT, "int64");
  CHECK_EQ(integers[0], 5);
  fsdp_comm_destroy(good);
}

/* How a tensor can be wrong; every function that takes one goes through the same checks. */
static void tensor_descriptions(void) {
  fsdp_comm_t *comm = single();
  float values[8] = {0};
  int64_t shape[2] = {2, 3}, strides[2] = {3, 1}, one[1] = {1}, negative[2] = {2, -3};
  int64_t huge[3] = {INT64_MAX, INT64_MAX, 8}, none[2] = {0, 3};
  fsdp_tensor_t t = tensor_f32(values, 2, shape);
  t.strides = strides;
  CHECK_OK(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM));
  strides[0] = 4;
  CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_UNSUPPORTED,
            "tensor is not contiguous");
  t = tensor_f32(values, 2, shape);
  t.device.device_type = 2;
  CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_UNSUPPORTED, "on GPU 0");
  const uint8_t bad_types[][2] = {
      {FSDP_DTYPE_FLOAT, 8}, {FSDP_DTYPE_UINT, 32}, {FSDP_DTYPE_INT, 7}, {9, 32}};
  for (size_t i = 0; i < sizeof bad_types / sizeof bad_types[0]; i++) {
    t = tensor_of(values, 2, shape, bad_types[i][0], bad_types[i][1]);
    CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_UNSUPPORTED, "dtype");
  }
  t = tensor_f32(values, 2, shape);
  t.dtype.lanes = 4;
  CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_UNSUPPORTED, "dtype");
  const int32_t bad_ndim[] = {-1, 65, INT32_MAX};
  for (size_t i = 0; i < sizeof bad_ndim / sizeof bad_ndim[0]; i++) {
    t = tensor_f32(values, bad_ndim[i], shape);
    CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_INVALID_ARGUMENT,
              "dimensions");
  }
  t = tensor_f32(values, 2, NULL);
  CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_INVALID_ARGUMENT, "shape");
  t = tensor_f32(values, 2, negative);
  CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_INVALID_ARGUMENT, "-3");
  t = tensor_f32(values, 3, huge);
  CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_INVALID_ARGUMENT, "tensor");
  t = tensor_f32(NULL, 2, shape);
  CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_INVALID_ARGUMENT, "NULL");
  t = tensor_f32(values, 1, one);
  t.byte_offset = 2;
  CHECK_ERR(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_INVALID_ARGUMENT, "aligned");
  t.byte_offset = 4;
  CHECK_OK(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM));
  t = tensor_f32(NULL, 2, none);
  CHECK_OK(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM));
  t = tensor_f32(values, 0, NULL);
  CHECK_OK(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM));
  fsdp_comm_destroy(comm);
}

static void broadcast_arguments(bad_handles_t bad) {
  fsdp_comm_t *good = single();
  float values[3] = {1, 2, 3};
  int64_t shape[1] = {3};
  fsdp_tensor_t t = tensor_f32(values, 1, shape);
  CHECK_OK(fsdp_comm_broadcast(good, &t, 0));
  CHECK(values[0] == 1 && values[1] == 2 && values[2] == 3);
  CHECK_ERR(fsdp_comm_broadcast(good, NULL, 0), FSDP_ERR_INVALID_ARGUMENT, "tensor is NULL");
  CHECK_ERR(fsdp_comm_broadcast(good, &t, 1), FSDP_ERR_INVALID_ARGUMENT, "root");
  CHECK_ERR(fsdp_comm_broadcast(good, &t, -1), FSDP_ERR_INVALID_ARGUMENT, "root");
  CHECK_BAD_HANDLES(bad, fsdp_comm_broadcast(comm, &t, 0));
  fsdp_comm_destroy(good);
}

static void split_arguments(bad_handles_t bad) {
  fsdp_comm_t *good = single(), *part = NULL;
  int32_t world = 0;
  CHECK_OK(fsdp_comm_split(good, 3, -1, &part));
  fsdp_comm_destroy(good);
  CHECK_OK(fsdp_comm_world_size(part, &world));
  CHECK_EQ(world, 1);
  CHECK_ERR(fsdp_comm_split(part, -1, 0, &good), FSDP_ERR_INVALID_ARGUMENT, "color is -1");
  CHECK_ERR(fsdp_comm_split(part, 0, 0, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_BAD_HANDLES(bad, fsdp_comm_split(comm, 0, 0, &good));
  fsdp_comm_destroy(part);
}

static void gather_and_scatter_arguments(bad_handles_t bad) {
  fsdp_comm_t *good = single();
  float from[3] = {1, 2, 3}, to[4] = {-1, -1, -1, -1};
  double doubles[3] = {0};
  int64_t three[1] = {3}, four[1] = {4};
  fsdp_tensor_t input = tensor_f32(from, 1, three), output = tensor_f32(to, 1, three);
  fsdp_tensor_t longer = tensor_f32(to, 1, four),
                other = tensor_of(doubles, 1, three, FSDP_DTYPE_FLOAT, 64);
  CHECK_ERR(fsdp_comm_all_gather(good, NULL, &output), FSDP_ERR_INVALID_ARGUMENT, "input is NULL");
  CHECK_ERR(fsdp_comm_all_gather(good, &input, NULL), FSDP_ERR_INVALID_ARGUMENT, "output is NULL");
  CHECK_ERR(fsdp_comm_all_gather(good, &input, &longer), FSDP_ERR_INVALID_ARGUMENT, "world_size");
  CHECK_ERR(fsdp_comm_all_gather(good, &input, &other), FSDP_ERR_INVALID_ARGUMENT, "float64");
  CHECK_BAD_HANDLES(bad, fsdp_comm_all_gather(comm, &input, &output));
  CHECK(to[0] == -1 && to[3] == -1);
  CHECK_OK(fsdp_comm_all_gather(good, &input, &output));
  CHECK(to[0] == 1 && to[2] == 3 && to[3] == -1);
  to[0] = to[1] = to[2] = -1;
  CHECK_ERR(fsdp_comm_reduce_scatter(good, NULL, &output, FSDP_REDUCE_SUM),
            FSDP_ERR_INVALID_ARGUMENT, "input");
  CHECK_ERR(fsdp_comm_reduce_scatter(good, &input, NULL, FSDP_REDUCE_SUM),
            FSDP_ERR_INVALID_ARGUMENT, "output");
  CHECK_ERR(fsdp_comm_reduce_scatter(good, &input, &longer, FSDP_REDUCE_SUM),
            FSDP_ERR_INVALID_ARGUMENT, "output");
  CHECK_ERR(fsdp_comm_reduce_scatter(good, &input, &other, FSDP_REDUCE_SUM),
            FSDP_ERR_INVALID_ARGUMENT, "float64");
  CHECK_ERR(fsdp_comm_reduce_scatter(good, &input, &output, 9), FSDP_ERR_INVALID_ARGUMENT, "op 9");
  CHECK_BAD_HANDLES(bad, fsdp_comm_reduce_scatter(comm, &input, &output, FSDP_REDUCE_AVG));
  CHECK(to[0] == -1 && to[3] == -1);
  CHECK_OK(fsdp_comm_reduce_scatter(good, &input, &output, FSDP_REDUCE_AVG));
  CHECK(to[0] == 1 && to[2] == 3 && to[3] == -1);
  fsdp_comm_destroy(good);
}

static void abort_breaks_the_communicator(bad_handles_t bad) {
  fsdp_comm_t *good = single();
  float value = 1, result = -1;
  int64_t one = 1;
  fsdp_tensor_t t = tensor_f32(&value, 1, &one), output = tensor_f32(&result, 1, &one);
  int32_t rank = -7;
  CHECK_ERR(fsdp_comm_abort(good, NULL), FSDP_ERR_INVALID_ARGUMENT, "reason is NULL");
  CHECK_BAD_HANDLES(bad, fsdp_comm_abort(comm, "why"));
  CHECK_OK(fsdp_comm_barrier(good));
  CHECK_OK(fsdp_comm_abort(good, "the disk is full"));
  CHECK_ERR(fsdp_comm_async_error(good), FSDP_ERR_ABORTED, "the disk is full");
  CHECK_ERR(fsdp_comm_barrier(good), FSDP_ERR_ABORTED, "rank 0");
  CHECK_ERR(fsdp_comm_all_reduce(good, &t, FSDP_REDUCE_SUM), FSDP_ERR_ABORTED, "the disk is full");
  CHECK_ERR(fsdp_comm_broadcast(good, &t, 0), FSDP_ERR_ABORTED, "the disk is full");
  CHECK_ERR(fsdp_comm_all_gather(good, &t, &output), FSDP_ERR_ABORTED, "the disk is full");
  CHECK_ERR(fsdp_comm_reduce_scatter(good, &t, &output, FSDP_REDUCE_SUM), FSDP_ERR_ABORTED,
            "the disk is full");
  CHECK(result == -1);
  /* The first reason stays. */
  CHECK_OK(fsdp_comm_abort(good, "something else"));
  CHECK_ERR(fsdp_comm_barrier(good), FSDP_ERR_ABORTED, "the disk is full");
  CHECK_OK(fsdp_comm_rank(good, &rank));
  CHECK_EQ(rank, 0);
  fsdp_comm_destroy(good);
}

int main(void) {
  fsdp_model_t *model = NULL;
  CHECK_OK(fsdp_model_create("Net", &model));
  const bad_handles_t bad = bad_handles(model);
  making_and_destroying(bad);
  all_reduce_arguments(bad);
  tensor_descriptions();
  broadcast_arguments(bad);
  split_arguments(bad);
  gather_and_scatter_arguments(bad);
  abort_breaks_the_communicator(bad);
  shm_configuration();
  shm_configuration_of_another_size();
  fsdp_model_destroy(model);
  return 0;
}
