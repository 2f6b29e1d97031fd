/* Collectives as a host would lend them, made of an fsdp communicator's own: so that every test
 * program of several ranks can run on fsdp_comm_init_host (FSDP_TEST_COMM=host). They block. Sums
 * are in rank order. */
#ifndef FSDP_TEST_HOST_OVER_COMM_H
#define FSDP_TEST_HOST_OVER_COMM_H

#include "test.h"

typedef struct {
  fsdp_comm_t *comm;
} host_over_comm_t;

static inline fsdp_tensor_t host_over_comm_tensor(const void *data, int64_t *count,
                                                  fsdp_dtype_t dtype) {
  fsdp_tensor_t t = tensor_f32((void *)(uintptr_t)data, 1, count);
  t.dtype = dtype;
  return t;
}

static const fsdp_dtype_t HOST_OVER_COMM_BYTE = {FSDP_DTYPE_UINT, 8, 1};

static inline int32_t host_over_comm_all_gather(void *self, int32_t lane, const void *input,
                                                void *output, size_t bytes, void **request) {
  host_over_comm_t *h = (host_over_comm_t *)self;
  int32_t world = 0;
  void *copy = malloc(bytes);
  (void)lane;
  (void)request;
  CHECK(copy != NULL);
  CHECK_OK(fsdp_comm_world_size(h->comm, &world));
  memcpy(copy, input, bytes); /* it may lie in the output */
  int64_t in = (int64_t)bytes, out = in * world;
  fsdp_tensor_t from = host_over_comm_tensor(copy, &in, HOST_OVER_COMM_BYTE);
  fsdp_tensor_t to = host_over_comm_tensor(output, &out, HOST_OVER_COMM_BYTE);
  const int32_t status = fsdp_comm_all_gather(h->comm, &from, &to);
  free(copy);
  return status;
}

static inline int32_t host_over_comm_reduce_scatter(void *self, int32_t lane, const void *input,
                                                    void *output, size_t count, fsdp_dtype_t dtype,
                                                    int32_t op, void **request) {
  host_over_comm_t *h = (host_over_comm_t *)self;
  int32_t world = 0;
  (void)lane;
  (void)request;
  CHECK_OK(fsdp_comm_world_size(h->comm, &world));
  int64_t out = (int64_t)count, in = out * world;
  fsdp_tensor_t from = host_over_comm_tensor(input, &in, dtype);
  fsdp_tensor_t to = host_over_comm_tensor(output, &out, dtype);
  return fsdp_comm_reduce_scatter(h->comm, &from, &to, op);
}

static inline int32_t host_over_comm_all_reduce(void *self, int32_t lane, void *data, size_t count,
                                                fsdp_dtype_t dtype, int32_t op, void **request) {
  int64_t n = (int64_t)count;
  fsdp_tensor_t t = host_over_comm_tensor(data, &n, dtype);
  (void)lane;
  (void)request;
  return fsdp_comm_all_reduce(((host_over_comm_t *)self)->comm, &t, op);
}

static inline int32_t host_over_comm_broadcast(void *self, int32_t lane, void *data, size_t bytes,
                                               int32_t root, void **request) {
  int64_t n = (int64_t)bytes;
  fsdp_tensor_t t = host_over_comm_tensor(data, &n, HOST_OVER_COMM_BYTE);
  (void)lane;
  (void)request;
  return fsdp_comm_broadcast(((host_over_comm_t *)self)->comm, &t, root);
}

static inline int32_t host_over_comm_barrier(void *self, int32_t lane, void **request) {
  (void)lane;
  (void)request;
  return fsdp_comm_barrier(((host_over_comm_t *)self)->comm);
}

static inline host_over_comm_t *host_over_comm_new(fsdp_comm_t *comm) {
  host_over_comm_t *h = (host_over_comm_t *)malloc(sizeof *h);
  CHECK(h != NULL);
  h->comm = comm;
  return h;
}

static inline int32_t host_over_comm_split(void *self, int32_t color, int32_t key,
                                           const int32_t *members, int32_t count, void **part) {
  fsdp_comm_t *comm = NULL;
  const int32_t status = fsdp_comm_split(((host_over_comm_t *)self)->comm, color, key, &comm);
  (void)members;
  (void)count;
  if (status == FSDP_OK) *part = host_over_comm_new(comm);
  return status;
}

static inline void host_over_comm_release(void *self) {
  fsdp_comm_destroy(((host_over_comm_t *)self)->comm);
  free(self);
}

static inline void host_over_comm_abort(void *self, const char *reason) {
  /* Whoever blocks in a collective learns of it. */
  (void)fsdp_comm_abort(((host_over_comm_t *)self)->comm, reason);
}

static inline void host_over_comm_describe(void *self, int32_t code, char *text, size_t size) {
  (void)self;
  (void)code;
  snprintf(text, size, "%s", fsdp_last_error_message());
}

/* A communicator on collectives lent by `comm`, which it takes over. */
static inline fsdp_comm_t *host_over_comm(fsdp_comm_t *comm) {
  fsdp_host_comm_config_t config = FSDP_HOST_COMM_CONFIG_INIT;
  fsdp_host_collectives_t table = FSDP_HOST_COLLECTIVES_INIT;
  fsdp_comm_t *out = NULL;
  CHECK_OK(fsdp_comm_rank(comm, &config.rank));
  CHECK_OK(fsdp_comm_world_size(comm, &config.world_size));
  table.all_gather = host_over_comm_all_gather;
  table.reduce_scatter = host_over_comm_reduce_scatter;
  table.all_reduce = host_over_comm_all_reduce;
  table.broadcast = host_over_comm_broadcast;
  table.barrier = host_over_comm_barrier;
  table.split = host_over_comm_split;
  table.release = host_over_comm_release;
  table.abort = host_over_comm_abort;
  table.describe_error = host_over_comm_describe;
  CHECK_OK(fsdp_comm_init_host(&config, &table, host_over_comm_new(comm), &out));
  return out;
}

#endif
