/* What the programs of several ranks share: joining the job, sleeping, and a model that is a stack
 * of equal layers. */
#ifndef FSDP_TEST_RANKS_H
#define FSDP_TEST_RANKS_H

#include "host_over_comm.h"
#include "test.h"

#include <time.h>

enum { STACK_MAX_WIDTH = 4096 };

typedef struct {
  fsdp_comm_t *comm;
  int32_t rank, world;
} job_t;

/* The communicator of this process's environment; with FSDP_TEST_COMM=host one on collectives that it lends. */
static inline job_t join_job(void) {
  job_t job;
  const char *kind = getenv("FSDP_TEST_COMM");
  job.comm = NULL;
  CHECK_OK(fsdp_comm_init_env(&job.comm));
  if (kind != NULL && strcmp(kind, "host") == 0) job.comm = host_over_comm(job.comm);
  CHECK_OK(fsdp_comm_rank(job.comm, &job.rank));
  CHECK_OK(fsdp_comm_world_size(job.comm, &job.world));
  return job;
}

/* Whether the ranks of such a job share no memory, so that an all-gather moves bytes. */
static inline int moves_bytes(int32_t world) { return getenv("FSDP_TEST_COMM") != NULL && world > 1; }

static inline void sleep_ms(int ms) {
  struct timespec time;
  time.tv_sec = ms / 1000;
  time.tv_nsec = (long)(ms % 1000) * 1000000;
  while (nanosleep(&time, &time) != 0) {
  }
}

static inline double now_seconds(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* `layers` modules "layer0", "layer1", ... of class "Layer", each with a parameter "weight" of
 * `width` floats that are all `value`; nothing is wrapped. Parameter and layer numbers agree; with
 * every Layer wrapped, unit l + 1 is layer l. */
static inline fsdp_model_t *stack_model(uint32_t layers, int64_t width, float value) {
  static float values[STACK_MAX_WIDTH];
  fsdp_model_t *model = NULL;
  CHECK(width <= STACK_MAX_WIDTH);
  for (int64_t i = 0; i < width; i++) values[i] = value;
  CHECK_OK(fsdp_model_create("Stack", &model));
  for (uint32_t l = 0; l < layers; l++) {
    char name[16];
    uint32_t module = 0, param = 0;
    fsdp_tensor_t t = tensor_f32(values, 1, &width);
    snprintf(name, sizeof name, "layer%u", (unsigned)l);
    CHECK_OK(fsdp_model_add_module(model, 0, name, "Layer", &module));
    CHECK_OK(fsdp_model_add_parameter(model, module, "weight", &t, 1, &param));
    CHECK_EQ(param, l);
  }
  return model;
}

/* An engine on a stack in which every layer is a unit. */
static inline fsdp_engine_t *stack_engine(fsdp_comm_t *comm, uint32_t layers, int64_t width,
                                          float value) {
  fsdp_model_t *model = stack_model(layers, width, value);
  fsdp_engine_t *engine = NULL;
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  CHECK_OK(fsdp_engine_create(model, comm, NULL, &engine));
  fsdp_model_destroy(model);
  return engine;
}

/* Adds a gradient of `value` everywhere to a parameter of a stack. */
static inline fsdp_status_t stack_add_grad(fsdp_engine_t *engine, uint32_t param, float value) {
  fsdp_tensor_t out;
  int32_t accumulate = 0;
  fsdp_status_t status = fsdp_engine_param_grad(engine, param, &out, &accumulate);
  if (status != FSDP_OK) return status;
  float *grad = (float *)out.data;
  for (int64_t i = 0; i < out.shape[0]; i++) grad[i] = accumulate ? grad[i] + value : value;
  return FSDP_OK;
}

#endif
