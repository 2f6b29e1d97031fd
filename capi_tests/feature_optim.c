/* The engine's optimizers equal an unsharded run of the arithmetic that fsdp.h documents, bit for
 * bit at every step: every option, parameters with options of their own, changing learning rates,
 * parameters without gradients (never, on some ranks only, in some steps only), and training that
 * stops, is saved, and goes on. Any world size up to 8. */
#include "ranks.h"
#include "train.h"

#include <math.h>
#include <unistd.h>

enum { STEPS = 6, SAVED_AT = 3, BATCH = 3 };

typedef struct {
  const char *name;
  train_wrap_t wrap;
  int adamw;
  fsdp_sgd_config_t sgd;
  fsdp_adamw_config_t adam;
  /* The bonus parameter has a gradient: on the last rank only, or in every second step only. */
  int on_last_rank, every_second_step;
  /* Options of its own for some parameters, and another learning rate for each step. */
  int groups, schedule;
} case_t;

/* ---- the reference: one element after the other, as fsdp.h says ---- */

typedef struct {
  double lr_factor[NET_PARAMS], weight_decay[NET_PARAMS];
  uint64_t steps[NET_PARAMS];
} plain_t;

static double power(double base, uint64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

static void plain_sgd(const fsdp_sgd_config_t *c, double lr, double weight_decay, int first,
                      int64_t n, float *p, const float *grad, float *b) {
  for (int64_t i = 0; i < n; i++) {
    float g = c->maximize ? -grad[i] : grad[i];
    if (weight_decay != 0) g = g + (float)weight_decay * p[i];
    float d = g;
    if (c->momentum != 0) {
      b[i] = first ? g : (float)c->momentum * b[i] + (float)(1 - c->dampening) * g;
      d = c->nesterov ? g + (float)c->momentum * b[i] : b[i];
    }
    p[i] = p[i] - (float)lr * d;
  }
}

static void plain_adamw(const fsdp_adamw_config_t *c, double lr, double weight_decay, uint64_t t,
                        int64_t n, float *p, const float *grad, float *m, float *v) {
  const float decay = (float)(1 - lr * weight_decay);
  const float step_size = (float)(lr / (1 - power(c->beta1, t)));
  const float root = (float)sqrt(1 - power(c->beta2, t));
  for (int64_t i = 0; i < n; i++) {
    const float g = c->maximize ? -grad[i] : grad[i];
    const float w = p[i] * decay;
    m[i] = (float)c->beta1 * m[i] + (float)(1 - c->beta1) * g;
    v[i] = (float)c->beta2 * v[i] + (float)(1 - c->beta2) * g * g;
    const float d = sqrtf(v[i]) / root + (float)c->eps;
    p[i] = w - step_size * m[i] / d;
  }
}

static void plain_step(const case_t *which, plain_t *plain, reference_t *r, double lr) {
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    const int64_t n = net_numel(&r->net, p);
    if (!r->has_grad[p] || n == 0) continue;
    const uint64_t t = ++plain->steps[p];
    if (which->adamw) {
      plain_adamw(&which->adam, lr * plain->lr_factor[p], plain->weight_decay[p], t, n,
                  r->value[p], r->grad[p], r->m[p], r->v[p]);
    } else {
      plain_sgd(&which->sgd, lr * plain->lr_factor[p], plain->weight_decay[p], t == 1, n,
                r->value[p], r->grad[p], r->m[p]);
    }
  }
}

/* ---- both, side by side ---- */

static fsdp_optimizer_t *make(const case_t *which, fsdp_engine_t *engine, plain_t *plain) {
  fsdp_optimizer_t *optimizer = NULL;
  if (which->adamw) {
    CHECK_OK(fsdp_optimizer_create_adamw(engine, &which->adam, &optimizer));
  } else {
    CHECK_OK(fsdp_optimizer_create_sgd(engine, &which->sgd, &optimizer));
  }
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    const int own = which->groups && p % 2 == 0;
    plain->lr_factor[p] = own ? 0.3 : 1;
    plain->weight_decay[p] = own            ? 0.07 * p
                             : which->adamw ? which->adam.weight_decay
                                            : which->sgd.weight_decay;
    if (own) CHECK_OK(fsdp_optimizer_set_param_options(optimizer, p, 0.3, 0.07 * p));
  }
  return optimizer;
}

