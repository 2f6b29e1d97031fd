/* A module that is sharded already is wrapped again under a new root: inference gives the same bits
 * whether the first root's engine lives on or not, both engines see one set of values, a root with
 * parameters of its own trains on with PyTorch's numbers, and wrapping twice is refused with a
 * reason.
 *
 * Breaks: stale_values, no_error, no_average. */
#include "ranks.h"
#include "scenario_host.h"
#include "scenario_layers.h"

enum { WIDTH = 5, STEPS = 3, MORE_STEPS = 2, INPUTS = STEPS + 1 + MORE_STEPS };

/* The inner model; "layers.0" is a unit. */
enum { LAYERS = 1, LAYER0 = 2 };
static const host_module_t INNER_MODULE[] = {
    {0, "", "InnerModel"}, {0, "layers", "Sequential"}, {LAYERS, "0", "Linear"}};
static const host_param_t INNER_PARAM[] = {{LAYER0, "weight", 2, {WIDTH, WIDTH}, 1},
                                           {LAYER0, "bias", 1, {WIDTH, 0}, 1}};
static const host_spec_t INNER_SPEC = {3, 2, INNER_MODULE, INNER_PARAM};

/* The inner model below a new root, without and with a layer of the root's own. */
enum { INNER = 1, INNER_LAYER0 = 3, HEAD = 4 };
enum { WEIGHT, BIAS, HEAD_WEIGHT, HEAD_BIAS };
static const host_module_t ROOT_MODULE[] = {{0, "", "Root"},
                                            {0, "inner", "InnerModel"},
                                            {INNER, "layers", "Sequential"},
                                            {2, "0", "Linear"},
                                            {0, "head", "Linear"}};
static const host_param_t ROOT_PARAM[] = {{INNER_LAYER0, "weight", 2, {WIDTH, WIDTH}, 1},
                                          {INNER_LAYER0, "bias", 1, {WIDTH, 0}, 1},
                                          {HEAD, "weight", 2, {WIDTH, WIDTH}, 1},
                                          {HEAD, "bias", 1, {WIDTH, 0}, 1}};
static const host_spec_t ROOT_SPEC = {4, 2, ROOT_MODULE, ROOT_PARAM};
static const host_spec_t HEAD_SPEC = {5, 4, ROOT_MODULE, ROOT_PARAM};

static int is_rooted(const host_t *host) { return host->spec != &INNER_SPEC; }
static int has_head(const host_t *host) { return host->spec == &HEAD_SPEC; }

/* Enters the layer with all modules around it, or leaves it with all of them but the root. */
static void enter_layer(host_t *host, int backward) {
  for (uint32_t m = 1; m <= (uint32_t)(is_rooted(host) ? INNER_LAYER0 : LAYER0); m++)
    host_enter(host, m, backward);
}

static void leave_layer(host_t *host, int backward) {
  for (uint32_t m = is_rooted(host) ? INNER_LAYER0 : LAYER0; m >= 1; m--)
    host_leave(host, m, backward);
}

/* The output; `middle` is what the head, if there is one, gets. */
static void forward(host_t *host, const float *x, float *middle, float *y) {
  host_enter(host, 0, 0);
  enter_layer(host, 0);
  linear(middle, x, host_param(host, WEIGHT), host_param(host, BIAS), 1, WIDTH, WIDTH);
  leave_layer(host, 0);
  if (has_head(host))
    linear(y, middle, host_param(host, HEAD_WEIGHT), host_param(host, HEAD_BIAS), 1, WIDTH, WIDTH);
  else
    memcpy(y, middle, sizeof(float) * WIDTH);
  host_leave(host, 0, 0);
}

static float train(host_t *host, const float *x) {
  float middle[WIDTH], y[WIDTH], dy[WIDTH], dmiddle[WIDTH], dw[WIDTH * WIDTH], db[WIDTH];
  forward(host, x, middle, y);
  fill(dy, 1, WIDTH);
  memcpy(dmiddle, dy, sizeof dy);
  host_enter(host, 0, 1);
  if (has_head(host)) {
    linear_grad(dy, middle, host_param(host, HEAD_WEIGHT), 1, WIDTH, WIDTH, dmiddle, dw, db);
    host_add_grad(host, HEAD_WEIGHT, dw);
    host_add_grad(host, HEAD_BIAS, db);
  }
  enter_layer(host, 1);
  linear_grad(dmiddle, x, NULL, 1, WIDTH, WIDTH, NULL, dw, db);
  host_add_grad(host, WEIGHT, dw);
  host_add_grad(host, BIAS, db);
  leave_layer(host, 1);
  host_leave(host, 0, 1);
  return sum_of(y, WIDTH);
}

