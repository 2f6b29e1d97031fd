/* A rank that destroys its communicator while others need it is an error there that names it;
 * leaving when nobody needs one any more is none. Rank 1 is the one that leaves. */
#include "ranks.h"

typedef enum { FROM_BARRIER, FROM_FORWARD, FROM_BACKWARD, FROM_CREATE, CASES } case_t;

static const char *const CASE[CASES] = {"from a barrier", "from a forward", "from a backward",
                                        "from engine_create"};

static fsdp_status_t run(const job_t *job, fsdp_engine_t *engine, case_t which) {
  fsdp_status_t status = FSDP_OK;
  fsdp_engine_t *second = NULL;
  switch (which) {
    case FROM_BARRIER: return fsdp_comm_barrier(job->comm);
    case FROM_FORWARD:
      /* What rank 1 had published can still be read, and it reads no more; that it does not come to
       * the next forward is what shows. */
      status = fsdp_engine_pre_forward(engine, 2);
      if (status == FSDP_OK) status = fsdp_engine_begin_write(engine);
      return status != FSDP_OK ? status : fsdp_engine_pre_forward(engine, 1);
    case FROM_BACKWARD:
      status = stack_add_grad(engine, 0, 1);
      return status != FSDP_OK ? status : fsdp_engine_finish_backward(engine);
    default: {
      fsdp_model_t *model = stack_model(1, 8, 1);
      status = fsdp_engine_create(model, job->comm, NULL, &second);
      CHECK(second == NULL);
      fsdp_model_destroy(model);
      return status;
    }
  }
}

int main(void) {
  for (int i = 0; i < CASES; i++) {
    const job_t job = join_job();
    CHECK(job.world > 1);
    test_context(CASE[i]);
    fsdp_engine_t *engine = stack_engine(job.comm, 3, 100, 1);
    CHECK_OK(fsdp_engine_pre_forward(engine, 1));
    CHECK_OK(fsdp_engine_post_forward(engine, 1));
    if (job.rank == 1) {
      /* The engine keeps the communicator: this alone is not leaving. */
      fsdp_comm_destroy(job.comm);
      sleep_ms(50);
      fsdp_engine_destroy(engine);
      continue;
    }
    const double start = now_seconds();
    const fsdp_status_t status = run(&job, engine, (case_t)i);
    CHECK_ERR(status, FSDP_ERR_MISMATCH, "rank 1 has left");
    CHECK(now_seconds() - start < 5);
    fsdp_engine_destroy(engine);
    fsdp_comm_destroy(job.comm);
  }

  /* Ends at different times, after the last collective of all. */
  test_context("in good order");
  const job_t job = join_job();
  fsdp_engine_t *engine = stack_engine(job.comm, 2, 100, 1);
  CHECK_OK(fsdp_engine_pre_forward(engine, 1));
  CHECK_OK(stack_add_grad(engine, 0, (float)job.rank));
  CHECK_OK(fsdp_engine_finish_backward(engine));
  sleep_ms(job.rank % 2 * 100);
  fsdp_shard_t shard;
  CHECK_OK(fsdp_engine_shard(engine, 0, &shard));
  if (shard.numel > 0) CHECK(shard.grad[0] == (float)(job.world - 1) / 2);
  fsdp_engine_destroy(engine);
  fsdp_comm_destroy(job.comm);
  return 0;
}
