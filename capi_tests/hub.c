/* See hub.h. Every collective is an entry in a list; the rank that comes last does all of it. */
#include "hub.h"

#include <errno.h>
#include <pthread.h>
#include <time.h>

enum { GATHER = 1, SCATTER, REDUCE, BROADCAST, BARRIER, SPLIT };
enum { MISMATCH = 41, ABORTED = 42 };

/* One collective of a group. */
typedef struct entry {
  struct entry *next;
  int group, lane, kind;
  uint64_t number;
  size_t size;
  int32_t op, root;
  fsdp_dtype_t dtype;
  int arrived, done, collected;
  const void *inputs[HUB_RANKS];
  void *outputs[HUB_RANKS];
} entry_t;

typedef struct mail {
  struct mail *next;
  int32_t from;
  char bytes[FSDP_HOST_MESSAGE_BYTES];
} mail_t;

struct hub {
  pthread_mutex_t lock;
  pthread_cond_t changed;
  hub_kind_t kind;
  entry_t *entries;
  int groups, lent, endpoints, aborted;
};

/* A rank in a group: the user_data of the callbacks. */
typedef struct {
  hub_t *hub;
  hub_rank_t *owner;
  int group, rank, world;
  uint64_t numbers[FSDP_HOST_LANES + 1];
  pthread_mutex_t mail_lock;
  mail_t *mail;
} endpoint_t;

/* The endpoints of all groups, for messages. */
enum { MAX_ENDPOINTS = 256 };
static endpoint_t *endpoints[MAX_ENDPOINTS];
static pthread_mutex_t endpoints_lock = PTHREAD_MUTEX_INITIALIZER;

typedef struct {
  entry_t *entry;
} request_t;

/* Hubs of jobs that failed. */
enum { MAX_KEPT = 128 };
extern hub_t *hub_kept[MAX_KEPT];
hub_t *hub_kept[MAX_KEPT];

static size_t element(fsdp_dtype_t d) { return d.bits / 8u; }

static float widen(const char *at, fsdp_dtype_t d) {
  uint32_t bits = 0;
  float x = 0;
  CHECK((d.code == FSDP_DTYPE_FLOAT && d.bits == 32) ||
        (d.code == FSDP_DTYPE_BFLOAT && d.bits == 16));
  if (d.bits == 32) {
    memcpy(&bits, at, 4);
  } else {
    uint16_t upper;
    memcpy(&upper, at, 2);
    bits = (uint32_t)upper << 16;
  }
  memcpy(&x, &bits, sizeof x);
  return x;
}

static void narrow(char *at, fsdp_dtype_t d, float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (d.bits == 32) {
    memcpy(at, &bits, 4);
  } else {
    const uint16_t upper = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    memcpy(at, &upper, 2);
  }
}

/* Elements `first` on of all inputs, combined in rank order, to `out`. */
static void combine(const entry_t *e, int world, size_t first, size_t count, char *out) {
  const size_t size = element(e->dtype);
  for (size_t i = 0; i < count; i++) {
    float sum = 0;
    for (int r = 0; r < world; r++) {
      const float x = widen((const char *)e->inputs[r] + (first + i) * size, e->dtype);
      const int takes = r == 0 || (e->op == FSDP_REDUCE_MAX ? x > sum : x < sum);
      sum = e->op == FSDP_REDUCE_SUM ? (r == 0 ? x : sum + x) : takes ? x : sum;
    }
    narrow(out + i * size, e->dtype, sum);
  }
}

/* What all ranks have come for. */
static void run(entry_t *e, int world) {
  for (int r = 0; r < world; r++) {
    char *out = (char *)e->outputs[r];
    if (e->kind == GATHER) {
      for (int from = 0; from < world; from++) {
        if (e->inputs[from] != out + (size_t)from * e->size)
          memcpy(out + (size_t)from * e->size, e->inputs[from], e->size);
      }
    } else if (e->kind == SCATTER) {
      combine(e, world, (size_t)r * e->size, e->size, out);
    } else if (e->kind == BROADCAST && r != e->root) {
      memcpy(out, e->outputs[e->root], e->size);
    }
  }
  if (e->kind == REDUCE) {
    char *result = (char *)malloc(e->size * element(e->dtype) + 1);
    CHECK(result != NULL);
    combine(e, world, 0, e->size, result);
    for (int r = 0; r < world; r++) memcpy(e->outputs[r], result, e->size * element(e->dtype));
    free(result);
  }
  if (e->kind == SPLIT) e->root = 0;
  e->done = 1;
}

