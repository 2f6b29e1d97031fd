/* Ranks whose models differ: every rank gets FSDP_ERR_MISMATCH with a message that names the first
 * difference, and the communicator works on. The last rank is the one that differs. */
#include "ranks.h"

typedef enum { SAME, SHAPE, NAME, FEWER, FROZEN, WRAPPED, SLOTS, CLASS_NAME } difference_t;

static fsdp_status_t create(const job_t *job, difference_t difference, fsdp_engine_t **out) {
  static float values[64];
  const int other = job->rank == job->world - 1;
  const char *names[3] = {"first", "second", "third"};
  int64_t shape[2] = {6, 7};
  fsdp_model_t *model = NULL;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  uint32_t number = 0;
  CHECK_OK(fsdp_model_create("Net", &model));
  for (int i = 0; i < 3; i++) {
    fsdp_tensor_t t = tensor_f32(values, 2, shape);
    int64_t other_shape[2] = {7, 6};
    if (other && difference == FEWER && i == 2) break;
    if (other && difference == SHAPE && i == 1) t.shape = other_shape;
    if (other && difference == NAME && i == 1) names[1] = "zweiter";
    const char *class_name = other && difference == CLASS_NAME && i == 1 ? "Linear" : "Layer";
    CHECK_OK(fsdp_model_add_module(model, 0, names[i], class_name, &number));
    const int32_t trained = !(other && difference == FROZEN && i == 1);
    CHECK_OK(fsdp_model_add_parameter(model, number, "weight", &t, trained, &number));
  }
  CHECK_OK(fsdp_model_wrap_module(model, 1));
  if (!(other && difference == WRAPPED)) CHECK_OK(fsdp_model_wrap_module(model, 2));
  if (other && difference == SLOTS) config.gradient_slots = 7;
  const fsdp_status_t status = fsdp_engine_create(model, job->comm, &config, out);
  fsdp_model_destroy(model);
  return status;
}

static void check(const job_t *job, difference_t difference, const char *name, const char *text) {
  fsdp_engine_t *engine = NULL;
  char other[32];
  test_context(name);
  snprintf(other, sizeof other, "rank %d", (int)job->world - 1);
  CHECK_ERR(create(job, difference, &engine), FSDP_ERR_MISMATCH, text);
  CHECK(strstr(fsdp_last_error_message(), other) != NULL);
  CHECK(engine == NULL);
  CHECK_OK(fsdp_comm_barrier(job->comm));
  CHECK_OK(fsdp_comm_async_error(job->comm));
}

int main(void) {
  job_t job = join_job();
  fsdp_engine_t *engine = NULL;
  CHECK(job.world > 1);
  check(&job, SHAPE, "shape", "\"second.weight\" of shape [7, 6]");
  check(&job, NAME, "name", "\"zweiter.weight\"");
  check(&job, FEWER, "fewer parameters", "\"third.weight\"");
  check(&job, FROZEN, "frozen", "\"second.weight\"");
  check(&job, WRAPPED, "wrapped", "\"second.weight\"");
  check(&job, SLOTS, "gradient_slots", "gradient_slots");
  check(&job, CLASS_NAME, "class", "Linear");
  test_context("the same model");
  CHECK_OK(create(&job, SAME, &engine));
  CHECK_OK(fsdp_engine_pre_forward(engine, 0));
  CHECK_OK(fsdp_engine_post_forward(engine, 0));
  CHECK_OK(fsdp_engine_begin_write(engine));
  fsdp_engine_destroy(engine);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
