/* Where a model's bytes are once it is sharded: one copy on the host, in memory that the ranks
 * share; nothing of it in a rank's own memory but the gradient shards; and nothing named in a file
 * system. Reads the kernel's account of this process. */
#include "ranks.h"

enum { LAYERS = 4, WIDTH = 2 << 20 }; /* 4 units of 8 MiB */

static const double MIB = 1 << 20;

/* The kilobytes that /proc/self/FILE gives for `field`, as bytes. With `mapping`, only lines below
 * a mapping whose header contains it count, and they are added up. */
static double proc_bytes(const char *file, const char *mapping, const char *field) {
  char path[64], line[512];
  double sum = 0;
  int inside = mapping == NULL;
  snprintf(path, sizeof path, "/proc/self/%s", file);
  FILE *f = fopen(path, "r");
  CHECK(f != NULL);
  while (fgets(line, sizeof line, f) != NULL) {
    long kib;
    const size_t length = strlen(field);
    /* A mapping's header begins with its addresses. */
    if (mapping != NULL && strchr(line, '-') != NULL && strchr(line, '-') < line + 17)
      inside = strstr(line, mapping) != NULL;
    if (inside && strncmp(line, field, length) == 0 && line[length] == ':' &&
        sscanf(line + length + 1, "%ld", &kib) == 1)
      sum += (double)kib * 1024;
  }
  fclose(f);
  return sum;
}

static double sum_of_ranks(const job_t *job, double value) {
  int64_t one = 1;
  fsdp_tensor_t t = tensor_of(&value, 1, &one, FSDP_DTYPE_FLOAT, 64);
  CHECK_OK(fsdp_comm_all_reduce(job->comm, &t, FSDP_REDUCE_SUM));
  return value;
}

static fsdp_engine_t *shard_model(const job_t *job) {
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  float *values[LAYERS];
  int64_t width = WIDTH;
  CHECK_OK(fsdp_model_create("Stack", &model));
  for (uint32_t l = 0; l < LAYERS; l++) {
    char name[16];
    uint32_t module = 0, param = 0;
    values[l] = (float *)malloc(sizeof(float) * WIDTH);
    CHECK(values[l] != NULL);
    for (int64_t i = 0; i < WIDTH; i++) values[l][i] = (float)l;
    fsdp_tensor_t t = tensor_f32(values[l], 1, &width);
    snprintf(name, sizeof name, "layer%u", (unsigned)l);
    CHECK_OK(fsdp_model_add_module(model, 0, name, "Layer", &module));
    CHECK_OK(fsdp_model_add_parameter(model, module, "weight", &t, 1, &param));
  }
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine));
  fsdp_model_destroy(model);
  for (uint32_t l = 0; l < LAYERS; l++) free(values[l]);
  return engine;
}

int main(void) {
  job_t job = join_job();
  const double model_bytes = (double)LAYERS * WIDTH * sizeof(float), slack = MIB;
  const double before = proc_bytes("status", NULL, "RssAnon");
  fsdp_engine_t *engine = shard_model(&job);

  /* Read every full parameter on every rank. */
  double total = 0;
  CHECK_OK(fsdp_engine_set_grad_enabled(engine, 0));
  CHECK_OK(fsdp_engine_pre_forward(engine, 0));
  for (uint32_t l = 0; l < LAYERS; l++) {
    fsdp_tensor_t t;
    CHECK_OK(fsdp_engine_pre_forward(engine, l + 1));
    CHECK_OK(fsdp_engine_param_data(engine, l, &t));
    for (int64_t i = 0; i < WIDTH; i++) total += ((const float *)t.data)[i];
    CHECK_OK(fsdp_engine_post_forward(engine, l + 1));
  }
  CHECK_OK(fsdp_engine_post_forward(engine, 0));
  CHECK(total == (double)WIDTH * (LAYERS * (LAYERS - 1) / 2));

  /* A barrier on each side: no rank maps or frees anything meanwhile. */
  CHECK_OK(fsdp_comm_barrier(job.comm));
  const char *shared = job.world == 1 ? "[anon" : "memfd:fsdp";
  const double own = proc_bytes("status", NULL, "RssAnon") - before;
  const double pss = job.world == 1 ? own : proc_bytes("smaps", shared, "Pss");
  CHECK_OK(fsdp_comm_barrier(job.comm));
  const double host = sum_of_ranks(&job, pss);
  if (job.rank == 0) {
    printf("model %.1f MiB; shared by all ranks together %.1f MiB; own memory of rank 0 %.1f MiB\n",
           model_bytes / MIB, host / MIB, own / MIB);
  }
  /* All of it was read by every rank, and it is there once. (Control pages are within the slack.) */
  CHECK(host >= model_bytes);
  CHECK(host <= model_bytes + job.world * slack);
  if (job.world > 1) CHECK(own <= slack);
  /* By the written formula. */
  const fsdp_stats_t stats = stats_of(engine);
  CHECK(stats.unit_buffer_bytes >= (uint64_t)job.world * stats.param_shard_bytes);
  CHECK(stats.unit_buffer_bytes < (uint64_t)job.world * stats.param_shard_bytes + LAYERS * 64);
  CHECK(stats.param_shard_bytes >= model_bytes / job.world);
  CHECK(stats.param_shard_bytes <= model_bytes / job.world + LAYERS * 16);

  fsdp_engine_destroy(engine);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  const double left = job.world == 1 ? 0 : proc_bytes("smaps", shared, "Pss");
  CHECK(left <= slack);
  fsdp_comm_destroy(job.comm);
  return 0;
}
