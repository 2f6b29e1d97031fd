/* A model with two paths of equal sizes, of which one is frozen, whose ranks take different paths:
 * in the first iteration an error on every rank; later an error everywhere, or one warning on the
 * ranks that deviate and right gradients, as order_check says. Paths and frozen parameters that
 * change on all ranks together train as in PyTorch; training and evaluating in turns gives no
 * warning. With both strategies.
 *
 * Breaks: swapped_order, no_average, no_error, no_warning, two_warnings, missing_zero,
 * warned_in_eval. */
#include "ranks.h"
#include "scenario_host.h"
#include "scenario_layers.h"

#include <unistd.h>

enum { ROOT, LAYER0, LAYER1, LAYER2, LAYER2_0, LAYER2_1, LAYER2_2, MODULES };
enum { WEIGHT0, BIAS0, WEIGHT1, WEIGHT2_0, WEIGHT2_2, PARAMS };
enum { BATCH = 8, IN = 5, MID = 6, LOW = 3, INPUTS = 6 };

static const host_module_t MODULE[MODULES] = {
    {0, "", "Model"},           {ROOT, "layer0", "Linear"},
    {ROOT, "layer1", "Linear"}, {ROOT, "layer2", "Sequential"},
    {LAYER2, "0", "Linear"},    {LAYER2, "1", "ReLU"},
    {LAYER2, "2", "Linear"}};
static const host_param_t PARAM[PARAMS] = {{LAYER0, "weight", 2, {MID, IN}, 1},
                                           {LAYER0, "bias", 1, {MID, 0}, 1},
                                           {LAYER1, "weight", 2, {MID, MID}, 1},
                                           {LAYER2_0, "weight", 2, {LOW, MID}, 0},
                                           {LAYER2_2, "weight", 2, {MID, LOW}, 0}};
static const host_spec_t SPEC = {MODULES, PARAMS, MODULE, PARAM};

/* Whether ranks take different paths in this iteration, on purpose. */
static int deviating;

/* What the backward needs of the forward. */
static struct {
  float z[BATCH * MID], low[BATCH * LOW], y[BATCH * MID];
} kept;

static float forward(host_t *host, const float *x, int path) {
  host_enter(host, ROOT, 0);
  linear(kept.z, x, host_param(host, WEIGHT0), host_param(host, BIAS0), BATCH, IN, MID);
  relu(kept.z, kept.z, BATCH * MID);
  if (path == 0) {
    host_enter(host, LAYER1, 0);
    linear(kept.y, kept.z, host_param(host, WEIGHT1), NULL, BATCH, MID, MID);
    host_leave(host, LAYER1, 0);
  } else {
    host_enter(host, LAYER2, 0);
    linear(kept.low, kept.z, host_param(host, WEIGHT2_0), NULL, BATCH, MID, LOW);
    relu(kept.low, kept.low, BATCH * LOW);
    linear(kept.y, kept.low, host_param(host, WEIGHT2_2), NULL, BATCH, LOW, MID);
    host_leave(host, LAYER2, 0);
  }
  relu(kept.y, kept.y, BATCH * MID);
  host_leave(host, ROOT, 0);
  return sum_of(kept.y, BATCH * MID);
}

