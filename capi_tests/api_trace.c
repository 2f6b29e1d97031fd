/* Execution-order tracing: what a host announces is what it gets back, in the structures that PyTorch's FSDP tracer
 * has; wrapping by a trace; every wrong call. */
#include "test.h"

enum { ROOT, LAYER0, LAYER1, LAYER2, LAYER2_0, LAYER2_1, LAYER2_2, RELU, MODULES };
enum { WEIGHT1, WEIGHT2, UNUSED, W0, B0, W1, W20, W22, PARAMS };

/* The model of PyTorch's tracing test: two weights and an unused one in the root, layer0 with a bias, layer1, layer2 of
 * linear, relu, linear, and one relu that is called four times. Nothing has storage: a trace needs none. */
static fsdp_model_t *net(void) {
  static const struct {
    uint32_t parent;
    const char *name, *class_name;
  } modules[MODULES - 1] = {{ROOT, "layer0", "Linear"}, {ROOT, "layer1", "Linear"},
                            {ROOT, "layer2", "Sequential"}, {LAYER2, "0", "Linear"},
                            {LAYER2, "1", "ReLU"}, {LAYER2, "2", "Linear"}, {ROOT, "relu", "ReLU"}};
  static const struct {
    uint32_t module;
    const char *name;
    int32_t ndim;
    int64_t shape[2];
  } params[PARAMS] = {{ROOT, "weight1", 2, {6, 6}},   {ROOT, "weight2", 2, {6, 6}},
                      {ROOT, "unused", 2, {2, 2}},    {LAYER0, "weight", 2, {6, 6}},
                      {LAYER0, "bias", 1, {6, 0}},    {LAYER1, "weight", 2, {6, 6}},
                      {LAYER2_0, "weight", 2, {3, 6}}, {LAYER2_2, "weight", 2, {6, 3}}};
  fsdp_model_t *model = NULL;
  uint32_t number = UINT32_MAX;
  CHECK_OK(fsdp_model_create("Model", &model));
  for (uint32_t m = 0; m < MODULES - 1; m++) {
    CHECK_OK(fsdp_model_add_module(model, modules[m].parent, modules[m].name, modules[m].class_name,
                                   &number));
    CHECK_EQ(number, m + 1);
  }
  for (uint32_t p = 0; p < PARAMS; p++) {
    int64_t shape[2] = {params[p].shape[0], params[p].shape[1]};
    fsdp_tensor_t t = tensor_f32(NULL, params[p].ndim, shape);
    CHECK_OK(fsdp_model_add_parameter(model, params[p].module, params[p].name, &t, 1, &number));
    CHECK_EQ(number, p);
  }
  return model;
}

static fsdp_trace_t *trace_of(const fsdp_model_t *model) {
  fsdp_trace_t *trace = NULL;
  CHECK_OK(fsdp_trace_create(model, &trace));
  CHECK(trace != NULL);
  return trace;
}

/* A module that does one operation on up to two parameters; PARAMS stands for none. */
static void call(fsdp_trace_t *trace, uint32_t module, uint32_t first, uint32_t second) {
  uint32_t params[2] = {first, second};
  CHECK_OK(fsdp_trace_enter(trace, module));
  CHECK_OK(fsdp_trace_use(trace, params, (uint32_t)((first < PARAMS) + (second < PARAMS))));
  CHECK_OK(fsdp_trace_leave(trace, module));
}

static void use(fsdp_trace_t *trace, uint32_t param) {
  CHECK_OK(fsdp_trace_use(trace, &param, 1));
}

