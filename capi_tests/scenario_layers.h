/* The layers of the scenarios' models and their gradients, over batches laid out row by row. Sums
 * are taken in double precision and rounded once. */
#ifndef FSDP_TEST_SCENARIO_LAYERS_H
#define FSDP_TEST_SCENARIO_LAYERS_H

#include <stddef.h>

/* y [batch, outs] = x [batch, ins] w^T + b, w [outs, ins]; b may be NULL. */
static inline void linear(float *y, const float *x, const float *w, const float *b, int batch,
                          int ins, int outs) {
  for (int s = 0; s < batch; s++) {
    for (int o = 0; o < outs; o++) {
      double sum = b == NULL ? 0 : (double)b[o];
      for (int i = 0; i < ins; i++) sum += (double)x[s * ins + i] * (double)w[o * ins + i];
      y[s * outs + o] = (float)sum;
    }
  }
}

/* Gradients of `linear` from dy [batch, outs]; each of dx, dw and db may be NULL. */
static inline void linear_grad(const float *dy, const float *x, const float *w, int batch, int ins,
                               int outs, float *dx, float *dw, float *db) {
  for (int s = 0; s < batch && dx != NULL; s++) {
    for (int i = 0; i < ins; i++) {
      double sum = 0;
      for (int o = 0; o < outs; o++) sum += (double)dy[s * outs + o] * (double)w[o * ins + i];
      dx[s * ins + i] = (float)sum;
    }
  }
  for (int o = 0; o < outs; o++) {
    double bias = 0;
    for (int s = 0; s < batch; s++) bias += (double)dy[s * outs + o];
    if (db != NULL) db[o] = (float)bias;
    for (int i = 0; i < ins && dw != NULL; i++) {
      double sum = 0;
      for (int s = 0; s < batch; s++) sum += (double)dy[s * outs + o] * (double)x[s * ins + i];
      dw[o * ins + i] = (float)sum;
    }
  }
}

/* y = x^T, of n x n. */
static inline void transpose(float *y, const float *x, int n) {
  for (int i = 0; i < n * n; i++) y[i % n * n + i / n] = x[i];
}

static inline void relu(float *y, const float *x, int n) {
  for (int i = 0; i < n; i++) y[i] = x[i] > 0 ? x[i] : 0;
}

/* dx from dy; y is what relu gave. May be done in place. */
static inline void relu_grad(float *dx, const float *dy, const float *y, int n) {
  for (int i = 0; i < n; i++) dx[i] = y[i] > 0 ? dy[i] : 0;
}

static inline void add(float *y, const float *a, const float *b, int n) {
  for (int i = 0; i < n; i++) y[i] = a[i] + b[i];
}

static inline void fill(float *y, float value, int n) {
  for (int i = 0; i < n; i++) y[i] = value;
}

static inline float sum_of(const float *x, int n) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += (double)x[i];
  return (float)sum;
}

#endif