/* This rank is done with an entry that is done; under the lock. */
static void collect(hub_t *hub, entry_t *e, int world) {
  if (++e->collected < world) return;
  for (entry_t **at = &hub->entries; *at != NULL; at = &(*at)->next) {
    if (*at == e) {
      *at = e->next;
      break;
    }
  }
  free(e);
}

static int32_t start(endpoint_t *p, int32_t lane, entry_t what, const void *input, void *output,
                     void **request) {
  hub_t *hub = p->hub;
  const uint64_t number = p->numbers[lane]++;
  CHECK(lane >= 0 && lane <= FSDP_HOST_LANES);
  pthread_mutex_lock(&hub->lock);
  entry_t *e = hub->entries;
  while (e != NULL && (e->group != p->group || e->lane != lane || e->number != number)) e = e->next;
  if (e == NULL) {
    e = (entry_t *)malloc(sizeof *e);
    CHECK(e != NULL);
    *e = what;
    e->group = p->group;
    e->lane = lane;
    e->number = number;
    e->next = hub->entries;
    hub->entries = e;
  } else if (e->kind != what.kind || e->size != what.size || e->op != what.op ||
             e->root != what.root) {
    /* The library has to keep this from happening. */
    pthread_mutex_unlock(&hub->lock);
    return MISMATCH;
  }
  e->inputs[p->rank] = input;
  e->outputs[p->rank] = output;
  if (++e->arrived == p->world) {
    run(e, p->world);
    pthread_cond_broadcast(&hub->changed);
  }
  int32_t code = 0;
  if (hub->kind.blocking || lane == FSDP_HOST_LANES) {
    while (!e->done && !hub->aborted) pthread_cond_wait(&hub->changed, &hub->lock);
    if (e->done) {
      collect(hub, e, p->world);
    } else {
      code = ABORTED;
    }
  } else {
    request_t *r = (request_t *)malloc(sizeof *r);
    CHECK(r != NULL);
    r->entry = e;
    *request = r;
  }
  pthread_mutex_unlock(&hub->lock);
  return code;
}

static int32_t fails(const endpoint_t *p, const char *name) {
  return p->owner->failing != NULL && strcmp(p->owner->failing, name) == 0 ? p->owner->code : 0;
}

static entry_t entry_of(int kind, size_t size) {
  entry_t e;
  memset(&e, 0, sizeof e);
  e.kind = kind;
  e.size = size;
  return e;
}

static int32_t all_gather(void *self, int32_t lane, const void *input, void *output, size_t bytes,
                          void **request) {
  endpoint_t *p = (endpoint_t *)self;
  const int32_t code = fails(p, "all_gather");
  return code != 0 ? code : start(p, lane, entry_of(GATHER, bytes), input, output, request);
}

static int32_t reduce_scatter(void *self, int32_t lane, const void *input, void *output,
                              size_t count, fsdp_dtype_t dtype, int32_t op, void **request) {
  endpoint_t *p = (endpoint_t *)self;
  entry_t e = entry_of(SCATTER, count);
  const int32_t code = fails(p, "reduce_scatter");
  e.dtype = dtype;
  e.op = op;
  return code != 0 ? code : start(p, lane, e, input, output, request);
}

static int32_t all_reduce(void *self, int32_t lane, void *data, size_t count, fsdp_dtype_t dtype,
                          int32_t op, void **request) {
  entry_t e = entry_of(REDUCE, count);
  e.dtype = dtype;
  e.op = op;
  return start((endpoint_t *)self, lane, e, data, data, request);
}

static int32_t broadcast(void *self, int32_t lane, void *data, size_t bytes, int32_t root,
                         void **request) {
  entry_t e = entry_of(BROADCAST, bytes);
  e.root = root;
  return start((endpoint_t *)self, lane, e, data, data, request);
}

static int32_t barrier(void *self, int32_t lane, void **request) {
  endpoint_t *p = (endpoint_t *)self;
  const int32_t code = fails(p, "barrier");
  return code != 0 ? code : start(p, lane, entry_of(BARRIER, 0), NULL, NULL, request);
}

static int32_t test(void *self, void *request, int32_t *done) {
  endpoint_t *p = (endpoint_t *)self;
  request_t *r = (request_t *)request;
  const int32_t code = fails(p, "test");
  if (code != 0) return code;
  pthread_mutex_lock(&p->hub->lock);
  *done = r->entry->done;
  if (*done) collect(p->hub, r->entry, p->world);
  pthread_mutex_unlock(&p->hub->lock);
  if (*done) free(r);
  return 0;
}

