/* Modules without storage: their parameters get values when the engine is made, by the modules'
 * reset functions, by param_init_fn or by a recorded thunk per parameter, however they are wrapped;
 * then they are, and train as, the same model made the regular way, and as PyTorch's. Buffers are
 * filled in reset functions. What an initializer does wrong is an error on every rank that names
 * it, and the communicator works on.
 *
 * Breaks: wrong_init, uninitialized, buffer_not_filled, no_error, no_average. */
#include "ranks.h"
#include "scenario_host.h"
#include "scenario_layers.h"

enum { BATCH = 10, SEED = 42, MAX_WIDTH = 5 };

/* ---- the models: chains of layers ---- */

enum { SIMPLE_BUFFER = 3, NESTED_LIN1 = 1, NESTED_L3 = 3, NESTED_BUFFER = 6 };

static const host_module_t SIMPLE_MODULE[] = {{0, "", "MyModel"},
                                              {0, "lin1", "MyLinear"},
                                              {0, "lin2", "MyLinear"},
                                              {0, "buf_mod", "MyBuffer"}};
static const host_param_t SIMPLE_PARAM[] = {{1, "weight", 2, {4, 2}, 1},
                                            {2, "weight", 2, {2, 4}, 1}};
static const host_module_t NESTED_MODULE[] = {{0, "", "NestedModel"},    {0, "lin1", "MyLinear"},
                                              {0, "lin2", "MyLinear"},   {0, "l3", "MyModel"},
                                              {3, "lin1", "MyLinear"},   {3, "lin2", "MyLinear"},
                                              {3, "buf_mod", "MyBuffer"}};
static const host_param_t NESTED_PARAM[] = {{1, "weight", 2, {3, 2}, 1},
                                            {2, "weight", 2, {2, 3}, 1},
                                            {4, "weight", 2, {4, 2}, 1},
                                            {5, "weight", 2, {2, 4}, 1}};
typedef struct {
  const char *name; /* in the data */
  host_spec_t spec;
  uint32_t buffer; /* the module that only has a buffer, or 0 */
} chain_t;

static const chain_t SIMPLE = {"simple", {4, 2, SIMPLE_MODULE, SIMPLE_PARAM}, SIMPLE_BUFFER};
static const chain_t NESTED = {"nested", {7, 4, NESTED_MODULE, NESTED_PARAM}, NESTED_BUFFER};

/* Enters (or leaves) a parameter's module and those around it, but the root. */
static void around(host_t *host, uint32_t param, int backward, int leave) {
  const uint32_t m = host->spec->param[param].module, parent = host->spec->module[m].parent;
  if (!leave && parent != 0) host_enter(host, parent, backward);
  (leave ? host_leave : host_enter)(host, m, backward);
  if (leave && parent != 0) host_leave(host, parent, backward);
}

/* Forward and backward of a chain of linear layers without bias, the loss being the sum of its
 * output. */
static float pass(host_t *host, const float *x) {
  static float a[HOST_PARAMS + 1][BATCH * MAX_WIDTH], d[2][BATCH * MAX_WIDTH];
  const host_spec_t *spec = host->spec;
  const uint32_t layers = spec->params;
  float dw[HOST_NUMEL];
  memcpy(a[0], x, sizeof(float) * BATCH * (size_t)spec->param[0].shape[1]);
  host_enter(host, 0, 0);
  for (uint32_t p = 0; p < layers; p++) {
    around(host, p, 0, 0);
    linear(a[p + 1], a[p], host_param(host, p), NULL, BATCH, (int)spec->param[p].shape[1],
           (int)spec->param[p].shape[0]);
    around(host, p, 0, 1);
  }
  host_leave(host, 0, 0);
  const int outs = (int)spec->param[layers - 1].shape[0];
  fill(d[layers % 2], 1, BATCH * outs);
  host_enter(host, 0, 1);
  for (uint32_t p = layers; p-- > 0;) {
    around(host, p, 1, 0);
    linear_grad(d[(p + 1) % 2], a[p], host_param(host, p), BATCH, (int)spec->param[p].shape[1],
                (int)spec->param[p].shape[0], d[p % 2], dw, NULL);
    host_add_grad(host, p, dw);
    around(host, p, 1, 1);
  }
  host_leave(host, 0, 1);
  return sum_of(a[layers], BATCH * outs);
}

