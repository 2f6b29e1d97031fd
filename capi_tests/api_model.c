/* The model: registering modules and parameters, tying, and every wrap policy. What the units then
 * are is read back through an engine of world size 1. */
#include "test.h"

static fsdp_model_t *net(void) {
  fsdp_model_t *model = NULL;
  CHECK_OK(fsdp_model_create("Net", &model));
  CHECK(model != NULL);
  return model;
}

static uint32_t add(fsdp_model_t *model, uint32_t parent, const char *name,
                    const char *class_name) {
  uint32_t module = UINT32_MAX;
  CHECK_OK(fsdp_model_add_module(model, parent, name, class_name, &module));
  return module;
}

static float memory[128];

static uint32_t param(fsdp_model_t *model, uint32_t module, const char *name, int64_t numel) {
  uint32_t number = UINT32_MAX;
  fsdp_tensor_t t = tensor_f32(memory, 1, &numel);
  CHECK_OK(fsdp_model_add_parameter(model, module, name, &t, 1, &number));
  return number;
}

/* root(p: 1) > a(10) > [x(100), y(5)], b > z(50); modules a 1, x 2, y 3, b 4, z 5. */
static fsdp_model_t *tree(void) {
  fsdp_model_t *model = net();
  CHECK_EQ(add(model, 0, "a", "Block"), 1);
  CHECK_EQ(add(model, 1, "x", "Linear"), 2);
  CHECK_EQ(add(model, 1, "y", "Linear"), 3);
  CHECK_EQ(add(model, 0, "b", "Block"), 4);
  CHECK_EQ(add(model, 4, "z", "Linear"), 5);
  const uint32_t modules[] = {0, 1, 2, 3, 5};
  const int64_t numels[] = {1, 10, 100, 5, 50};
  for (uint32_t i = 0; i < 5; i++) CHECK_EQ(param(model, modules[i], "p", numels[i]), i);
  return model;
}

/* The units' names, joined by spaces, "(root)" for the root's. */
static const char *units(const fsdp_model_t *model) {
  static char text[256];
  fsdp_comm_t *comm = NULL;
  fsdp_engine_t *engine = NULL;
  uint32_t count = 0;
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_OK(fsdp_engine_create(model, comm, NULL, &engine));
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

#define CHECK_BAD_HANDLES(call) \
  do { \
    fsdp_comm_t *comm = NULL; \
    fsdp_model_t *model = NULL; \
    CHECK_OK(fsdp_comm_init_single(&comm)); \
    CHECK_ERR(call, FSDP_ERR_INVALID_ARGUMENT, "model is NULL"); \
    model = net(); \
    fsdp_model_destroy(model); \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "destroyed"); \
    model = (fsdp_model_t *)(void *)comm; \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "a communicator"); \
    fsdp_model_destroy(model); \
    CHECK_OK(fsdp_comm_barrier(comm)); \
    fsdp_comm_destroy(comm); \
  } while (0)

