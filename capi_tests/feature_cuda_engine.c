/* An engine on a GPU through the C interface, on a driver that is this machine's CPU (FSDP_CUDA_LIBRARY): trained beside one
 * on the CPU, with the same bits in the end; memory from the host's allocator; figures as planned. What is at a device
 * address can be read here, since that driver's memory is the host's. Ranks are threads, which meet in the NCCL that
 * FSDP_NCCL_LIBRARY names: fully sharded, in groups and unsharded. */
#include "toy.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

enum { STEPS = 4 };

typedef int (*alloc_fn)(unsigned long long *, size_t, void *);
typedef int (*free_fn)(unsigned long long, void *);

/* The driver's memory, lent as a host's allocator. */
typedef struct {
  alloc_fn alloc;
  free_fn free;
  long taken, given;
  size_t bytes;
} lender_t;

static void *lend(void *user_data, size_t bytes, void *stream) {
  lender_t *lender = (lender_t *)user_data;
  unsigned long long address = 0;
  if (lender->alloc(&address, bytes, stream) != 0) return NULL;
  lender->taken++;
  lender->bytes += bytes;
  return (void *)(uintptr_t)address;
}

static void take_back(void *user_data, void *memory, size_t bytes, void *stream) {
  lender_t *lender = (lender_t *)user_data;
  CHECK_EQ(lender->free((unsigned long long)(uintptr_t)memory, stream), 0);
  lender->given++;
  lender->bytes -= bytes;
}

static lender_t lender_open(void) {
  lender_t lender = {NULL, NULL, 0, 0, 0};
  void *driver = dlopen(getenv("FSDP_CUDA_LIBRARY"), RTLD_NOW);
  CHECK(driver != NULL);
  *(void **)&lender.alloc = dlsym(driver, "cuMemAllocAsync");
  *(void **)&lender.free = dlsym(driver, "cuMemFreeAsync");
  CHECK(lender.alloc != NULL && lender.free != NULL);
  /* A host that uses the GPU itself has its context current. */
  int (*init)(unsigned), (*retain)(void **, int), (*push)(void *);
  void *context = NULL;
  *(void **)&init = dlsym(driver, "cuInit");
  *(void **)&retain = dlsym(driver, "cuDevicePrimaryCtxRetain");
  *(void **)&push = dlsym(driver, "cuCtxPushCurrent_v2");
  CHECK(init(0) == 0 && retain(&context, 0) == 0 && push(context) == 0);
  return lender;
}

/* An engine of the toy model and its optimizer. */
typedef struct {
  toy_t toy;
  fsdp_optimizer_t *optimizer;
  int32_t rank;
} trainer_t;

/* Ranks and how they share a model. */
typedef struct {
  int32_t world, strategy;
  uint32_t shard_size;
  /* Ranks that the inner units are resharded over; 0: as the strategy says. */
  int32_t over;
  int cpu_offload;
} sharing_t;

/* Takes the model and the communicator. */
static trainer_t trainer_on(fsdp_model_t *model, fsdp_comm_t *comm, const fsdp_cuda_config_t *cuda,
                            const sharing_t *sharing) {
  trainer_t t = {{NULL, NULL, NULL}, NULL, 0};
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_adamw_config_t adamw = FSDP_ADAMW_CONFIG_INIT;
  const fsdp_dtype_t bfloat16 = {FSDP_DTYPE_BFLOAT, 16, 1};
  config.cuda = cuda;
  config.cpu_offload = sharing->cpu_offload;
  config.param_dtype = bfloat16;
  config.strategy = sharing->strategy;
  config.shard_size = sharing->shard_size;
  t.toy.comm = comm;
  t.toy.model = model;
  CHECK_OK(fsdp_comm_rank(comm, &t.rank));
  CHECK_OK(fsdp_model_set_param_dtype(t.toy.model, TOY_BIAS, tensor_f32(NULL, 0, NULL).dtype));
  CHECK_OK(fsdp_engine_create(t.toy.model, t.toy.comm, &config, &t.toy.engine));
  for (uint32_t unit = 1; unit < TOY_UNITS && sharing->over > 0; unit++)
    CHECK_OK(fsdp_engine_set_reshard_after_forward(t.toy.engine, unit, sharing->over));
  CHECK_OK(fsdp_optimizer_create_adamw(t.toy.engine, &adamw, &t.optimizer));
  return t;
}