/* ---- initializers ---- */

/* What torch.manual_seed(42) and xavier_uniform_ give depends on the shape only: it is in the data.
 */
static const float *seeded_xavier(const safetensors_t *file, int64_t rows, int64_t columns) {
  static const char *const names[] = {"nested.initial.lin1.weight", "nested.initial.lin2.weight",
                                      "simple.initial.lin1.weight", "simple.initial.lin2.weight",
                                      "simple.initial.buf_mod.buf"};
  for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
    safetensors_tensor_t t;
    CHECK(safetensors_tensor(file, names[i], &t) == 0);
    if (t.shape[0] == rows && t.shape[1] == columns) return (const float *)t.data;
  }
  test_fail(__FILE__, __LINE__, "no values for [%lld, %lld]", (long long)rows, (long long)columns);
  return NULL;
}

/* The user data of the initializers below. */
typedef struct {
  const safetensors_t *file;
  float buffer[9];
  int calls, buffer_calls;
  /* One element of this parameter is left out; a call for this module fails. NO_ONE: none. */
  uint32_t leave_out, fail_at;
} init_t;

static const uint32_t NO_ONE = 1000;

static init_t init_of(const safetensors_t *file) {
  init_t init;
  memset(&init, 0, sizeof init);
  init.file = file;
  init.leave_out = broken("uninitialized") ? 0 : NO_ONE;
  init.fail_at = NO_ONE;
  return init;
}

static void xavier(init_t *init, uint32_t param, const fsdp_tensor_t *t) {
  float *data = (float *)t->data;
  const int64_t n = t->shape[0] * t->shape[1];
  const float *values = seeded_xavier(init->file, t->shape[0], t->shape[1]);
  CHECK(t->ndim == 2 && t->dtype.code == FSDP_DTYPE_FLOAT && t->dtype.bits == 32);
  for (int64_t i = 0; i < n; i++) {
    if (param == init->leave_out && i == n - 1) continue;
    /* As if the generator were not seeded again for each module. */
    data[i] = broken("wrong_init") ? values[i] + 0.5f * (float)(init->calls % 2) : values[i];
  }
  init->calls++;
}

/* A module's reset_parameters(), and what is given as param_init_fn: of linear layers, and of the
 * one that has a buffer in the host's own memory and no parameters. */
static int32_t reset(const fsdp_module_init_t *module, void *user_data) {
  init_t *init = (init_t *)user_data;
  CHECK_EQ(module->struct_size, sizeof *module);
  if (module->module == init->fail_at) return 7;
  if (strcmp(module->class_name, "MyBuffer") == 0) {
    CHECK_EQ(module->param_count, 0);
    if (!broken("buffer_not_filled"))
      memcpy(init->buffer, seeded_xavier(init->file, 3, 3), sizeof init->buffer);
    init->buffer_calls++;
    return 0;
  }
  CHECK_STR(module->class_name, "MyLinear");
  CHECK(strstr(module->fqn, "lin") != NULL);
  CHECK_EQ(module->param_count, 1);
  xavier(init, module->params[0], &module->tensors[0]);
  return 0;
}

static int32_t param_thunk(uint32_t param, const fsdp_tensor_t *tensor, void *user_data) {
  xavier((init_t *)user_data, param, tensor);
  return 0;
}

/* ---- cases ---- */

typedef enum { BY_RESET, BY_PARAM_INIT_FN, BY_THUNKS, BY_ALL_THREE, INITS } how_t;
typedef enum { WRAP_NONE, WRAP_ALWAYS, WRAP_BY_HAND, WRAPS } wrap_t;
static const char *const HOW[INITS] = {"reset functions", "param_init_fn", "thunks", "all three"};
static const char *const WRAP[WRAPS] = {"one unit", "wrap_always", "wrapped by hand"};

static void wrap_model(fsdp_model_t *model, const chain_t *chain, wrap_t wrap) {
  if (wrap == WRAP_ALWAYS) CHECK_OK(fsdp_model_wrap_always(model));
  if (wrap != WRAP_BY_HAND) return;
  CHECK_OK(fsdp_model_wrap_module(model, NESTED_LIN1));
  if (chain == &NESTED) CHECK_OK(fsdp_model_wrap_module(model, NESTED_L3));
}

