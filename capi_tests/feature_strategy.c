/* Strategies and gradient accumulation: each equals a data-parallel reference bit for bit at every
 * step, and costs the collectives that it must. Any world size up to 8; groups where they divide
 * it. */
#include "ranks.h"
#include "train.h"

#include <math.h>

/* What the backwards of a step do before its last one. */
typedef enum {
  IN_SHARDS,     /* reduce, and add to the gradient shards */
  OPEN,          /* the same without ending the iteration */
  UNSHARDED,     /* reduce nothing: no_sync */
  UNSHARDED_OPEN,
  IN_GROUPS      /* reduce within the shard group only */
} accumulation_t;

typedef struct {
  const char *name;
  net_t net;
  train_wrap_t wrap;
  int32_t strategy;
  uint32_t shard_size;
  accumulation_t accumulation;
  int backwards;
  /* For every unit, or FSDP_RESHARD_DEFAULT. */
  int32_t reshard_after_forward;
  uint32_t slots;
  /* A parameter is used on the last rank only, and there in the last backward only. */
  int rarely_used;
  /* A forward without backward between the backwards of a step. */
  int evaluate;
  int cpu_offload;
} scenario_t;

static void set_up_backward(const scenario_t *scenario, fsdp_engine_t *engine, int last) {
  const accumulation_t how = scenario->accumulation;
  const int unsharded = how == UNSHARDED || how == UNSHARDED_OPEN;
  const int open = how == OPEN || how == UNSHARDED_OPEN;
  CHECK_OK(fsdp_engine_set_requires_gradient_sync(engine, last || !unsharded));
  CHECK_OK(fsdp_engine_set_is_last_backward(engine, last || !open));
  CHECK_OK(fsdp_engine_set_requires_all_reduce(engine, last || how != IN_GROUPS));
}

static void reduce_reference(const scenario_t *scenario, reference_t *reference, int last) {
  switch (scenario->accumulation) {
    case UNSHARDED:
    case UNSHARDED_OPEN:
      if (last) reference_reduce(reference);
      break;
    case IN_GROUPS:
    case OPEN:
      reference_reduce_in_groups(reference);
      if (last) reference_average(reference);
      break;
    default: reference_reduce(reference);
  }
}

static void run(const scenario_t *scenario, const job_t *job) {
  enum { STEPS = 3, BATCH = 2 };
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  test_context(scenario->name);
  config.strategy = scenario->strategy;
  config.shard_size = scenario->shard_size;
  config.gradient_slots = scenario->slots;
  config.cpu_offload = scenario->cpu_offload;
  sharded_t *sharded = sharded_create(&scenario->net, job->comm, scenario->wrap, &config);
  reference_t *reference = reference_create(&scenario->net, job->world);
  fsdp_engine_t *engine = sharded->engine;
  uint32_t units = 0;
  if (scenario->shard_size != 0) reference->group = (int)scenario->shard_size;
  if (scenario->strategy == FSDP_NO_SHARD) reference->group = 1;
  CHECK_OK(fsdp_engine_unit_count(engine, &units));
  for (uint32_t u = 0; u < units; u++)
    CHECK_OK(fsdp_engine_set_reshard_after_forward(engine, u, scenario->reshard_after_forward));
  for (int step = 1; step <= STEPS; step++) {
    CHECK_OK(fsdp_engine_zero_grad(engine));
    reference_zero_grad(reference);
    for (int b = 0; b < scenario->backwards; b++) {
      const int last = b == scenario->backwards - 1, input = step * 10 + b;
      const fsdp_stats_t before = stats_of(engine);
      set_up_backward(scenario, engine, last);
      for (int r = 0; r < job->world; r++) {
        const int uses = !scenario->rarely_used || (last && r == job->world - 1);
        const unsigned flags = uses ? NET_BONUS : 0;
        if (r == job->rank) sharded_backward(sharded, input, BATCH, flags);
        reference_backward(reference, r, input, BATCH, flags);
      }
      reduce_reference(scenario, reference, last);
      const fsdp_stats_t after = stats_of(engine);
      if (scenario->accumulation == UNSHARDED && !last) {
        CHECK_EQ(after.reduce_scatters, before.reduce_scatters);
        CHECK_EQ(after.all_reduces, before.all_reduces);
      }
      if (scenario->accumulation == IN_GROUPS && !last)
        CHECK_EQ(after.all_reduces, before.all_reduces);
      if (last || scenario->accumulation == IN_SHARDS)
        sharded_check_shards(sharded, reference, scenario->name, step);
      if (scenario->evaluate && !last) {
        CHECK_OK(fsdp_engine_set_grad_enabled(engine, 0));
        sharded_forward(sharded, 1000 + step, BATCH, NET_BONUS);
        CHECK_OK(fsdp_engine_set_grad_enabled(engine, 1));
      }
    }
    sharded_adam(sharded, step);
    reference_adam(reference, step);
    sharded_check_shards(sharded, reference, scenario->name, step);
  }
  sharded_check_full(sharded, reference, scenario->name);
  reference_destroy(reference);
  sharded_destroy(sharded);
}

