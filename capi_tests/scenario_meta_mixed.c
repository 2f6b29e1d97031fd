/* A model without storage whose gradients are reduced as float16: each rank's are rounded once, and
 * their sum and the parameters stay float32. An init function that knows one class of two leaves a
 * parameter without values, which is an error that names it.
 *
 * Breaks: reduced_as_float32, no_average. */
#include "ranks.h"
#include "scenario_host.h"
#include "scenario_layers.h"

enum { BATCH = 10, N = 5, LIN1 = 1 };

static const host_module_t MODULE[] = {
    {0, "", "Model"}, {0, "lin1", "Linear"}, {0, "lin2", "FakeLinear"}};
static const host_param_t PARAM[] = {
    {1, "weight", 2, {5, 5}, 1}, {1, "bias", 1, {5, 0}, 1}, {2, "weight", 2, {5, 5}, 1}};

static const host_spec_t SPEC = {3, 3, MODULE, PARAM};

/* The nearest float16, ties to even. */
static float round_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const float magnitude = fabsf(value);
  CHECK(magnitude < 65520.0f);
  if (magnitude < 6.103515625e-5f) {
    /* Subnormal: multiples of 2^-24. */
    const float step = ldexpf(1, -24);
    return copysignf(rintf(magnitude / step) * step, value);
  }
  bits += 0xfffu + ((bits >> 13) & 1);
  bits &= ~0x1fffu;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

static int32_t init_all(const fsdp_module_init_t *module, void *user_data) {
  float *const *values = (float *const *)user_data;
  for (uint32_t i = 0; i < module->param_count; i++) {
    int64_t n = 1;
    for (int32_t d = 0; d < module->tensors[i].ndim; d++) n *= module->tensors[i].shape[d];
    memcpy(module->tensors[i].data, values[module->params[i]], sizeof(float) * (size_t)n);
  }
  return 0;
}

/* Knows the class "Linear" only, as the function in PyTorch's test. */
static int32_t linear_init(const fsdp_module_init_t *module, void *user_data) {
  return strcmp(module->class_name, "Linear") == 0 ? init_all(module, user_data) : 0;
}

/* relu(lin1(x)) @ lin2.weight */
static void pass(host_t *host, const float *x) {
  float z[BATCH * N], dy[BATCH * N], dz[BATCH * N], dw[N * N], transposed[N * N], db[N];
  host_enter(host, 0, 0);
  host_enter(host, LIN1, 0);
  linear(z, x, host_param(host, 0), host_param(host, 1), BATCH, N, N);
  host_leave(host, LIN1, 0);
  relu(z, z, BATCH * N);
  host_leave(host, 0, 0);
  fill(dy, 1, BATCH * N);
  host_enter(host, 0, 1);
  /* y = z W is linear with W^T. */
  transpose(transposed, host_param(host, 2), N);
  linear_grad(dy, z, transposed, BATCH, N, N, dz, dw, NULL);
  transpose(transposed, dw, N);
  host_add_grad(host, 2, transposed);
  relu_grad(dz, dz, z, BATCH * N);
  host_enter(host, LIN1, 1);
  linear_grad(dz, x, NULL, BATCH, N, N, NULL, dw, db);
  host_add_grad(host, 0, dw);
  host_add_grad(host, 1, db);
  host_leave(host, LIN1, 1);
  host_leave(host, 0, 1);
}

static void train(const job_t *job, const safetensors_t *file, int half) {
  static host_t sharded, reference;
  fsdp_engine_t *engine = NULL;
  test_context(half ? "reduce_dtype float16" : "reduce_dtype float32");
  float *const *values = host_values(&SPEC, file, "mixed.initial");
  fsdp_model_t *model = host_model(&SPEC, NULL);
  CHECK_OK(fsdp_model_wrap_class(model, "Linear"));
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  config.param_init_user_data = (void *)(uintptr_t)values;
  if (half && !broken("reduced_as_float32")) {
    config.reduce_dtype.code = FSDP_DTYPE_FLOAT;
    config.reduce_dtype.bits = 16;
    config.reduce_dtype.lanes = 1;
  }
  /* PyTorch's own test trains on whatever memory the second layer found. */
  config.param_init_fn = linear_init;
  CHECK_ERR(fsdp_engine_create(model, job->comm, &config, &engine), FSDP_ERR_INVALID_STATE,
            "\"lin2.weight\" was left uninitialized");
  config.param_init_fn = init_all;
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &engine));
  fsdp_model_destroy(model);
  host_sharded(&sharded, &SPEC, engine, job->comm, 0, 0);
  host_reference(&reference, &SPEC, values, job->world);
  reference.round = half ? round_to_half : NULL;
  host_check_file(&sharded, file, "mixed.initial", 0);
  const float *x = scenario_f32(file, "mixed.input", 3, job->world, BATCH, N, 0);
  pass(&sharded, x + job->rank * BATCH * N);
  for (int32_t r = 0; r < job->world; r++) {
    reference.rank = r;
    pass(&reference, x + r * BATCH * N);
  }
  host_reduce(&reference);
  host_check_shards(&sharded, &reference, "gradients");
  /* PyTorch also sums in float16: twice its relative error, 2^-11, for each of up to 4 ranks. */
  host_check_grads(&sharded, job->comm, file, half ? "mixed.grad16" : "mixed.grad32",
                   half ? 4.0 / 1024 : 1e-6);
  host_sgd(&sharded, 1e-3f);
  if (half) host_check_file(&sharded, file, "mixed.trained", 4.0 / 1024);
  fsdp_engine_destroy(engine);
}

int main(void) {
  const job_t job = join_job();
  safetensors_t *file = scenario_open("meta", job.world);
  train(&job, file, 1);
  train(&job, file, 0);
  safetensors_close(file);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
