/* fsdp_plan and fsdp_plan_unit: numbers by hand, a world that no machine has, wrong arguments. */
#include "test.h"

static fsdp_plan_t plan_init(void) {
  fsdp_plan_t plan;
  memset(&plan, 0xab, sizeof plan);
  plan.struct_size = sizeof plan;
  return plan;
}

/* root: r [5] > child: w [7, 3]; neither has storage. */
static fsdp_model_t *unfilled(void) {
  fsdp_model_t *model = NULL;
  uint32_t module = 0, param = 0;
  int64_t r[1] = {5}, w[2] = {7, 3};
  fsdp_tensor_t t = tensor_f32(NULL, 1, r);
  CHECK_OK(fsdp_model_create("Net", &model));
  CHECK_OK(fsdp_model_add_module(model, 0, "child", "Child", &module));
  CHECK_OK(fsdp_model_add_parameter(model, 0, "r", &t, 1, &param));
  t = tensor_f32(NULL, 2, w);
  CHECK_OK(fsdp_model_add_parameter(model, module, "w", &t, 1, &param));
  return model;
}

static void numbers(fsdp_model_t *model) {
  fsdp_plan_request_t request = FSDP_PLAN_REQUEST_INIT;
  fsdp_plan_t plan = plan_init();
  CHECK_OK(fsdp_plan(model, &request, &plan));
  CHECK_EQ(plan.rank, 0);
  CHECK_EQ(plan.unit_count, 1);
  CHECK_EQ(plan.numel, 26);
  CHECK_EQ(plan.optimizer_bytes, 0);
  CHECK_EQ(plan.all_gathers, 1);
  CHECK_EQ(plan.all_gather_sent_bytes, 0);

  /* 8 elements of the root, 24 of the child, cut in two. */
  CHECK_OK(fsdp_model_wrap_class(model, "Child"));
  request.world_size = 2;
  request.optimizer_bytes_per_element = 8;
  CHECK_OK(fsdp_plan(model, &request, &plan));
  CHECK_EQ(plan.struct_size, sizeof plan);
  CHECK_EQ(plan.unit_count, 2);
  CHECK_EQ(plan.trained_numel, 26);
  CHECK_EQ(plan.param_shard_bytes, 16 + 48);
  CHECK_EQ(plan.grad_shard_bytes, 64 + 64);
  CHECK_EQ(plan.optimizer_bytes, 8 * (4 + 12));
  CHECK_EQ(plan.gradient_slot_bytes, 32 + 96);
  CHECK_EQ(plan.shard_padding_bytes, 0);
  CHECK_EQ(plan.padding_bytes, 12 + 12);
  CHECK_EQ(plan.unit_buffer_bytes, 64 + 128);
  CHECK_EQ(plan.unsharded_peak_bytes, 32 + 96);
  CHECK_EQ(plan.rank_peak_bytes, 64 + 128 + 128 + 128);
  CHECK_EQ(plan.host_peak_bytes, 192 + 2 * 256 + 8 * 26);
  /* The root once, the child for forward and for backward. */
  CHECK_EQ(plan.all_gathers, 3);
  CHECK_EQ(plan.all_gather_bytes, 32 + 2 * 96);
  CHECK_EQ(plan.all_gather_sent_bytes, 16 + 2 * 48);
  CHECK_EQ(plan.all_gather_messages, 3);
  CHECK_EQ(plan.reduce_scatters, 2);
  CHECK_EQ(plan.reduce_scatter_bytes, 128);
  CHECK_EQ(plan.reduce_scatter_sent_bytes, 64);
  CHECK_EQ(plan.reduce_scatter_messages, 2);
  request.rank = 1;
  CHECK_OK(fsdp_plan(model, &request, &plan));
  CHECK_EQ(plan.rank, 1);
  CHECK_EQ(plan.optimizer_bytes, 8 * (1 + 9));
  CHECK_EQ(plan.shard_padding_bytes, 24);

  fsdp_plan_unit_t unit;
  memset(&unit, 0, sizeof unit);
  unit.struct_size = sizeof unit;
  CHECK_OK(fsdp_plan_unit(model, &request, 1, &unit));
  CHECK_EQ(unit.module, 1);
  CHECK_EQ(unit.param_count, 1);
  CHECK_EQ(unit.numel, 21);
  CHECK_EQ(unit.unit_bytes, 96);
  CHECK_EQ(unit.shard_bytes, 48);
  CHECK_EQ(unit.padding_bytes, 12);
  CHECK_EQ(unit.all_gathers, 2);
  CHECK_EQ(unit.reduce_scatters, 1);
  CHECK_EQ(unit.reduce_scatter_bytes, 96);
  CHECK_ERR(fsdp_plan_unit(model, &request, 2, &unit), FSDP_ERR_INVALID_ARGUMENT, "unit 2");

  /* A world larger than the parameters. */
  request.world_size = 1u << 24;
  request.rank = FSDP_LARGEST_RANK;
  CHECK_OK(fsdp_plan(model, &request, &plan));
  CHECK_EQ(plan.param_shard_bytes, 32);
  CHECK_EQ(plan.optimizer_bytes, 8 * 8);
  CHECK_EQ(plan.all_gather_messages, 3 * (int64_t)((1u << 24) - 1));
}

