/* The network of net.h: its description for the library, its forward and its backward. */
#include "net.h"

#include <math.h>

enum { MAX_BATCH = 8 };

/* What the backward needs of the forward, by sample. */
static struct {
  float x[MAX_BATCH][NET_MAX_WIDTH];
  float h[4][MAX_BATCH][NET_MAX_WIDTH];
  /* scale * h0, and tanh before the bonus is added. */
  float scaled[MAX_BATCH][NET_MAX_WIDTH], before_bonus[MAX_BATCH][NET_MAX_WIDTH];
  /* E^T h3 and the error y - x. */
  float raw[MAX_BATCH][NET_MAX_WIDTH], error[MAX_BATCH][NET_MAX_WIDTH];
} kept;

int64_t net_numel(const net_t *net, uint32_t param) {
  const int64_t i = net->inputs, d = net->width;
  const int64_t numel[NET_PARAMS] = {1, d * i, d, d, d * d, d, 0, d * d, d, 3, i};
  return numel[param];
}

/* A number in [-1, 1) from a seed. */
static float noise(uint32_t seed) {
  seed = (seed ^ 61u) ^ (seed >> 16);
  seed *= 9u;
  seed ^= seed >> 4;
  seed *= 0x27d4eb2du;
  seed ^= seed >> 15;
  return (float)(seed >> 8) / 8388608.0f - 1.0f;
}

float net_initial(uint32_t param, int64_t element) {
  const float value = noise(param * 7919u + (uint32_t)element);
  if (param == NET_TEMPERATURE || param == NET_SCALE) return 1.0f + 0.1f * value;
  return 0.5f * value;
}

static int skipped_samples = 0;

void net_skip_samples(int samples) { skipped_samples = samples; }

void net_input(const net_t *net, int step, int rank, int sample, float *x) {
  for (int i = 0; i < net->inputs; i++) {
    const int first = skipped_samples;
    x[i] = noise((uint32_t)(step * 104729 + rank * 1299709 + (first + sample) * 15485863 + i + 17));
  }
}

fsdp_model_t *net_model(const net_t *net) {
  static const struct {
    uint32_t parent;
    const char *name, *class_name;
  } modules[NET_MODULES] = {{0, "", "Net"},
                            {NET_ROOT, "embed", "Linear"},
                            {NET_ROOT, "block", "Block"},
                            {NET_BLOCK, "fc", "Linear"},
                            {NET_BLOCK, "none", "None"},
                            {NET_ROOT, "shared", "Linear"},
                            {NET_ROOT, "spare", "Spare"},
                            {NET_ROOT, "head", "Linear"}};
  static const struct {
    uint32_t module;
    const char *name;
  } params[NET_PARAMS] = {{NET_ROOT, "temperature"}, {NET_EMBED, "weight"},  {NET_BLOCK, "scale"},
                          {NET_BLOCK, "bonus"},      {NET_FC, "weight"},     {NET_FC, "bias"},
                          {NET_NONE, "empty"},       {NET_SHARED, "weight"}, {NET_SHARED, "bias"},
                          {NET_SPARE, "weight"},     {NET_HEAD, "bias"}};
  static float values[NET_PARAMS][NET_MAX_NUMEL];
  const int64_t i = net->inputs, d = net->width;
  int64_t shapes[NET_PARAMS][2] = {{0, 0}, {d, i}, {d, 0}, {d, 0}, {d, d}, {d, 0},
                                   {0, 3}, {d, d}, {d, 0}, {3, 0}, {i, 0}};
  const int32_t ndim[NET_PARAMS] = {0, 2, 1, 1, 2, 1, 2, 2, 1, 1, 1};
  fsdp_model_t *model = NULL;
  CHECK(net->inputs <= NET_MAX_WIDTH && net->width <= NET_MAX_WIDTH);
  CHECK_OK(fsdp_model_create(modules[0].class_name, &model));
  for (uint32_t m = 1; m < NET_MODULES; m++) {
    uint32_t number = 0;
    CHECK_OK(fsdp_model_add_module(model, modules[m].parent, modules[m].name, modules[m].class_name,
                                   &number));
    CHECK_EQ(number, m);
  }
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    uint32_t number = 0;
    for (int64_t e = 0; e < net_numel(net, p); e++) values[p][e] = net_initial(p, e);
    fsdp_tensor_t t = tensor_f32(p == NET_EMPTY ? NULL : values[p], ndim[p], shapes[p]);
    const int32_t trained = p != NET_SHARED_BIAS;
    CHECK_OK(
        fsdp_model_add_parameter(model, params[p].module, params[p].name, &t, trained, &number));
    CHECK_EQ(number, p);
  }
  CHECK_OK(fsdp_model_tie_parameter(model, NET_HEAD, "weight", NET_EMBED_WEIGHT));
  return model;
}