static trainer_t trainer_open(const fsdp_cuda_config_t *cuda, int cpu_offload) {
  const sharing_t sharing = {1, FSDP_FULL_SHARD, 0, 0, cpu_offload};
  fsdp_comm_t *comm = NULL;
  CHECK_OK(fsdp_comm_init_single(&comm));
  return trainer_on(toy_model(), comm, cuda, &sharing);
}

static void trainer_close(trainer_t *t) {
  fsdp_optimizer_destroy(t->optimizer);
  toy_destroy(t->toy);
}

static float from_bfloat16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

/* The gradient of a parameter follows from what it is computed with, and from the rank. */
static void collect(const trainer_t *t, uint32_t param, int step, int device_type) {
  fsdp_engine_t *engine = t->toy.engine;
  fsdp_tensor_t data, grad;
  int32_t accumulate = -1;
  CHECK_OK(fsdp_engine_param_data(engine, param, &data));
  CHECK_OK(fsdp_engine_param_grad(engine, param, &grad, &accumulate));
  CHECK_EQ(accumulate, 0);
  CHECK_EQ(data.device.device_type, device_type);
  CHECK_EQ(grad.device.device_type, device_type);
  CHECK_EQ(data.device.device_id, 0);
  for (int64_t i = 0; i < TOY_NUMEL[param]; i++) {
    const float x = data.dtype.bits == 32 ? ((const float *)data.data)[i] : from_bfloat16(((const uint16_t *)data.data)[i]);
    ((float *)grad.data)[i] = x * 0.125f - (float)(step + 1 + 3 * t->rank) * (float)(i + 1);
  }
}

static void train(trainer_t *t, int step, int device_type) {
  fsdp_engine_t *engine = t->toy.engine;
  double norm = 0;
  toy_forward(engine);
  CHECK_OK(fsdp_engine_pre_backward(engine, TOY_ROOT));
  collect(t, TOY_BIAS, step, device_type);
  CHECK_OK(fsdp_engine_pre_backward(engine, TOY_A));
  /* In the last step it has none. */
  if (step + 1 < STEPS) collect(t, TOY_WEIGHT, step, device_type);
  CHECK_OK(fsdp_engine_pre_backward(engine, TOY_X));
  collect(t, TOY_V, step, device_type);
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_X));
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_A));
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_ROOT));
  CHECK((toy_shard(engine, TOY_WEIGHT).grad == NULL) == (step + 1 == STEPS));
  CHECK(toy_shard(engine, TOY_FROZEN).grad == NULL);
  CHECK_OK(fsdp_engine_clip_grad_norm(engine, 3.0, 2.0, 1, &norm));
  CHECK(norm > 3.0);
  CHECK_OK(fsdp_optimizer_step(t->optimizer));
  CHECK_OK(fsdp_engine_zero_grad(engine));
}

static void same_shards(const trainer_t *a, const trainer_t *b) {
  const char *const states[] = {"exp_avg", "exp_avg_sq"};
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    const fsdp_shard_t one = toy_shard(a->toy.engine, p), other = toy_shard(b->toy.engine, p);
    CHECK_EQ(one.numel, other.numel);
    if (one.numel == 0) continue;
    CHECK(memcmp(one.data, other.data, (size_t)one.numel * 4) == 0);
    for (int k = 0; k < 2; k++) {
      float *x = NULL, *y = NULL;
      CHECK_OK(fsdp_optimizer_state(a->optimizer, p, states[k], &x));
      CHECK_OK(fsdp_optimizer_state(b->optimizer, p, states[k], &y));
      CHECK((x == NULL) == (y == NULL));
      if (x != NULL) CHECK(memcmp(x, y, (size_t)one.numel * 4) == 0);
    }
  }
}

