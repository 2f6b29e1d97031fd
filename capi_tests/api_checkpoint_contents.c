/* The functions for everything that a checkpoint can hold, for saves in the background and for
 * consolidation, at world size 1: good calls, NULLs, wrong arguments, states and handles. What is
 * on disk is tested in tests/checkpoint*.rs and feature_checkpoint_python.py. */
#include "checkpoint_model.h"
#include "toy.h"

#include <unistd.h>

static char folder[256];
static const fsdp_status_t BAD = FSDP_ERR_INVALID_ARGUMENT;

/* `name` in the test's own folder; valid until the second next call. */
static const char *path_of(const char *name) {
  static char paths[2][320];
  static int which = 0;
  which = !which;
  snprintf(paths[which], sizeof paths[which], "%s/%s", folder, name);
  return paths[which];
}

static void tensors_of_every_type(void) {
  static const uint8_t types[][2] = {{FSDP_DTYPE_INT, 8},    {FSDP_DTYPE_INT, 16},
                                     {FSDP_DTYPE_INT, 32},   {FSDP_DTYPE_INT, 64},
                                     {FSDP_DTYPE_UINT, 8},   {FSDP_DTYPE_UINT, 16},
                                     {FSDP_DTYPE_UINT, 32},  {FSDP_DTYPE_UINT, 64},
                                     {FSDP_DTYPE_FLOAT, 16}, {FSDP_DTYPE_FLOAT, 32},
                                     {FSDP_DTYPE_FLOAT, 64}, {FSDP_DTYPE_BFLOAT, 16},
                                     {FSDP_DTYPE_BOOL, 8}};
  enum { TYPES = 13 };
  toy_t toy = toy_create();
  uint64_t data[TYPES][4], read[TYPES][4];
  int64_t shape[2] = {2, 2}, strides[2] = {1, 2};
  char names[TYPES][8];
  fsdp_named_tensor_t tensors[TYPES];
  fsdp_checkpoint_contents_t contents = FSDP_CHECKPOINT_CONTENTS_INIT;
  memset(read, 0xff, sizeof read);
  memset(data, 0xff, sizeof data);
  for (int t = 0; t < TYPES; t++) {
    snprintf(names[t], sizeof names[t], "t%d", t);
    memset(data[t], t + 1, 4 * types[t][1] / 8);
    tensors[t].name = names[t];
    tensors[t].tensor = tensor_of(data[t], 2, shape, types[t][0], types[t][1]);
  }
  contents.tensors = tensors;
  contents.tensor_count = TYPES;
  CHECK_OK(fsdp_checkpoint_save_contents(toy.engine, path_of("types"), &contents));
  for (int t = 0; t < TYPES; t++) tensors[t].tensor.data = read[t];
  CHECK_OK(fsdp_checkpoint_load_contents(toy.engine, path_of("types"), &contents));
  CHECK(memcmp(data, read, sizeof data) == 0);

  contents.tensor_count = 1;
  tensors[0].tensor.dtype.bits = 12;
  CHECK_ERR(fsdp_checkpoint_save_contents(toy.engine, path_of("x"), &contents),
            FSDP_ERR_UNSUPPORTED, "tensor \"t0\" has the unsupported dtype");
  tensors[0].tensor.dtype.code = 5; /* complex */
  tensors[0].tensor.dtype.bits = 64;
  CHECK_ERR(fsdp_checkpoint_save_contents(toy.engine, path_of("x"), &contents),
            FSDP_ERR_UNSUPPORTED, "tensor \"t0\" has the unsupported dtype");
  tensors[0].tensor = tensor_f32(data[0], 2, shape);
  tensors[0].tensor.strides = strides;
  CHECK_ERR(fsdp_checkpoint_save_contents(toy.engine, path_of("x"), &contents),
            FSDP_ERR_UNSUPPORTED, "tensor \"t0\" is not contiguous");
  tensors[0].tensor.strides = NULL;
  tensors[0].tensor.data = NULL;
  CHECK_ERR(fsdp_checkpoint_save_contents(toy.engine, path_of("x"), &contents), BAD,
            "data of tensor \"t0\" is NULL");
  tensors[0].tensor.data = data[0];
  tensors[0].name = NULL;
  CHECK_ERR(fsdp_checkpoint_save_contents(toy.engine, path_of("x"), &contents), BAD, "NULL");
  tensors[0].name = "bias";
  CHECK_ERR(fsdp_checkpoint_save_contents(toy.engine, path_of("x"), &contents), BAD,
            "\"bias\" is given twice, or is a parameter");
  CHECK(access(path_of("x"), F_OK) != 0);
  toy_destroy(toy);
}

