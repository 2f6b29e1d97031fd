/* A rank for the fault tests: trains a small model until it has done its steps or a call of the
 * library fails.
 *
 *   fault_worker [--steps N] [--width N] [--pause PHASE STEP] [--after MS] [--groups RANKS]
 *
 * Prints "at PHASE" in its first step, and again when it pauses, as told, in that phase and step:
 *   start (before joining), joined, forward, backward, optimizer, done
 * When a call fails it prints "error STATUS: MESSAGE" to stderr and exits with status 3. --after
 * sleeps before joining; --groups shards over groups of so many ranks (HYBRID_SHARD). Written without the checks of test.h: an error is what the drivers wait for.
 */
#include "test.h"

#include <time.h>
#include <unistd.h>

enum { UNITS = 4 };

static struct {
  long steps;
  int64_t width;
  const char *pause_phase;
  long pause_step;
  long after_ms;
  long groups;
} options = {0, 3001, "", -1, 0, 0};

static void sleep_ms(long ms) {
  struct timespec time;
  time.tv_sec = ms / 1000;
  time.tv_nsec = (ms % 1000) * 1000000;
  nanosleep(&time, NULL);
}

static void try_call(fsdp_status_t status) {
  if (status == FSDP_OK) return;
  fprintf(stderr, "error %d: %s\n", (int)status, fsdp_last_error_message());
  exit(3);
}

/* Says where this rank is in step 0 and where it pauses; the driver waits for these lines. */
static void at(const char *phase, long step) {
  const int pause = step == options.pause_step && strcmp(phase, options.pause_phase) == 0;
  if (step <= 0 || pause) {
    printf("at %s\n", phase);
    fflush(stdout);
  }
  if (pause) sleep_ms(60000);
}

static fsdp_engine_t *build(fsdp_comm_t *comm) {
  static float values[40000];
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  CHECK(options.width <= 40000);
  for (int i = 0; i < 40000; i++) values[i] = 1.0f / (float)(i + 1);
  try_call(fsdp_model_create("Stack", &model));
  for (uint32_t u = 0; u < UNITS; u++) {
    char name[16];
    uint32_t module = 0, param = 0;
    fsdp_tensor_t t = tensor_f32(values, 1, &options.width);
    snprintf(name, sizeof name, "layer%u", (unsigned)u);
    try_call(fsdp_model_add_module(model, 0, name, "Layer", &module));
    try_call(fsdp_model_add_parameter(model, module, "weight", &t, 1, &param));
  }
  try_call(fsdp_model_wrap_class(model, "Layer"));
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  if (options.groups > 0) {
    config.strategy = FSDP_HYBRID_SHARD;
    config.shard_size = (uint32_t)options.groups;
  }
  try_call(fsdp_engine_create(model, comm, &config, &engine));
  fsdp_model_destroy(model);
  return engine;
}

static void train_step(fsdp_engine_t *engine, fsdp_comm_t *comm, long step) {
  static float grad[40000];
  float loss = 0;
  int64_t one = 1;
  try_call(fsdp_engine_zero_grad(engine));
  try_call(fsdp_engine_pre_forward(engine, 0));
  for (uint32_t u = 1; u <= UNITS; u++) {
    fsdp_tensor_t weight;
    try_call(fsdp_engine_pre_forward(engine, u));
    if (u == 2) at("forward", step);
    try_call(fsdp_engine_param_data(engine, u - 1, &weight));
    for (int64_t i = 0; i < options.width; i++) loss += ((float *)weight.data)[i];
    try_call(fsdp_engine_post_forward(engine, u));
  }
  try_call(fsdp_engine_post_forward(engine, 0));
  try_call(fsdp_engine_pre_backward(engine, 0));
  for (uint32_t u = UNITS; u >= 1; u--) {
    try_call(fsdp_engine_pre_backward(engine, u));
    if (u == 2) at("backward", step);
    for (int64_t i = 0; i < options.width; i++) grad[i] = 0.001f * loss;
    fsdp_tensor_t t = tensor_f32(grad, 1, &options.width);
    try_call(fsdp_engine_accumulate_grad(engine, u - 1, &t));
    try_call(fsdp_engine_post_backward(engine, u));
  }
  try_call(fsdp_engine_post_backward(engine, 0));
  for (uint32_t p = 0; p < UNITS; p++) {
    fsdp_shard_t shard;
    try_call(fsdp_engine_shard(engine, p, &shard));
    if (p == 1) at("optimizer", step);
    for (int64_t i = 0; i < shard.numel; i++) shard.data[i] -= 1e-6f * shard.grad[i];
  }
  fsdp_tensor_t t = tensor_f32(&loss, 1, &one);
  try_call(fsdp_comm_all_reduce(comm, &t, FSDP_REDUCE_AVG));
}

static void parse(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    const int left = argc - i - 1;
    if (strcmp(argv[i], "--steps") == 0 && left >= 1) {
      options.steps = atol(argv[++i]);
    } else if (strcmp(argv[i], "--width") == 0 && left >= 1) {
      options.width = atol(argv[++i]);
    } else if (strcmp(argv[i], "--after") == 0 && left >= 1) {
      options.after_ms = atol(argv[++i]);
    } else if (strcmp(argv[i], "--groups") == 0 && left >= 1) {
      options.groups = atol(argv[++i]);
    } else if (strcmp(argv[i], "--pause") == 0 && left >= 2) {
      options.pause_phase = argv[++i];
      options.pause_step = atol(argv[++i]);
    } else {
      fprintf(stderr, "fault_worker: unknown argument %s\n", argv[i]);
      exit(2);
    }
  }
}

int main(int argc, char **argv) {
  fsdp_comm_t *comm = NULL;
  parse(argc, argv);
  sleep_ms(options.after_ms);
  at("start", 0);
  try_call(fsdp_comm_init_env(&comm));
  at("joined", 0);
  fsdp_engine_t *engine = build(comm);
  for (long step = 0; options.steps == 0 || step < options.steps; step++)
    train_step(engine, comm, step);
  try_call(fsdp_comm_barrier(comm));
  at("done", 0);
  fsdp_engine_destroy(engine);
  fsdp_comm_destroy(comm);
  return 0;
}
