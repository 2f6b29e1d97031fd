/* The gradient scaler: a value that is not finite on one rank makes every rank skip the step, the
 * scale follows torch.amp.GradScaler's (the table is what it gives), and steps that are made are
 * those of an unscaled run. Any world size up to 8. */
#include "ranks.h"

#include <math.h>

enum { WIDTH = 203 };

/* Whether a gradient is infinite, and the scale and the tracker after the update: growth_factor 3,
 * backoff_factor 0.25, growth_interval 2, scale 8 at first. */
static const struct {
  int infinite;
  double scale;
  uint64_t tracker;
} TABLE[] = {
    {0, 8.0, 1}, {0, 24.0, 0}, {1, 6.0, 0}, {0, 6.0, 1}, {1, 1.5, 0},
    {1, 0.375, 0}, {0, 0.375, 1}, {0, 1.125, 0}, {0, 1.125, 1}, {0, 3.375, 0},
};
enum { STEPS = sizeof TABLE / sizeof TABLE[0] };

static double scale_of(const fsdp_grad_scaler_t *scaler) {
  double scale = -1;
  CHECK_OK(fsdp_grad_scaler_scale(scaler, &scale));
  return scale;
}

static fsdp_grad_scaler_config_t state_of(const fsdp_grad_scaler_t *scaler) {
  fsdp_grad_scaler_config_t state;
  memset(&state, 0, sizeof state);
  state.struct_size = sizeof state;
  CHECK_OK(fsdp_grad_scaler_get_state(scaler, &state));
  return state;
}

/* Gradients of 2^(step) times the scale; on one rank, one element is `bad` if that is not 0. */
static void backward(const job_t *job, fsdp_engine_t *engine, double scale, int step, float bad) {
  void *buffer = NULL;
  CHECK_OK(fsdp_engine_zero_grad(engine));
  for (uint32_t unit = 1; unit <= 2; unit++) {
    CHECK_OK(fsdp_engine_unshard(engine, unit, &buffer));
    CHECK_OK(stack_add_grad(engine, unit - 1, (float)(ldexp(1, step) * scale)));
  }
  if (bad != 0 && job->rank == step % job->world) {
    fsdp_tensor_t out;
    int32_t accumulate = 0;
    CHECK_OK(fsdp_engine_param_grad(engine, (uint32_t)step % 2, &out, &accumulate));
    ((float *)out.data)[(step * 31) % WIDTH] = bad;
  }
  CHECK_OK(fsdp_engine_finish_backward(engine));
}

/* Every element of every parameter's piece has this value. */
static void check_values(fsdp_engine_t *engine, float want) {
  for (uint32_t p = 0; p < 2; p++) {
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_shard(engine, p, &shard));
    for (int64_t i = 0; i < shard.numel; i++) CHECK(shard.data[i] == want);
  }
}

