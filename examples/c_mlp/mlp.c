/* The sharded perceptron of mlp.h: registering it with the library, its forward and its backward.
 */
#include "mlp.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TRY(call) \
  do { \
    fsdp_status_t status_ = (call); \
    if (status_ != FSDP_OK) return status_; \
  } while (0)

/* Tells the library where a contiguous float32 tensor lies. */
static fsdp_tensor_t tensor(float *data, int32_t ndim, int64_t *shape) {
  fsdp_tensor_t t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.device.device_type = FSDP_DEVICE_CPU;
  t.ndim = ndim;
  t.dtype.code = FSDP_DTYPE_FLOAT;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t;
}

/* A small random number; the same sequence on every rank that starts with the same seed. */
static float next_random(unsigned *state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) / 8388608.0f - 1.0f;
}

/* ---- 1. register: describe the model to the library, once ---- */

/* Adds one layer: a module, its two parameters with their starting values, and the wish that it be
 * a unit of its own. */
static fsdp_status_t add_layer(fsdp_model_t *model, int index, mlp_layer_t *layer, float *weight,
                               float *bias) {
  char name[32];
  uint32_t module;
  int64_t weight_shape[2], bias_shape[1];
  weight_shape[0] = bias_shape[0] = layer->outputs;
  weight_shape[1] = layer->inputs;
  const fsdp_tensor_t w = tensor(weight, 2, weight_shape), b = tensor(bias, 1, bias_shape);
  snprintf(name, sizeof name, "layer%d", index);
  TRY(fsdp_model_add_module(model, 0, name, "Layer", &module));
  TRY(fsdp_model_add_parameter(model, module, "weight", &w, 1, &layer->weight));
  TRY(fsdp_model_add_parameter(model, module, "bias", &b, 1, &layer->bias));
  layer->unit = module; /* the module's number for now; the unit's once there is an engine */
  return fsdp_model_wrap_module(model, module);
}

/* The starting values are only needed until fsdp_engine_create has copied each rank's share. */
static fsdp_status_t shard_model(mlp_t *mlp, fsdp_comm_t *comm, fsdp_model_t *model, unsigned seed,
                                 float *scratch) {
  float *next = scratch;
  for (int l = 0; l < mlp->layers; l++) {
    mlp_layer_t *layer = &mlp->layer[l];
    const int count = layer->inputs * layer->outputs;
    const float scale = 1.0f / sqrtf((float)layer->inputs);
    float *weight = next, *bias = next + count;
    for (int i = 0; i < count; i++) weight[i] = scale * next_random(&seed);
    for (int i = 0; i < layer->outputs; i++) bias[i] = 0.1f * next_random(&seed);
    TRY(add_layer(model, l, layer, weight, bias));
    next = bias + layer->outputs;
  }
  /* Every rank describes the same model; if they differ, this call says in which parameter. */
  TRY(fsdp_engine_create(model, comm, NULL, &mlp->engine));
  for (int l = 0; l < mlp->layers; l++) {
    mlp_layer_t *layer = &mlp->layer[l];
    TRY(fsdp_engine_unit_of_module(mlp->engine, layer->unit, &layer->unit));
  }
  return FSDP_OK;
}

static void *allocate(size_t count) {
  void *memory = calloc(count > 0 ? count : 1, sizeof(float));
  if (memory == NULL) {
    fprintf(stderr, "c_mlp: no memory for %zu floats\n", count);
    exit(1);
  }
  return memory;
}

fsdp_status_t mlp_create(mlp_t *mlp, fsdp_comm_t *comm, const int *sizes, int layers, int batch,
                         unsigned seed) {
  size_t total = 0;
  fsdp_model_t *model = NULL;
  memset(mlp, 0, sizeof *mlp);
  mlp->layers = layers;
  mlp->batch = batch;
  for (int l = 0; l < layers; l++) {
    mlp_layer_t *layer = &mlp->layer[l];
    layer->inputs = sizes[l];
    layer->outputs = sizes[l + 1];
    layer->activation = (float *)allocate((size_t)batch * (size_t)layer->outputs);
    layer->delta = (float *)allocate((size_t)batch * (size_t)layer->outputs);
    total += ((size_t)layer->inputs + 1) * (size_t)layer->outputs;
  }
  TRY(fsdp_model_create("Perceptron", &model));
  float *scratch = (float *)allocate(total);
  const fsdp_status_t status = shard_model(mlp, comm, model, seed, scratch);
  free(scratch);
  /* A failed call's message stays until the next call that returns a status: this one does not. */
  fsdp_model_destroy(model);
  return status;
}

void mlp_destroy(mlp_t *mlp) {
  fsdp_engine_destroy(mlp->engine);
  for (int l = 0; l < mlp->layers; l++) {
    free(mlp->layer[l].activation);
    free(mlp->layer[l].delta);
  }
  memset(mlp, 0, sizeof *mlp);
}

/* ---- 2. forward: between pre_forward and post_forward of its unit, a layer's full parameters can
 * be read ---- */

