/* What fsdp_plan foretells is what real engines measure, byte for byte: memory, and the collectives
 * of training steps through the hooks, for every way of wrapping, strategy, compute and reduce
 * dtype and number of slots. */
#include "net.h"
#include "ranks.h"

enum { STEPS = 2, OPTIMIZER_BYTES = 8 };
enum { NOTHING, ALWAYS, SOME, WRAPS };

static const uint32_t parents[NET_MODULES] = {0,         NET_ROOT, NET_ROOT, NET_BLOCK,
                                              NET_BLOCK, NET_ROOT, NET_ROOT, NET_ROOT};

typedef struct {
  fsdp_engine_t *engine;
  uint32_t units;
  /* Most bytes of unit buffers seen unsharded at once. */
  uint64_t unsharded_peak;
} run_t;

static fsdp_model_t *wrapped_model(const net_t *net, int wrap) {
  fsdp_model_t *model = net_model(net);
  if (wrap == ALWAYS) CHECK_OK(fsdp_model_wrap_always(model));
  if (wrap == SOME) {
    CHECK_OK(fsdp_model_wrap_module(model, NET_BLOCK));
    CHECK_OK(fsdp_model_wrap_class(model, "Linear"));
  }
  return model;
}

static fsdp_unit_info_t unit_info(const run_t *run, uint32_t unit) {
  fsdp_unit_info_t info = unit_info_init();
  CHECK_OK(fsdp_engine_unit_info(run->engine, unit, &info));
  return info;
}

static fsdp_param_info_t param_info(const run_t *run, uint32_t param) {
  fsdp_param_info_t info = param_info_init();
  CHECK_OK(fsdp_engine_param_info(run->engine, param, &info));
  return info;
}

/* Of a unit: what an all-gather fills. */
static uint64_t gathered_bytes(const run_t *run, const fsdp_unit_info_t *info) {
  uint64_t bytes = info->unit_bytes;
  for (uint32_t i = 0; i < info->param_count; i++) {
    const fsdp_param_info_t p = param_info(run, info->params[i]);
    if (p.dtype.bits == 16) bytes -= 2 * (uint64_t)p.numel;
  }
  return bytes;
}

static void count_unsharded(run_t *run) {
  uint64_t bytes = 0;
  for (uint32_t u = 0; u < run->units; u++) {
    const fsdp_unit_info_t info = unit_info(run, u);
    if (info.state == FSDP_UNIT_UNSHARDED) bytes += gathered_bytes(run, &info);
  }
  if (bytes > run->unsharded_peak) run->unsharded_peak = bytes;
}

/* A use of a module and of what is below it: forward, or backward with zero gradients for all that
 * its unit trains. */
static void visit(run_t *run, uint32_t module, int backward) {
  uint32_t unit = 0;
  CHECK_OK(fsdp_engine_unit_of_module(run->engine, module, &unit));
  const fsdp_unit_info_t info = unit_info(run, unit);
  const int is_unit = info.module == module;
  if (is_unit) {
    CHECK_OK(backward ? fsdp_engine_pre_backward(run->engine, unit)
                      : fsdp_engine_pre_forward(run->engine, unit));
    count_unsharded(run);
  }
  for (uint32_t i = 0; i < NET_MODULES; i++) {
    const uint32_t child = backward ? NET_MODULES - 1 - i : i;
    if (child != NET_ROOT && parents[child] == module) visit(run, child, backward);
  }
  if (!is_unit) return;
  for (uint32_t i = 0; backward && i < info.param_count; i++) {
    fsdp_tensor_t grad;
    int32_t accumulate = 0;
    const fsdp_param_info_t p = param_info(run, info.params[i]);
    if (!p.requires_grad) continue;
    CHECK_OK(fsdp_engine_param_grad(run->engine, info.params[i], &grad, &accumulate));
    if (p.numel > 0) memset(grad.data, 0, (size_t)p.numel * grad.dtype.bits / 8);
  }
  CHECK_OK(backward ? fsdp_engine_post_backward(run->engine, unit)
                    : fsdp_engine_post_forward(run->engine, unit));
}

