/* No rank ever reads a half-written shard. Ranks write their shards element by element, slowly,
 * while others are fast to start the next forward or slow to end the last one; every value read
 * must belong to the iteration that is read.
 *
 * The weights of iteration i are all i. Each rank is in turn the slow reader and the slow writer.
 */
#include "ranks.h"

enum { LAYERS = 3, WIDTH = 203, ITERATIONS = 8 };

typedef enum { AFTER_BACKWARD, AFTER_FORWARD, AFTER_FORWARD_AND_MORE_FORWARDS, CASES } case_t;

static const char *const CASE[CASES] = {"writes after a backward", "writes after a forward",
                                        "writes after two forwards"};

static void check_all(fsdp_engine_t *engine, uint32_t layer, float value) {
  fsdp_tensor_t out;
  CHECK_OK(fsdp_engine_param_data(engine, layer, &out));
  for (int64_t i = 0; i < WIDTH; i++) {
    /* volatile: every element is read when it is compared. */
    const float got = ((volatile float *)out.data)[i];
    if (got != value) {
      test_fail(__FILE__, __LINE__, "layer %u, element %lld is %g in iteration %g", (unsigned)layer,
                (long long)i, (double)got, (double)value);
    }
  }
}

static void read_layers(fsdp_engine_t *engine, float value, int slow) {
  CHECK_OK(fsdp_engine_pre_forward(engine, 0));
  for (uint32_t l = 0; l < LAYERS; l++) {
    CHECK_OK(fsdp_engine_pre_forward(engine, l + 1));
    check_all(engine, l, value);
    if (slow) sleep_ms(5);
    check_all(engine, l, value);
    CHECK_OK(fsdp_engine_post_forward(engine, l + 1));
  }
  CHECK_OK(fsdp_engine_post_forward(engine, 0));
}

static void read_backwards(fsdp_engine_t *engine, float value, int slow) {
  CHECK_OK(fsdp_engine_pre_backward(engine, 0));
  for (uint32_t l = LAYERS; l-- > 0;) {
    CHECK_OK(fsdp_engine_pre_backward(engine, l + 1));
    CHECK_OK(stack_add_grad(engine, l, value));
    if (slow) sleep_ms(5);
    check_all(engine, l, value);
    CHECK_OK(fsdp_engine_post_backward(engine, l + 1));
  }
  CHECK_OK(fsdp_engine_post_backward(engine, 0));
}

static void write_shards(fsdp_engine_t *engine, float value, int slow) {
  for (uint32_t l = 0; l < LAYERS; l++) {
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_shard(engine, l, &shard));
    for (int64_t i = 0; i < shard.numel; i++) {
      ((volatile float *)shard.data)[i] = value;
      if (slow && i == shard.numel / 2) sleep_ms(5);
    }
  }
}

static void run(const job_t *job, case_t which) {
  fsdp_engine_t *engine = stack_engine(job->comm, LAYERS, WIDTH, 1);
  if (which != AFTER_BACKWARD) CHECK_OK(fsdp_engine_set_grad_enabled(engine, 0));
  for (int i = 1; i <= ITERATIONS; i++) {
    const int slow_reader = job->rank == i % job->world,
              slow_writer = job->rank == (i + 1) % job->world;
    read_layers(engine, (float)i, slow_reader);
    if (which == AFTER_FORWARD_AND_MORE_FORWARDS) read_layers(engine, (float)i, !slow_reader);
    if (which == AFTER_BACKWARD) read_backwards(engine, (float)i, slow_reader);
    if (which != AFTER_BACKWARD) CHECK_OK(fsdp_engine_begin_write(engine));
    write_shards(engine, (float)(i + 1), slow_writer);
  }
  read_layers(engine, ITERATIONS + 1, 0);
  CHECK_EQ(stats_of(engine).all_gather_bytes_moved, 0);
  fsdp_engine_destroy(engine);
}

/* A training loop with a forward for evaluation and an averaging of weights between its steps. */
static void evaluation_between_steps(const job_t *job) {
  fsdp_engine_t *engine = stack_engine(job->comm, LAYERS, WIDTH, 1);
  float value = 1;
  for (int i = 1; i <= ITERATIONS; i++) {
    const int slow = job->rank == i % job->world;
    read_layers(engine, value, slow);
    read_backwards(engine, value, 0);
    write_shards(engine, value += 1, !slow);
    CHECK_OK(fsdp_engine_set_grad_enabled(engine, 0));
    read_layers(engine, value, slow);
    CHECK_OK(fsdp_engine_begin_write(engine));
    write_shards(engine, value += 1, slow);
    read_layers(engine, value, !slow);
    CHECK_OK(fsdp_engine_set_grad_enabled(engine, 1));
  }
  fsdp_engine_destroy(engine);
}

int main(void) {
  const job_t job = join_job();
  for (int i = 0; i < CASES; i++) {
    test_context(CASE[i]);
    run(&job, (case_t)i);
  }
  test_context("evaluation between steps");
  evaluation_between_steps(&job);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