static fsdp_status_t layer_forward(mlp_t *mlp, int index, const float *input, int batch) {
  mlp_layer_t *layer = &mlp->layer[index];
  fsdp_tensor_t weight, bias;
  TRY(fsdp_engine_param_data(mlp->engine, layer->weight, &weight));
  TRY(fsdp_engine_param_data(mlp->engine, layer->bias, &bias));
  const float *w = (const float *)weight.data, *b = (const float *)bias.data;
  for (int s = 0; s < batch; s++) {
    const float *in = input + s * layer->inputs;
    float *out = layer->activation + s * layer->outputs;
    for (int o = 0; o < layer->outputs; o++) {
      float sum = b[o];
      for (int i = 0; i < layer->inputs; i++) sum += w[o * layer->inputs + i] * in[i];
      out[o] = index == mlp->layers - 1 ? sum : tanhf(sum);
    }
  }
  return FSDP_OK;
}

fsdp_status_t mlp_forward(mlp_t *mlp, const float *input, int batch, const float **output) {
  mlp->input = input;
  /* Unit 0 is the root, which encloses the others. It holds no parameter here, but its hooks begin
   * and end everything. */
  TRY(fsdp_engine_pre_forward(mlp->engine, 0));
  for (int l = 0; l < mlp->layers; l++) {
    TRY(fsdp_engine_pre_forward(mlp->engine, mlp->layer[l].unit));
    TRY(layer_forward(mlp, l, l == 0 ? input : mlp->layer[l - 1].activation, batch));
    TRY(fsdp_engine_post_forward(mlp->engine, mlp->layer[l].unit));
  }
  TRY(fsdp_engine_post_forward(mlp->engine, 0));
  *output = mlp->layer[mlp->layers - 1].activation;
  return FSDP_OK;
}

/* ---- 3. backward: the same the other way round; full gradients are given to the library, which
 * averages them ---- */

/* Computes a layer's gradients in place: param_grad gives the memory that the library will reduce
 * from. It asks to overwrite that memory, or to add to it if this parameter has got a gradient in
 * this backward before (a layer used twice). A host that has its gradients elsewhere passes them to
 * fsdp_engine_accumulate_grad instead. */
static fsdp_status_t layer_backward(mlp_t *mlp, int index, const float *input, float *input_delta,
                                    int batch) {
  mlp_layer_t *layer = &mlp->layer[index];
  const int inputs = layer->inputs, outputs = layer->outputs;
  fsdp_tensor_t weight, weight_grad, bias_grad;
  int32_t add_to_weight, add_to_bias;
  TRY(fsdp_engine_param_data(mlp->engine, layer->weight, &weight));
  TRY(fsdp_engine_param_grad(mlp->engine, layer->weight, &weight_grad, &add_to_weight));
  TRY(fsdp_engine_param_grad(mlp->engine, layer->bias, &bias_grad, &add_to_bias));
  const float *w = (const float *)weight.data;
  float *dw = (float *)weight_grad.data, *db = (float *)bias_grad.data;
  if (!add_to_weight) memset(dw, 0, sizeof(float) * (size_t)inputs * (size_t)outputs);
  if (!add_to_bias) memset(db, 0, sizeof(float) * (size_t)outputs);
  for (int s = 0; s < batch; s++) {
    const float *in = input + s * inputs, *delta = layer->delta + s * outputs;
    for (int o = 0; o < outputs; o++) {
      for (int i = 0; i < inputs; i++) dw[o * inputs + i] += delta[o] * in[i];
      db[o] += delta[o];
    }
    if (input_delta == NULL) continue;
    for (int i = 0; i < inputs; i++) {
      float sum = 0;
      for (int o = 0; o < outputs; o++) sum += w[o * inputs + i] * delta[o];
      /* The layer below ended in a tanh, whose slope is 1 - tanh^2. */
      input_delta[s * inputs + i] = sum * (1 - in[i] * in[i]);
    }
  }
  return FSDP_OK;
}

fsdp_status_t mlp_backward(mlp_t *mlp, const float *output_gradient, int batch) {
  mlp_layer_t *last = &mlp->layer[mlp->layers - 1];
  memcpy(last->delta, output_gradient, sizeof(float) * (size_t)batch * (size_t)last->outputs);
  TRY(fsdp_engine_pre_backward(mlp->engine, 0));
  for (int l = mlp->layers - 1; l >= 0; l--) {
    const float *input = l == 0 ? mlp->input : mlp->layer[l - 1].activation;
    TRY(fsdp_engine_pre_backward(mlp->engine, mlp->layer[l].unit));
    TRY(layer_backward(mlp, l, input, l == 0 ? NULL : mlp->layer[l - 1].delta, batch));
    TRY(fsdp_engine_post_backward(mlp->engine, mlp->layer[l].unit));
  }
  /* The root's ends the iteration: from here to the next forward this rank may read its gradients
   * and write its shards. */
  return fsdp_engine_post_backward(mlp->engine, 0);
}
