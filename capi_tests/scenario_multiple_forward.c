/* A unit that is used twice in one forward, under an outer one: its gradients are the sums over
 * both uses, it is reduced only after the last of them, and 3 steps of SGD give
 * DistributedDataParallel's and FullyShardedDataParallel's parameters. With the same input on every
 * rank, and with one of each rank's own.
 *
 * Breaks: missing_second_use, reduced_too_early, no_average. */
#include "ranks.h"
#include "scenario_host.h"
#include "scenario_layers.h"

enum { ROOT, INNER, OUTER, MODULES };
enum { INNER_WEIGHT, INNER_BIAS, OUTER_WEIGHT, OUTER_BIAS, PARAMS };
enum { BATCH = 64, IN = 4, OUT = 5, STEPS = 3 };

static const host_module_t MODULE[MODULES] = {
    {0, "", "Model"}, {ROOT, "inner", "Linear"}, {ROOT, "outer", "Linear"}};
static const host_param_t PARAM[PARAMS] = {{INNER, "weight", 2, {IN, IN}, 1},
                                           {INNER, "bias", 1, {IN, 0}, 1},
                                           {OUTER, "weight", 2, {OUT, IN}, 1},
                                           {OUTER, "bias", 1, {OUT, 0}, 1}};
static const host_spec_t SPEC = {MODULES, PARAMS, MODULE, PARAM};

/* outer(inner(x) + inner(x)); returns the sum of the output, and keeps the sum of the inner
 * outputs. */
static float forward(host_t *host, const float *x, float *between) {
  static float use[2][BATCH * IN], y[BATCH * OUT];
  host_enter(host, ROOT, 0);
  for (int u = 0; u < 2; u++) {
    host_enter(host, INNER, 0);
    linear(use[u], x, host_param(host, INNER_WEIGHT), host_param(host, INNER_BIAS), BATCH, IN, IN);
    host_leave(host, INNER, 0);
  }
  add(between, use[0], use[1], BATCH * IN);
  linear(y, between, host_param(host, OUTER_WEIGHT), host_param(host, OUTER_BIAS), BATCH, IN, OUT);
  host_leave(host, ROOT, 0);
  return sum_of(y, BATCH * OUT);
}

static uint64_t reductions(const host_t *host) {
  return host->engine == NULL ? 0 : stats_of(host->engine).reduce_scatters;
}

static void backward(host_t *host, const float *x, const float *between) {
  static float dy[BATCH * OUT], dbetween[BATCH * IN];
  float dw[OUT * IN], db[OUT];
  const uint64_t before = reductions(host);
  fill(dy, 1, BATCH * OUT);
  host_enter(host, ROOT, 1);
  linear_grad(dy, between, host_param(host, OUTER_WEIGHT), BATCH, IN, OUT, dbetween, dw, db);
  host_add_grad(host, OUTER_WEIGHT, dw);
  host_add_grad(host, OUTER_BIAS, db);
  for (int u = 1; u >= 0; u--) {
    host_enter(host, INNER, 1);
    linear_grad(dbetween, x, host_param(host, INNER_WEIGHT), BATCH, IN, IN, NULL, dw, db);
    if (u == 0 || host->engine == NULL || !broken("missing_second_use")) {
      host_add_grad(host, INNER_WEIGHT, dw);
      host_add_grad(host, INNER_BIAS, db);
    }
    host_leave(host, INNER, 1);
    if (u == 1 && host->engine != NULL) {
      if (broken("reduced_too_early"))
        CHECK_OK(fsdp_engine_reduce(host->engine, host->unit[INNER]));
      /* Not before its last use. */
      CHECK_EQ(reductions(host), before);
    }
  }
  host_leave(host, ROOT, 1);
  /* Once a unit. */
  if (host->engine != NULL) CHECK_EQ(reductions(host), before + 2);
}

static void run(const job_t *job, const safetensors_t *file, const char *input) {
  static host_t sharded, reference;
  static float between[BATCH * IN];
  const int own = strcmp(input, "each") == 0;
  char name[64];
  test_context(input);
  float *const *values = host_values(&SPEC, file, "initial");
  fsdp_model_t *model = host_model(&SPEC, values);
  fsdp_engine_t *engine = NULL;
  CHECK_OK(fsdp_model_wrap_module(model, INNER));
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine));
  fsdp_model_destroy(model);
  host_sharded(&sharded, &SPEC, engine, job->comm, 0, 0);
  host_reference(&reference, &SPEC, values, job->world);
  snprintf(name, sizeof name, "%s.input", input);
  const float *x = own ? scenario_f32(file, name, 3, job->world, BATCH, IN, 0)
                       : scenario_f32(file, name, 2, BATCH, IN, 0, 0);
  const size_t stride = own ? BATCH * IN : 0;
  float losses[STEPS];
  for (int step = 0; step < STEPS; step++) {
    losses[step] = forward(&sharded, x + (size_t)job->rank * stride, between);
    backward(&sharded, x + (size_t)job->rank * stride, between);
    for (int32_t r = 0; r < job->world; r++) {
      reference.rank = r;
      const float loss = forward(&reference, x + (size_t)r * stride, between);
      if (r == job->rank) check_bits(&losses[step], &loss, 1, "loss");
      backward(&reference, x + (size_t)r * stride, between);
    }
    host_reduce(&reference);
    host_check_shards(&sharded, &reference, "before the step");
    host_sgd(&sharded, 0.1f);
    host_sgd(&reference, 0.1f);
    host_check_shards(&sharded, &reference, "after the step");
  }
  static const char *const systems[] = {"ddp", "fsdp"};
  for (int s = 0; s < 2; s++) {
    snprintf(name, sizeof name, "%s.loss.%s", input, systems[s]);
    const float *wanted = scenario_f32(file, name, 2, STEPS, job->world, 0, 0);
    for (int step = 0; step < STEPS; step++)
      check_close(&losses[step], &wanted[step * job->world + job->rank], 1, 1e-6, name);
    snprintf(name, sizeof name, "%s.%s", input, systems[s]);
    host_check_file(&sharded, file, name, 1e-6);
  }
  fsdp_engine_destroy(engine);
}

int main(void) {
  const job_t job = join_job();
  safetensors_t *file = scenario_open("multiple_forward", job.world);
  run(&job, file, "same");
  run(&job, file, "each");
  /* PyTorch's two agree in PyTorch's own test. */
  CHECK_STR(scenario_about(file, "/bitwise/same"), "true");
  safetensors_close(file);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
