/* The training host of scenario_host.h. */
#include "scenario_host.h"

int64_t host_numel(const host_spec_t *spec, uint32_t param) {
  const host_param_t *p = &spec->param[param];
  int64_t n = 1;
  for (int32_t d = 0; d < p->ndim; d++) n *= p->shape[d];
  return n;
}

const char *host_module_name(const host_spec_t *spec, uint32_t module) {
  static char name[64];
  name[0] = '\0';
  for (uint32_t m = module; m != 0; m = spec->module[m].parent) {
    char below[64];
    snprintf(below, sizeof below, "%s", name);
    snprintf(name, sizeof name, "%.30s%s%.30s", spec->module[m].name, below[0] ? "." : "", below);
  }
  return name;
}

const char *host_param_name(const host_spec_t *spec, uint32_t param) {
  static char name[80];
  const char *module = host_module_name(spec, spec->param[param].module);
  snprintf(name, sizeof name, "%s%s%.14s", module, module[0] ? "." : "", spec->param[param].name);
  return name;
}

fsdp_model_t *host_model(const host_spec_t *spec, float *const *values) {
  fsdp_model_t *model = NULL;
  CHECK_OK(fsdp_model_create(spec->module[0].class_name, &model));
  for (uint32_t m = 1; m < spec->modules; m++) {
    const host_module_t *module = &spec->module[m];
    uint32_t number = 0;
    CHECK_OK(
        fsdp_model_add_module(model, module->parent, module->name, module->class_name, &number));
    CHECK_EQ(number, m);
  }
  for (uint32_t p = 0; p < spec->params; p++) {
    const host_param_t *param = &spec->param[p];
    int64_t shape[2] = {param->shape[0], param->shape[1]};
    fsdp_tensor_t t = tensor_f32(values == NULL ? NULL : values[p], param->ndim, shape);
    uint32_t number = 0;
    CHECK_OK(fsdp_model_add_parameter(model, param->module, param->name, &t, param->requires_grad,
                                      &number));
    CHECK_EQ(number, p);
  }
  return model;
}

static const float *in_file(const host_spec_t *spec, uint32_t param, const safetensors_t *file,
                            const char *prefix) {
  const host_param_t *p = &spec->param[param];
  char name[128];
  snprintf(name, sizeof name, "%s.%s", prefix, host_param_name(spec, param));
  return scenario_f32(file, name, p->ndim, p->shape[0], p->shape[1], 0, 0);
}

float *const *host_values(const host_spec_t *spec, const safetensors_t *file, const char *prefix) {
  static float *values[HOST_PARAMS];
  static float memory[HOST_PARAMS][HOST_NUMEL];
  for (uint32_t p = 0; p < spec->params; p++) {
    CHECK(host_numel(spec, p) <= HOST_NUMEL);
    memcpy(memory[p], in_file(spec, p, file, prefix), sizeof(float) * (size_t)host_numel(spec, p));
    values[p] = memory[p];
  }
  return values;
}

static void clear(host_t *host, const host_spec_t *spec) {
  memset(host, 0, sizeof *host);
  host->spec = spec;
  CHECK(spec->modules <= HOST_MODULES && spec->params <= HOST_PARAMS);
  for (uint32_t p = 0; p < spec->params; p++) {
    CHECK(host_numel(spec, p) <= HOST_NUMEL);
    host->requires_grad[p] = spec->param[p].requires_grad;
  }
}

void host_sharded(host_t *host, const host_spec_t *spec, fsdp_engine_t *engine, fsdp_comm_t *comm,
                  uint32_t first_module, uint32_t first_param) {
  clear(host, spec);
  host->engine = engine;
  host->first_module = first_module;
  host->first_param = first_param;
  CHECK_OK(fsdp_comm_rank(comm, &host->rank));
  CHECK_OK(fsdp_comm_world_size(comm, &host->world));
  CHECK(host->world <= HOST_WORLD);
  for (uint32_t m = 0; m < spec->modules; m++) {
    fsdp_unit_info_t info = unit_info_init();
    CHECK_OK(fsdp_engine_unit_of_module(engine, first_module + m, &host->unit[m]));
    CHECK_OK(fsdp_engine_unit_info(engine, host->unit[m], &info));
    host->is_unit[m] = info.module == first_module + m;
  }
}