/* out = w in, w of `rows` x `cols`. */
static void multiply(const float *w, int rows, int cols, const float *in, float *out) {
  for (int r = 0; r < rows; r++) {
    float sum = 0;
    for (int c = 0; c < cols; c++) sum += w[r * cols + c] * in[c];
    out[r] = sum;
  }
}

/* out = w^T in. */
static void multiply_transposed(const float *w, int rows, int cols, const float *in, float *out) {
  for (int c = 0; c < cols; c++) {
    float sum = 0;
    for (int r = 0; r < rows; r++) sum += w[r * cols + c] * in[r];
    out[c] = sum;
  }
}

/* grad += a b^T */
static void add_outer(float *grad, const float *a, int rows, const float *b, int cols) {
  for (int r = 0; r < rows; r++) {
    for (int c = 0; c < cols; c++) grad[r * cols + c] += a[r] * b[c];
  }
}

/* out = tanh(w in + b); b may be NULL. */
static void layer(const float *w, const float *b, int rows, int cols, const float *in, float *out) {
  multiply(w, rows, cols, in, out);
  for (int r = 0; r < rows; r++) out[r] = tanhf(b == NULL ? out[r] : out[r] + b[r]);
}

float net_forward(const net_t *net, const net_host_t *host, int step, int rank, int batch,
                  unsigned flags) {
  const int d = net->width, n = net->inputs;
  void *self = host->self;
  float loss = 0;
  CHECK(batch <= MAX_BATCH);
  host->enter(self, NET_ROOT, 0);

  host->enter(self, NET_EMBED, 0);
  for (int s = 0; s < batch; s++) {
    net_input(net, step, rank, s, kept.x[s]);
    layer(host->param(self, NET_EMBED_WEIGHT), NULL, d, n, kept.x[s], kept.h[0][s]);
  }
  host->leave(self, NET_EMBED, 0);

  host->enter(self, NET_BLOCK, 0);
  for (int s = 0; s < batch; s++) {
    const float *scale = host->param(self, NET_SCALE);
    for (int i = 0; i < d; i++) kept.scaled[s][i] = scale[i] * kept.h[0][s][i];
  }
  host->enter(self, NET_FC, 0);
  for (int s = 0; s < batch; s++) {
    layer(host->param(self, NET_FC_WEIGHT), host->param(self, NET_FC_BIAS), d, d, kept.scaled[s],
          kept.before_bonus[s]);
  }
  host->leave(self, NET_FC, 0);
  host->enter(self, NET_NONE, 0);
  host->leave(self, NET_NONE, 0);
  for (int s = 0; s < batch; s++) {
    const float *bonus = host->param(self, NET_BONUS_VECTOR);
    for (int i = 0; i < d; i++)
      kept.h[1][s][i] = kept.before_bonus[s][i] + (flags & NET_BONUS ? bonus[i] : 0.0f);
  }
  host->leave(self, NET_BLOCK, 0);

  for (int use = 1; use <= 2; use++) {
    host->enter(self, NET_SHARED, 0);
    for (int s = 0; s < batch; s++) {
      layer(host->param(self, NET_SHARED_WEIGHT), host->param(self, NET_SHARED_BIAS), d, d,
            kept.h[use][s], kept.h[use + 1][s]);
    }
    host->leave(self, NET_SHARED, 0);
  }

  host->enter(self, NET_HEAD, 0);
  for (int s = 0; s < batch; s++) {
    const float temperature = host->param(self, NET_TEMPERATURE)[0];
    const float *bias = host->param(self, NET_HEAD_BIAS);
    multiply_transposed(host->param(self, NET_EMBED_WEIGHT), d, n, kept.h[3][s], kept.raw[s]);
    for (int i = 0; i < n; i++) {
      kept.error[s][i] = temperature * kept.raw[s][i] + bias[i] - kept.x[s][i];
      loss += kept.error[s][i] * kept.error[s][i] / 2;
    }
  }
  host->leave(self, NET_HEAD, 0);
  host->leave(self, NET_ROOT, 0);
  return loss / (float)batch;
}

