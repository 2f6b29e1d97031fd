/* The small model that the tests of the engine's functions share, at world size 1.
 *
 *   root        "bias" [5]                      unit 0
 *   a (unit)    "weight" [7, 3], "frozen" [4]   unit 1
 *   a.x (unit)  "v" [10], "empty" [0, 2]        unit 2
 */
#ifndef FSDP_TEST_TOY_H
#define FSDP_TEST_TOY_H

#include "test.h"

enum { TOY_ROOT, TOY_A, TOY_X, TOY_UNITS };
enum { TOY_BIAS, TOY_WEIGHT, TOY_FROZEN, TOY_V, TOY_EMPTY, TOY_PARAMS };

static const int64_t TOY_NUMEL[TOY_PARAMS] = {5, 21, 4, 10, 0};

typedef struct {
  fsdp_comm_t *comm;
  fsdp_model_t *model;
  fsdp_engine_t *engine;
} toy_t;

/* The value that element `i` of parameter `p` starts with. */
static inline float toy_value(uint32_t p, int64_t i) { return (float)(100 * (p + 1)) + (float)i; }

static inline fsdp_model_t *toy_model(void) {
  static float values[TOY_PARAMS][21];
  static int64_t shapes[TOY_PARAMS][2] = {{5, 0}, {7, 3}, {4, 0}, {10, 0}, {0, 2}};
  static const int32_t ndim[TOY_PARAMS] = {1, 2, 1, 1, 2};
  static const uint32_t modules[TOY_PARAMS] = {0, 1, 1, 2, 2};
  static const char *const names[TOY_PARAMS] = {"bias", "weight", "frozen", "v", "empty"};
  fsdp_model_t *model = NULL;
  uint32_t module = 0, param = 0;
  CHECK_OK(fsdp_model_create("Toy", &model));
  CHECK_OK(fsdp_model_add_module(model, 0, "a", "A", &module));
  CHECK_OK(fsdp_model_add_module(model, 1, "x", "X", &module));
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    for (int64_t i = 0; i < TOY_NUMEL[p]; i++) values[p][i] = toy_value(p, i);
    fsdp_tensor_t t = tensor_f32(values[p], ndim[p], shapes[p]);
    CHECK_OK(fsdp_model_add_parameter(model, modules[p], names[p], &t, p != TOY_FROZEN, &param));
    CHECK_EQ(param, p);
  }
  CHECK_OK(fsdp_model_wrap_module(model, 1));
  CHECK_OK(fsdp_model_wrap_module(model, 2));
  return model;
}

static inline toy_t toy_with_slots(uint32_t gradient_slots) {
  toy_t toy;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  config.gradient_slots = gradient_slots;
  toy.engine = NULL;
  toy.comm = NULL;
  toy.model = toy_model();
  CHECK_OK(fsdp_comm_init_single(&toy.comm));
  CHECK_OK(fsdp_engine_create(toy.model, toy.comm, &config, &toy.engine));
  return toy;
}

static inline toy_t toy_create(void) { return toy_with_slots(0); }

static inline void toy_destroy(toy_t toy) {
  fsdp_engine_destroy(toy.engine);
  fsdp_model_destroy(toy.model);
  fsdp_comm_destroy(toy.comm);
}

static inline int32_t toy_state(const fsdp_engine_t *engine, uint32_t unit) {
  fsdp_unit_info_t info = unit_info_init();
  CHECK_OK(fsdp_engine_unit_info(engine, unit, &info));
  return info.state;
}

/* Adds a gradient of `value` everywhere to a parameter. */
static inline void toy_add_grad(fsdp_engine_t *engine, uint32_t param, float value) {
  static int64_t shapes[TOY_PARAMS][2] = {{5, 0}, {7, 3}, {4, 0}, {10, 0}, {0, 2}};
  float grad[21];
  for (int i = 0; i < 21; i++) grad[i] = value;
  fsdp_tensor_t t =
      tensor_f32(grad, param == TOY_WEIGHT || param == TOY_EMPTY ? 2 : 1, shapes[param]);
  CHECK_OK(fsdp_engine_accumulate_grad(engine, param, &t));
}

/* A forward of every unit: x inside a inside the root. */
static inline void toy_forward(fsdp_engine_t *engine) {
  CHECK_OK(fsdp_engine_pre_forward(engine, TOY_ROOT));
  CHECK_OK(fsdp_engine_pre_forward(engine, TOY_A));
  CHECK_OK(fsdp_engine_pre_forward(engine, TOY_X));
  CHECK_OK(fsdp_engine_post_forward(engine, TOY_X));
  CHECK_OK(fsdp_engine_post_forward(engine, TOY_A));
  CHECK_OK(fsdp_engine_post_forward(engine, TOY_ROOT));
}

/* A backward of every unit that gives every trained parameter a gradient of `value`. */
static inline void toy_backward(fsdp_engine_t *engine, float value) {
  CHECK_OK(fsdp_engine_pre_backward(engine, TOY_ROOT));
  toy_add_grad(engine, TOY_BIAS, value);
  CHECK_OK(fsdp_engine_pre_backward(engine, TOY_A));
  toy_add_grad(engine, TOY_WEIGHT, value);
  CHECK_OK(fsdp_engine_pre_backward(engine, TOY_X));
  toy_add_grad(engine, TOY_V, value);
  toy_add_grad(engine, TOY_EMPTY, value);
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_X));
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_A));
  CHECK_OK(fsdp_engine_post_backward(engine, TOY_ROOT));
}

static inline fsdp_shard_t toy_shard(const fsdp_engine_t *engine, uint32_t param) {
  fsdp_shard_t shard;
  memset(&shard, 0, sizeof shard);
  CHECK_OK(fsdp_engine_shard(engine, param, &shard));
  return shard;
}

/* Runs `call`, which uses the variable `engine`, with every kind of handle that is none of an
 * engine. */
#define CHECK_BAD_ENGINES(call) \
  do { \
    toy_t toy_ = toy_create(); \
    fsdp_engine_t *engine = NULL; \
    CHECK_ERR(call, FSDP_ERR_INVALID_ARGUMENT, "engine is NULL"); \
    engine = toy_.engine; \
    fsdp_engine_destroy(toy_.engine); \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "destroyed"); \
    engine = (fsdp_engine_t *)(void *)toy_.comm; \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "a communicator"); \
    engine = (fsdp_engine_t *)(void *)toy_.model; \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "a model"); \
    engine = NO_SUCH_HANDLE(fsdp_engine_t); \
    CHECK_ERR(call, FSDP_ERR_INVALID_HANDLE, "engine"); \
    toy_.engine = NULL; \
    toy_destroy(toy_); \
  } while (0)

#endif
