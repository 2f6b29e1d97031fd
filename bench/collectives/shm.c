/* This engine's collectives on shared memory, one rank: "shm" is what training does, a unit's unshard and the reduction of
 * its gradients from the slot to the shards; "shm_host" is fsdp_comm_all_gather and fsdp_comm_reduce_scatter of memory that
 * belongs to the caller. */
#include "../../capi_tests/ranks.h"
#include "rows.h"

static int rows_printed = 0;

static fsdp_dtype_t dtype_of(const element_t *element) {
  const fsdp_dtype_t f32 = {FSDP_DTYPE_FLOAT, 32, 1}, bf16 = {FSDP_DTYPE_BFLOAT, 16, 1};
  return element->bytes == 4 ? f32 : bf16;
}

static void print(const char *collective, const element_t *element, int64_t bytes, const char *system,
                  const double *times, int count) {
  print_row(rows_printed++ == 0, collective, element->name, bytes, system, times + WARM_UP, count);
}

/* A model of one unit below the root, with one parameter of `bytes` in its compute dtype. */
static fsdp_engine_t *engine_of(const job_t *job, const element_t *element, int64_t bytes) {
  int64_t numel = bytes / element->bytes;
  void *values = filled(numel * 4);
  fsdp_tensor_t tensor = tensor_f32(values, 1, &numel);
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  uint32_t module = 0, param = 0;
  CHECK_OK(fsdp_model_create("Root", &model));
  CHECK_OK(fsdp_model_add_module(model, 0, "layer", "Layer", &module));
  CHECK_OK(fsdp_model_add_parameter(model, module, "weight", &tensor, 1, &param));
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  config.param_dtype = dtype_of(element);
  config.reduce_dtype = dtype_of(element);
  config.grads_in_param_dtype = 1;
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &engine));
  fsdp_model_destroy(model);
  free(values);
  return engine;
}

/* Writes the gradient of the parameter as a backward in its dtype does: `value` everywhere, exact in bfloat16. */
static void write_grad(fsdp_engine_t *engine, const element_t *element, float value) {
  fsdp_tensor_t out;
  int32_t accumulate = 0;
  CHECK_OK(fsdp_engine_param_grad(engine, 0, &out, &accumulate));
  CHECK(!accumulate && out.dtype.bits == 8 * element->bytes);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  for (int64_t i = 0; i < out.shape[0]; i++) {
    if (element->bytes == 4) ((float *)out.data)[i] = value;
    else ((uint16_t *)out.data)[i] = (uint16_t)(bits >> 16);
  }
}

static void unit_path(const job_t *job, const element_t *element, int64_t bytes, int count) {
  double gather[MOST_TIMES + WARM_UP], reduce[MOST_TIMES + WARM_UP];
  fsdp_engine_t *engine = engine_of(job, element, bytes);
  for (int i = 0; i < count + WARM_UP; i++) {
    void *buffer = NULL;
    CHECK_OK(fsdp_comm_barrier(job->comm));
    double begin = begin_together();
    CHECK_OK(fsdp_engine_begin_forward(engine, 1));
    CHECK_OK(fsdp_engine_unshard(engine, 1, &buffer));
    gather[i] = seconds_now() - begin;
    CHECK_OK(fsdp_engine_reshard(engine, 1));
    CHECK_OK(fsdp_engine_end_forward(engine));
    CHECK_OK(fsdp_engine_unshard(engine, 1, &buffer));
    write_grad(engine, element, (float)(job->rank + 1));
    CHECK_OK(fsdp_comm_barrier(job->comm));
    begin = begin_together();
    CHECK_OK(fsdp_engine_reduce(engine, 1));
    CHECK_OK(fsdp_engine_reshard(engine, 1));
    CHECK_OK(fsdp_engine_finish_backward(engine));
    reduce[i] = seconds_now() - begin;
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_shard(engine, 0, &shard));
    CHECK(shard.grad != NULL && shard.grad[shard.numel - 1] == (float)(job->world + 1) / 2);
    CHECK_OK(fsdp_engine_zero_grad(engine));
  }
  print("all_gather", element, bytes, "shm", gather, count);
  print("reduce_scatter", element, bytes, "shm", reduce, count);
  fsdp_engine_destroy(engine);
}

static void host_path(const job_t *job, const element_t *element, int64_t bytes, int count) {
  double gather[MOST_TIMES + WARM_UP], reduce[MOST_TIMES + WARM_UP];
  int64_t whole = bytes / element->bytes, part = whole / job->world;
  void *large = filled(bytes), *small = filled(bytes / job->world);
  const fsdp_dtype_t dtype = dtype_of(element);
  const fsdp_tensor_t all = tensor_of(large, 1, &whole, dtype.code, dtype.bits);
  const fsdp_tensor_t mine = tensor_of(small, 1, &part, dtype.code, dtype.bits);
  for (int i = 0; i < count + WARM_UP; i++) {
    CHECK_OK(fsdp_comm_barrier(job->comm));
    double begin = begin_together();
    CHECK_OK(fsdp_comm_all_gather(job->comm, &mine, &all));
    gather[i] = seconds_now() - begin;
    CHECK_OK(fsdp_comm_barrier(job->comm));
    begin = begin_together();
    CHECK_OK(fsdp_comm_reduce_scatter(job->comm, &all, &mine, FSDP_REDUCE_SUM));
    reduce[i] = seconds_now() - begin;
  }
  print("all_gather", element, bytes, "shm_host", gather, count);
  print("reduce_scatter", element, bytes, "shm_host", reduce, count);
  free(large);
  free(small);
}

int main(int argc, char **argv) {
  const int large = large_repetitions(argc, argv);
  const job_t job = join_job();
  printf("{\"rows\": [");
  for (int e = 0; e < 2; e++) {
    for (int s = 0; s < SIZES; s++) {
      unit_path(&job, &elements[e], sizes[s], repetitions(large, sizes[s]));
      host_path(&job, &elements[e], sizes[s], repetitions(large, sizes[s]));
    }
  }
  printf("]}\n");
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
