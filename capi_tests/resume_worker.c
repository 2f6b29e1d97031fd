/* A trainer for feature_resume.py: two layers with gradients by hand, the engine's AdamW, and 12
 * samples a step whatever the world size.
 *
 *   resume_worker DIR          trains steps 1 to 8; after step 4 saves into DIR, in the background
 *   resume_worker DIR resume   loads DIR and trains steps 5 to 8
 *
 * Rank 0 says "loss STEP VALUE" with the mean loss over all samples, exact to the bit. */
#include "ranks.h"

#include <math.h>

enum { STEPS = 8, SAVED_AT = 4, SAMPLES = 12, INPUTS = 6, HIDDEN = 9 };
enum { OUT, WEIGHT, BIAS, PARAMS };

static int64_t SHAPES[PARAMS][2] = {{INPUTS, HIDDEN}, {HIDDEN, INPUTS}, {HIDDEN, 0}};

static fsdp_engine_t *make_engine(fsdp_comm_t *comm, int resume) {
  static float values[PARAMS][INPUTS * HIDDEN];
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  uint32_t layer = 0, param = 0;
  /* What is loaded replaces them: others in a run that resumes. */
  for (int p = 0; p < PARAMS; p++)
    for (int i = 0; i < INPUTS * HIDDEN; i++)
      values[p][i] = (float)sin(1.3 * i + p + 5 * resume) / 3;
  fsdp_tensor_t out = tensor_f32(values[OUT], 2, SHAPES[OUT]);
  fsdp_tensor_t weight = tensor_f32(values[WEIGHT], 2, SHAPES[WEIGHT]);
  fsdp_tensor_t bias = tensor_f32(values[BIAS], 1, SHAPES[BIAS]);
  CHECK_OK(fsdp_model_create("Net", &model));
  CHECK_OK(fsdp_model_add_module(model, 0, "layer", "Layer", &layer));
  CHECK_OK(fsdp_model_add_parameter(model, 0, "out", &out, 1, &param));
  CHECK_OK(fsdp_model_add_parameter(model, layer, "weight", &weight, 1, &param));
  CHECK_OK(fsdp_model_add_parameter(model, layer, "bias", &bias, 1, &param));
  CHECK_OK(fsdp_model_wrap_module(model, layer));
  CHECK_OK(fsdp_engine_create(model, comm, NULL, &engine));
  fsdp_model_destroy(model);
  return engine;
}

static const float *parameter(fsdp_engine_t *engine, uint32_t param) {
  fsdp_tensor_t t;
  CHECK_OK(fsdp_engine_param_data(engine, param, &t));
  return (const float *)t.data;
}

/* One forward and backward over this rank's samples; returns their mean loss. */
static double backward(fsdp_engine_t *engine, const job_t *job, int step) {
  float grad[PARAMS][INPUTS * HIDDEN];
  void *buffer = NULL;
  double loss = 0;
  const int count = SAMPLES / job->world;
  memset(grad, 0, sizeof grad);
  CHECK_OK(fsdp_engine_unshard(engine, 0, &buffer));
  CHECK_OK(fsdp_engine_unshard(engine, 1, &buffer));
  const float *out = parameter(engine, OUT), *weight = parameter(engine, WEIGHT);
  const float *bias = parameter(engine, BIAS);
  for (int s = job->rank * count; s < (job->rank + 1) * count; s++) {
    float x[INPUTS], h[HIDDEN], d[INPUTS];
    for (int i = 0; i < INPUTS; i++) x[i] = (float)sin(0.7 * s + 1.9 * i + 0.3 * step);
    for (int j = 0; j < HIDDEN; j++) {
      float sum = bias[j];
      for (int i = 0; i < INPUTS; i++) sum += weight[j * INPUTS + i] * x[i];
      h[j] = tanhf(sum);
    }
    for (int i = 0; i < INPUTS; i++) {
      float y = 0;
      for (int j = 0; j < HIDDEN; j++) y += out[i * HIDDEN + j] * h[j];
      d[i] = (y - x[i]) / (float)count;
      loss += 0.5 * (double)(y - x[i]) * (double)(y - x[i]) / count;
    }
    for (int j = 0; j < HIDDEN; j++) {
      float back = 0;
      for (int i = 0; i < INPUTS; i++) {
        back += out[i * HIDDEN + j] * d[i];
        grad[OUT][i * HIDDEN + j] += d[i] * h[j];
      }
      back *= 1 - h[j] * h[j];
      grad[BIAS][j] += back;
      for (int i = 0; i < INPUTS; i++) grad[WEIGHT][j * INPUTS + i] += back * x[i];
    }
  }
  for (uint32_t p = 0; p < PARAMS; p++) {
    fsdp_tensor_t t = tensor_f32(grad[p], p == BIAS ? 1 : 2, SHAPES[p]);
    CHECK_OK(fsdp_engine_accumulate_grad(engine, p, &t));
  }
  CHECK_OK(fsdp_engine_finish_backward(engine));
  return loss;
}

int main(int argc, char **argv) {
  const job_t job = join_job();
  const int resume = argc == 3;
  fsdp_optimizer_t *optimizer = NULL;
  fsdp_checkpoint_job_t *save = NULL;
  fsdp_adamw_config_t config = FSDP_ADAMW_CONFIG_INIT;
  fsdp_checkpoint_contents_t contents = FSDP_CHECKPOINT_CONTENTS_INIT;
  CHECK(argc >= 2 && SAMPLES % job.world == 0);
  config.lr = 0.05;
  fsdp_engine_t *engine = make_engine(job.comm, resume);
  CHECK_OK(fsdp_optimizer_create_adamw(engine, &config, &optimizer));
  contents.optimizer = optimizer;
  if (resume) CHECK_OK(fsdp_checkpoint_load_contents(engine, argv[1], &contents));
  for (int step = resume ? SAVED_AT + 1 : 1; step <= STEPS; step++) {
    int64_t one = 1;
    CHECK_OK(fsdp_engine_zero_grad(engine));
    double loss = backward(engine, &job, step);
    fsdp_tensor_t t = tensor_of(&loss, 1, &one, FSDP_DTYPE_FLOAT, 64);
    CHECK_OK(fsdp_comm_all_reduce(job.comm, &t, FSDP_REDUCE_AVG));
    if (job.rank == 0) printf("loss %d %a\n", step, loss);
    CHECK_OK(fsdp_optimizer_step(optimizer));
    if (!resume && step == SAVED_AT)
      CHECK_OK(fsdp_checkpoint_save_async(engine, argv[1], &contents, &save));
  }
  if (save != NULL) CHECK_OK(fsdp_checkpoint_job_wait(save));
  fsdp_checkpoint_job_destroy(save);
  fsdp_optimizer_destroy(optimizer);
  fsdp_engine_destroy(engine);
  fsdp_comm_destroy(job.comm);
  return 0;
}
