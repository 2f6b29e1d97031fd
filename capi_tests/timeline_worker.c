/* What feature_timeline.py runs: trains, and writes each rank's fsdp_engine_describe to
 * FOLDER/rank.json.
 *
 *   timeline_worker FOLDER hooks   a net whose every module is a unit, by the hooks
 *   timeline_worker FOLDER touch   a stack by unshard, reduce and reshard
 *   timeline_worker FOLDER leave   the same many times; the process ends and destroys nothing */
#include "ranks.h"
#include "train.h"

#include <unistd.h>

static void write_description(const fsdp_engine_t *engine, const char *folder, int rank) {
  char path[512], one[1];
  size_t size = 0, again = 0;
  CHECK_OK(fsdp_engine_describe(engine, NULL, 0, &size));
  CHECK_ERR(fsdp_engine_describe(engine, one, 1, &again), FSDP_ERR_INVALID_ARGUMENT, "1 bytes");
  CHECK_ERR(fsdp_engine_describe(engine, NULL, 0, NULL), FSDP_ERR_INVALID_ARGUMENT, "out_size");
  char *text = (char *)malloc(size);
  CHECK(text != NULL);
  CHECK_OK(fsdp_engine_describe(engine, text, size, &again));
  CHECK(again == size && strlen(text) + 1 == size);
  snprintf(path, sizeof path, "%s/%d.json", folder, rank);
  FILE *file = fopen(path, "w");
  CHECK(file != NULL && fputs(text, file) >= 0 && fclose(file) == 0);
  free(text);
}

static void hooks(const job_t *job, const char *folder) {
  const net_t net = {7, 13};
  sharded_t *sharded = sharded_create(&net, job->comm, WRAP_ALWAYS, 0);
  for (int step = 1; step <= 3; step++) {
    CHECK_OK(fsdp_engine_zero_grad(sharded->engine));
    sharded_backward(sharded, step, 3, 0);
    sharded_adam(sharded, step);
  }
  write_description(sharded->engine, folder, job->rank);
  sharded_destroy(sharded);
}

static void touch(const job_t *job, const char *folder, int iterations, int leave) {
  enum { LAYERS = 4 };
  fsdp_engine_t *engine = stack_engine(job->comm, LAYERS, 100, 1);
  for (int i = 0; i < iterations; i++) {
    void *buffer = NULL;
    CHECK_OK(fsdp_engine_begin_forward(engine, 1));
    for (uint32_t unit = 1; unit <= LAYERS; unit++) {
      CHECK_OK(fsdp_engine_unshard(engine, unit, &buffer));
      CHECK_OK(fsdp_engine_reshard(engine, unit));
    }
    CHECK_OK(fsdp_engine_end_forward(engine));
    for (uint32_t unit = LAYERS; unit >= 1; unit--) {
      CHECK_OK(fsdp_engine_unshard(engine, unit, &buffer));
      CHECK_OK(stack_add_grad(engine, unit - 1, 1));
      CHECK_OK(fsdp_engine_reduce(engine, unit));
      CHECK_OK(fsdp_engine_reshard(engine, unit));
    }
    CHECK_OK(fsdp_engine_finish_backward(engine));
  }
  write_description(engine, folder, job->rank);
  CHECK_OK(fsdp_comm_barrier(job->comm));
  if (leave) _exit(0);
  fsdp_engine_destroy(engine);
}

int main(int argc, char **argv) {
  CHECK(argc == 3);
  const job_t job = join_job();
  if (strcmp(argv[2], "hooks") == 0) hooks(&job, argv[1]);
  if (strcmp(argv[2], "touch") == 0) touch(&job, argv[1], 3, 0);
  if (strcmp(argv[2], "leave") == 0) touch(&job, argv[1], 400, 1);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
