/* Engines on a GPU, on a machine without CUDA's driver (made so here): what is refused, and that a clear error is all that
 * is left. */
#include "toy.h"

#include <stdlib.h>

static void *no_memory(void *user_data, size_t bytes, void *stream) {
  (void)user_data, (void)bytes, (void)stream;
  return NULL;
}

static void give_back(void *user_data, void *memory, size_t bytes, void *stream) {
  (void)user_data, (void)memory, (void)bytes, (void)stream;
}

static void expect(const fsdp_cuda_config_t *cuda, fsdp_status_t status, const char *text) {
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_engine_t *engine = NULL;
  fsdp_comm_t *comm = NULL;
  fsdp_model_t *model = toy_model();
  config.cuda = cuda;
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_ERR(fsdp_engine_create(model, comm, &config, &engine), status, text);
  CHECK(engine == NULL);
  /* Nothing is broken by that. */
  config.cuda = NULL;
  CHECK_OK(fsdp_engine_create(model, comm, &config, &engine));
  fsdp_engine_destroy(engine);
  fsdp_model_destroy(model);
  fsdp_comm_destroy(comm);
}

static void configs(void) {
  const fsdp_cuda_config_t good = FSDP_CUDA_CONFIG_INIT;
  fsdp_cuda_config_t cuda = good;
  int something = 0;
  expect(&good, FSDP_ERR_UNSUPPORTED, "/nonexistent/libcuda.so.1");
  expect(&good, FSDP_ERR_UNSUPPORTED, "GPU 0 cannot be used");
  cuda.struct_size = 8;
  expect(&cuda, FSDP_ERR_INVALID_ARGUMENT, "fsdp_cuda_config_t.struct_size");
  cuda = good, cuda.device = -1;
  expect(&cuda, FSDP_ERR_INVALID_ARGUMENT, "fsdp_cuda_config_t.device cannot be -1");
  cuda = good, cuda.timeout_ms = -5;
  expect(&cuda, FSDP_ERR_INVALID_ARGUMENT, "timeout_ms cannot be -5");
  cuda = good, cuda.alloc = no_memory;
  expect(&cuda, FSDP_ERR_INVALID_ARGUMENT, "alloc and free");
  cuda = good, cuda.free = give_back;
  expect(&cuda, FSDP_ERR_INVALID_ARGUMENT, "alloc and free");
  cuda = good, cuda.allocator_user_data = &something;
  expect(&cuda, FSDP_ERR_INVALID_ARGUMENT, "allocator_user_data is set");
  cuda = good, cuda.registered_buffers = 3;
  expect(&cuda, FSDP_ERR_INVALID_ARGUMENT, "fsdp_cuda_config_t.registered_buffers cannot be 3");
  cuda = good, cuda.registered_buffers = FSDP_REGISTERED_BUFFERS_ALWAYS;
  expect(&cuda, FSDP_ERR_UNSUPPORTED, "/nonexistent/libcuda.so.1");
}

/* A parameter on a GPU and an engine on the CPU. */
static void parameters(void) {
  int64_t shape = 3;
  float values[3] = {1, 2, 3};
  fsdp_tensor_t tensor = tensor_f32(values, 1, &shape);
  fsdp_model_t *model = NULL;
  fsdp_comm_t *comm = NULL;
  fsdp_engine_t *engine = NULL;
  uint32_t param = 0;
  CHECK_OK(fsdp_model_create("Net", &model));
  tensor.device.device_type = 7;
  CHECK_ERR(fsdp_model_add_parameter(model, 0, "w", &tensor, 1, &param), FSDP_ERR_UNSUPPORTED, "type 7");
  tensor.device.device_type = FSDP_DEVICE_CUDA;
  tensor.device.device_id = -1;
  CHECK_ERR(fsdp_model_add_parameter(model, 0, "w", &tensor, 1, &param), FSDP_ERR_UNSUPPORTED, "number -1");
  tensor.device.device_id = 2;
  CHECK_OK(fsdp_model_add_parameter(model, 0, "w", &tensor, 1, &param));
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_ERR(fsdp_engine_create(model, comm, NULL, &engine), FSDP_ERR_INVALID_ARGUMENT,
            "parameter \"w\" lies on GPU 2, but the engine computes on the CPU");
  fsdp_model_destroy(model);
  fsdp_comm_destroy(comm);
}

/* What an engine on the CPU says about streams. */
static void on_the_cpu(void) {
  toy_t toy = toy_create();
  fsdp_cuda_stats_t stats;
  memset(&stats, 0x5a, sizeof stats);
  stats.struct_size = sizeof stats;
  CHECK_ERR(fsdp_engine_set_compute_stream(toy.engine, NULL), FSDP_ERR_UNSUPPORTED, "on the CPU");
  CHECK_ERR(fsdp_engine_cuda_stats(toy.engine, &stats), FSDP_ERR_UNSUPPORTED, "on the CPU");
  CHECK(stats.pool_bytes == 0x5a5a5a5a5a5a5a5aull);
  CHECK_OK(fsdp_engine_synchronize(toy.engine));
  CHECK_OK(fsdp_engine_async_error(toy.engine));
  CHECK_OK(fsdp_comm_abort(toy.comm, "enough"));
  CHECK_ERR(fsdp_engine_async_error(toy.engine), FSDP_ERR_ABORTED, "enough");
  toy_destroy(toy);
  CHECK_BAD_ENGINES(fsdp_engine_set_compute_stream(engine, NULL));
  CHECK_BAD_ENGINES(fsdp_engine_synchronize(engine));
  CHECK_BAD_ENGINES(fsdp_engine_async_error(engine));
  CHECK_BAD_ENGINES(fsdp_engine_cuda_stats(engine, &stats));
}

int main(void) {
  CHECK(setenv("FSDP_CUDA_LIBRARY", "/nonexistent/libcuda.so.1", 1) == 0);
  configs();
  parameters();
  on_the_cpu();
  return 0;
}