/* The forward with all layers, in which layer0 is used twice. */
static fsdp_trace_t *traced(const fsdp_model_t *model) {
  fsdp_trace_t *trace = trace_of(model);
  CHECK_OK(fsdp_trace_enter(trace, ROOT));
  call(trace, LAYER0, W0, B0);
  call(trace, RELU, PARAMS, PARAMS);
  CHECK_OK(fsdp_trace_enter(trace, LAYER2));
  call(trace, LAYER2_0, W20, PARAMS);
  call(trace, LAYER2_1, PARAMS, PARAMS);
  call(trace, LAYER2_2, W22, PARAMS);
  CHECK_OK(fsdp_trace_leave(trace, LAYER2));
  call(trace, RELU, PARAMS, PARAMS);
  use(trace, WEIGHT1);
  call(trace, LAYER1, W1, PARAMS);
  call(trace, RELU, PARAMS, PARAMS);
  use(trace, WEIGHT2);
  call(trace, LAYER0, W0, B0);
  call(trace, RELU, PARAMS, PARAMS);
  CHECK_OK(fsdp_trace_leave(trace, ROOT));
  return trace;
}

static void check_list(const uint32_t *list, uint32_t count, const uint32_t *want,
                       uint32_t want_count) {
  CHECK_EQ(count, want_count);
  CHECK((list == NULL) == (count == 0));
  for (uint32_t i = 0; i < count; i++) CHECK_EQ(list[i], want[i]);
}

/* Usage number `index` of `module` is of `used`, with the first `count` of three parameters. */
static void check_usage(const fsdp_trace_t *trace, uint32_t module, uint32_t index, uint32_t used,
                        uint32_t count, uint32_t p0, uint32_t p1) {
  const uint32_t want[2] = {p0, p1}, *params = NULL;
  uint32_t got_used = UINT32_MAX, got_count = UINT32_MAX;
  CHECK_OK(fsdp_trace_usage(trace, module, index, &got_used, &params, &got_count));
  CHECK_EQ(got_used, used);
  check_list(params, got_count, want, count);
}

static uint32_t usage_count(const fsdp_trace_t *trace, uint32_t module) {
  uint32_t count = UINT32_MAX;
  CHECK_OK(fsdp_trace_usage_count(trace, module, &count));
  return count;
}

static void recording(void) {
  static const uint32_t modules[] = {ROOT,     LAYER0, RELU,   LAYER2, LAYER2_0, LAYER2_1,
                                     LAYER2_2, RELU,   LAYER1, RELU,   LAYER0,   RELU};
  static const uint32_t params[] = {W0, B0, W20, W22, WEIGHT1, W1, WEIGHT2};
  fsdp_model_t *model = net();
  fsdp_trace_t *trace = traced(model);
  const uint32_t *list = NULL;
  uint32_t count = UINT32_MAX;
  /* The trace stands alone. */
  fsdp_model_destroy(model);
  CHECK_OK(fsdp_trace_module_order(trace, &list, &count));
  check_list(list, count, modules, sizeof modules / sizeof *modules);
  CHECK_OK(fsdp_trace_param_order(trace, &list, &count));
  check_list(list, count, params, sizeof params / sizeof *params);
  for (uint32_t p = 0; p < PARAMS; p++) {
    int32_t visited = -1;
    CHECK_OK(fsdp_trace_visited(trace, p, &visited));
    CHECK_EQ(visited, p != UNUSED);
  }
  CHECK_EQ(usage_count(trace, ROOT), 6);
  check_usage(trace, ROOT, 0, LAYER0, 2, W0, B0);
  check_usage(trace, ROOT, 1, LAYER2, 2, W20, W22);
  check_usage(trace, ROOT, 2, ROOT, 1, WEIGHT1, 0);
  check_usage(trace, ROOT, 3, LAYER1, 1, W1, 0);
  check_usage(trace, ROOT, 4, ROOT, 1, WEIGHT2, 0);
  check_usage(trace, ROOT, 5, LAYER0, 2, W0, B0);
  /* Called twice, one call's usage. */
  CHECK_EQ(usage_count(trace, LAYER0), 1);
  check_usage(trace, LAYER0, 0, LAYER0, 2, W0, B0);
  CHECK_EQ(usage_count(trace, LAYER1), 1);
  check_usage(trace, LAYER1, 0, LAYER1, 1, W1, 0);
  CHECK_EQ(usage_count(trace, LAYER2), 2);
  check_usage(trace, LAYER2, 0, LAYER2_0, 1, W20, 0);
  check_usage(trace, LAYER2, 1, LAYER2_2, 1, W22, 0);
  CHECK_EQ(usage_count(trace, RELU), 0);
  fsdp_trace_destroy(trace);
}

