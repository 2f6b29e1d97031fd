/* The four hooks and what they are made of: order, repetition and nesting at world size 1. */
#include "toy.h"

static void an_iteration(void) {
  toy_t toy = toy_create();
  fsdp_engine_t *e = toy.engine;
  CHECK_OK(fsdp_engine_pre_forward(e, TOY_ROOT));
  CHECK_EQ(toy_state(e, TOY_ROOT), FSDP_UNIT_UNSHARDED);
  CHECK_EQ(toy_state(e, TOY_A), FSDP_UNIT_SHARDED);
  CHECK_OK(fsdp_engine_pre_forward(e, TOY_A));
  CHECK_EQ(toy_state(e, TOY_A), FSDP_UNIT_UNSHARDED);
  CHECK_OK(fsdp_engine_post_forward(e, TOY_A));
  CHECK_EQ(toy_state(e, TOY_A), FSDP_UNIT_SHARDED);
  CHECK_EQ(toy_state(e, TOY_ROOT), FSDP_UNIT_UNSHARDED);
  CHECK_OK(fsdp_engine_post_forward(e, TOY_ROOT));
  /* Its backward comes next. */
  CHECK_EQ(toy_state(e, TOY_ROOT), FSDP_UNIT_UNSHARDED);
  CHECK_OK(fsdp_engine_pre_backward(e, TOY_ROOT));
  CHECK_OK(fsdp_engine_pre_backward(e, TOY_A));
  CHECK_EQ(toy_state(e, TOY_A), FSDP_UNIT_UNSHARDED);
  CHECK_OK(fsdp_engine_post_backward(e, TOY_A));
  CHECK_EQ(toy_state(e, TOY_A), FSDP_UNIT_SHARDED);
  CHECK_OK(fsdp_engine_post_backward(e, TOY_ROOT));
  CHECK_EQ(toy_state(e, TOY_ROOT), FSDP_UNIT_SHARDED);
  CHECK_EQ(stats_of(e).all_gathers, 3);
  toy_destroy(toy);
}

typedef fsdp_status_t hook_fn(fsdp_engine_t *engine, uint32_t unit);

