/* The functions of fsdp_optimizer_t, at world size 1: good calls, NULLs, bad options, wrong states
 * and handles, use after destroy. What they compute on several ranks is in feature_optim.c. */
#include "toy.h"

#include <unistd.h>

static const fsdp_status_t BAD = FSDP_ERR_INVALID_ARGUMENT;

static void a_step(toy_t toy) {
  toy_forward(toy.engine);
  toy_backward(toy.engine, 1);
}

static void good_calls(void) {
  toy_t toy = toy_create();
  fsdp_optimizer_t *optimizer = NULL;
  fsdp_sgd_config_t config = FSDP_SGD_CONFIG_INIT;
  double lr = 0;
  uint64_t steps = 99;
  float *state = (float *)(uintptr_t)16;
  config.lr = 2;
  config.momentum = 0.5;
  CHECK_OK(fsdp_optimizer_create_sgd(toy.engine, &config, &optimizer));
  CHECK_OK(fsdp_optimizer_get_lr(optimizer, &lr));
  CHECK(lr == 2);
  CHECK_OK(fsdp_optimizer_state(optimizer, TOY_BIAS, "momentum_buffer", &state));
  CHECK(state == NULL);
  /* No gradient, nothing to do. */
  CHECK_OK(fsdp_optimizer_step(optimizer));
  CHECK_OK(fsdp_optimizer_step_count(optimizer, TOY_BIAS, &steps));
  CHECK_EQ(steps, 0);

  a_step(toy);
  CHECK_OK(fsdp_optimizer_set_lr(optimizer, 4));
  CHECK_OK(fsdp_optimizer_get_lr(optimizer, &lr));
  CHECK(lr == 4);
  CHECK_OK(fsdp_optimizer_set_param_options(optimizer, TOY_V, 0.5, 0));
  CHECK_OK(fsdp_optimizer_step(optimizer));
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    const fsdp_shard_t shard = toy_shard(toy.engine, p);
    const float less = p == TOY_FROZEN ? 0 : p == TOY_V ? 2 : 4;
    for (int64_t i = 0; i < shard.numel; i++) CHECK(shard.data[i] == toy_value(p, i) - less);
    CHECK_OK(fsdp_optimizer_step_count(optimizer, p, &steps));
    CHECK_EQ(steps, p != TOY_FROZEN && p != TOY_EMPTY);
    CHECK_OK(fsdp_optimizer_state(optimizer, p, "momentum_buffer", &state));
    CHECK((state == NULL) == (steps == 0));
    for (int64_t i = 0; state != NULL && i < shard.numel; i++) CHECK(state[i] == 1);
  }
  /* The gradient stays. */
  CHECK(toy_shard(toy.engine, TOY_BIAS).grad[0] == 1);

  /* A second optimizer, with the defaults, on the same engine; the engine is destroyed first. */
  fsdp_optimizer_t *other = NULL;
  CHECK_OK(fsdp_optimizer_create_adamw(toy.engine, NULL, &other));
  CHECK_OK(fsdp_optimizer_get_lr(other, &lr));
  CHECK(lr == 1e-3);
  CHECK_OK(fsdp_optimizer_step(other));
  fsdp_optimizer_destroy(optimizer);
  toy_destroy(toy);
  CHECK_OK(fsdp_optimizer_step(other));
  CHECK_OK(fsdp_optimizer_step_count(other, TOY_WEIGHT, &steps));
  CHECK_EQ(steps, 2);
  fsdp_optimizer_destroy(other);
  CHECK_OK(fsdp_optimizer_create_sgd((toy = toy_create()).engine, NULL, &optimizer));
  fsdp_optimizer_destroy(optimizer);
  toy_destroy(toy);
  fsdp_optimizer_destroy(NULL);
}

/* Creates with one field set to `value`; the message names `text`. */
#define CHECK_SGD(field, value, text) \
  do { \
    fsdp_sgd_config_t config_ = FSDP_SGD_CONFIG_INIT; \
    config_.field = (value); \
    CHECK_ERR(fsdp_optimizer_create_sgd(toy.engine, &config_, &optimizer), BAD, text); \
  } while (0)
#define CHECK_ADAMW(field, value, text) \
  do { \
    fsdp_adamw_config_t config_ = FSDP_ADAMW_CONFIG_INIT; \
    config_.field = (value); \
    CHECK_ERR(fsdp_optimizer_create_adamw(toy.engine, &config_, &optimizer), BAD, text); \
  } while (0)