static double lr_of(const case_t *which, int step) {
  const double lr = which->adamw ? which->adam.lr : which->sgd.lr;
  return which->schedule ? lr / step : lr;
}

static unsigned flags_of(const case_t *which, int rank, int world, int step) {
  if (which->every_second_step && step % 2 == 1) return 0;
  return which->on_last_rank && rank != world - 1 ? 0 : NET_BONUS;
}

/* The optimizer's state and counts are the reference's. */
static void check_states(const case_t *which, const sharded_t *sharded, fsdp_optimizer_t *optimizer,
                         const plain_t *plain, const reference_t *r, int step) {
  static const char *const names[] = {"momentum_buffer", "exp_avg", "exp_avg_sq"};
  const int kinds = which->adamw ? 2 : which->sgd.momentum != 0;
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    fsdp_param_info_t info = param_info_init();
    uint64_t steps = 99;
    CHECK_OK(fsdp_engine_param_info(sharded->engine, p, &info));
    CHECK_OK(fsdp_optimizer_step_count(optimizer, p, &steps));
    CHECK_EQ(steps, plain->steps[p]);
    for (int k = 0; k < kinds; k++) {
      const float *want = (k == 0 ? r->m[p] : r->v[p]) + info.shard_offset;
      float *got = NULL;
      CHECK_OK(fsdp_optimizer_state(optimizer, p, names[which->adamw + k], &got));
      CHECK((got == NULL) == (steps == 0));
      if (got != NULL && memcmp(got, want, sizeof(float) * (size_t)info.shard_numel) != 0)
        test_fail(__FILE__, __LINE__, "step %d: state %d of parameter %u differs", step, k, p);
    }
  }
}

static void train(const case_t *which, sharded_t *sharded, fsdp_optimizer_t *optimizer,
                  plain_t *plain, reference_t *reference, int first, int last) {
  for (int step = first; step <= last; step++) {
    CHECK_OK(fsdp_engine_zero_grad(sharded->engine));
    reference_zero_grad(reference);
    sharded_backward(sharded, step, BATCH, flags_of(which, sharded->rank, sharded->world, step));
    for (int r = 0; r < sharded->world; r++)
      reference_backward(reference, r, step, BATCH, flags_of(which, r, sharded->world, step));
    reference_reduce(reference);
    if (which->schedule) CHECK_OK(fsdp_optimizer_set_lr(optimizer, lr_of(which, step)));
    CHECK_OK(fsdp_optimizer_step(optimizer));
    plain_step(which, plain, reference, lr_of(which, step));
    sharded_check_shards(sharded, reference, which->name, step);
    check_states(which, sharded, optimizer, plain, reference, step);
  }
}

/* A folder that all ranks agree on. */
static void folder_of(fsdp_comm_t *comm, int number, char *path, size_t size) {
  const char *tmp = getenv("TMPDIR");
  int64_t pid = getpid(), one = 1;
  fsdp_tensor_t t = tensor_of(&pid, 1, &one, FSDP_DTYPE_INT, 64);
  CHECK_OK(fsdp_comm_broadcast(comm, &t, 0));
  snprintf(path, size, "%s/fsdp_feature_optim_%lld_%d", tmp == NULL ? "/tmp" : tmp, (long long)pid,
           number);
}

