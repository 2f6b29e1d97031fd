/* Norms of gradients over all shards, and clipping to them: of the unsharded gradients of a
 * data-parallel reference, for every order; the same bits on every rank; norms that are not finite.
 * Any world size up to 8. */
#include "ranks.h"
#include "train.h"

#include <math.h>

enum { BATCH = 3 };

static const double ORDERS[] = {2, 1, INFINITY, 0, 0.5, 3, 4.5};
enum { ORDER_COUNT = sizeof ORDERS / sizeof ORDERS[0] };

/* The definition, element by element. */
static double plain_norm(const double *x, int64_t n, double p) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const double a = fabs(x[i]);
    if (p == 0)
      sum += a != 0;
    else if (isinf(p))
      sum = i == 0 || (p > 0 ? a > sum : a < sum) ? a : sum;
    else
      sum += pow(a, p);
  }
  return p == 0 || isinf(p) ? sum : pow(sum, 1 / p);
}

/* Of the reference's gradients: the norm of the parameters' norms. */
static double reference_norm(const reference_t *reference, double p) {
  static double x[NET_MAX_NUMEL];
  double norms[NET_PARAMS];
  int count = 0;
  for (uint32_t i = 0; i < NET_PARAMS; i++) {
    if (!reference->has_grad[i]) continue;
    const int64_t n = net_numel(&reference->net, i);
    for (int64_t k = 0; k < n; k++) x[k] = (double)reference->grad[i][k];
    norms[count++] = plain_norm(x, n, p);
  }
  return count == 0 ? 0 : plain_norm(norms, count, p);
}

static void check_near(double got, double want, double p) {
  if (!(fabs(got - want) <= 1e-12 * want))
    test_fail(__FILE__, __LINE__, "the norm of order %g is %.17g, not %.17g", p, got, want);
}

static void check_same_on_ranks(fsdp_comm_t *comm, double value) {
  double range[2] = {value, -value};
  int64_t two = 2;
  fsdp_tensor_t t = tensor_of(range, 1, &two, FSDP_DTYPE_FLOAT, 64);
  CHECK_OK(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_MAX));
  CHECK(range[0] == value && range[1] == -value);
}

static void backward(sharded_t *sharded, reference_t *reference, int step) {
  CHECK_OK(fsdp_engine_zero_grad(sharded->engine));
  reference_zero_grad(reference);
  sharded_backward(sharded, step, BATCH, step % 2 == 0 ? NET_BONUS : 0);
  for (int r = 0; r < sharded->world; r++)
    reference_backward(reference, r, step, BATCH, step % 2 == 0 ? NET_BONUS : 0);
  reference_reduce(reference);
}

/* The pieces of the gradients, in a host's own memory. */
static const float *const *copied_pieces(sharded_t *sharded) {
  static float memory[NET_PARAMS][NET_MAX_NUMEL];
  static const float *pieces[NET_PARAMS];
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_shard(sharded->engine, p, &shard));
    pieces[p] = shard.grad == NULL ? NULL : memory[p];
    if (shard.grad != NULL) memcpy(memory[p], shard.grad, sizeof(float) * (size_t)shard.numel);
  }
  return pieces;
}

