/* Engines on collectives that a host lends, with ranks that are threads (hub.h): values, means and
 * memory, with requests and with blocking callbacks. The whole feature set on lent collectives is
 * in the tests named *_lent_*. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#include "hub.h"

#include <sys/mman.h>
#include <unistd.h>

enum { LAYERS = 3, LONGEST = 1 << 20 };

/* A stack of layers, each a unit with "weight" and "bias"; the memory of the values is this rank's
 * own. */
typedef struct {
  fsdp_engine_t *engine;
  fsdp_model_t *model;
  float *values;
  int64_t width;
} stack_t_;

static float initial(uint32_t param, int64_t i) { return (float)((i * 7 + param) % 31) - 15.0f; }

static stack_t_ stack_new(hub_rank_t *rank, int64_t width, int bfloat16) {
  stack_t_ s;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  int64_t shape[1];
  s.width = width;
  s.engine = NULL;
  s.model = NULL;
  s.values = (float *)malloc(sizeof(float) * (size_t)width);
  CHECK(s.values != NULL);
  if (bfloat16) {
    config.param_dtype.code = FSDP_DTYPE_BFLOAT;
    config.param_dtype.bits = 16;
    config.param_dtype.lanes = 1;
  }
  CHECK_OK(fsdp_model_create("Stack", &s.model));
  config.sync_module_states = 1; /* rank 0's values count */
  float *all = (float *)malloc(sizeof(float) * (size_t)width * 2 * LAYERS);
  CHECK(all != NULL);
  for (uint32_t l = 0; l < LAYERS; l++) {
    char name[16];
    uint32_t module = 0, param = 0;
    snprintf(name, sizeof name, "layer%u", (unsigned)l);
    CHECK_OK(fsdp_model_add_module(s.model, 0, name, "Layer", &module));
    for (uint32_t k = 0; k < 2; k++) {
      float *values = all + (int64_t)(2 * l + k) * width;
      shape[0] = k == 0 ? width : 5;
      for (int64_t i = 0; i < shape[0]; i++)
        values[i] = rank->rank == 0 ? initial(2 * l + k, i) : 99;
      fsdp_tensor_t t = tensor_f32(values, 1, shape);
      CHECK_OK(
          fsdp_model_add_parameter(s.model, module, k == 0 ? "weight" : "bias", &t, 1, &param));
    }
  }
  CHECK_OK(fsdp_model_wrap_class(s.model, "Layer"));
  CHECK_OK(fsdp_engine_create(s.model, rank->comm, &config, &s.engine));
  free(all);
  return s;
}

static void stack_free(stack_t_ *s) {
  fsdp_engine_destroy(s->engine);
  fsdp_model_destroy(s->model);
  free(s->values);
}