/* k micro-batches give the mean gradient that one large batch of their samples gives, up to
 * rounding. */
static void large_batch(const job_t *job, int32_t unsharded) {
  enum { SAMPLES = 6, MICRO_BATCHES = 3 };
  static float grads[2][NET_PARAMS][NET_MAX_NUMEL];
  const net_t net = {7, 13};
  test_context(unsharded ? "large batch, no_sync" : "large batch, in shards");
  for (int micro = 0; micro < 2; micro++) {
    sharded_t *sharded = sharded_create(&net, job->comm, WRAP_SOME, NULL);
    const int backwards = micro ? MICRO_BATCHES : 1, batch = SAMPLES / backwards;
    for (int b = 0; b < backwards; b++) {
      const int sync = !unsharded || b == backwards - 1;
      CHECK_OK(fsdp_engine_set_requires_gradient_sync(sharded->engine, sync));
      net_skip_samples(b * batch);
      sharded_backward(sharded, 1, batch, NET_BONUS);
    }
    net_skip_samples(0);
    for (uint32_t p = 0; p < NET_PARAMS; p++) {
      fsdp_shard_t shard;
      CHECK_OK(fsdp_engine_shard(sharded->engine, p, &shard));
      for (int64_t i = 0; shard.grad != NULL && i < shard.numel; i++)
        grads[micro][p][i] = shard.grad[i] / (float)backwards;
    }
    sharded_destroy(sharded);
  }
  float largest = 0;
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    for (int64_t i = 0; i < NET_MAX_NUMEL; i++) {
      const float value = fabsf(grads[0][p][i]), error = fabsf(grads[1][p][i] - grads[0][p][i]);
      CHECK(error <= 1e-6f + 1e-5f * value);
      if (value > largest) largest = value;
    }
  }
  CHECK(largest > 1e-3f);
}

enum { LAYERS = 3, WIDTH = 40 };

/* One step of a stack of equal layers, as a host with hooks runs it. */
static void step_of(fsdp_engine_t *engine, float grad) {
  CHECK_OK(fsdp_engine_pre_forward(engine, 0));
  for (uint32_t l = 0; l < LAYERS; l++) {
    CHECK_OK(fsdp_engine_pre_forward(engine, l + 1));
    CHECK_OK(fsdp_engine_post_forward(engine, l + 1));
  }
  CHECK_OK(fsdp_engine_post_forward(engine, 0));
  CHECK_OK(fsdp_engine_pre_backward(engine, 0));
  for (uint32_t l = LAYERS; l-- > 0;) {
    CHECK_OK(fsdp_engine_pre_backward(engine, l + 1));
    CHECK_OK(stack_add_grad(engine, l, grad));
    CHECK_OK(fsdp_engine_post_backward(engine, l + 1));
  }
  CHECK_OK(fsdp_engine_post_backward(engine, 0));
}