/* The plan of each rank by the sizes of its pieces; sums and maxima by asking the ranks. */
static void check_ranks(const job_t *job, const run_t *run, fsdp_model_t *model,
                        fsdp_plan_request_t request, const fsdp_plan_t *mine,
                        const fsdp_plan_t *largest, uint64_t replicas) {
  const fsdp_stats_t stats = stats_of(run->engine);
  uint64_t elements = 0, trained = 0;
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    const fsdp_param_info_t info = param_info(run, p);
    elements += (uint64_t)info.shard_numel;
    if (info.requires_grad) trained += (uint64_t)info.shard_numel;
  }
  CHECK_EQ(mine->rank, job->rank);
  CHECK_EQ(mine->optimizer_bytes, OPTIMIZER_BYTES * trained);
  CHECK_EQ(mine->shard_padding_bytes, stats.param_shard_bytes - elements * sizeof(float));

  const uint64_t own = stats.grad_shard_bytes + stats.gradient_slot_bytes + stats.offloaded_bytes +
                       mine->optimizer_bytes;
  CHECK_EQ(mine->rank_peak_bytes, stats.param_shard_bytes + own);
  int64_t two = 2, sums[2], most[2];
  sums[0] = (int64_t)own;
  sums[1] = (int64_t)mine->shard_padding_bytes;
  most[0] = (int64_t)mine->rank_peak_bytes;
  most[1] = (int64_t)mine->optimizer_bytes;
  fsdp_tensor_t t = tensor_of(sums, 1, &two, FSDP_DTYPE_INT, 64);
  CHECK_OK(fsdp_comm_all_reduce(job->comm, &t, FSDP_REDUCE_SUM));
  t = tensor_of(most, 1, &two, FSDP_DTYPE_INT, 64);
  CHECK_OK(fsdp_comm_all_reduce(job->comm, &t, FSDP_REDUCE_MAX));
  CHECK_EQ(mine->host_peak_bytes,
           replicas * (stats.unit_buffer_bytes + stats.compute_buffer_bytes) + (uint64_t)sums[0]);
  CHECK_EQ(replicas * mine->padding_bytes, sums[1]);
  CHECK_EQ(largest->rank_peak_bytes, most[0]);
  CHECK_EQ(largest->optimizer_bytes, most[1]);
  request.rank = (int32_t)largest->rank;
  fsdp_plan_t again = *largest;
  CHECK_OK(fsdp_plan(model, &request, &again));
  CHECK(memcmp(&again, largest, sizeof again) == 0);
}

static void check_units(const run_t *run, fsdp_model_t *model, const fsdp_plan_request_t *request,
                        const fsdp_plan_t *plan) {
  uint64_t all_gathers = 0, reduce_scatters = 0, reduced = 0, all_reduces = 0, averaged = 0;
  for (uint32_t u = 0; u < run->units; u++) {
    const fsdp_unit_info_t info = unit_info(run, u);
    fsdp_plan_unit_t unit;
    memset(&unit, 0, sizeof unit);
    unit.struct_size = sizeof unit;
    CHECK_OK(fsdp_plan_unit(model, request, u, &unit));
    CHECK_EQ(unit.module, info.module);
    CHECK_EQ(unit.param_count, info.param_count);
    CHECK_EQ(unit.unit_bytes, info.unit_bytes);
    CHECK_EQ(unit.shard_bytes, info.shard_bytes);
    CHECK_EQ(unit.padding_bytes, info.padding_bytes);
    CHECK_EQ(unit.numel * sizeof(float), info.unit_bytes - info.padding_bytes);
    all_gathers += unit.all_gathers;
    reduce_scatters += unit.reduce_scatters;
    reduced += unit.reduce_scatter_bytes;
    all_reduces += unit.all_reduces;
    averaged += unit.all_reduce_bytes;
  }
  CHECK_EQ(plan->unit_count, run->units);
  CHECK_EQ(plan->all_gathers, all_gathers);
  CHECK_EQ(plan->reduce_scatters, reduce_scatters);
  CHECK_EQ(plan->reduce_scatter_bytes, reduced);
  CHECK_EQ(plan->all_reduces, all_reduces);
  CHECK_EQ(plan->all_reduce_bytes, averaged);
}