static void backward(host_t *host, const float *x, int path) {
  float dy[BATCH * MID], dz[BATCH * MID], dlow[BATCH * LOW], dw[MID * MID], db[MID];
  fill(dy, 1, BATCH * MID);
  relu_grad(dy, dy, kept.y, BATCH * MID);
  host_enter(host, ROOT, 1);
  if (path == 0) {
    host_enter(host, LAYER1, 1);
    linear_grad(dy, kept.z, host_param(host, WEIGHT1), BATCH, MID, MID, dz, dw, NULL);
    host_add_grad(host, WEIGHT1, dw);
    host_leave(host, LAYER1, 1);
  } else {
    host_enter(host, LAYER2, 1);
    linear_grad(dy, kept.low, host_param(host, WEIGHT2_2), BATCH, LOW, MID, dlow, dw, NULL);
    host_add_grad(host, WEIGHT2_2, dw);
    relu_grad(dlow, dlow, kept.low, BATCH * LOW);
    linear_grad(dlow, kept.z, host_param(host, WEIGHT2_0), BATCH, MID, LOW, dz, dw, NULL);
    host_add_grad(host, WEIGHT2_0, dw);
    host_leave(host, LAYER2, 1);
  }
  relu_grad(dz, dz, kept.z, BATCH * MID);
  linear_grad(dz, x, NULL, BATCH, IN, MID, NULL, dw, db);
  host_add_grad(host, WEIGHT0, dw);
  host_add_grad(host, BIAS0, db);
  if (host->engine != NULL && path != 0 && deviating && broken("missing_zero")) {
    /* A rank that skipped layer1 contributes to it all the same. */
    fill(dw, 1, MID * MID);
    host_add_grad(host, WEIGHT1, dw);
  }
  host_leave(host, ROOT, 1);
}

/* Trains the layers of the path and freezes the others. */
static void take(host_t *host, int path) {
  const int keep = host->engine != NULL && deviating && broken("missing_zero");
  host_set_requires_grad(host, WEIGHT1, path == 0 || keep);
  host_set_requires_grad(host, WEIGHT2_0, path == 1);
  host_set_requires_grad(host, WEIGHT2_2, path == 1);
}

/* ---- what is logged ---- */

static struct {
  int count;
  char text[1024];
} logged;

static void on_log(int32_t level, const char *message, void *user_data) {
  CHECK_EQ(level, FSDP_LOG_WARNING);
  CHECK(user_data == &logged);
  logged.count++;
  snprintf(logged.text, sizeof logged.text, "%s", message);
}

/* ---- cases ---- */

/* One of the checks' settings, with its own job, engine and reference. */
typedef struct {
  job_t job;
  safetensors_t *file;
  const float *inputs;
  host_t sharded, reference;
  int path;
} case_t;

static void begin(case_t *c, int32_t strategy, int32_t order_check, const char *name) {
  char text[128];
  static const char *const strategies[] = {"FULL_SHARD", "SHARD_GRAD_OP"};
  static const char *const checks[] = {"error", "warn", "off"};
  snprintf(text, sizeof text, "%s, %s, order_check %s", name, strategies[strategy],
           checks[order_check]);
  test_context(text);
  c->job = join_job();
  c->file = scenario_open("exec_order", c->job.world);
  c->inputs = scenario_f32(c->file, "input", 4, INPUTS, c->job.world, BATCH, IN);
  c->path = 0;
  float *const *values = host_values(&SPEC, c->file, "initial");
  fsdp_model_t *model = host_model(&SPEC, values);
  fsdp_engine_t *engine = NULL;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  config.strategy = strategy;
  config.order_check = order_check;
  CHECK_OK(fsdp_model_wrap_module(model, LAYER1));
  CHECK_OK(fsdp_model_wrap_module(model, LAYER2));
  CHECK_OK(fsdp_engine_create(model, c->job.comm, &config, &engine));
  fsdp_model_destroy(model);
  host_sharded(&c->sharded, &SPEC, engine, c->job.comm, 0, 0);
  host_reference(&c->reference, &SPEC, values, c->job.world);
  logged.count = 0;
}

static void end(case_t *c) {
  fsdp_engine_destroy(c->sharded.engine);
  fsdp_comm_destroy(c->job.comm);
  safetensors_close(c->file);
}

static const float *input(const case_t *c, int index, int32_t rank) {
  return c->inputs + ((index * c->job.world) + rank) * BATCH * IN;
}

/* The path of a rank when it is `others` on all but rank 0, and `first` there. */
static int path_of(int first, int others, int32_t rank) { return rank == 0 ? first : others; }

/* Forward and backward on the ranks' paths, sharded only. The loss. */
static float iterate(case_t *c, int index, int first, int others) {
  const int path = path_of(first, others, c->job.rank);
  const float *x = input(c, index, c->job.rank);
  deviating = first != others;
  if (path != c->path) take(&c->sharded, path);
  c->path = path;
  const float loss = forward(&c->sharded, x, path);
  backward(&c->sharded, x, path);
  return loss;
}