/* What a step of a stack costs: layers are gathered `gathers` times, each filling `bytes`, of which
 * `sent` would be sent. The root has no elements. */
static void costs(const job_t *job, int32_t strategy, uint32_t shard_size, int32_t reshard,
                  uint64_t gathers, uint32_t forward_ranks, uint32_t backward_ranks,
                  uint32_t replicas) {
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_engine_t *engine = NULL;
  fsdp_model_t *model = stack_model(LAYERS, WIDTH, 1);
  fsdp_unit_info_t info = unit_info_init();
  char text[80];
  snprintf(text, sizeof text, "costs of strategy %d, groups of %u, resharding %d", (int)strategy,
           (unsigned)shard_size, (int)reshard);
  test_context(text);
  config.strategy = strategy;
  config.shard_size = shard_size;
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &engine));
  fsdp_model_destroy(model);
  for (uint32_t u = 1; u <= LAYERS; u++)
    CHECK_OK(fsdp_engine_set_reshard_after_forward(engine, u, reshard));
  CHECK_OK(fsdp_engine_unit_info(engine, 1, &info));
  const uint64_t bytes = info.unit_bytes;
  const uint64_t sent = bytes - bytes / forward_ranks +
                        (gathers == 2 ? bytes - bytes / backward_ranks : 0);
  for (uint64_t step = 1; step <= 2; step++) {
    step_of(engine, (float)(job->rank + 1));
    const fsdp_stats_t stats = stats_of(engine);
    CHECK_EQ(stats.all_gathers, step * LAYERS * gathers);
    CHECK_EQ(stats.all_gather_bytes, step * LAYERS * gathers * bytes);
    CHECK_EQ(stats.all_gather_sent_bytes, step * LAYERS * sent);
    CHECK_EQ(stats.reduce_scatters, step * LAYERS);
    CHECK_EQ(stats.reduce_scatter_bytes, step * LAYERS * bytes);
    int64_t pieces = 0;
    for (uint32_t l = 0; l < LAYERS; l++) {
      fsdp_shard_t shard;
      CHECK_OK(fsdp_engine_shard(engine, l, &shard));
      pieces += shard.numel;
      for (int64_t i = 0; i < shard.numel; i++)
        CHECK(shard.grad[i] == (float)step * (float)(job->world + 1) / 2);
    }
    CHECK_EQ(stats.all_reduces, replicas > 1 && pieces > 0 ? step * LAYERS : 0);
    CHECK_EQ(stats.all_reduce_bytes, replicas > 1 ? step * sizeof(float) * (uint64_t)pieces : 0);
  }
  fsdp_engine_destroy(engine);
}

static void all_costs(const job_t *job) {
  const uint32_t world = (uint32_t)job->world;
  costs(job, FSDP_FULL_SHARD, 0, FSDP_RESHARD_DEFAULT, 2, world, world, 1);
  costs(job, FSDP_FULL_SHARD, 0, FSDP_RESHARD_NEVER, 1, world, world, 1);
  costs(job, FSDP_SHARD_GRAD_OP, 0, FSDP_RESHARD_DEFAULT, 1, world, world, 1);
  costs(job, FSDP_SHARD_GRAD_OP, 0, FSDP_RESHARD_ALWAYS, 2, world, world, 1);
  costs(job, FSDP_NO_SHARD, 0, FSDP_RESHARD_DEFAULT, 1, 1, 1, world);
  costs(job, FSDP_FULL_SHARD, 0, (int32_t)world, 2, world, world, 1);
  if (world % 2 != 0) return;
  costs(job, FSDP_FULL_SHARD, 0, 2, 2, world, 2, 1);
  costs(job, FSDP_HYBRID_SHARD, 2, FSDP_RESHARD_DEFAULT, 2, 2, 2, world / 2);
  costs(job, FSDP_HYBRID_SHARD_GRAD_OP, 2, FSDP_RESHARD_DEFAULT, 1, 2, 2, world / 2);
}

