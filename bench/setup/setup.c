/* What comes before and between steps, on a model of units of 64 MiB of float32, one rank: sharding it from nothing, saving
 * and loading a checkpoint, each beside the plain thing with as many bytes.
 *
 *   setup FOLDER UNITS REPETITIONS   prints {"rows": [{"setup", "bytes", "times"}]}; FOLDER exists and is left as it was
 *
 * Names: shard_from_meta: an engine on a model without storage, whose initializer writes each element once; fill_and_copy: a
 * buffer of a unit's size is filled as often, and this rank's part copied out. checkpoint_save and checkpoint_load: of the
 * shards. plain_write: each rank writes its shards' bytes into a file of its own and flushes it to the disk (fsync); plain_read
 * reads them. Before every read, plain or not, all files are dropped from the page cache (they are on the disk by then), so
 * that both read from the disk. */
#define _GNU_SOURCE
#include "../../capi_tests/ranks.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MOST_UNITS = 256, MOST_REPETITIONS = 100, CHUNK = 8 << 20 };
static const int64_t unit_numel = 1 << 24;
static uint32_t units = 0;

typedef enum { SHARD, COPY, SAVE, WRITE, LOAD, READ, KINDS } kind_t;
static const char *const names[KINDS] = {"shard_from_meta", "fill_and_copy",   "checkpoint_save",
                                         "plain_write",     "checkpoint_load", "plain_read"};
static double times[KINDS][MOST_REPETITIONS];

static int32_t fill(uint32_t param, const fsdp_tensor_t *tensor, void *user_data) {
  float *out = (float *)tensor->data;
  (void)user_data;
  for (int64_t i = 0; i < unit_numel; i++) out[i] = (float)(param + 1);
  return 0;
}

static fsdp_engine_t *sharded(const job_t *job) {
  int64_t numel = unit_numel;
  const fsdp_tensor_t nothing = tensor_f32(NULL, 1, &numel);
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  CHECK_OK(fsdp_model_create("Root", &model));
  for (uint32_t i = 0; i < units; i++) {
    char name[16];
    uint32_t module = 0, param = 0;
    snprintf(name, sizeof name, "layer%u", (unsigned)i);
    CHECK_OK(fsdp_model_add_module(model, 0, name, "Layer", &module));
    CHECK_OK(fsdp_model_add_parameter(model, module, "weight", &nothing, 1, &param));
    CHECK_OK(fsdp_model_set_param_init(model, param, fill, NULL));
  }
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine));
  fsdp_model_destroy(model);
  return engine;
}

static fsdp_shard_t shard_of(const fsdp_engine_t *engine, uint32_t param) {
  fsdp_shard_t shard;
  CHECK_OK(fsdp_engine_shard(engine, param, &shard));
  return shard;
}

/* Fills a unit's bytes and copies this rank's out, once per unit. */
static void fill_and_copy(const job_t *job) {
  const size_t part = (size_t)(unit_numel / job->world);
  float *out = (float *)malloc(units * part * sizeof(float));
  CHECK(out != NULL);
  for (uint32_t unit = 0; unit < units; unit++) {
    float *whole = (float *)malloc((size_t)unit_numel * sizeof(float));
    CHECK(whole != NULL);
    fsdp_tensor_t tensor = tensor_f32(whole, 0, NULL);
    fill(unit, &tensor, NULL);
    memcpy(out + unit * part, whole + (size_t)job->rank * part, part * sizeof(float));
    free(whole);
  }
  CHECK(out[units * part - 1] == (float)units);
  free(out);
}

/* The shards' bytes to or from the file, in pieces; a written file is flushed. */
static void plain_file(const fsdp_engine_t *engine, const char *path, int writing) {
  const int file = open(path, writing ? O_WRONLY | O_CREAT | O_EXCL : O_RDONLY, 0600);
  CHECK(file >= 0);
  for (uint32_t param = 0; param < units; param++) {
    const fsdp_shard_t shard = shard_of(engine, param);
    char *at = (char *)shard.data, *end = at + shard.numel * (int64_t)sizeof(float);
    while (at < end) {
      const size_t most = end - at < CHUNK ? (size_t)(end - at) : CHUNK;
      const ssize_t done = writing ? write(file, at, most) : read(file, at, most);
      CHECK(done > 0);
      at += done;
    }
  }
  CHECK(!writing || fsync(file) == 0);
  CHECK(close(file) == 0);
}

