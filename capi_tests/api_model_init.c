/* Parameters without storage: reset functions, initializers of one parameter, the engine's own; their order, their
 * memory, their failures. World size 1. */
#include "test.h"

#include <math.h>

/* root: scale [] > a (unit): weight [7, 3], frozen [4] > x (unit): v [10], empty [0, 2]; b: buffers (no parameters).
 * frozen has storage, nothing else has. */
enum { ROOT, A, X, B, BUFFERS, MODULES };
enum { SCALE, WEIGHT, FROZEN, V, EMPTY, PARAMS };

static const int64_t NUMEL[PARAMS] = {1, 21, 4, 10, 0};
static float frozen[4] = {40, 41, 42, 43};

static float value_of(uint32_t param, int64_t i) { return (float)(100 * (param + 1)) + (float)i; }

/* What the initializers of this file saw and are told to do. */
typedef struct {
  char seen[512];
  /* A parameter that is left alone from this element on; PARAMS: none. */
  uint32_t leave;
  int64_t leave_from;
  /* The module whose initializer fails, and its code. */
  uint32_t fail;
  int32_t code;
  /* What is added to every value. */
  float shift;
  fsdp_model_t *model;
} host_t;

static host_t host_of(fsdp_model_t *model) {
  host_t host;
  memset(&host, 0, sizeof host);
  host.leave = PARAMS;
  host.fail = MODULES;
  host.model = model;
  return host;
}

static void note(host_t *host, const char *text) {
  size_t used = strlen(host->seen);
  snprintf(host->seen + used, sizeof host->seen - used, "%s;", text);
}

static void fill(host_t *host, uint32_t param, const fsdp_tensor_t *t) {
  int64_t numel = 1;
  for (int32_t d = 0; d < t->ndim; d++) numel *= t->shape[d];
  CHECK_EQ(numel, NUMEL[param]);
  CHECK_EQ(t->device.device_type, FSDP_DEVICE_CPU);
  CHECK_EQ(t->dtype.code, FSDP_DTYPE_FLOAT);
  CHECK_EQ(t->dtype.bits, 32);
  CHECK_EQ(t->byte_offset, 0);
  CHECK(t->strides == NULL);
  CHECK_EQ((uintptr_t)t->data % 64, 0);
  if (host->leave == param) numel = host->leave_from;
  for (int64_t i = 0; i < numel; i++) ((float *)t->data)[i] = value_of(param, i) + host->shift;
}

/* A reset function: module and its class, the parameters it was given. */
static int32_t reset(const fsdp_module_init_t *init, void *user_data) {
  host_t *host = (host_t *)user_data;
  char text[128];
  CHECK_EQ(init->struct_size, sizeof *init);
  snprintf(text, sizeof text, "%u %s %s", (unsigned)init->module, init->fqn, init->class_name);
  for (uint32_t i = 0; i < init->param_count; i++) {
    size_t used = strlen(text);
    snprintf(text + used, sizeof text - used, " %u", (unsigned)init->params[i]);
    fill(host, init->params[i], &init->tensors[i]);
  }
  note(host, text);
  if (init->module == host->fail) return host->code;
  /* Calls into the library are allowed, also failing ones. */
  uint32_t module = 0;
  CHECK_ERR(fsdp_model_add_module(host->model, 99, "m", "M", &module), FSDP_ERR_INVALID_ARGUMENT,
            "99");
  return 0;
}

static int32_t init_param(uint32_t param, const fsdp_tensor_t *t, void *user_data) {
  host_t *host = (host_t *)user_data;
  char text[32];
  snprintf(text, sizeof text, "param %u", (unsigned)param);
  note(host, text);
  host->shift += 0.5f;
  fill(host, param, t);
  host->shift -= 0.5f;
  return param == WEIGHT && host->fail == WEIGHT ? host->code : 0;
}

