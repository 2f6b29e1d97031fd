/* Full parameters outside of an iteration: scopes that read and write them, streams of them and of
 * optimizer state, and starting from rank 0's values. All are compared with the unsharded reference.
 * Any world size up to 8. */
#include "ranks.h"
#include "train.h"

enum { ALL_UNITS = -1, STEPS = 2, BATCH = 2 };

static const net_t NET = {7, 13};

static void train(sharded_t *sharded, reference_t *reference, int step) {
  CHECK_OK(fsdp_engine_zero_grad(sharded->engine));
  reference_zero_grad(reference);
  sharded_backward(sharded, step, BATCH, NET_BONUS);
  for (int r = 0; r < sharded->world; r++) reference_backward(reference, r, step, BATCH, NET_BONUS);
  reference_reduce(reference);
  sharded_adam(sharded, step);
  reference_adam(reference, step);
}

static int64_t numel_of(const fsdp_tensor_t *t) {
  int64_t n = 1;
  for (int32_t d = 0; d < t->ndim; d++) n *= t->shape[d];
  return n;
}

/* A scope over all units: what it shows is the reference's; what is written is taken, or dropped. */
static void scope(const job_t *job, const fsdp_engine_config_t *config, int writeback,
                  int rank0_only, int with_grads) {
  fsdp_full_params_config_t how = FSDP_FULL_PARAMS_CONFIG_INIT;
  fsdp_full_params_t *full = NULL;
  char text[80];
  sharded_t *sharded = sharded_create(&NET, job->comm, WRAP_SOME, config);
  reference_t *reference = reference_create(&NET, job->world);
  if (config->shard_size != 0) reference->group = (int)config->shard_size;
  const int holds = !rank0_only || job->rank == 0;
  snprintf(text, sizeof text, "scope, strategy %d, writeback %d, rank 0 only %d, gradients %d",
           (int)config->strategy, writeback, rank0_only, with_grads);
  test_context(text);
  how.writeback = writeback;
  how.rank0_only = rank0_only;
  how.with_grads = with_grads;
  for (int step = 1; step <= STEPS; step++) {
    train(sharded, reference, step);
    CHECK_OK(fsdp_full_params_open(sharded->engine, NULL, 0, &how, &full));
    for (uint32_t p = 0; p < NET_PARAMS; p++) {
      fsdp_tensor_t t, grad;
      CHECK_OK(fsdp_full_params_data(full, p, &t));
      CHECK_OK(fsdp_full_params_grad(full, p, &grad));
      const int64_t n = net_numel(&NET, p);
      CHECK_EQ(numel_of(&t), n);
      CHECK(holds ? t.data != NULL : t.data == NULL);
      CHECK(holds && with_grads && reference->has_grad[p] ? grad.data != NULL : grad.data == NULL);
      for (int64_t i = 0; i < n; i++) {
        float *value = (float *)t.data, *g = (float *)grad.data;
        if (holds) CHECK(value[i] == reference->value[p][i]);
        if (g != NULL) CHECK(g[i] == reference->grad[p][i]);
        /* Each rank changes what it holds in its own way: its own piece, or rank 0's all, counts. */
        if (holds) value[i] += 0.25f;
        if (g != NULL) g[i] *= 2;
        if (writeback) reference->value[p][i] += 0.25f;
        if (writeback && with_grads) reference->grad[p][i] *= 2;
      }
    }
    void *buffer = NULL;
    CHECK_ERR(fsdp_engine_unshard(sharded->engine, 1, &buffer), FSDP_ERR_INVALID_STATE,
              "full parameters are open");
    CHECK_OK(fsdp_full_params_close(full));
    CHECK_OK(fsdp_full_params_close(full));
    fsdp_tensor_t t;
    CHECK_ERR(fsdp_full_params_data(full, 0, &t), FSDP_ERR_INVALID_STATE, "temperature");
    fsdp_full_params_destroy(full);
    sharded_check_shards(sharded, reference, text, step);
  }
  train(sharded, reference, STEPS + 1);
  sharded_check_full(sharded, reference, text);
  reference_destroy(reference);
  sharded_destroy(sharded);
}

