/* Several engines on one communicator: their iterations may be interleaved in any way that is the
 * same on every rank, and an engine destroyed in the middle of one does not disturb the others. */
#include "ranks.h"

enum { WIDTH = 1001 };

/* Every rank gives gradient (rank + 1) * scale: the mean is (world + 1) / 2 * scale. */
static void check_mean(const job_t *job, fsdp_engine_t *engine, uint32_t param, float scale) {
  fsdp_shard_t shard;
  CHECK_OK(fsdp_engine_shard(engine, param, &shard));
  CHECK(shard.grad != NULL);
  float sum = 0;
  for (int32_t r = 0; r < job->world; r++) sum += (float)(r + 1) * scale;
  for (int64_t i = 0; i < shard.numel; i++) CHECK(shard.grad[i] == sum / (float)job->world);
}

static void give(const job_t *job, fsdp_engine_t *engine, uint32_t param, float scale) {
  CHECK_OK(stack_add_grad(engine, param, (float)(job->rank + 1) * scale));
}

/* One rank after the other is late, so that reductions are pending when the next engine is called.
 */
static void stagger(const job_t *job, int round) {
  if (job->rank == round % job->world) sleep_ms(20);
}

static void one_after_the_other(const job_t *job) {
  fsdp_engine_t *a = stack_engine(job->comm, 3, WIDTH, 1), *b = stack_engine(job->comm, 2, 17, 2);
  for (int round = 0; round < 4; round++) {
    CHECK_OK(fsdp_engine_zero_grad(a));
    CHECK_OK(fsdp_engine_zero_grad(b));
    stagger(job, round);
    CHECK_OK(fsdp_engine_pre_forward(a, 1));
    give(job, a, 0, 1);
    CHECK_OK(fsdp_engine_finish_backward(a));
    CHECK_OK(fsdp_engine_pre_forward(b, 2));
    give(job, b, 1, 2);
    CHECK_OK(fsdp_engine_finish_backward(b));
    check_mean(job, a, 0, 1);
    check_mean(job, b, 1, 2);
  }
  fsdp_engine_destroy(a);
  fsdp_engine_destroy(b);
}

/* As when one loss goes through two models: units of both are reduced in turn, in one backward. */
static void interleaved(const job_t *job) {
  fsdp_engine_t *a = stack_engine(job->comm, 3, WIDTH, 1),
                *b = stack_engine(job->comm, 3, WIDTH, 2);
  for (int round = 0; round < 8; round++) {
    CHECK_OK(fsdp_engine_zero_grad(a));
    CHECK_OK(fsdp_engine_zero_grad(b));
    for (uint32_t u = 1; u <= 3; u++) {
      CHECK_OK(fsdp_engine_pre_forward(a, u));
      CHECK_OK(fsdp_engine_post_forward(a, u));
    }
    for (uint32_t u = 1; u <= 3; u++) {
      CHECK_OK(fsdp_engine_pre_forward(b, u));
      CHECK_OK(fsdp_engine_post_forward(b, u));
    }
    for (uint32_t u = 3; u >= 1; u--) {
      stagger(job, round + (int)u);
      CHECK_OK(fsdp_engine_pre_backward(b, u));
      give(job, b, u - 1, 4);
      CHECK_OK(fsdp_engine_post_backward(b, u));
      CHECK_OK(fsdp_engine_pre_backward(a, u));
      give(job, a, u - 1, 8);
      CHECK_OK(fsdp_engine_post_backward(a, u));
    }
    /* The engine whose reductions were started last ends first in every second round. */
    CHECK_OK(fsdp_engine_finish_backward(round % 2 ? a : b));
    CHECK_OK(fsdp_engine_finish_backward(round % 2 ? b : a));
    for (uint32_t p = 0; p < 3; p++) {
      check_mean(job, a, p, 8);
      check_mean(job, b, p, 4);
    }
  }
  fsdp_engine_destroy(a);
  fsdp_engine_destroy(b);
}

/* Given up with a reduction started and a unit still collecting. */
static void destroyed_in_a_backward(const job_t *job) {
  for (int round = 0; round < 4; round++) {
    fsdp_engine_t *a = stack_engine(job->comm, 3, WIDTH, 1);
    CHECK_OK(fsdp_engine_pre_forward(a, 1));
    CHECK_OK(fsdp_engine_pre_forward(a, 2));
    stagger(job, round);
    give(job, a, 0, 1);
    CHECK_OK(fsdp_engine_reduce(a, 1));
    give(job, a, 1, 1);
    fsdp_engine_destroy(a);
    fsdp_engine_t *b = stack_engine(job->comm, 3, WIDTH, 2);
    CHECK_OK(fsdp_engine_pre_forward(b, 2));
    give(job, b, 1, 16);
    CHECK_OK(fsdp_engine_finish_backward(b));
    check_mean(job, b, 1, 16);
    fsdp_engine_destroy(b);
  }
}

int main(void) {
  const job_t job = join_job();
  test_context("one after the other");
  one_after_the_other(&job);
  test_context("interleaved");
  interleaved(&job);
  test_context("destroyed in a backward");
  destroyed_in_a_backward(&job);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
