/* Communication hooks: what they see, that what they write is what is reduced, and that a failing
 * one ends every rank's backward with its message. Any world size up to 8. */
#include "ranks.h"
#include "train.h"

enum { BATCH = 3 };

/* A sharded net that reduces in bfloat16 or in float32. */
static sharded_t *net_reduced_in(const net_t *net, fsdp_comm_t *comm, int bfloat16) {
  const fsdp_dtype_t dtype = {FSDP_DTYPE_BFLOAT, 16, 1};
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  if (bfloat16) config.reduce_dtype = dtype;
  return sharded_create(net, comm, WRAP_SOME, &config);
}

/* To the nearest bfloat16, ties to even; finite numbers. */
static float as_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static int32_t round_all(const fsdp_unit_gradients_t *unit, void *user_data) {
  (void)user_data;
  for (uint32_t i = 0; i < unit->count; i++) {
    const fsdp_full_gradient_t *g = &unit->gradients[i];
    for (int64_t k = 0; k < g->numel; k++) g->data[k] = as_bfloat16(g->data[k]);
  }
  return 0;
}

static int32_t multiply(const fsdp_unit_gradients_t *unit, void *factor) {
  for (uint32_t i = 0; i < unit->count; i++) {
    const fsdp_full_gradient_t *g = &unit->gradients[i];
    for (int64_t k = 0; k < g->numel; k++) g->data[k] *= *(const float *)factor;
  }
  return 0;
}

/* Rounding in a hook is what reduce_dtype does. */
static void compression(const job_t *job) {
  const net_t net = {7, 13};
  sharded_t *hooked = net_reduced_in(&net, job->comm, 0);
  sharded_t *rounded = net_reduced_in(&net, job->comm, 1);
  int differs = 0;
  test_context("a hook that rounds to bfloat16");
  CHECK_OK(fsdp_engine_set_comm_hook(hooked->engine, round_all, NULL));
  for (int step = 1; step <= 3; step++) {
    sharded_backward(hooked, step, BATCH, NET_BONUS);
    sharded_backward(rounded, step, BATCH, NET_BONUS);
    for (uint32_t p = 0; p < NET_PARAMS; p++) {
      fsdp_shard_t a, b;
      CHECK_OK(fsdp_engine_shard(hooked->engine, p, &a));
      CHECK_OK(fsdp_engine_shard(rounded->engine, p, &b));
      CHECK((a.grad == NULL) == (b.grad == NULL));
      CHECK(a.grad == NULL || memcmp(a.grad, b.grad, sizeof(float) * (size_t)a.numel) == 0);
      for (int64_t k = 0; a.grad != NULL && k < a.numel; k++) differs |= a.grad[k] != 0;
    }
  }
  CHECK(differs || job->world > 8);
  sharded_destroy(rounded);
  sharded_destroy(hooked);
}

/* Twice the gradients; the same as ever without the hook. */
static void scaling(const job_t *job) {
  const net_t net = {7, 13};
  const float two = 2;
  sharded_t *sharded = sharded_create(&net, job->comm, WRAP_ALWAYS, NULL);
  reference_t *reference = reference_create(&net, job->world);
  test_context("a hook that scales");
  for (int step = 1; step <= 3; step++) {
    CHECK_OK(fsdp_engine_zero_grad(sharded->engine));
    reference_zero_grad(reference);
    CHECK_OK(fsdp_engine_set_comm_hook(sharded->engine, step == 3 ? NULL : multiply,
                                       (void *)(uintptr_t)&two));
    sharded_backward(sharded, step, BATCH, 0);
    for (int r = 0; r < sharded->world; r++) reference_backward(reference, r, step, BATCH, 0);
    reference_reduce(reference);
    for (uint32_t p = 0; step != 3 && p < NET_PARAMS; p++)
      for (int64_t k = 0; k < net_numel(&net, p); k++) reference->grad[p][k] *= two;
    sharded_check_shards(sharded, reference, "twice", step);
  }
  reference_destroy(reference);
  sharded_destroy(sharded);
}

typedef struct {
  fsdp_engine_t *engine;
  int calls;
  uint32_t unit, count, params[4];
  char name[16];
  float first;
} seen_t;

static int32_t look(const fsdp_unit_gradients_t *unit, void *user_data) {
  seen_t *seen = (seen_t *)user_data;
  fsdp_unit_info_t info = unit_info_init();
  CHECK(unit->struct_size >= sizeof *unit);
  seen->calls++;
  seen->unit = unit->unit;
  seen->count = unit->count;
  snprintf(seen->name, sizeof seen->name, "%s", unit->name);
  for (uint32_t i = 0; i < unit->count && i < 4; i++) seen->params[i] = unit->gradients[i].param;
  seen->first = unit->gradients[0].data[0];
  /* The engine is locked: refused, not waited for. */
  CHECK_ERR(fsdp_engine_zero_grad(seen->engine), FSDP_ERR_INVALID_STATE, "hook");
  CHECK_ERR(fsdp_engine_unit_info(seen->engine, 0, &info), FSDP_ERR_INVALID_STATE, "hook");
  return 0;
}

