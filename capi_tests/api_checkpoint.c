/* The checkpoint functions of the C interface, at world size 1: good calls, NULLs, wrong states and
 * handles, and what a failed load leaves. What is on disk is tested in tests/checkpoint.rs. */
#include "toy.h"

#include <unistd.h>

static char folder[256];

/* `name` in the test's own folder; valid until the second next call. */
static const char *path_of(const char *name) {
  static char paths[2][320];
  static int which = 0;
  which = !which;
  snprintf(paths[which], sizeof paths[which], "%s/%s", folder, name);
  return paths[which];
}

static fsdp_state_t state_of(uint32_t param, const char *name, float *data) {
  fsdp_state_t state;
  state.param = param;
  state.name = name;
  state.data = data;
  return state;
}

static fsdp_metadata_t text_of(const char *key, const char *value) {
  fsdp_metadata_t text;
  text.key = key;
  text.value = value;
  return text;
}

static void a_round_trip(void) {
  toy_t toy = toy_create();
  float saved[21], loaded[21];
  fsdp_state_t state = state_of(TOY_WEIGHT, "momentum", saved);
  fsdp_metadata_t texts[2];
  char buffer[16] = "untouched";
  size_t size = 99;
  texts[0] = text_of("step", "12");
  texts[1] = text_of("empty", "");
  for (int i = 0; i < 21; i++) {
    saved[i] = (float)i + 0.25f;
    loaded[i] = -1;
  }
  CHECK_OK(fsdp_checkpoint_save(toy.engine, path_of("good"), &state, 1, texts, 2));
  CHECK_OK(fsdp_checkpoint_save(toy.engine, path_of("bare"), NULL, 0, NULL, 0));

  CHECK_OK(fsdp_engine_begin_write(toy.engine));
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    fsdp_shard_t shard = toy_shard(toy.engine, p);
    for (int64_t i = 0; i < shard.numel; i++) shard.data[i] = -1;
  }
  state.data = loaded;
  CHECK_OK(fsdp_checkpoint_load(toy.engine, path_of("good"), &state, 1));
  for (uint32_t p = 0; p < TOY_PARAMS; p++) {
    fsdp_shard_t shard = toy_shard(toy.engine, p);
    CHECK_EQ(shard.numel, TOY_NUMEL[p]);
    for (int64_t i = 0; i < shard.numel; i++) CHECK(shard.data[i] == toy_value(p, i));
  }
  CHECK(memcmp(saved, loaded, sizeof saved) == 0);
  /* Parameters alone may be read from a checkpoint that has more. */
  CHECK_OK(fsdp_checkpoint_load(toy.engine, path_of("good"), NULL, 0));

  CHECK_OK(fsdp_checkpoint_metadata(path_of("good"), "step", NULL, 0, &size));
  CHECK_EQ(size, 3);
  CHECK_OK(fsdp_checkpoint_metadata(path_of("good"), "step", buffer, sizeof buffer, &size));
  CHECK_STR(buffer, "12");
  CHECK_OK(fsdp_checkpoint_metadata(path_of("good"), "empty", buffer, sizeof buffer, &size));
  CHECK_EQ(size, 1);
  CHECK_STR(buffer, "");
  CHECK_OK(fsdp_checkpoint_metadata(path_of("bare"), "step", NULL, 0, &size));
  CHECK_EQ(size, 0);
  toy_destroy(toy);
}

