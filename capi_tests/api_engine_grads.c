/* Full gradients on their way in: param_grad and accumulate_grad, and the full parameters beside
 * them. */
#include "toy.h"

static void full_parameters(void) {
  toy_t toy = toy_create();
  fsdp_tensor_t out, before;
  memset(&out, 0x5a, sizeof out);
  before = out;
  CHECK_ERR(fsdp_engine_param_data(toy.engine, TOY_WEIGHT, &out), FSDP_ERR_INVALID_STATE,
            "\"a\" is sharded");
  CHECK_ERR(fsdp_engine_param_data(toy.engine, TOY_PARAMS, &out), FSDP_ERR_INVALID_ARGUMENT,
            "parameter 5");
  CHECK_BAD_ENGINES(fsdp_engine_param_data(engine, 0, &out));
  CHECK_EQ(memcmp(&out, &before, sizeof out), 0);
  CHECK_OK(fsdp_engine_pre_forward(toy.engine, TOY_A));
  CHECK_ERR(fsdp_engine_param_data(toy.engine, TOY_WEIGHT, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out is NULL");
  CHECK_ERR(fsdp_engine_param_data(toy.engine, TOY_BIAS, &out), FSDP_ERR_INVALID_STATE, "(root)");
  CHECK_OK(fsdp_engine_param_data(toy.engine, TOY_WEIGHT, &out));
  CHECK_EQ(out.ndim, 2);
  CHECK(out.shape[0] == 7 && out.shape[1] == 3);
  CHECK(out.strides == NULL && out.byte_offset == 0);
  CHECK(out.device.device_type == FSDP_DEVICE_CPU && out.device.device_id == 0);
  CHECK(out.dtype.code == FSDP_DTYPE_FLOAT && out.dtype.bits == 32 && out.dtype.lanes == 1);
  CHECK_EQ((uintptr_t)out.data % 64, 0);
  for (int64_t i = 0; i < 21; i++) CHECK(((float *)out.data)[i] == toy_value(TOY_WEIGHT, i));
  CHECK_OK(fsdp_engine_param_data(toy.engine, TOY_FROZEN, &out));
  CHECK(((float *)out.data)[3] == toy_value(TOY_FROZEN, 3));
  CHECK_OK(fsdp_engine_post_forward(toy.engine, TOY_A));
  CHECK_ERR(fsdp_engine_param_data(toy.engine, TOY_WEIGHT, &out), FSDP_ERR_INVALID_STATE, "\"a\"");
  CHECK_OK(fsdp_engine_pre_forward(toy.engine, TOY_X));
  CHECK_OK(fsdp_engine_param_data(toy.engine, TOY_EMPTY, &out));
  CHECK(out.ndim == 2 && out.shape[0] == 0 && out.shape[1] == 2);
  toy_destroy(toy);
}

static void regions(void) {
  toy_t toy = toy_create();
  fsdp_tensor_t out, again, before;
  int32_t accumulate = -7;
  memset(&out, 0x5a, sizeof out);
  before = out;
  CHECK_ERR(fsdp_engine_param_grad(toy.engine, TOY_V, &out, &accumulate), FSDP_ERR_INVALID_STATE,
            "\"a.x.v\"");
  toy_forward(toy.engine);
  CHECK_OK(fsdp_engine_pre_backward(toy.engine, TOY_X));
  CHECK_ERR(fsdp_engine_param_grad(toy.engine, TOY_V, NULL, &accumulate), FSDP_ERR_INVALID_ARGUMENT,
            "out is NULL");
  CHECK_ERR(fsdp_engine_param_grad(toy.engine, TOY_V, &out, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_accumulate is NULL");
  CHECK_ERR(fsdp_engine_param_grad(toy.engine, TOY_PARAMS, &out, &accumulate),
            FSDP_ERR_INVALID_ARGUMENT, "parameter 5");
  CHECK_ERR(fsdp_engine_param_grad(toy.engine, TOY_FROZEN, &out, &accumulate),
            FSDP_ERR_INVALID_STATE, "\"a.frozen\"");
  CHECK_BAD_ENGINES(fsdp_engine_param_grad(engine, 0, &out, &accumulate));
  CHECK_EQ(accumulate, -7);
  CHECK_EQ(memcmp(&out, &before, sizeof out), 0);
  /* None of the failed calls counts as a gradient. */
  CHECK_OK(fsdp_engine_param_grad(toy.engine, TOY_V, &out, &accumulate));
  CHECK_EQ(accumulate, 0);
  CHECK_EQ(out.ndim, 1);
  CHECK_EQ(out.shape[0], 10);
  CHECK_EQ((uintptr_t)out.data % 64, 0);
  for (int i = 0; i < 10; i++) ((float *)out.data)[i] = (float)i;
  CHECK_OK(fsdp_engine_param_grad(toy.engine, TOY_V, &again, &accumulate));
  CHECK_EQ(accumulate, 1);
  CHECK(again.data == out.data);
  for (int i = 0; i < 10; i++) ((float *)out.data)[i] += 0.5f;
  CHECK_OK(fsdp_engine_param_grad(toy.engine, TOY_EMPTY, &again, &accumulate));
  CHECK_EQ(accumulate, 0);
  CHECK_OK(fsdp_engine_post_backward(toy.engine, TOY_X));
  CHECK_OK(fsdp_engine_finish_backward(toy.engine));
  fsdp_shard_t shard = toy_shard(toy.engine, TOY_V);
  for (int i = 0; i < 10; i++) CHECK(shard.grad[i] == (float)i + 0.5f);
  CHECK(toy_shard(toy.engine, TOY_BIAS).grad == NULL);
  CHECK(toy_shard(toy.engine, TOY_WEIGHT).grad == NULL);
  toy_destroy(toy);
}

/* A reserved region is the one that param_grad gives, and counts for nothing without it. */
static void reserved_regions(void) {
  toy_t toy = toy_create();
  fsdp_tensor_t reserved, region, out = {0};
  int32_t accumulate = -7;
  CHECK_ERR(fsdp_engine_reserve_grad(toy.engine, TOY_V, &out, &accumulate), FSDP_ERR_INVALID_STATE,
            "\"a.x.v\"");
  toy_forward(toy.engine);
  CHECK_OK(fsdp_engine_pre_backward(toy.engine, TOY_X));
  CHECK_ERR(fsdp_engine_reserve_grad(toy.engine, TOY_V, NULL, &accumulate),
            FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_engine_reserve_grad(toy.engine, TOY_V, &out, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_accumulate is NULL");
  CHECK_ERR(fsdp_engine_reserve_grad(toy.engine, TOY_PARAMS, &out, &accumulate),
            FSDP_ERR_INVALID_ARGUMENT, "parameter 5");
  CHECK_ERR(fsdp_engine_reserve_grad(toy.engine, TOY_FROZEN, &out, &accumulate),
            FSDP_ERR_INVALID_STATE, "\"a.frozen\"");
  CHECK_BAD_ENGINES(fsdp_engine_reserve_grad(engine, 0, &out, &accumulate));
  CHECK_EQ(accumulate, -7);
  CHECK(out.data == NULL);
  CHECK_OK(fsdp_engine_reserve_grad(toy.engine, TOY_WEIGHT, &reserved, &accumulate));
  CHECK_OK(fsdp_engine_reserve_grad(toy.engine, TOY_V, &reserved, &accumulate));
  CHECK_EQ(accumulate, 0);
  for (int i = 0; i < 10; i++) ((float *)reserved.data)[i] = (float)i;
  CHECK_OK(fsdp_engine_param_grad(toy.engine, TOY_V, &region, &accumulate));
  CHECK_EQ(accumulate, 0);
  CHECK(region.data == reserved.data);
  CHECK_OK(fsdp_engine_reserve_grad(toy.engine, TOY_V, &reserved, &accumulate));
  CHECK_EQ(accumulate, 1);
  CHECK_OK(fsdp_engine_post_backward(toy.engine, TOY_X));
  CHECK_OK(fsdp_engine_finish_backward(toy.engine));
  fsdp_shard_t shard = toy_shard(toy.engine, TOY_V);
  for (int i = 0; i < 10; i++) CHECK(shard.grad[i] == (float)i);
  CHECK(toy_shard(toy.engine, TOY_WEIGHT).grad == NULL);
  toy_destroy(toy);
}

static void adding(void) {
  toy_t toy = toy_create();
  float grad[21];
  int64_t shape[2] = {7, 3}, transposed[2] = {3, 7}, flat[1] = {21}, ten[1] = {10};
  for (int i = 0; i < 21; i++) grad[i] = (float)i;
  fsdp_tensor_t t = tensor_f32(grad, 2, shape);
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, &t), FSDP_ERR_INVALID_STATE,
            "\"a.weight\"");
  toy_forward(toy.engine);
  CHECK_OK(fsdp_engine_pre_backward(toy.engine, TOY_A));
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "\"a.weight\" is NULL");
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_PARAMS, &t), FSDP_ERR_INVALID_ARGUMENT,
            "parameter 5");
  CHECK_BAD_ENGINES(fsdp_engine_accumulate_grad(engine, TOY_WEIGHT, &t));
  fsdp_tensor_t bad = tensor_f32(grad, 2, transposed);
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, &bad), FSDP_ERR_INVALID_ARGUMENT,
            "[3, 7]");
  bad = tensor_f32(grad, 1, flat);
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, &bad), FSDP_ERR_INVALID_ARGUMENT,
            "[21]");
  bad = tensor_f32(NULL, 2, shape);
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, &bad), FSDP_ERR_INVALID_ARGUMENT,
            "NULL");
  double doubles[21] = {0};
  bad = tensor_of(doubles, 2, shape, FSDP_DTYPE_FLOAT, 64);
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, &bad), FSDP_ERR_INVALID_ARGUMENT,
            "float64");
  bad = tensor_f32(grad, 2, shape);
  bad.device.device_type = FSDP_DEVICE_CUDA;
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, &bad), FSDP_ERR_INVALID_ARGUMENT,
            "the gradient of \"a.weight\" is on GPU 0");
  int64_t four[1] = {4};
  bad = tensor_f32(grad, 1, four);
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_FROZEN, &bad), FSDP_ERR_INVALID_STATE,
            "\"a.frozen\"");

  CHECK_OK(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, &t));
  CHECK_OK(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, &t));
  CHECK_OK(fsdp_engine_post_backward(toy.engine, TOY_A));
  /* A gradient for a unit whose hooks did not run is reduced at the end. */
  bad = tensor_f32(grad, 1, ten);
  CHECK_OK(fsdp_engine_accumulate_grad(toy.engine, TOY_V, &bad));
  CHECK_OK(fsdp_engine_finish_backward(toy.engine));
  fsdp_shard_t shard = toy_shard(toy.engine, TOY_WEIGHT);
  for (int i = 0; i < 21; i++) CHECK(shard.grad[i] == (float)(2 * i));
  CHECK(toy_shard(toy.engine, TOY_V).grad[9] == 9);
  CHECK_ERR(fsdp_engine_accumulate_grad(toy.engine, TOY_WEIGHT, &t), FSDP_ERR_INVALID_STATE,
            "\"a.weight\"");
  toy_destroy(toy);
}