/* One call a reduction, with what is there: names, numbers, sums of all uses. */
static void what_is_seen(const job_t *job) {
  int64_t width = 37;
  float values[37] = {0};
  fsdp_tensor_t t = tensor_f32(values, 1, &width);
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  uint32_t module = 0, param = 0;
  seen_t seen;
  void *buffer = NULL;
  test_context("what a hook sees");
  memset(&seen, 0, sizeof seen);
  CHECK_OK(fsdp_model_create("Net", &model));
  CHECK_OK(fsdp_model_add_parameter(model, 0, "root", &t, 1, &param));
  CHECK_OK(fsdp_model_add_module(model, 0, "block", "Block", &module));
  for (int i = 0; i < 3; i++) {
    const char *const names[3] = {"a", "b", "c"};
    CHECK_OK(fsdp_model_add_parameter(model, module, names[i], &t, 1, &param));
  }
  CHECK_OK(fsdp_model_wrap_class(model, "Block"));
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine));
  fsdp_model_destroy(model);
  seen.engine = engine;
  CHECK_OK(fsdp_engine_set_comm_hook(engine, look, &seen));

  CHECK_OK(fsdp_engine_unshard(engine, 1, &buffer));
  CHECK_OK(stack_add_grad(engine, 1, 1));
  CHECK_OK(stack_add_grad(engine, 3, 2));
  CHECK_OK(stack_add_grad(engine, 3, 5));
  CHECK_EQ(seen.calls, 0);
  CHECK_OK(fsdp_engine_reduce(engine, 1));
  CHECK_EQ(seen.calls, 1);
  CHECK_EQ(seen.unit, 1);
  CHECK_STR(seen.name, "block");
  CHECK_EQ(seen.count, 2);
  CHECK_EQ(seen.params[0], 1);
  CHECK_EQ(seen.params[1], 3);
  CHECK(seen.first == 1);
  /* Again in the same backward: what came since. The root has gradients on rank 0 only. */
  CHECK_OK(stack_add_grad(engine, 3, 11));
  if (job->rank == 0) CHECK_OK(stack_add_grad(engine, 0, 4));
  CHECK_OK(fsdp_engine_reduce(engine, 1));
  CHECK_EQ(seen.calls, 2);
  CHECK_EQ(seen.count, 1);
  CHECK_EQ(seen.params[0], 3);
  CHECK(seen.first == 11);
  CHECK_OK(fsdp_engine_finish_backward(engine));
  CHECK_EQ(seen.calls, job->rank == 0 ? 3 : 2);
  if (job->rank == 0) CHECK_STR(seen.name, "");
  for (uint32_t p = 0; p < 4; p++) {
    const float want[4] = {4.0f / (float)job->world, 1, 0, 18};
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_shard(engine, p, &shard));
    CHECK((shard.grad == NULL) == (p == 2));
    for (int64_t k = 0; shard.grad != NULL && k < shard.numel; k++) CHECK(shard.grad[k] == want[p]);
  }
  fsdp_engine_destroy(engine);
}

static int32_t fail(const fsdp_unit_gradients_t *unit, void *user_data) {
  (void)user_data;
  return unit->unit == 2 ? 42 : 0;
}

/* The last rank's hook fails at unit 2; the others are told instead of waiting, in every shard
 * group. Last: the communicator is broken afterwards. */
static void failure(const job_t *job) {
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_model_t *model = stack_model(3, 5, 1);
  fsdp_engine_t *engine = NULL;
  config.strategy = job->world == 4   ? FSDP_HYBRID_SHARD
                    : job->world == 2 ? FSDP_NO_SHARD
                                      : FSDP_FULL_SHARD;
  config.shard_size = job->world == 4 ? 2 : 0;
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &engine));
  fsdp_model_destroy(model);
  const int fails = job->rank == job->world - 1;
  fsdp_status_t status = FSDP_OK;
  test_context("a hook that fails");
  if (fails) CHECK_OK(fsdp_engine_set_comm_hook(engine, fail, NULL));
  for (uint32_t unit = 1; unit <= 3; unit++) {
    void *buffer = NULL;
    CHECK_OK(fsdp_engine_unshard(engine, unit, &buffer));
  }
  CHECK_OK(fsdp_comm_barrier(job->comm));
  for (uint32_t unit = 3; unit >= 1 && status == FSDP_OK; unit--) {
    status = stack_add_grad(engine, unit - 1, 1);
    if (status != FSDP_OK) break;
    if (fails && unit == 2) {
      CHECK_ERR(fsdp_engine_reduce(engine, unit), FSDP_ERR_CALLBACK, "unit \"layer1\"");
      CHECK(strstr(fsdp_last_error_message(), "42") != NULL);
      break;
    }
    status = fsdp_engine_reduce(engine, unit);
  }
  CHECK_ERR(fsdp_engine_finish_backward(engine), FSDP_ERR_ABORTED, "unit \"layer1\"");
  fsdp_engine_destroy(engine);
}

int main(void) {
  const job_t job = join_job();
  if (!sums_are_narrow()) compression(&job);
  scaling(&job);
  what_is_seen(&job);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  /* What blocks in the tests' own lent collectives learns of an abort as their failure. */
  if (!comm_is("host")) failure(&job);
  fsdp_comm_destroy(job.comm);
  return 0;
}