static void a_fresh_trace_is_empty(void) {
  fsdp_model_t *model = net();
  fsdp_trace_t *trace = trace_of(model);
  const uint32_t *list = (const uint32_t *)(const void *)model;
  uint32_t count = UINT32_MAX;
  CHECK_OK(fsdp_trace_module_order(trace, &list, &count));
  check_list(list, count, NULL, 0);
  list = (const uint32_t *)(const void *)model;
  CHECK_OK(fsdp_trace_param_order(trace, &list, &count));
  check_list(list, count, NULL, 0);
  CHECK_EQ(usage_count(trace, ROOT), 0);
  fsdp_trace_destroy(trace);
  fsdp_model_destroy(model);
}

static void wrong_order(void) {
  fsdp_model_t *model = net();
  fsdp_trace_t *trace = trace_of(model);
  uint32_t param = W0;
  CHECK_ERR(fsdp_trace_enter(trace, LAYER0), FSDP_ERR_INVALID_STATE, "\"layer0\" is entered before");
  CHECK_ERR(fsdp_trace_leave(trace, LAYER0), FSDP_ERR_INVALID_STATE, "\"layer0\" is left without");
  CHECK_ERR(fsdp_trace_use(trace, &param, 1), FSDP_ERR_INVALID_STATE, "enter the root first");
  CHECK_OK(fsdp_trace_enter(trace, ROOT));
  CHECK_ERR(fsdp_trace_enter(trace, ROOT), FSDP_ERR_INVALID_STATE, "second time");
  CHECK_OK(fsdp_trace_enter(trace, LAYER2));
  CHECK_ERR(fsdp_trace_leave(trace, ROOT), FSDP_ERR_INVALID_STATE, "of module \"layer2\"");
  CHECK_ERR(fsdp_trace_enter(trace, MODULES), FSDP_ERR_INVALID_ARGUMENT, "module 8");
  CHECK_ERR(fsdp_trace_leave(trace, UINT32_MAX), FSDP_ERR_INVALID_ARGUMENT, "module 4294967295");
  param = PARAMS;
  CHECK_ERR(fsdp_trace_use(trace, &param, 1), FSDP_ERR_INVALID_ARGUMENT, "parameter 8");
  CHECK_ERR(fsdp_trace_use(trace, NULL, 1), FSDP_ERR_INVALID_ARGUMENT, "params is NULL");
  CHECK_OK(fsdp_trace_use(trace, NULL, 0));
  CHECK_OK(fsdp_trace_leave(trace, LAYER2));
  CHECK_OK(fsdp_trace_leave(trace, ROOT));
  CHECK_ERR(fsdp_trace_enter(trace, ROOT), FSDP_ERR_INVALID_STATE, "second time");
  CHECK_ERR(fsdp_trace_enter(trace, LAYER0), FSDP_ERR_INVALID_STATE, "after the root was left");
  /* None of the failed calls left anything behind. */
  CHECK_EQ(usage_count(trace, ROOT), 1);
  CHECK_EQ(usage_count(trace, LAYER2), 0);
  fsdp_trace_destroy(trace);
  fsdp_model_destroy(model);
}

/* Runs `call`, which uses `trace`, with every kind of handle that is none of a trace. */
#define CHECK_BAD_TRACES(call) \
  do { \
    fsdp_model_t *other_ = net(); \
    fsdp_trace_t *trace = NULL; \
    CHECK_ERR(call, FSDP_ERR_INVALID_ARGUMENT, "trace is NULL"); \
    trace = trace_of(other_); \
    fsdp_trace_destroy(trace); \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "destroyed"); \
    trace = (fsdp_trace_t *)(void *)other_; \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "a model"); \
    trace = NO_SUCH_HANDLE(fsdp_trace_t); \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "trace"); \
    fsdp_model_destroy(other_); \
  } while (0)