/* An initializer that must not be asked, because another one goes before it. */
static int32_t not_asked(const fsdp_module_init_t *module, void *user_data) {
  (void)user_data;
  if (strcmp(module->class_name, "MyBuffer") == 0) return 0;
  test_fail(__FILE__, __LINE__, "the reset function of %s was called", module->fqn);
  return 1;
}

static int32_t thunk_not_asked(uint32_t param, const fsdp_tensor_t *tensor, void *user_data) {
  (void)tensor;
  (void)user_data;
  test_fail(__FILE__, __LINE__, "the thunk of parameter %u was called", (unsigned)param);
  return 1;
}

static fsdp_model_t *meta_model(const chain_t *chain, how_t how, wrap_t wrap, init_t *init,
                                fsdp_engine_config_t *config) {
  fsdp_model_t *model = host_model(&chain->spec, NULL);
  wrap_model(model, chain, wrap);
  if (how == BY_PARAM_INIT_FN || how == BY_ALL_THREE) {
    config->param_init_fn = reset;
    config->param_init_user_data = init;
  }
  for (uint32_t m = 0; m < chain->spec.modules; m++) {
    if (strcmp(chain->spec.module[m].class_name, "MyLinear") == 0 && how != BY_PARAM_INIT_FN)
      CHECK_OK(fsdp_model_set_reset(model, m, how == BY_RESET ? reset : not_asked, init));
    if (m == chain->buffer) CHECK_OK(fsdp_model_set_reset(model, m, reset, init));
  }
  /* Recorded last first: the order is not what matters. */
  for (uint32_t p = chain->spec.params; p-- > 0 && how >= BY_THUNKS;) {
    CHECK_OK(fsdp_model_set_param_init(model, p, how == BY_THUNKS ? param_thunk : thunk_not_asked,
                                       init));
  }
  return model;
}

/* The largest unit's parameters, in bytes. */
static uint64_t largest_unit(const fsdp_engine_t *engine, const host_spec_t *spec) {
  uint32_t units = 0;
  uint64_t largest = 0;
  CHECK_OK(fsdp_engine_unit_count(engine, &units));
  for (uint32_t u = 0; u < units; u++) {
    fsdp_unit_info_t info = unit_info_init();
    uint64_t bytes = 0;
    CHECK_OK(fsdp_engine_unit_info(engine, u, &info));
    for (uint32_t i = 0; i < info.param_count; i++)
      bytes += sizeof(float) * (uint64_t)host_numel(spec, info.params[i]);
    if (bytes > largest) largest = bytes;
  }
  return largest;
}

/* Initialized, it is the regular model, also after a step. */
static void train_chain(const job_t *job, const safetensors_t *file, const chain_t *chain,
                        how_t how, wrap_t wrap) {
  static host_t sharded, plain, reference;
  char text[160], name[64];
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_engine_t *meta = NULL, *regular = NULL;
  init_t init = init_of(file);
  snprintf(text, sizeof text, "%s, %s, %s", chain->name, HOW[how], WRAP[wrap]);
  test_context(text);

  fsdp_model_t *model = meta_model(chain, how, wrap, &init, &config);
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &meta));
  fsdp_model_destroy(model);
  CHECK_EQ(stats_of(meta).materialized_peak_bytes, largest_unit(meta, &chain->spec));
  CHECK_EQ(init.calls, chain->spec.params);
  CHECK_EQ(init.buffer_calls, 1);
  snprintf(name, sizeof name, "%s.initial.%s", chain->name,
           chain == &NESTED ? "l3.buf_mod.buf" : "buf_mod.buf");
  check_bits(init.buffer, scenario_f32(file, name, 2, 3, 3, 0, 0), 9, name);

  /* The regular way: memory first, then the same values, then the engine. */
  snprintf(name, sizeof name, "%s.initial", chain->name);
  float *const *values = host_values(&chain->spec, file, name);
  model = host_model(&chain->spec, values);
  wrap_model(model, chain, wrap);
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &regular));
  fsdp_model_destroy(model);
  host_sharded(&sharded, &chain->spec, meta, job->comm, 0, 0);
  host_sharded(&plain, &chain->spec, regular, job->comm, 0, 0);
  host_reference(&reference, &chain->spec, values, job->world);
  host_check_file(&sharded, file, name, 0);
  host_check_shards(&sharded, &reference, "meta");
  host_check_shards(&plain, &reference, "regular");

  const int ins = (int)chain->spec.param[0].shape[1];
  snprintf(name, sizeof name, "%s.input", chain->name);
  const float *x = scenario_f32(file, name, 3, job->world, BATCH, ins, 0);
  snprintf(name, sizeof name, "%s.loss", chain->name);
  const float *losses = scenario_f32(file, name, 1, job->world, 0, 0, 0);
  const float loss = pass(&sharded, x + job->rank * BATCH * ins);
  check_close(&loss, &losses[job->rank], 1, 1e-6, name);
  pass(&plain, x + job->rank * BATCH * ins);
  for (int32_t r = 0; r < job->world; r++) {
    reference.rank = r;
    pass(&reference, x + r * BATCH * ins);
  }
  host_reduce(&reference);
  host_check_shards(&sharded, &reference, "meta, gradients");
  host_sgd(&sharded, 1e-3f);
  host_sgd(&plain, 1e-3f);
  host_sgd(&reference, 1e-3f);
  host_check_shards(&sharded, &reference, "meta, after a step");
  host_check_shards(&plain, &reference, "regular, after a step");
  snprintf(name, sizeof name, "%s.trained", chain->name);
  host_check_file(&sharded, file, name, 1e-6);
  fsdp_engine_destroy(meta);
  fsdp_engine_destroy(regular);
}