void net_backward(const net_t *net, const net_host_t *host, int batch, unsigned flags) {
  const int d = net->width, n = net->inputs;
  void *self = host->self;
  static float grad[NET_MAX_NUMEL], grad2[NET_MAX_NUMEL];
  static float delta[MAX_BATCH][NET_MAX_WIDTH], back[MAX_BATCH][NET_MAX_WIDTH];
  const size_t bytes = sizeof grad;
  host->enter(self, NET_ROOT, 1);

  /* head: the error goes through temperature * E^T h3 + c. */
  host->enter(self, NET_HEAD, 1);
  float temperature_grad = 0;
  memset(grad, 0, bytes);
  memset(grad2, 0, bytes);
  for (int s = 0; s < batch; s++) {
    const float temperature = host->param(self, NET_TEMPERATURE)[0];
    for (int i = 0; i < n; i++) {
      kept.error[s][i] /= (float)batch;
      temperature_grad += kept.error[s][i] * kept.raw[s][i];
      grad[i] += kept.error[s][i];
      kept.error[s][i] *= temperature;
    }
    add_outer(grad2, kept.h[3][s], d, kept.error[s], n);
    multiply(host->param(self, NET_EMBED_WEIGHT), d, n, kept.error[s], back[s]);
  }
  host->add_grad(self, NET_HEAD_BIAS, grad);
  host->add_grad(self, NET_EMBED_WEIGHT, grad2);
  host->add_grad(self, NET_TEMPERATURE, &temperature_grad);
  host->leave(self, NET_HEAD, 1);

  for (int use = 2; use >= 1; use--) {
    host->enter(self, NET_SHARED, 1);
    memset(grad, 0, bytes);
    for (int s = 0; s < batch; s++) {
      for (int i = 0; i < d; i++) {
        const float h = kept.h[use + 1][s][i];
        delta[s][i] = back[s][i] * (1 - h * h);
      }
      add_outer(grad, delta[s], d, kept.h[use][s], d);
      multiply_transposed(host->param(self, NET_SHARED_WEIGHT), d, d, delta[s], back[s]);
    }
    host->add_grad(self, NET_SHARED_WEIGHT, grad);
    host->leave(self, NET_SHARED, 1);
  }

  host->enter(self, NET_BLOCK, 1);
  if (flags & NET_BONUS) {
    memset(grad, 0, bytes);
    for (int s = 0; s < batch; s++) {
      for (int i = 0; i < d; i++) grad[i] += back[s][i];
    }
    host->add_grad(self, NET_BONUS_VECTOR, grad);
  }
  host->enter(self, NET_NONE, 1);
  host->add_grad(self, NET_EMPTY, grad);
  host->leave(self, NET_NONE, 1);
  host->enter(self, NET_FC, 1);
  memset(grad, 0, bytes);
  memset(grad2, 0, bytes);
  for (int s = 0; s < batch; s++) {
    for (int i = 0; i < d; i++) {
      const float h = kept.before_bonus[s][i];
      delta[s][i] = back[s][i] * (1 - h * h);
      grad2[i] += delta[s][i];
    }
    add_outer(grad, delta[s], d, kept.scaled[s], d);
    multiply_transposed(host->param(self, NET_FC_WEIGHT), d, d, delta[s], back[s]);
  }
  host->add_grad(self, NET_FC_WEIGHT, grad);
  host->add_grad(self, NET_FC_BIAS, grad2);
  host->leave(self, NET_FC, 1);
  memset(grad, 0, bytes);
  for (int s = 0; s < batch; s++) {
    const float *scale = host->param(self, NET_SCALE);
    for (int i = 0; i < d; i++) {
      grad[i] += back[s][i] * kept.h[0][s][i];
      back[s][i] *= scale[i];
    }
  }
  host->add_grad(self, NET_SCALE, grad);
  host->leave(self, NET_BLOCK, 1);

  host->enter(self, NET_EMBED, 1);
  memset(grad, 0, bytes);
  for (int s = 0; s < batch; s++) {
    for (int i = 0; i < d; i++) {
      const float h = kept.h[0][s][i];
      delta[s][i] = back[s][i] * (1 - h * h);
    }
    add_outer(grad, delta[s], d, kept.x[s], n);
  }
  host->add_grad(self, NET_EMBED_WEIGHT, grad);
  host->leave(self, NET_EMBED, 1);
  host->leave(self, NET_ROOT, 1);
}
