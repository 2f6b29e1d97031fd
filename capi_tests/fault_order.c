/* Ranks that run different collectives: FSDP_ERR_MISMATCH on every rank, naming both ranks and what
 * each of them runs. Rank 1 is the one that differs. Each case joins the job anew, because the
 * error breaks the communicator. */
#include "ranks.h"

typedef enum {
  UNITS_SWAPPED,
  UNIT_SKIPPED,
  BARRIER_INSTEAD,
  OTHER_SIZE,
  OTHER_DTYPE,
  OTHER_OP,
  OTHER_ROOT,
  WRITE_INSTEAD,
  CASES
} case_t;

static const struct {
  const char *name;
  /* What the message must contain: what rank 1 runs, and what the others run. */
  const char *theirs, *others;
} CASE[CASES] = {{"units swapped", "\"layer2\"", "\"layer1\""},
                 {"a unit skipped", "\"layer2\"", "\"layer1\""},
                 {"a barrier instead of an all-gather", "barrier", "\"layer1\""},
                 {"another size", "8 bytes", "4 bytes"},
                 {"another dtype", "int32", "float32"},
                 {"another op", "max", "sum"},
                 {"another root", "root 1", "root 0"},
                 {"begin_write instead of a forward", "writable", "\"layer1\""}};

/* One try to run the case to its end; the status of the first call that fails. */
static fsdp_status_t run(const job_t *job, fsdp_engine_t *engine, case_t which) {
  const int other = job->rank == 1;
  float value = 1;
  int32_t integers[2] = {1, 1};
  int64_t length[1] = {1};
  fsdp_tensor_t t = tensor_f32(&value, 1, length);
  fsdp_status_t status = fsdp_engine_pre_forward(engine, 1);
  if (status == FSDP_OK) status = fsdp_engine_post_forward(engine, 1);
  switch (which) {
    case UNITS_SWAPPED:
      for (uint32_t i = 0; i < 2 && status == FSDP_OK; i++)
        status = fsdp_engine_pre_forward(engine, other ? 3 - i : 2 + i);
      break;
    case UNIT_SKIPPED:
      if (!other) status = fsdp_engine_pre_forward(engine, 2);
      if (status == FSDP_OK) status = fsdp_engine_pre_forward(engine, 3);
      break;
    case BARRIER_INSTEAD:
      status = other ? fsdp_comm_barrier(job->comm) : fsdp_engine_pre_forward(engine, 2);
      break;
    case OTHER_SIZE:
    case OTHER_DTYPE:
      if (other) t = tensor_of(integers, 1, length, FSDP_DTYPE_INT, 32);
      if (which == OTHER_SIZE) {
        t = tensor_f32(integers, 1, length);
        if (other) length[0] = 2;
      }
      status = fsdp_comm_all_reduce(job->comm, &t, FSDP_REDUCE_SUM);
      break;
    case OTHER_OP:
      status = fsdp_comm_all_reduce(job->comm, &t, other ? FSDP_REDUCE_MAX : FSDP_REDUCE_SUM);
      break;
    case OTHER_ROOT: status = fsdp_comm_broadcast(job->comm, &t, other); break;
    default:
      if (!other) status = fsdp_engine_pre_forward(engine, 2);
      if (other) status = fsdp_engine_begin_write(engine);
  }
  if (status == FSDP_OK) status = fsdp_engine_finish_backward(engine);
  /* At the latest the next collective shows it. */
  return status != FSDP_OK ? status : fsdp_comm_barrier(job->comm);
}

int main(void) {
  for (int i = 0; i < CASES; i++) {
    const job_t job = join_job();
    fsdp_engine_t *engine = stack_engine(job.comm, 3, 100, 1);
    char first[512];
    int32_t other = -1;
    CHECK(job.world > 1);
    test_context(CASE[i].name);
    const double start = now_seconds();
    /* Where bytes move begin_write concerns no other rank; what follows it does. */
    const int local = i == WRITE_INSTEAD && has_lent_collectives();
    const char *theirs = local ? "end of a backward" : CASE[i].theirs;
    CHECK_ERR(run(&job, engine, (case_t)i), FSDP_ERR_MISMATCH, theirs);
    CHECK(now_seconds() - start < 10);
    CHECK(strstr(fsdp_last_error_message(), CASE[i].others) != NULL);
    CHECK(strstr(fsdp_last_error_message(), "rank 1 ") != NULL);
    for (int32_t r = 0; r < job.world; r++) {
      char name[32];
      snprintf(name, sizeof name, "rank %d ", (int)r);
      if (r != 1 && strstr(fsdp_last_error_message(), name) != NULL) other = r;
    }
    CHECK(other >= 0);
    /* It stays the error of every later call. */
    snprintf(first, sizeof first, "%s", fsdp_last_error_message());
    CHECK_ERR(fsdp_comm_barrier(job.comm), FSDP_ERR_MISMATCH, first);
    CHECK_ERR(fsdp_engine_pre_forward(engine, 1), FSDP_ERR_MISMATCH, first);
    CHECK_ERR(fsdp_comm_async_error(job.comm), FSDP_ERR_MISMATCH, first);
    fsdp_engine_destroy(engine);
    fsdp_comm_destroy(job.comm);
  }
  return 0;
}