/* Calls `what` with the path of each file in the folder. */
static void each_file(const char *folder, void (*what)(const char *path)) {
  DIR *dir = opendir(folder);
  CHECK(dir != NULL);
  for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
    char path[1024];
    if (entry->d_name[0] == '.') continue;
    CHECK(snprintf(path, sizeof path, "%s/%s", folder, entry->d_name) < (int)sizeof path);
    what(path);
  }
  closedir(dir);
}

static void drop(const char *path) {
  const int file = open(path, O_RDONLY);
  CHECK(file >= 0 && posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED) == 0 && close(file) == 0);
}

static void removed(const char *path) { CHECK(unlink(path) == 0); }

static void repetition(const job_t *job, const char *folder, int i) {
  char checkpoint[900], plain[900];
  double begin = 0;
  snprintf(checkpoint, sizeof checkpoint, "%s/checkpoint-%d", folder, i);
  snprintf(plain, sizeof plain, "%s/plain-%d-%d", folder, i, (int)job->rank);
#define TIMED(kind, call) \
  CHECK_OK(fsdp_comm_barrier(job->comm)); \
  begin = now_seconds(); \
  call; \
  times[kind][i] = now_seconds() - begin; \
  CHECK_OK(fsdp_comm_barrier(job->comm))
  fsdp_engine_t *engine = NULL;
  TIMED(COPY, fill_and_copy(job));
  TIMED(SHARD, engine = sharded(job));
  /* In turns, because a disk may be faster at first. */
  for (int pass = 0; pass < 2; pass++) {
    if (pass == i % 2) {
      TIMED(WRITE, plain_file(engine, plain, 1));
    } else {
      TIMED(SAVE, CHECK_OK(fsdp_checkpoint_save(engine, checkpoint, NULL, 0, NULL, 0)));
    }
  }
  for (int pass = 0; pass < 2; pass++) {
    drop(plain);
    if (job->rank == 0) each_file(checkpoint, drop);
    CHECK_OK(fsdp_engine_begin_write(engine));
    if (pass == i % 2) {
      TIMED(READ, plain_file(engine, plain, 0));
    } else {
      TIMED(LOAD, CHECK_OK(fsdp_checkpoint_load(engine, checkpoint, NULL, 0)));
    }
  }
#undef TIMED
  for (uint32_t param = 0; param < units; param++) {
    const fsdp_shard_t shard = shard_of(engine, param);
    CHECK(shard.data[0] == param + 1 && shard.data[shard.numel - 1] == param + 1);
  }
  fsdp_engine_destroy(engine);
  removed(plain);
  CHECK_OK(fsdp_comm_barrier(job->comm));
  if (job->rank == 0) {
    each_file(checkpoint, removed);
    CHECK(rmdir(checkpoint) == 0);
  }
}

int main(int argc, char **argv) {
  CHECK(argc == 4);
  const int wanted = atoi(argv[2]), count = atoi(argv[3]);
  CHECK(wanted >= 1 && wanted <= MOST_UNITS);
  units = (uint32_t)wanted;
  CHECK(count >= 1 && count <= MOST_REPETITIONS);
  const job_t job = join_job();
  for (int i = 0; i < count; i++) repetition(&job, argv[1], i);
  printf("{\"rows\": [");
  for (int kind = 0; kind < KINDS; kind++) {
    printf("%s{\"setup\": \"%s\", \"bytes\": %lld, \"times\": [", kind == 0 ? "" : ", ", names[kind],
           (long long)units * unit_numel * 4);
    for (int i = 0; i < count; i++) printf("%s%.6f", i == 0 ? "" : ", ", times[kind][i]);
    printf("]}");
  }
  printf("]}\n");
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
