/* Communication hooks of engines on a GPU through the C interface, on a driver that is this machine's CPU (FSDP_CUDA_LIBRARY):
 * they see what the same hooks see on the CPU, are told where and on which stream, and what they leave is reduced with the same
 * bits. One that fails ends the backward. What is at a device address can be read and written here, since that driver's memory
 * is the host's and its work is done when it was launched. Ranks are threads, which meet in the NCCL that FSDP_NCCL_LIBRARY
 * names. */
#include "toy.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

enum { STEPS = 3, MAX_CALLS = 16 };

/* What a hook has been called with. */
typedef struct {
  int32_t device_type;
  void *stream;
  int calls;
  uint32_t units[MAX_CALLS], counts[MAX_CALLS], params[MAX_CALLS][TOY_PARAMS];
  int64_t numels[MAX_CALLS][TOY_PARAMS];
  char names[MAX_CALLS][8];
  float first[MAX_CALLS];
} seen_t;

/* To the nearest bfloat16, ties to even; finite numbers. */
static float as_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* Scales, and rounds to bfloat16 every other time. */
static int32_t change(const fsdp_unit_gradients_t *unit, void *user_data) {
  seen_t *seen = (seen_t *)user_data;
  const int call = seen->calls++;
  CHECK(call < MAX_CALLS && unit->count <= TOY_PARAMS);
  CHECK_EQ(unit->struct_size, sizeof *unit);
  CHECK_EQ(unit->device.device_type, seen->device_type);
  CHECK_EQ(unit->device.device_id, 0);
  CHECK((unit->cuda_stream == NULL) == (seen->device_type == FSDP_DEVICE_CPU));
  CHECK(call == 0 || unit->cuda_stream == seen->stream);
  seen->stream = unit->cuda_stream;
  seen->units[call] = unit->unit;
  seen->counts[call] = unit->count;
  snprintf(seen->names[call], sizeof seen->names[call], "%s", unit->name);
  for (uint32_t i = 0; i < unit->count; i++) {
    const fsdp_full_gradient_t *g = &unit->gradients[i];
    seen->params[call][i] = g->param;
    seen->numels[call][i] = g->numel;
    if (g->numel > 0) seen->first[call] = g->data[0];
    for (int64_t k = 0; k < g->numel; k++) {
      g->data[k] *= 0.3f;
      if (call % 2 == 1) g->data[k] = as_bfloat16(g->data[k]);
    }
  }
  return 0;
}

static int32_t fail(const fsdp_unit_gradients_t *unit, void *user_data) {
  (void)user_data;
  return unit->unit == TOY_A ? 42 : 0;
}

static void collect(fsdp_engine_t *engine, uint32_t param, int step, int32_t rank) {
  fsdp_tensor_t grad;
  int32_t accumulate = -1;
  CHECK_OK(fsdp_engine_param_grad(engine, param, &grad, &accumulate));
  CHECK_EQ(accumulate, 0);
  for (int64_t i = 0; i < TOY_NUMEL[param]; i++)
    ((float *)grad.data)[i] = (float)(i + 1) / 7.0f - (float)((step + 1) * (rank + 2)) / 11.0f + (float)param;
}

/* A forward, and a backward in which rank 0 alone has a gradient of "v". */
static void backward(fsdp_engine_t *engine, int step, int32_t rank) {
  CHECK_OK(fsdp_engine_zero_grad(engine));
  toy_forward(engine);
  CHECK_OK(fsdp_engine_pre_backward(engine, TOY_ROOT));
  collect(engine, TOY_BIAS, step, rank);
  CHECK_OK(fsdp_engine_pre_backward(engine, TOY_A));
  collect(engine, TOY_WEIGHT, step, rank);
  CHECK_OK(fsdp_engine_pre_backward(engine, TOY_X));
  if (rank == 0) collect(engine, TOY_V, step, rank);
  collect(engine, TOY_EMPTY, step, rank);
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_X));
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_A));
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_ROOT));
  CHECK_OK(fsdp_engine_synchronize(engine));
}

static fsdp_engine_t *engine_on(fsdp_model_t *model, fsdp_comm_t *comm, const fsdp_cuda_config_t *cuda,
                                int32_t strategy, uint32_t shard_size) {
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_engine_t *engine = NULL;
  config.cuda = cuda;
  config.strategy = strategy;
  config.shard_size = shard_size;
  CHECK_OK(fsdp_engine_create(model, comm, &config, &engine));
  return engine;
}

static void same_gradients(const fsdp_engine_t *a, const fsdp_engine_t *b) {
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    const fsdp_shard_t one = toy_shard(a, p), other = toy_shard(b, p);
    CHECK_EQ(one.numel, other.numel);
    CHECK((one.grad == NULL) == (other.grad == NULL));
    CHECK((one.grad == NULL) == (p == TOY_FROZEN));
    if (one.grad != NULL && one.numel > 0) CHECK(memcmp(one.grad, other.grad, (size_t)one.numel * 4) == 0);
  }
}

/* One rank: its model on the CPU and on the GPU. */
typedef struct {
  const char *job;
  int32_t rank, world, strategy;
  uint32_t shard_size;
  fsdp_model_t *models[2];
} rank_t;