static fsdp_model_t *bare(void) {
  static const uint32_t parents[MODULES] = {0, ROOT, A, ROOT, B};
  static const char *const names[MODULES] = {"", "a", "x", "b", "buffers"};
  static const uint32_t modules[PARAMS] = {ROOT, A, A, X, X};
  static const char *const param_names[PARAMS] = {"scale", "weight", "frozen", "v", "empty"};
  static int64_t shapes[PARAMS][2] = {{0, 0}, {7, 3}, {4, 0}, {10, 0}, {0, 2}};
  static const int32_t ndim[PARAMS] = {0, 2, 1, 1, 2};
  fsdp_model_t *model = NULL;
  uint32_t number = UINT32_MAX;
  CHECK_OK(fsdp_model_create("Net", &model));
  for (uint32_t m = 1; m < MODULES; m++) {
    CHECK_OK(fsdp_model_add_module(model, parents[m], names[m], "Block", &number));
    CHECK_EQ(number, m);
  }
  for (uint32_t p = 0; p < PARAMS; p++) {
    fsdp_tensor_t t = tensor_f32(p == FROZEN ? frozen : NULL, ndim[p], shapes[p]);
    CHECK_OK(fsdp_model_add_parameter(model, modules[p], param_names[p], &t, p != FROZEN, &number));
    CHECK_EQ(number, p);
  }
  CHECK_OK(fsdp_model_wrap_module(model, A));
  CHECK_OK(fsdp_model_wrap_module(model, X));
  return model;
}

/* With a reset function for every module but b. */
static fsdp_model_t *resettable(host_t *host) {
  fsdp_model_t *model = bare();
  for (uint32_t m = 0; m < MODULES; m++) {
    if (m != B) CHECK_OK(fsdp_model_set_reset(model, m, reset, host));
  }
  *host = host_of(model);
  return model;
}

static fsdp_status_t create(const fsdp_model_t *model, host_t *init, fsdp_engine_t **out) {
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_comm_t *comm = NULL;
  if (init != NULL) {
    config.param_init_fn = reset;
    config.param_init_user_data = init;
  }
  if (fsdp_comm_init_single(&comm) != FSDP_OK) test_fail(__FILE__, __LINE__, "no communicator");
  fsdp_status_t status = fsdp_engine_create(model, comm, &config, out);
  fsdp_comm_destroy(comm);
  return status;
}

/* Parameter `param` holds its values, shifted. */
static void check_values(const fsdp_engine_t *engine, uint32_t param, float shift) {
  fsdp_shard_t shard;
  CHECK_OK(fsdp_engine_shard(engine, param, &shard));
  CHECK_EQ(shard.numel, NUMEL[param]);
  for (int64_t i = 0; i < shard.numel; i++) {
    float want = param == FROZEN ? frozen[i] : value_of(param, i) + shift;
    if (shard.data[i] != want) {
      test_fail(__FILE__, __LINE__, "parameter %u element %lld is %g, not %g", (unsigned)param,
                (long long)i, (double)shard.data[i], (double)want);
    }
  }
}

static void by_reset_functions(void) {
  host_t host;
  fsdp_model_t *model = resettable(&host);
  fsdp_engine_t *engine = NULL;
  CHECK_OK(create(model, NULL, &engine));
  CHECK_STR(host.seen, "0  Net 0;4 b.buffers Block;1 a Block 1;2 a.x Block 3;");
  for (uint32_t p = 0; p < PARAMS; p++) check_values(engine, p, 0);
  /* One unit at a time: the largest has 21 elements that were initialized. */
  CHECK_EQ(stats_of(engine).materialized_peak_bytes, 21 * 4);
  fsdp_engine_destroy(engine);
  /* Again, with another function in place of one: nothing of the first time is left. */
  host_t other = host_of(model);
  host.seen[0] = '\0';
  other.shift = 3;
  CHECK_OK(fsdp_model_set_reset(model, A, reset, &other));
  CHECK_OK(create(model, NULL, &engine));
  CHECK_STR(host.seen, "0  Net 0;4 b.buffers Block;2 a.x Block 3;");
  CHECK_STR(other.seen, "1 a Block 1;");
  check_values(engine, WEIGHT, 3);
  check_values(engine, V, 0);
  fsdp_engine_destroy(engine);
  fsdp_model_destroy(model);
}

