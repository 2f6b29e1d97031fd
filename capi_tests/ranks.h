/* What the programs of several ranks share: joining the job, sleeping, and a model that is a stack
 * of equal layers. */
#ifndef FSDP_TEST_RANKS_H
#define FSDP_TEST_RANKS_H

#include "host_over_comm.h"
#include "test.h"

#include <time.h>

#ifdef FSDP_TEST_MPI
#include <fsdp_mpi.h>

extern int on_exit(void (*function)(int, void *), void *argument);

/* A test that has failed ends the other ranks, too. */
static inline void leave_mpi(int status, void *argument) {
  (void)argument;
  if (status != 0) MPI_Abort(MPI_COMM_WORLD, status);
  MPI_Finalize();
}
#endif

enum { STACK_MAX_WIDTH = 4096 };

typedef struct {
  fsdp_comm_t *comm;
  int32_t rank, world;
} job_t;

/* Whether FSDP_TEST_COMM says so: "host" is collectives that the environment's communicator lends,
 * "mpi" is MPI. */
static inline int comm_is(const char *kind) {
#ifdef FSDP_TEST_MPI
  return strcmp(kind, "mpi") == 0;
#else
  const char *given = getenv("FSDP_TEST_COMM");
  return given != NULL && strcmp(given, kind) == 0;
#endif
}

/* The communicator of this process's environment; with FSDP_TEST_COMM=host one on collectives that
 * it lends. */
static inline job_t join_job(void) {
  job_t job;
  job.comm = NULL;
#ifdef FSDP_TEST_MPI
  int initialized = 0, level = 0;
  fsdp_mpi_config_t config = FSDP_MPI_CONFIG_INIT;
  const char *timeout = getenv("FSDP_TIMEOUT_MS");
  if (timeout != NULL) config.timeout_ms = atoi(timeout);
  MPI_Initialized(&initialized);
  if (!initialized) {
    CHECK(MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &level) == MPI_SUCCESS);
    CHECK(on_exit(leave_mpi, NULL) == 0);
  }
  CHECK_OK(fsdp_comm_init_mpi(MPI_COMM_WORLD, &config, &job.comm));
#else
  CHECK_OK(fsdp_comm_init_env(&job.comm));
  if (comm_is("host")) job.comm = host_over_comm(job.comm);
#endif
  CHECK_OK(fsdp_comm_rank(job.comm, &job.rank));
  CHECK_OK(fsdp_comm_world_size(job.comm, &job.world));
  return job;
}

/* Whether collectives are lent, so that bytes move. */
static inline int has_lent_collectives(void) { return comm_is("host") || comm_is("mpi"); }

/* Whether 16-bit gradients are summed to 16 bits: not by the library, but by what hosts lend. */
static inline int sums_are_narrow(void) { return has_lent_collectives(); }

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