static int32_t wait_for(void *self, void *request, int64_t timeout_ms, int32_t *done) {
  endpoint_t *p = (endpoint_t *)self;
  request_t *r = (request_t *)request;
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
  until.tv_sec += (time_t)(timeout_ms / 1000 + until.tv_nsec / 1000000000);
  until.tv_nsec %= 1000000000;
  pthread_mutex_lock(&p->hub->lock);
  while (!r->entry->done &&
         pthread_cond_timedwait(&p->hub->changed, &p->hub->lock, &until) != ETIMEDOUT) {
  }
  pthread_mutex_unlock(&p->hub->lock);
  return test(self, request, done);
}

static endpoint_t *endpoint_new(hub_t *hub, hub_rank_t *owner, int group, int rank, int world) {
  endpoint_t *p = (endpoint_t *)calloc(1, sizeof *p);
  CHECK(p != NULL);
  p->hub = hub;
  p->owner = owner;
  p->group = group;
  p->rank = rank;
  p->world = world;
  pthread_mutex_init(&p->mail_lock, NULL);
  pthread_mutex_lock(&endpoints_lock);
  int at = 0;
  while (at < MAX_ENDPOINTS && endpoints[at] != NULL) at++;
  CHECK(at < MAX_ENDPOINTS);
  endpoints[at] = p;
  hub->endpoints++;
  pthread_mutex_unlock(&endpoints_lock);
  return p;
}

static int32_t split(void *self, int32_t color, int32_t key, const int32_t *members, int32_t count,
                     void **part) {
  endpoint_t *p = (endpoint_t *)self;
  int32_t rank = -1, first = members[0];
  const int32_t failure = fails(p, "split");
  (void)key;
  if (failure != 0) return failure;
  for (int32_t m = 0; m < count; m++) {
    if (members[m] == p->rank) rank = m;
    if (members[m] < first) first = members[m];
  }
  CHECK(rank >= 0 && color >= 0);
  /* Everybody comes; groups are told apart by the parent, the number of the split and their first
   * member. */
  const int group = (p->group * 64 + (int)p->numbers[FSDP_HOST_LANES] + 1) * HUB_RANKS + first + 1;
  const int32_t code = start(p, FSDP_HOST_LANES, entry_of(SPLIT, 0), NULL, NULL, NULL);
  if (code == 0) *part = endpoint_new(p->hub, p->owner, group, rank, count);
  return code;
}

static void release(void *self) {
  endpoint_t *p = (endpoint_t *)self;
  pthread_mutex_lock(&endpoints_lock);
  for (int at = 0; at < MAX_ENDPOINTS; at++) {
    if (endpoints[at] == p) endpoints[at] = NULL;
  }
  p->hub->endpoints--;
  pthread_mutex_unlock(&endpoints_lock);
  while (p->mail != NULL) {
    mail_t *next = p->mail->next;
    free(p->mail);
    p->mail = next;
  }
  pthread_mutex_destroy(&p->mail_lock);
  free(p);
}

static int32_t post(void *self, int32_t rank, const void *message) {
  endpoint_t *p = (endpoint_t *)self;
  mail_t *mail = (mail_t *)malloc(sizeof *mail);
  CHECK(mail != NULL);
  mail->next = NULL;
  mail->from = p->rank;
  memcpy(mail->bytes, message, sizeof mail->bytes);
  pthread_mutex_lock(&endpoints_lock);
  for (int at = 0; at < MAX_ENDPOINTS && mail != NULL; at++) {
    endpoint_t *to = endpoints[at];
    if (to == NULL || to->hub != p->hub || to->group != p->group || to->rank != rank) continue;
    pthread_mutex_lock(&to->mail_lock);
    mail_t **end = &to->mail;
    while (*end != NULL) end = &(*end)->next;
    *end = mail;
    mail = NULL;
    pthread_mutex_unlock(&to->mail_lock);
  }
  pthread_mutex_unlock(&endpoints_lock);
  free(mail); /* nobody is there any more */
  return 0;
}

static int32_t poll_mail(void *self, int32_t *rank, void *message) {
  endpoint_t *p = (endpoint_t *)self;
  const int32_t code = fails(p, "poll");
  *rank = -1;
  if (code != 0) return code;
  pthread_mutex_lock(&p->mail_lock);
  mail_t *mail = p->mail;
  if (mail != NULL) {
    p->mail = mail->next;
    *rank = mail->from;
    memcpy(message, mail->bytes, sizeof mail->bytes);
    free(mail);
  }
  pthread_mutex_unlock(&p->mail_lock);
  return 0;
}

