/* Sharded training equals data-parallel training bit for bit at every step: parameters, gradients
 * and losses, for odd sizes, every way of wrapping, tied, frozen, unused and shared parameters,
 * gradient accumulation, one gradient slot, and forwards without backward in between. Any world
 * size up to 8. */
#include "ranks.h"
#include "train.h"

#include <math.h>

typedef enum { BONUS_NEVER, BONUS_ALWAYS, BONUS_ON_LAST_RANK, BONUS_EVERY_SECOND_STEP } bonus_t;

typedef struct {
  const char *name;
  net_t net;
  train_wrap_t wrap;
  uint32_t slots;
  /* Backwards before each optimizer step, without zero_grad between them. */
  int backwards;
  bonus_t bonus;
  /* A forward without backward after each step. */
  int evaluate;
} scenario_t;

static unsigned flags_of(bonus_t bonus, int rank, int world, int step) {
  switch (bonus) {
    case BONUS_ALWAYS: return NET_BONUS;
    case BONUS_ON_LAST_RANK: return rank == world - 1 ? NET_BONUS : 0;
    case BONUS_EVERY_SECOND_STEP: return step % 2 == 0 ? NET_BONUS : 0;
    default: return 0;
  }
}

/* Mean over the ranks, as the library computes it and as the reference does. */
static void check_loss(const sharded_t *sharded, float loss, const float *losses, const char *what,
                       int step) {
  int64_t one = 1;
  float sum = losses[0];
  fsdp_tensor_t t = tensor_f32(&loss, 1, &one);
  CHECK_OK(fsdp_comm_all_reduce(sharded->comm, &t, FSDP_REDUCE_AVG));
  for (int r = 1; r < sharded->world; r++) sum += losses[r];
  if (fabsf(loss - sum / (float)sharded->world) > sharded_tolerance()) {
    test_fail(__FILE__, __LINE__, "%s, step %d: loss %.9g, not %.9g", what, step, (double)loss,
              (double)(sum / (float)sharded->world));
  }
}

static void run(const scenario_t *scenario, fsdp_comm_t *comm) {
  enum { STEPS = 4, BATCH = 3 };
  test_context(scenario->name);
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  config.gradient_slots = scenario->slots;
  sharded_t *sharded = sharded_create(&scenario->net, comm, scenario->wrap, &config);
  reference_t *reference = reference_create(&scenario->net, sharded->world);
  const int world = sharded->world;
  float losses[TRAIN_MAX_WORLD];
  sharded_check_full(sharded, reference, scenario->name);
  for (int step = 1; step <= STEPS; step++) {
    CHECK_OK(fsdp_engine_zero_grad(sharded->engine));
    reference_zero_grad(reference);
    for (int b = 0; b < scenario->backwards; b++) {
      const int input = step * 10 + b;
      const unsigned flags = flags_of(scenario->bonus, sharded->rank, world, step);
      const float loss = sharded_backward(sharded, input, BATCH, flags);
      for (int r = 0; r < world; r++) {
        losses[r] = reference_backward(reference, r, input, BATCH,
                                       flags_of(scenario->bonus, r, world, step));
      }
      reference_reduce(reference);
      check_loss(sharded, loss, losses, scenario->name, step);
      sharded_check_shards(sharded, reference, scenario->name, step);
    }
    sharded_adam(sharded, step);
    reference_adam(reference, step);
    sharded_check_shards(sharded, reference, scenario->name, step);
    if (scenario->evaluate) {
      CHECK_OK(fsdp_engine_set_grad_enabled(sharded->engine, 0));
      const float loss = sharded_forward(sharded, 1000 + step, BATCH, NET_BONUS);
      CHECK_OK(fsdp_engine_set_grad_enabled(sharded->engine, 1));
      for (int r = 0; r < world; r++)
        losses[r] = reference_forward(reference, r, 1000 + step, BATCH, NET_BONUS);
      check_loss(sharded, loss, losses, scenario->name, step);
    }
  }
  sharded_check_full(sharded, reference, scenario->name);
  const fsdp_stats_t stats = stats_of(sharded->engine);
  CHECK_EQ(stats.all_gather_bytes_moved, 0);
  if (scenario->slots == 1 && scenario->wrap != WRAP_NOTHING) CHECK(stats.overflow_peak >= 1);
  if (scenario->slots == 0) CHECK_EQ(stats.overflow_peak, 0);
  reference_destroy(reference);
  sharded_destroy(sharded);
}

int main(void) {
  static const scenario_t scenarios[] = {
      {"one unit", {7, 13}, WRAP_NOTHING, 0, 1, BONUS_NEVER, 0},
      {"every module a unit", {7, 13}, WRAP_ALWAYS, 0, 1, BONUS_ALWAYS, 0},
      {"nested units", {7, 13}, WRAP_SOME, 0, 1, BONUS_ALWAYS, 1},
      {"divisible", {16, 32}, WRAP_SOME, 0, 1, BONUS_ALWAYS, 0},
      {"one input, width two", {1, 2}, WRAP_ALWAYS, 0, 1, BONUS_ALWAYS, 0},
      {"all smaller than the world", {1, 1}, WRAP_ALWAYS, 0, 1, BONUS_ALWAYS, 1},
      {"wide", {5, 61}, WRAP_SOME, 0, 1, BONUS_ALWAYS, 0},
      {"unused on all ranks but one", {7, 13}, WRAP_SOME, 0, 1, BONUS_ON_LAST_RANK, 0},
      {"unused every second step", {7, 13}, WRAP_ALWAYS, 0, 1, BONUS_EVERY_SECOND_STEP, 1},
      {"two backwards", {7, 13}, WRAP_SOME, 0, 2, BONUS_ON_LAST_RANK, 0},
      {"three backwards, one slot", {3, 19}, WRAP_ALWAYS, 1, 3, BONUS_EVERY_SECOND_STEP, 1},
      {"one slot", {7, 13}, WRAP_SOME, 1, 1, BONUS_ALWAYS, 0},
      {"one slot, one unit", {7, 13}, WRAP_NOTHING, 1, 1, BONUS_ALWAYS, 0},
      {"two slots", {7, 13}, WRAP_ALWAYS, 2, 1, BONUS_ALWAYS, 0},
      {"more slots than units", {7, 13}, WRAP_SOME, 50, 2, BONUS_ALWAYS, 0},
      {"two slots, unused on all ranks but one", {7, 13}, WRAP_ALWAYS, 2, 1, BONUS_ON_LAST_RANK, 0},
      {"one slot, unused on all ranks but one", {7, 13}, WRAP_ALWAYS, 1, 2, BONUS_ON_LAST_RANK, 1}};
  const job_t job = join_job();
  for (size_t i = 0; i < sizeof scenarios / sizeof scenarios[0]; i++) run(&scenarios[i], job.comm);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
