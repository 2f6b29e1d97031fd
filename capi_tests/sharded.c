/* The sharded way of train.h: the network as a C host of the library. */
#include "train.h"

#include <math.h>

static const float *sharded_param(void *self, uint32_t param) {
  fsdp_tensor_t out;
  CHECK_OK(fsdp_engine_param_data(((sharded_t *)self)->engine, param, &out));
  return (const float *)out.data;
}

/* Half of the parameters go in through accumulate_grad, half are written in place: both ways must
 * give the same. */
static void sharded_add_grad(void *self, uint32_t param, const float *grad) {
  const sharded_t *s = (const sharded_t *)self;
  const int64_t n = net_numel(&s->net, param);
  if (param % 2 == 0) {
    fsdp_param_info_t info = param_info_init();
    CHECK_OK(fsdp_engine_param_info(s->engine, param, &info));
    fsdp_tensor_t t =
        tensor_f32((void *)(uintptr_t)grad, info.ndim, (int64_t *)(uintptr_t)info.shape);
    CHECK_OK(fsdp_engine_accumulate_grad(s->engine, param, &t));
  } else {
    fsdp_tensor_t out;
    int32_t accumulate = -1;
    CHECK_OK(fsdp_engine_param_grad(s->engine, param, &out, &accumulate));
    float *sum = (float *)out.data;
    for (int64_t i = 0; i < n; i++) sum[i] = accumulate ? sum[i] + grad[i] : grad[i];
  }
}

static void sharded_enter(void *self, uint32_t module, int backward) {
  const sharded_t *s = (const sharded_t *)self;
  if (!s->is_unit[module]) return;
  const uint32_t unit = s->unit_of_module[module];
  CHECK_OK(backward ? fsdp_engine_pre_backward(s->engine, unit)
                    : fsdp_engine_pre_forward(s->engine, unit));
}

static void sharded_leave(void *self, uint32_t module, int backward) {
  const sharded_t *s = (const sharded_t *)self;
  if (!s->is_unit[module]) return;
  const uint32_t unit = s->unit_of_module[module];
  CHECK_OK(backward ? fsdp_engine_post_backward(s->engine, unit)
                    : fsdp_engine_post_forward(s->engine, unit));
}

static net_host_t sharded_host(sharded_t *sharded) {
  net_host_t host;
  host.self = sharded;
  host.param = sharded_param;
  host.add_grad = sharded_add_grad;
  host.enter = sharded_enter;
  host.leave = sharded_leave;
  return host;
}

sharded_t *sharded_create(const net_t *net, fsdp_comm_t *comm, train_wrap_t wrap,
                          const fsdp_engine_config_t *config) {
  sharded_t *s = (sharded_t *)calloc(1, sizeof *s);
  CHECK(s != NULL);
  s->net = *net;
  s->comm = comm;
  CHECK_OK(fsdp_comm_rank(comm, &s->rank));
  CHECK_OK(fsdp_comm_world_size(comm, &s->world));
  fsdp_model_t *model = net_model(net);
  if (wrap == WRAP_ALWAYS) CHECK_OK(fsdp_model_wrap_always(model));
  if (wrap == WRAP_SOME) {
    CHECK_OK(fsdp_model_wrap_module(model, NET_BLOCK));
    CHECK_OK(fsdp_model_wrap_class(model, "Linear"));
  }
  CHECK_OK(fsdp_engine_create(model, comm, config, &s->engine));
  fsdp_model_destroy(model);
  for (uint32_t m = 0; m < NET_MODULES; m++) {
    fsdp_unit_info_t info = unit_info_init();
    CHECK_OK(fsdp_engine_unit_of_module(s->engine, m, &s->unit_of_module[m]));
    CHECK_OK(fsdp_engine_unit_info(s->engine, s->unit_of_module[m], &info));
    s->is_unit[m] = info.module == m;
  }
  return s;
}

void sharded_destroy(sharded_t *sharded) {
  fsdp_engine_destroy(sharded->engine);
  free(sharded);
}

float sharded_forward(sharded_t *sharded, int step, int batch, unsigned flags) {
  const net_host_t host = sharded_host(sharded);
  return net_forward(&sharded->net, &host, step, sharded->rank, batch, flags);
}

float sharded_backward(sharded_t *sharded, int step, int batch, unsigned flags) {
  const net_host_t host = sharded_host(sharded);
  const float loss = net_forward(&sharded->net, &host, step, sharded->rank, batch, flags);
  net_backward(&sharded->net, &host, batch, flags);
  return loss;
}

void sharded_adam(sharded_t *sharded, int step) {
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_shard(sharded->engine, p, &shard));
    if (shard.grad != NULL)
      adam(shard.data, shard.grad, sharded->m[p], sharded->v[p], shard.numel, step);
  }
}

float sharded_tolerance(void) {
  const char *text = getenv("FSDP_TEST_TOLERANCE");
  return text == NULL ? 0 : strtof(text, NULL);
}

static void check_bits(const float *got, const float *want, int64_t n, const char *what, int step,
                       uint32_t param) {
  const float allowed = sharded_tolerance();
  for (int64_t i = 0; i < n; i++) {
    const int near = allowed > 0 && fabsf(got[i] - want[i]) <= allowed * (1 + fabsf(want[i]));
    if (!near && memcmp(&got[i], &want[i], sizeof got[i]) != 0) {
      test_fail(__FILE__, __LINE__, "%s, step %d, parameter %u, element %lld: %.9g, not %.9g", what,
                step, (unsigned)param, (long long)i, (double)got[i], (double)want[i]);
    }
  }
}

void sharded_check_shards(sharded_t *sharded, const reference_t *reference, const char *what,
                          int step) {
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    fsdp_param_info_t info = param_info_init();
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_param_info(sharded->engine, p, &info));
    CHECK_OK(fsdp_engine_shard(sharded->engine, p, &shard));
    CHECK_EQ(shard.numel, info.shard_numel);
    CHECK(shard.numel == 0 || info.shard_offset + shard.numel <= info.numel);
    if ((shard.grad != NULL) != (reference->has_grad[p] != 0)) {
      test_fail(__FILE__, __LINE__, "%s, step %d, parameter %u: gradient %s, reference %s", what,
                step, (unsigned)p, shard.grad ? "present" : "absent",
                reference->has_grad[p] ? "present" : "absent");
    }
    check_bits(shard.data, reference->value[p] + info.shard_offset, shard.numel, what, step, p);
    if (shard.grad != NULL)
      check_bits(shard.grad, reference->grad[p] + info.shard_offset, shard.numel, what, step, p);
  }
}

void sharded_check_full(sharded_t *sharded, const reference_t *reference, const char *what) {
  for (uint32_t p = 0; p < NET_PARAMS; p++) {
    fsdp_param_info_t info = param_info_init();
    void *buffer = NULL;
    CHECK_OK(fsdp_engine_param_info(sharded->engine, p, &info));
    CHECK_OK(fsdp_engine_unshard(sharded->engine, info.unit, &buffer));
    check_bits(sharded_param(sharded, p), reference->value[p], info.numel, what, -1, p);
    CHECK(info.numel == 0 || sharded_param(sharded, p) == (const float *)buffer + info.unit_offset);
  }
  CHECK_OK(fsdp_engine_finish_forward(sharded->engine));
}