static void wrong_contents(void) {
  toy_t toy = toy_create(), other = toy_create();
  fsdp_checkpoint_contents_t contents = FSDP_CHECKPOINT_CONTENTS_INIT;
  fsdp_checkpoint_job_t *job = NULL;
  fsdp_optimizer_t *optimizer = NULL;
  fsdp_engine_t *e = toy.engine;
  CHECK_ERR(fsdp_checkpoint_save_contents(e, NULL, &contents), BAD, "dir is NULL");
  CHECK_ERR(fsdp_checkpoint_save_contents(e, path_of("x"), NULL), BAD, "contents_t is NULL");
  CHECK_ERR(fsdp_checkpoint_load_contents(e, NULL, &contents), BAD, "dir is NULL");
  CHECK_ERR(fsdp_checkpoint_load_contents(e, path_of("x"), NULL), BAD, "contents_t is NULL");
  CHECK_ERR(fsdp_checkpoint_save_async(e, path_of("x"), NULL, &job), BAD, "contents_t is NULL");
  CHECK_ERR(fsdp_checkpoint_save_async(e, path_of("x"), &contents, NULL), BAD, "out is NULL");
  CHECK_ERR(fsdp_checkpoint_save_async(e, "/", &contents, &job), FSDP_ERR_CHECKPOINT,
            "exists already");
  contents.struct_size = 8;
  CHECK_ERR(fsdp_checkpoint_save_contents(e, path_of("x"), &contents), BAD, "struct_size is 8");
  contents.struct_size = sizeof contents;
  contents.tensor_count = 1;
  CHECK_ERR(fsdp_checkpoint_save_contents(e, path_of("x"), &contents), BAD, "tensors is NULL");
  contents.tensor_count = 0;
  contents.state_count = 1;
  CHECK_ERR(fsdp_checkpoint_save_async(e, path_of("x"), &contents, &job), BAD, "states is NULL");
  contents.state_count = 0;
  CHECK_OK(fsdp_optimizer_create_sgd(other.engine, NULL, &optimizer));
  contents.optimizer = optimizer;
  CHECK_ERR(fsdp_checkpoint_save_contents(e, path_of("x"), &contents), BAD,
            "optimizer is of another engine");
  fsdp_optimizer_destroy(optimizer);
  CHECK_ERR(fsdp_checkpoint_save_contents(e, path_of("x"), &contents), FSDP_ERR_INVALID_HANDLE,
            "an optimizer");
  contents.optimizer = NULL;
  CHECK(job == NULL && access(path_of("x"), F_OK) != 0);
  toy_destroy(other);
  toy_destroy(toy);
  CHECK_BAD_ENGINES(fsdp_checkpoint_save_contents(engine, path_of("x"), &contents));
  CHECK_BAD_ENGINES(fsdp_checkpoint_load_contents(engine, path_of("x"), &contents));
  CHECK_BAD_ENGINES(fsdp_checkpoint_save_async(engine, path_of("x"), &contents, &job));
}