/* What must be refused; every failure is every rank's, and the next engine can be made. */
static void check_errors(const job_t *job, const safetensors_t *file) {
  fsdp_engine_t *engine = NULL;
  const int32_t last = job->world - 1;
  test_context("errors");
  fsdp_model_t *model = host_model(&SIMPLE.spec, NULL);
  CHECK_ERR(fsdp_model_set_reset(model, 1, NULL, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "to be callable");
  CHECK_ERR(fsdp_model_set_param_init(model, 1, NULL, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "to be callable");
  int something = 42;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  config.param_init_user_data = &something;
  CHECK_ERR(fsdp_engine_create(model, job->comm, &config, &engine), FSDP_ERR_INVALID_ARGUMENT,
            "to be callable");
  CHECK_ERR(fsdp_engine_create(model, job->comm, NULL, &engine), FSDP_ERR_INVALID_ARGUMENT,
            "\"lin1.weight\"");
  fsdp_model_destroy(model);

  for (how_t how = BY_RESET; how <= BY_THUNKS; how++) {
    for (int only_last = 0; only_last < 2; only_last++) {
      const int wrong = !broken("no_error") && (!only_last || job->rank == last);
      init_t init = init_of(file);
      fsdp_engine_config_t with = FSDP_ENGINE_CONFIG_INIT;
      init.leave_out = wrong ? 1 : NO_ONE;
      model = meta_model(&SIMPLE, how, WRAP_ALWAYS, &init, &with);
      CHECK_ERR(fsdp_engine_create(model, job->comm, &with, &engine), FSDP_ERR_INVALID_STATE,
                "\"lin2.weight\" was left uninitialized");
      CHECK_OK(fsdp_comm_barrier(job->comm));
      init.leave_out = NO_ONE;
      if (how != BY_THUNKS) {
        init.fail_at = wrong ? 2 : NO_ONE;
        CHECK_ERR(fsdp_engine_create(model, job->comm, &with, &engine), FSDP_ERR_CALLBACK, "lin2");
        CHECK_OK(fsdp_comm_barrier(job->comm));
        init.fail_at = NO_ONE;
      }
      CHECK_OK(fsdp_engine_create(model, job->comm, &with, &engine));
      fsdp_model_destroy(model);
      fsdp_engine_destroy(engine);
    }
  }
}

int main(void) {
  const job_t job = join_job();
  safetensors_t *file = scenario_open("meta", job.world);
  for (how_t how = BY_RESET; how < INITS; how++) {
    for (wrap_t wrap = WRAP_NONE; wrap < WRAPS; wrap++) {
      train_chain(&job, file, &SIMPLE, how, wrap);
      train_chain(&job, file, &NESTED, how, wrap);
    }
  }
  check_errors(&job, file);
  safetensors_close(file);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