/* The same in both ways; the gradients of both must agree. */
static float iterate_both(case_t *c, int index, int first, int others) {
  const float loss = iterate(c, index, first, others);
  for (int32_t r = 0; r < c->job.world; r++) {
    const int path = path_of(first, others, r);
    c->reference.rank = r;
    take(&c->reference, path);
    const float wanted = forward(&c->reference, input(c, index, r), path);
    if (r == c->job.rank) check_bits(&loss, &wanted, 1, "loss");
    backward(&c->reference, input(c, index, r), path);
  }
  host_reduce(&c->reference);
  host_check_shards(&c->sharded, &c->reference, "after the backward");
  return loss;
}

static void sgd_both(case_t *c) {
  host_sgd(&c->sharded, 0.01f);
  host_sgd(&c->reference, 0.01f);
}

/* An iteration in which ranks differ fails on every rank within a second. */
static void check_order_error(case_t *c, int first, int others) {
  c->sharded.may_fail = 1;
  CHECK_OK(fsdp_comm_barrier(c->job.comm));
  const double start = now_seconds();
  iterate(c, 0, first, broken("no_error") ? first : others);
  const double seconds = now_seconds() - start;
  CHECK_EQ(c->sharded.status, FSDP_ERR_MISMATCH);
  CHECK(seconds < 1);
  const char *message = fsdp_last_error_message();
  CHECK(strncmp(message, "Forward order differs across ranks", 34) == 0);
  CHECK(strstr(message, "rank 0 ") != NULL);
  int other = 0;
  for (int32_t r = 1; r < c->job.world; r++) {
    char name[32];
    snprintf(name, sizeof name, "rank %d ", (int)r);
    other |= strstr(message, name) != NULL;
  }
  CHECK(other);
  CHECK(strstr(message, "layer1.weight") != NULL);
  CHECK(strstr(message, "layer2.0.weight") != NULL && strstr(message, "layer2.2.weight") != NULL);
}

/* 3 steps on one path, and 6 on paths that change on all ranks together. */
static void train(int32_t strategy, int32_t order_check, int flip) {
  static const int paths[INPUTS] = {0, 0, 1, 1, 0, 1};
  static case_t c;
  char name[32];
  const char *run = flip ? "flipped" : "unflipped";
  begin(&c, strategy, order_check, run);
  const int steps = flip ? INPUTS : 3;
  snprintf(name, sizeof name, "%s.loss", run);
  const float *losses = scenario_f32(c.file, name, 2, steps, c.job.world, 0, 0);
  for (int step = 0; step < steps; step++) {
    const int path = flip ? paths[step] : 0;
    const int others = broken("swapped_order") ? 1 - path : path;
    const float loss = iterate_both(&c, step, path, others);
    check_close(&loss, &losses[step * c.job.world + c.job.rank], 1, 1e-6, name);
    sgd_both(&c);
  }
  host_check_file(&c.sharded, c.file, run, 1e-6);
  /* A change on all ranks is a deviation from the first iteration, but from no other rank. */
  CHECK_EQ(logged.count, flip && order_check == FSDP_ORDER_CHECK_WARN ? 1 : 0);
  end(&c);
}

static void first_iteration(int32_t strategy, int32_t order_check) {
  static case_t c;
  begin(&c, strategy, order_check, "first iteration");
  if (order_check == FSDP_ORDER_CHECK_OFF) {
    iterate_both(&c, 0, 0, 1);
    host_check_grads(&c.sharded, c.job.comm, c.file, "deviating.grad", 1e-6);
  } else {
    check_order_error(&c, 0, 1);
  }
  CHECK_EQ(logged.count, 0);
  end(&c);
}

