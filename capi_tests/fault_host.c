/* Lent collectives when something goes wrong, with ranks that are threads (hub.h): a rank that is
 * missing, differs, leaves, aborts, or whose callback fails. Every rank gets an error that says
 * what and who; none waits for ever. */
#include "hub.h"

#include <time.h>

enum { TIMEOUT_MS = 500 };

static void sleep_ms(int ms) {
  struct timespec time;
  time.tv_sec = ms / 1000;
  time.tv_nsec = (long)(ms % 1000) * 1000000;
  nanosleep(&time, NULL);
}

/* Three units, "layer0" to "layer2", of one parameter of `width` floats each. */
static fsdp_status_t engine_of(hub_rank_t *rank, int64_t width, fsdp_engine_t **engine) {
  float values[64];
  fsdp_model_t *model = NULL;
  CHECK(width <= 64);
  for (int i = 0; i < 64; i++) values[i] = 1;
  CHECK_OK(fsdp_model_create("Stack", &model));
  for (uint32_t l = 0; l < 3; l++) {
    char name[16];
    uint32_t module = 0, param = 0;
    snprintf(name, sizeof name, "layer%u", (unsigned)l);
    fsdp_tensor_t t = tensor_f32(values, 1, &width);
    CHECK_OK(fsdp_model_add_module(model, 0, name, "Layer", &module));
    CHECK_OK(fsdp_model_add_parameter(model, module, "weight", &t, 1, &param));
  }
  CHECK_OK(fsdp_model_wrap_class(model, "Layer"));
  const fsdp_status_t status = fsdp_engine_create(model, rank->comm, NULL, engine);
  fsdp_model_destroy(model);
  return status;
}

/* A forward and a backward over the units in the order given, as far as they go. */
static fsdp_status_t step(fsdp_engine_t *engine, const uint32_t *units, int count) {
  fsdp_status_t status = FSDP_OK;
  for (int i = 0; i < count && status == FSDP_OK; i++) {
    void *buffer = NULL;
    status = fsdp_engine_unshard(engine, units[i], &buffer);
  }
  for (int i = count; i-- > 0 && status == FSDP_OK;) {
    fsdp_tensor_t grad;
    int32_t accumulate = 0;
    status = fsdp_engine_param_grad(engine, units[i] - 1, &grad, &accumulate);
    for (int64_t k = 0; status == FSDP_OK && k < grad.shape[0]; k++) ((float *)grad.data)[k] = 1;
    if (status == FSDP_OK) status = fsdp_engine_reduce(engine, units[i]);
  }
  return status == FSDP_OK ? fsdp_engine_finish_backward(engine) : status;
}

static void check_broken(const hub_rank_t *rank, fsdp_status_t status, fsdp_status_t want,
                         const char *const *texts) {
  char message[1024];
  snprintf(message, sizeof message, "%s", fsdp_last_error_message());
  if (status != want)
    test_fail(__FILE__, __LINE__, "rank %d: status %d, not %d: %s", (int)rank->rank, (int)status,
              (int)want, message);
  for (; *texts != NULL; texts++) {
    if (strstr(message, *texts) == NULL)
      test_fail(__FILE__, __LINE__, "rank %d: \"%s\" is not in the message", (int)rank->rank,
                *texts);
  }
  CHECK_ERR(fsdp_comm_barrier(rank->comm), want, message);
  CHECK_ERR(fsdp_comm_async_error(rank->comm), want, message);
}

static const uint32_t ALL[] = {1, 2, 3};

/* Rank 1 does not come to the second unit's all-gather; when it does, it gets the others' error. */
static void absent(hub_rank_t *rank) {
  const char *const texts[] = {"rank 1 did not come", "all-gather of unit \"layer1\"", "500 ms",
                               NULL};
  fsdp_engine_t *engine = NULL;
  CHECK_OK(engine_of(rank, 10, &engine));
  CHECK_OK(step(engine, ALL, 3));
  if (rank->rank == 1) {
    void *buffer = NULL;
    CHECK_OK(fsdp_engine_unshard(engine, 1, &buffer));
    sleep_ms(3 * TIMEOUT_MS);
  }
  check_broken(rank, step(engine, ALL, 3), FSDP_ERR_TIMEOUT, texts);
  fsdp_engine_destroy(engine);
}

/* The same in a host without messages: who is missing is not known. */
static void absent_and_silent(hub_rank_t *rank) {
  const char *const texts[] = {"all-gather of unit \"layer0\"", "500 ms", "no messages", NULL};
  fsdp_engine_t *engine = NULL;
  CHECK_OK(engine_of(rank, 10, &engine));
  if (rank->rank != 1) check_broken(rank, step(engine, ALL, 3), FSDP_ERR_TIMEOUT, texts);
  fsdp_engine_destroy(engine);
}