/* A job outlives its engine and the contents; its outcome can be asked again. */
static void in_the_background(void) {
  static ckpt_t c;
  fsdp_comm_t *comm = NULL;
  fsdp_checkpoint_job_t *job = NULL, *failing = NULL;
  int32_t done = -1;
  CHECK_OK(fsdp_comm_init_single(&comm));
  ckpt_create(&c, comm);
  ckpt_fill(&c, 3, 0);
  fsdp_checkpoint_contents_t contents = ckpt_contents(&c, 1);
  CHECK_OK(fsdp_checkpoint_save_async(c.engine, path_of("job"), &contents, &job));
  ckpt_fill(&c, 4, 0);
  CHECK_OK(fsdp_checkpoint_job_wait(job));
  CHECK_OK(fsdp_checkpoint_job_done(job, &done));
  CHECK_EQ(done, 1);
  CHECK_OK(fsdp_checkpoint_load_contents(c.engine, path_of("job"), &contents));
  ckpt_check(&c, 3, 1);
  CHECK_ERR(fsdp_checkpoint_save_async(c.engine, path_of("job"), &contents, &failing),
            FSDP_ERR_CHECKPOINT, "exists already");
  CHECK(failing == NULL);
  /* What shows later is the job's outcome. */
  CHECK_OK(
      fsdp_checkpoint_save_async(c.engine, path_of("job/manifest.json/x"), &contents, &failing));
  CHECK_ERR(fsdp_checkpoint_job_wait(failing), FSDP_ERR_IO, "in the background");
  CHECK_ERR(fsdp_checkpoint_job_wait(failing), FSDP_ERR_IO, "job/manifest.json/x");
  fsdp_checkpoint_job_destroy(failing);
  fsdp_checkpoint_job_destroy(job);

  CHECK_OK(fsdp_checkpoint_save_async(c.engine, path_of("late"), &contents, &job));
  fsdp_engine_destroy(c.engine);
  fsdp_comm_destroy(comm);
  fsdp_checkpoint_job_destroy(job);
  /* Destroying waited. */
  CHECK(access(path_of("late/manifest.json"), F_OK) == 0);

  fsdp_checkpoint_job_destroy(NULL);
  CHECK_ERR(fsdp_checkpoint_job_wait(NULL), BAD, "NULL");
  CHECK_ERR(fsdp_checkpoint_job_wait(job), FSDP_ERR_INVALID_HANDLE, "destroyed");
  CHECK_ERR(fsdp_checkpoint_job_done(job, &done), FSDP_ERR_INVALID_HANDLE, "destroyed");
  CHECK_ERR(fsdp_checkpoint_job_wait(NO_SUCH_HANDLE(fsdp_checkpoint_job_t)),
            FSDP_ERR_INVALID_HANDLE, "save in the background");
  fsdp_checkpoint_job_destroy(job);
}

static void consolidated(void) {
  static ckpt_t c;
  fsdp_comm_t *comm = NULL;
  fsdp_consolidate_config_t config = FSDP_CONSOLIDATE_CONFIG_INIT;
  CHECK_OK(fsdp_comm_init_single(&comm));
  ckpt_create(&c, comm);
  fsdp_checkpoint_contents_t contents = ckpt_contents(&c, 0);
  CHECK_OK(fsdp_checkpoint_consolidate(path_of("job"), path_of("hf"), NULL));
  CHECK(access(path_of("hf/model.safetensors"), F_OK) == 0);
  CHECK_OK(fsdp_checkpoint_load_contents(c.engine, path_of("hf"), &contents));
  ckpt_check(&c, 3, 0);
  config.max_file_bytes = 300;
  CHECK_OK(fsdp_checkpoint_consolidate(path_of("job"), path_of("parts"), &config));
  CHECK(access(path_of("parts/model.safetensors.index.json"), F_OK) == 0);
  ckpt_fill(&c, 9, 0);
  CHECK_OK(fsdp_checkpoint_load_contents(c.engine, path_of("parts"), &contents));
  ckpt_check(&c, 3, 0);
  /* Parameters alone. */
  CHECK_OK(fsdp_checkpoint_load(c.engine, path_of("parts"), NULL, 0));

  CHECK_ERR(fsdp_checkpoint_consolidate(path_of("job"), path_of("hf"), NULL), FSDP_ERR_CHECKPOINT,
            "exists already");
  CHECK_ERR(fsdp_checkpoint_consolidate(NULL, path_of("x"), NULL), BAD, "dir is NULL");
  CHECK_ERR(fsdp_checkpoint_consolidate(path_of("job"), NULL, NULL), BAD, "out_dir is NULL");
  CHECK_ERR(fsdp_checkpoint_consolidate(path_of("none"), path_of("x"), NULL), FSDP_ERR_CHECKPOINT,
            "no such checkpoint");
  config.dtype.code = FSDP_DTYPE_INT;
  config.dtype.bits = 32;
  config.dtype.lanes = 1;
  CHECK_ERR(fsdp_checkpoint_consolidate(path_of("job"), path_of("x"), &config),
            FSDP_ERR_UNSUPPORTED, "not to int32");
  config.dtype.lanes = 2;
  CHECK_ERR(fsdp_checkpoint_consolidate(path_of("job"), path_of("x"), &config),
            FSDP_ERR_UNSUPPORTED, "dtype");
  config.struct_size = 0;
  CHECK_ERR(fsdp_checkpoint_consolidate(path_of("job"), path_of("x"), &config), BAD, "struct_size");
  CHECK(access(path_of("x"), F_OK) != 0);
  fsdp_engine_destroy(c.engine);
  fsdp_comm_destroy(comm);
}