static void later_iteration(int32_t strategy, int32_t order_check, int before) {
  static case_t c;
  char text[128];
  begin(&c, strategy,
        order_check == FSDP_ORDER_CHECK_WARN && broken("no_warning") ? FSDP_ORDER_CHECK_OFF
                                                                     : order_check,
        before == 1 ? "after 1 iteration" : "after 3 iterations");
  for (int i = 0; i < before; i++) {
    iterate_both(&c, 1 + i, 0, 0);
    host_zero_grad(&c.sharded);
    host_zero_grad(&c.reference);
  }
  CHECK_EQ(logged.count, 0);
  if (order_check == FSDP_ORDER_CHECK_ERROR) {
    check_order_error(&c, 0, 1);
    end(&c);
    return;
  }
  const int warned = order_check == FSDP_ORDER_CHECK_WARN && c.job.rank != 0;
  iterate_both(&c, 0, 0, 1);
  CHECK_EQ(logged.count, warned);
  if (warned) {
    snprintf(text, sizeof text,
             "Forward order differs from that of the first iteration on rank %d. Collectives are "
             "matched by unit",
             (int)c.job.rank);
    CHECK(strncmp(logged.text, text, strlen(text)) == 0);
  }
  host_check_grads(&c.sharded, c.job.comm, c.file, "deviating.grad", 1e-6);
  /* Once more, from other values, and back to one path for all: no second warning, right gradients.
   */
  for (int i = 4; i < INPUTS; i++) {
    sgd_both(&c);
    iterate_both(&c, i, 0, i == 4 ? 1 : 0);
    if (warned && broken("two_warnings")) on_log(FSDP_LOG_WARNING, "once more", &logged);
    CHECK_EQ(logged.count, warned);
  }
  end(&c);
}

/* Two epochs of 3 iterations of training and 3 of evaluation, which may take any path. */
static void train_and_evaluate(int32_t strategy, int32_t order_check) {
  static case_t c;
  begin(&c, strategy, order_check, "train and evaluate");
  fsdp_engine_t *engine = c.sharded.engine;
  for (int epoch = 0; epoch < 2; epoch++) {
    for (int i = 0; i < 3; i++) {
      iterate_both(&c, i, 0, 0);
      sgd_both(&c);
    }
    /* By the hooks without gradients, and with them on the training's path but without a backward.
     */
    if (!broken("warned_in_eval")) CHECK_OK(fsdp_engine_set_grad_enabled(engine, 0));
    forward(&c.sharded, input(&c, 3, c.job.rank), 1);
    CHECK_OK(fsdp_engine_finish_forward(engine));
    CHECK_OK(fsdp_engine_set_grad_enabled(engine, 1));
    forward(&c.sharded, input(&c, 4, c.job.rank), 0);
    CHECK_OK(fsdp_engine_finish_forward(engine));
    /* By a host that says itself what it is at, with gradients enabled. */
    void *buffer;
    CHECK_OK(fsdp_engine_begin_forward(engine, 0));
    for (uint32_t m = 0; m < MODULES; m++) {
      if (c.sharded.is_unit[m] && m != LAYER1)
        CHECK_OK(fsdp_engine_unshard(engine, c.sharded.unit[m], &buffer));
    }
    CHECK_OK(fsdp_engine_finish_forward(engine));
  }
  CHECK_EQ(logged.count, 0);
  end(&c);
}

int main(void) {
  const char *world = getenv("WORLD_SIZE");
  const int ranks = world == NULL ? 1 : atoi(world);
  /* The watchdog of everything here: a hang ends by a signal. */
  alarm(50);
  fsdp_set_log_callback(on_log, &logged);
  for (int32_t strategy = FSDP_FULL_SHARD; strategy <= FSDP_SHARD_GRAD_OP; strategy++) {
    for (int32_t check = FSDP_ORDER_CHECK_ERROR; check <= FSDP_ORDER_CHECK_OFF; check++) {
      train(strategy, check, 0);
      train(strategy, check, 1);
      train_and_evaluate(strategy, check);
      if (ranks == 1) continue;
      first_iteration(strategy, check);
      later_iteration(strategy, check, 1);
      later_iteration(strategy, check, 3);
    }
  }
  fsdp_set_log_callback(NULL, NULL);
  return 0;
}