static void arguments(void) {
  hook_fn *const hooks[] = {fsdp_engine_pre_forward,  fsdp_engine_post_forward,
                            fsdp_engine_pre_backward, fsdp_engine_post_backward,
                            fsdp_engine_reshard,      fsdp_engine_reduce};
  toy_t toy = toy_create();
  for (size_t i = 0; i < sizeof hooks / sizeof hooks[0]; i++) {
    CHECK_BAD_ENGINES(hooks[i](engine, 0));
    CHECK_ERR(hooks[i](toy.engine, TOY_UNITS), FSDP_ERR_INVALID_ARGUMENT, "unit 3");
    CHECK_ERR(hooks[i](toy.engine, UINT32_MAX), FSDP_ERR_INVALID_ARGUMENT, "4294967295");
  }
  CHECK_BAD_ENGINES(fsdp_engine_set_grad_enabled(engine, 1));
  CHECK_BAD_ENGINES(fsdp_engine_finish_forward(engine));
  CHECK_BAD_ENGINES(fsdp_engine_finish_backward(engine));
  CHECK_BAD_ENGINES(fsdp_engine_begin_write(engine));
  void *buffer = &toy;
  CHECK_ERR(fsdp_engine_unshard(toy.engine, 0, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_unit_buffer is NULL");
  CHECK_ERR(fsdp_engine_unshard(toy.engine, TOY_UNITS, &buffer), FSDP_ERR_INVALID_ARGUMENT,
            "unit 3");
  CHECK_BAD_ENGINES(fsdp_engine_unshard(engine, 0, &buffer));
  CHECK(buffer == (void *)&toy);
  /* None of that has begun an iteration. */
  CHECK_EQ(stats_of(toy.engine).all_gathers, 0);
  CHECK_EQ(toy_state(toy.engine, TOY_ROOT), FSDP_UNIT_SHARDED);
  toy_destroy(toy);
}

static void wrong_order(void) {
  toy_t toy = toy_create();
  fsdp_engine_t *e = toy.engine;
  CHECK_ERR(fsdp_engine_post_forward(e, TOY_A), FSDP_ERR_INVALID_STATE, "\"a\"");
  CHECK_ERR(fsdp_engine_post_forward(e, TOY_ROOT), FSDP_ERR_INVALID_STATE, "(root)");
  CHECK_ERR(fsdp_engine_pre_backward(e, TOY_X), FSDP_ERR_INVALID_STATE, "\"a.x\"");
  CHECK_ERR(fsdp_engine_post_backward(e, TOY_X), FSDP_ERR_INVALID_STATE, "\"a.x\"");
  CHECK_OK(fsdp_engine_pre_forward(e, TOY_A));
  CHECK_ERR(fsdp_engine_pre_backward(e, TOY_A), FSDP_ERR_INVALID_STATE, "\"a\"");
  CHECK_OK(fsdp_engine_post_forward(e, TOY_A));
  CHECK_ERR(fsdp_engine_post_forward(e, TOY_A), FSDP_ERR_INVALID_STATE, "\"a\"");
  CHECK_OK(fsdp_engine_pre_backward(e, TOY_A));
  CHECK_ERR(fsdp_engine_pre_backward(e, TOY_A), FSDP_ERR_INVALID_STATE, "\"a\"");
  CHECK_OK(fsdp_engine_post_backward(e, TOY_A));
  CHECK_ERR(fsdp_engine_post_backward(e, TOY_A), FSDP_ERR_INVALID_STATE, "\"a\"");
  CHECK_ERR(fsdp_engine_pre_backward(e, TOY_A), FSDP_ERR_INVALID_STATE, "\"a\"");
  /* The engine works on after each of these. */
  CHECK_OK(fsdp_engine_finish_backward(e));
  toy_forward(e);
  toy_backward(e, 1);
  CHECK(toy_shard(e, TOY_V).grad[9] == 1);
  toy_destroy(toy);
}

static void without_gradients(void) {
  toy_t toy = toy_create();
  fsdp_engine_t *e = toy.engine;
  CHECK_OK(fsdp_engine_set_grad_enabled(e, 0));
  toy_forward(e);
  CHECK_ERR(fsdp_engine_pre_backward(e, TOY_ROOT), FSDP_ERR_INVALID_STATE, "(root)");
  CHECK_OK(fsdp_engine_begin_write(e));
  toy_forward(e);
  toy_forward(e);
  CHECK_OK(fsdp_engine_set_grad_enabled(e, 1));
  toy_forward(e);
  toy_backward(e, 2);
  CHECK(toy_shard(e, TOY_BIAS).grad[0] == 2);
  toy_destroy(toy);
}

static void used_twice_and_nested_in_itself(void) {
  toy_t toy = toy_create();
  fsdp_engine_t *e = toy.engine;
  CHECK_OK(fsdp_engine_pre_forward(e, TOY_ROOT));
  for (int i = 0; i < 2; i++) {
    CHECK_OK(fsdp_engine_pre_forward(e, TOY_X));
    CHECK_OK(fsdp_engine_post_forward(e, TOY_X));
  }
  CHECK_OK(fsdp_engine_pre_forward(e, TOY_A));
  CHECK_OK(fsdp_engine_pre_forward(e, TOY_A));
  CHECK_OK(fsdp_engine_post_forward(e, TOY_A));
  CHECK_EQ(toy_state(e, TOY_A), FSDP_UNIT_UNSHARDED);
  CHECK_OK(fsdp_engine_post_forward(e, TOY_A));
  CHECK_EQ(toy_state(e, TOY_A), FSDP_UNIT_SHARDED);
  CHECK_OK(fsdp_engine_post_forward(e, TOY_ROOT));
  CHECK_EQ(stats_of(e).all_gathers, 4);
  for (int i = 0; i < 2; i++) {
    CHECK_OK(fsdp_engine_pre_backward(e, TOY_X));
    toy_add_grad(e, TOY_V, 1.5f);
    CHECK_EQ(stats_of(e).reduce_scatters, 0);
    CHECK_OK(fsdp_engine_post_backward(e, TOY_X));
  }
  CHECK_EQ(stats_of(e).reduce_scatters, 1);
  CHECK_OK(fsdp_engine_finish_backward(e));
  CHECK(toy_shard(e, TOY_V).grad[0] == 3);
  toy_destroy(toy);
}

static void parts_of_the_hooks(void) {
  toy_t toy = toy_create();
  fsdp_engine_t *e = toy.engine;
  void *buffer = NULL, *again = NULL;
  fsdp_param_info_t info = param_info_init();
  CHECK_OK(fsdp_engine_unshard(e, TOY_A, &buffer));
  CHECK(buffer != NULL && (uintptr_t)buffer % 64 == 0);
  CHECK_OK(fsdp_engine_unshard(e, TOY_A, &again));
  CHECK(again == buffer);
  CHECK_EQ(stats_of(e).all_gathers, 1);
  CHECK_OK(fsdp_engine_param_info(e, TOY_FROZEN, &info));
  for (int64_t i = 0; i < 21; i++) CHECK(((float *)buffer)[i] == toy_value(TOY_WEIGHT, i));
  for (int64_t i = 0; i < 4; i++)
    CHECK(((float *)buffer)[info.unit_offset + i] == toy_value(TOY_FROZEN, i));
  CHECK_OK(fsdp_engine_reshard(e, TOY_A));
  CHECK_EQ(toy_state(e, TOY_A), FSDP_UNIT_SHARDED);
  CHECK_OK(fsdp_engine_reshard(e, TOY_A));
  CHECK_OK(fsdp_engine_unshard(e, TOY_A, &again));
  CHECK(again == buffer);
  CHECK_EQ(stats_of(e).all_gathers, 2);
  /* Nothing was collected here; a peer might have something. */
  CHECK_OK(fsdp_engine_reduce(e, TOY_A));
  CHECK_EQ(stats_of(e).reduce_scatters, 1);
  CHECK(toy_shard(e, TOY_WEIGHT).grad == NULL);
  toy_add_grad(e, TOY_WEIGHT, 1);
  CHECK_OK(fsdp_engine_reduce(e, TOY_A));
  CHECK_EQ(stats_of(e).reduce_scatters, 2);
  /* More of the same backward is added. */
  toy_add_grad(e, TOY_WEIGHT, 2);
  CHECK_OK(fsdp_engine_finish_backward(e));
  CHECK_EQ(stats_of(e).reduce_scatters, 3);
  CHECK(toy_shard(e, TOY_WEIGHT).grad[20] == 3);
  CHECK_EQ(toy_state(e, TOY_A), FSDP_UNIT_SHARDED);
  CHECK_OK(fsdp_engine_finish_backward(e));
  CHECK_OK(fsdp_engine_finish_forward(e));
  CHECK_OK(fsdp_engine_finish_forward(e));
  toy_destroy(toy);
}

/* When shards may be written: at first, after a backward, after begin_write; never during a
 * backward. */
static void writing(void) {
  toy_t toy = toy_create();
  fsdp_engine_t *e = toy.engine;
  void *buffer = NULL;
  CHECK_OK(fsdp_engine_begin_write(e));
  toy_shard(e, TOY_BIAS).data[2] = 42;
  CHECK_OK(fsdp_engine_unshard(e, TOY_ROOT, &buffer));
  CHECK(((float *)buffer)[2] == 42);
  toy_add_grad(e, TOY_BIAS, 1);
  CHECK_ERR(fsdp_engine_begin_write(e), FSDP_ERR_INVALID_STATE, "(root)");
  CHECK_EQ(toy_state(e, TOY_ROOT), FSDP_UNIT_UNSHARDED);
  CHECK_OK(fsdp_engine_finish_backward(e));
  CHECK_OK(fsdp_engine_begin_write(e));
  toy_shard(e, TOY_BIAS).data[2] = 43;
  CHECK_OK(fsdp_engine_unshard(e, TOY_ROOT, &buffer));
  CHECK(((float *)buffer)[2] == 43);
  /* It ends a forward that no backward followed. */
  CHECK_OK(fsdp_engine_begin_write(e));
  CHECK_EQ(toy_state(e, TOY_ROOT), FSDP_UNIT_SHARDED);
  /* Giving a backward up: what it had collected is dropped. */
  CHECK_OK(fsdp_engine_zero_grad(e));
  CHECK_OK(fsdp_engine_unshard(e, TOY_ROOT, &buffer));
  toy_add_grad(e, TOY_BIAS, 1);
  CHECK_OK(fsdp_engine_finish_forward(e));
  CHECK_OK(fsdp_engine_begin_write(e));
  CHECK(toy_shard(e, TOY_BIAS).grad == NULL);
  toy_forward(e);
  toy_backward(e, 5);
  CHECK(toy_shard(e, TOY_BIAS).grad[0] == 5);
  toy_destroy(toy);
}

/* After an abort every hook returns it. */
static void after_an_abort(void) {
  toy_t toy = toy_create();
  void *buffer = NULL;
  toy_forward(toy.engine);
  CHECK_OK(fsdp_engine_pre_backward(toy.engine, TOY_ROOT));
  toy_add_grad(toy.engine, TOY_BIAS, 1);
  CHECK_OK(fsdp_comm_abort(toy.comm, "no more power"));
  CHECK_ERR(fsdp_engine_pre_forward(toy.engine, TOY_A), FSDP_ERR_ABORTED, "no more power");
  CHECK_ERR(fsdp_engine_pre_backward(toy.engine, TOY_A), FSDP_ERR_ABORTED, "no more power");
  CHECK_ERR(fsdp_engine_unshard(toy.engine, TOY_A, &buffer), FSDP_ERR_ABORTED, "no more power");
  CHECK_ERR(fsdp_engine_post_backward(toy.engine, TOY_ROOT), FSDP_ERR_ABORTED, "no more power");
  CHECK_ERR(fsdp_engine_finish_backward(toy.engine), FSDP_ERR_ABORTED, "no more power");
  CHECK_ERR(fsdp_engine_begin_write(toy.engine), FSDP_ERR_ABORTED, "no more power");
  CHECK(buffer == NULL);
  fsdp_engine_t *out = NULL;
  CHECK_ERR(fsdp_engine_create(toy.model, toy.comm, NULL, &out), FSDP_ERR_ABORTED, "no more power");
  CHECK(out == NULL);
  toy_destroy(toy);
}

int main(void) {
  an_iteration();
  arguments();
  wrong_order();
  without_gradients();
  used_twice_and_nested_in_itself();
  parts_of_the_hooks();
  writing();
  after_an_abort();
  return 0;
}