/* The unit buffer, its size, and where parameters lie in it; gradients that the host has elsewhere. */
static void addresses(fsdp_engine_t *engine, lender_t *lender) {
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    fsdp_param_info_t param = param_info_init();
    fsdp_unit_info_t unit = unit_info_init();
    fsdp_tensor_t data;
    void *buffer = NULL;
    CHECK_OK(fsdp_engine_param_info(engine, p, &param));
    CHECK_OK(fsdp_engine_unshard(engine, param.unit, &buffer));
    CHECK_OK(fsdp_engine_unit_info(engine, param.unit, &unit));
    CHECK_OK(fsdp_engine_param_data(engine, p, &data));
    if (TOY_NUMEL[p] == 0) continue;
    CHECK((char *)data.data == (char *)buffer + param.compute_offset);
    CHECK(param.compute_offset + TOY_NUMEL[p] * (data.dtype.bits / 8) <= (int64_t)unit.buffer_bytes);
    CHECK_EQ(data.dtype.bits, p == TOY_BIAS ? 32 : 16);
  }
  float *grad = (float *)lend(lender, 21 * sizeof(float), NULL);
  int64_t shape[2] = {7, 3};
  for (int i = 0; i < 21; i++) grad[i] = 2;
  fsdp_tensor_t tensor = tensor_f32(grad, 2, shape);
  CHECK_ERR(fsdp_engine_accumulate_grad(engine, TOY_WEIGHT, &tensor), FSDP_ERR_INVALID_ARGUMENT,
            "the gradient of \"a.weight\" is in host memory: the engine needs it on GPU 0");
  tensor.device.device_type = FSDP_DEVICE_CUDA;
  CHECK_OK(fsdp_engine_accumulate_grad(engine, TOY_WEIGHT, &tensor));
  CHECK_OK(fsdp_engine_accumulate_grad(engine, TOY_WEIGHT, &tensor));
  CHECK_OK(fsdp_engine_finish_backward(engine));
  CHECK_OK(fsdp_engine_synchronize(engine));
  for (int i = 0; i < 21; i++) CHECK_EQ(toy_shard(engine, TOY_WEIGHT).grad[i], 4);
  CHECK_OK(fsdp_engine_zero_grad(engine));
  take_back(lender, grad, 21 * sizeof(float), NULL);
}

/* Gradients of all units in one launch for each of their types. */
static void together(void) {
  lender_t lender = lender_open();
  const fsdp_cuda_config_t cuda = FSDP_CUDA_CONFIG_INIT;
  trainer_t t = trainer_open(&cuda, 0);
  fsdp_engine_t *engine = t.toy.engine;
  long (*calls)(const char *);
  *(void **)&calls = dlsym(dlopen(getenv("FSDP_CUDA_LIBRARY"), RTLD_NOW), "fake_cuda_calls");
  CHECK(calls != NULL);
  int64_t shape[2] = {7, 3}, ten[1] = {10}, five[1] = {5}, none[2] = {0, 2};
  float *floats = (float *)lend(&lender, 21 * sizeof(float), NULL);
  uint16_t *halves = (uint16_t *)lend(&lender, 10 * sizeof(uint16_t), NULL);
  for (int i = 0; i < 21; i++) floats[i] = 3;
  for (int i = 0; i < 10; i++) halves[i] = 0x4000; /* 2 in bfloat16 */
  const uint32_t params[4] = {TOY_BIAS, TOY_WEIGHT, TOY_V, TOY_EMPTY};
  fsdp_tensor_t grads[4];
  grads[0] = tensor_f32(floats, 1, five);
  grads[1] = tensor_f32(floats, 2, shape);
  grads[2] = tensor_of(halves, 1, ten, FSDP_DTYPE_BFLOAT, 16);
  grads[3] = tensor_f32(NULL, 2, none);
  for (int i = 0; i < 4; i++) grads[i].device.device_type = FSDP_DEVICE_CUDA;
  toy_forward(engine);
  for (uint32_t unit = 0; unit < TOY_UNITS; unit++) CHECK_OK(fsdp_engine_pre_backward(engine, unit));
  grads[2].device.device_id = 1;
  CHECK_ERR(fsdp_engine_accumulate_grads(engine, params, grads, 4), FSDP_ERR_INVALID_ARGUMENT,
            "the gradient of \"a.x.v\" is on GPU 1: the engine needs it on GPU 0");
  grads[2].device.device_id = 0;
  for (int times = 0; times < 2; times++) {
    const long before = calls("cuLaunchKernel");
    CHECK_OK(fsdp_engine_accumulate_grads(engine, params, grads, 4));
    CHECK_EQ(calls("cuLaunchKernel") - before, 2);
  }
  CHECK_OK(fsdp_engine_finish_backward(engine));
  CHECK_OK(fsdp_engine_synchronize(engine));
  for (int i = 0; i < 21; i++) CHECK_EQ(toy_shard(engine, TOY_WEIGHT).grad[i], 6);
  for (int i = 0; i < 10; i++) CHECK_EQ(toy_shard(engine, TOY_V).grad[i], 4);
  for (int i = 0; i < 5; i++) CHECK_EQ(toy_shard(engine, TOY_BIAS).grad[i], 6);
  CHECK(toy_shard(engine, TOY_EMPTY).grad != NULL);
  take_back(&lender, floats, 21 * sizeof(float), NULL);
  take_back(&lender, halves, 10 * sizeof(uint16_t), NULL);
  trainer_close(&t);
}

