/* Shards of parameters and gradients, clearing them, and the engine's statistics. World size 1. */
#include "toy.h"

static void shards(void) {
  toy_t toy = toy_create();
  fsdp_shard_t out, before;
  memset(&out, 0x5a, sizeof out);
  before = out;
  CHECK_ERR(fsdp_engine_shard(toy.engine, 0, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  CHECK_ERR(fsdp_engine_shard(toy.engine, TOY_PARAMS, &out), FSDP_ERR_INVALID_ARGUMENT,
            "parameter 5");
  CHECK_BAD_ENGINES(fsdp_engine_shard(engine, 0, &out));
  CHECK_EQ(memcmp(&out, &before, sizeof out), 0);
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    CHECK_OK(fsdp_engine_shard(toy.engine, p, &out));
    CHECK_EQ(out.numel, TOY_NUMEL[p]);
    CHECK(out.grad == NULL);
    for (int64_t i = 0; i < out.numel; i++) CHECK(out.data[i] == toy_value(p, i));
  }
  /* The place of a shard never changes. */
  const float *place = toy_shard(toy.engine, TOY_V).data;
  toy_forward(toy.engine);
  toy_backward(toy.engine, 1);
  CHECK(toy_shard(toy.engine, TOY_V).data == place);
  CHECK(toy_shard(toy.engine, TOY_FROZEN).grad == NULL);
  toy_destroy(toy);
}

static void clearing(void) {
  toy_t toy = toy_create();
  CHECK_ERR(fsdp_engine_clear_grad(toy.engine, TOY_PARAMS), FSDP_ERR_INVALID_ARGUMENT,
            "parameter 5");
  CHECK_BAD_ENGINES(fsdp_engine_clear_grad(engine, 0));
  CHECK_BAD_ENGINES(fsdp_engine_zero_grad(engine));
  CHECK_OK(fsdp_engine_clear_grad(toy.engine, TOY_V));
  CHECK_OK(fsdp_engine_zero_grad(toy.engine));
  toy_forward(toy.engine);
  toy_backward(toy.engine, 1);
  toy_forward(toy.engine);
  toy_backward(toy.engine, 2);
  CHECK(toy_shard(toy.engine, TOY_V).grad[3] == 3);
  /* Clipping in place is what the next backward adds to. */
  toy_shard(toy.engine, TOY_BIAS).grad[0] = 10;
  CHECK_OK(fsdp_engine_clear_grad(toy.engine, TOY_V));
  CHECK(toy_shard(toy.engine, TOY_V).grad == NULL);
  CHECK(toy_shard(toy.engine, TOY_BIAS).grad != NULL);
  toy_forward(toy.engine);
  toy_backward(toy.engine, 4);
  CHECK(toy_shard(toy.engine, TOY_V).grad[3] == 4);
  CHECK(toy_shard(toy.engine, TOY_BIAS).grad[0] == 14);
  CHECK(toy_shard(toy.engine, TOY_BIAS).grad[1] == 7);
  CHECK_OK(fsdp_engine_zero_grad(toy.engine));
  for (uint32_t p = 0; p < TOY_PARAMS; p++) CHECK(toy_shard(toy.engine, p).grad == NULL);
  toy_destroy(toy);
}

static void statistics(void) {
  toy_t toy = toy_create();
  fsdp_stats_t out;
  CHECK_ERR(fsdp_engine_stats(toy.engine, NULL), FSDP_ERR_INVALID_ARGUMENT, "out is NULL");
  memset(&out, 0x5a, sizeof out);
  const size_t wrong[] = {0, 8, sizeof out - 8, 1 << 20, SIZE_MAX};
  for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
    out.struct_size = wrong[i];
    CHECK_ERR(fsdp_engine_stats(toy.engine, &out), FSDP_ERR_INVALID_ARGUMENT,
              "fsdp_stats_t.struct_size");
    CHECK_EQ(out.slots_peak, 0x5a5a5a5a);
  }
  out.struct_size = sizeof out;
  CHECK_BAD_ENGINES(fsdp_engine_stats(engine, &out));
  CHECK_EQ(out.slots_peak, 0x5a5a5a5a);
  CHECK_OK(fsdp_engine_stats(toy.engine, &out));

  uint64_t unit_bytes = 0, padding = 0;
  for (uint32_t u = 0; u < TOY_UNITS; u++) {
    fsdp_unit_info_t info = unit_info_init();
    CHECK_OK(fsdp_engine_unit_info(toy.engine, u, &info));
    unit_bytes += info.unit_bytes;
    padding += info.padding_bytes;
  }
  CHECK_EQ(out.struct_size, sizeof out);
  CHECK_EQ(out.param_shard_bytes, unit_bytes);
  CHECK_EQ(out.padding_bytes, padding);
  CHECK_EQ(unit_bytes - padding, 4 * (5 + 21 + 4 + 10));
  CHECK(out.unit_buffer_bytes >= unit_bytes && out.unit_buffer_bytes < unit_bytes + 64 * TOY_UNITS);
  CHECK(out.grad_shard_bytes >= unit_bytes && out.grad_shard_bytes < unit_bytes + 64 * TOY_UNITS);
  CHECK_EQ(out.all_gathers, 0);
  CHECK_EQ(out.reduce_scatters, 0);
  CHECK_EQ(out.slots_peak, 0);
  for (int step = 1; step <= 3; step++) {
    toy_forward(toy.engine);
    toy_backward(toy.engine, 1);
    out = stats_of(toy.engine);
    CHECK_EQ(out.all_gathers, 5 * step);
    CHECK_EQ(out.all_gather_bytes_moved, 0);
    CHECK_EQ(out.reduce_scatters, 3 * step);
    CHECK_EQ(out.reduce_scatter_bytes, (uint64_t)step * unit_bytes);
    CHECK(out.slots_peak >= 1 && out.slots_peak <= TOY_UNITS);
    CHECK_EQ(out.overflow_peak, 0);
  }
  toy_destroy(toy);
}

int main(void) {
  shards();
  clearing();
  statistics();
  return 0;
}
