/* An NCCL that is this process alone: every rank has what this one has or, if it was told so, ranks are threads that
 * meet in each collective, or only where communicators are split (meeting.h). It works on host memory (the fake driver's), writes down what it is asked, and can
 * be told to be slow or to fail. Strict: a communicator that was destroyed, a
 * collective that is not in place, or a call while the last one is still at work is an error; what a call makes is there when it
 * is done, not when it returns. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meeting.h"
#include "memory.h"

enum { kSuccess = 0, kUnhandledCuda = 1, kInternal = 3, kInvalidArgument = 4, kInvalidUsage = 5, kInProgress = 7 };

struct comm {
  int alive, rank, world, polls, finalized;
  int ops;
  float scalar;
  /* Where the ranks meet that are threads of this process; NULL: there are none. */
  struct meeting *meeting;
  /* They do in collectives, too; else every rank has what this one has. */
  int exchanges, splits;
  /* What the call at work gives when it is done, and where. */
  void **result;
  void *given;
};

typedef struct {
  char internal[128];
} unique_id;

struct config {
  size_t size;
  unsigned magic, version;
  int blocking, cga, min_ctas, max_ctas;
  const char *net_name;
  int split_share, traffic_class;
};

static char lines[1 << 20];
static char failing[64], last_error[128];
/* The rank of a communicator whose calls fail; -1: all. */
static int fail_code, failing_rank = -1;
static atomic_int slow_polls, async_code, alive, meets;
static _Thread_local int grouped;
/* Of this thread's group. */
static _Thread_local struct comm *group_comm;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void note(const char *format, ...) {
  pthread_mutex_lock(&lock);
  size_t used = strlen(lines);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(lines + used, sizeof lines - used, format, arguments);
  va_end(arguments);
  strncat(lines, "\n", sizeof lines - strlen(lines) - 1);
  pthread_mutex_unlock(&lock);
}

/* ---- for the tests ---- */

/* Forgets what was asked; nothing is slow or fails from here on. */
void fake_nccl_reset(void) {
  lines[0] = failing[0] = last_error[0] = 0;
  fail_code = slow_polls = async_code = meets = 0;
  failing_rank = -1;
  collectives_inside = collectives_outside = 0;
}

/* Ranks of communicators that are made from here on are threads of this process that meet (1), or do so to split them, but have
 * the same in collectives, which then wait for nobody (2). */
void fake_nccl_meet(int on) { meets = on; }

const char *fake_nccl_log(void) { return lines; }

/* The function of this name returns `code`. */
void fake_nccl_fail(const char *name, int code) {
  snprintf(failing, sizeof failing, "%s", name);
  snprintf(last_error, sizeof last_error, "socket 7 was reset");
  fail_code = code;
}

/* Only of communicators in which it is this rank. */
void fake_nccl_fail_rank(int rank) { failing_rank = rank; }

/* Calls return while they are at work, and are for so many polls; below 0: for ever. */
void fake_nccl_slow(int polls) { slow_polls = polls; }

/* What every poll finds. */
void fake_nccl_async(int code) {
  async_code = code;
  snprintf(last_error, sizeof last_error, "peer 1 has gone");
}

/* Communicators that there are, pieces of memory, and collectives so far by where they were. */
int fake_nccl_alive(void) { return alive; }
int fake_nccl_inside(void) { return collectives_inside; }
int fake_nccl_outside(void) { return collectives_outside; }
int fake_nccl_pieces(void) {
  int count = 0;
  for (const struct piece *p = pieces; p; p = p->next) count++;
  return count;
}

/* ---- NCCL ---- */

static int begin(const char *name, struct comm *comm) {
  if (strcmp(failing, name) == 0 && (failing_rank < 0 || !comm || comm->rank == failing_rank)) return fail_code;
  if (comm && (!comm->alive || comm->finalized)) return kInvalidArgument;
  if (comm && comm->polls) return kInvalidUsage;
  return kSuccess;
}

#define BEGIN(comm)                      \
  do {                                   \
    int code = begin(__func__, comm);    \
    if (code != kSuccess) return code;   \
  } while (0)

static int work(struct comm *comm) {
  if (grouped) {
    group_comm = comm;
    return kSuccess;
  }
  comm->polls = slow_polls;
  return slow_polls ? kInProgress : kSuccess;
}

/* As work(), for a call that sets *result. */
static int make_later(struct comm *comm, void **result, void *given) {
  *result = NULL;
  const int code = work(comm);
  if (comm->polls) {
    comm->result = result, comm->given = given;
  } else {
    *result = given;
  }
  return code;
}

static struct comm *make(int rank, int world) {
  struct comm *comm = calloc(1, sizeof *comm);
  comm->alive = 1, comm->rank = rank, comm->world = world;
  alive++;
  return comm;
}

static int is_config(const struct config *c) {
  return c->magic == 0xcafebeef && c->size >= sizeof *c && c->version >= 21800 && c->blocking == 0 && c->net_name == NULL &&
         c->split_share == 0 && c->traffic_class == INT_MIN;
}

