/* The engine: creating and destroying it, and what it says about units and parameters. World
 * size 1. */
#include "toy.h"

static void creating(void) {
  fsdp_comm_t *comm = NULL;
  fsdp_model_t *model = toy_model();
  fsdp_engine_t *out = NO_SUCH_HANDLE(fsdp_engine_t);
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  CHECK_EQ(config.struct_size, sizeof config);
  CHECK_EQ(config.gradient_slots, 0);
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_ERR(fsdp_engine_create(NULL, comm, &config, &out), FSDP_ERR_INVALID_ARGUMENT,
            "model is NULL");
  CHECK_ERR(fsdp_engine_create(model, NULL, &config, &out), FSDP_ERR_INVALID_ARGUMENT,
            "communicator is NULL");
  CHECK_ERR(fsdp_engine_create(model, comm, &config, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out is NULL");
  CHECK_ERR(fsdp_engine_create((fsdp_model_t *)(void *)comm, comm, NULL, &out),
            FSDP_ERR_INVALID_HANDLE, "a communicator");
  CHECK_ERR(fsdp_engine_create(model, (fsdp_comm_t *)(void *)model, NULL, &out),
            FSDP_ERR_INVALID_HANDLE, "a model");
  CHECK(out == NO_SUCH_HANDLE(fsdp_engine_t));
  CHECK_OK(fsdp_engine_create(model, comm, NULL, &out));
  fsdp_engine_destroy(out);
  CHECK_OK(fsdp_engine_create(model, comm, &config, &out));
  fsdp_engine_destroy(out);
  fsdp_engine_destroy(out);
  fsdp_engine_destroy(NULL);
  fsdp_engine_destroy(NO_SUCH_HANDLE(fsdp_engine_t));

  fsdp_comm_destroy(comm);
  fsdp_engine_t *dead = NO_SUCH_HANDLE(fsdp_engine_t);
  CHECK_ERR(fsdp_engine_create(model, comm, NULL, &dead), FSDP_ERR_INVALID_HANDLE, "destroyed");
  CHECK_OK(fsdp_comm_init_single(&comm));
  fsdp_model_destroy(model);
  CHECK_ERR(fsdp_engine_create(model, comm, NULL, &dead), FSDP_ERR_INVALID_HANDLE, "destroyed");
  CHECK(dead == NO_SUCH_HANDLE(fsdp_engine_t));
  fsdp_comm_destroy(comm);
}

static void configuration_of_another_size(void) {
  struct {
    fsdp_engine_config_t config;
    unsigned char newer[32];
  } big;
  toy_t toy = toy_create();
  fsdp_engine_t *out = NO_SUCH_HANDLE(fsdp_engine_t);
  const size_t wrong[] = {0, 4, sizeof(fsdp_engine_config_t) - 1, 1 << 20, SIZE_MAX};
  memset(&big, 0, sizeof big);
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    big.config.struct_size = wrong[i];
    CHECK_ERR(fsdp_engine_create(toy.model, toy.comm, &big.config, &out), FSDP_ERR_INVALID_ARGUMENT,
              "fsdp_engine_config_t.struct_size");
  }
  big.config.struct_size = sizeof big;
  big.newer[0] = 1;
  CHECK_ERR(fsdp_engine_create(toy.model, toy.comm, &big.config, &out), FSDP_ERR_UNSUPPORTED,
            "fsdp_engine_config_t");
  CHECK(out == NO_SUCH_HANDLE(fsdp_engine_t));
  big.newer[0] = 0;
  CHECK_OK(fsdp_engine_create(toy.model, toy.comm, &big.config, &out));
  fsdp_engine_destroy(out);
  toy_destroy(toy);
}

/* Model and communicator may be destroyed, and the host's memory overwritten, while the engine
 * lives. */
static void outlives_what_it_was_made_from(void) {
  float values[3] = {1, 2, 3};
  int64_t three = 3;
  fsdp_tensor_t t = tensor_f32(values, 1, &three);
  fsdp_comm_t *comm = NULL;
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  uint32_t param = 0;
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_OK(fsdp_model_create("Net", &model));
  CHECK_OK(fsdp_model_add_parameter(model, 0, "w", &t, 1, &param));
  CHECK_OK(fsdp_engine_create(model, comm, NULL, &engine));
  fsdp_model_destroy(model);
  fsdp_comm_destroy(comm);
  values[0] = values[1] = values[2] = -1;
  fsdp_shard_t shard = toy_shard(engine, 0);
  CHECK_EQ(shard.numel, 3);
  CHECK(shard.data[0] == 1 && shard.data[1] == 2 && shard.data[2] == 3);
  CHECK_OK(fsdp_engine_pre_forward(engine, 0));
  CHECK_OK(fsdp_engine_post_forward(engine, 0));
  fsdp_engine_destroy(engine);
}

static void counts(void) {
  toy_t toy = toy_create();
  uint32_t out = 77;
  CHECK_ERR(fsdp_engine_unit_count(toy.engine, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_engine_param_count(toy.engine, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_BAD_ENGINES(fsdp_engine_unit_count(engine, &out));
  CHECK_BAD_ENGINES(fsdp_engine_param_count(engine, &out));
  CHECK_EQ(out, 77);
  CHECK_OK(fsdp_engine_unit_count(toy.engine, &out));
  CHECK_EQ(out, TOY_UNITS);
  CHECK_OK(fsdp_engine_param_count(toy.engine, &out));
  CHECK_EQ(out, TOY_PARAMS);
  toy_destroy(toy);
}

static void unit_infos(void) {
  static const char *const names[] = {"", "a", "a.x"};
  static const uint32_t param_counts[] = {1, 2, 2}, first_params[] = {TOY_BIAS, TOY_WEIGHT, TOY_V};
  static const uint64_t elements[] = {5, 25, 10};
  toy_t toy = toy_create();
  for (uint32_t u = 0; u < TOY_UNITS; u++) {
    fsdp_unit_info_t info = unit_info_init();
    CHECK_OK(fsdp_engine_unit_info(toy.engine, u, &info));
    CHECK_EQ(info.struct_size, sizeof info);
    CHECK_STR(info.name, names[u]);
    CHECK_EQ(info.module, u);
    CHECK_EQ(info.param_count, param_counts[u]);
    CHECK_EQ(info.params[0], first_params[u]);
    CHECK_EQ(info.unit_bytes, info.shard_bytes);
    CHECK_EQ(info.unit_bytes % 16, 0);
    CHECK_EQ(info.unit_bytes, elements[u] * 4 + info.padding_bytes);
    CHECK_EQ(info.state, FSDP_UNIT_SHARDED);
  }
  fsdp_unit_info_t info = unit_info_init(), before;
  CHECK_ERR(fsdp_engine_unit_info(toy.engine, 0, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  info.module = 77;
  before = info;
  CHECK_ERR(fsdp_engine_unit_info(toy.engine, TOY_UNITS, &info), FSDP_ERR_INVALID_ARGUMENT,
            "unit 3");
  CHECK_ERR(fsdp_engine_unit_info(toy.engine, UINT32_MAX, &info), FSDP_ERR_INVALID_ARGUMENT,
            "4294967295");
  CHECK_BAD_ENGINES(fsdp_engine_unit_info(engine, 0, &info));
  CHECK_EQ(memcmp(&info, &before, sizeof info), 0);
  const size_t wrong[] = {0, sizeof info - 8, 1 << 20, SIZE_MAX};
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    info.struct_size = wrong[i];
    CHECK_ERR(fsdp_engine_unit_info(toy.engine, 0, &info), FSDP_ERR_INVALID_ARGUMENT,
              "fsdp_unit_info_t.struct_size");
    CHECK_EQ(info.module, 77);
  }
  toy_destroy(toy);
}

static void param_infos(void) {
  static const char *const names[] = {"bias", "a.weight", "a.frozen", "a.x.v", "a.x.empty"};
  static const uint32_t in_unit[] = {TOY_ROOT, TOY_A, TOY_A, TOY_X, TOY_X};
  toy_t toy = toy_create();
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    fsdp_param_info_t info = param_info_init();
    CHECK_OK(fsdp_engine_param_info(toy.engine, p, &info));
    CHECK_EQ(info.struct_size, sizeof info);
    CHECK_STR(info.name, names[p]);
    CHECK_EQ(info.unit, in_unit[p]);
    CHECK_EQ(info.ndim, p == TOY_WEIGHT || p == TOY_EMPTY ? 2 : 1);
    CHECK_EQ(info.numel, TOY_NUMEL[p]);
    CHECK_EQ(info.shard_numel, TOY_NUMEL[p]);
    CHECK_EQ(info.shard_offset, 0);
    CHECK_EQ(info.unit_offset % 16, 0);
    CHECK_EQ(info.requires_grad, p != TOY_FROZEN);
    if (p == TOY_WEIGHT) CHECK(info.shape[0] == 7 && info.shape[1] == 3);
    if (p == TOY_EMPTY) CHECK(info.shape[0] == 0 && info.shape[1] == 2);
  }
  fsdp_param_info_t info = param_info_init(), before;
  CHECK_ERR(fsdp_engine_param_info(toy.engine, 0, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  info.unit = 77;
  before = info;
  CHECK_ERR(fsdp_engine_param_info(toy.engine, TOY_PARAMS, &info), FSDP_ERR_INVALID_ARGUMENT,
            "parameter 5");
  CHECK_BAD_ENGINES(fsdp_engine_param_info(engine, 0, &info));
  CHECK_EQ(memcmp(&info, &before, sizeof info), 0);
  info.struct_size = sizeof info - 1;
  CHECK_ERR(fsdp_engine_param_info(toy.engine, 0, &info), FSDP_ERR_INVALID_ARGUMENT,
            "fsdp_param_info_t.struct_size");
  CHECK_EQ(info.unit, 77);
  toy_destroy(toy);
}

/* A host built against a newer header passes a larger struct: what this library knows is filled,
 * the rest untouched. */
static void outputs_of_a_newer_header(void) {
  struct {
    fsdp_unit_info_t info;
    unsigned char newer[16];
  } unit;
  struct {
    fsdp_param_info_t info;
    unsigned char newer[16];
  } param;
  struct {
    fsdp_stats_t info;
    unsigned char newer[16];
  } stats;
  toy_t toy = toy_create();
  memset(&unit, 0xab, sizeof unit);
  memset(&param, 0xab, sizeof param);
  memset(&stats, 0xab, sizeof stats);
  unit.info.struct_size = sizeof unit;
  param.info.struct_size = sizeof param;
  stats.info.struct_size = sizeof stats;
  CHECK_OK(fsdp_engine_unit_info(toy.engine, TOY_A, &unit.info));
  CHECK_OK(fsdp_engine_param_info(toy.engine, TOY_V, &param.info));
  CHECK_OK(fsdp_engine_stats(toy.engine, &stats.info));
  CHECK(unit.info.struct_size == sizeof unit && param.info.struct_size == sizeof param);
  CHECK_EQ(stats.info.struct_size, sizeof stats);
  CHECK_STR(unit.info.name, "a");
  CHECK_STR(param.info.name, "a.x.v");
  CHECK_EQ(stats.info.all_gathers, 0);
  for (int i = 0; i < 16; i++)
    CHECK(unit.newer[i] == 0xab && param.newer[i] == 0xab && stats.newer[i] == 0xab);
  toy_destroy(toy);
}

static void units_of_modules(void) {
  toy_t toy = toy_create();
  uint32_t out = 77, module = 0;
  CHECK_ERR(fsdp_engine_unit_of_module(toy.engine, 0, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_unit is NULL");
  CHECK_ERR(fsdp_engine_unit_of_module(toy.engine, 3, &out), FSDP_ERR_INVALID_ARGUMENT, "module 3");
  CHECK_BAD_ENGINES(fsdp_engine_unit_of_module(engine, 0, &out));
  CHECK_EQ(out, 77);
  for (uint32_t m = 0; m < 3; m++) {
    CHECK_OK(fsdp_engine_unit_of_module(toy.engine, m, &out));
    CHECK_EQ(out, m);
  }
  /* Modules added to the model later are none of this engine's, but of the next. */
  fsdp_engine_t *next = NULL;
  CHECK_OK(fsdp_model_add_module(toy.model, 1, "plain", "Plain", &module));
  CHECK_ERR(fsdp_engine_unit_of_module(toy.engine, module, &out), FSDP_ERR_INVALID_ARGUMENT,
            "module 3");
  CHECK_OK(fsdp_engine_create(toy.model, toy.comm, NULL, &next));
  CHECK_OK(fsdp_engine_unit_of_module(next, module, &out));
  CHECK_EQ(out, TOY_A);
  fsdp_engine_destroy(next);
  toy_destroy(toy);
}

/* A model without parameters, and one whose parameters have no elements. */
static void nothing_to_shard(void) {
  fsdp_comm_t *comm = NULL;
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  uint32_t count = 77, param = 77;
  void *buffer = &count;
  int64_t shape[2] = {3, 0};
  fsdp_tensor_t t = tensor_f32(NULL, 2, shape);
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_OK(fsdp_model_create("Nothing", &model));
  for (int with_param = 0; with_param < 2; with_param++) {
    CHECK_OK(fsdp_engine_create(model, comm, NULL, &engine));
    CHECK_OK(fsdp_engine_param_count(engine, &count));
    CHECK_EQ(count, with_param);
    for (int step = 0; step < 2; step++) {
      CHECK_OK(fsdp_engine_pre_forward(engine, 0));
      CHECK_OK(fsdp_engine_unshard(engine, 0, &buffer));
      CHECK(buffer == NULL);
      CHECK_OK(fsdp_engine_post_forward(engine, 0));
      CHECK_OK(fsdp_engine_pre_backward(engine, 0));
      if (with_param) CHECK_OK(fsdp_engine_accumulate_grad(engine, param, &t));
      CHECK_OK(fsdp_engine_post_backward(engine, 0));
      CHECK_OK(fsdp_engine_begin_write(engine));
      if (with_param) CHECK_EQ(toy_shard(engine, param).numel, 0);
      CHECK_OK(fsdp_engine_zero_grad(engine));
    }
    fsdp_engine_destroy(engine);
    if (!with_param) CHECK_OK(fsdp_model_add_parameter(model, 0, "none", &t, 1, &param));
  }
  fsdp_model_destroy(model);
  fsdp_comm_destroy(comm);
}

int main(void) {
  creating();
  configuration_of_another_size();
  outlives_what_it_was_made_from();
  counts();
  unit_infos();
  param_infos();
  outputs_of_a_newer_header();
  units_of_modules();
  nothing_to_shard();
  return 0;
}