static void run(const case_t *which, int number, fsdp_comm_t *comm) {
  const net_t net = {7, 13};
  char folder[256], command[300];
  plain_t plain;
  test_context(which->name);
  memset(&plain, 0, sizeof plain);
  folder_of(comm, number, folder, sizeof folder);
  reference_t *reference = NULL;

  /* Trains, saves, and goes on to the end. */
  sharded_t *sharded = sharded_create(&net, comm, which->wrap, NULL);
  reference = reference_create(&net, sharded->world);
  fsdp_optimizer_t *optimizer = make(which, sharded->engine, &plain);
  train(which, sharded, optimizer, &plain, reference, 1, SAVED_AT);
  CHECK_OK(fsdp_optimizer_save(optimizer, folder, NULL, 0, NULL, 0));
  reference_t *saved = reference_create(&net, sharded->world);
  *saved = *reference;
  const plain_t saved_plain = plain;
  train(which, sharded, optimizer, &plain, reference, SAVED_AT + 1, STEPS);
  sharded_check_full(sharded, reference, which->name);
  /* The engine first: whichever is destroyed last frees the memory. */
  sharded_destroy(sharded);
  fsdp_optimizer_destroy(optimizer);

  /* Another process would do the same: a new engine, wrapped in another way, goes on from there. */
  sharded = sharded_create(&net, comm, which->wrap == WRAP_ALWAYS ? WRAP_SOME : WRAP_ALWAYS, NULL);
  optimizer = make(which, sharded->engine, &plain);
  CHECK_OK(fsdp_optimizer_load(optimizer, folder, NULL, 0));
  *reference = *saved;
  plain = saved_plain;
  train(which, sharded, optimizer, &plain, reference, SAVED_AT + 1, STEPS);
  sharded_check_full(sharded, reference, which->name);
  fsdp_optimizer_destroy(optimizer);

  CHECK_OK(fsdp_comm_barrier(comm));
  snprintf(command, sizeof command, "rm -r '%s'", folder);
  if (sharded->rank == 0) CHECK(system(command) == 0);
  sharded_destroy(sharded);
  reference_destroy(saved);
  reference_destroy(reference);
}

/* A step without a backward ends the forward, and waits for ranks that still read. */
static void step_after_a_forward(const job_t *job) {
  enum { WIDTH = 203 };
  fsdp_engine_t *engine = stack_engine(job->comm, 1, WIDTH, 1);
  fsdp_optimizer_t *optimizer = NULL;
  fsdp_tensor_t full;
  fsdp_sgd_config_t config = FSDP_SGD_CONFIG_INIT;
  test_context("a step after a forward");
  config.lr = 1;
  CHECK_OK(fsdp_optimizer_create_sgd(engine, &config, &optimizer));
  CHECK_OK(fsdp_engine_unshard(engine, 1, &full.data));
  CHECK_OK(stack_add_grad(engine, 0, 1));
  CHECK_ERR(fsdp_optimizer_step(optimizer), FSDP_ERR_INVALID_STATE, "backward has not ended");
  CHECK_OK(fsdp_engine_finish_backward(engine));
  /* The gradient stays: each step subtracts 1 more. */
  for (int step = 1; step <= 4; step++) {
    CHECK_OK(fsdp_optimizer_step(optimizer));
    CHECK_OK(fsdp_engine_unshard(engine, 1, &full.data));
    CHECK_OK(fsdp_engine_param_data(engine, 0, &full));
    for (int pass = 0; pass < 2; pass++) {
      for (int64_t i = 0; i < WIDTH; i++)
        CHECK(((volatile float *)full.data)[i] == (float)(1 - step));
      if (job->rank == step % job->world) sleep_ms(10);
    }
  }
  fsdp_optimizer_destroy(optimizer);
  fsdp_engine_destroy(engine);
}

/* Ranks that give different options all learn which. */
static void options_that_differ(const job_t *job) {
  fsdp_engine_t *engine = stack_engine(job->comm, 1, 5, 1);
  fsdp_optimizer_t *optimizer = NULL;
  fsdp_adamw_config_t config = FSDP_ADAMW_CONFIG_INIT;
  test_context("options that differ");
  if (job->rank == job->world - 1) config.beta2 = 0.9;
  CHECK_ERR(fsdp_optimizer_create_adamw(engine, &config, &optimizer), FSDP_ERR_MISMATCH,
            "rank 0 has beta2 = 0.999");
  CHECK(optimizer == NULL);
  /* That breaks nothing. */
  CHECK_OK(fsdp_optimizer_create_adamw(engine, NULL, &optimizer));
  fsdp_optimizer_destroy(optimizer);
  fsdp_engine_destroy(engine);
}