/* Several at once are as one after the other; with one that is wrong none is taken. */
static void together(void) {
  toy_t toy = toy_create(), singly = toy_create();
  float grad[21];
  int64_t shape[2] = {7, 3}, ten[1] = {10}, five[1] = {5}, four[1] = {4}, none[2] = {0, 2};
  for (int i = 0; i < 21; i++) grad[i] = (float)i / 3;
  const uint32_t params[4] = {TOY_V, TOY_WEIGHT, TOY_EMPTY, TOY_BIAS};
  fsdp_tensor_t grads[4];
  grads[0] = tensor_f32(grad, 1, ten);
  grads[1] = tensor_f32(grad, 2, shape);
  grads[2] = tensor_f32(NULL, 2, none);
  grads[3] = tensor_f32(grad, 1, five);
  CHECK_ERR(fsdp_engine_accumulate_grads(toy.engine, params, grads, 4), FSDP_ERR_INVALID_STATE,
            "\"a.x.v\"");
  toy_forward(toy.engine);
  toy_forward(singly.engine);
  CHECK_OK(fsdp_engine_pre_backward(toy.engine, TOY_A));
  CHECK_OK(fsdp_engine_pre_backward(singly.engine, TOY_A));

  uint32_t bad[4];
  fsdp_tensor_t tensors[4];
  memcpy(bad, params, sizeof bad);
  memcpy(tensors, grads, sizeof tensors);
#define CHECK_REFUSED(status, text) \
  CHECK_ERR(fsdp_engine_accumulate_grads(toy.engine, bad, tensors, 4), status, text)
  bad[3] = TOY_PARAMS;
  CHECK_REFUSED(FSDP_ERR_INVALID_ARGUMENT, "parameter 5");
  bad[3] = TOY_FROZEN;
  tensors[3] = tensor_f32(grad, 1, four);
  CHECK_REFUSED(FSDP_ERR_INVALID_STATE, "\"a.frozen\"");
  bad[3] = TOY_V;
  tensors[3] = tensor_f32(grad, 1, ten);
  CHECK_REFUSED(FSDP_ERR_INVALID_ARGUMENT, "two gradients of \"a.x.v\"");
  bad[3] = TOY_BIAS;
  CHECK_REFUSED(FSDP_ERR_INVALID_ARGUMENT, "\"bias\" is float32 of shape [10]");
  tensors[3] = tensor_f32(NULL, 1, five);
  CHECK_REFUSED(FSDP_ERR_INVALID_ARGUMENT, "\"bias\" has elements but its data is NULL");
  tensors[3] = tensor_f32(grad, 1, five);
  tensors[3].device.device_type = FSDP_DEVICE_CUDA;
  CHECK_REFUSED(FSDP_ERR_INVALID_ARGUMENT, "\"bias\" is on GPU 0");
#undef CHECK_REFUSED
  CHECK_ERR(fsdp_engine_accumulate_grads(toy.engine, NULL, grads, 4), FSDP_ERR_INVALID_ARGUMENT,
            "params is NULL");
  CHECK_ERR(fsdp_engine_accumulate_grads(toy.engine, params, NULL, 4), FSDP_ERR_INVALID_ARGUMENT,
            "grads is NULL");
  CHECK_BAD_ENGINES(fsdp_engine_accumulate_grads(engine, params, grads, 4));
  CHECK_OK(fsdp_engine_accumulate_grads(toy.engine, NULL, NULL, 0));
  /* None of it was taken: what comes now is the first. */
  for (int i = 0; i < 4; i++) {
    fsdp_tensor_t region;
    int32_t accumulate = -1;
    CHECK_OK(fsdp_engine_reserve_grad(toy.engine, params[i], &region, &accumulate));
    CHECK_EQ(accumulate, 0);
  }

  for (int times = 0; times < 2; times++) {
    CHECK_OK(fsdp_engine_accumulate_grads(toy.engine, params, grads, 4));
    for (int i = 0; i < 4; i++)
      CHECK_OK(fsdp_engine_accumulate_grad(singly.engine, params[i], &grads[i]));
  }
  CHECK_OK(fsdp_engine_finish_backward(toy.engine));
  CHECK_OK(fsdp_engine_finish_backward(singly.engine));
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    const fsdp_shard_t a = toy_shard(toy.engine, p), b = toy_shard(singly.engine, p);
    CHECK((a.grad == NULL) == (b.grad == NULL));
    CHECK((a.grad == NULL) == (p == TOY_FROZEN));
    for (int64_t i = 0; a.grad != NULL && i < a.numel; i++) CHECK(a.grad[i] == b.grad[i]);
  }
  CHECK(toy_shard(toy.engine, TOY_V).grad[9] == 6);
  toy_destroy(toy);
  toy_destroy(singly);
}

