/* Status codes, their names, the version, and the error message of each thread. */
#include "test.h"

#include <pthread.h>

static void codes_are_what_the_abi_says(void) {
  const fsdp_status_t codes[] = {FSDP_OK,
                                 FSDP_ERR_INVALID_ARGUMENT,
                                 FSDP_ERR_INVALID_HANDLE,
                                 FSDP_ERR_INVALID_STATE,
                                 FSDP_ERR_UNSUPPORTED,
                                 FSDP_ERR_OUT_OF_MEMORY,
                                 FSDP_ERR_IO,
                                 FSDP_ERR_RENDEZVOUS,
                                 FSDP_ERR_PEER_DIED,
                                 FSDP_ERR_TIMEOUT,
                                 FSDP_ERR_MISMATCH,
                                 FSDP_ERR_ABORTED,
                                 FSDP_ERR_CHECKPOINT,
                                 FSDP_ERR_CALLBACK,
                                 FSDP_ERR_PANIC,
                                 FSDP_ERR_NONFINITE,
                                 FSDP_ERR_DEVICE};
  const int count = (int)(sizeof codes / sizeof codes[0]);
  CHECK_EQ(count, 17);
  for (int i = 0; i < count; i++) {
    CHECK_EQ(codes[i], i);
    CHECK(fsdp_status_name(codes[i]) != NULL);
    CHECK(strcmp(fsdp_status_name(codes[i]), "unknown status") != 0);
    for (int j = 0; j < i; j++)
      CHECK(strcmp(fsdp_status_name(codes[i]), fsdp_status_name(codes[j])) != 0);
  }
  CHECK_STR(fsdp_status_name(FSDP_ERR_PEER_DIED), "peer died");
}

static void other_numbers_have_a_name_too(void) {
  const fsdp_status_t codes[] = {-1, 17, 1000, INT32_MAX, INT32_MIN};
  for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++)
    CHECK_STR(fsdp_status_name(codes[i]), "unknown status");
}

static void version_is_that_of_the_header(void) {
  char version[32];
  snprintf(version, sizeof version, "%d.%d.%d", FSDP_VERSION_MAJOR, FSDP_VERSION_MINOR,
           FSDP_VERSION_PATCH);
  CHECK_STR(fsdp_version(), version);
}

static void message_belongs_to_the_latest_call(void) {
  fsdp_comm_t *comm = NULL;
  int32_t rank = -7;
  CHECK_STR(fsdp_last_error_message(), "");
  CHECK_ERR(fsdp_comm_init_single(NULL), FSDP_ERR_INVALID_ARGUMENT, "out");
  /* Asking for it does not clear it. */
  CHECK(fsdp_last_error_message()[0] != '\0');
  CHECK(fsdp_last_error_message()[0] != '\0');
  CHECK_OK(fsdp_comm_init_single(&comm));
  CHECK_STR(fsdp_last_error_message(), "");
  CHECK_ERR(fsdp_comm_rank(comm, NULL), FSDP_ERR_INVALID_ARGUMENT, "out");
  /* Functions that return no status leave it: clean-up code can come before printing. */
  const char *before = fsdp_last_error_message();
  char copy[256];
  snprintf(copy, sizeof copy, "%s", before);
  fsdp_comm_destroy(NULL);
  fsdp_comm_destroy(comm);
  fsdp_status_name(3);
  fsdp_version();
  CHECK_STR(fsdp_last_error_message(), copy);
  CHECK(fsdp_last_error_message() == before);
  CHECK_ERR(fsdp_comm_rank(comm, &rank), FSDP_ERR_INVALID_HANDLE, "destroyed");
  CHECK_EQ(rank, -7);
}

/* Fails in its own way, many times, and expects to read back its own message. */
static void *fail_with_own_message(void *argument) {
  const int number = *(const int *)argument;
  char name[32];
  fsdp_model_t *model = NULL;
  CHECK_STR(fsdp_last_error_message(), "");
  CHECK_OK(fsdp_model_create("Net", &model));
  snprintf(name, sizeof name, "no.dots.%d", number);
  for (int i = 0; i < 2000; i++) {
    uint32_t module = 77;
    CHECK_ERR(fsdp_model_add_module(model, 0, name, "Block", &module), FSDP_ERR_INVALID_ARGUMENT,
              name);
    CHECK_EQ(module, 77);
  }
  fsdp_model_destroy(model);
  return NULL;
}

static void each_thread_has_its_own_message(void) {
  enum { THREADS = 4 };
  pthread_t threads[THREADS];
  int numbers[THREADS];
  CHECK_ERR(fsdp_comm_init_single(NULL), FSDP_ERR_INVALID_ARGUMENT, "out");
  for (int i = 0; i < THREADS; i++) {
    numbers[i] = i;
    CHECK_EQ(pthread_create(&threads[i], NULL, fail_with_own_message, &numbers[i]), 0);
  }
  for (int i = 0; i < THREADS; i++) CHECK_EQ(pthread_join(threads[i], NULL), 0);
  CHECK(strstr(fsdp_last_error_message(), "out") != NULL);
}

int main(void) {
  message_belongs_to_the_latest_call();
  codes_are_what_the_abi_says();
  other_numbers_have_a_name_too();
  version_is_that_of_the_header();
  each_thread_has_its_own_message();
  return 0;
}