static void creating(void) {
  fsdp_model_t *out = NO_SUCH_HANDLE(fsdp_model_t);
  CHECK_ERR(fsdp_model_create(NULL, &out), FSDP_ERR_INVALID_ARGUMENT, "class_name is NULL");
  CHECK_ERR(fsdp_model_create("Net", NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_model_create("\xc3\x28", &out), FSDP_ERR_INVALID_ARGUMENT, "class_name");
  CHECK(out == NO_SUCH_HANDLE(fsdp_model_t));
  CHECK_OK(fsdp_model_create("", &out));
  fsdp_model_destroy(out);
  fsdp_model_destroy(out);
  fsdp_model_destroy(NULL);
  fsdp_model_destroy(NO_SUCH_HANDLE(fsdp_model_t));
}

static void modules(void) {
  fsdp_model_t *m = net();
  uint32_t out = 77;
  CHECK_EQ(add(m, 0, "a", "Block"), 1);
  CHECK_EQ(add(m, 1, "a", "Block"), 2);
  CHECK_ERR(fsdp_model_add_module(m, 0, NULL, "Block", &out), FSDP_ERR_INVALID_ARGUMENT,
            "name is NULL");
  CHECK_ERR(fsdp_model_add_module(m, 0, "b", NULL, &out), FSDP_ERR_INVALID_ARGUMENT,
            "class_name is NULL");
  CHECK_ERR(fsdp_model_add_module(m, 0, "b", "Block", NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_module is NULL");
  CHECK_ERR(fsdp_model_add_module(m, 3, "b", "Block", &out), FSDP_ERR_INVALID_ARGUMENT, "module 3");
  CHECK_ERR(fsdp_model_add_module(m, UINT32_MAX, "b", "Block", &out), FSDP_ERR_INVALID_ARGUMENT,
            "4294967295");
  CHECK_ERR(fsdp_model_add_module(m, 0, "", "Block", &out), FSDP_ERR_INVALID_ARGUMENT, "empty");
  CHECK_ERR(fsdp_model_add_module(m, 0, "b.c", "Block", &out), FSDP_ERR_INVALID_ARGUMENT, "b.c");
  CHECK_ERR(fsdp_model_add_module(m, 0, "a", "Block", &out), FSDP_ERR_INVALID_ARGUMENT, "\"a\"");
  CHECK_ERR(fsdp_model_add_module(m, 1, "a", "Block", &out), FSDP_ERR_INVALID_ARGUMENT, "\"a.a\"");
  CHECK_ERR(fsdp_model_add_module(m, 0, "\xff", "Block", &out), FSDP_ERR_INVALID_ARGUMENT, "name");
  CHECK_BAD_HANDLES(fsdp_model_add_module(model, 0, "b", "Block", &out));
  CHECK_EQ(out, 77);
  /* None of the failed calls has used up a number or a name. */
  CHECK_EQ(add(m, 0, "b", "Block"), 3);
  fsdp_model_destroy(m);
}

static void parameters(void) {
  fsdp_model_t *m = net();
  int64_t shape[2] = {3, 4}, none[1] = {0}, negative[1] = {-4};
  uint32_t out = 77;
  fsdp_tensor_t t = tensor_f32(memory, 2, shape);
  CHECK_ERR(fsdp_model_add_parameter(m, 0, NULL, &t, 1, &out), FSDP_ERR_INVALID_ARGUMENT,
            "name is NULL");
  CHECK_ERR(fsdp_model_add_parameter(m, 0, "w", NULL, 1, &out), FSDP_ERR_INVALID_ARGUMENT,
            "\"w\" is NULL");
  CHECK_ERR(fsdp_model_add_parameter(m, 0, "w", &t, 1, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_param is NULL");
  CHECK_ERR(fsdp_model_add_parameter(m, 5, "w", &t, 1, &out), FSDP_ERR_INVALID_ARGUMENT,
            "module 5");
  CHECK_ERR(fsdp_model_add_parameter(m, 0, "", &t, 1, &out), FSDP_ERR_INVALID_ARGUMENT, "empty");
  CHECK_ERR(fsdp_model_add_parameter(m, 0, "w.b", &t, 1, &out), FSDP_ERR_INVALID_ARGUMENT, "w.b");
  fsdp_tensor_t bad = tensor_of(memory, 2, shape, FSDP_DTYPE_FLOAT, 8);
  CHECK_ERR(fsdp_model_add_parameter(m, 0, "w", &bad, 1, &out), FSDP_ERR_UNSUPPORTED, "\"w\"");
  bad = tensor_f32(memory, 1, negative);
  CHECK_ERR(fsdp_model_add_parameter(m, 0, "w", &bad, 1, &out), FSDP_ERR_INVALID_ARGUMENT, "-4");
  int64_t strides[2] = {1, 3};
  bad = tensor_f32(memory, 2, shape);
  bad.strides = strides;
  CHECK_ERR(fsdp_model_add_parameter(m, 0, "w", &bad, 1, &out), FSDP_ERR_UNSUPPORTED,
            "\"w\" is not contiguous");
  bad = tensor_f32(memory, 2, shape);
  bad.device.device_type = 7;
  CHECK_ERR(fsdp_model_add_parameter(m, 0, "w", &bad, 1, &out), FSDP_ERR_UNSUPPORTED, "\"w\"");
  CHECK_BAD_HANDLES(fsdp_model_add_parameter(model, 0, "w", &t, 1, &out));
  CHECK_EQ(out, 77);

  CHECK_OK(fsdp_model_add_parameter(m, 0, "w", &t, 1, &out));
  CHECK_EQ(out, 0);
  CHECK_ERR(fsdp_model_add_parameter(m, 0, "w", &t, 1, &out), FSDP_ERR_INVALID_ARGUMENT,
            "\"w\" is registered");
  uint32_t module = 77;
  CHECK_ERR(fsdp_model_add_module(m, 0, "w", "Block", &module), FSDP_ERR_INVALID_ARGUMENT, "\"w\"");
  t = tensor_f32(NULL, 1, none);
  CHECK_OK(fsdp_model_add_parameter(m, 0, "empty", &t, 0, &out));
  CHECK_EQ(out, 1);
  t = tensor_f32(memory, 0, NULL);
  CHECK_OK(fsdp_model_add_parameter(m, 0, "scalar", &t, 1, &out));
  CHECK_EQ(out, 2);
  fsdp_model_destroy(m);
}

/* A parameter of a dtype that collectives know but shards do not: refused by name, at the latest by
 * the engine. */
static void other_dtypes_are_refused(uint8_t code, uint8_t bits, const char *message) {
  fsdp_model_t *m = net();
  double value = 1;
  int64_t one = 1;
  uint32_t out = 77;
  fsdp_tensor_t t = tensor_of(&value, 1, &one, code, bits);
  fsdp_status_t status = fsdp_model_add_parameter(m, 0, "d", &t, 1, &out);
  if (status == FSDP_OK) {
    fsdp_comm_t *comm = NULL;
    fsdp_engine_t *engine = NO_SUCH_HANDLE(fsdp_engine_t);
    CHECK_OK(fsdp_comm_init_single(&comm));
    CHECK_ERR(fsdp_engine_create(m, comm, NULL, &engine), FSDP_ERR_UNSUPPORTED, message);
    CHECK(engine == NO_SUCH_HANDLE(fsdp_engine_t));
    fsdp_comm_destroy(comm);
  } else {
    CHECK_EQ(status, FSDP_ERR_UNSUPPORTED);
    CHECK(strstr(fsdp_last_error_message(), "\"d\"") != NULL);
  }
  fsdp_model_destroy(m);
}

static void tying(void) {
  fsdp_model_t *m = tree();
  CHECK_ERR(fsdp_model_tie_parameter(m, 4, NULL, 2), FSDP_ERR_INVALID_ARGUMENT, "name is NULL");
  CHECK_ERR(fsdp_model_tie_parameter(m, 9, "tied", 2), FSDP_ERR_INVALID_ARGUMENT, "module 9");
  CHECK_ERR(fsdp_model_tie_parameter(m, 4, "tied", 5), FSDP_ERR_INVALID_ARGUMENT, "parameter 5");
  CHECK_ERR(fsdp_model_tie_parameter(m, 4, "z", 2), FSDP_ERR_INVALID_ARGUMENT, "\"b.z\"");
  CHECK_ERR(fsdp_model_tie_parameter(m, 4, "", 2), FSDP_ERR_INVALID_ARGUMENT, "empty");
  CHECK_BAD_HANDLES(fsdp_model_tie_parameter(model, 0, "tied", 0));
  CHECK_OK(fsdp_model_tie_parameter(m, 4, "tied", 2));
  CHECK_ERR(fsdp_model_tie_parameter(m, 4, "tied", 2), FSDP_ERR_INVALID_ARGUMENT, "\"b.tied\"");
  fsdp_model_destroy(m);
}

static void wrapping_explicitly(void) {
  fsdp_model_t *m = tree();
  CHECK_STR(units(m), "(root)");
  CHECK_OK(fsdp_model_wrap_module(m, 4));
  CHECK_OK(fsdp_model_wrap_module(m, 2));
  CHECK_STR(units(m), "(root) a.x b");
  CHECK_ERR(fsdp_model_wrap_module(m, 4), FSDP_ERR_INVALID_STATE, "\"b\"");
  CHECK_ERR(fsdp_model_wrap_module(m, 0), FSDP_ERR_INVALID_STATE, "root");
  CHECK_ERR(fsdp_model_wrap_module(m, 6), FSDP_ERR_INVALID_ARGUMENT, "module 6");
  CHECK_BAD_HANDLES(fsdp_model_wrap_module(model, 0));
  CHECK_STR(units(m), "(root) a.x b");
  fsdp_model_destroy(m);
}

static void wrapping_by_policy(void) {
  fsdp_model_t *m = tree();
  CHECK_BAD_HANDLES(fsdp_model_wrap_always(model));
  CHECK_OK(fsdp_model_wrap_module(m, 1));
  CHECK_OK(fsdp_model_wrap_always(m));
  CHECK_STR(units(m), "(root) a a.x a.y b b.z");
  fsdp_model_destroy(m);

  m = tree();
  CHECK_BAD_HANDLES(fsdp_model_wrap_class(model, "Net"));
  CHECK_ERR(fsdp_model_wrap_class(m, NULL), FSDP_ERR_INVALID_ARGUMENT, "class_name is NULL");
  CHECK_ERR(fsdp_model_wrap_class(m, "Blok"), FSDP_ERR_INVALID_ARGUMENT, "\"Blok\"");
  CHECK_STR(units(m), "(root)");
  CHECK_OK(fsdp_model_wrap_class(m, "Block"));
  CHECK_STR(units(m), "(root) a b");
  fsdp_model_destroy(m);

  m = tree();
  CHECK_BAD_HANDLES(fsdp_model_wrap_size(model, 1));
  CHECK_ERR(fsdp_model_wrap_size(m, 0), FSDP_ERR_INVALID_ARGUMENT, "at least 1");
  CHECK_STR(units(m), "(root)");
  CHECK_OK(fsdp_model_wrap_size(m, 15));
  CHECK_STR(units(m), "(root) a a.x b.z");
  fsdp_model_destroy(m);

  m = tree();
  CHECK_OK(fsdp_model_wrap_size(m, UINT64_MAX));
  CHECK_STR(units(m), "(root)");
  fsdp_model_destroy(m);
}

/* What the callback of wrapping_by_callback saw, and what it answers. */
typedef struct {
  char seen[256];
  uint64_t wrap_from;
  int32_t code_for_b;
  fsdp_model_t *model;
} decider_t;

static int32_t decide(uint32_t module, const char *fqn, const char *class_name, uint64_t numel,
                      void *user_data) {
  decider_t *d = (decider_t *)user_data;
  size_t used = strlen(d->seen);
  snprintf(d->seen + used, sizeof d->seen - used, "%u %s %s %llu;", (unsigned)module, fqn,
           class_name, (unsigned long long)numel);
  if (strcmp(fqn, "b") == 0 && d->code_for_b < 0) {
    /* Calls into the library from a callback are allowed, also failing ones. */
    CHECK_ERR(fsdp_model_wrap_module(d->model, 99), FSDP_ERR_INVALID_ARGUMENT, "99");
    return d->code_for_b;
  }
  return numel >= d->wrap_from ? 5 : 0;
}

static void wrapping_by_callback(void) {
  fsdp_model_t *m = tree();
  decider_t d;
  memset(&d, 0, sizeof d);
  d.wrap_from = 1;
  d.code_for_b = -3;
  d.model = m;
  CHECK_BAD_HANDLES(fsdp_model_wrap_if(model, decide, &d));
  CHECK_ERR(fsdp_model_wrap_if(m, NULL, &d), FSDP_ERR_INVALID_ARGUMENT, "fn is NULL");
  CHECK_STR(d.seen, "");
  CHECK_ERR(fsdp_model_wrap_if(m, decide, &d), FSDP_ERR_CALLBACK, "-3");
  CHECK(strstr(fsdp_last_error_message(), "\"b\"") != NULL);
  CHECK_STR(units(m), "(root)");
  d.seen[0] = '\0';
  d.wrap_from = 50;
  d.code_for_b = 0;
  CHECK_OK(fsdp_model_wrap_if(m, decide, &d));
  CHECK_STR(d.seen, "1 a Block 115;2 a.x Linear 100;3 a.y Linear 5;4 b Block 50;5 b.z Linear 50;");
  CHECK_STR(units(m), "(root) a a.x b b.z");
  fsdp_model_destroy(m);
}

int main(void) {
  creating();
  modules();
  parameters();
  other_dtypes_are_refused(FSDP_DTYPE_FLOAT, 64, "\"d\" is float64");
  other_dtypes_are_refused(FSDP_DTYPE_INT, 32, "\"d\" is int32");
  tying();
  wrapping_explicitly();
  wrapping_by_policy();
  wrapping_by_callback();
  return 0;
}
