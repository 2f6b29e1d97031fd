/* What the engine's hooks cost where nothing is communicated: world size 1, a stack of many units of two small parameters.
 *
 *   hooks UNITS ITERATIONS   prints {"forward_ns", "backward_ns"}: medians over the iterations of the time per unit of
 *                            pre_forward and post_forward, and of pre_backward, two fsdp_engine_param_grad, the writing of
 *                            272 floats, and post_backward, which reduces
 *
 * The test feature_instructions counts its instructions. */
#include "../../capi_tests/ranks.h"

/* Without what CHECK_OK asks besides. */
#define MUST(call) \
  do { \
    if ((call) != FSDP_OK) test_fail(__FILE__, __LINE__, "%s failed", #call); \
  } while (0)

enum { WIDTH = 16, MOST_UNITS = 10000, MOST_ITERATIONS = 100000 };

/* `units` modules, each a unit with "weight" [16, 16] and "bias" [16], as the model tiny200 has. */
static fsdp_engine_t *tiny_engine(fsdp_comm_t *comm, uint32_t units) {
  static float values[WIDTH * WIDTH];
  int64_t weight[2] = {WIDTH, WIDTH}, bias[1] = {WIDTH};
  const fsdp_tensor_t tensors[2] = {tensor_f32(values, 2, weight), tensor_f32(values, 1, bias)};
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  CHECK_OK(fsdp_model_create("Tiny", &model));
  for (uint32_t i = 0; i < units; i++) {
    char name[24];
    uint32_t module = 0, param = 0;
    snprintf(name, sizeof name, "layer%u", (unsigned)i);
    CHECK_OK(fsdp_model_add_module(model, 0, name, "Linear", &module));
    CHECK_OK(fsdp_model_add_parameter(model, module, "weight", &tensors[0], 1, &param));
    CHECK_OK(fsdp_model_add_parameter(model, module, "bias", &tensors[1], 1, &param));
  }
  CHECK_OK(fsdp_model_wrap_class(model, "Linear"));
  CHECK_OK(fsdp_engine_create(model, comm, NULL, &engine));
  fsdp_model_destroy(model);
  return engine;
}

/* Not inlined, so that an instruction counter can tell the two from the rest. */
__attribute__((noinline)) static void forward(fsdp_engine_t *engine, uint32_t units) {
  for (uint32_t unit = 1; unit <= units; unit++) {
    MUST(fsdp_engine_pre_forward(engine, unit));
    MUST(fsdp_engine_post_forward(engine, unit));
  }
}

__attribute__((noinline)) static void backward(fsdp_engine_t *engine, uint32_t units) {
  for (uint32_t unit = units; unit >= 1; unit--) {
    MUST(fsdp_engine_pre_backward(engine, unit));
    for (uint32_t param = 2 * unit - 2; param < 2 * unit; param++) {
      fsdp_tensor_t grad;
      int32_t accumulate = 0;
      MUST(fsdp_engine_param_grad(engine, param, &grad, &accumulate));
      memset(grad.data, 0, sizeof(float) * WIDTH * (size_t)(param % 2 == 0 ? WIDTH : 1));
    }
    MUST(fsdp_engine_post_backward(engine, unit));
  }
}

static int compare(const void *a, const void *b) {
  const double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *values, int count) {
  qsort(values, (size_t)count, sizeof *values, compare);
  return (values[(count - 1) / 2] + values[count / 2]) / 2;
}

int main(int argc, char **argv) {
  static double forwards[MOST_ITERATIONS], backwards[MOST_ITERATIONS];
  CHECK(argc == 3);
  const int units = atoi(argv[1]), iterations = atoi(argv[2]);
  CHECK(units >= 1 && units <= MOST_UNITS && iterations >= 1 && iterations <= MOST_ITERATIONS);
  fsdp_comm_t *comm = NULL;
  CHECK_OK(fsdp_comm_init_single(&comm));
  fsdp_engine_t *engine = tiny_engine(comm, (uint32_t)units);
  for (int i = 0; i < iterations; i++) {
    CHECK_OK(fsdp_engine_zero_grad(engine));
    CHECK_OK(fsdp_engine_pre_forward(engine, 0));
    const double begin = now_seconds();
    forward(engine, (uint32_t)units);
    const double middle = now_seconds();
    CHECK_OK(fsdp_engine_post_forward(engine, 0));
    CHECK_OK(fsdp_engine_pre_backward(engine, 0));
    const double third = now_seconds();
    backward(engine, (uint32_t)units);
    const double end = now_seconds();
    CHECK_OK(fsdp_engine_post_backward(engine, 0));
    forwards[i] = middle - begin;
    backwards[i] = end - third;
  }
  CHECK_EQ(stats_of(engine).reduce_scatters, (long long)units * iterations);
  printf("{\"forward_ns\": %.1f, \"backward_ns\": %.1f}\n", median(forwards, iterations) / units * 1e9,
         median(backwards, iterations) / units * 1e9);
  fsdp_engine_destroy(engine);
  fsdp_comm_destroy(comm);
  return 0;
}
