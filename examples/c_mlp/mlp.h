/* A multilayer perceptron with hand-written gradients, sharded over the ranks of a communicator.
 *
 * This is the part of the example to read first: it shows what a host with its own tensors and its
 * own backward has to tell the library. Every function returns FSDP_OK, or the status of the call
 * that failed; fsdp_last_error_message() then says more.
 */
#ifndef MLP_H
#define MLP_H

#include <fsdp.h>

enum { MLP_MAX_LAYERS = 64 };

/* One fully connected layer: out = tanh(weight in + bias); the last layer has no tanh. */
typedef struct {
  int inputs, outputs;
  uint32_t unit;         /* the unit of the engine that holds this layer */
  uint32_t weight, bias; /* numbers of its parameters: [outputs, inputs] and [outputs] */
  float *activation; /* the layer's output for each sample of the batch, kept for the backward */
  float *delta;      /* the gradient of the loss with respect to that, before the tanh */
} mlp_layer_t;

typedef struct {
  fsdp_engine_t *engine;
  int layers, batch;
  mlp_layer_t layer[MLP_MAX_LAYERS];
  const float *input; /* of the last forward */
} mlp_t;

/* Makes a perceptron with sizes[0] inputs and `layers` layers of sizes[1], sizes[2], ... outputs,
 * for batches of up to `batch` samples. Each layer becomes a unit. Collective: every rank passes
 * the same sizes and seed. */
fsdp_status_t mlp_create(mlp_t *mlp, fsdp_comm_t *comm, const int *sizes, int layers, int batch,
                         unsigned seed);

/* Computes the outputs of `batch` samples. *output stays valid until the next forward. Collective.
 */
fsdp_status_t mlp_forward(mlp_t *mlp, const float *input, int batch, const float **output);

/* Computes all gradients of the last forward from that of the loss with respect to the outputs.
 * When it returns, every gradient has been averaged over the ranks and lies in its shard.
 * Collective. */
fsdp_status_t mlp_backward(mlp_t *mlp, const float *output_gradient, int batch);

/* Frees everything. */
void mlp_destroy(mlp_t *mlp);

#endif