static void infer(host_t *host, const float *x, float *y) {
  float middle[WIDTH];
  CHECK_OK(fsdp_engine_set_grad_enabled(host->engine, 0));
  forward(host, x, middle, y);
  CHECK_OK(fsdp_engine_set_grad_enabled(host->engine, 1));
}

/* One step of both ways on the input of `step`; the losses of this rank are `losses[rank]` in the
 * file. */
static void step_both(host_t *sharded, host_t *reference, const float *inputs, int step,
                      const float *losses) {
  const int32_t world = sharded->world;
  const float loss = train(sharded, inputs + (step * world + sharded->rank) * WIDTH);
  check_close(&loss, &losses[sharded->rank], 1, 1e-6, "loss");
  for (int32_t r = 0; r < world; r++) {
    reference->rank = r;
    train(reference, inputs + (step * world + r) * WIDTH);
  }
  host_reduce(reference);
  host_check_shards(sharded, reference, "before the step");
  host_sgd(sharded, 0.1f);
  host_sgd(reference, 0.1f);
  host_check_shards(sharded, reference, "after the step");
}

/* A model whose root has the engine's modules below it as "inner". With the break, a copy of values
 * of long ago instead. */
static fsdp_model_t *model_around(const fsdp_engine_t *engine, float *const *initial) {
  fsdp_model_t *model = NULL;
  uint32_t module = 0, param = 99;
  if (broken("stale_values")) return host_model(&ROOT_SPEC, initial);
  CHECK_OK(fsdp_model_create("Root", &model));
  CHECK_OK(fsdp_model_add_sharded(model, 0, "inner", engine, &module, &param));
  CHECK_EQ(module, INNER);
  CHECK_EQ(param, 0);
  return model;
}

/* What must be refused while a model with an adopted engine is made. */
static void check_errors(fsdp_model_t *model, const fsdp_engine_t *engine) {
  uint32_t module = INNER_LAYER0, param = 0;
  if (broken("no_error")) CHECK_OK(fsdp_model_add_module(model, 0, "plain", "Linear", &module));
  CHECK_ERR(fsdp_model_wrap_module(model, module), FSDP_ERR_INVALID_STATE, "inner.layers.0");
  CHECK_ERR(fsdp_model_wrap_module(model, INNER), FSDP_ERR_INVALID_STATE, "inner");
  CHECK_ERR(fsdp_model_add_sharded(model, 0, "again", engine, &module, &param),
            FSDP_ERR_INVALID_STATE, "already");
}

/* While one engine is inside an iteration, the other refuses, and neither is the worse for it. */
static void check_one_at_a_time(fsdp_engine_t *inside, fsdp_engine_t *other) {
  fsdp_shard_t shard;
  CHECK_OK(fsdp_engine_pre_forward(inside, 0));
  CHECK_ERR(fsdp_engine_pre_forward(other, 0), FSDP_ERR_INVALID_STATE, "iteration");
  CHECK_ERR(fsdp_engine_begin_write(other), FSDP_ERR_INVALID_STATE, "iteration");
  CHECK_OK(fsdp_engine_shard(other, WEIGHT, &shard));
  CHECK_OK(fsdp_engine_post_forward(inside, 0));
  CHECK_OK(fsdp_engine_finish_forward(inside));
}

