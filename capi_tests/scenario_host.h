/* A small training host. A scenario's forward and backward are written once, against a host_t, and
 * run in two ways that must agree bit for bit: sharded by an engine, and as a reference in which
 * every rank computes all ranks' gradients itself and takes their mean in rank order.
 *
 * Breaks that every program knows: no_average (a rank's gradients are scaled by the world size).
 */
#ifndef FSDP_TEST_SCENARIO_HOST_H
#define FSDP_TEST_SCENARIO_HOST_H

#include "scenario.h"

enum { HOST_MODULES = 12, HOST_PARAMS = 12, HOST_NUMEL = 64, HOST_WORLD = 8 };

/* What a model is made of. Module 0 is the root; parents come first. */
typedef struct {
  uint32_t parent;
  const char *name, *class_name;
} host_module_t;

typedef struct {
  uint32_t module;
  const char *name;
  int32_t ndim;
  int64_t shape[2];
  int32_t requires_grad;
} host_param_t;

typedef struct {
  uint32_t modules, params;
  const host_module_t *module;
  const host_param_t *param;
} host_spec_t;

int64_t host_numel(const host_spec_t *spec, uint32_t param);

/* The fully qualified name of a module or a parameter; borrowed until the next call. */
const char *host_module_name(const host_spec_t *spec, uint32_t module);
const char *host_param_name(const host_spec_t *spec, uint32_t param);

typedef struct {
  const host_spec_t *spec;
  int32_t rank, world;
  int requires_grad[HOST_PARAMS];
  /* Sharded: the engine (not owned), where the spec's modules and parameters begin in it, which are
   * units. A module number of the spec plus first_module is the engine's. */
  fsdp_engine_t *engine;
  uint32_t first_module, first_param;
  int is_unit[HOST_MODULES];
  uint32_t unit[HOST_MODULES];
  /* The first failed call; the host makes no call after it. An error ends the program unless
   * may_fail. */
  int may_fail;
  fsdp_status_t status;
  /* Reference: full values, mean gradients, and those of the backward in progress by simulated
   * rank. */
  float value[HOST_PARAMS][HOST_NUMEL], grad[HOST_PARAMS][HOST_NUMEL];
  int has_grad[HOST_PARAMS];
  float rank_grad[HOST_WORLD][HOST_PARAMS][HOST_NUMEL];
  int rank_has[HOST_WORLD][HOST_PARAMS];
  /* How a rank's gradient is rounded before the sum, as reduce_dtype does; NULL: not. */
  float (*round)(float);
} host_t;

/* The model, nothing wrapped. `values` holds each parameter's elements until the engine is made;
 * NULL: no storage. The caller owns it. */
fsdp_model_t *host_model(const host_spec_t *spec, float *const *values);

/* The initial values in a file, as `values` above: static, until the next call. Their names begin
 * with `prefix`. */
float *const *host_values(const host_spec_t *spec, const safetensors_t *file, const char *prefix);

/* A host of an engine whose modules and parameters from the given numbers on are the spec's. */
void host_sharded(host_t *host, const host_spec_t *spec, fsdp_engine_t *engine, fsdp_comm_t *comm,
                  uint32_t first_module, uint32_t first_param);

/* The reference. Before each simulated rank's pass, set host->rank. */
void host_reference(host_t *host, const host_spec_t *spec, float *const *values, int32_t world);

/* ---- called by a scenario's forward and backward ---- */

const float *host_param(host_t *host, uint32_t param);
/* Adds a full gradient of one use; nothing happens if the parameter is frozen. `grad` is borrowed.
 */
void host_add_grad(host_t *host, uint32_t param, const float *grad);
void host_enter(host_t *host, uint32_t module, int backward);
void host_leave(host_t *host, uint32_t module, int backward);

/* ---- between passes ---- */

void host_set_requires_grad(host_t *host, uint32_t param, int requires_grad);
/* Reference: the mean over ranks of what the passes collected is added to the gradients. */
void host_reduce(host_t *host);
void host_zero_grad(host_t *host);
/* One step of SGD without momentum, and zero_grad. */
void host_sgd(host_t *host, float lr);

/* ---- checks ---- */

/* Shards of parameters and gradients are the reference's, bit for bit. */
void host_check_shards(host_t *sharded, const host_t *reference, const char *what);
/* Full parameters (those with `trained` 0 too) are those in the file whose names begin with
 * `prefix`. */
void host_check_file(host_t *sharded, const safetensors_t *file, const char *prefix,
                     double tolerance);
/* Full gradients likewise. Collective; the shards are gathered with the communicator. Gradients
 * that the file lacks must be absent. */
void host_check_grads(host_t *sharded, fsdp_comm_t *comm, const safetensors_t *file,
                      const char *prefix, double tolerance);

#endif
