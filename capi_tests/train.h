/* Training the network of net.h in two ways that must agree bit for bit: sharded over the ranks,
 * and as a data-parallel reference in which every rank computes all ranks' gradients itself and
 * takes their mean in rank order. */
#ifndef FSDP_TEST_TRAIN_H
#define FSDP_TEST_TRAIN_H

#include "net.h"

enum { TRAIN_MAX_WORLD = 8 };

/* ---- the optimizer: Adam, element by element ---- */

/* `n` elements of weight, gradient and state; `step` counts from 1. */
void adam(float *weight, const float *grad, float *m, float *v, int64_t n, int step);

/* ---- the reference ---- */

typedef struct {
  float value[NET_PARAMS][NET_MAX_NUMEL], m[NET_PARAMS][NET_MAX_NUMEL],
      v[NET_PARAMS][NET_MAX_NUMEL];
  /* Mean gradient, added up since the last reference_zero_grad. */
  float grad[NET_PARAMS][NET_MAX_NUMEL];
  int has_grad[NET_PARAMS];
  /* The same by shard group, where it is not averaged over the groups yet. */
  float group_grad[TRAIN_MAX_WORLD][NET_PARAMS][NET_MAX_NUMEL];
  int group_has[TRAIN_MAX_WORLD][NET_PARAMS];
  /* Of the backwards in progress, by simulated rank. */
  float rank_grad[TRAIN_MAX_WORLD][NET_PARAMS][NET_MAX_NUMEL];
  int rank_has[TRAIN_MAX_WORLD][NET_PARAMS];
  net_t net;
  /* `group`: ranks of a shard group, by default all. */
  int world, rank, group;
} reference_t;

reference_t *reference_create(const net_t *net, int world);
void reference_destroy(reference_t *reference);

/* Forward and backward of one simulated rank; returns its loss. */
float reference_backward(reference_t *reference, int rank, int step, int batch, unsigned flags);

/* Only the forward. */
float reference_forward(reference_t *reference, int rank, int step, int batch, unsigned flags);

/* The mean over ranks of what reference_backward collected, added to `grad`: reduced in the shard
 * groups, and then averaged over them. */
void reference_reduce(reference_t *reference);
void reference_reduce_in_groups(reference_t *reference);
void reference_average(reference_t *reference);
void reference_zero_grad(reference_t *reference);
void reference_adam(reference_t *reference, int step);

/* ---- sharded ---- */

typedef enum { WRAP_NOTHING, WRAP_ALWAYS, WRAP_SOME } train_wrap_t;

typedef struct {
  net_t net;
  fsdp_comm_t *comm;
  fsdp_engine_t *engine;
  int32_t rank, world;
  uint32_t unit_of_module[NET_MODULES];
  int is_unit[NET_MODULES];
  float m[NET_PARAMS][NET_MAX_NUMEL], v[NET_PARAMS][NET_MAX_NUMEL];
} sharded_t;

/* Makes the engine; `comm` stays the caller's; `config` may be NULL. */
sharded_t *sharded_create(const net_t *net, fsdp_comm_t *comm, train_wrap_t wrap,
                          const fsdp_engine_config_t *config);
void sharded_destroy(sharded_t *sharded);
float sharded_forward(sharded_t *sharded, int step, int batch, unsigned flags);
float sharded_backward(sharded_t *sharded, int step, int batch, unsigned flags);
void sharded_adam(sharded_t *sharded, int step);

/* How much what is checked may differ, relative to 1 and to the value: FSDP_TEST_TOLERANCE, where
 * sums of more than two ranks are in another order than the reference's; else 0: bit for bit. */
float sharded_tolerance(void);

/* Checks that shards of parameters and gradients are those of the reference, bit for bit. */
void sharded_check_shards(sharded_t *sharded, const reference_t *reference, const char *what,
                          int step);

/* Unshards every unit and checks the full parameters, bit for bit. */
void sharded_check_full(sharded_t *sharded, const reference_t *reference, const char *what);

#endif
