/* The callbacks of fsdp_comm_init_host on MPI's non-blocking collectives. Each lane is a
 * communicator of its own, so that lanes are independent of each other; messages have another one.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include "fsdp_mpi.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Our own errors, beside MPI's. */
enum { PROBLEM = -1, OTHER_THREAD = -2, TOO_LARGE = -3, NO_MEMORY = -4, NO_TYPE = -5 };

/* A message on its way. */
typedef struct post {
  struct post *next;
  MPI_Request request;
  char bytes[FSDP_HOST_MESSAGE_BYTES];
} post_t;

typedef struct {
  MPI_Comm lanes[FSDP_HOST_LANES], mail;
  int abort_job;
  /* MPI may still use what is under way: nothing is freed any more. */
  int failed;
  post_t *posts;
  /* Why there are no communicators. */
  char problem[200];
} context_t;

/* ---- threads ---- */

static pthread_mutex_t serial = PTHREAD_MUTEX_INITIALIZER;

/* Begins MPI calls of this thread; 0, or why there can be none. */
static int enter(void) {
  int level = MPI_THREAD_SINGLE, is_main = 0;
  MPI_Query_thread(&level);
  if (level < MPI_THREAD_SERIALIZED) {
    MPI_Is_thread_main(&is_main);
    return is_main ? 0 : OTHER_THREAD;
  }
  pthread_mutex_lock(&serial);
  return 0;
}

static int leave(int code) {
  int level = MPI_THREAD_SINGLE;
  MPI_Query_thread(&level);
  if (level >= MPI_THREAD_SERIALIZED) pthread_mutex_unlock(&serial);
  return code;
}

/* ---- 16-bit types: widened to float32, combined, rounded ---- */

static float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static float from_bf16(uint16_t x) { return as_float((uint32_t)x << 16); }

static uint16_t to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* NaN */
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float from_f16(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) { /* subnormal: rest * 2^-24, exact */
    return as_float(sign | as_bits((float)rest * 0x1p-24f));
  }
  return as_float(sign | ((rest << 13) + (112u << 23)));
}

