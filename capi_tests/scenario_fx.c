/* The execution order is traced without data: the host announces which modules a forward enters and
 * which parameters its operations use, and what was recorded is what PyTorch's tracer records. The
 * trace then wraps the model and orders its prefetches: training gives the same bits with it and
 * without.
 *
 * Breaks: missing_second_use, swapped_order, unannounced_leaf, leaves_trace, no_prefetch,
 * no_average. */
#include "ranks.h"
#include "scenario_host.h"
#include "scenario_layers.h"

enum { ROOT, LAYER0, LAYER1, LAYER2, LAYER2_0, LAYER2_1, LAYER2_2, RELU, MODULES };
enum { WEIGHT1, WEIGHT2, UNUSED, LAYER0_W, LAYER0_B, LAYER1_W, LAYER2_0_W, LAYER2_2_W, PARAMS };
enum { BATCH = 8, N = 6, LOW = 3, DATA_RANKS = 4, STEPS = 3 };

static const host_module_t MODULE[MODULES] = {{0, "", "Model"},        {0, "layer0", "Linear"},
                                              {0, "layer1", "Linear"}, {0, "layer2", "Sequential"},
                                              {LAYER2, "0", "Linear"}, {LAYER2, "1", "ReLU"},
                                              {LAYER2, "2", "Linear"}, {0, "relu", "ReLU"}};
static const host_param_t PARAM[PARAMS] = {
    {ROOT, "weight1", 2, {N, N}, 1},       {ROOT, "weight2", 2, {N, N}, 1},
    {ROOT, "weight_unused", 2, {2, 2}, 1}, {LAYER0, "weight", 2, {N, N}, 1},
    {LAYER0, "bias", 1, {N, 0}, 1},        {LAYER1, "weight", 2, {N, N}, 1},
    {LAYER2_0, "weight", 2, {LOW, N}, 1},  {LAYER2_2, "weight", 2, {N, LOW}, 1}};
static const host_spec_t SPEC = {MODULES, PARAMS, MODULE, PARAM};

/* ---- announcing ---- */

/* One call of a leaf module, which uses `count` parameters from `first` on in one operation. */
static void leaf(fsdp_trace_t *trace, uint32_t module, uint32_t first, uint32_t count) {
  const uint32_t params[2] = {first, first + 1};
  CHECK_OK(fsdp_trace_enter(trace, module));
  if (count > 0) CHECK_OK(fsdp_trace_use(trace, params, count));
  CHECK_OK(fsdp_trace_leave(trace, module));
}

static void use(fsdp_trace_t *trace, uint32_t param) { CHECK_OK(fsdp_trace_use(trace, &param, 1)); }

static void call_layer2(fsdp_trace_t *trace) {
  CHECK_OK(fsdp_trace_enter(trace, LAYER2));
  leaf(trace, LAYER2_0, LAYER2_0_W, 1);
  if (!broken("unannounced_leaf")) leaf(trace, LAYER2_1, 0, 0);
  leaf(trace, LAYER2_2, LAYER2_2_W, 1);
  CHECK_OK(fsdp_trace_leave(trace, LAYER2));
  leaf(trace, RELU, 0, 0);
}

static void call_layer0(fsdp_trace_t *trace) {
  leaf(trace, LAYER0, LAYER0_W, 2);
  leaf(trace, RELU, 0, 0);
}

/* The caller owns the trace. */
static fsdp_trace_t *trace_of(const fsdp_model_t *model, int run_all) {
  fsdp_trace_t *trace = NULL;
  CHECK_OK(fsdp_trace_create(model, &trace));
  CHECK_OK(fsdp_trace_enter(trace, ROOT));
  if (broken("swapped_order")) call_layer2(trace);
  call_layer0(trace);
  if (!broken("swapped_order")) call_layer2(trace);
  use(trace, WEIGHT1);
  if (run_all) {
    leaf(trace, LAYER1, LAYER1_W, 1);
    leaf(trace, RELU, 0, 0);
    use(trace, WEIGHT2);
    if (!broken("missing_second_use")) call_layer0(trace);
  }
  CHECK_OK(fsdp_trace_leave(trace, ROOT));
  return trace;
}

/* ---- comparing with PyTorch ---- */

/* The JSON string at a pointer that ends with an index; NULL behind the last. */
static const char *entry(const safetensors_t *file, const char *base, uint32_t index) {
  char pointer[320];
  snprintf(pointer, sizeof pointer, "%s/%u", base, (unsigned)index);
  return safetensors_about(file, pointer);
}