static void *train_as_rank(void *argument) {
  const rank_t *r = (const rank_t *)argument;
  const fsdp_cuda_config_t cuda = FSDP_CUDA_CONFIG_INIT;
  fsdp_comm_t *comm = NULL, *other = NULL;
  if (r->world == 1) {
    CHECK_OK(fsdp_comm_init_single(&comm));
    CHECK_OK(fsdp_comm_init_single(&other));
  } else {
    fsdp_shm_config_t config = FSDP_SHM_CONFIG_INIT;
    config.job = r->job;
    config.rank = r->rank;
    config.world_size = r->world;
    CHECK_OK(fsdp_comm_init_shm(&config, &comm));
    CHECK_OK(fsdp_comm_split(comm, 0, r->rank, &other));
  }
  fsdp_engine_t *cpu = engine_on(r->models[0], comm, NULL, r->strategy, r->shard_size);
  fsdp_engine_t *gpu = engine_on(r->models[1], other, &cuda, r->strategy, r->shard_size);
  seen_t on_cpu, on_gpu;
  memset(&on_cpu, 0, sizeof on_cpu);
  memset(&on_gpu, 0, sizeof on_gpu);
  on_cpu.device_type = FSDP_DEVICE_CPU;
  on_gpu.device_type = FSDP_DEVICE_CUDA;
  for (int step = 0; step < STEPS; step++) {
    const int hooked = step != 1;
    CHECK_OK(fsdp_engine_set_comm_hook(cpu, hooked ? change : NULL, &on_cpu));
    CHECK_OK(fsdp_engine_set_comm_hook(gpu, hooked ? change : NULL, &on_gpu));
    backward(cpu, step, r->rank);
    backward(gpu, step, r->rank);
    same_gradients(cpu, gpu);
  }
  CHECK_EQ(on_gpu.calls, (STEPS - 1) * 3);
  CHECK(on_gpu.stream != NULL);
  CHECK_EQ(on_gpu.units[0], TOY_X);
  CHECK_STR(on_gpu.names[0], "a.x");
  CHECK_EQ(on_gpu.counts[0], r->rank == 0 ? 2 : 1);
  CHECK_EQ(on_gpu.numels[0][0], r->rank == 0 ? 10 : 0);
  /* The rest is the same. */
  on_cpu.device_type = on_gpu.device_type;
  on_cpu.stream = on_gpu.stream;
  CHECK(memcmp(&on_cpu, &on_gpu, sizeof on_cpu) == 0);
  fsdp_engine_destroy(cpu);
  fsdp_engine_destroy(gpu);
  fsdp_comm_destroy(comm);
  fsdp_comm_destroy(other);
  return NULL;
}

static void same_as_on_the_cpu(int32_t world, int32_t strategy, uint32_t shard_size) {
  static int runs = 0;
  char job[64];
  rank_t ranks[4];
  pthread_t threads[4];
  snprintf(job, sizeof job, "cuda-hook-%ld-%d", (long)getpid(), runs++);
  for (int32_t r = 0; r < world; r++) {
    const rank_t rank = {job, r, world, strategy, shard_size, {toy_model(), toy_model()}};
    ranks[r] = rank;
  }
  for (int32_t r = 0; r < world; r++) CHECK_EQ(pthread_create(&threads[r], NULL, train_as_rank, &ranks[r]), 0);
  for (int32_t r = 0; r < world; r++) {
    CHECK_EQ(pthread_join(threads[r], NULL), 0);
    for (int k = 0; k < 2; k++) fsdp_model_destroy(ranks[r].models[k]);
  }
}

/* The call that it was called by says so; the engine is broken as on the CPU. */
static void failure(const fsdp_cuda_config_t *cuda) {
  fsdp_comm_t *comm = NULL;
  fsdp_model_t *model = toy_model();
  CHECK_OK(fsdp_comm_init_single(&comm));
  fsdp_engine_t *engine = engine_on(model, comm, cuda, FSDP_FULL_SHARD, 0);
  CHECK_OK(fsdp_engine_set_comm_hook(engine, fail, NULL));
  toy_forward(engine);
  for (uint32_t unit = TOY_ROOT; unit < TOY_UNITS; unit++) CHECK_OK(fsdp_engine_pre_backward(engine, unit));
  collect(engine, TOY_WEIGHT, 0, 0);
  collect(engine, TOY_V, 0, 0);
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_X));
  CHECK_ERR(fsdp_engine_post_backward(engine, TOY_A), FSDP_ERR_CALLBACK, "communication hook of unit \"a\" failed");
  CHECK(strstr(fsdp_last_error_message(), "it returned 42") != NULL);
  CHECK_ERR(fsdp_engine_finish_backward(engine), FSDP_ERR_ABORTED, "unit \"a\"");
  CHECK_ERR(fsdp_engine_async_error(engine), FSDP_ERR_ABORTED, "unit \"a\"");
  fsdp_engine_destroy(engine);
  fsdp_model_destroy(model);
  fsdp_comm_destroy(comm);
}

int main(void) {
  const fsdp_cuda_config_t cuda = FSDP_CUDA_CONFIG_INIT;
  void *nccl = dlopen(getenv("FSDP_NCCL_LIBRARY"), RTLD_NOW);
  void (*meet)(int);
  CHECK(nccl != NULL);
  *(void **)&meet = dlsym(nccl, "fake_nccl_meet");
  CHECK(meet != NULL);
  meet(1);
  same_as_on_the_cpu(1, FSDP_FULL_SHARD, 0);
  same_as_on_the_cpu(2, FSDP_FULL_SHARD, 0);
  same_as_on_the_cpu(3, FSDP_NO_SHARD, 0);
  same_as_on_the_cpu(4, FSDP_FULL_SHARD, 0);
  same_as_on_the_cpu(4, FSDP_HYBRID_SHARD, 2);
  failure(NULL);
  failure(&cuda);
  return 0;
}