static void in_their_order_of_precedence(void) {
  host_t host, override;
  fsdp_model_t *model = resettable(&host);
  fsdp_engine_t *engine = NULL;
  CHECK_OK(fsdp_model_set_param_init(model, WEIGHT, init_param, &host));
  CHECK_OK(fsdp_model_set_param_init(model, EMPTY, init_param, &host));
  CHECK_OK(create(model, NULL, &engine));
  /* a's reset function has nothing left to fill; an empty parameter has nothing to initialize. */
  CHECK_STR(host.seen, "0  Net 0;4 b.buffers Block;param 1;2 a.x Block 3;");
  check_values(engine, WEIGHT, 0.5f);
  check_values(engine, SCALE, 0);
  fsdp_engine_destroy(engine);

  host.seen[0] = '\0';
  override = host_of(model);
  override.shift = 7;
  CHECK_OK(create(model, &override, &engine));
  CHECK_STR(host.seen, "");
  CHECK_STR(override.seen, "0  Net 0;4 b.buffers Block;1 a Block 1;2 a.x Block 3;");
  for (uint32_t p = 0; p < PARAMS; p++) check_values(engine, p, 7);
  fsdp_engine_destroy(engine);
  fsdp_model_destroy(model);
}

static void without_an_initializer(void) {
  host_t host = host_of(NULL);
  fsdp_model_t *model = bare();
  fsdp_engine_t *engine = NO_SUCH_HANDLE(fsdp_engine_t);
  host.model = model;
  CHECK_ERR(create(model, NULL, &engine), FSDP_ERR_INVALID_ARGUMENT, "\"scale\" has no storage");
  CHECK_OK(fsdp_model_set_reset(model, ROOT, reset, &host));
  CHECK_OK(fsdp_model_set_param_init(model, V, init_param, &host));
  CHECK_ERR(create(model, NULL, &engine), FSDP_ERR_INVALID_ARGUMENT, "\"a.weight\" has no storage");
  CHECK_STR(host.seen, "");
  CHECK(engine == NO_SUCH_HANDLE(fsdp_engine_t));
  CHECK_OK(fsdp_model_set_param_init(model, WEIGHT, init_param, &host));
  CHECK_OK(create(model, NULL, &engine));
  fsdp_engine_destroy(engine);
  fsdp_model_destroy(model);
}

static void failures(void) {
  host_t host;
  fsdp_model_t *model = resettable(&host);
  fsdp_engine_t *engine = NO_SUCH_HANDLE(fsdp_engine_t);
  host.fail = A;
  host.code = -7;
  CHECK_ERR(create(model, NULL, &engine), FSDP_ERR_CALLBACK, "\"a\" (Block): returned -7");
  CHECK_STR(host.seen, "0  Net 0;4 b.buffers Block;1 a Block 1;");
  host.seen[0] = '\0';
  CHECK_ERR(create(model, &host, &engine), FSDP_ERR_CALLBACK, "param_init_fn for module \"a\"");
  CHECK_STR(host.seen, "0  Net 0;4 b.buffers Block;1 a Block 1;");
  host.fail = WEIGHT;
  host.code = 3;
  CHECK_OK(fsdp_model_set_param_init(model, WEIGHT, init_param, &host));
  CHECK_ERR(create(model, NULL, &engine), FSDP_ERR_CALLBACK, "\"a.weight\": returned 3");
  CHECK(engine == NO_SUCH_HANDLE(fsdp_engine_t));
  fsdp_model_destroy(model);
}