/* What the engine has taken is what the plan says; the optimizer's states are aligned besides. */
static void figures(const trainer_t *t, const lender_t *lender, int cpu_offload) {
  fsdp_plan_request_t request = FSDP_PLAN_REQUEST_INIT;
  const fsdp_dtype_t bfloat16 = {FSDP_DTYPE_BFLOAT, 16, 1};
  fsdp_plan_t plan;
  fsdp_cuda_stats_t cuda;
  fsdp_stats_t stats;
  stats.struct_size = sizeof stats;
  plan.struct_size = sizeof plan;
  cuda.struct_size = sizeof cuda;
  request.device_type = 9;
  CHECK_ERR(fsdp_plan(t->toy.model, &request, &plan), FSDP_ERR_INVALID_ARGUMENT, "device_type cannot be 9");
  request.device_type = FSDP_DEVICE_CUDA;
  request.optimizer_bytes_per_element = 8;
  request.param_dtype = bfloat16;
  request.cpu_offload = cpu_offload;
  CHECK_OK(fsdp_plan(t->toy.model, &request, &plan));
  CHECK_OK(fsdp_engine_stats(t->toy.engine, &stats));
  CHECK_ERR(fsdp_engine_cuda_stats(t->toy.engine, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_OK(fsdp_engine_cuda_stats(t->toy.engine, &cuda));
  CHECK_EQ(cuda.pool_bytes, plan.pool_bytes);
  CHECK_EQ(cuda.pool_buffers, 3);
  CHECK_EQ(cuda.buffers_peak, 3);
  CHECK_EQ(cuda.slot_bytes, plan.gradient_slot_bytes);
  CHECK_EQ(stats.gradient_slot_bytes, plan.gradient_slot_bytes);
  CHECK_EQ(cuda.overflows, 0);
  CHECK(cuda.device_bytes >= plan.device_peak_bytes);
  CHECK(cuda.device_bytes <= plan.device_peak_bytes + (cpu_offload ? 0 : 2 * TOY_PARAMS * 64));
  CHECK_EQ(stats.offloaded_bytes, plan.offloaded_bytes);
  if (lender != NULL) CHECK_EQ(cuda.device_bytes, lender->bytes);
}

static void trained(int cpu_offload, int lends) {
  lender_t lender = lender_open();
  fsdp_cuda_config_t cuda = FSDP_CUDA_CONFIG_INIT;
  if (lends) {
    cuda.alloc = lend;
    cuda.free = take_back;
    cuda.allocator_user_data = &lender;
  }
  trainer_t cpu = trainer_open(NULL, cpu_offload), gpu = trainer_open(&cuda, cpu_offload);
  for (int step = 0; step < STEPS; step++) {
    train(&cpu, step, FSDP_DEVICE_CPU);
    train(&gpu, step, FSDP_DEVICE_CUDA);
    CHECK_OK(fsdp_engine_set_compute_stream(gpu.toy.engine, NULL));
    same_shards(&cpu, &gpu);
  }
  CHECK_OK(fsdp_engine_async_error(gpu.toy.engine));
  figures(&gpu, lends ? &lender : NULL, cpu_offload);
  if (lends) addresses(gpu.toy.engine, &lender);
  trainer_close(&cpu);
  trainer_close(&gpu);
  CHECK_EQ(lender.taken, lender.given);
  CHECK_EQ(lender.bytes, 0);
}

/* One rank's thread. */
typedef struct {
  sharing_t sharing;
  const char *job;
  int32_t rank;
  /* Made before the threads are: all have the same values in memory. */
  fsdp_model_t *models[2];
} rank_t;

static void *train_as_rank(void *argument) {
  const rank_t *rank = (const rank_t *)argument;
  const fsdp_cuda_config_t cuda = FSDP_CUDA_CONFIG_INIT;
  fsdp_shm_config_t config = FSDP_SHM_CONFIG_INIT;
  fsdp_comm_t *comm = NULL, *other = NULL;
  fsdp_stats_t cpu_stats, stats;
  cpu_stats.struct_size = stats.struct_size = sizeof stats;
  config.job = rank->job;
  config.rank = rank->rank;
  config.world_size = rank->sharing.world;
  CHECK_OK(fsdp_comm_init_shm(&config, &comm));
  CHECK_OK(fsdp_comm_split(comm, 0, rank->rank, &other));
  trainer_t cpu = trainer_on(rank->models[0], comm, NULL, &rank->sharing);
  trainer_t gpu = trainer_on(rank->models[1], other, &cuda, &rank->sharing);
  for (int step = 0; step < STEPS; step++) {
    train(&cpu, step, FSDP_DEVICE_CPU);
    train(&gpu, step, FSDP_DEVICE_CUDA);
    CHECK_OK(fsdp_engine_synchronize(gpu.toy.engine));
    same_shards(&cpu, &gpu);
  }
  CHECK_OK(fsdp_engine_stats(cpu.toy.engine, &cpu_stats));
  CHECK_OK(fsdp_engine_stats(gpu.toy.engine, &stats));
  CHECK_EQ(stats.all_gathers, cpu_stats.all_gathers);
  CHECK_EQ(stats.reduce_scatters, cpu_stats.reduce_scatters);
  const uint32_t group = rank->sharing.strategy == FSDP_NO_SHARD ? 1 : rank->sharing.shard_size;
  /* One for each unit and step, if there are replicas. */
  CHECK_EQ(stats.all_reduces, group > 0 ? TOY_UNITS * STEPS : 0);
  trainer_close(&cpu);
  trainer_close(&gpu);
  return NULL;
}

static void trained_by_ranks(void) {
  static const sharing_t all[] = {{2, FSDP_FULL_SHARD, 0, 0, 0},         {2, FSDP_NO_SHARD, 0, 0, 0},
                                  {3, FSDP_NO_SHARD, 0, 0, 1},           {4, FSDP_HYBRID_SHARD, 2, 0, 0},
                                  {4, FSDP_HYBRID_SHARD_GRAD_OP, 2, 0, 1}, {4, FSDP_FULL_SHARD, 0, 2, 0}};
  void *nccl = dlopen(getenv("FSDP_NCCL_LIBRARY"), RTLD_NOW);
  void (*meet)(int);
  CHECK(nccl != NULL);
  *(void **)&meet = dlsym(nccl, "fake_nccl_meet");
  CHECK(meet != NULL);
  meet(1);
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    char job[64];
    rank_t ranks[4];
    pthread_t threads[4];
    snprintf(job, sizeof job, "cuda-engine-%ld-%zu", (long)getpid(), i);
    for (int32_t r = 0; r < all[i].world; r++) {
      ranks[r].sharing = all[i];
      ranks[r].job = job;
      ranks[r].rank = r;
      for (int k = 0; k < 2; k++) ranks[r].models[k] = toy_model();
    }
    for (int32_t r = 0; r < all[i].world; r++) {
      CHECK_EQ(pthread_create(&threads[r], NULL, train_as_rank, &ranks[r]), 0);
    }
    for (int32_t r = 0; r < all[i].world; r++) CHECK_EQ(pthread_join(threads[r], NULL), 0);
  }
}

static void *nothing(void *user_data, size_t bytes, void *stream) {
  (void)user_data, (void)bytes, (void)stream;
  return NULL;
}

static void refused(void) {
  fsdp_cuda_config_t cuda = FSDP_CUDA_CONFIG_INIT;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_engine_t *engine = NULL;
  fsdp_comm_t *comm = NULL;
  fsdp_model_t *model = toy_model();
  CHECK_OK(fsdp_comm_init_single(&comm));
  config.cuda = &cuda;
  cuda.device = 5;
  CHECK_ERR(fsdp_engine_create(model, comm, &config, &engine), FSDP_ERR_UNSUPPORTED, "there is no GPU 5");
  cuda.device = 0;
  cuda.alloc = nothing;
  cuda.free = take_back;
  CHECK_ERR(fsdp_engine_create(model, comm, &config, &engine), FSDP_ERR_OUT_OF_MEMORY, "the host's allocator has not got");
  CHECK(engine == NULL);
  fsdp_model_destroy(model);
  fsdp_comm_destroy(comm);
}

int main(void) {
  trained(0, 0);
  trained(0, 1);
  trained(1, 1);
  together();
  trained_by_ranks();
  refused();
  return 0;
}