static float at(const fsdp_tensor_t *t, int64_t i) {
  if (t->dtype.bits == 32) return ((const float *)t->data)[i];
  const uint32_t bits = (uint32_t)((const uint16_t *)t->data)[i] << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* Every element of both parameters is `shift` above its initial value. */
static void check_layer(const stack_t_ *s, uint32_t layer, float shift) {
  for (uint32_t k = 0; k < 2; k++) {
    fsdp_tensor_t t;
    CHECK_OK(fsdp_engine_param_data(s->engine, 2 * layer + k, &t));
    for (int64_t i = 0; i < t.shape[0]; i++) CHECK(at(&t, i) == initial(2 * layer + k, i) + shift);
  }
}

static void give(const stack_t_ *s, uint32_t param, float value) {
  int64_t shape[1] = {param % 2 == 0 ? s->width : 5};
  for (int64_t i = 0; i < shape[0]; i++) s->values[i] = value;
  fsdp_tensor_t t = tensor_f32(s->values, 1, shape);
  CHECK_OK(fsdp_engine_accumulate_grad(s->engine, param, &t));
}

/* Gradients whose mean is a whole number, of all parameters but the bias of layer 1 on the last
 * rank, and layer 2's, which no rank has. */
static void train(hub_rank_t *rank, stack_t_ *s, float shift) {
  fsdp_engine_t *engine = s->engine;
  const int last = rank->rank == rank->world - 1;
  CHECK_OK(fsdp_engine_pre_forward(engine, 0));
  for (uint32_t l = 0; l < LAYERS; l++) {
    CHECK_OK(fsdp_engine_pre_forward(engine, l + 1));
    check_layer(s, l, l == 2 ? 0 : shift);
    CHECK_OK(fsdp_engine_post_forward(engine, l + 1));
  }
  CHECK_OK(fsdp_engine_post_forward(engine, 0));
  CHECK_OK(fsdp_engine_pre_backward(engine, 0));
  for (uint32_t l = LAYERS; l-- > 0;) {
    CHECK_OK(fsdp_engine_pre_backward(engine, l + 1));
    check_layer(s, l, l == 2 ? 0 : shift);
    if (l != 2) {
      give(s, 2 * l, (float)(rank->world * (rank->rank == 0)));
      if (l == 0 || !last)
        give(s, 2 * l + 1, l == 0 ? 1.0f : (float)rank->world / (float)(rank->world - 1));
    }
    CHECK_OK(fsdp_engine_post_backward(engine, l + 1));
  }
  CHECK_OK(fsdp_engine_post_backward(engine, 0));
  for (uint32_t p = 0; p < 2 * LAYERS; p++) {
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_shard(engine, p, &shard));
    CHECK_EQ(shard.grad != NULL, p / 2 != 2);
    for (int64_t i = 0; shard.grad != NULL && i < shard.numel; i++) {
      CHECK(shard.grad[i] > 0.99999f && shard.grad[i] < 1.00001f);
      shard.data[i] += 1.0f;
    }
  }
  CHECK_OK(fsdp_engine_zero_grad(engine));
}

static void values_and_means(hub_rank_t *rank) {
  for (int bfloat16 = 0; bfloat16 < 2; bfloat16++) {
    stack_t_ s = stack_new(rank, 301, bfloat16);
    for (int step = 0; step < 3; step++) train(rank, &s, (float)step);
    const fsdp_stats_t stats = stats_of(s.engine);
    CHECK_EQ(stats.reduce_scatters, 3 * LAYERS);
    CHECK_EQ(stats.overflow_peak, 0);
    stack_free(&s);
  }
}

/* Issued ahead, in the order of a trace. */
static void prefetched(hub_rank_t *rank) {
  stack_t_ s = stack_new(rank, 301, 0);
  fsdp_trace_t *trace = NULL;
  CHECK_OK(fsdp_trace_create(s.model, &trace));
  CHECK_OK(fsdp_trace_enter(trace, 0));
  for (uint32_t l = 0; l < LAYERS; l++) {
    const uint32_t params[2] = {2 * l, 2 * l + 1};
    CHECK_OK(fsdp_trace_enter(trace, l + 1));
    CHECK_OK(fsdp_trace_use(trace, params, 2));
    CHECK_OK(fsdp_trace_leave(trace, l + 1));
  }
  CHECK_OK(fsdp_trace_leave(trace, 0));
  CHECK_OK(fsdp_engine_set_prefetch_order(s.engine, trace));
  fsdp_trace_destroy(trace);
  for (int step = 0; step < 3; step++) train(rank, &s, (float)step);
  CHECK(stats_of(s.engine).prefetches >= 3);
  stack_free(&s);
}

/* A rank that never touches a unit in its backward, and reduces it not at all, takes part without
 * gradients. */
static void reduced_by_some(hub_rank_t *rank) {
  stack_t_ s = stack_new(rank, 40, 0);
  for (int step = 0; step < 2; step++) {
    for (uint32_t u = 1; u <= LAYERS; u++) {
      void *buffer = NULL;
      CHECK_OK(fsdp_engine_unshard(s.engine, u, &buffer));
    }
    for (uint32_t l = 0; l < LAYERS; l++) {
      if (l == 0 || rank->rank == 1) give(&s, 2 * l, (float)rank->world);
    }
    CHECK_OK(fsdp_engine_finish_backward(s.engine));
    for (uint32_t p = 0; p < 2 * LAYERS; p++) {
      fsdp_shard_t shard;
      CHECK_OK(fsdp_engine_shard(s.engine, p, &shard));
      CHECK_EQ(shard.grad != NULL, p % 2 == 0);
      for (int64_t i = 0; shard.grad != NULL && i < shard.numel; i++)
        CHECK(shard.grad[i] == (p == 0 ? (float)rank->world : 1.0f));
    }
    CHECK_OK(fsdp_engine_zero_grad(s.engine));
  }
  stack_free(&s);
}