static void check_modules(const fsdp_trace_t *trace, const safetensors_t *file, const char *base) {
  const uint32_t *modules = NULL;
  uint32_t count = 0;
  CHECK_OK(fsdp_trace_module_order(trace, &modules, &count));
  for (uint32_t i = 0; i < count; i++) {
    const char *wanted = entry(file, base, i);
    CHECK(wanted != NULL);
    CHECK_STR(host_module_name(&SPEC, modules[i]), wanted);
  }
  CHECK(entry(file, base, count) == NULL);
}

static void check_params(const fsdp_trace_t *trace, const safetensors_t *file, const char *base) {
  const uint32_t *params = NULL;
  uint32_t count = 0, visited = 0;
  CHECK_OK(fsdp_trace_param_order(trace, &params, &count));
  for (uint32_t i = 0; i < count; i++) {
    int32_t yes = 0;
    const char *wanted = entry(file, base, i);
    CHECK(wanted != NULL);
    CHECK_STR(host_param_name(&SPEC, params[i]), wanted);
    CHECK_OK(fsdp_trace_visited(trace, params[i], &yes));
    CHECK_EQ(yes, 1);
  }
  CHECK(entry(file, base, count) == NULL);
  for (uint32_t p = 0; p < PARAMS; p++) {
    int32_t yes = 7;
    CHECK_OK(fsdp_trace_visited(trace, p, &yes));
    visited += (uint32_t)yes;
  }
  CHECK_EQ(visited, count);
}

/* [[module, [parameter, ...]], ...] of one module; the parameters' names begin below the module
 * that is named. */
static void check_usages(const fsdp_trace_t *trace, const safetensors_t *file, const char *infos,
                         uint32_t module) {
  char base[256], pointer[288];
  uint32_t count = 99;
  snprintf(base, sizeof base, "%s/%s", infos, host_module_name(&SPEC, module));
  CHECK_OK(fsdp_trace_usage_count(trace, module, &count));
  for (uint32_t i = 0; i < count; i++) {
    uint32_t used = 99, params_count = 0;
    const uint32_t *params = NULL;
    CHECK_OK(fsdp_trace_usage(trace, module, i, &used, &params, &params_count));
    snprintf(pointer, sizeof pointer, "%s/%u/0", base, (unsigned)i);
    const char *wanted = safetensors_about(file, pointer);
    CHECK(wanted != NULL);
    CHECK_STR(host_module_name(&SPEC, used), wanted);
    const size_t prefix = used == ROOT ? 0 : strlen(wanted) + 1;
    snprintf(pointer, sizeof pointer, "%s/%u/1", base, (unsigned)i);
    for (uint32_t p = 0; p < params_count; p++) {
      wanted = entry(file, pointer, p);
      CHECK(wanted != NULL);
      CHECK_STR(host_param_name(&SPEC, params[p]) + prefix, wanted);
    }
    CHECK(entry(file, pointer, params_count) == NULL);
  }
  CHECK(entry(file, base, count) == NULL);
}

static void check_trace(const safetensors_t *file, int run_all) {
  char base[64], pointer[128];
  test_context(run_all ? "trace of all layers" : "trace of some layers");
  fsdp_model_t *model = host_model(&SPEC, host_values(&SPEC, file, "initial"));
  fsdp_trace_t *trace = trace_of(model, run_all);
  snprintf(base, sizeof base, "/traces/%s", run_all ? "all" : "some");
  snprintf(pointer, sizeof pointer, "%s/module_forward_order", base);
  check_modules(trace, file, pointer);
  snprintf(pointer, sizeof pointer, "%s/param_forward_order", base);
  check_params(trace, file, pointer);
  snprintf(pointer, sizeof pointer, "%s/module_to_param_usage_infos", base);
  for (uint32_t m = 0; m < MODULES; m++) check_usages(trace, file, pointer, m);
  fsdp_model_destroy(model);
  fsdp_trace_destroy(trace);
}

/* ---- training ---- */

/* The model's forward and backward on one rank's input. The loss is the sum of the output; with
 * run_all also that of what layer0's second use leaves out of it, so that every layer has a
 * gradient. */
