/* The data-parallel reference of train.h, and Adam, which both ways share. */
#include "train.h"

#include <math.h>

void adam(float *weight, const float *grad, float *m, float *v, int64_t n, int step) {
  const float lr = 0.01f, beta1 = 0.9f, beta2 = 0.99f, epsilon = 1e-8f;
  const float correction1 = 1 - powf(beta1, (float)step),
              correction2 = 1 - powf(beta2, (float)step);
  for (int64_t i = 0; i < n; i++) {
    m[i] = beta1 * m[i] + (1 - beta1) * grad[i];
    v[i] = beta2 * v[i] + (1 - beta2) * grad[i] * grad[i];
    weight[i] -= lr * (m[i] / correction1) / (sqrtf(v[i] / correction2) + epsilon);
  }
}

static const float *reference_param(void *self, uint32_t param) {
  return ((reference_t *)self)->value[param];
}

static void reference_add_grad(void *self, uint32_t param, const float *grad) {
  reference_t *r = (reference_t *)self;
  float *sum = r->rank_grad[r->rank][param];
  const int64_t n = net_numel(&r->net, param);
  for (int64_t i = 0; i < n; i++) sum[i] = r->rank_has[r->rank][param] ? sum[i] + grad[i] : grad[i];
  r->rank_has[r->rank][param] = 1;
}

static void reference_passes(void *self, uint32_t module, int backward) {
  (void)self;
  (void)module;
  (void)backward;
}

static net_host_t reference_host(reference_t *reference, int rank) {
  net_host_t host;
  reference->rank = rank;
  host.self = reference;
  host.param = reference_param;
  host.add_grad = reference_add_grad;
  host.enter = reference_passes;
  host.leave = reference_passes;
  return host;
}

reference_t *reference_create(const net_t *net, int world) {
  reference_t *r = (reference_t *)calloc(1, sizeof *r);
  CHECK(r != NULL && world <= TRAIN_MAX_WORLD);
  r->net = *net;
  r->world = world;
  r->group = world;
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    for (int64_t i = 0; i < net_numel(net, p); i++) r->value[p][i] = net_initial(p, i);
  }
  return r;
}

void reference_destroy(reference_t *reference) { free(reference); }

float reference_forward(reference_t *reference, int rank, int step, int batch, unsigned flags) {
  const net_host_t host = reference_host(reference, rank);
  return net_forward(&reference->net, &host, step, rank, batch, flags);
}

float reference_backward(reference_t *reference, int rank, int step, int batch, unsigned flags) {
  const net_host_t host = reference_host(reference, rank);
  const float loss = net_forward(&reference->net, &host, step, rank, batch, flags);
  net_backward(&reference->net, &host, batch, flags);
  return loss;
}

void reference_reduce_in_groups(reference_t *reference) {
  reference_t *r = reference;
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    for (int first = 0; first < r->world; first += r->group) {
      float *grad = r->group_grad[first / r->group][p];
      int *has = &r->group_has[first / r->group][p], any = 0;
      for (int rank = first; rank < first + r->group; rank++) any |= r->rank_has[rank][p];
      for (int64_t i = 0; any && i < net_numel(&r->net, p); i++) {
        float sum = 0;
        int started = 0;
        for (int rank = first; rank < first + r->group; rank++) {
          if (!r->rank_has[rank][p]) continue;
          sum = started ? sum + r->rank_grad[rank][p][i] : r->rank_grad[rank][p][i];
          started = 1;
        }
        const float mean = sum / (float)r->group;
        grad[i] = *has ? grad[i] + mean : r->has_grad[p] ? r->grad[p][i] + mean : mean;
      }
      *has |= any;
    }
  }
  memset(r->rank_has, 0, sizeof r->rank_has);
}

void reference_average(reference_t *reference) {
  reference_t *r = reference;
  const int groups = r->world / r->group;
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    int any = 0;
    for (int g = 0; g < groups; g++) any |= r->group_has[g][p];
    for (int64_t i = 0; any && i < net_numel(&r->net, p); i++) {
      float sum = 0;
      for (int g = 0; g < groups; g++) {
        const float old = r->has_grad[p] ? r->grad[p][i] : 0;
        const float value = r->group_has[g][p] ? r->group_grad[g][p][i] : old;
        sum = g == 0 ? value : sum + value;
      }
      r->grad[p][i] = sum / (float)groups;
    }
    r->has_grad[p] |= any;
  }
  memset(r->group_has, 0, sizeof r->group_has);
}

void reference_reduce(reference_t *reference) {
  reference_reduce_in_groups(reference);
  reference_average(reference);
}

void reference_zero_grad(reference_t *reference) {
  memset(reference->has_grad, 0, sizeof reference->has_grad);
  memset(reference->group_has, 0, sizeof reference->group_has);
  memset(reference->rank_has, 0, sizeof reference->rank_has);
}

void reference_adam(reference_t *reference, int step) {
  reference_t *r = reference;
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    if (r->has_grad[p])
      adam(r->value[p], r->grad[p], r->m[p], r->v[p], net_numel(&r->net, p), step);
  }
}
