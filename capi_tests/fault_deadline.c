/* A rank that does not come within FSDP_TIMEOUT_MS: the others get FSDP_ERR_TIMEOUT that names it,
 * soon after the deadline; the late rank gets the same error when it comes. Rank 1 is the late one.
 */
#include "ranks.h"

enum { TIMEOUT_MS = 600, LATE_MS = 2000 };

typedef enum { IN_FORWARD, IN_BACKWARD, IN_BARRIER, IN_BEGIN_WRITE, CASES } case_t;

static const char *const CASE[CASES] = {"forward", "backward", "barrier", "begin_write"};

static fsdp_status_t run(const job_t *job, fsdp_engine_t *engine, case_t which, int late) {
  const int late_ms = late ? LATE_MS : 0;
  fsdp_status_t status = FSDP_OK;
  if (which == IN_FORWARD) sleep_ms(late_ms);
  for (uint32_t u = 1; u <= 2 && status == FSDP_OK; u++)
    status = fsdp_engine_pre_forward(engine, u);
  if (which == IN_BARRIER && status == FSDP_OK) {
    sleep_ms(late_ms);
    status = fsdp_comm_barrier(job->comm);
  }
  if (which == IN_BEGIN_WRITE && status == FSDP_OK) {
    sleep_ms(late_ms);
    return fsdp_engine_begin_write(engine);
  }
  for (uint32_t u = 2; u >= 1 && status == FSDP_OK; u--) {
    if (which == IN_BACKWARD && u == 1) sleep_ms(late_ms);
    status = stack_add_grad(engine, u - 1, 1);
    if (status == FSDP_OK) status = fsdp_engine_reduce(engine, u);
  }
  return status != FSDP_OK ? status : fsdp_engine_finish_backward(engine);
}

int main(void) {
  CHECK_EQ(setenv("FSDP_TIMEOUT_MS", "600", 1), 0);
  for (int i = 0; i < CASES; i++) {
    /* Where bytes move it concerns no other rank. */
    if (i == IN_BEGIN_WRITE && has_lent_collectives()) continue;
    const job_t job = join_job();
    fsdp_engine_t *engine = stack_engine(job.comm, 2, 100, 1);
    CHECK(job.world > 1);
    test_context(CASE[i]);
    const double start = now_seconds();
    CHECK_ERR(run(&job, engine, (case_t)i, job.rank == 1), FSDP_ERR_TIMEOUT, "rank 1 ");
    const double seconds = now_seconds() - start;
    if (job.rank != 1) CHECK(seconds > TIMEOUT_MS / 1000.0 - 0.1 && seconds < LATE_MS / 1000.0);
    /* The deadline is in the message, so that one knows what to change. */
    CHECK(strstr(fsdp_last_error_message(), "600 ms") != NULL);
    CHECK_ERR(fsdp_comm_barrier(job.comm), FSDP_ERR_TIMEOUT, "rank 1 ");
    fsdp_engine_destroy(engine);
    fsdp_comm_destroy(job.comm);
  }
  return 0;
}