/* Choices that ranks make differently, or that cannot be. */
static void mistakes(const job_t *job) {
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_engine_t *engine = NULL;
  fsdp_model_t *model = stack_model(2, 8, 1);
  test_context("mistakes");
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  config.shard_size = 2;
  CHECK_ERR(fsdp_engine_create(model, job->comm, &config, &engine), FSDP_ERR_INVALID_ARGUMENT,
            "strategy FULL_SHARD has none");
  config.strategy = FSDP_HYBRID_SHARD;
  config.shard_size = (uint32_t)job->world + 1;
  CHECK_ERR(fsdp_engine_create(model, job->comm, &config, &engine), FSDP_ERR_INVALID_ARGUMENT,
            "needs a divisor of the world size");
  config.strategy = job->rank == 0 ? FSDP_NO_SHARD : FSDP_SHARD_GRAD_OP;
  config.shard_size = 0;
  if (job->world > 1) {
    CHECK_ERR(fsdp_engine_create(model, job->comm, &config, &engine), FSDP_ERR_MISMATCH,
              "strategy = NO_SHARD");
  }
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine));
  fsdp_model_destroy(model);
  CHECK_ERR(fsdp_engine_set_reshard_after_forward(engine, 1, job->world + 1),
            FSDP_ERR_INVALID_ARGUMENT, "layer0");
  CHECK_ERR(fsdp_engine_set_reshard_after_forward(engine, 1, -2), FSDP_ERR_INVALID_ARGUMENT,
            "reshard_after_forward cannot be -2");
  CHECK_ERR(fsdp_engine_set_reshard_after_forward(engine, 7, 0), FSDP_ERR_INVALID_ARGUMENT,
            "unit 7 does not exist");
  CHECK_OK(fsdp_engine_pre_forward(engine, 0));
  CHECK_ERR(fsdp_engine_set_reshard_after_forward(engine, 0, 0), FSDP_ERR_INVALID_STATE,
            "in an iteration");
  CHECK_OK(fsdp_engine_finish_forward(engine));
  if (job->world > 1) {
    CHECK_ERR(fsdp_engine_set_reshard_after_forward(engine, 1, job->rank == 0), FSDP_ERR_MISMATCH,
              "layer0");
  }
  /* A rank that reduces beside one that does not. */
  CHECK_OK(fsdp_engine_set_requires_gradient_sync(engine, job->rank == 0));
  const fsdp_status_t status = fsdp_engine_finish_backward(engine);
  CHECK_EQ(status, job->world > 1 ? FSDP_ERR_MISMATCH : FSDP_OK);
  fsdp_engine_destroy(engine);
}