/* A rank that reduces late is named, too. */
static void absent_in_backward(hub_rank_t *rank) {
  const char *const texts[] = {"rank 1 did not come", "reduce-scatter of unit \"layer2\"", NULL};
  fsdp_engine_t *engine = NULL;
  CHECK_OK(engine_of(rank, 10, &engine));
  if (rank->rank == 1) {
    for (uint32_t u = 1; u <= 3; u++) {
      void *buffer = NULL;
      CHECK_OK(fsdp_engine_unshard(engine, u, &buffer));
    }
    sleep_ms(3 * TIMEOUT_MS);
    fsdp_tensor_t grad;
    int32_t accumulate = 0;
    const fsdp_status_t status = fsdp_engine_param_grad(engine, 2, &grad, &accumulate);
    if (status != FSDP_OK) {
      check_broken(rank, status, FSDP_ERR_TIMEOUT, texts);
    } else {
      check_broken(rank, fsdp_engine_reduce(engine, 3), FSDP_ERR_TIMEOUT, texts);
    }
  } else {
    check_broken(rank, step(engine, ALL, 3), FSDP_ERR_TIMEOUT, texts);
  }
  fsdp_engine_destroy(engine);
}

static void other_order(hub_rank_t *rank) {
  const uint32_t swapped[] = {1, 3, 2};
  const char *const texts[] = {
      "Forward order differs", "rank 0 runs", "rank 1 runs", "\"layer1\"", "\"layer2\"", NULL};
  fsdp_engine_t *engine = NULL;
  CHECK_OK(engine_of(rank, 10, &engine));
  CHECK_OK(fsdp_engine_begin_forward(engine, 1));
  check_broken(rank, step(engine, rank->rank == 1 ? swapped : ALL, 3), FSDP_ERR_MISMATCH, texts);
  fsdp_engine_destroy(engine);
}

/* After many iterations that agreed, and in the backward only. */
static void other_backward(hub_rank_t *rank) {
  const char *const texts[] = {"ranks disagree", "rank 0 runs reduce-scatter of unit \"layer2\"",
                               "rank 1 runs reduce-scatter of unit \"layer0\"", "layer0.weight",
                               NULL};
  fsdp_engine_t *engine = NULL;
  fsdp_status_t status = FSDP_OK;
  CHECK_OK(engine_of(rank, 10, &engine));
  for (int i = 0; i < 20; i++) CHECK_OK(step(engine, ALL, 3));
  for (uint32_t u = 1; u <= 3; u++) {
    void *buffer = NULL;
    CHECK_OK(fsdp_engine_unshard(engine, u, &buffer));
  }
  for (uint32_t i = 0; i < 3 && status == FSDP_OK; i++)
    status = fsdp_engine_reduce(engine, rank->rank == 1 ? i + 1 : 3 - i);
  if (status == FSDP_OK) status = fsdp_engine_finish_backward(engine);
  check_broken(rank, status, FSDP_ERR_MISMATCH, texts);
  fsdp_engine_destroy(engine);
}

/* Found out when the engine is made; the communicator works on. */
static void other_model(hub_rank_t *rank) {
  fsdp_engine_t *engine = NULL;
  CHECK_ERR(engine_of(rank, rank->rank == 1 ? 11 : 10, &engine), FSDP_ERR_MISMATCH,
            "\"layer0.weight\" of shape [11]");
  CHECK_OK(fsdp_comm_barrier(rank->comm));
  CHECK_OK(engine_of(rank, 10, &engine));
  CHECK_OK(step(engine, ALL, 3));
  fsdp_engine_destroy(engine);
}

/* Sizes that the collectives themselves would not survive. */
static void other_size(hub_rank_t *rank) {
  const char *const texts[] = {"rank 0 runs all-reduce (float32, 4 bytes",
                               "rank 1 runs all-reduce (float32, 8 bytes", NULL};
  float values[2] = {1, 1};
  int64_t count = rank->rank == 1 ? 2 : 1;
  fsdp_tensor_t t = tensor_f32(values, 1, &count);
  check_broken(rank, fsdp_comm_all_reduce(rank->comm, &t, FSDP_REDUCE_SUM), FSDP_ERR_MISMATCH,
               texts);
}

static void leaves(hub_rank_t *rank) {
  const char *const texts[] = {"rank 1 has left", "all-gather of unit \"layer0\"", NULL};
  fsdp_engine_t *engine = NULL;
  CHECK_OK(engine_of(rank, 10, &engine));
  /* Whoever misses it first breaks the communicator for all: they shall have their engines. */
  if (rank->rank == 1) sleep_ms(200);
  if (rank->rank != 1) check_broken(rank, step(engine, ALL, 3), FSDP_ERR_MISMATCH, texts);
  fsdp_engine_destroy(engine);
}

static void aborts(hub_rank_t *rank) {
  const char *const texts[] = {"rank 1 aborted: the data is gone", NULL};
  fsdp_engine_t *engine = NULL;
  CHECK_OK(engine_of(rank, 10, &engine));
  if (rank->rank == 1) {
    sleep_ms(50);
    CHECK_OK(fsdp_comm_abort(rank->comm, "the data is gone"));
  }
  check_broken(rank, step(engine, ALL, 3), FSDP_ERR_ABORTED, texts);
  fsdp_engine_destroy(engine);
}