static void wrong_arguments(fsdp_model_t *model) {
  fsdp_plan_request_t good = FSDP_PLAN_REQUEST_INIT, request;
  fsdp_plan_t plan = plan_init(), untouched = plan;
  fsdp_plan_unit_t unit;
  memset(&unit, 0, sizeof unit);
  CHECK_ERR(fsdp_plan(NULL, &good, &plan), FSDP_ERR_INVALID_ARGUMENT, "model is NULL");
  CHECK_ERR(fsdp_plan(NO_SUCH_HANDLE(fsdp_model_t), &good, &plan), FSDP_ERR_INVALID_HANDLE,
            "not that of a model");
  CHECK_ERR(fsdp_plan(model, NULL, &plan), FSDP_ERR_INVALID_ARGUMENT,
            "fsdp_plan_request_t is NULL");
  CHECK_ERR(fsdp_plan(model, &good, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_plan_unit(model, &good, 0, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_plan_unit(model, &good, 0, &unit), FSDP_ERR_INVALID_ARGUMENT,
            "fsdp_plan_unit_t.struct_size is 0");
  plan.struct_size = 8;
  CHECK_ERR(fsdp_plan(model, &good, &plan), FSDP_ERR_INVALID_ARGUMENT,
            "fsdp_plan_t.struct_size is 8");
  plan.struct_size = sizeof plan;
#define REFUSED(field, value, status, text) \
  do { \
    request = good; \
    request.field = (value); \
    CHECK_ERR(fsdp_plan(model, &request, &plan), status, text); \
  } while (0)
  REFUSED(struct_size, 0, FSDP_ERR_INVALID_ARGUMENT, "fsdp_plan_request_t.struct_size is 0");
  REFUSED(world_size, 0, FSDP_ERR_INVALID_ARGUMENT, "world size 0");
  REFUSED(world_size, (1u << 24) + 1, FSDP_ERR_INVALID_ARGUMENT, "world size 16777217");
  REFUSED(strategy, 9, FSDP_ERR_INVALID_ARGUMENT, "fsdp_plan_request_t.strategy cannot be 9");
  REFUSED(reduce_dtype.bits, 8, FSDP_ERR_UNSUPPORTED, "fsdp_plan_request_t.reduce_dtype");
  REFUSED(optimizer_bytes_per_element, 5000, FSDP_ERR_INVALID_ARGUMENT, "5000 bytes");
  REFUSED(rank, 1, FSDP_ERR_INVALID_ARGUMENT, "rank 1 does not exist in a world of 1");
  REFUSED(rank, -2, FSDP_ERR_INVALID_ARGUMENT, "fsdp_plan_request_t.rank cannot be -2");
  CHECK(memcmp(&plan, &untouched, sizeof plan) == 0);
}

/* A model with a part that is sharded already has that part's world size. */
static void sharded_part(void) {
  fsdp_comm_t *comm = NULL;
  fsdp_engine_t *engine = NULL;
  fsdp_model_t *inner = NULL, *outer = NULL;
  uint32_t module = 0, param = 0;
  int64_t shape[1] = {5};
  float values[5] = {0};
  fsdp_tensor_t t = tensor_f32(values, 1, shape);
  fsdp_plan_request_t request = FSDP_PLAN_REQUEST_INIT;
  fsdp_plan_t plan = plan_init();
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_OK(fsdp_model_create("Inner", &inner));
  CHECK_OK(fsdp_model_add_parameter(inner, 0, "w", &t, 1, &param));
  CHECK_OK(fsdp_engine_create(inner, comm, NULL, &engine));
  CHECK_OK(fsdp_model_create("Outer", &outer));
  CHECK_OK(fsdp_model_add_sharded(outer, 0, "inner", engine, &module, &param));
  CHECK_OK(fsdp_plan(outer, &request, &plan));
  CHECK_EQ(plan.unit_count, 2);
  CHECK_EQ(plan.param_shard_bytes, 32);
  request.world_size = 2;
  CHECK_ERR(fsdp_plan(outer, &request, &plan), FSDP_ERR_INVALID_ARGUMENT,
            "sharded over 1 ranks already");
  fsdp_model_destroy(inner);
  fsdp_model_destroy(outer);
  fsdp_engine_destroy(engine);
  fsdp_comm_destroy(comm);
}

int main(void) {
  fsdp_model_t *model = unfilled();
  numbers(model);
  wrong_arguments(model);
  sharded_part();
  fsdp_model_destroy(model);
  return 0;
}