/* Ranks of a shard group. */
static uint32_t group_size(const job_t *job, int32_t strategy, uint32_t shard_size) {
  if (strategy == FSDP_NO_SHARD) return 1;
  return shard_size == 0 ? (uint32_t)job->world : shard_size;
}

static void check_case(const job_t *job, const net_t *net, int wrap, int32_t strategy,
                       uint32_t shard_size, fsdp_dtype_t reduce_dtype, fsdp_dtype_t param_dtype,
                       uint32_t slots) {
  fsdp_plan_request_t request = FSDP_PLAN_REQUEST_INIT;
  request.world_size = (uint32_t)job->world;
  request.strategy = strategy;
  request.shard_size = shard_size;
  request.reduce_dtype = reduce_dtype;
  request.param_dtype = param_dtype;
  request.gradient_slots = slots;
  request.cpu_offload = slots == 1;
  /* On lent collectives it is as reduce_dtype says, which a plan does not know. */
  request.grads_in_param_dtype = slots > 0 && !has_lent_collectives();
  request.optimizer_bytes_per_element = OPTIMIZER_BYTES;
  fsdp_model_t *model = wrapped_model(net, wrap);
  const fsdp_dtype_t bf16 = {FSDP_DTYPE_BFLOAT, 16, 1}, f16 = {FSDP_DTYPE_FLOAT, 16, 1};
  if (slots == 1) CHECK_OK(fsdp_model_set_param_dtype(model, NET_FC_WEIGHT, f16));
  if (slots == 2) CHECK_OK(fsdp_model_set_unit_dtypes(model, NET_ROOT, bf16, f16));
  fsdp_plan_t largest, plan;
  memset(&largest, 0, sizeof largest);
  largest.struct_size = sizeof largest;
  plan = largest;
  CHECK_OK(fsdp_plan(model, &request, &largest));
  request.rank = job->rank;
  CHECK_OK(fsdp_plan(model, &request, &plan));

  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  config.strategy = strategy;
  config.shard_size = shard_size;
  config.reduce_dtype = reduce_dtype;
  config.param_dtype = param_dtype;
  config.gradient_slots = slots;
  config.cpu_offload = slots == 1;
  config.grads_in_param_dtype = request.grads_in_param_dtype;
  run_t run;
  memset(&run, 0, sizeof run);
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &run.engine));
  CHECK_OK(fsdp_engine_unit_count(run.engine, &run.units));
  for (uint64_t step = 1; step <= STEPS; step++) {
    visit(&run, NET_ROOT, 0);
    visit(&run, NET_ROOT, 1);
    const fsdp_stats_t stats = stats_of(run.engine);
    CHECK_EQ(stats.all_gathers, step * plan.all_gathers);
    CHECK_EQ(stats.reduce_scatters, step * plan.reduce_scatters);
    CHECK_EQ(stats.reduce_scatter_bytes, step * plan.reduce_scatter_bytes);
    CHECK_EQ(stats.all_gather_bytes, step * plan.all_gather_bytes);
    CHECK_EQ(stats.all_gather_sent_bytes, step * plan.all_gather_sent_bytes);
    CHECK_EQ(stats.all_reduces, step * plan.all_reduces);
    CHECK_EQ(stats.all_reduce_bytes, step * plan.all_reduce_bytes);
    CHECK_EQ(stats.all_gather_bytes_moved, step * plan.all_gather_bytes_moved);
    CHECK_EQ(stats.offloaded_bytes, plan.offloaded_bytes);
    CHECK_EQ(stats.offloaded_bytes > 0, slots == 1 && stats.param_shard_bytes > 0);
    if (slots == 0) CHECK_EQ(stats.overflow_peak, 0);
  }
  const fsdp_stats_t stats = stats_of(run.engine);
  CHECK_EQ(plan.param_shard_bytes, stats.param_shard_bytes);
  CHECK_EQ(plan.grad_shard_bytes, stats.grad_shard_bytes);
  CHECK_EQ(plan.gradient_slot_bytes, stats.gradient_slot_bytes);
  CHECK_EQ(plan.unit_buffer_bytes, stats.unit_buffer_bytes);
  CHECK_EQ(plan.padding_bytes, stats.padding_bytes);
  CHECK_EQ(plan.unsharded_peak_bytes, run.unsharded_peak);
  CHECK_EQ(plan.compute_buffer_bytes, stats.compute_buffer_bytes);
  /* What is sent is the other ranks' part of what is gathered and reduced. */
  const uint64_t world = group_size(job, strategy, shard_size),
                 replicas = (uint64_t)job->world / world;
  CHECK(plan.all_gather_sent_bytes * world >= plan.all_gather_bytes * (world - 1));
  CHECK(plan.all_gather_sent_bytes * world <=
        plan.all_gather_bytes * (world - 1) + plan.all_gathers * world);
  CHECK_EQ(plan.reduce_scatter_sent_bytes * world, plan.reduce_scatter_bytes * (world - 1));
  CHECK_EQ(plan.all_gather_messages, plan.all_gathers * (world - 1));
  CHECK_EQ(plan.reduce_scatter_messages, plan.reduce_scatters * (world - 1));
  CHECK_EQ(plan.all_reduce_messages, 2 * plan.all_reduces * (replicas - 1));
  CHECK_EQ(plan.all_reduces > 0, replicas > 1 && plan.all_reduce_bytes > 0);
  check_ranks(job, &run, model, request, &plan, &largest, replicas);
  check_units(&run, model, &request, &plan);
  fsdp_engine_destroy(run.engine);
  fsdp_model_destroy(model);
}