static uint16_t to_f16(float x) {
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
  if (magnitude < 0x38800000) { /* below 2^-14: adding 0.5 rounds to a multiple of 2^-24 */
    return (uint16_t)(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return (uint16_t)(sign | (rounded - (112u << 23)) >> 13);
}

#define COMBINE(name, widen, narrow, result) \
  static void name(void *in, void *inout, int *len, MPI_Datatype *type) { \
    const uint16_t *from = (const uint16_t *)in; \
    uint16_t *to = (uint16_t *)inout; \
    (void)type; \
    for (int i = 0; i < *len; i++) { \
      const float a = widen(from[i]), b = widen(to[i]); \
      to[i] = narrow(result); \
    } \
  }
COMBINE(bf16_sum, from_bf16, to_bf16, a + b)
COMBINE(bf16_max, from_bf16, to_bf16, a != a || a > b ? a : b)
COMBINE(bf16_min, from_bf16, to_bf16, a != a || a < b ? a : b)
COMBINE(f16_sum, from_f16, to_f16, a + b)
COMBINE(f16_max, from_f16, to_f16, a != a || a > b ? a : b)
COMBINE(f16_min, from_f16, to_f16, a != a || a < b ? a : b)

/* MPI's operations for 16-bit types: [bfloat16, float16][sum, max, min]. Made once, never freed. */
static MPI_Op narrow_ops[2][3];
static int has_narrow_ops;

static int make_narrow_ops(void) {
  MPI_User_function *const functions[2][3] = {{bf16_sum, bf16_max, bf16_min},
                                              {f16_sum, f16_max, f16_min}};
  for (int type = 0; type < 2 && !has_narrow_ops; type++) {
    for (int op = 0; op < 3; op++) {
      const int code = MPI_Op_create(functions[type][op], 1, &narrow_ops[type][op]);
      if (code != MPI_SUCCESS) return code;
    }
  }
  has_narrow_ops = 1;
  return MPI_SUCCESS;
}

/* MPI's names of a type and an operation. */
static int find_type(fsdp_dtype_t dtype, int32_t op, MPI_Datatype *type, MPI_Op *mpi_op) {
  const int which = op == FSDP_REDUCE_SUM   ? 0
                    : op == FSDP_REDUCE_MAX ? 1
                    : op == FSDP_REDUCE_MIN ? 2
                                            : -1;
  if (which < 0) return NO_TYPE;
  *mpi_op = which == 0 ? MPI_SUM : which == 1 ? MPI_MAX : MPI_MIN;
  const int code = dtype.code, bits = dtype.bits;
  if (bits == 16 && (code == FSDP_DTYPE_BFLOAT || code == FSDP_DTYPE_FLOAT)) {
    *type = MPI_UINT16_T;
    *mpi_op = narrow_ops[code == FSDP_DTYPE_FLOAT][which];
    return 0;
  }
  *type = code == FSDP_DTYPE_FLOAT && bits == 32   ? MPI_FLOAT
          : code == FSDP_DTYPE_FLOAT && bits == 64 ? MPI_DOUBLE
          : code == FSDP_DTYPE_INT && bits == 32   ? MPI_INT32_T
          : code == FSDP_DTYPE_INT && bits == 64   ? MPI_INT64_T
          : code == FSDP_DTYPE_UINT && bits == 8   ? MPI_UINT8_T
                                                   : MPI_DATATYPE_NULL;
  return *type == MPI_DATATYPE_NULL ? NO_TYPE : 0;
}

/* A count and a type that together are `bytes`, which may be more than an int holds; free the type
 * if it is not MPI_BYTE. */
static int bytes_type(size_t bytes, int *count, MPI_Datatype *type) {
  const size_t block = (size_t)1 << 20;
  *count = (int)bytes;
  *type = MPI_BYTE;
  if (bytes <= INT_MAX) return 0;
  if (bytes / block > INT_MAX) return TOO_LARGE;
  MPI_Datatype blocks;
  int lengths[2] = {(int)(bytes / block), (int)(bytes % block)};
  MPI_Aint places[2] = {0, (MPI_Aint)(bytes - bytes % block)};
  int code = MPI_Type_contiguous((int)block, MPI_BYTE, &blocks);
  if (code != MPI_SUCCESS) return code;
  MPI_Datatype types[2] = {blocks, MPI_BYTE};
  code = MPI_Type_create_struct(2, lengths, places, types, type);
  MPI_Type_free(&blocks);
  if (code == MPI_SUCCESS) code = MPI_Type_commit(type);
  *count = 1;
  return code;
}

/* ---- collectives ---- */

/* Runs `call`, which starts a collective and sets `started`, and returns its request to the
 * library. */
#define START(call) \
  do { \
    MPI_Request *started = (MPI_Request *)malloc(sizeof *started); \
    if (started == NULL) return leave(NO_MEMORY); \
    const int code_ = (call); \
    if (code_ != MPI_SUCCESS) { \
      free(started); \
      return leave(code_); \
    } \
    *request = started; \
    return leave(0); \
  } while (0)

#define ENTER(self) \
  context_t *c = (context_t *)(self); \
  if (c->problem[0] != '\0') return PROBLEM; \
  const int refused = enter(); \
  if (refused) return refused

static int32_t all_gather(void *self, int32_t lane, const void *input, void *output, size_t bytes,
                          void **request) {
  ENTER(self);
  int rank = 0, count = 0;
  MPI_Datatype type;
  MPI_Comm_rank(c->lanes[lane], &rank);
  int code = bytes_type(bytes, &count, &type);
  if (code != 0) return leave(code);
  const int in_place = input == (const char *)output + (size_t)rank * bytes;
  MPI_Request *started = (MPI_Request *)malloc(sizeof *started);
  code = started == NULL ? NO_MEMORY
                         : MPI_Iallgather(in_place ? MPI_IN_PLACE : input, count, type, output,
                                          count, type, c->lanes[lane], started);
  if (type != MPI_BYTE) MPI_Type_free(&type); /* takes effect when the collective has ended */
  if (code == MPI_SUCCESS) {
    *request = started;
  } else {
    free(started);
  }
  return leave(code);
}

static int32_t reduce_scatter(void *self, int32_t lane, const void *input, void *output,
                              size_t count, fsdp_dtype_t dtype, int32_t op, void **request) {
  ENTER(self);
  int size = 1;
  MPI_Datatype type;
  MPI_Op mpi_op;
  MPI_Comm_size(c->lanes[lane], &size);
  const int code =
      count > (size_t)(INT_MAX / size) ? TOO_LARGE : find_type(dtype, op, &type, &mpi_op);
  if (code != 0) return leave(code);
  START(
      MPI_Ireduce_scatter_block(input, output, (int)count, type, mpi_op, c->lanes[lane], started));
}

static int32_t all_reduce(void *self, int32_t lane, void *data, size_t count, fsdp_dtype_t dtype,
                          int32_t op, void **request) {
  ENTER(self);
  MPI_Datatype type;
  MPI_Op mpi_op;
  const int code = count > INT_MAX ? TOO_LARGE : find_type(dtype, op, &type, &mpi_op);
  if (code != 0) return leave(code);
  START(MPI_Iallreduce(MPI_IN_PLACE, data, (int)count, type, mpi_op, c->lanes[lane], started));
}

static int32_t broadcast(void *self, int32_t lane, void *data, size_t bytes, int32_t root,
                         void **request) {
  ENTER(self);
  int count = 0;
  MPI_Datatype type;
  int code = bytes_type(bytes, &count, &type);
  if (code != 0) return leave(code);
  MPI_Request *started = (MPI_Request *)malloc(sizeof *started);
  code = started == NULL ? NO_MEMORY : MPI_Ibcast(data, count, type, root, c->lanes[lane], started);
  if (type != MPI_BYTE) MPI_Type_free(&type);
  if (code == MPI_SUCCESS) {
    *request = started;
  } else {
    free(started);
  }
  return leave(code);
}

static int32_t barrier(void *self, int32_t lane, void **request) {
  ENTER(self);
  START(MPI_Ibarrier(c->lanes[lane], started));
}

static int32_t test(void *self, void *request, int32_t *done) {
  ENTER(self);
  int ended = 0;
  const int code = MPI_Test((MPI_Request *)request, &ended, MPI_STATUS_IGNORE);
  if (code == MPI_SUCCESS && ended) free(request);
  *done = ended;
  return leave(code);
}

/* ---- messages ---- */

static int32_t send_post(void *self, int32_t rank, const void *message) {
  ENTER(self);
  post_t *post = (post_t *)malloc(sizeof *post);
  if (post == NULL) return leave(NO_MEMORY);
  memcpy(post->bytes, message, sizeof post->bytes);
  const int code =
      MPI_Isend(post->bytes, (int)sizeof post->bytes, MPI_BYTE, rank, 0, c->mail, &post->request);
  if (code != MPI_SUCCESS) {
    free(post);
    return leave(code);
  }
  post->next = c->posts;
  c->posts = post;
  return leave(0);
}

/* Frees what was sent. */
static void tidy(context_t *c) {
  for (post_t **at = &c->posts; *at != NULL;) {
    post_t *post = *at;
    int sent = 0;
    if (MPI_Test(&post->request, &sent, MPI_STATUS_IGNORE) == MPI_SUCCESS && sent) {
      *at = post->next;
      free(post);
    } else {
      at = &post->next;
    }
  }
}

static int32_t poll_mail(void *self, int32_t *rank, void *message) {
  ENTER(self);
  int there = 0;
  MPI_Status status;
  *rank = -1;
  if (c->posts != NULL) tidy(c);
  int code = MPI_Iprobe(MPI_ANY_SOURCE, 0, c->mail, &there, &status);
  if (code == MPI_SUCCESS && there) {
    code = MPI_Recv(message, FSDP_HOST_MESSAGE_BYTES, MPI_BYTE, status.MPI_SOURCE, 0, c->mail,
                    &status);
    if (code == MPI_SUCCESS) *rank = status.MPI_SOURCE;
  }
  return leave(code);
}

/* ---- the life of a communicator ---- */

static int64_t now_ms(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

/* Duplicates `comm`; every rank has until `deadline`. */
static int duplicate(context_t *c, MPI_Comm comm, MPI_Comm *out, int64_t deadline) {
  MPI_Request request;
  int done = 0, code = MPI_Comm_idup(comm, out, &request);
  while (code == MPI_SUCCESS && !done) {
    code = MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (code == MPI_SUCCESS && !done && now_ms() > deadline) {
      snprintf(c->problem, sizeof c->problem,
               "not every rank has come to make this communicator in time");
      c->failed = 1;
      return 0;
    }
  }
  if (code == MPI_SUCCESS) code = MPI_Comm_set_errhandler(*out, MPI_ERRORS_RETURN);
  return code;
}

/* Fills the context; what goes wrong becomes its problem, which the first callback reports. */
static void open_context(context_t *c, MPI_Comm comm, int64_t timeout_ms) {
  const int64_t deadline = now_ms() + (timeout_ms > 0 ? timeout_ms : 120000);
  int code = make_narrow_ops();
  for (int lane = 0; lane < FSDP_HOST_LANES && code == MPI_SUCCESS && c->problem[0] == '\0'; lane++)
    code = duplicate(c, comm, &c->lanes[lane], deadline);
  if (code == MPI_SUCCESS && c->problem[0] == '\0') code = duplicate(c, comm, &c->mail, deadline);
  if (code != MPI_SUCCESS) {
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    snprintf(c->problem, sizeof c->problem, "MPI cannot duplicate the communicator: %.150s", text);
  }
}

static int32_t split(void *self, int32_t color, int32_t key, const int32_t *members, int32_t count,
                     void **part) {
  ENTER(self);
  MPI_Comm comm;
  (void)members;
  (void)count;
  context_t *made = (context_t *)calloc(1, sizeof *made);
  if (made == NULL) return leave(NO_MEMORY);
  const int code = MPI_Comm_split(c->lanes[FSDP_HOST_LANE_CONTROL], color, key, &comm);
  if (code != MPI_SUCCESS) {
    free(made);
    return leave(code);
  }
  made->abort_job = c->abort_job;
  open_context(made, comm, 0);
  MPI_Comm_free(&comm);
  *part = made;
  return leave(0);
}

static void release(void *self) {
  context_t *c = (context_t *)self;
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (!finalized && !c->failed && c->problem[0] == '\0' && enter() == 0) {
    tidy(c);
    for (int lane = 0; lane < FSDP_HOST_LANES; lane++) MPI_Comm_free(&c->lanes[lane]);
    /* Not the one of the messages: one that is still on its way would be delivered to whatever
     * communicator MPI gives the same number next. */
    leave(0);
  }
  if (!c->failed && c->posts == NULL) free(c);
}

static void fail(void *self, const char *reason) {
  context_t *c = (context_t *)self;
  if (c->problem[0] == '\0') c->failed = 1;
  if (c->abort_job) {
    fprintf(stderr, "fsdp: %s\n", reason);
    fflush(stderr);
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
}

static void describe_error(void *self, int32_t code, char *text, size_t size) {
  const context_t *c = (const context_t *)self;
  const char *own = code == PROBLEM ? c->problem
                    : code == OTHER_THREAD
                        ? "MPI was initialized below MPI_THREAD_SERIALIZED, and this is not the "
                          "thread that did so (MPI_Init_thread)"
                    : code == TOO_LARGE
                        ? "more than 2^31 - 1 elements in one sum: make smaller units"
                    : code == NO_MEMORY ? "no memory"
                    : code == NO_TYPE   ? "a type or operation that is unknown here"
                                        : NULL;
  char message[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  if (own == NULL) MPI_Error_string(code, message, &length);
  snprintf(text, size, "%s", own != NULL ? own : message);
}

fsdp_status_t fsdp_comm_init_mpi(MPI_Comm comm, const fsdp_mpi_config_t *config,
                                 fsdp_comm_t **out) {
  fsdp_host_comm_config_t host = FSDP_HOST_COMM_CONFIG_INIT;
  fsdp_host_collectives_t table = FSDP_HOST_COLLECTIVES_INIT;
  context_t *c = (context_t *)calloc(1, sizeof *c);
  int rank = 0, size = 1, initialized = 0, finalized = 0;
  int64_t patience_ms = 0;
  if (c == NULL) return FSDP_ERR_OUT_OF_MEMORY;
  if (config != NULL && config->struct_size != sizeof *config)
    snprintf(c->problem, sizeof c->problem, "fsdp_mpi_config_t.struct_size is %zu, not %zu",
             config->struct_size, sizeof *config);
  if (config != NULL && c->problem[0] == '\0') {
    host.timeout_ms = config->timeout_ms;
    patience_ms = config->rendezvous_timeout_ms;
    c->abort_job = config->abort_job;
  }
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  if (!initialized || finalized) {
    snprintf(c->problem, sizeof c->problem,
             initialized ? "MPI is finalized" : "MPI is not initialized: call MPI_Init first");
  } else if (c->problem[0] == '\0' && comm == MPI_COMM_NULL) {
    snprintf(c->problem, sizeof c->problem, "the communicator is MPI_COMM_NULL");
  } else if (c->problem[0] == '\0') {
    const int refused = enter();
    if (refused == 0) {
      MPI_Comm_rank(comm, &rank);
      MPI_Comm_size(comm, &size);
      open_context(c, comm, patience_ms);
      leave(0);
    } else {
      describe_error(c, refused, c->problem, sizeof c->problem);
    }
  }
  host.rank = rank;
  host.world_size = size;
  table.all_gather = all_gather;
  table.reduce_scatter = reduce_scatter;
  table.all_reduce = all_reduce;
  table.broadcast = broadcast;
  table.barrier = barrier;
  table.test = test;
  table.split = split;
  table.release = release;
  table.post = send_post;
  table.poll = poll_mail;
  table.abort = fail;
  table.describe_error = describe_error;
  const fsdp_status_t status = fsdp_comm_init_host(&host, &table, c, out);
  if (status != FSDP_OK && !c->failed) free(c);
  return status;
}