int main(void) {
  static const int32_t full = FSDP_FULL_SHARD, zero2 = FSDP_SHARD_GRAD_OP, no = FSDP_NO_SHARD,
                       hybrid = FSDP_HYBRID_SHARD, hybrid2 = FSDP_HYBRID_SHARD_GRAD_OP;
  const int32_t usual = FSDP_RESHARD_DEFAULT;
  const scenario_t scenarios[] = {
      {"NO_SHARD", {7, 13}, WRAP_SOME, no, 0, IN_SHARDS, 1, usual, 0, 0, 0, 0},
      {"NO_SHARD, twice", {7, 13}, WRAP_ALWAYS, no, 0, IN_SHARDS, 2, usual, 0, 1, 1, 0},
      {"NO_SHARD, no_sync", {7, 13}, WRAP_ALWAYS, no, 0, UNSHARDED, 3, usual, 0, 1, 0, 0},
      {"NO_SHARD, open, averaged once", {7, 13}, WRAP_SOME, no, 0, OPEN, 3, usual, 0, 1, 0, 0},
      {"NO_SHARD, averaged once", {7, 13}, WRAP_SOME, no, 0, IN_GROUPS, 3, usual, 0, 1, 0, 0},
      {"FULL_SHARD, no_sync", {7, 13}, WRAP_SOME, full, 0, UNSHARDED, 3, usual, 0, 0, 0, 0},
      {"FULL_SHARD, no_sync, all units", {5, 9}, WRAP_ALWAYS, full, 0, UNSHARDED, 2, usual, 0, 1, 1, 0},
      {"FULL_SHARD, no_sync, one slot", {5, 9}, WRAP_ALWAYS, full, 0, UNSHARDED, 3, usual, 1, 0, 1, 0},
      {"FULL_SHARD, no_sync, open", {7, 13}, WRAP_SOME, full, 0, UNSHARDED_OPEN, 3, usual, 0, 1, 0, 0},
      {"FULL_SHARD, open", {7, 13}, WRAP_SOME, full, 0, OPEN, 3, usual, 0, 0, 0, 0},
      {"FULL_SHARD, open, one slot", {7, 13}, WRAP_ALWAYS, full, 0, OPEN, 4, usual, 1, 1, 0, 0},
      {"SHARD_GRAD_OP, open", {7, 13}, WRAP_SOME, zero2, 0, OPEN, 2, usual, 0, 0, 0, 0},
      {"SHARD_GRAD_OP, no_sync", {1, 1}, WRAP_ALWAYS, zero2, 0, UNSHARDED, 2, usual, 0, 0, 0, 0},
      {"never resharded", {7, 13}, WRAP_SOME, full, 0, IN_SHARDS, 2, FSDP_RESHARD_NEVER, 0, 0, 1, 0},
      {"always resharded", {7, 13}, WRAP_SOME, zero2, 0, IN_SHARDS, 1, FSDP_RESHARD_ALWAYS, 0, 0, 1, 0},
      {"resharded over two", {7, 13}, WRAP_SOME, full, 0, IN_SHARDS, 2, 2, 0, 0, 1, 0},
      {"resharded over two, open", {7, 13}, WRAP_ALWAYS, full, 0, OPEN, 3, 2, 0, 1, 0, 0},
      {"hybrid", {7, 13}, WRAP_SOME, hybrid, 2, IN_SHARDS, 1, usual, 0, 0, 0, 0},
      {"hybrid, rarely used", {7, 13}, WRAP_ALWAYS, hybrid, 2, IN_SHARDS, 2, usual, 0, 1, 1, 0},
      {"hybrid, no_sync", {7, 13}, WRAP_SOME, hybrid, 2, UNSHARDED, 2, usual, 0, 1, 0, 0},
      {"hybrid, in groups", {7, 13}, WRAP_SOME, hybrid, 2, IN_GROUPS, 3, usual, 0, 1, 0, 0},
      {"hybrid, open", {3, 61}, WRAP_ALWAYS, hybrid, 2, OPEN, 3, usual, 0, 1, 0, 0},
      {"hybrid grad op", {7, 13}, WRAP_SOME, hybrid2, 2, IN_SHARDS, 2, usual, 0, 0, 1, 0},
      {"hybrid of groups of one", {7, 13}, WRAP_SOME, hybrid, 1, IN_SHARDS, 2, usual, 0, 1, 0, 0},
      {"offloaded", {7, 13}, WRAP_SOME, full, 0, IN_SHARDS, 2, usual, 0, 1, 1, 1},
      {"offloaded, open", {5, 61}, WRAP_ALWAYS, full, 0, OPEN, 2, usual, 0, 0, 0, 1},
      {"offloaded, NO_SHARD", {7, 13}, WRAP_SOME, no, 0, UNSHARDED, 2, usual, 0, 1, 1, 1},
      {"offloaded, hybrid", {7, 13}, WRAP_SOME, hybrid, 2, IN_SHARDS, 2, usual, 0, 0, 1, 1}};
  const job_t job = join_job();
  for (size_t i = 0; i < sizeof scenarios / sizeof scenarios[0]; i++) {
    const int needs_two = scenarios[i].shard_size == 2 || scenarios[i].reshard_after_forward == 2;
    if (!needs_two || job.world % 2 == 0) run(&scenarios[i], &job);
  }
  large_batch(&job, 0);
  large_batch(&job, 1);
  all_costs(&job);
  mistakes(&job);
  fsdp_comm_destroy(job.comm);
  return 0;
}