static void arguments(void) {
  fsdp_model_t *model = net();
  fsdp_trace_t *real = traced(model), *out = NO_SUCH_HANDLE(fsdp_trace_t);
  const uint32_t *list = NULL;
  uint32_t count = 77, module = 77, param = W0;
  int32_t visited = 77;
  CHECK_ERR(fsdp_trace_create(NULL, &out), FSDP_ERR_INVALID_ARGUMENT, "model is NULL");
  CHECK_ERR(fsdp_trace_create(model, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_trace_create((fsdp_model_t *)(void *)real, &out), FSDP_ERR_INVALID_HANDLE,
            "a trace");
  CHECK(out == NO_SUCH_HANDLE(fsdp_trace_t));
  CHECK_BAD_TRACES(fsdp_trace_enter(trace, ROOT));
  CHECK_BAD_TRACES(fsdp_trace_leave(trace, ROOT));
  CHECK_BAD_TRACES(fsdp_trace_use(trace, &param, 1));
  CHECK_BAD_TRACES(fsdp_trace_module_order(trace, &list, &count));
  CHECK_BAD_TRACES(fsdp_trace_param_order(trace, &list, &count));
  CHECK_BAD_TRACES(fsdp_trace_visited(trace, W0, &visited));
  CHECK_BAD_TRACES(fsdp_trace_usage_count(trace, ROOT, &count));
  CHECK_BAD_TRACES(fsdp_trace_usage(trace, ROOT, 0, &module, &list, &count));
  CHECK_ERR(fsdp_trace_module_order(real, NULL, &count), FSDP_ERR_INVALID_ARGUMENT,
            "out_modules is NULL");
  CHECK_ERR(fsdp_trace_module_order(real, &list, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_count is NULL");
  CHECK_ERR(fsdp_trace_param_order(real, NULL, &count), FSDP_ERR_INVALID_ARGUMENT,
            "out_params is NULL");
  CHECK_ERR(fsdp_trace_param_order(real, &list, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_count is NULL");
  CHECK_ERR(fsdp_trace_visited(real, W0, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_trace_visited(real, PARAMS, &visited), FSDP_ERR_INVALID_ARGUMENT, "parameter 8");
  CHECK_ERR(fsdp_trace_usage_count(real, ROOT, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_trace_usage_count(real, MODULES, &count), FSDP_ERR_INVALID_ARGUMENT, "module 8");
  CHECK_ERR(fsdp_trace_usage(real, ROOT, 6, &module, &list, &count), FSDP_ERR_INVALID_ARGUMENT,
            "usage 6");
  CHECK_ERR(fsdp_trace_usage(real, MODULES, 0, &module, &list, &count), FSDP_ERR_INVALID_ARGUMENT,
            "module 8");
  CHECK_ERR(fsdp_trace_usage(real, ROOT, 0, NULL, &list, &count), FSDP_ERR_INVALID_ARGUMENT,
            "out_module is NULL");
  CHECK_ERR(fsdp_trace_usage(real, ROOT, 0, &module, NULL, &count), FSDP_ERR_INVALID_ARGUMENT,
            "out_params is NULL");
  CHECK_ERR(fsdp_trace_usage(real, ROOT, 0, &module, &list, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_count is NULL");
  /* Nothing is written on failure. */
  CHECK(list == NULL);
  CHECK_EQ(count, 77);
  CHECK_EQ(module, 77);
  CHECK_EQ(visited, 77);
  fsdp_trace_destroy(NULL);
  fsdp_trace_destroy(NO_SUCH_HANDLE(fsdp_trace_t));
  fsdp_trace_destroy(real);
  fsdp_trace_destroy(real);
  fsdp_model_destroy(model);
}

static int32_t fill(const fsdp_module_init_t *init, void *user_data) {
  (void)user_data;
  for (uint32_t i = 0; i < init->param_count; i++) {
    const fsdp_tensor_t *t = &init->tensors[i];
    int64_t numel = 1;
    for (int32_t d = 0; d < t->ndim; d++) numel *= t->shape[d];
    for (int64_t e = 0; e < numel; e++) ((float *)t->data)[e] = 0;
  }
  return 0;
}

/* The units' names, joined by spaces, "(root)" for the root's. */
static const char *units(const fsdp_model_t *model) {
  static char text[256];
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_comm_t *comm = NULL;
  fsdp_engine_t *engine = NULL;
  uint32_t count = 0;
  config.param_init_fn = fill;
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_OK(fsdp_engine_create(model, comm, &config, &engine));
  CHECK_OK(fsdp_engine_unit_count(engine, &count));
  text[0] = '\0';
  for (uint32_t u = 0; u < count; u++) {
    fsdp_unit_info_t info = unit_info_init();
    CHECK_OK(fsdp_engine_unit_info(engine, u, &info));
    size_t used = strlen(text);
    snprintf(text + used, sizeof text - used, "%s%s", u > 0 ? " " : "",
             u > 0 ? info.name : "(root)");
  }
  fsdp_engine_destroy(engine);
  fsdp_comm_destroy(comm);
  return text;
}

static void wrapping(void) {
  fsdp_model_t *model = net();
  fsdp_trace_t *real = traced(model), *empty = trace_of(model);
  CHECK_BAD_TRACES(fsdp_model_wrap_trace(model, trace, 1));
  CHECK_ERR(fsdp_model_wrap_trace(NULL, real, 1), FSDP_ERR_INVALID_ARGUMENT, "model is NULL");
  CHECK_ERR(fsdp_model_wrap_trace(model, real, 0), FSDP_ERR_INVALID_ARGUMENT, "at least 1");
  CHECK_ERR(fsdp_model_wrap_trace(model, empty, 1), FSDP_ERR_INVALID_STATE, "the trace is empty");
  CHECK_OK(fsdp_trace_enter(empty, ROOT));
  CHECK_ERR(fsdp_model_wrap_trace(model, empty, 1), FSDP_ERR_INVALID_STATE, "not complete");
  CHECK_STR(units(model), "(root)");
  /* layer0 has 42 elements, layer1 36, layer2 18 in each half. */
  CHECK_OK(fsdp_model_wrap_trace(model, real, 36));
  CHECK_STR(units(model), "(root) layer0 layer1 layer2");
  fsdp_model_destroy(model);

  /* Without layer1 in the forward, layer1 is no unit; a bias that is not used does not count. */
  model = net();
  fsdp_trace_t *half = trace_of(model);
  CHECK_OK(fsdp_trace_enter(half, ROOT));
  call(half, LAYER0, W0, PARAMS);
  CHECK_OK(fsdp_trace_leave(half, ROOT));
  CHECK_OK(fsdp_model_wrap_trace(model, half, 37));
  CHECK_STR(units(model), "(root)");
  CHECK_OK(fsdp_model_wrap_trace(model, half, 36));
  CHECK_STR(units(model), "(root) layer0");
  /* The trace is of the model as it was. */
  uint32_t module = 0;
  CHECK_OK(fsdp_model_add_module(model, ROOT, "more", "Linear", &module));
  CHECK_ERR(fsdp_model_wrap_trace(model, half, 1), FSDP_ERR_INVALID_ARGUMENT, "another model");
  fsdp_trace_destroy(half);
  fsdp_trace_destroy(real);
  fsdp_trace_destroy(empty);
  fsdp_model_destroy(model);
}

int main(void) {
  recording();
  a_fresh_trace_is_empty();
  wrong_order();
  arguments();
  wrapping();
  return 0;
}