/* A scope over one unit has no other; scopes do not nest; ranks must agree. */
static void one_unit(const job_t *job) {
  fsdp_full_params_config_t how = FSDP_FULL_PARAMS_CONFIG_INIT;
  fsdp_full_params_t *full = NULL, *second = NULL;
  fsdp_tensor_t t;
  void *buffer = NULL;
  test_context("scope of one unit");
  sharded_t *sharded = sharded_create(&NET, job->comm, WRAP_ALWAYS, NULL);
  const uint32_t unit = sharded->unit_of_module[NET_SHARED], none = 99;
  /* A forward without backward is ended by it. */
  CHECK_OK(fsdp_engine_unshard(sharded->engine, unit, &buffer));
  CHECK_OK(fsdp_full_params_open(sharded->engine, &unit, 1, NULL, &full));
  CHECK_OK(fsdp_full_params_data(full, NET_SHARED_WEIGHT, &t));
  CHECK(((float *)t.data)[3] == net_initial(NET_SHARED_WEIGHT, 3));
  CHECK_ERR(fsdp_full_params_data(full, NET_EMBED_WEIGHT, &t), FSDP_ERR_INVALID_ARGUMENT,
            "\"embed.weight\" of unit");
  CHECK_ERR(fsdp_full_params_data(full, NET_PARAMS, &t), FSDP_ERR_INVALID_ARGUMENT, "parameter 11");
  CHECK_ERR(fsdp_full_params_open(sharded->engine, NULL, 0, NULL, &second), FSDP_ERR_INVALID_STATE,
            "open already");
  CHECK(second == NULL);
  /* Destroyed while open: the engine goes on. */
  fsdp_full_params_destroy(full);
  CHECK_OK(fsdp_engine_unshard(sharded->engine, unit, &buffer));
  CHECK_OK(fsdp_engine_reduce(sharded->engine, unit));
  CHECK_ERR(fsdp_full_params_open(sharded->engine, NULL, 0, NULL, &full), FSDP_ERR_INVALID_STATE,
            "the backward has not ended");
  CHECK_OK(fsdp_engine_finish_backward(sharded->engine));
  CHECK_ERR(fsdp_full_params_open(sharded->engine, &none, 1, NULL, &full),
            FSDP_ERR_INVALID_ARGUMENT, "unit 99");
  CHECK_ERR(fsdp_full_params_open(sharded->engine, NULL, 2, NULL, &full), FSDP_ERR_INVALID_ARGUMENT,
            "unit_count is 2");
  CHECK_ERR(fsdp_full_params_open(sharded->engine, NULL, 0, NULL, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out is NULL");
  CHECK_ERR(fsdp_full_params_open(NULL, NULL, 0, NULL, &full), FSDP_ERR_INVALID_ARGUMENT, "NULL");
  CHECK_ERR(fsdp_full_params_close(NULL), FSDP_ERR_INVALID_ARGUMENT, "NULL");
  fsdp_full_params_destroy(NULL);
  how.writeback = job->rank == 0;
  if (job->world > 1) {
    CHECK_ERR(fsdp_full_params_open(sharded->engine, NULL, 0, &how, &full), FSDP_ERR_MISMATCH,
              "full parameters");
  }
  sharded_destroy(sharded);
}

typedef struct {
  const reference_t *reference;
  int calls, fail_at;
  uint32_t last;
} heard_t;

static int32_t hear(uint32_t param, const char *name, const char *state, const fsdp_tensor_t *t,
                    void *user_data) {
  heard_t *heard = (heard_t *)user_data;
  const reference_t *r = heard->reference;
  const float *values = (const float *)t->data;
  CHECK_EQ(numel_of(t), net_numel(&NET, param));
  if (param == NET_FC_BIAS) CHECK_STR(name, "block.fc.bias");
  for (int64_t i = 0; i < numel_of(t); i++) {
    if (state == NULL) CHECK(values[i] == r->value[param][i]);
    /* The momentum buffer after one step is the gradient. */
    if (state != NULL) CHECK(values[i] == r->grad[param][i]);
  }
  if (state != NULL) CHECK_STR(state, "momentum_buffer");
  return ++heard->calls == heard->fail_at ? 7 : 0;
}

static void streams(const job_t *job, const fsdp_engine_config_t *config) {
  fsdp_sgd_config_t sgd = FSDP_SGD_CONFIG_INIT;
  fsdp_optimizer_t *optimizer = NULL;
  test_context("streams");
  sharded_t *sharded = sharded_create(&NET, job->comm, WRAP_SOME, config);
  reference_t *reference = reference_create(&NET, job->world);
  if (config->shard_size != 0) reference->group = (int)config->shard_size;
  if (config->strategy == FSDP_NO_SHARD) reference->group = 1;
  sgd.lr = 0;
  sgd.momentum = 0.5;
  CHECK_OK(fsdp_optimizer_create_sgd(sharded->engine, &sgd, &optimizer));
  sharded_backward(sharded, 1, BATCH, NET_BONUS);
  for (int r = 0; r < job->world; r++) reference_backward(reference, r, 1, BATCH, NET_BONUS);
  reference_reduce(reference);
  CHECK_OK(fsdp_optimizer_step(optimizer));
  int with_grad = 0;
  for (uint32_t p = 0; p < NET_PARAMS; p++)
    with_grad += reference->has_grad[p] && net_numel(&NET, p) > 0;
  for (int rank0_only = 0; rank0_only < 2; rank0_only++) {
    const int hears = !rank0_only || job->rank == 0;
    heard_t heard = {reference, 0, -1, 0};
    CHECK_OK(fsdp_engine_full_state(sharded->engine, rank0_only, hear, &heard));
    CHECK_EQ(heard.calls, hears ? NET_PARAMS : 0);
    heard.calls = 0;
    CHECK_OK(fsdp_optimizer_full_state(optimizer, rank0_only, hear, &heard));
    CHECK_EQ(heard.calls, hears ? with_grad : 0);
    /* An error of rank 0 is everybody's, and nothing is broken by it. */
    heard.calls = 0;
    heard.fail_at = job->rank == 0 ? 3 : -1;
    CHECK_ERR(fsdp_engine_full_state(sharded->engine, rank0_only, hear, &heard), FSDP_ERR_CALLBACK,
              "rank 0: the full-state callback returned 7");
  }
  CHECK_ERR(fsdp_engine_full_state(sharded->engine, 0, NULL, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "fn_ is NULL");
  fsdp_optimizer_destroy(optimizer);
  reference_destroy(reference);
  sharded_destroy(sharded);
}

static int32_t own_values(const fsdp_module_init_t *init, void *user_data) {
  const float value = *(const float *)user_data;
  for (uint32_t i = 0; i < init->param_count; i++) {
    const fsdp_tensor_t *t = &init->tensors[i];
    for (int64_t e = 0; e < numel_of(t); e++) ((float *)t->data)[e] = value + (float)e;
  }
  return value < 0 ? 5 : 0;
}

/* Every rank has other values, or none; all start from rank 0's. */
static void from_rank_0(const job_t *job, const fsdp_engine_config_t *config, int stored,
                        int only_rank_0_stored, int fails) {
  enum { LAYERS = 2 };
  static float values[LAYERS][3000];
  const int64_t widths[LAYERS] = {3000, 5};
  fsdp_engine_config_t sync = *config;
  fsdp_engine_t *engine = NULL;
  fsdp_model_t *model = NULL;
  float value = fails && job->rank == 0 ? -1 : (float)(100 * job->rank + 1);
  char text[80];
  snprintf(text, sizeof text, "from rank 0, stored %d, only there %d", stored, only_rank_0_stored);
  test_context(text);
  CHECK_OK(fsdp_model_create("Stack", &model));
  for (uint32_t l = 0; l < LAYERS; l++) {
    char name[16];
    uint32_t module = 0, param = 0;
    for (int64_t e = 0; e < widths[l]; e++) values[l][e] = value + (float)e;
    const int here = only_rank_0_stored ? job->rank == 0 : stored;
    fsdp_tensor_t t = tensor_f32(here ? values[l] : NULL, 1, (int64_t *)(uintptr_t)&widths[l]);
    snprintf(name, sizeof name, "layer%u", (unsigned)l);
    CHECK_OK(fsdp_model_add_module(model, 0, name, "Layer", &module));
    CHECK_OK(fsdp_model_add_parameter(model, module, "weight", &t, 1, &param));
  }
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  sync.sync_module_states = 1;
  sync.param_init_fn = stored ? NULL : own_values;
  sync.param_init_user_data = stored ? NULL : &value;
  if (fails) {
    CHECK_ERR(fsdp_engine_create(model, job->comm, &sync, &engine), FSDP_ERR_CALLBACK, "rank 0: ");
    fsdp_model_destroy(model);
    return;
  }
  CHECK_OK(fsdp_engine_create(model, job->comm, &sync, &engine));
  fsdp_model_destroy(model);
  for (uint32_t p = 0; p < LAYERS; p++) {
    fsdp_tensor_t t;
    void *buffer = NULL;
    CHECK_OK(fsdp_engine_unshard(engine, p + 1, &buffer));
    CHECK_OK(fsdp_engine_param_data(engine, p, &t));
    for (int64_t e = 0; e < widths[p]; e++) CHECK(((float *)t.data)[e] == (float)(1 + e));
  }
  fsdp_engine_destroy(engine);
}

int main(void) {
  const job_t job = join_job();
  fsdp_engine_config_t configs[3] = {FSDP_ENGINE_CONFIG_INIT, FSDP_ENGINE_CONFIG_INIT,
                                     FSDP_ENGINE_CONFIG_INIT};
  configs[1].strategy = FSDP_SHARD_GRAD_OP;
  configs[2].strategy = FSDP_HYBRID_SHARD;
  configs[2].shard_size = 2;
  for (int c = 0; c < (job.world % 2 == 0 ? 3 : 2); c++) {
    for (int bits = 0; bits < 8; bits++) scope(&job, &configs[c], bits & 1, bits >> 1 & 1, bits >> 2);
    streams(&job, &configs[c]);
    from_rank_0(&job, &configs[c], 1, 0, 0);
    from_rank_0(&job, &configs[c], 0, 0, 0);
    from_rank_0(&job, &configs[c], 1, 1, 0);
    from_rank_0(&job, &configs[c], 0, 0, 1);
  }
  one_unit(&job);
  fsdp_comm_destroy(job.comm);
  return 0;
}
