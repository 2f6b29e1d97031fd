/* What every test program uses: checks that say where and why they failed, and short ways to
 * describe tensors.
 *
 * A failed check prints file, line, the expression, the status and the library's message, and ends
 * the program with status 1. Valid as C11 and as C++17.
 */
#ifndef FSDP_TEST_H
#define FSDP_TEST_H

/* For setenv, nanosleep, fork and their like under -std=c11. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <fsdp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A handle that stands for nothing: handles are never dereferenced, so any value must be refused,
 * not crash. */
#define NO_SUCH_HANDLE(type) ((type *)(uintptr_t)0x7ffffffffff1u)

static inline int test_rank_of_environment(void) {
  const char *rank = getenv("RANK");
  if (rank == NULL) rank = getenv("OMPI_COMM_WORLD_RANK");
  return rank == NULL ? 0 : atoi(rank);
}

/* Says what a program is at, for the messages of its failures; useful where one program runs many
 * cases. Kept in the environment, so that all files of a program share it. */
static inline void test_context(const char *text) { setenv("FSDP_TEST_CONTEXT", text, 1); }

/* Ends the program; `format` says what was wrong. */
static inline void test_fail(const char *file, int line, const char *format, ...) {
  const char *context = getenv("FSDP_TEST_CONTEXT");
  char message[512];
  va_list arguments;
  snprintf(message, sizeof message, "%s", fsdp_last_error_message());
  va_start(arguments, format);
  fprintf(stderr, "%s:%d: [rank %d] %s%s", file, line, test_rank_of_environment(),
          context == NULL ? "" : context, context == NULL ? "" : ": ");
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, "\n    last error message: \"%s\"\n", message);
  fflush(NULL);
  exit(1);
}

static inline void test_status(const char *file, int line, const char *call, fsdp_status_t got,
                               fsdp_status_t want, const char *text) {
  if (got != want) {
    test_fail(file, line, "%s returned %d (%s), not %d (%s)", call, (int)got, fsdp_status_name(got),
              (int)want, fsdp_status_name(want));
  }
  if (want == FSDP_OK && fsdp_last_error_message()[0] != '\0') {
    test_fail(file, line, "%s succeeded but left a message", call);
  }
  if (want != FSDP_OK && fsdp_last_error_message()[0] == '\0') {
    test_fail(file, line, "%s failed without a message", call);
  }
  if (text != NULL && strstr(fsdp_last_error_message(), text) == NULL) {
    test_fail(file, line, "%s: the message does not contain \"%s\"", call, text);
  }
}

#define CHECK(condition) \
  do { \
    if (!(condition)) test_fail(__FILE__, __LINE__, "%s is false", #condition); \
  } while (0)

/* Two integers are equal; prints both. */
#define CHECK_EQ(got, want) \
  do { \
    long long got_ = (long long)(got), want_ = (long long)(want); \
    if (got_ != want_) \
      test_fail(__FILE__, __LINE__, "%s is %lld, not %lld (%s)", #got, got_, want_, #want); \
  } while (0)

/* Two strings are equal. */
#define CHECK_STR(got, want) \
  do { \
    const char *got_ = (got), *want_ = (want); \
    if (strcmp(got_, want_) != 0) \
      test_fail(__FILE__, __LINE__, "%s is \"%s\", not \"%s\"", #got, got_, want_); \
  } while (0)

/* The call succeeds and leaves no message. */
#define CHECK_OK(call) test_status(__FILE__, __LINE__, #call, (call), FSDP_OK, NULL)

/* The call fails with `status`, and its message contains `text`. */
#define CHECK_ERR(call, status, text) \
  test_status(__FILE__, __LINE__, #call, (call), (status), (text))

/* Describes contiguous float32 in host memory. `shape` must live as long as the tensor is used. */
static inline fsdp_tensor_t tensor_f32(void *data, int32_t ndim, int64_t *shape) {
  fsdp_tensor_t t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.device.device_type = FSDP_DEVICE_CPU;
  t.ndim = ndim;
  t.dtype.code = FSDP_DTYPE_FLOAT;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t;
}

/* The same with another element type. */
static inline fsdp_tensor_t tensor_of(void *data, int32_t ndim, int64_t *shape, uint8_t code,
                                      uint8_t bits) {
  fsdp_tensor_t t = tensor_f32(data, ndim, shape);
  t.dtype.code = code;
  t.dtype.bits = bits;
  return t;
}

/* Output structs whose size the caller sets. */
static inline fsdp_unit_info_t unit_info_init(void) {
  fsdp_unit_info_t info;
  memset(&info, 0, sizeof info);
  info.struct_size = sizeof info;
  return info;
}

static inline fsdp_param_info_t param_info_init(void) {
  fsdp_param_info_t info;
  memset(&info, 0, sizeof info);
  info.struct_size = sizeof info;
  return info;
}

static inline fsdp_stats_t stats_of(const fsdp_engine_t *engine) {
  fsdp_stats_t stats;
  memset(&stats, 0, sizeof stats);
  stats.struct_size = sizeof stats;
  CHECK_OK(fsdp_engine_stats(engine, &stats));
  return stats;
}

#endif
