/* A 1 GiB model without storage: while it is sharded, at most one unit's full parameters are in a
 * rank's private memory at a time, besides the one copy that all ranks share. By the engine's own
 * count, exactly, and by the kernel's: rank 0 adds up the ranks' proportional set sizes while all
 * of them work. The argument is the size of a unit in MiB, 64 if there is none.
 *
 * Breaks: two_units_at_once. */
#include "ranks.h"
#include "scenario.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

enum { UNITS = 16, MAX_RANKS = 16 };

static int64_t unit_numel;
static uint64_t unit_bytes;

/* Per rank, beyond what the model needs: control pages, page tables' rounding, output buffers. */
#define SLACK_BYTES ((uint64_t)4 << 20)

static const double MIB = 1 << 20;

/* A field of /proc/PID/FILE in bytes, 0 if the process or the field is not there. */
static uint64_t proc_bytes(int64_t pid, const char *file, const char *field) {
  char path[64], line[256];
  uint64_t bytes = 0;
  snprintf(path, sizeof path, "/proc/%lld/%s", (long long)pid, file);
  FILE *f = fopen(path, "r");
  if (f == NULL) return 0;
  while (fgets(line, sizeof line, f) != NULL) {
    unsigned long long kib;
    const size_t length = strlen(field);
    if (strncmp(line, field, length) == 0 && line[length] == ':' &&
        sscanf(line + length + 1, "%llu", &kib) == 1)
      bytes = (uint64_t)kib * 1024;
  }
  fclose(f);
  return bytes;
}

/* ---- rank 0 watches ---- */

static struct {
  int64_t pids[MAX_RANKS];
  int32_t world;
  atomic_int stop;
  uint64_t peak;
  int samples;
} watch;

static uint64_t pss_of_all(void) {
  uint64_t sum = 0;
  for (int32_t r = 0; r < watch.world; r++) sum += proc_bytes(watch.pids[r], "smaps_rollup", "Pss");
  return sum;
}

static void *watch_main(void *unused) {
  (void)unused;
  int last;
  do {
    last = atomic_load(&watch.stop);
    const uint64_t sum = pss_of_all();
    if (sum > watch.peak) watch.peak = sum;
    watch.samples++;
    sleep_ms(10);
  } while (!last);
  return NULL;
}

/* ---- the model ---- */

static struct {
  uint64_t before, peak;
  int calls;
} own;

static float value_of(uint32_t param, int64_t i) { return (float)(param + 1) + (float)(i & 1023); }

static int32_t init_layer(const fsdp_module_init_t *module, void *unused) {
  (void)unused;
  for (uint32_t p = 0; p < module->param_count; p++) {
    float *data = (float *)module->tensors[p].data;
    for (int64_t i = 0; i < unit_numel; i++) data[i] = value_of(module->params[p], i);
  }
  const uint64_t now = proc_bytes(getpid(), "status", "RssAnon");
  if (now > own.peak) own.peak = now;
  own.calls++;
  return 0;
}

static fsdp_model_t *make_model(void) {
  fsdp_model_t *model = NULL;
  int64_t shape = unit_numel;
  CHECK_OK(fsdp_model_create("Stack", &model));
  for (uint32_t u = 0; u < UNITS; u++) {
    char name[16];
    uint32_t module = 0, param = 0;
    fsdp_tensor_t t = tensor_f32(NULL, 1, &shape);
    snprintf(name, sizeof name, "layer%u", (unsigned)u);
    CHECK_OK(fsdp_model_add_module(model, 0, name, "Layer", &module));
    CHECK_OK(fsdp_model_add_parameter(model, module, "weight", &t, 1, &param));
    CHECK_OK(fsdp_model_set_reset(model, module, init_layer, NULL));
    /* With the break, the last two are left to the root together. */
    if (u < UNITS - 2 || !broken("two_units_at_once"))
      CHECK_OK(fsdp_model_wrap_module(model, module));
  }
  return model;
}

int main(int argc, char **argv) {
  const int64_t unit_mib = argc > 1 ? atoi(argv[1]) : 64;
  CHECK(unit_mib > 0);
  unit_bytes = (uint64_t)unit_mib << 20;
  unit_numel = unit_mib << 18;
  const job_t job = join_job();
  CHECK(job.world <= MAX_RANKS);
  int64_t pid = getpid(), one = 1, world = job.world;
  fsdp_tensor_t mine = tensor_of(&pid, 1, &one, FSDP_DTYPE_INT, 64);
  fsdp_tensor_t every = tensor_of(watch.pids, 1, &world, FSDP_DTYPE_INT, 64);
  CHECK_OK(fsdp_comm_all_gather(job.comm, &mine, &every));
  watch.world = job.world;
  const uint64_t model_bytes = UNITS * unit_bytes;
  own.before = proc_bytes(getpid(), "status", "RssAnon");
  const uint64_t before = job.rank == 0 ? pss_of_all() : 0;
  CHECK_OK(fsdp_comm_barrier(job.comm));

  pthread_t thread;
  if (job.rank == 0) CHECK(pthread_create(&thread, NULL, watch_main, NULL) == 0);
  fsdp_model_t *model = make_model();
  fsdp_engine_t *engine = NULL;
  CHECK_OK(fsdp_engine_create(model, job.comm, NULL, &engine));
  fsdp_model_destroy(model);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  if (job.rank == 0) {
    atomic_store(&watch.stop, 1);
    CHECK(pthread_join(thread, NULL) == 0);
    const uint64_t peak = watch.peak - before;
    printf(
        "model %.0f MiB without storage, %d units of %.0f MiB, %d ranks: peak of all ranks "
        "together "
        "%.1f MiB (%d samples), of rank 0's own memory %.1f MiB\n",
        (double)model_bytes / MIB, (int)UNITS, (double)unit_bytes / MIB, (int)job.world,
        (double)peak / MIB, watch.samples, (double)(own.peak - own.before) / MIB);
    fflush(stdout);
    CHECK(before > 0);
    /* One shared copy, and a unit for each rank. */
    CHECK(peak <= model_bytes + (uint64_t)job.world * (unit_bytes + SLACK_BYTES));
    /* The measure saw the model: what else processes share varies by a few pages between samples. */
    CHECK(peak + SLACK_BYTES >= model_bytes);
  }
  CHECK_EQ(own.calls, UNITS);
  CHECK_EQ(stats_of(engine).materialized_peak_bytes, unit_bytes);
  /* At world size 1 the shards are private memory too. */
  if (job.world > 1) CHECK(own.peak - own.before <= unit_bytes + SLACK_BYTES);
  CHECK(own.peak - own.before >= unit_bytes);

  /* The values are there, in every rank's shards. */
  for (uint32_t u = 0; u < UNITS; u++) {
    fsdp_param_info_t info = param_info_init();
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_param_info(engine, u, &info));
    CHECK_OK(fsdp_engine_shard(engine, u, &shard));
    for (int64_t i = 0; i < shard.numel; i += 997)
      CHECK(shard.data[i] == value_of(u, info.shard_offset + i));
  }
  fsdp_engine_destroy(engine);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