void host_reference(host_t *host, const host_spec_t *spec, float *const *values, int32_t world) {
  clear(host, spec);
  host->world = world;
  CHECK(world <= HOST_WORLD);
  for (uint32_t p = 0; p < spec->params; p++)
    memcpy(host->value[p], values[p], sizeof(float) * (size_t)host_numel(spec, p));
}

/* Whether to go on after a call. */
static int went_well(host_t *host, fsdp_status_t status, const char *call) {
  if (status != FSDP_OK && !host->may_fail)
    test_fail(__FILE__, __LINE__, "%s returned %d (%s)", call, (int)status,
              fsdp_status_name(status));
  if (host->status == FSDP_OK) host->status = status;
  return status == FSDP_OK;
}

const float *host_param(host_t *host, uint32_t param) {
  static const float nothing[HOST_NUMEL];
  fsdp_tensor_t out;
  if (host->engine == NULL) return host->value[param];
  if (host->status != FSDP_OK) return nothing;
  const fsdp_status_t status =
      fsdp_engine_param_data(host->engine, host->first_param + param, &out);
  return went_well(host, status, "fsdp_engine_param_data") ? (const float *)out.data : nothing;
}

void host_add_grad(host_t *host, uint32_t param, const float *grad) {
  const int64_t n = host_numel(host->spec, param);
  if (!host->requires_grad[param] || host->status != FSDP_OK) return;
  if (host->engine == NULL) {
    float *sum = host->rank_grad[host->rank][param];
    int *has = &host->rank_has[host->rank][param];
    for (int64_t i = 0; i < n; i++) sum[i] = *has ? sum[i] + grad[i] : grad[i];
    *has = 1;
    return;
  }
  float scaled[HOST_NUMEL];
  const float scale = broken("no_average") ? (float)host->world : 1;
  for (int64_t i = 0; i < n; i++) scaled[i] = grad[i] * scale;
  int64_t shape[2] = {host->spec->param[param].shape[0], host->spec->param[param].shape[1]};
  fsdp_tensor_t t = tensor_f32(scaled, host->spec->param[param].ndim, shape);
  went_well(host, fsdp_engine_accumulate_grad(host->engine, host->first_param + param, &t),
            "fsdp_engine_accumulate_grad");
}

void host_enter(host_t *host, uint32_t module, int backward) {
  if (host->engine == NULL || !host->is_unit[module] || host->status != FSDP_OK) return;
  const uint32_t unit = host->unit[module];
  went_well(host,
            backward ? fsdp_engine_pre_backward(host->engine, unit)
                     : fsdp_engine_pre_forward(host->engine, unit),
            backward ? "fsdp_engine_pre_backward" : "fsdp_engine_pre_forward");
}

void host_leave(host_t *host, uint32_t module, int backward) {
  if (host->engine == NULL || !host->is_unit[module] || host->status != FSDP_OK) return;
  const uint32_t unit = host->unit[module];
  went_well(host,
            backward ? fsdp_engine_post_backward(host->engine, unit)
                     : fsdp_engine_post_forward(host->engine, unit),
            backward ? "fsdp_engine_post_backward" : "fsdp_engine_post_forward");
}

void host_set_requires_grad(host_t *host, uint32_t param, int requires_grad) {
  host->requires_grad[param] = requires_grad;
  if (host->engine != NULL)
    CHECK_OK(fsdp_engine_set_requires_grad(host->engine, host->first_param + param, requires_grad));
}

void host_reduce(host_t *host) {
  for (uint32_t p = 0; p < host->spec->params; p++) {
    int any = 0;
    for (int32_t r = 0; r < host->world; r++) any |= host->rank_has[r][p];
    for (int64_t i = 0; any && i < host_numel(host->spec, p); i++) {
      float sum = 0;
      int first = 1;
      for (int32_t r = 0; r < host->world; r++) {
        if (!host->rank_has[r][p]) continue;
        float part = host->rank_grad[r][p][i];
        if (host->round != NULL) part = host->round(part);
        sum = first ? part : sum + part;
        first = 0;
      }
      const float mean = sum / (float)host->world;
      host->grad[p][i] = host->has_grad[p] ? host->grad[p][i] + mean : mean;
    }
    host->has_grad[p] |= any;
  }
  memset(host->rank_has, 0, sizeof host->rank_has);
}