/* The engine's optimizer as a part of the contents. */
static void with_an_optimizer(void) {
  toy_t toy = toy_create();
  fsdp_adamw_config_t config = FSDP_ADAMW_CONFIG_INIT;
  fsdp_checkpoint_contents_t contents = FSDP_CHECKPOINT_CONTENTS_INIT;
  fsdp_checkpoint_job_t *job = NULL;
  float saved[21], *state = NULL;
  uint64_t steps = 0;
  CHECK_OK(fsdp_optimizer_create_adamw(toy.engine, &config, &contents.optimizer));
  toy_forward(toy.engine);
  toy_backward(toy.engine, 0.5f);
  CHECK_OK(fsdp_optimizer_step(contents.optimizer));
  CHECK_OK(fsdp_optimizer_state(contents.optimizer, TOY_WEIGHT, "exp_avg", &state));
  memcpy(saved, state, sizeof saved);
  CHECK_OK(fsdp_checkpoint_save_contents(toy.engine, path_of("optimizer"), &contents));
  CHECK_OK(fsdp_checkpoint_save_async(toy.engine, path_of("optimizer2"), &contents, &job));
  CHECK_OK(fsdp_optimizer_step(contents.optimizer));
  CHECK_OK(fsdp_checkpoint_job_wait(job));
  fsdp_checkpoint_job_destroy(job);
  for (int i = 0; i < 2; i++) {
    CHECK_OK(fsdp_optimizer_step(contents.optimizer));
    CHECK_OK(fsdp_checkpoint_load_contents(
        toy.engine, path_of(i == 0 ? "optimizer" : "optimizer2"), &contents));
    CHECK_OK(fsdp_optimizer_step_count(contents.optimizer, TOY_WEIGHT, &steps));
    CHECK_EQ(steps, 1);
    CHECK(memcmp(saved, state, sizeof saved) == 0);
  }
  CHECK_ERR(fsdp_checkpoint_load_contents(toy.engine, path_of("types"), &contents),
            FSDP_ERR_CHECKPOINT, "without an optimizer");
  fsdp_optimizer_destroy(contents.optimizer);
  toy_destroy(toy);
}

int main(void) {
  const char *tmp = getenv("TMPDIR");
  char command[300];
  snprintf(folder, sizeof folder, "%s/fsdp_api_checkpoint_contents_%ld", tmp == NULL ? "/tmp" : tmp,
           (long)getpid());
  tensors_of_every_type();
  wrong_contents();
  in_the_background();
  consolidated();
  with_an_optimizer();
  snprintf(command, sizeof command, "rm -r '%s'", folder);
  return system(command) == 0 ? 0 : 1;
}
