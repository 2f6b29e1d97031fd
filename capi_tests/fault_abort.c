/* fsdp_comm_abort from any rank and any thread ends every rank's pending call with FSDP_ERR_ABORTED
 * that names the rank and its reason. The last rank is the one that aborts. */
#include "ranks.h"

#include <pthread.h>

static void *abort_later(void *argument) {
  const job_t *job = (const job_t *)argument;
  sleep_ms(100);
  CHECK_OK(fsdp_comm_abort(job->comm, "out of patience"));
  return NULL;
}

int main(void) {
  for (int own_thread = 0; own_thread < 2; own_thread++) {
    job_t job = join_job();
    fsdp_engine_t *engine = stack_engine(job.comm, 2, 100, 1);
    const int last = job.rank == job.world - 1;
    char name[32];
    pthread_t thread;
    CHECK(job.world > 1);
    snprintf(name, sizeof name, "rank %d ", (int)job.world - 1);
    CHECK_OK(fsdp_comm_async_error(job.comm));
    CHECK_OK(fsdp_comm_barrier(job.comm));
    const double start = now_seconds();
    if (last && own_thread == 0) (void)abort_later(&job);
    if (last && own_thread == 1) CHECK_EQ(pthread_create(&thread, NULL, abort_later, &job), 0);
    if (last && own_thread == 1) {
      /* Waits for ranks that wait for this one elsewhere: only the other thread's abort ends it. */
      CHECK_ERR(
          fsdp_engine_begin_write(engine) == FSDP_OK ? fsdp_comm_barrier(job.comm) : FSDP_ERR_PANIC,
          FSDP_ERR_ABORTED, "out of patience");
      CHECK_EQ(pthread_join(thread, NULL), 0);
    } else if (own_thread == 1) {
      /* Does not come to the barrier until it has seen the abort. */
      while (fsdp_comm_async_error(job.comm) == FSDP_OK) sleep_ms(5);
      CHECK_ERR(fsdp_comm_async_error(job.comm), FSDP_ERR_ABORTED, name);
    } else if (!last) {
      CHECK_ERR(fsdp_engine_pre_forward(engine, 1), FSDP_ERR_ABORTED, name);
      CHECK(strstr(fsdp_last_error_message(), "out of patience") != NULL);
    }
    CHECK(now_seconds() - start < 5);
    CHECK_ERR(fsdp_comm_barrier(job.comm), FSDP_ERR_ABORTED, name);
    CHECK_ERR(fsdp_engine_finish_backward(engine) == FSDP_OK ? fsdp_engine_pre_forward(engine, 1)
                                                             : FSDP_ERR_ABORTED,
              FSDP_ERR_ABORTED, NULL);
    fsdp_engine_destroy(engine);
    fsdp_comm_destroy(job.comm);
  }
  return 0;
}