void host_zero_grad(host_t *host) {
  memset(host->has_grad, 0, sizeof host->has_grad);
  if (host->engine != NULL) CHECK_OK(fsdp_engine_zero_grad(host->engine));
}

static fsdp_shard_t shard_of(const host_t *host, uint32_t param) {
  fsdp_shard_t shard;
  memset(&shard, 0, sizeof shard);
  CHECK_OK(fsdp_engine_shard(host->engine, host->first_param + param, &shard));
  return shard;
}

static fsdp_param_info_t info_of(const host_t *host, uint32_t param) {
  fsdp_param_info_t info = param_info_init();
  CHECK_OK(fsdp_engine_param_info(host->engine, host->first_param + param, &info));
  return info;
}

void host_sgd(host_t *host, float lr) {
  for (uint32_t p = 0; p < host->spec->params; p++) {
    if (host->engine == NULL) {
      for (int64_t i = 0; host->has_grad[p] && i < host_numel(host->spec, p); i++)
        host->value[p][i] -= lr * host->grad[p][i];
    } else {
      const fsdp_shard_t shard = shard_of(host, p);
      for (int64_t i = 0; shard.grad != NULL && i < shard.numel; i++)
        shard.data[i] -= lr * shard.grad[i];
    }
  }
  host_zero_grad(host);
}

void host_check_shards(host_t *sharded, const host_t *reference, const char *what) {
  for (uint32_t p = 0; p < sharded->spec->params; p++) {
    const fsdp_param_info_t info = info_of(sharded, p);
    const fsdp_shard_t shard = shard_of(sharded, p);
    char text[192];
    snprintf(text, sizeof text, "%s: %s", what, host_param_name(sharded->spec, p));
    check_bits(shard.data, reference->value[p] + info.shard_offset, shard.numel, text);
    if ((shard.grad != NULL) != (reference->has_grad[p] != 0))
      test_fail(__FILE__, __LINE__, "%s: gradient %s, reference %s", text,
                shard.grad ? "present" : "absent", reference->has_grad[p] ? "present" : "absent");
    snprintf(text, sizeof text, "%s: gradient of %s", what, host_param_name(sharded->spec, p));
    if (shard.grad != NULL)
      check_bits(shard.grad, reference->grad[p] + info.shard_offset, shard.numel, text);
  }
}

void host_check_file(host_t *sharded, const safetensors_t *file, const char *prefix,
                     double tolerance) {
  for (uint32_t p = 0; p < sharded->spec->params; p++) {
    const fsdp_param_info_t info = info_of(sharded, p);
    char text[192];
    fsdp_tensor_t t;
    void *buffer;
    snprintf(text, sizeof text, "%s: %s", prefix, host_param_name(sharded->spec, p));
    CHECK_OK(fsdp_engine_unshard(sharded->engine, info.unit, &buffer));
    CHECK_OK(fsdp_engine_param_data(sharded->engine, sharded->first_param + p, &t));
    check_close((const float *)t.data, in_file(sharded->spec, p, file, prefix), info.numel,
                tolerance, text);
  }
  CHECK_OK(fsdp_engine_finish_forward(sharded->engine));
}

void host_check_grads(host_t *sharded, fsdp_comm_t *comm, const safetensors_t *file,
                      const char *prefix, double tolerance) {
  for (uint32_t p = 0; p < sharded->spec->params; p++) {
    const fsdp_param_info_t info = info_of(sharded, p);
    const fsdp_shard_t shard = shard_of(sharded, p);
    float whole[HOST_NUMEL] = {0};
    char name[128];
    safetensors_tensor_t unused;
    snprintf(name, sizeof name, "%s.%s", prefix, host_param_name(sharded->spec, p));
    if (safetensors_tensor(file, name, &unused) != 0) {
      CHECK(shard.grad == NULL);
      continue;
    }
    CHECK(shard.grad != NULL);
    memcpy(whole + info.shard_offset, shard.grad, sizeof(float) * (size_t)shard.numel);
    int64_t numel = info.numel;
    fsdp_tensor_t t = tensor_f32(whole, 1, &numel);
    CHECK_OK(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_SUM));
    check_close(whole, in_file(sharded->spec, p, file, prefix), info.numel, tolerance, name);
  }
}