/* With one slot, nested units that collect at once overflow into private memory; the results are
 * the same. */
static void with_few_slots(void) {
  toy_t one = toy_with_slots(1), many = toy_with_slots(0);
  fsdp_engine_t *engines[2];
  engines[0] = one.engine;
  engines[1] = many.engine;
  for (int i = 0; i < 2; i++) {
    for (int step = 0; step < 3; step++) {
      toy_forward(engines[i]);
      toy_backward(engines[i], 3);
    }
    CHECK(toy_shard(engines[i], TOY_WEIGHT).grad[0] == 9);
    CHECK(toy_shard(engines[i], TOY_BIAS).grad[4] == 9);
    CHECK(toy_shard(engines[i], TOY_V).grad[9] == 9);
  }
  CHECK_EQ(stats_of(one.engine).slots_peak, 1);
  CHECK(stats_of(one.engine).overflow_peak >= 1);
  CHECK_EQ(stats_of(many.engine).overflow_peak, 0);
  CHECK(stats_of(one.engine).gradient_slot_bytes < stats_of(many.engine).gradient_slot_bytes);
  toy_destroy(one);
  toy_destroy(many);
}

int main(void) {
  full_parameters();
  regions();
  reserved_regions();
  adding();
  together();
  with_few_slots();
  return 0;
}
