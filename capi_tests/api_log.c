/* Messages for a person: the host's callback and what it may do, and the line on standard error
 * without one. The message is the warning about a forward that differs from the first. */
#include "test.h"

#include <sys/wait.h>
#include <unistd.h>

#include "toy.h"

/* What the callback heard. */
typedef struct {
  int calls;
  int32_t level;
  char message[512];
  fsdp_engine_t *engine;
  uint64_t all_gathers;
} heard_t;

static void hear(int32_t level, const char *message, void *user_data) {
  heard_t *heard = (heard_t *)user_data;
  heard->calls++;
  heard->level = level;
  snprintf(heard->message, sizeof heard->message, "%s", message);
  /* It may call anything, also failing functions, and about the engine that has just warned. */
  heard->all_gathers = stats_of(heard->engine).all_gathers;
  CHECK_ERR(fsdp_engine_reshard(heard->engine, 99), FSDP_ERR_INVALID_ARGUMENT, "99");
  fsdp_set_log_callback(hear, user_data);
}

static toy_t warning_toy(void) {
  toy_t toy;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  config.order_check = FSDP_ORDER_CHECK_WARN;
  toy.comm = NULL;
  toy.engine = NULL;
  toy.model = toy_model();
  CHECK_OK(fsdp_comm_init_single(&toy.comm));
  CHECK_OK(fsdp_engine_create(toy.model, toy.comm, &config, &toy.engine));
  return toy;
}

/* A training iteration in which x runs before a. */
static void swapped(fsdp_engine_t *engine) {
  CHECK_OK(fsdp_engine_pre_forward(engine, TOY_ROOT));
  CHECK_OK(fsdp_engine_pre_forward(engine, TOY_X));
  CHECK_OK(fsdp_engine_post_forward(engine, TOY_X));
  CHECK_OK(fsdp_engine_pre_forward(engine, TOY_A));
  CHECK_OK(fsdp_engine_post_forward(engine, TOY_A));
  CHECK_OK(fsdp_engine_post_forward(engine, TOY_ROOT));
  toy_backward(engine, 1);
}

static void callback(void) {
  heard_t first, second;
  memset(&first, 0, sizeof first);
  memset(&second, 0, sizeof second);
  for (int round = 0; round < 2; round++) {
    heard_t *heard = round == 0 ? &first : &second;
    toy_t toy = warning_toy();
    heard->engine = toy.engine;
    fsdp_set_log_callback(hear, heard);
    toy_forward(toy.engine);
    toy_backward(toy.engine, 1);
    CHECK_EQ(heard->calls, 0);
    swapped(toy.engine);
    CHECK_EQ(heard->calls, 1);
    CHECK_EQ(heard->level, FSDP_LOG_WARNING);
    CHECK(strstr(heard->message, "Forward order differs from that of the first iteration on rank 0") ==
          heard->message);
    CHECK(strchr(heard->message, '\n') == NULL);
    CHECK(heard->all_gathers > 0);
    toy_destroy(toy);
  }
  CHECK_EQ(first.calls, 1);
  fsdp_set_log_callback(NULL, NULL);
}

static void count(int32_t level, const char *message, void *user_data) {
  int *counts = (int *)user_data;
  CHECK(level >= FSDP_LOG_DEBUG && level <= FSDP_LOG_WARNING);
  CHECK(message[0] != '\0' && strchr(message, '\n') == NULL);
  counts[level]++;
}

/* Levels below the one that is set are not heard. */
static void levels(void) {
  for (int32_t level = FSDP_LOG_DEBUG; level <= FSDP_LOG_OFF; level++) {
    int counts[FSDP_LOG_OFF] = {0};
    CHECK_OK(fsdp_set_log_level(level));
    fsdp_set_log_callback(count, counts);
    toy_t toy = warning_toy();
    toy_forward(toy.engine);
    toy_backward(toy.engine, 1);
    swapped(toy.engine);
    toy_destroy(toy);
    fsdp_set_log_callback(NULL, NULL);
    CHECK((counts[FSDP_LOG_DEBUG] > 2) == (level == FSDP_LOG_DEBUG));
    CHECK_EQ(counts[FSDP_LOG_INFO], level <= FSDP_LOG_INFO);
    CHECK_EQ(counts[FSDP_LOG_WARNING], level <= FSDP_LOG_WARNING);
  }
  CHECK_ERR(fsdp_set_log_level(4), FSDP_ERR_INVALID_ARGUMENT, "4");
  CHECK_ERR(fsdp_set_log_level(-1), FSDP_ERR_INVALID_ARGUMENT, "-1");
  CHECK_OK(fsdp_set_log_level(FSDP_LOG_WARNING));
}

/* What a process says on standard error while it warns; `with_callback`: and while somebody listens. */
static void standard_error(int with_callback, char *text, size_t size) {
  int pipe_[2];
  size_t length = 0;
  ssize_t n;
  CHECK(pipe(pipe_) == 0);
  pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    heard_t heard;
    memset(&heard, 0, sizeof heard);
    alarm(30);
    toy_t toy = warning_toy();
    heard.engine = toy.engine;
    if (with_callback) fsdp_set_log_callback(hear, &heard);
    if (dup2(pipe_[1], STDERR_FILENO) < 0) _exit(2);
    close(pipe_[0]);
    toy_forward(toy.engine);
    toy_backward(toy.engine, 1);
    swapped(toy.engine);
    _exit(heard.calls == with_callback ? 0 : 3);
  }
  close(pipe_[1]);
  while (length + 1 < size && (n = read(pipe_[0], text + length, size - 1 - length)) > 0) {
    length += (size_t)n;
  }
  text[length] = '\0';
  close(pipe_[0]);
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    test_fail(__FILE__, __LINE__, "the child ended with %d and said \"%s\"", status, text);
  }
}

static void default_is_a_line_on_standard_error(void) {
  char text[1024];
  standard_error(0, text, sizeof text);
  CHECK(strstr(text, "fsdp: warning: Forward order differs") == text);
  CHECK(strchr(text, '\n') == text + strlen(text) - 1);
  standard_error(1, text, sizeof text);
  CHECK_STR(text, "");
}

/* FSDP_LOG, read by a process that has not set a level: this one runs itself. */
static const char *self;
static void environment(void) {
  const char *const values[] = {"debug", "info", "warning", "off", "loud"};
  const char *const heard[] = {"fsdp: debug:", "fsdp: info:", NULL, NULL, "fsdp: warning: FSDP_LOG"};
  const char *const not_heard[] = {NULL, "fsdp: debug:", "fsdp:", "fsdp:", "fsdp: info:"};
  for (int i = 0; i < 5; i++) {
    char command[600], text[8192];
    snprintf(command, sizeof command, "FSDP_LOG=%s '%s' quiet 2>&1", values[i], self);
    FILE *out = popen(command, "r");
    CHECK(out != NULL);
    const size_t size = fread(text, 1, sizeof text - 1, out);
    text[size] = '\0';
    CHECK(pclose(out) == 0);
    CHECK(heard[i] == NULL || strstr(text, heard[i]) != NULL);
    CHECK(not_heard[i] == NULL || strstr(text, not_heard[i]) == NULL);
  }
}

int main(int argc, char **argv) {
  self = argv[0];
  if (argc == 2) {
    toy_t toy = warning_toy();
    toy_forward(toy.engine);
    toy_backward(toy.engine, 1);
    toy_destroy(toy);
    return 0;
  }
  alarm(60);
  callback();
  levels();
  environment();
  default_is_a_line_on_standard_error();
  return 0;
}