static void what_is_left_out_is_named(void) {
  host_t host;
  fsdp_model_t *model = resettable(&host);
  fsdp_engine_t *engine = NO_SUCH_HANDLE(fsdp_engine_t);
  host.leave = V;
  CHECK_ERR(create(model, NULL, &engine), FSDP_ERR_INVALID_STATE,
            "\"a.x.v\" was left uninitialized by the reset function of module \"a.x\" (Block) (element 0)");
  host.leave_from = 9;
  CHECK_ERR(create(model, &host, &engine), FSDP_ERR_INVALID_STATE,
            "by param_init_fn for module \"a.x\" (Block) (element 9)");
  CHECK_OK(fsdp_model_set_param_init(model, V, init_param, &host));
  CHECK_ERR(create(model, NULL, &engine), FSDP_ERR_INVALID_STATE,
            "by the initializer of parameter \"a.x.v\" (element 9)");
  CHECK(engine == NO_SUCH_HANDLE(fsdp_engine_t));
  /* Any value may be written, a NaN as well. */
  host.leave = PARAMS;
  host.shift = NAN;
  CHECK_OK(create(model, NULL, &engine));
  fsdp_engine_destroy(engine);
  fsdp_model_destroy(model);
}

static void arguments(void) {
  host_t host;
  fsdp_model_t *m = resettable(&host);
  fsdp_comm_t *comm = NULL;
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_ERR(fsdp_model_set_reset(m, A, NULL, &host), FSDP_ERR_INVALID_ARGUMENT, "to be callable");
  CHECK_ERR(fsdp_model_set_reset(m, A, NULL, NULL), FSDP_ERR_INVALID_ARGUMENT, "module \"a\"");
  CHECK_ERR(fsdp_model_set_reset(m, MODULES, reset, &host), FSDP_ERR_INVALID_ARGUMENT, "module 5");
  CHECK_ERR(fsdp_model_set_reset(NULL, A, reset, &host), FSDP_ERR_INVALID_ARGUMENT,
            "model is NULL");
  CHECK_ERR(fsdp_model_set_reset((fsdp_model_t *)(void *)comm, A, reset, &host),
            FSDP_ERR_INVALID_HANDLE, "a communicator");
  CHECK_ERR(fsdp_model_set_param_init(m, WEIGHT, NULL, &host), FSDP_ERR_INVALID_ARGUMENT,
            "to be callable");
  CHECK_ERR(fsdp_model_set_param_init(m, PARAMS, init_param, &host), FSDP_ERR_INVALID_ARGUMENT,
            "parameter 5");
  CHECK_ERR(fsdp_model_set_param_init(m, FROZEN, init_param, &host), FSDP_ERR_INVALID_ARGUMENT,
            "\"a.frozen\" has storage");
  CHECK_ERR(fsdp_model_set_param_init(NULL, WEIGHT, init_param, &host), FSDP_ERR_INVALID_ARGUMENT,
            "model is NULL");
  CHECK_ERR(fsdp_model_set_param_init(NO_SUCH_HANDLE(fsdp_model_t), WEIGHT, init_param, &host),
            FSDP_ERR_INVALID_HANDLE, "model");
  /* What a function cannot be told apart from: data for one that is missing. */
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_engine_t *engine = NO_SUCH_HANDLE(fsdp_engine_t);
  config.param_init_user_data = &host;
  CHECK_ERR(fsdp_engine_create(m, comm, &config, &engine), FSDP_ERR_INVALID_ARGUMENT,
            "expected param_init_fn to be callable");
  CHECK(engine == NO_SUCH_HANDLE(fsdp_engine_t));
  /* The failed calls changed nothing. */
  CHECK_OK(create(m, NULL, &engine));
  CHECK_STR(host.seen, "0  Net 0;4 b.buffers Block;1 a Block 1;2 a.x Block 3;");
  fsdp_engine_destroy(engine);
  fsdp_comm_destroy(comm);
  fsdp_model_destroy(m);
}

int main(void) {
  by_reset_functions();
  in_their_order_of_precedence();
  without_an_initializer();
  failures();
  what_is_left_out_is_named();
  arguments();
  return 0;
}
