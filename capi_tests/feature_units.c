/* Units as C sees them on several ranks: how parameters are cut, what is gathered and reduced how
 * often, and the written formulas for memory. Any world size. */
#include "ranks.h"

/* root "r" [5]; a (unit) "w" [7, 3], "one" [1], "none" [0]; a.b (unit) "v" [100], tied into c as
 * "t"; c (unit) "u" [3]. */
enum { ROOT, A, B, C, UNITS };
enum { R, W_, ONE, NONE, V, U, PARAMS };

static const int64_t NUMEL[PARAMS] = {5, 21, 1, 0, 100, 3};

static float value_of(uint32_t p, int64_t i) { return (float)(1000 * (p + 1)) + (float)i; }

static fsdp_engine_t *create(fsdp_comm_t *comm, int tied, uint32_t slots) {
  static float values[PARAMS][100];
  static int64_t shapes[PARAMS][2] = {{5, 0}, {7, 3}, {1, 0}, {0, 0}, {100, 0}, {3, 0}};
  static const uint32_t modules[PARAMS] = {0, 1, 1, 1, 2, 3};
  static const char *const names[PARAMS] = {"r", "w", "one", "none", "v", "u"};
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  uint32_t number = 0;
  config.gradient_slots = slots;
  CHECK_OK(fsdp_model_create("Net", &model));
  CHECK_OK(fsdp_model_add_module(model, 0, "a", "A", &number));
  CHECK_OK(fsdp_model_add_module(model, 1, "b", "B", &number));
  CHECK_OK(fsdp_model_add_module(model, 0, "c", "C", &number));
  for (uint32_t p = 0; p < PARAMS; p++) {
    for (int64_t i = 0; i < NUMEL[p]; i++) values[p][i] = value_of(p, i);
    fsdp_tensor_t t = tensor_f32(values[p], p == W_ ? 2 : 1, shapes[p]);
    CHECK_OK(fsdp_model_add_parameter(model, modules[p], names[p], &t, 1, &number));
  }
  if (tied) CHECK_OK(fsdp_model_tie_parameter(model, 3, "t", V));
  CHECK_OK(fsdp_model_wrap_always(model));
  CHECK_OK(fsdp_engine_create(model, comm, &config, &engine));
  fsdp_model_destroy(model);
  return engine;
}

/* Sum over the ranks. */
static int64_t total(const job_t *job, int64_t mine) {
  int64_t one = 1;
  fsdp_tensor_t t = tensor_of(&mine, 1, &one, FSDP_DTYPE_INT, 64);
  CHECK_OK(fsdp_comm_all_reduce(job->comm, &t, FSDP_REDUCE_SUM));
  return mine;
}

static void pieces_cover_every_parameter_once(const job_t *job) {
  fsdp_engine_t *engine = create(job->comm, 0, 0);
  for (uint32_t p = 0; p < PARAMS; p++) {
    fsdp_param_info_t info = param_info_init();
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_param_info(engine, p, &info));
    CHECK_OK(fsdp_engine_shard(engine, p, &shard));
    CHECK_EQ(info.numel, NUMEL[p]);
    CHECK_EQ(info.shard_numel, shard.numel);
    CHECK_EQ(total(job, shard.numel), NUMEL[p]);
    /* Each element once: the sum over the pieces is the sum over the parameter. */
    int64_t elements = 0;
    for (int64_t i = 0; i < shard.numel; i++) {
      CHECK(shard.data[i] == value_of(p, info.shard_offset + i));
      elements += info.shard_offset + i;
    }
    CHECK_EQ(total(job, elements), NUMEL[p] * (NUMEL[p] - 1) / 2);
    CHECK(shard.numel > 0 || info.shard_offset == 0);
  }
  fsdp_engine_destroy(engine);
}

static void memory_is_a_formula(const job_t *job) {
  fsdp_engine_t *engine = create(job->comm, 0, 2);
  const uint64_t world = (uint64_t)job->world;
  uint64_t bytes = 0, padding = 0, elements = 0, largest = 0, second = 0;
  for (uint32_t u = 0; u < UNITS; u++) {
    fsdp_unit_info_t info = unit_info_init();
    CHECK_OK(fsdp_engine_unit_info(engine, u, &info));
    CHECK_EQ(info.unit_bytes, info.shard_bytes * world);
    CHECK_EQ(info.shard_bytes % 16, 0);
    /* At most 60 bytes before each parameter but the first, and less than 16 a rank at the end,
     * rounded up to a rank's whole elements. */
    CHECK(info.padding_bytes <= 60 * (info.param_count - 1) + 20 * world);
    bytes += info.unit_bytes;
    padding += info.padding_bytes;
    if (info.unit_bytes > largest) {
      second = largest;
      largest = info.unit_bytes;
    } else if (info.unit_bytes > second) {
      second = info.unit_bytes;
    }
  }
  for (uint32_t p = 0; p < PARAMS; p++) elements += (uint64_t)NUMEL[p];
  const fsdp_stats_t stats = stats_of(engine);
  CHECK_EQ(bytes, elements * 4 + padding);
  CHECK_EQ(stats.padding_bytes, padding);
  CHECK_EQ(stats.param_shard_bytes * world, bytes);
  /* Gradient shards are as large, each unit's rounded up to a cache line; so are units in the
   * shared buffer. */
  CHECK(stats.grad_shard_bytes >= stats.param_shard_bytes &&
        stats.grad_shard_bytes < stats.param_shard_bytes + 64 * UNITS);
  CHECK(stats.unit_buffer_bytes >= bytes && stats.unit_buffer_bytes < bytes + 64 * UNITS);
  CHECK(stats.gradient_slot_bytes >= largest + second);
  fsdp_engine_destroy(engine);
}

