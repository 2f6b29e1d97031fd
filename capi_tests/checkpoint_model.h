/* A model whose values follow from a step's number, for the checkpoint programs: every element of
 * every parameter, state and buffer can be recomputed, so a loaded checkpoint can be checked alone.
 *
 *   (root)        scale []              unit 0
 *   embed         weight [13, 7]        (unit 0)
 *   block (unit)  weight [5, 3, 4], bias [11], none [0, 3]
 *
 * with a state "exp_avg" of each, and the buffers "block.mask" (bool [2, 3]), "block.half"
 * (float16 [4]) and "count" (int64 []).
 */
#ifndef FSDP_TEST_CHECKPOINT_MODEL_H
#define FSDP_TEST_CHECKPOINT_MODEL_H

#include "ranks.h"

enum { CKPT_PARAMS = 5, CKPT_BUFFERS = 3, CKPT_MAX = 91 };

static const char *const CKPT_NAMES[CKPT_PARAMS] = {"scale", "embed.weight", "block.weight",
                                                    "block.bias", "block.none"};
static int64_t CKPT_SHAPES[CKPT_PARAMS][3] = {{0}, {13, 7}, {5, 3, 4}, {11}, {0, 3}};
static const int32_t CKPT_NDIM[CKPT_PARAMS] = {0, 2, 3, 1, 2};

/* Element `i` of parameter `p` (its state: `p` + 10) after `step`: an exact float. */
static inline float ckpt_value(int64_t step, int p, int64_t i) {
  return (float)((step * 7919 + p * 104729 + i * 31) % 16777213);
}

typedef struct {
  fsdp_engine_t *engine;
  fsdp_shard_t shards[CKPT_PARAMS];
  int64_t first[CKPT_PARAMS];
  float state[CKPT_PARAMS][CKPT_MAX];
  uint8_t mask[6];
  uint16_t half[4];
  int64_t count;
  fsdp_state_t states[CKPT_PARAMS];
  fsdp_named_tensor_t tensors[CKPT_BUFFERS];
  int64_t shapes[2][2];
} ckpt_t;

static inline void ckpt_create(ckpt_t *c, fsdp_comm_t *comm) {
  static float zeros[CKPT_MAX];
  fsdp_model_t *model = NULL;
  uint32_t embed = 0, block = 0, param = 0;
  memset(c, 0, sizeof *c);
  CHECK_OK(fsdp_model_create("Net", &model));
  CHECK_OK(fsdp_model_add_module(model, 0, "embed", "Embedding", &embed));
  CHECK_OK(fsdp_model_add_module(model, 0, "block", "Block", &block));
  for (int p = 0; p < CKPT_PARAMS; p++) {
    const char *dot = strchr(CKPT_NAMES[p], '.');
    fsdp_tensor_t t = tensor_f32(zeros, CKPT_NDIM[p], CKPT_SHAPES[p]);
    const uint32_t module = dot == NULL ? 0 : CKPT_NAMES[p][0] == 'e' ? embed : block;
    CHECK_OK(fsdp_model_add_parameter(model, module, dot == NULL ? CKPT_NAMES[p] : dot + 1, &t, 1,
                                      &param));
  }
  CHECK_OK(fsdp_model_wrap_module(model, block));
  CHECK_OK(fsdp_engine_create(model, comm, NULL, &c->engine));
  fsdp_model_destroy(model);
  for (uint32_t p = 0; p < CKPT_PARAMS; p++) {
    fsdp_param_info_t info = param_info_init();
    CHECK_OK(fsdp_engine_param_info(c->engine, p, &info));
    CHECK_OK(fsdp_engine_shard(c->engine, p, &c->shards[p]));
    c->first[p] = info.shard_offset;
    c->states[p].param = p;
    c->states[p].name = "exp_avg";
    c->states[p].data = c->state[p];
  }
  c->shapes[0][0] = 2;
  c->shapes[0][1] = 3;
  c->shapes[1][0] = 4;
  c->tensors[0].name = "block.mask";
  c->tensors[0].tensor = tensor_of(c->mask, 2, c->shapes[0], FSDP_DTYPE_BOOL, 8);
  c->tensors[1].name = "block.half";
  c->tensors[1].tensor = tensor_of(c->half, 1, c->shapes[1], FSDP_DTYPE_FLOAT, 16);
  c->tensors[2].name = "count";
  c->tensors[2].tensor = tensor_of(&c->count, 0, NULL, FSDP_DTYPE_INT, 64);
}

/* Gives everything its values after `step`; whole tensors are right on rank 0 only. */
static inline void ckpt_fill(ckpt_t *c, int64_t step, int rank) {
  CHECK_OK(fsdp_engine_begin_write(c->engine));
  for (int p = 0; p < CKPT_PARAMS; p++) {
    for (int64_t i = 0; i < c->shards[p].numel; i++) {
      c->shards[p].data[i] = ckpt_value(step, p, c->first[p] + i);
      c->state[p][i] = ckpt_value(step, p + 10, c->first[p] + i);
    }
  }
  for (int i = 0; i < 6; i++) c->mask[i] = (uint8_t)((step + i + rank) % 2);
  for (int i = 0; i < 4; i++) c->half[i] = (uint16_t)(0x3c00 + i + rank); /* 1, 1.001, ... */
  c->count = step + 1000 * rank;
}

/* Everything has its values after `step`; `states`: the states, too. */
static inline void ckpt_check(const ckpt_t *c, int64_t step, int states) {
  for (int p = 0; p < CKPT_PARAMS; p++) {
    for (int64_t i = 0; i < c->shards[p].numel; i++) {
      if (c->shards[p].data[i] != ckpt_value(step, p, c->first[p] + i) ||
          (states && c->state[p][i] != ckpt_value(step, p + 10, c->first[p] + i)))
        test_fail(__FILE__, __LINE__, "%s [%lld] is %g, its state %g: not those of step %lld",
                  CKPT_NAMES[p], (long long)(c->first[p] + i), (double)c->shards[p].data[i],
                  (double)c->state[p][i], (long long)step);
    }
  }
  for (int i = 0; i < 6; i++) CHECK_EQ(c->mask[i], (step + i) % 2);
  for (int i = 0; i < 4; i++) CHECK_EQ(c->half[i], 0x3c00 + i);
  CHECK_EQ(c->count, step);
}

/* All of it as contents; `c` must live as long as they. */
static inline fsdp_checkpoint_contents_t ckpt_contents(const ckpt_t *c, int states) {
  fsdp_checkpoint_contents_t contents = FSDP_CHECKPOINT_CONTENTS_INIT;
  contents.states = c->states;
  contents.state_count = states ? CKPT_PARAMS : 0;
  contents.tensors = c->tensors;
  contents.tensor_count = CKPT_BUFFERS;
  return contents;
}

#endif