static float pass(host_t *host, const float *x, int run_all) {
  static float a[BATCH * N], low[BATCH * LOW], c[BATCH * N], e[BATCH * N], f[BATCH * N],
      g[BATCH * N], again[BATCH * N], d[BATCH * N], back[BATCH * N], dlow[BATCH * LOW];
  float dw[N * N], db[N], w1[N * N], w2[N * N];
  host_enter(host, ROOT, 0);
  host_enter(host, LAYER0, 0);
  linear(a, x, host_param(host, LAYER0_W), host_param(host, LAYER0_B), BATCH, N, N);
  host_leave(host, LAYER0, 0);
  relu(a, a, BATCH * N);
  host_enter(host, LAYER2, 0);
  host_enter(host, LAYER2_0, 0);
  linear(low, a, host_param(host, LAYER2_0_W), NULL, BATCH, N, LOW);
  host_leave(host, LAYER2_0, 0);
  relu(low, low, BATCH * LOW);
  host_enter(host, LAYER2_2, 0);
  linear(c, low, host_param(host, LAYER2_2_W), NULL, BATCH, LOW, N);
  host_leave(host, LAYER2_2, 0);
  host_leave(host, LAYER2, 0);
  relu(c, c, BATCH * N);
  /* z @ W is linear with W^T. */
  transpose(w1, host_param(host, WEIGHT1), N);
  transpose(w2, host_param(host, WEIGHT2), N);
  linear(e, c, w1, NULL, BATCH, N, N);
  float loss = run_all ? 0 : sum_of(e, BATCH * N);
  if (run_all) {
    host_enter(host, LAYER1, 0);
    linear(f, e, host_param(host, LAYER1_W), NULL, BATCH, N, N);
    host_leave(host, LAYER1, 0);
    relu(f, f, BATCH * N);
    linear(g, f, w2, NULL, BATCH, N, N);
    host_enter(host, LAYER0, 0);
    linear(again, x, host_param(host, LAYER0_W), host_param(host, LAYER0_B), BATCH, N, N);
    host_leave(host, LAYER0, 0);
    relu(again, again, BATCH * N);
    loss = sum_of(g, BATCH * N) + sum_of(again, BATCH * N);
  }
  host_leave(host, ROOT, 0);

  host_enter(host, ROOT, 1);
  fill(d, 1, BATCH * N);
  if (run_all) {
    relu_grad(back, d, again, BATCH * N);
    host_enter(host, LAYER0, 1);
    linear_grad(back, x, NULL, BATCH, N, N, NULL, dw, db);
    host_add_grad(host, LAYER0_W, dw);
    host_add_grad(host, LAYER0_B, db);
    host_leave(host, LAYER0, 1);
    linear_grad(d, f, w2, BATCH, N, N, back, dw, NULL);
    transpose(w2, dw, N);
    host_add_grad(host, WEIGHT2, w2);
    relu_grad(back, back, f, BATCH * N);
    host_enter(host, LAYER1, 1);
    linear_grad(back, e, host_param(host, LAYER1_W), BATCH, N, N, d, dw, NULL);
    host_add_grad(host, LAYER1_W, dw);
    host_leave(host, LAYER1, 1);
  }
  linear_grad(d, c, w1, BATCH, N, N, back, dw, NULL);
  transpose(w1, dw, N);
  host_add_grad(host, WEIGHT1, w1);
  relu_grad(back, back, c, BATCH * N);
  host_enter(host, LAYER2, 1);
  host_enter(host, LAYER2_2, 1);
  linear_grad(back, low, host_param(host, LAYER2_2_W), BATCH, LOW, N, dlow, dw, NULL);
  host_add_grad(host, LAYER2_2_W, dw);
  host_leave(host, LAYER2_2, 1);
  relu_grad(dlow, dlow, low, BATCH * LOW);
  host_enter(host, LAYER2_0, 1);
  linear_grad(dlow, a, host_param(host, LAYER2_0_W), BATCH, N, LOW, back, dw, NULL);
  host_add_grad(host, LAYER2_0_W, dw);
  host_leave(host, LAYER2_0, 1);
  host_leave(host, LAYER2, 1);
  relu_grad(back, back, a, BATCH * N);
  host_enter(host, LAYER0, 1);
  linear_grad(back, x, NULL, BATCH, N, N, NULL, dw, db);
  host_add_grad(host, LAYER0_W, dw);
  host_add_grad(host, LAYER0_B, db);
  host_leave(host, LAYER0, 1);
  host_leave(host, ROOT, 1);
  return loss;
}

/* The mean over the ranks' gradients in the file. */
static void check_reference(const host_t *reference, const safetensors_t *file) {
  for (uint32_t p = 0; p < PARAMS; p++) {
    const host_param_t *param = &PARAM[p];
    char name[64];
    safetensors_tensor_t unused;
    float mean[HOST_NUMEL];
    const int64_t n = host_numel(&SPEC, p);
    snprintf(name, sizeof name, "grad.%s", host_param_name(&SPEC, p));
    CHECK_EQ(safetensors_tensor(file, name, &unused) == 0, reference->has_grad[p]);
    if (!reference->has_grad[p]) continue;
    const float *grads =
        scenario_f32(file, name, param->ndim + 1, DATA_RANKS, param->shape[0], param->shape[1], 0);
    for (int64_t i = 0; i < n; i++) {
      double sum = 0;
      for (int32_t r = 0; r < reference->world; r++) sum += (double)grads[r * n + i];
      mean[i] = (float)(sum / reference->world);
    }
    check_close(reference->grad[p], mean, n, 1e-6, name);
  }
}