static void a_tied_parameter_is_one_parameter(const job_t *job) {
  fsdp_engine_t *engine = create(job->comm, 1, 0);
  fsdp_param_info_t info = param_info_init();
  fsdp_unit_info_t unit = unit_info_init();
  uint32_t count = 0;
  CHECK_OK(fsdp_engine_param_count(engine, &count));
  CHECK_EQ(count, PARAMS);
  CHECK_OK(fsdp_engine_param_info(engine, V, &info));
  /* It is named after its first registration, and lies in the innermost unit around both. */
  CHECK_STR(info.name, "a.b.v");
  CHECK_EQ(info.unit, ROOT);
  CHECK_OK(fsdp_engine_unit_info(engine, B, &unit));
  CHECK_EQ(unit.param_count, 0);
  CHECK_EQ(unit.unit_bytes, 0);
  fsdp_engine_destroy(engine);
}

static void add(fsdp_engine_t *engine, uint32_t param, float value) {
  fsdp_tensor_t out;
  int32_t accumulate = 0;
  CHECK_OK(fsdp_engine_param_grad(engine, param, &out, &accumulate));
  for (int64_t i = 0; i < NUMEL[param]; i++) {
    float *grad = (float *)out.data;
    grad[i] = accumulate ? grad[i] + value : value;
  }
}

static void check_grad(fsdp_engine_t *engine, uint32_t param, float value) {
  fsdp_shard_t shard;
  CHECK_OK(fsdp_engine_shard(engine, param, &shard));
  CHECK(shard.grad != NULL);
  for (int64_t i = 0; i < shard.numel; i++) CHECK(shard.grad[i] == value);
}

/* Unit b runs twice inside a: gathered for each use, reduced once, its gradients summed over the
 * uses. The root is reduced too, although no rank has a gradient for it: none can know. */
static void what_is_gathered_and_reduced(const job_t *job) {
  fsdp_engine_t *engine = create(job->comm, 0, 0);
  fsdp_unit_info_t info = unit_info_init();
  uint64_t reduced = 0;
  fsdp_shard_t shard;
  CHECK_OK(fsdp_engine_pre_forward(engine, ROOT));
  CHECK_OK(fsdp_engine_pre_forward(engine, A));
  for (int use = 0; use < 2; use++) {
    CHECK_OK(fsdp_engine_pre_forward(engine, B));
    CHECK_OK(fsdp_engine_post_forward(engine, B));
  }
  CHECK_OK(fsdp_engine_post_forward(engine, A));
  CHECK_OK(fsdp_engine_post_forward(engine, ROOT));
  CHECK_EQ(stats_of(engine).all_gathers, 4);
  CHECK_OK(fsdp_engine_pre_backward(engine, ROOT));
  CHECK_OK(fsdp_engine_pre_backward(engine, A));
  for (int use = 0; use < 2; use++) {
    CHECK_OK(fsdp_engine_pre_backward(engine, B));
    add(engine, V, (float)(job->rank + 1));
    CHECK_OK(fsdp_engine_post_backward(engine, B));
    CHECK_EQ(stats_of(engine).reduce_scatters, use);
  }
  /* On rank 0 alone: the others count as zero. */
  if (job->rank == 0) add(engine, W_, (float)job->world);
  add(engine, ONE, 2);
  add(engine, NONE, 0);
  CHECK_OK(fsdp_engine_post_backward(engine, A));
  CHECK_OK(fsdp_engine_post_backward(engine, ROOT));
  const fsdp_stats_t stats = stats_of(engine);
  /* The root stayed unsharded between. */
  CHECK_EQ(stats.all_gathers, 4 + 2);
  CHECK_EQ(stats.all_gather_bytes_moved, 0);
  CHECK_EQ(stats.reduce_scatters, 3);
  for (uint32_t u = ROOT; u <= B; u++) {
    CHECK_OK(fsdp_engine_unit_info(engine, u, &info));
    reduced += info.unit_bytes;
  }
  CHECK_EQ(stats.reduce_scatter_bytes, reduced);
  CHECK_EQ(stats.overflow_peak, 0);
  check_grad(engine, V, (float)(job->world + 1));
  check_grad(engine, W_, 1);
  check_grad(engine, ONE, 2);
  /* No rank had one of these: absent on every rank, whether or not it has a piece. */
  CHECK_OK(fsdp_engine_shard(engine, R, &shard));
  CHECK(shard.grad == NULL);
  CHECK_OK(fsdp_engine_shard(engine, U, &shard));
  CHECK(shard.grad == NULL);
  CHECK_EQ(total(job, shard.grad == NULL), job->world);
  fsdp_engine_destroy(engine);
}

int main(void) {
  const job_t job = join_job();
  test_context("pieces");
  pieces_cover_every_parameter_once(&job);
  test_context("memory");
  memory_is_a_formula(&job);
  test_context("tied");
  a_tied_parameter_is_one_parameter(&job);
  test_context("gathered and reduced");
  what_is_gathered_and_reduced(&job);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