/* `own` 0: the engine's SGD steps; 1: the host does, on the engine's gradients; 2: on its own. */
static void sequence(const job_t *job, int own, int32_t strategy, uint32_t shard_size) {
  fsdp_engine_config_t engine_config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_model_t *model = stack_model(2, WIDTH, 1);
  fsdp_engine_t *engine = NULL;
  engine_config.strategy = strategy;
  engine_config.shard_size = shard_size;
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  CHECK_OK(fsdp_engine_create(model, job->comm, &engine_config, &engine));
  fsdp_model_destroy(model);
  fsdp_optimizer_t *optimizer = NULL;
  fsdp_sgd_config_t sgd = FSDP_SGD_CONFIG_INIT;
  fsdp_grad_scaler_config_t config = FSDP_GRAD_SCALER_CONFIG_INIT;
  fsdp_grad_scaler_t *scaler = NULL;
  float want = 1;
  test_context(own == 0 ? "fused" : own == 1 ? "a host's optimizer" : "a host's gradients");
  sgd.lr = 1;
  config.scale = 8;
  config.growth_factor = 3;
  config.backoff_factor = 0.25;
  config.growth_interval = 2;
  CHECK_OK(fsdp_optimizer_create_sgd(engine, &sgd, &optimizer));
  CHECK_OK(fsdp_grad_scaler_create(&config, &scaler));
  for (int step = 0; step < STEPS; step++) {
    static float memory[2][WIDTH];
    float *pieces[2] = {memory[0], memory[1]};
    int32_t made = -1, found = -1;
    if (step == STEPS / 2) {
      /* Another process goes on from a checkpoint. */
      const fsdp_grad_scaler_config_t saved = state_of(scaler);
      fsdp_grad_scaler_destroy(scaler);
      CHECK_OK(fsdp_grad_scaler_create(NULL, &scaler));
      CHECK(scale_of(scaler) == 65536);
      CHECK_OK(fsdp_grad_scaler_set_state(scaler, &saved));
    }
    const int infinite = TABLE[step].infinite;
    const float bad = !infinite ? 0 : step % 3 == 0 ? NAN : step % 3 == 1 ? -INFINITY : INFINITY;
    backward(job, engine, scale_of(scaler), step, bad);
    for (uint32_t p = 0; own == 2 && p < 2; p++) {
      fsdp_shard_t shard;
      CHECK_OK(fsdp_engine_shard(engine, p, &shard));
      memcpy(memory[p], shard.grad, sizeof(float) * (size_t)shard.numel);
    }
    /* With a look at the unscaled gradients in between, and without. */
    if (step % 2 == 0) {
      CHECK_OK(fsdp_grad_scaler_unscale(scaler, engine, own == 2 ? pieces : NULL, 2, &found));
      CHECK_EQ(found, infinite);
      CHECK_ERR(fsdp_grad_scaler_unscale(scaler, engine, own == 2 ? pieces : NULL, 2, &found),
                FSDP_ERR_INVALID_STATE, "already");
    }
    if (own == 0)
      CHECK_OK(fsdp_grad_scaler_step(scaler, optimizer, &made));
    else
      CHECK_OK(fsdp_grad_scaler_may_step(scaler, engine, own == 2 ? pieces : NULL, 2, &made));
    CHECK_EQ(made, !infinite);
    for (uint32_t p = 0; own != 0 && made && p < 2; p++) {
      fsdp_shard_t shard;
      CHECK_OK(fsdp_engine_shard(engine, p, &shard));
      for (int64_t i = 0; i < shard.numel; i++)
        shard.data[i] -= own == 2 ? pieces[p][i] : shard.grad[i];
    }
    if (!infinite) want -= ldexpf(1, step);
    /* The scale's inverse is rounded: 24 and 3 are no powers of two. */
    for (uint32_t p = 0; p < 2; p++) {
      fsdp_shard_t shard;
      CHECK_OK(fsdp_engine_shard(engine, p, &shard));
      for (int64_t i = 0; i < shard.numel; i++) CHECK(fabsf(shard.data[i] - want) < 1e-3f);
    }
    CHECK_ERR(fsdp_grad_scaler_step(scaler, optimizer, &made), FSDP_ERR_INVALID_STATE, "already");
    CHECK_ERR(fsdp_grad_scaler_unscale(scaler, engine, NULL, 0, &found), FSDP_ERR_INVALID_STATE,
              "after the step");
    CHECK_OK(fsdp_grad_scaler_update(scaler));
    const fsdp_grad_scaler_config_t state = state_of(scaler);
    CHECK(state.scale == TABLE[step].scale && scale_of(scaler) == state.scale);
    CHECK_EQ(state.growth_tracker, TABLE[step].tracker);
    CHECK(state.growth_factor == 3 && state.backoff_factor == 0.25);
    CHECK_EQ(state.growth_interval, 2);
    CHECK_EQ(state.enabled, 1);
    CHECK_ERR(fsdp_grad_scaler_update(scaler), FSDP_ERR_INVALID_STATE, "unscaled");
  }
  fsdp_grad_scaler_destroy(scaler);
  fsdp_optimizer_destroy(optimizer);
  fsdp_engine_destroy(engine);
}

static void not_enabled(const job_t *job) {
  fsdp_engine_t *engine = stack_engine(job->comm, 2, WIDTH, 1);
  fsdp_optimizer_t *optimizer = NULL;
  fsdp_sgd_config_t sgd = FSDP_SGD_CONFIG_INIT;
  fsdp_grad_scaler_config_t config = FSDP_GRAD_SCALER_CONFIG_INIT;
  fsdp_grad_scaler_t *scaler = NULL;
  int32_t made = 0, found = 1;
  test_context("a scaler that is not enabled");
  sgd.lr = 1;
  config.enabled = 0;
  CHECK_OK(fsdp_optimizer_create_sgd(engine, &sgd, &optimizer));
  CHECK_OK(fsdp_grad_scaler_create(&config, &scaler));
  CHECK(scale_of(scaler) == 1);
  backward(job, engine, scale_of(scaler), 1, 0);
  CHECK_OK(fsdp_grad_scaler_unscale(scaler, engine, NULL, 0, &found));
  CHECK_EQ(found, 0);
  CHECK_OK(fsdp_grad_scaler_step(scaler, optimizer, &made));
  CHECK_EQ(made, 1);
  CHECK_OK(fsdp_grad_scaler_update(scaler));
  check_values(engine, -1);
  config.enabled = 1;
  CHECK_ERR(fsdp_grad_scaler_set_state(scaler, &config), FSDP_ERR_INVALID_ARGUMENT, "enabled");
  fsdp_grad_scaler_destroy(scaler);
  fsdp_optimizer_destroy(optimizer);
  fsdp_engine_destroy(engine);
}