static void bad_options(void) {
  toy_t toy = toy_create();
  fsdp_optimizer_t *const untouched = NO_SUCH_HANDLE(fsdp_optimizer_t);
  fsdp_optimizer_t *optimizer = untouched;
  const double zero = 0, nan = zero / zero, infinite = 1 / zero;
  CHECK_SGD(lr, -0.1, "lr cannot be -0.1");
  CHECK_SGD(lr, nan, "lr cannot be NaN");
  CHECK_SGD(momentum, -1, "momentum cannot be -1");
  CHECK_SGD(dampening, nan, "dampening cannot be NaN");
  CHECK_SGD(weight_decay, -1, "weight_decay cannot be -1");
  CHECK_SGD(nesterov, 1, "nesterov needs a momentum");
  CHECK_SGD(struct_size, 8, "fsdp_sgd_config_t.struct_size is 8");
  CHECK_ADAMW(lr, infinite, "lr cannot be inf");
  CHECK_ADAMW(beta1, 1, "beta1 cannot be 1");
  CHECK_ADAMW(beta2, -0.5, "beta2 cannot be -0.5");
  CHECK_ADAMW(beta2, nan, "beta2 cannot be NaN");
  CHECK_ADAMW(eps, -1e-8, "eps cannot be");
  CHECK_ADAMW(weight_decay, nan, "weight_decay cannot be NaN");
  CHECK_ADAMW(struct_size, 0, "fsdp_adamw_config_t.struct_size is 0");
  CHECK(optimizer == untouched);
  CHECK_ERR(fsdp_optimizer_create_sgd(toy.engine, NULL, NULL), BAD, "out is NULL");
  CHECK_ERR(fsdp_optimizer_create_adamw(toy.engine, NULL, NULL), BAD, "out is NULL");

  double lr = 7;
  uint64_t steps = 99;
  float *state = NULL;
  CHECK_OK(fsdp_optimizer_create_sgd(toy.engine, NULL, &optimizer));
  CHECK_ERR(fsdp_optimizer_set_lr(optimizer, -1), BAD, "lr cannot be -1");
  CHECK_ERR(fsdp_optimizer_set_lr(optimizer, nan), BAD, "lr cannot be NaN");
  CHECK_OK(fsdp_optimizer_get_lr(optimizer, &lr));
  CHECK(lr == 1e-3);
  CHECK_ERR(fsdp_optimizer_get_lr(optimizer, NULL), BAD, "out is NULL");
  CHECK_ERR(fsdp_optimizer_set_param_options(optimizer, 0, -1, 0), BAD, "lr_factor cannot be -1");
  CHECK_ERR(fsdp_optimizer_set_param_options(optimizer, 0, 1, nan), BAD, "weight_decay cannot be");
  CHECK_ERR(fsdp_optimizer_set_param_options(optimizer, TOY_PARAMS, 1, 0), BAD, "parameter 5");
  CHECK_ERR(fsdp_optimizer_step_count(optimizer, TOY_PARAMS, &steps), BAD, "parameter 5");
  CHECK_ERR(fsdp_optimizer_step_count(optimizer, 0, NULL), BAD, "out is NULL");
  CHECK_EQ(steps, 99);
  CHECK_ERR(fsdp_optimizer_state(optimizer, 0, "exp_avg", &state), BAD,
            "sgd has no state \"exp_avg\"");
  CHECK_ERR(fsdp_optimizer_state(optimizer, 0, NULL, &state), BAD, "name is NULL");
  CHECK_ERR(fsdp_optimizer_state(optimizer, 0, "exp_avg", NULL), BAD, "out_data is NULL");
  CHECK_ERR(fsdp_optimizer_save(optimizer, NULL, NULL, 0, NULL, 0), BAD, "dir is NULL");
  CHECK_ERR(fsdp_optimizer_save(optimizer, "x", NULL, 1, NULL, 0), BAD, "states is NULL");
  CHECK_ERR(fsdp_optimizer_save(optimizer, "x", NULL, 0, NULL, 1), BAD, "metadata is NULL");
  CHECK_ERR(fsdp_optimizer_load(optimizer, NULL, NULL, 0), BAD, "dir is NULL");
  CHECK_ERR(fsdp_optimizer_load(optimizer, "x", NULL, 1), BAD, "states is NULL");
  fsdp_metadata_t text;
  text.key = "fsdp.optimizer";
  text.value = "";
  CHECK_ERR(fsdp_optimizer_save(optimizer, "x", NULL, 0, &text, 1), BAD, "\"fsdp.optimizer\"");
  CHECK(access("x", F_OK) != 0);
  fsdp_optimizer_destroy(optimizer);
  toy_destroy(toy);
}

static void not_in_the_middle_of_a_backward(void) {
  toy_t toy = toy_create();
  fsdp_optimizer_t *optimizer = NULL;
  uint64_t steps = 99;
  CHECK_OK(fsdp_optimizer_create_adamw(toy.engine, NULL, &optimizer));
  toy_forward(toy.engine);
  CHECK_OK(fsdp_engine_pre_backward(toy.engine, TOY_ROOT));
  toy_add_grad(toy.engine, TOY_BIAS, 1);
  CHECK_ERR(fsdp_optimizer_step(optimizer), FSDP_ERR_INVALID_STATE, "backward has not ended");
  CHECK_OK(fsdp_engine_post_backward(toy.engine, TOY_ROOT));
  CHECK_OK(fsdp_optimizer_step(optimizer));
  CHECK_OK(fsdp_optimizer_step_count(optimizer, TOY_BIAS, &steps));
  CHECK_EQ(steps, 1);
  fsdp_optimizer_destroy(optimizer);
  toy_destroy(toy);
}

