/* One engine, model and communicator called from several threads at once: every call succeeds or
 * fails as documented, nothing crashes, and destroying a handle while others use it is an error for
 * them, not a use of freed memory. */
#include "toy.h"

#include <pthread.h>

enum { THREADS = 4, ROUNDS = 400 };

typedef struct {
  toy_t toy;
  int number;
} worker_t;

/* Reads everything there is to read; it all must succeed while another thread trains. */
static void *read_all(void *argument) {
  const toy_t toy = ((worker_t *)argument)->toy;
  for (int round = 0; round < ROUNDS; round++) {
    uint32_t count = 0, unit = 0;
    CHECK_OK(fsdp_engine_unit_count(toy.engine, &count));
    CHECK_EQ(count, TOY_UNITS);
    CHECK_OK(fsdp_engine_unit_of_module(toy.engine, 1, &unit));
    for (uint32_t u = 0; u < TOY_UNITS; u++) (void)toy_state(toy.engine, u);
    for (uint32_t p = 0; p < TOY_PARAMS; p++)
      CHECK_EQ(toy_shard(toy.engine, p).numel, TOY_NUMEL[p]);
    CHECK_EQ(stats_of(toy.engine).all_gather_bytes_moved, 0);
    CHECK_OK(fsdp_comm_async_error(toy.comm));
    fsdp_tensor_t out;
    fsdp_status_t status = fsdp_engine_param_data(toy.engine, TOY_WEIGHT, &out);
    CHECK(status == FSDP_OK || status == FSDP_ERR_INVALID_STATE);
  }
  return NULL;
}

static void *train(void *argument) {
  const toy_t toy = ((worker_t *)argument)->toy;
  for (int round = 0; round < ROUNDS; round++) {
    CHECK_OK(fsdp_engine_zero_grad(toy.engine));
    toy_forward(toy.engine);
    toy_backward(toy.engine, 1);
    CHECK(toy_shard(toy.engine, TOY_V).grad[0] == 1);
  }
  return NULL;
}

static void readers_beside_a_trainer(void) {
  pthread_t threads[THREADS];
  worker_t workers[THREADS];
  toy_t toy = toy_create();
  for (int i = 0; i < THREADS; i++) {
    workers[i].toy = toy;
    workers[i].number = i;
    CHECK_EQ(pthread_create(&threads[i], NULL, i == 0 ? train : read_all, &workers[i]), 0);
  }
  for (int i = 0; i < THREADS; i++) CHECK_EQ(pthread_join(threads[i], NULL), 0);
  CHECK_EQ(stats_of(toy.engine).all_gathers, 5 * ROUNDS);
  toy_destroy(toy);
}

/* Any order of hooks, from all threads: the only demand is a status of the documented kind. */
static void *call_anything(void *argument) {
  const worker_t *w = (const worker_t *)argument;
  uint32_t random = 12345u + (uint32_t)w->number;
  for (int round = 0; round < ROUNDS; round++) {
    random = random * 1664525u + 1013904223u;
    const uint32_t unit = (random >> 8) % (TOY_UNITS + 1);
    fsdp_status_t status = FSDP_OK;
    void *buffer = NULL;
    switch ((random >> 16) % 10) {
      case 0: status = fsdp_engine_pre_forward(w->toy.engine, unit); break;
      case 1: status = fsdp_engine_post_forward(w->toy.engine, unit); break;
      case 2: status = fsdp_engine_pre_backward(w->toy.engine, unit); break;
      case 3: status = fsdp_engine_post_backward(w->toy.engine, unit); break;
      case 4: status = fsdp_engine_unshard(w->toy.engine, unit, &buffer); break;
      case 5: status = fsdp_engine_reshard(w->toy.engine, unit); break;
      case 6: status = fsdp_engine_reduce(w->toy.engine, unit); break;
      case 7: status = fsdp_engine_finish_backward(w->toy.engine); break;
      case 8: status = fsdp_engine_begin_write(w->toy.engine); break;
      default: {
        fsdp_tensor_t grad;
        int32_t accumulate = 0;
        status = fsdp_engine_param_grad(w->toy.engine, unit, &grad, &accumulate);
      }
    }
    CHECK(status == FSDP_OK || status == FSDP_ERR_INVALID_STATE ||
          status == FSDP_ERR_INVALID_ARGUMENT);
    CHECK((status == FSDP_OK) == (fsdp_last_error_message()[0] == '\0'));
  }
  return NULL;
}

static void hooks_from_all_threads(void) {
  pthread_t threads[THREADS];
  worker_t workers[THREADS];
  toy_t toy = toy_create();
  for (int i = 0; i < THREADS; i++) {
    workers[i].toy = toy;
    workers[i].number = i;
    CHECK_EQ(pthread_create(&threads[i], NULL, call_anything, &workers[i]), 0);
  }
  for (int i = 0; i < THREADS; i++) CHECK_EQ(pthread_join(threads[i], NULL), 0);
  /* Whatever state that left, the next iteration is a proper one. */
  CHECK_OK(fsdp_engine_finish_backward(toy.engine));
  CHECK_OK(fsdp_engine_zero_grad(toy.engine));
  toy_forward(toy.engine);
  toy_backward(toy.engine, 6);
  CHECK(toy_shard(toy.engine, TOY_WEIGHT).grad[20] == 6);
  toy_destroy(toy);
}

/* Uses a handle until another thread has destroyed it. */
static void *use_until_destroyed(void *argument) {
  const toy_t toy = ((worker_t *)argument)->toy;
  fsdp_status_t status = FSDP_OK;
  while (status == FSDP_OK) {
    fsdp_stats_t stats;
    stats.struct_size = sizeof stats;
    status = fsdp_engine_stats(toy.engine, &stats);
  }
  CHECK_EQ(status, FSDP_ERR_INVALID_HANDLE);
  return NULL;
}

static void destroying_while_in_use(void) {
  for (int round = 0; round < 20; round++) {
    pthread_t threads[THREADS];
    worker_t workers[THREADS];
    toy_t toy = toy_create();
    for (int i = 0; i < THREADS; i++) {
      workers[i].toy = toy;
      workers[i].number = i;
      CHECK_EQ(pthread_create(&threads[i], NULL, use_until_destroyed, &workers[i]), 0);
    }
    fsdp_engine_destroy(toy.engine);
    for (int i = 0; i < THREADS; i++) CHECK_EQ(pthread_join(threads[i], NULL), 0);
    toy.engine = NULL;
    toy_destroy(toy);
  }
}

int main(void) {
  readers_beside_a_trainer();
  hooks_from_all_threads();
  destroying_while_in_use();
  return 0;
}