typedef struct {
  int32_t strategy;
  uint32_t shard_size;
} sharding_t;

int main(void) {
  static const sharding_t shardings[] = {
      {FSDP_FULL_SHARD, 0},   {FSDP_SHARD_GRAD_OP, 0}, {FSDP_NO_SHARD, 0},
      {FSDP_HYBRID_SHARD, 1}, {FSDP_HYBRID_SHARD, 2},  {FSDP_HYBRID_SHARD_GRAD_OP, 2}};
  static const net_t nets[] = {{1, 1}, {3, 5}, {17, 33}};
  static const fsdp_dtype_t dtypes[] = {
      {0, 0, 0}, {FSDP_DTYPE_FLOAT, 16, 1}, {FSDP_DTYPE_BFLOAT, 16, 1}};
  job_t job = join_job();
  for (int n = 0; n < 3; n++) {
    for (int wrap = NOTHING; wrap < WRAPS; wrap++) {
      for (int sharding = 0; sharding < 6; sharding++) {
        const sharding_t how = shardings[sharding];
        if (how.shard_size == 2 && job.world % 2 != 0) continue;
        for (uint32_t other = 0; other < (sharding < 2 ? 9 : 4); other++) {
          char text[80];
          snprintf(text, sizeof text, "net %d, wrapping %d, sharding %d, dtypes and slots %u", n,
                   wrap, sharding, (unsigned)other);
          test_context(text);
          check_case(&job, &nets[n], wrap, how.strategy, how.shard_size, dtypes[other % 3],
                     dtypes[(other + other / 3) % 3], other / 3);
        }
      }
    }
  }
  fsdp_comm_destroy(job.comm);
  return 0;
}