static void misuse(const job_t *job) {
  fsdp_engine_t *engine = stack_engine(job->comm, 2, WIDTH, 1);
  fsdp_grad_scaler_config_t config = FSDP_GRAD_SCALER_CONFIG_INIT;
  fsdp_grad_scaler_t *scaler = NULL;
  int32_t found = -1;
  void *buffer = NULL;
  float *none[1] = {NULL};
  test_context("misuse");
  const struct {
    double scale, growth, backoff;
    uint64_t interval;
    const char *name;
  } bad[] = {{0, 2, 0.5, 1, "scale"},
             {NAN, 2, 0.5, 1, "scale"},
             {1, 1, 0.5, 1, "growth_factor"},
             {1, 2, 1, 1, "backoff_factor"},
             {1, 2, 0.5, 0, "growth_interval"}};
  for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
    config.scale = bad[i].scale;
    config.growth_factor = bad[i].growth;
    config.backoff_factor = bad[i].backoff;
    config.growth_interval = bad[i].interval;
    CHECK_ERR(fsdp_grad_scaler_create(&config, &scaler), FSDP_ERR_INVALID_ARGUMENT, bad[i].name);
    CHECK(scaler == NULL);
  }
  CHECK_ERR(fsdp_grad_scaler_create(NULL, NULL), FSDP_ERR_INVALID_ARGUMENT, "out");
  CHECK_OK(fsdp_grad_scaler_create(NULL, &scaler));
  CHECK_ERR(fsdp_grad_scaler_scale(scaler, NULL), FSDP_ERR_INVALID_ARGUMENT, "out");
  CHECK_ERR(fsdp_grad_scaler_unscale(scaler, engine, none, 1, &found), FSDP_ERR_INVALID_ARGUMENT,
            "1 pieces");
  CHECK_ERR(fsdp_grad_scaler_unscale(scaler, NULL, NULL, 0, &found), FSDP_ERR_INVALID_ARGUMENT,
            "engine");
  CHECK_OK(fsdp_engine_unshard(engine, 1, &buffer));
  CHECK_OK(stack_add_grad(engine, 0, 1));
  CHECK_ERR(fsdp_grad_scaler_unscale(scaler, engine, NULL, 0, &found), FSDP_ERR_INVALID_STATE,
            "backward has ended");
  CHECK_OK(fsdp_engine_finish_backward(engine));

  /* Ranks that have different scales all learn so, and no gradient has changed. */
  fsdp_grad_scaler_config_t state = state_of(scaler);
  if (job->rank == job->world - 1) state.scale = 2;
  CHECK_OK(fsdp_grad_scaler_set_state(scaler, &state));
  if (job->world > 1) {
    fsdp_shard_t shard;
    CHECK_ERR(fsdp_grad_scaler_unscale(scaler, engine, NULL, 0, &found), FSDP_ERR_MISMATCH,
              "from 2 to 65536");
    CHECK_OK(fsdp_engine_shard(engine, 0, &shard));
    for (int64_t i = 0; i < shard.numel; i++) CHECK(shard.grad[i] == 1);
  }
  state.scale = 4;
  CHECK_OK(fsdp_grad_scaler_set_state(scaler, &state));
  CHECK_OK(fsdp_grad_scaler_unscale(scaler, engine, NULL, 0, &found));
  CHECK_ERR(fsdp_grad_scaler_set_state(scaler, &state), FSDP_ERR_INVALID_STATE, "update");
  CHECK_OK(fsdp_grad_scaler_update(scaler));
  fsdp_grad_scaler_destroy(scaler);
  CHECK_ERR(fsdp_grad_scaler_update(scaler), FSDP_ERR_INVALID_HANDLE, "scaler");
  fsdp_grad_scaler_destroy(NULL);
  fsdp_engine_destroy(engine);
}

int main(void) {
  const job_t job = join_job();
  for (int own = 0; own < 3; own++) sequence(&job, own, FSDP_FULL_SHARD, 0);
  sequence(&job, 0, FSDP_NO_SHARD, 0);
  if (job.world == 4) sequence(&job, 0, FSDP_HYBRID_SHARD, 2);
  not_enabled(&job);
  misuse(&job);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