/* An engine that is destroyed while it reads holds up nobody, although an optimizer keeps its
 * memory: the last rank does no more until rank 0 may write. */
static void an_engine_that_is_given_up(const job_t *job) {
  fsdp_engine_t *engine = stack_engine(job->comm, 1, 5, 1);
  fsdp_optimizer_t *optimizer = NULL;
  void *buffer = NULL;
  char path[256];
  test_context("an engine that is given up");
  folder_of(job->comm, -1, path, sizeof path);
  CHECK_OK(fsdp_optimizer_create_sgd(engine, NULL, &optimizer));
  CHECK_OK(fsdp_engine_unshard(engine, 1, &buffer));
  CHECK_OK(fsdp_comm_barrier(job->comm));
  if (job->rank == job->world - 1) {
    fsdp_engine_destroy(engine);
    while (access(path, F_OK) != 0) sleep_ms(1);
    CHECK_OK(fsdp_optimizer_step(optimizer));
  } else {
    CHECK_OK(fsdp_optimizer_step(optimizer));
    FILE *file = job->rank == 0 ? fopen(path, "w") : NULL;
    CHECK(job->rank != 0 || (file != NULL && fclose(file) == 0));
    fsdp_engine_destroy(engine);
  }
  CHECK_OK(fsdp_comm_barrier(job->comm));
  if (job->rank == 0) CHECK(unlink(path) == 0);
  fsdp_optimizer_destroy(optimizer);
}

int main(void) {
  const fsdp_sgd_config_t sgd = FSDP_SGD_CONFIG_INIT;
  const fsdp_adamw_config_t adam = FSDP_ADAMW_CONFIG_INIT;
  enum { CASES = 9 };
  case_t cases[CASES];
  memset(cases, 0, sizeof cases);
  for (int i = 0; i < CASES; i++) {
    cases[i].wrap = i % 3 == 0 ? WRAP_SOME : i % 3 == 1 ? WRAP_ALWAYS : WRAP_NOTHING;
    cases[i].sgd = sgd;
    cases[i].adam = adam;
    cases[i].sgd.lr = 0.05;
    cases[i].adam.lr = 0.01;
    cases[i].adamw = i >= 5;
  }
  cases[0].name = "sgd";
  cases[1].name = "sgd with momentum and weight decay";
  cases[1].sgd.momentum = 0.9;
  cases[1].sgd.weight_decay = 0.01;
  cases[1].every_second_step = 1;
  cases[2].name = "sgd with dampening, groups and a schedule";
  cases[2].sgd.momentum = 0.8;
  cases[2].sgd.dampening = 0.3;
  cases[2].groups = cases[2].schedule = 1;
  cases[3].name = "sgd with nesterov, bonus on the last rank";
  cases[3].sgd.momentum = 0.9;
  cases[3].sgd.nesterov = 1;
  cases[3].on_last_rank = 1;
  cases[4].name = "sgd that climbs";
  cases[4].sgd.maximize = 1;
  cases[4].sgd.lr = 0.001;
  cases[4].groups = 1;
  cases[5].name = "adamw";
  cases[6].name = "adamw with groups and a schedule, bonus every second step";
  cases[6].groups = cases[6].schedule = 1;
  cases[6].every_second_step = 1;
  cases[7].name = "adam, bonus on the last rank in every second step";
  cases[7].adam.weight_decay = 0;
  cases[7].on_last_rank = cases[7].every_second_step = 1;
  cases[8].name = "adamw that climbs, with other betas and eps";
  cases[8].adam.beta1 = 0.8;
  cases[8].adam.beta2 = 0.95;
  cases[8].adam.eps = 1e-3;
  cases[8].adam.maximize = 1;

  const job_t job = join_job();
  for (int i = 0; i < CASES; i++) run(&cases[i], i, job.comm);
  step_after_a_forward(&job);
  if (job.world > 1) options_that_differ(&job);
  if (job.world > 1) an_engine_that_is_given_up(&job);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