/* Pages of `bytes` from `start` that are in memory; both are rounded to whole pages inside. */
static size_t resident(const void *start, size_t bytes) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE);
  const uintptr_t first = ((uintptr_t)start + page - 1) / page * page,
                  end = ((uintptr_t)start + bytes) / page * page;
  static __thread unsigned char pages[4096];
  size_t count = 0;
  CHECK((end - first) / page <= sizeof pages);
  CHECK_EQ(mincore((void *)first, end - first, pages), 0);
  for (size_t i = 0; i < (end - first) / page; i++) count += pages[i] & 1;
  return count;
}

/* A resharded unit takes the memory of this rank's shard; an unsharded one all of it. */
static void memory(hub_rank_t *rank) {
  stack_t_ s = stack_new(rank, LONGEST, 0);
  fsdp_unit_info_t info;
  memset(&info, 0, sizeof info);
  info.struct_size = sizeof info;
  CHECK_OK(fsdp_engine_unit_info(s.engine, 2, &info));
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (size_t)info.unit_bytes / page;
  for (int pass = 0; pass < 2; pass++) {
    void *buffer = NULL;
    CHECK_OK(fsdp_engine_unshard(s.engine, 2, &buffer));
    CHECK(resident(buffer, (size_t)info.unit_bytes) + 2 >= whole);
    check_layer(&s, 1, 0);
    CHECK_OK(fsdp_engine_reshard(s.engine, 2));
    const size_t kept = resident(buffer, (size_t)info.unit_bytes);
    CHECK(kept + 2 >= whole / (size_t)rank->world && kept <= whole / (size_t)rank->world + 3);
    if (pass == 1) CHECK_OK(fsdp_engine_finish_forward(s.engine));
  }
  stack_free(&s);
}

/* Independent parts, one after the other and beside the whole. */
static void parts(hub_rank_t *rank) {
  fsdp_comm_t *part = NULL;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  int32_t number = 0;
  (void)config;
  CHECK_OK(fsdp_comm_split(rank->comm, rank->rank % 2, -rank->rank, &part));
  float value = (float)rank->rank;
  int64_t one = 1;
  fsdp_tensor_t t = tensor_f32(&value, 1, &one);
  CHECK_OK(fsdp_comm_world_size(part, &number));
  CHECK_EQ(number, (rank->world + 1 - rank->rank % 2) / 2);
  CHECK_OK(fsdp_comm_broadcast(part, &t, 0)); /* the highest: keys are negative */
  CHECK(value >= (float)rank->rank && (int)value % 2 == rank->rank % 2);
  CHECK_OK(fsdp_comm_barrier(rank->comm));
  fsdp_comm_destroy(part);
}

int main(void) {
  const hub_kind_t kinds[] = {{0, 0, 0, 0, 0}, {1, 0, 0, 0, 0}, {0, 1, 1, 1, 0}, {1, 0, 1, 1, 1}};
  for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
    for (int world = 2; world <= 4; world++) {
      char text[64];
      snprintf(text, sizeof text, "kind %d, %d ranks", (int)k, world);
      test_context(text);
      hub_run(world, kinds[k], 60000, 0, values_and_means);
      hub_run(world, kinds[k], 60000, 0, prefetched);
      hub_run(world, kinds[k], 60000, 0, reduced_by_some);
      if (!kinds[k].no_split) hub_run(world, kinds[k], 60000, 0, parts);
    }
    test_context("memory");
    hub_run(2, kinds[k], 60000, 0, memory);
  }
  return 0;
}