int ncclGetVersion(int *version) {
  *version = 22703;
  return kSuccess;
}

int ncclGetUniqueId(unique_id *id) {
  BEGIN(NULL);
  const char *address = getenv("NCCL_COMM_ID");
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "%s", address ? address : "made here");
  static atomic_int made;
  if (meets) snprintf(id->internal, sizeof id->internal, "meeting %d", made++);
  return kSuccess;
}

int ncclCommInitRankConfig(struct comm **comm, int world, unique_id id, int rank, struct config *config) {
  BEGIN(NULL);
  if (!is_config(config)) return kInvalidArgument;
  note("init rank %d of %d by %s", rank, world, id.internal);
  *comm = make(rank, world);
  if (meets) (*comm)->meeting = find_meeting(id.internal, world);
  (*comm)->exchanges = meets == 1;
  return work(*comm);
}

int ncclCommSplit(struct comm *comm, int color, int key, struct comm **made, struct config *config) {
  BEGIN(comm);
  if (!is_config(config)) return kInvalidArgument;
  note("split color %d key %d", color, key);
  if (!comm->meeting) {
    return make_later(comm, (void **)made, make(comm->rank, comm->world));
  }
  const struct part mine = {color, key};
  int rank, world;
  if (!come(comm->meeting, comm->rank, &mine, sizeof mine)) return kInternal;
  place_in_part(comm->meeting, comm->rank, &rank, &world);
  if (!come(comm->meeting, comm->rank, NULL, 0)) return kInternal;
  char id[160];
  snprintf(id, sizeof id, "%.120s/%d.%d", comm->meeting->id, comm->splits++, color);
  struct comm *part = make(rank, world);
  part->meeting = find_meeting(id, world);
  part->exchanges = comm->exchanges;
  return make_later(comm, (void **)made, part);
}

int ncclCommGetAsyncError(struct comm *comm, int *code) {
  if (!comm || !comm->alive) return kInvalidArgument;
  if (comm->polls > 0 && --comm->polls == 0 && comm->result) {
    *comm->result = comm->given;
    comm->result = NULL;
  }
  *code = async_code ? async_code : comm->polls ? kInProgress : kSuccess;
  return kSuccess;
}

int ncclCommAbort(struct comm *comm) {
  if (!comm || !comm->alive) return kInvalidArgument;
  note("abort");
  known_pieces(comm, 1);
  comm->alive = 0;
  alive--;
  return kSuccess;
}

int ncclCommFinalize(struct comm *comm) {
  BEGIN(comm);
  comm->polls = slow_polls, comm->finalized = 1;
  note("finalize");
  return slow_polls ? kInProgress : kSuccess;
}

int ncclCommDestroy(struct comm *comm) {
  if (!comm->alive || !comm->finalized || comm->polls) return kInvalidArgument;
  note(known_pieces(comm, 0) ? "destroy, with registrations" : "destroy");
  comm->alive = 0;
  alive--;
  return kSuccess;
}

int ncclGroupStart(void) {
  BEGIN(NULL);
  note("group start");
  grouped = 1;
  return kSuccess;
}

int ncclGroupEnd(void) {
  note("group end");
  grouped = 0;
  struct comm *comm = group_comm;
  group_comm = NULL;
  BEGIN(NULL);
  return comm ? work(comm) : kSuccess;
}

static size_t size_of(int dtype) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return sizes[dtype];
}

/* What ranks compare of a collective: as many bytes, at the same place of what is registered. */
static size_t shape(size_t bytes, int64_t offset) { return bytes ^ (size_t)(offset + 1) << 32; }

/* Every rank has these floats. */
static void combine(const struct comm *comm, float *to, const float *from, size_t count, int op) {
  for (size_t i = 0; i < count; i++) {
    float x = from[i];
    if (op == 0) x *= (float)comm->world;
    if (op >= 5) x = x * comm->scalar * (float)comm->world;
    to[i] = x;
  }
}

int ncclAllGather(const char *from, char *to, size_t count, int dtype, struct comm *comm, void *stream) {
  BEGIN(comm);
  size_t bytes = count * size_of(dtype);
  if (from != to + (size_t)comm->rank * bytes || !stream) return kInvalidArgument;
  note("all_gather %zu of type %d", count, dtype);
  int64_t offset;
  if (!place_collective(comm, to, bytes * (size_t)comm->world, &offset)) return kInvalidUsage;
  struct meeting *const m = comm->exchanges ? comm->meeting : NULL;
  if (m && !come(m, comm->rank, from, shape(bytes, offset))) return kInternal;
  for (int r = 0; r < comm->world; r++) {
    const char *theirs = m ? m->from[r] : from;
    if (r != comm->rank) memcpy(to + (size_t)r * bytes, theirs, bytes);
  }
  if (m && !come(m, comm->rank, NULL, 0)) return kInternal;
  return work(comm);
}