static void bad_arguments(void) {
  toy_t toy = toy_create();
  fsdp_engine_t *e = toy.engine;
  float data[21] = {0};
  fsdp_state_t state = state_of(TOY_WEIGHT, "momentum", data), twice[2];
  fsdp_metadata_t texts[2];
  char buffer[2];
  size_t size = 99;
  const fsdp_status_t bad = FSDP_ERR_INVALID_ARGUMENT;
  texts[0] = texts[1] = text_of("key", "value");
  twice[0] = twice[1] = state;

  CHECK_ERR(fsdp_checkpoint_save(e, NULL, NULL, 0, NULL, 0), bad, "dir is NULL");
  CHECK_ERR(fsdp_checkpoint_save(e, "/", NULL, 0, NULL, 0), bad, "names no folder");
  CHECK_ERR(fsdp_checkpoint_save(e, path_of("bad"), NULL, 1, NULL, 0), bad, "states is NULL");
  CHECK_ERR(fsdp_checkpoint_save(e, path_of("bad"), NULL, 0, NULL, 1), bad, "metadata is NULL");
  CHECK_ERR(fsdp_checkpoint_save(e, path_of("bad"), NULL, 0, texts, 2), bad, "\"key\" twice");
  CHECK_ERR(fsdp_checkpoint_save(e, path_of("bad"), twice, 2, NULL, 0), bad,
            "state \"momentum\" of parameter \"a.weight\" is given twice");
  texts[0] = text_of(NULL, "value");
  CHECK_ERR(fsdp_checkpoint_save(e, path_of("bad"), NULL, 0, texts, 1), bad, "NULL");
  state = state_of(TOY_WEIGHT, NULL, data);
  CHECK_ERR(fsdp_checkpoint_save(e, path_of("bad"), &state, 1, NULL, 0), bad, "NULL");
  state = state_of(TOY_WEIGHT, "a:b", data);
  CHECK_ERR(fsdp_checkpoint_save(e, path_of("bad"), &state, 1, NULL, 0), bad, "\"a:b\"");
  state = state_of(TOY_PARAMS, "momentum", data);
  CHECK_ERR(fsdp_checkpoint_save(e, path_of("bad"), &state, 1, NULL, 0), bad, "parameter 5");
  state = state_of(TOY_WEIGHT, "momentum", NULL);
  CHECK_ERR(fsdp_checkpoint_save(e, path_of("bad"), &state, 1, NULL, 0), bad, "\"a.weight\" is NULL");
  CHECK_ERR(fsdp_checkpoint_load(e, NULL, NULL, 0), bad, "dir is NULL");
  CHECK_ERR(fsdp_checkpoint_load(e, path_of("good"), NULL, 1), bad, "states is NULL");
  CHECK_ERR(fsdp_checkpoint_metadata(NULL, "step", NULL, 0, &size), bad, "dir is NULL");
  CHECK_ERR(fsdp_checkpoint_metadata(path_of("good"), NULL, NULL, 0, &size), bad, "key is NULL");
  CHECK_ERR(fsdp_checkpoint_metadata(path_of("good"), "step", NULL, 0, NULL), bad, "out_size");
  CHECK_ERR(fsdp_checkpoint_metadata(path_of("good"), "step", buffer, 2, &size), bad, "needs 3");
  CHECK_EQ(size, 99);
  toy_destroy(toy);
}

static void bad_states_and_handles(void) {
  toy_t toy = toy_create();
  fsdp_state_t state = state_of(TOY_WEIGHT, "other", NULL);
  float data[21];
  size_t size = 99;
  for (int i = 0; i < 21; i++) data[i] = 5;
  state.data = data;
  CHECK_ERR(fsdp_checkpoint_save(toy.engine, path_of("good"), NULL, 0, NULL, 0),
            FSDP_ERR_CHECKPOINT, "exists already");
  CHECK_ERR(fsdp_checkpoint_load(toy.engine, path_of("none"), NULL, 0), FSDP_ERR_CHECKPOINT,
            "no such checkpoint");
  CHECK_ERR(fsdp_checkpoint_metadata(path_of("none"), "step", NULL, 0, &size), FSDP_ERR_CHECKPOINT,
            "no such checkpoint");
  CHECK_ERR(fsdp_checkpoint_load(toy.engine, path_of("good"), &state, 1), FSDP_ERR_CHECKPOINT,
            "state \"other\" of parameter \"a.weight\"");
  for (int i = 0; i < 21; i++) CHECK(data[i] == 5);

  /* Not in the middle of a backward. */
  toy_forward(toy.engine);
  CHECK_OK(fsdp_engine_pre_backward(toy.engine, TOY_ROOT));
  toy_add_grad(toy.engine, TOY_BIAS, 1);
  CHECK_ERR(fsdp_checkpoint_load(toy.engine, path_of("good"), NULL, 0), FSDP_ERR_INVALID_STATE,
            "backward");
  toy_destroy(toy);

  CHECK_BAD_ENGINES(fsdp_checkpoint_save(engine, path_of("bad"), NULL, 0, NULL, 0));
  CHECK_BAD_ENGINES(fsdp_checkpoint_load(engine, path_of("good"), NULL, 0));
  CHECK(access(path_of("bad"), F_OK) != 0);
}

int main(void) {
  const char *tmp = getenv("TMPDIR");
  char command[300];
  snprintf(folder, sizeof folder, "%s/fsdp_api_checkpoint_%ld", tmp == NULL ? "/tmp" : tmp,
           (long)getpid());
  a_round_trip();
  bad_arguments();
  bad_states_and_handles();
  snprintf(command, sizeof command, "rm -r '%s'", folder);
  return system(command) == 0 ? 0 : 1;
}