static void abort_all(void *self, const char *reason) {
  endpoint_t *p = (endpoint_t *)self;
  CHECK(reason[0] != '\0');
  pthread_mutex_lock(&p->hub->lock);
  p->hub->aborted = 1;
  pthread_cond_broadcast(&p->hub->changed);
  pthread_mutex_unlock(&p->hub->lock);
}

static void *lend(void *self, size_t bytes) {
  endpoint_t *p = (endpoint_t *)self;
  void *memory = NULL;
  if (fails(p, "alloc") != 0) return NULL;
  CHECK_EQ(posix_memalign(&memory, 64, bytes + 1), 0);
  memset(memory, 0xee, bytes);
  pthread_mutex_lock(&p->hub->lock);
  p->hub->lent++;
  pthread_mutex_unlock(&p->hub->lock);
  return memory;
}

static void take_back(void *self, void *memory, size_t bytes) {
  endpoint_t *p = (endpoint_t *)self;
  (void)bytes;
  pthread_mutex_lock(&p->hub->lock);
  p->hub->lent--;
  pthread_mutex_unlock(&p->hub->lock);
  free(memory);
}

static void describe(void *self, int32_t code, char *text, size_t size) {
  (void)self;
  snprintf(text, size, "%s",
           code == MISMATCH  ? "ranks run different collectives of the hub"
           : code == ABORTED ? "another rank has failed"
                             : "a failure by intention");
}

fsdp_host_collectives_t hub_table(const hub_t *hub) {
  fsdp_host_collectives_t t = FSDP_HOST_COLLECTIVES_INIT;
  t.all_gather = all_gather;
  t.reduce_scatter = reduce_scatter;
  t.all_reduce = all_reduce;
  t.broadcast = broadcast;
  t.barrier = barrier;
  t.test = hub->kind.blocking ? NULL : test;
  t.wait = hub->kind.waits ? wait_for : NULL;
  t.split = hub->kind.no_split ? NULL : split;
  t.release = release;
  t.post = hub->kind.no_messages ? NULL : post;
  t.poll = hub->kind.no_messages ? NULL : poll_mail;
  t.abort = abort_all;
  t.alloc = hub->kind.allocates ? lend : NULL;
  t.free = hub->kind.allocates ? take_back : NULL;
  t.describe_error = describe;
  return t;
}

void *hub_user_data(hub_rank_t *rank) {
  return endpoint_new(rank->hub, rank, 0, rank->rank, rank->world);
}

typedef struct {
  hub_rank_t rank;
  void (*body)(hub_rank_t *rank);
} thread_t;

static void *thread_main(void *argument) {
  thread_t *thread = (thread_t *)argument;
  hub_rank_t *rank = &thread->rank;
  fsdp_host_comm_config_t config = FSDP_HOST_COMM_CONFIG_INIT;
  const fsdp_host_collectives_t table = hub_table(rank->hub);
  config.rank = rank->rank;
  config.world_size = rank->world;
  config.timeout_ms = rank->timeout_ms;
  CHECK_OK(fsdp_comm_init_host(&config, &table, hub_user_data(rank), &rank->comm));
  thread->body(rank);
  fsdp_comm_destroy(rank->comm);
  return NULL;
}

void hub_run(int world, hub_kind_t kind, int64_t timeout_ms, int fails_by_intention,
             void (*body)(hub_rank_t *rank)) {
  /* After a failure the library keeps what may be under way, and so must the hub. */
  hub_t *hub = (hub_t *)calloc(1, sizeof *hub);
  thread_t threads[HUB_RANKS];
  pthread_t ids[HUB_RANKS];
  CHECK(hub != NULL && world <= HUB_RANKS);
  pthread_mutex_init(&hub->lock, NULL);
  pthread_cond_init(&hub->changed, NULL);
  hub->kind = kind;
  memset(threads, 0, sizeof threads);
  for (int r = 0; r < world; r++) {
    threads[r].rank.hub = hub;
    threads[r].rank.rank = r;
    threads[r].rank.world = world;
    threads[r].rank.timeout_ms = timeout_ms;
    threads[r].body = body;
    CHECK_EQ(pthread_create(&ids[r], NULL, thread_main, &threads[r]), 0);
  }
  for (int r = 0; r < world; r++) CHECK_EQ(pthread_join(ids[r], NULL), 0);
  if (fails_by_intention) {
    static int count;
    CHECK(count < MAX_KEPT);
    hub_kept[count++] = hub; /* reachable: no leak */
    return;
  }
  CHECK_EQ(hub->lent, 0);
  CHECK_EQ(hub->endpoints, 0);
  CHECK(hub->entries == NULL);
  pthread_mutex_destroy(&hub->lock);
  pthread_cond_destroy(&hub->changed);
  free(hub);
}