int ncclReduceScatter(const char *from, char *to, size_t count, int dtype, int op, struct comm *comm, void *stream) {
  BEGIN(comm);
  if (to != from + (size_t)comm->rank * count * size_of(dtype) || !stream || op > 4 + comm->ops) return kInvalidArgument;
  note("reduce_scatter %zu of type %d by %d", count, dtype, op);
  const size_t bytes = count * size_of(dtype);
  int64_t offset;
  if (!place_collective(comm, from, bytes * (size_t)comm->world, &offset)) return kInvalidUsage;
  if (comm->exchanges) {
    /* A rank writes its own range of its own memory, which nobody else reads. */
    if (!come(comm->meeting, comm->rank, from, shape(bytes, offset))) return kInternal;
    if (!mean_of_all(comm->meeting, comm->rank, to, count, dtype, op == 4)) return kInvalidArgument;
    return come(comm->meeting, comm->rank, NULL, 0) ? work(comm) : kInternal;
  }
  if (dtype == 7) combine(comm, (float *)to, (const float *)to, count, op);
  return work(comm);
}

int ncclAllReduce(const char *from, char *to, size_t count, int dtype, int op, struct comm *comm, void *stream) {
  BEGIN(comm);
  if (to != from || !stream) return kInvalidArgument;
  note("all_reduce %zu of type %d by %d", count, dtype, op);
  if (comm->exchanges) {
    if (op != 0 && op != 4) return kInvalidArgument;
    const size_t bytes = count * size_of(dtype);
    char *const result = malloc(bytes + 1);
    int good = come(comm->meeting, comm->rank, from, bytes);
    good = good && mean_of_all(comm->meeting, 0, result, count, dtype, op == 4);
    /* Nobody writes before all have read. */
    good = come(comm->meeting, comm->rank, NULL, 0) && good;
    if (good) memcpy(to, result, bytes);
    free(result);
    return good ? work(comm) : kInternal;
  }
  if (dtype == 7) combine(comm, (float *)to, (const float *)from, count, op);
  return work(comm);
}

int ncclBroadcast(const char *from, char *to, size_t count, int dtype, int root, struct comm *comm, void *stream) {
  BEGIN(comm);
  if (to != from || !stream) return kInvalidArgument;
  note("broadcast %zu of type %d from %d", count, dtype, root);
  return work(comm);
}

const char *ncclGetErrorString(int code) {
  switch (code) {
    case 3: return "internal error";
    case 4: return "invalid argument";
    case 5: return "invalid usage";
    case 6: return "remote process exited or there was a network error";
    default: return "unhandled error";
  }
}

const char *ncclGetLastError(struct comm *comm) {
  if (comm && !comm->alive) return "asked about a communicator that has gone";
  return last_error;
}

int ncclRedOpCreatePreMulSum(int *op, void *scalar, int dtype, int residence, struct comm *comm) {
  BEGIN(comm);
  if (residence != 1) return kInvalidArgument;
  if (dtype == 7) memcpy(&comm->scalar, scalar, sizeof comm->scalar);
  comm->ops++;
  *op = 5;
  note("scaled sum of type %d", dtype);
  return kSuccess;
}

int ncclRedOpDestroy(int op, struct comm *comm) {
  BEGIN(comm);
  if (op != 5 || comm->ops == 0) return kInvalidArgument;
  comm->ops--;
  return kSuccess;
}

#ifndef WITHOUT_REGISTRATION
int ncclMemAlloc(void **data, size_t size) {
  BEGIN(NULL);
  *data = new_piece(size);
  note("memory %zu", size);
  return *data ? kSuccess : kUnhandledCuda;
}

int ncclMemFree(void *data) {
  const int good = free_piece(data);
  note(good ? "free" : "free of what is registered, or is not NCCL's");
  return good ? kSuccess : kInvalidArgument;
}

int ncclCommRegister(struct comm *comm, void *data, size_t size, void **handle) {
  BEGIN(comm);
  if (!know_piece(data, size, comm)) return kInvalidArgument;
  note("register %zu", size);
  *handle = data;
  return kSuccess;
}

int ncclCommDeregister(struct comm *comm, void *handle) {
  BEGIN(comm);
  note("deregister");
  return forget_piece(handle, comm) ? kSuccess : kInvalidArgument;
}

#ifndef WITHOUT_WINDOWS
int ncclCommWindowRegister(struct comm *comm, void *data, size_t size, void **handle, int flags) {
  BEGIN(comm);
  if (flags != 1 || !know_piece(data, size, comm)) return kInvalidArgument;
  note("window %zu", size);
  struct meeting *m = comm->exchanges ? comm->meeting : NULL;
  if (m && !(come(m, comm->rank, data, size) && come(m, comm->rank, NULL, 0))) return kInternal;
  return make_later(comm, handle, data);
}

int ncclCommWindowDeregister(struct comm *comm, void *handle) {
  BEGIN(comm);
  note("close window");
  return forget_piece(handle, comm) ? work(comm) : kInvalidArgument;
}
#endif
#endif