/* Which modules are units, as bits. */
static unsigned units_of(const host_t *host) {
  unsigned units = 0;
  for (uint32_t m = 0; m < MODULES; m++) units |= host->is_unit[m] ? 1u << m : 0;
  return units;
}

typedef struct {
  int run_all, ordered;
  uint64_t min_numel;
  unsigned units; /* expected */
  /* Units of the recorded order that can be fetched ahead in a forward. */
  uint64_t ahead;
} train_t;

static void train(const job_t *job, const safetensors_t *file, const train_t *how) {
  static host_t sharded, reference;
  fsdp_engine_t *engine = NULL;
  char text[96];
  snprintf(text, sizeof text, "%s layers, at least %u elements, %s", how->run_all ? "all" : "some",
           (unsigned)how->min_numel, how->ordered ? "prefetched" : "not prefetched");
  test_context(text);
  float *const *values = host_values(&SPEC, file, "initial");
  fsdp_model_t *model = host_model(&SPEC, values);
  fsdp_trace_t *trace = trace_of(model, how->run_all);
  if (how->min_numel > 0)
    CHECK_OK(fsdp_model_wrap_trace(model, trace, how->min_numel));
  else if (broken("leaves_trace"))
    CHECK_OK(fsdp_model_wrap_trace(model, trace, 1));
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine));
  if (how->ordered && !broken("no_prefetch")) {
    CHECK_OK(fsdp_engine_set_prefetch_order(engine, trace));
  }
  fsdp_model_destroy(model);
  fsdp_trace_destroy(trace);
  host_sharded(&sharded, &SPEC, engine, job->comm, 0, 0);
  host_reference(&reference, &SPEC, values, job->world);
  CHECK_EQ(units_of(&sharded), how->units);

  const float *x = scenario_f32(file, "input", 3, DATA_RANKS, BATCH, N, 0);
  const float *losses = scenario_f32(file, "loss", 1, DATA_RANKS, 0, 0, 0);
  uint64_t gathers = 0;
  for (int step = 0; step < STEPS; step++) {
    const float loss = pass(&sharded, x + job->rank * BATCH * N, how->run_all);
    for (int32_t r = 0; r < job->world; r++) {
      reference.rank = r;
      pass(&reference, x + r * BATCH * N, how->run_all);
    }
    host_reduce(&reference);
    if (step == 0 && !how->run_all) {
      check_close(&loss, &losses[job->rank], 1, 1e-6, "loss");
      check_reference(&reference, file);
    }
    host_check_shards(&sharded, &reference, "gradients");
    host_sgd(&sharded, 0.01f);
    host_sgd(&reference, 0.01f);
    host_check_shards(&sharded, &reference, "after the step");
    /* As many all-gathers in every iteration, fetched ahead or not. */
    const fsdp_stats_t stats = stats_of(engine);
    if (step == 0) gathers = stats.all_gathers;
    CHECK_EQ(stats.all_gathers, gathers * (uint64_t)(step + 1));
    if (!how->ordered)
      CHECK_EQ(stats.prefetches, 0);
    else
      CHECK(stats.prefetches >= how->ahead * (uint64_t)(step + 1));
    CHECK(stats.prefetches <= stats.all_gathers);
  }
  fsdp_engine_destroy(engine);
}

int main(void) {
  enum {
    L0 = 1 << LAYER0,
    L1 = 1 << LAYER1,
    L2 = 1 << LAYER2,
    L20 = 1 << LAYER2_0,
    L22 = 1 << LAYER2_2
  };
  /* layer0 has 42 elements, layer1 and layer2 have 36, layer2's two have 18 each; layer1 is not
   * part of the shorter trace. The order of all layers is root, layer0, layer2, layer1, layer0:
   * each but the first, and but what is there already, can be fetched ahead. */
  static const train_t cases[] = {{1, 0, 0, 1, 0},
                                  {1, 0, 30, 1 | L0 | L1 | L2, 0},
                                  {1, 1, 30, 1 | L0 | L1 | L2, 4},
                                  {0, 0, 30, 1 | L0 | L2, 0},
                                  {0, 1, 30, 1 | L0 | L2, 2},
                                  {1, 1, 18, 1 | L0 | L1 | L20 | L22, 5},
                                  {1, 1, 40, 1 | L0, 1}};
  const job_t job = join_job();
  safetensors_t *file = scenario_open("fx", 0);
  CHECK(job.world <= DATA_RANKS);
  check_trace(file, 1);
  check_trace(file, 0);
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) train(&job, file, &cases[i]);
  safetensors_close(file);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
