/* A small network with hand-written gradients. Its compute sees parameters and gradients only
 * through a net_host_t, so that the same code runs sharded (sharded.c) and as a plain data-parallel
 * reference (reference.c), bit for bit.
 *
 *   module      parameters                 in the forward
 *   (root)      temperature []             y = temperature * E^T h3 + c
 *   embed       weight E [D, I]            h0 = tanh(E x)
 *   block       scale [D], bonus [D]       h1 = tanh(F (scale * h0) + f), with NET_BONUS + bonus
 *   block.fc    weight F [D, D], bias f    (inside block)
 *   block.none  empty [0, 3]               its gradient is given, and has no elements
 *   shared      weight S [D, D], bias s    h2 = tanh(S h1 + s), h3 = tanh(S h2 + s); s is frozen
 *   spare       weight [3]                 never used
 *   head        weight = E (tied), c [I]   (y, above)
 *
 * The loss of a sample is |y - x|^2 / 2.
 */
#ifndef FSDP_TEST_NET_H
#define FSDP_TEST_NET_H

#include "test.h"

enum {
  NET_ROOT,
  NET_EMBED,
  NET_BLOCK,
  NET_FC,
  NET_NONE,
  NET_SHARED,
  NET_SPARE,
  NET_HEAD,
  NET_MODULES
};
enum {
  NET_TEMPERATURE,
  NET_EMBED_WEIGHT,
  NET_SCALE,
  NET_BONUS_VECTOR,
  NET_FC_WEIGHT,
  NET_FC_BIAS,
  NET_EMPTY,
  NET_SHARED_WEIGHT,
  NET_SHARED_BIAS,
  NET_SPARE_WEIGHT,
  NET_HEAD_BIAS,
  NET_PARAMS
};
enum { NET_MAX_WIDTH = 64, NET_MAX_NUMEL = NET_MAX_WIDTH * NET_MAX_WIDTH };

/* Flags of a forward. */
enum { NET_BONUS = 1 };

/* Sizes: inputs I and width D, both at most NET_MAX_WIDTH. */
typedef struct {
  int inputs, width;
} net_t;

/* How the compute reaches parameters and reports gradients. `module` is entered before and left
 * after its compute. */
typedef struct {
  void *self;
  const float *(*param)(void *self, uint32_t param);
  /* Adds the full gradient of this use of the parameter; `grad` is borrowed. */
  void (*add_grad)(void *self, uint32_t param, const float *grad);
  void (*enter)(void *self, uint32_t module, int backward);
  void (*leave)(void *self, uint32_t module, int backward);
} net_host_t;

/* Elements of a parameter. */
int64_t net_numel(const net_t *net, uint32_t param);

/* Starting value of an element: the same on every rank. */
float net_initial(uint32_t param, int64_t element);

/* Input of sample `sample` of step `step` on rank `rank`, `inputs` values. */
void net_input(const net_t *net, int step, int rank, int sample, float *x);

/* The inputs of the next forwards are those of the samples from this one on; at first 0. */
void net_skip_samples(int samples);

/* Registers modules and parameters (numbers as in the enums above). The parameters' memory is
 * static: create the engine before the next call. */
fsdp_model_t *net_model(const net_t *net);

/* Mean loss of `batch` samples: a forward over all of them, one after the other inside each module.
 */
float net_forward(const net_t *net, const net_host_t *host, int step, int rank, int batch,
                  unsigned flags);

/* The backward of the net_forward that was run last in this process with the same arguments. */
void net_backward(const net_t *net, const net_host_t *host, int batch, unsigned flags);

#endif