static void norms_and_clipping(const job_t *job, train_wrap_t wrap, int32_t strategy,
                               uint32_t shard_size, const char *name) {
  const net_t net = {7, 13};
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  config.strategy = strategy;
  config.shard_size = shard_size;
  sharded_t *sharded = sharded_create(&net, job->comm, wrap, &config);
  reference_t *reference = reference_create(&net, job->world);
  if (shard_size != 0) reference->group = (int)shard_size;
  if (strategy == FSDP_NO_SHARD) reference->group = 1;
  double norm = -1, again = -1;
  test_context(name);
  /* No parameter has a gradient yet. */
  CHECK_OK(fsdp_engine_clip_grad_norm(sharded->engine, 1, 2, 1, &norm));
  CHECK(norm == 0);
  for (int i = 0; i < ORDER_COUNT; i++) {
    const double p = ORDERS[i];
    backward(sharded, reference, i + 1);
    const double want = reference_norm(reference, p);
    CHECK(want > 0);
    CHECK_OK(fsdp_engine_grad_norm(sharded->engine, p, &norm));
    check_near(norm, want, p);
    check_same_on_ranks(job->comm, norm);
    CHECK_OK(fsdp_engine_total_norm(sharded->engine, copied_pieces(sharded), NET_PARAMS, p, 1,
                                    &again));
    CHECK(again == norm);
    sharded_check_shards(sharded, reference, "a norm changes nothing", i);

    CHECK_OK(fsdp_engine_clip_grad_norm(sharded->engine, 2 * want, p, 1, &again));
    CHECK(again == norm);
    sharded_check_shards(sharded, reference, "gradients within the limit", i);
    CHECK_OK(fsdp_engine_clip_grad_norm(sharded->engine, want / 4, p, 1, &again));
    CHECK(again == norm);
    const float factor = (float)(want / 4 / (norm + 1e-6));
    for (uint32_t q = 0; q < NET_PARAMS; q++)
      for (int64_t k = 0; k < net_numel(&net, q); k++) reference->grad[q][k] *= factor;
    sharded_check_shards(sharded, reference, "clipped", i);
    if (p > 0) {
      CHECK_OK(fsdp_engine_grad_norm(sharded->engine, p, &again));
      CHECK(fabs(again - want / 4) < 1e-5 * want);
    }
  }
  /* Orders below 0 have no value for the parameter without elements, which has a gradient. */
  CHECK_ERR(fsdp_engine_grad_norm(sharded->engine, -1, &norm), FSDP_ERR_INVALID_ARGUMENT,
            "\"block.none.empty\"");
  CHECK_OK(fsdp_engine_clear_grad(sharded->engine, NET_EMPTY));
  reference->has_grad[NET_EMPTY] = 0;
  for (int i = 0; i < 2; i++) {
    const double p = i == 0 ? -INFINITY : -1.5;
    CHECK_OK(fsdp_engine_grad_norm(sharded->engine, p, &norm));
    check_near(norm, reference_norm(reference, p), p);
    check_same_on_ranks(job->comm, norm);
  }
  CHECK_ERR(fsdp_engine_grad_norm(sharded->engine, NAN, &norm), FSDP_ERR_INVALID_ARGUMENT, "NaN");
  CHECK_ERR(fsdp_engine_clip_grad_norm(sharded->engine, -1, 2, 0, &norm), FSDP_ERR_INVALID_ARGUMENT,
            "max_norm");
  CHECK_ERR(fsdp_engine_clip_grad_norm(sharded->engine, 1, 2, 0, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_norm");
  CHECK_ERR(fsdp_engine_total_norm(sharded->engine, NULL, NET_PARAMS, 2, 0, &norm),
            FSDP_ERR_INVALID_ARGUMENT, "pieces");
  CHECK_ERR(fsdp_engine_total_norm(sharded->engine, copied_pieces(sharded), 1, 2, 0, &norm),
            FSDP_ERR_INVALID_ARGUMENT, "1 pieces");
  reference_destroy(reference);
  sharded_destroy(sharded);
}

/* The last rank's piece gets a value that is not finite; `p` of the norms. */
static void not_finite(const job_t *job, float bad, double p) {
  const net_t net = {7, 13};
  sharded_t *sharded = sharded_create(&net, job->comm, WRAP_SOME, NULL);
  reference_t *reference = reference_create(&net, job->world);
  double norm = -1;
  fsdp_shard_t shard;
  test_context("norms that are not finite");
  backward(sharded, reference, 1);
  const uint32_t where[2] = {NET_SHARED_WEIGHT, NET_FC_WEIGHT};
  for (int i = 0; i < 2; i++) {
    fsdp_param_info_t info = param_info_init();
    CHECK_OK(fsdp_engine_param_info(sharded->engine, where[i], &info));
    /* The rank that has the parameter's last element. */
    CHECK_OK(fsdp_engine_shard(sharded->engine, where[i], &shard));
    if (shard.numel > 0 && info.shard_offset + shard.numel == info.numel)
      shard.grad[shard.numel - 1] = bad;
    reference->grad[where[i]][info.numel - 1] = bad;
  }
  CHECK_ERR(fsdp_engine_clip_grad_norm(sharded->engine, 1, p, 1, &norm), FSDP_ERR_NONFINITE,
            "\"block.fc.weight\"");
  CHECK(norm == -1);
  CHECK_ERR(
      fsdp_engine_total_norm(sharded->engine, copied_pieces(sharded), NET_PARAMS, p, 1, &norm),
      FSDP_ERR_NONFINITE, "\"block.fc.weight\"");
  sharded_check_shards(sharded, reference, "gradients stay after the error", 0);
  /* Else as torch does: x * (1 / (norm + 1e-6)). */
  CHECK_OK(fsdp_engine_clip_grad_norm(sharded->engine, 1, p, 0, &norm));
  CHECK(isnan(bad) ? isnan(norm) : isinf(norm) && norm > 0);
  for (uint32_t q = 0; q < NET_PARAMS; q++) {
    fsdp_param_info_t info = param_info_init();
    CHECK_OK(fsdp_engine_param_info(sharded->engine, q, &info));
    CHECK_OK(fsdp_engine_shard(sharded->engine, q, &shard));
    for (int64_t k = 0; shard.grad != NULL && k < shard.numel; k++) {
      const float before = reference->grad[q][info.shard_offset + k];
      if (isnan(bad) || !isfinite(before))
        CHECK(isnan(shard.grad[k]));
      else
        CHECK(shard.grad[k] == 0);
    }
  }
  reference_destroy(reference);
  sharded_destroy(sharded);
}

static void not_in_a_backward(const job_t *job) {
  fsdp_engine_t *engine = stack_engine(job->comm, 2, 5, 1);
  void *buffer = NULL;
  double norm = -1;
  test_context("in the middle of a backward");
  CHECK_OK(fsdp_engine_unshard(engine, 1, &buffer));
  CHECK_OK(stack_add_grad(engine, 0, 2));
  CHECK_ERR(fsdp_engine_grad_norm(engine, 2, &norm), FSDP_ERR_INVALID_STATE, "backward has ended");
  CHECK_ERR(fsdp_engine_clip_grad_norm(engine, 1, 2, 0, &norm), FSDP_ERR_INVALID_STATE,
            "backward has ended");
  CHECK_OK(fsdp_engine_finish_backward(engine));
  CHECK_OK(fsdp_engine_grad_norm(engine, 1, &norm));
  CHECK(norm == 10);
  fsdp_engine_destroy(engine);
  CHECK_ERR(fsdp_engine_grad_norm(engine, 1, &norm), FSDP_ERR_INVALID_HANDLE, "engine");
}

int main(void) {
  const job_t job = join_job();
  norms_and_clipping(&job, WRAP_NOTHING, FSDP_FULL_SHARD, 0, "one unit");
  norms_and_clipping(&job, WRAP_SOME, FSDP_FULL_SHARD, 0, "some units");
  norms_and_clipping(&job, WRAP_ALWAYS, FSDP_SHARD_GRAD_OP, 0, "every module a unit");
  norms_and_clipping(&job, WRAP_SOME, FSDP_NO_SHARD, 0, "unsharded");
  if (job.world == 4) norms_and_clipping(&job, WRAP_SOME, FSDP_HYBRID_SHARD, 2, "hybrid");
  not_finite(&job, INFINITY, 2);
  not_finite(&job, -INFINITY, 1);
  not_finite(&job, -INFINITY, INFINITY);
  not_finite(&job, NAN, 2);
  not_finite(&job, NAN, INFINITY);
  not_finite(&job, NAN, 3);
  not_in_a_backward(&job);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