static void run(const job_t *job, const safetensors_t *file, int destroyed) {
  static host_t first, second, third, reference, head_reference;
  fsdp_engine_t *engine[3] = {NULL, NULL, NULL};
  const float *inputs = scenario_f32(file, "input", 4, INPUTS, job->world, 1, WIDTH);
  const float *losses = scenario_f32(file, "loss", 2, STEPS, job->world, 0, 0);
  const float *mine = inputs + (STEPS * job->world + job->rank) * WIDTH;
  float before[WIDTH], after[WIDTH];
  test_context(destroyed ? "first engine destroyed" : "first engine alive");

  /* Training under the first root. */
  float *const *values = host_values(&INNER_SPEC, file, "initial");
  fsdp_model_t *model = host_model(&INNER_SPEC, values);
  CHECK_OK(fsdp_model_wrap_module(model, LAYER0));
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine[0]));
  fsdp_model_destroy(model);
  host_sharded(&first, &INNER_SPEC, engine[0], job->comm, 0, 0);
  host_reference(&reference, &INNER_SPEC, values, job->world);
  for (int s = 0; s < STEPS; s++) step_both(&first, &reference, inputs, s, losses + s * job->world);
  host_check_file(&first, file, "trained", 1e-6);
  infer(&first, mine, before);

  /* Inference under the second. */
  model = model_around(engine[0], values);
  if (!broken("stale_values")) check_errors(model, engine[0]);
  if (destroyed) fsdp_engine_destroy(engine[0]);
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine[1]));
  fsdp_model_destroy(model);
  host_sharded(&second, &ROOT_SPEC, engine[1], job->comm, 0, 0);
  infer(&second, mine, after);
  check_bits(after, before, WIDTH, "output after wrapping again");
  const float *outputs = scenario_f32(file, "output.before", 3, job->world, 1, WIDTH, 0);
  check_close(after, outputs + job->rank * WIDTH, WIDTH, 1e-6, "output");
  if (!destroyed) {
    check_one_at_a_time(engine[0], engine[1]);
    check_one_at_a_time(engine[1], engine[0]);
    infer(&first, mine, before);
    check_bits(after, before, WIDTH, "output of the first engine");
  }

  /* Training on under a third, which adds a layer; the engine that it adopts is destroyed or not.
   */
  fsdp_engine_t *adopted = destroyed ? engine[1] : engine[0];
  uint32_t module = 0, param = 0;
  float *const *start = host_values(&HEAD_SPEC, file, "root.initial");
  CHECK_OK(fsdp_model_create("Root", &model));
  if (destroyed) {
    /* The second root stays around the inner model: one more level of names. */
    CHECK_OK(fsdp_model_add_sharded(model, 0, "root", adopted, &module, &param));
    CHECK_EQ(module, 1);
    fsdp_engine_destroy(engine[1]);
  } else {
    CHECK_OK(fsdp_model_add_sharded(model, 0, "inner", adopted, &module, &param));
  }
  int64_t shape[2] = {WIDTH, WIDTH};
  fsdp_tensor_t weight = tensor_f32(start[HEAD_WEIGHT], 2, shape);
  fsdp_tensor_t bias = tensor_f32(start[HEAD_BIAS], 1, shape);
  CHECK_OK(fsdp_model_add_module(model, 0, "head", "Linear", &module));
  CHECK_OK(fsdp_model_add_parameter(model, module, "weight", &weight, 1, &param));
  CHECK_EQ(param, HEAD_WEIGHT);
  CHECK_OK(fsdp_model_add_parameter(model, module, "bias", &bias, 1, &param));
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine[2]));
  fsdp_model_destroy(model);
  host_sharded(&third, &HEAD_SPEC, engine[2], job->comm, 0, 0);
  if (destroyed) {
    /* Modules 1 to 4 are root, root.inner, root.inner.layers and root.inner.layers.0. */
    for (uint32_t m = 1; m <= INNER_LAYER0; m++) {
      CHECK_OK(fsdp_engine_unit_of_module(engine[2], m + 1, &third.unit[m]));
      third.is_unit[m] = m == INNER_LAYER0;
    }
  }
  for (uint32_t p = 0; p < 2; p++) memcpy(start[p], reference.value[p], sizeof reference.value[p]);
  host_reference(&head_reference, &HEAD_SPEC, start, job->world);
  losses = scenario_f32(file, "root.loss", 2, MORE_STEPS, job->world, 0, 0);
  for (int s = 0; s < MORE_STEPS; s++)
    step_both(&third, &head_reference, inputs, STEPS + 1 + s, losses + s * job->world);
  host_check_file(&third, file, "root.trained", 1e-6);
  if (!destroyed) {
    /* The other engines see what it trained. */
    float middle[WIDTH], y[WIDTH];
    forward(&head_reference, mine, middle, y);
    infer(&first, mine, before);
    infer(&second, mine, after);
    check_bits(before, middle, WIDTH, "first engine after training by the third");
    check_bits(after, middle, WIDTH, "second engine after training by the third");
    fsdp_engine_destroy(engine[0]);
    fsdp_engine_destroy(engine[1]);
  }
  fsdp_engine_destroy(engine[2]);
}

int main(void) {
  const job_t job = join_job();
  safetensors_t *file = scenario_open("multiple_wrapping", job.world);
  run(&job, file, 0);
  run(&job, file, 1);
  safetensors_close(file);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
