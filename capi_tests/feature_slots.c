/* Fewer gradient slots than units that collect gradients at once: the rest collects in private
 * memory, counted by the statistics, and the means are the same, whichever units a rank found a
 * slot for. */
#include "ranks.h"

enum { LAYERS = 4, WIDTH = 333, ROUNDS = 5 };

static fsdp_engine_t *create(const job_t *job, uint32_t slots) {
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_engine_t *engine = NULL;
  fsdp_model_t *model = stack_model(LAYERS, WIDTH, 1);
  config.gradient_slots = slots;
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &engine));
  fsdp_model_destroy(model);
  return engine;
}

static uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }

/* All layers collect at once, opened in an order that depends on the rank, then are reduced in one
 * order on all. */
static void all_at_once(const job_t *job, uint32_t slots, int own_order, int by_finish) {
  fsdp_engine_t *engine = create(job, slots);
  for (int round = 0; round < ROUNDS; round++) {
    const uint32_t first = own_order ? (uint32_t)(job->rank + round) % LAYERS : 0;
    CHECK_OK(fsdp_engine_zero_grad(engine));
    CHECK_OK(fsdp_engine_pre_forward(engine, 0));
    for (uint32_t i = 0; i < LAYERS; i++) {
      const uint32_t layer = (first + i) % LAYERS;
      CHECK_OK(stack_add_grad(engine, layer, (float)((job->rank + 1) * (int)(layer + 1))));
    }
    for (uint32_t l = 0; l < LAYERS && !by_finish; l++) {
      if (job->rank == round % job->world) sleep_ms(3);
      CHECK_OK(fsdp_engine_reduce(engine, l + 1));
    }
    CHECK_OK(fsdp_engine_finish_backward(engine));
    for (uint32_t l = 0; l < LAYERS; l++) {
      fsdp_shard_t shard;
      CHECK_OK(fsdp_engine_shard(engine, l, &shard));
      CHECK(shard.grad != NULL);
      const float sum = (float)(job->world * (job->world + 1) / 2 * (int)(l + 1));
      for (int64_t i = 0; i < shard.numel; i++) CHECK(shard.grad[i] == sum / (float)job->world);
      if (shard.numel > 0) shard.data[0] += 1;
    }
    const fsdp_stats_t stats = stats_of(engine);
    CHECK_EQ(stats.reduce_scatters, (uint64_t)LAYERS * (uint64_t)(round + 1));
    CHECK(stats.overflow_peak >= LAYERS - min(slots, LAYERS));
    if (slots >= LAYERS) CHECK_EQ(stats.overflow_peak, 0);
    CHECK(stats.slots_peak >= 1 && stats.slots_peak <= LAYERS);
  }
  fsdp_engine_destroy(engine);
}

int main(void) {
  const job_t job = join_job();
  for (uint32_t slots = 1; slots <= LAYERS + 1; slots++) {
    char text[64];
    for (int by_finish = 0; by_finish < 2; by_finish++) {
      snprintf(text, sizeof text, "%u slots, same order", (unsigned)slots);
      test_context(text);
      all_at_once(&job, slots, 0, by_finish);
    }
  }
  for (uint32_t slots = 1; slots <= LAYERS + 1; slots++) {
    char text[64];
    for (int by_finish = 0; by_finish < 2; by_finish++) {
      snprintf(text, sizeof text, "%u slots, own order, %s", (unsigned)slots,
               by_finish ? "finish" : "reduce");
      test_context(text);
      all_at_once(&job, slots, 1, by_finish);
    }
  }
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