/* What is saved can be loaded; what was not saved by an optimizer cannot, and says so. */
static void checkpoints(void) {
  toy_t toy = toy_create();
  fsdp_optimizer_t *optimizer = NULL, *other = NULL;
  const char *tmp = getenv("TMPDIR") == NULL ? "/tmp" : getenv("TMPDIR");
  char good[256], bare[256], command[600];
  float value, *state = NULL;
  uint64_t steps = 99;
  snprintf(good, sizeof good, "%s/fsdp_api_optim_%ld_good", tmp, (long)getpid());
  snprintf(bare, sizeof bare, "%s/fsdp_api_optim_%ld_bare", tmp, (long)getpid());
  CHECK_OK(fsdp_optimizer_create_adamw(toy.engine, NULL, &optimizer));
  CHECK_OK(fsdp_optimizer_create_sgd(toy.engine, NULL, &other));
  a_step(toy);
  CHECK_OK(fsdp_optimizer_step(optimizer));
  value = toy_shard(toy.engine, TOY_WEIGHT).data[20];
  CHECK_OK(fsdp_optimizer_save(optimizer, good, NULL, 0, NULL, 0));
  CHECK_ERR(fsdp_optimizer_save(optimizer, good, NULL, 0, NULL, 0), FSDP_ERR_CHECKPOINT, "exists");
  CHECK_OK(fsdp_checkpoint_save(toy.engine, bare, NULL, 0, NULL, 0));
  CHECK_OK(fsdp_optimizer_step(optimizer));
  CHECK_ERR(fsdp_optimizer_load(optimizer, bare, NULL, 0), FSDP_ERR_CHECKPOINT,
            "without an optimizer");
  CHECK_ERR(fsdp_optimizer_load(other, good, NULL, 0), FSDP_ERR_CHECKPOINT,
            "adamw, this one is sgd");
  CHECK(toy_shard(toy.engine, TOY_WEIGHT).data[20] != value);
  CHECK_OK(fsdp_optimizer_load(optimizer, good, NULL, 0));
  CHECK(toy_shard(toy.engine, TOY_WEIGHT).data[20] == value);
  CHECK_OK(fsdp_optimizer_step_count(optimizer, TOY_WEIGHT, &steps));
  CHECK_EQ(steps, 1);
  CHECK_OK(fsdp_optimizer_state(optimizer, TOY_WEIGHT, "exp_avg", &state));
  CHECK(state[20] == (float)(1 - 0.9));
  CHECK_OK(fsdp_checkpoint_load(toy.engine, good, NULL, 0));
  fsdp_optimizer_destroy(optimizer);
  fsdp_optimizer_destroy(other);
  toy_destroy(toy);
  snprintf(command, sizeof command, "rm -r '%s' '%s'", good, bare);
  CHECK(system(command) == 0);
}

/* Runs `call`, which uses the variable `optimizer`, with every kind of handle that is none of an
 * optimizer. */
#define CHECK_BAD_OPTIMIZERS(call) \
  do { \
    toy_t toy_ = toy_create(); \
    fsdp_optimizer_t *optimizer = NULL; \
    CHECK_ERR(call, BAD, "optimizer is NULL"); \
    CHECK_OK(fsdp_optimizer_create_sgd(toy_.engine, NULL, &optimizer)); \
    fsdp_optimizer_destroy(optimizer); \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "destroyed"); \
    fsdp_optimizer_destroy(optimizer); \
    optimizer = (fsdp_optimizer_t *)(void *)toy_.engine; \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "an engine"); \
    optimizer = NO_SUCH_HANDLE(fsdp_optimizer_t); \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "optimizer"); \
    toy_destroy(toy_); \
  } while (0)

static void bad_handles(void) {
  fsdp_optimizer_t *out = NULL;
  double lr;
  uint64_t steps;
  float *state;
  CHECK_BAD_ENGINES(fsdp_optimizer_create_sgd(engine, NULL, &out));
  CHECK_BAD_ENGINES(fsdp_optimizer_create_adamw(engine, NULL, &out));
  CHECK(out == NULL);
  CHECK_BAD_OPTIMIZERS(fsdp_optimizer_step(optimizer));
  CHECK_BAD_OPTIMIZERS(fsdp_optimizer_set_lr(optimizer, 1));
  CHECK_BAD_OPTIMIZERS(fsdp_optimizer_get_lr(optimizer, &lr));
  CHECK_BAD_OPTIMIZERS(fsdp_optimizer_set_param_options(optimizer, 0, 1, 0));
  CHECK_BAD_OPTIMIZERS(fsdp_optimizer_step_count(optimizer, 0, &steps));
  CHECK_BAD_OPTIMIZERS(fsdp_optimizer_state(optimizer, 0, "exp_avg", &state));
  CHECK_BAD_OPTIMIZERS(fsdp_optimizer_save(optimizer, "x", NULL, 0, NULL, 0));
  CHECK_BAD_OPTIMIZERS(fsdp_optimizer_load(optimizer, "x", NULL, 0));
}

int main(void) {
  good_calls();
  bad_options();
  not_in_the_middle_of_a_backward();
  checkpoints();
  bad_handles();
  return 0;
}
