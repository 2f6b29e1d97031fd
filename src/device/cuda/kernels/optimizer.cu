// Fused steps of SGD and AdamW: the operations of src/optim/update.rs, in their order, so that results have the same
// bits.

// One parameter's piece; states that the rule does not have are null.
struct Step {
  float *param;
  const float *grad;
  float *state[2];
  u64 len;
};

struct Steps {
  Step step[48];
};

struct Sgd {
  float sign, weight_decay, momentum, rest;
  bool nesterov;
  float lr;
};

struct AdamW {
  float sign, decay, beta1, rest1, beta2, rest2, step_size, root, eps;
};

__device__ inline float sgd_gradient(const Sgd &s, float p, float g) {
  g = s.sign * g;
  // Not merely an optimization: 0 times an infinite parameter is NaN.
  return s.weight_decay == 0 ? g : g + s.weight_decay * p;
}

__device__ inline void sgd(const Sgd &s, float &p, float g) { p -= s.lr * sgd_gradient(s, p, g); }

__device__ inline void sgd_momentum(const Sgd &s, bool first, float &p, float g, float &b) {
  g = sgd_gradient(s, p, g);
  b = first ? g : s.momentum * b + s.rest * g;
  p -= s.lr * (s.nesterov ? g + s.momentum * b : b);
}

__device__ inline void adamw(const AdamW &a, float &p, float g, float &m, float &v) {
  g = a.sign * g;
  const float w = p * a.decay;
  m = a.beta1 * m + a.rest1 * g;
  v = a.beta2 * v + a.rest2 * g * g;
  const float d = sqrtf(v) / a.root + a.eps;
  p = w - a.step_size * m / d;
}

KERNEL fsdp_sgd(PARAM Steps steps, PARAM Sgd s) {
  const Step t = steps.step[blockIdx.y];
  walk(
      t.len, aligned(t.param, t.grad),
      [&](u64 i) {
        float p[8], g[8];
        load8(t.param + i, p);
        load8(t.grad + i, g);
        for (int k = 0; k < 8; k++) sgd(s, p[k], g[k]);
        store8(t.param + i, p);
      },
      [&](u64 i) { sgd(s, t.param[i], t.grad[i]); });
}

// state[0] is the momentum buffer; what it holds does not matter in the `first` step.
KERNEL fsdp_sgd_momentum(PARAM Steps steps, PARAM Sgd s, u32 first) {
  const Step t = steps.step[blockIdx.y];
  walk(
      t.len, aligned(t.param, t.grad) && aligned(t.state[0]),
      [&](u64 i) {
        float p[8], g[8], b[8];
        load8(t.param + i, p);
        load8(t.grad + i, g);
        load8(t.state[0] + i, b);
        for (int k = 0; k < 8; k++) sgd_momentum(s, first != 0, p[k], g[k], b[k]);
        store8(t.param + i, p);
        store8(t.state[0] + i, b);
      },
      [&](u64 i) { sgd_momentum(s, first != 0, t.param[i], t.grad[i], t.state[0][i]); });
}

// The states are exp_avg and exp_avg_sq.
KERNEL fsdp_adamw(PARAM Steps steps, PARAM AdamW a) {
  const Step t = steps.step[blockIdx.y];
  walk(
      t.len, aligned(t.param, t.grad) && aligned(t.state[0], t.state[1]),
      [&](u64 i) {
        float p[8], g[8], m[8], v[8];
        load8(t.param + i, p);
        load8(t.grad + i, g);
        load8(t.state[0] + i, m);
        load8(t.state[1] + i, v);
        for (int k = 0; k < 8; k++) adamw(a, p[k], g[k], m[k], v[k]);
        store8(t.param + i, p);
        store8(t.state[0] + i, m);
        store8(t.state[1] + i, v);
      },
      [&](u64 i) { adamw(a, t.param[i], t.grad[i], t.state[0][i], t.state[1][i]); });
}