/* The rank whose callback fails says which, and for what; the others learn of it. */
static void failing(hub_rank_t *rank, const char *name, const char *text) {
  const char *const texts[] = {"rank 1: ", text, name, "returned 4711: a failure by intention",
                               NULL};
  fsdp_engine_t *engine = NULL;
  CHECK_OK(engine_of(rank, 10, &engine));
  CHECK_OK(step(engine, ALL, 3));
  if (rank->rank == 1) {
    sleep_ms(100); /* the others' step has ended, too */
    rank->failing = name;
    rank->code = 4711;
  }
  check_broken(rank, step(engine, ALL, 3), FSDP_ERR_CALLBACK, texts);
  fsdp_engine_destroy(engine);
}

static void failing_gather(hub_rank_t *rank) {
  failing(rank, "all_gather", "all-gather of unit \"layer0\"");
}
static void failing_scatter(hub_rank_t *rank) {
  failing(rank, "reduce_scatter", "reduce-scatter of unit \"layer2\"");
}

static void failing_test(hub_rank_t *rank) {
  failing(rank, "test", "all-gather of unit \"layer0\"");
}
static void failing_poll(hub_rank_t *rank) { failing(rank, "poll", "polling for messages"); }

/* No memory for sums, in the middle of a backward. */
static void failing_alloc(hub_rank_t *rank) {
  const char *const texts[] = {"rank 1: reduce-scatter of unit \"layer2\"",
                               "the host's alloc has no ", NULL};
  fsdp_engine_t *engine = NULL;
  CHECK_OK(engine_of(rank, 10, &engine));
  CHECK_OK(step(engine, ALL, 3));
  if (rank->rank == 1) {
    rank->failing = "alloc";
    rank->code = 1;
  }
  check_broken(rank, step(engine, ALL, 3), FSDP_ERR_OUT_OF_MEMORY, texts);
  fsdp_engine_destroy(engine);
}

static void failing_split(hub_rank_t *rank) {
  const char *const texts[] = {"rank ", ": splitting a communicator",
                               "the host's split returned 4711: a failure by intention", NULL};
  fsdp_comm_t *part = NULL;
  rank->failing = "split";
  rank->code = 4711;
  check_broken(rank, fsdp_comm_split(rank->comm, 0, 0, &part), FSDP_ERR_CALLBACK, texts);
  CHECK(part == NULL);
}

static void no_split(hub_rank_t *rank) {
  fsdp_comm_t *part = NULL;
  CHECK_ERR(fsdp_comm_split(rank->comm, 0, 0, &part), FSDP_ERR_UNSUPPORTED, "no split");
  CHECK_OK(fsdp_comm_barrier(rank->comm));
}

int main(void) {
  const hub_kind_t requests = {0, 0, 0, 0, 0}, waits = {0, 1, 0, 1, 0}, silent = {0, 0, 1, 0, 0},
                   plain = {1, 0, 0, 0, 1}, lends = {0, 0, 0, 1, 0};
  for (int world = 2; world <= 4; world++) {
    test_context("absent");
    hub_run(world, requests, TIMEOUT_MS, 1, absent);
    test_context("absent, waiting");
    hub_run(world, waits, TIMEOUT_MS, 1, absent);
    test_context("absent in the backward");
    hub_run(world, requests, TIMEOUT_MS, 1, absent_in_backward);
    test_context("other order");
    hub_run(world, requests, 30000, 1, other_order);
    hub_run(world, plain, 30000, 1, other_order);
    test_context("other backward");
    hub_run(world, waits, 30000, 1, other_backward);
    test_context("other model");
    hub_run(world, requests, 30000, 0, other_model);
    test_context("other size");
    hub_run(world, plain, 30000, 1, other_size);
    test_context("leaves");
    hub_run(world, requests, 30000, 1, leaves);
    test_context("aborts");
    hub_run(world, requests, 30000, 1, aborts);
    test_context("a failing all_gather");
    hub_run(world, requests, 30000, 1, failing_gather);
    test_context("a failing reduce_scatter");
    hub_run(world, waits, 30000, 1, failing_scatter);
    test_context("a failing test");
    hub_run(world, requests, 30000, 1, failing_test);
    test_context("a failing poll");
    hub_run(world, waits, 30000, 1, failing_poll);
    test_context("a failing alloc");
    hub_run(world, lends, 30000, 1, failing_alloc);
    test_context("a failing split");
    hub_run(world, requests, 30000, 1, failing_split);
  }
  test_context("absent, without messages");
  hub_run(2, silent, TIMEOUT_MS, 1, absent_and_silent);
  test_context("without split");
  hub_run(2, plain, 30000, 0, no_split);
  return 0;
}
