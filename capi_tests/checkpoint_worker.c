/* The ranks that the drivers fault_checkpoint.py and feature_checkpoint_python.py start.
 *
 *   checkpoint_worker run FOLDER     loads the newest complete checkpoint FOLDER/step-N and checks
 *                                    it, then saves step-N+1, step-N+2, ... until it is killed;
 *                                    every second one in the background
 *   checkpoint_worker check FOLDER   loads and checks the newest only
 *   checkpoint_worker save DIR       saves step 5 into DIR
 *   checkpoint_worker load DIR       loads step 5 from DIR, with states
 *   checkpoint_worker model DIR      the same without states
 *
 * Rank 0 says "loaded N" and "saved N". A failed call of the library is "error CODE: MESSAGE" on
 * standard error, and exit status 3. */
#include "checkpoint_model.h"

#include <dirent.h>
#include <unistd.h>

enum { SAMPLE_STEP = 5 };

#define OR_STOP(call) or_stop(call)

static void or_stop(fsdp_status_t status) {
  if (status == FSDP_OK) return;
  fprintf(stderr, "error %d: %s\n", (int)status, fsdp_last_error_message());
  fflush(NULL);
  _exit(3);
}

/* The newest complete checkpoint in `folder`, 0 if there is none: rank 0 looks, all ranks know. */
static int64_t newest(const char *folder, const job_t *job) {
  int64_t step = 0, one = 1;
  fsdp_tensor_t t = tensor_of(&step, 1, &one, FSDP_DTYPE_INT, 64);
  if (job->rank == 0) {
    DIR *dir = opendir(folder);
    CHECK(dir != NULL);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
      long long found = 0;
      char rest = 0;
      /* What is incomplete has another name. */
      if (sscanf(entry->d_name, "step-%lld%c", &found, &rest) == 1 && found > step) step = found;
    }
    closedir(dir);
  }
  OR_STOP(fsdp_comm_broadcast(job->comm, &t, 0));
  return step;
}

static void say(const job_t *job, const char *what, int64_t step) {
  if (job->rank != 0) return;
  printf("%s %lld\n", what, (long long)step);
  fflush(stdout);
}

static int64_t load_newest(ckpt_t *c, const char *folder, const job_t *job) {
  char dir[512];
  const int64_t step = newest(folder, job);
  const fsdp_checkpoint_contents_t contents = ckpt_contents(c, 1);
  if (step > 0) {
    snprintf(dir, sizeof dir, "%s/step-%lld", folder, (long long)step);
    ckpt_fill(c, step + 1, job->rank);
    OR_STOP(fsdp_checkpoint_load_contents(c->engine, dir, &contents));
    ckpt_check(c, step, 1);
  }
  say(job, "loaded", step);
  return step;
}

static void save_for_ever(ckpt_t *c, const char *folder, const job_t *job, int64_t step) {
  const fsdp_checkpoint_contents_t contents = ckpt_contents(c, 1);
  for (;;) {
    char dir[512];
    ckpt_fill(c, ++step, job->rank);
    snprintf(dir, sizeof dir, "%s/step-%lld", folder, (long long)step);
    if (step % 2 == 0) {
      OR_STOP(fsdp_checkpoint_save_contents(c->engine, dir, &contents));
    } else {
      fsdp_checkpoint_job_t *save = NULL;
      OR_STOP(fsdp_checkpoint_save_async(c->engine, dir, &contents, &save));
      /* Values change while they are saved. */
      ckpt_fill(c, step + 1, job->rank);
      OR_STOP(fsdp_checkpoint_job_wait(save));
      fsdp_checkpoint_job_destroy(save);
    }
    say(job, "saved", step);
  }
}

int main(int argc, char **argv) {
  static ckpt_t c;
  CHECK(argc == 3);
  const char *mode = argv[1], *path = argv[2];
  const job_t job = join_job();
  ckpt_create(&c, job.comm);
  if (strcmp(mode, "run") == 0 || strcmp(mode, "check") == 0) {
    const int64_t step = load_newest(&c, path, &job);
    if (strcmp(mode, "run") == 0) save_for_ever(&c, path, &job, step);
  } else if (strcmp(mode, "save") == 0) {
    fsdp_checkpoint_contents_t contents = ckpt_contents(&c, 1);
    fsdp_metadata_t text;
    text.key = "note";
    text.value = "of a test";
    contents.metadata = &text;
    contents.metadata_count = 1;
    ckpt_fill(&c, SAMPLE_STEP, job.rank);
    OR_STOP(fsdp_checkpoint_save_contents(c.engine, path, &contents));
  } else {
    const int states = strcmp(mode, "load") == 0;
    const fsdp_checkpoint_contents_t contents = ckpt_contents(&c, states);
    CHECK(states || strcmp(mode, "model") == 0);
    ckpt_fill(&c, SAMPLE_STEP + 1, job.rank);
    OR_STOP(fsdp_checkpoint_load_contents(c.engine, path, &contents));
    ckpt_check(&c, SAMPLE_STEP, states);
    say(&job, "loaded", SAMPLE_STEP);
  }
  fsdp_engine_destroy(c.engine);
  fsdp_comm_destroy(job.comm);
  return 0;
}
