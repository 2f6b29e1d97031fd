/* Memory of NCCL's own, which it has of the driver, and which of it communicators know. Strict: what is registered is a whole piece of that memory, it is
 * forgotten before it is freed and before its communicator goes, and a collective lies in it as a whole or not at all. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

enum { MAX_KNOWING = 8 };

struct piece {
  char *data;
  size_t size;
  /* Which communicators know it. */
  const void *comms[MAX_KNOWING];
  struct piece *next;
};

static struct piece *pieces;
static pthread_mutex_t piece_lock = PTHREAD_MUTEX_INITIALIZER;
/* Collectives in memory that their communicator knows, and others. */
static int collectives_inside, collectives_outside;

static struct piece *piece_of(const void *data) {
  struct piece *p = pieces;
  while (p && p->data != data) p = p->next;
  return p;
}

/* Where `p` has `comm` among those that know it; NULL: at a free place. NULL if nowhere. */
static inline const void **knowing(struct piece *p, const void *comm) {
  for (int i = 0; i < MAX_KNOWING; i++)
    if (p->comms[i] == comm) return &p->comms[i];
  return NULL;
}

static inline int is_known(struct piece *p) {
  for (int i = 0; i < MAX_KNOWING; i++)
    if (p->comms[i]) return 1;
  return 0;
}

/* A function of the driver that the process has loaded. */
static inline void *of_driver(const char *name) {
  void *driver = dlopen(getenv("FSDP_CUDA_LIBRARY"), RTLD_NOW);
  return driver ? dlsym(driver, name) : NULL;
}

/* NULL: there is none. */
static inline void *new_piece(size_t size) {
  int (*alloc)(unsigned long long *, size_t, void *);
  *(void **)&alloc = of_driver("cuMemAllocAsync");
  unsigned long long address;
  if (!alloc || alloc(&address, size, NULL) != 0) return NULL;
  struct piece *p = calloc(1, sizeof *p);
  p->size = size;
  p->data = (char *)(uintptr_t)address;
  pthread_mutex_lock(&piece_lock);
  p->next = pieces;
  pieces = p;
  pthread_mutex_unlock(&piece_lock);
  return p->data;
}

static inline int free_piece(void *data) {
  int (*give_back)(unsigned long long, void *);
  *(void **)&give_back = of_driver("cuMemFreeAsync");
  pthread_mutex_lock(&piece_lock);
  struct piece **at = &pieces;
  while (*at && (*at)->data != data) at = &(*at)->next;
  struct piece *found = *at;
  const int good = found && !is_known(found);
  if (good) *at = found->next;
  pthread_mutex_unlock(&piece_lock);
  if (!good) return 0;
  free(found);
  return give_back && give_back((uintptr_t)data, NULL) == 0;
}

/* `comm` knows the piece of `size` from here on. Whether that is a change. */
static inline int know_piece(void *data, size_t size, const void *comm) {
  pthread_mutex_lock(&piece_lock);
  struct piece *p = piece_of(data);
  const int good = p && p->size == size && !knowing(p, comm) && knowing(p, NULL);
  if (good) *knowing(p, NULL) = comm;
  pthread_mutex_unlock(&piece_lock);
  return good;
}

/* `comm` knows it no more. Whether that is a change. */
static inline int forget_piece(void *data, const void *comm) {
  pthread_mutex_lock(&piece_lock);
  struct piece *p = piece_of(data);
  const void **at = p ? knowing(p, comm) : NULL;
  if (at) *at = NULL;
  pthread_mutex_unlock(&piece_lock);
  return at != NULL;
}

/* How many `comm` knows; it forgets them if `forget`. */
static int known_pieces(const void *comm, int forget) {
  int count = 0;
  pthread_mutex_lock(&piece_lock);
  for (struct piece *p = pieces; p; p = p->next) {
    const void **at = knowing(p, comm);
    if (!at) continue;
    count++;
    if (forget) *at = NULL;
  }
  pthread_mutex_unlock(&piece_lock);
  return count;
}

/* Counts a collective of `comm` over `bytes` from `data` on; *offset is where it is in what `comm` knows, or -1. Whether it is
 * well placed. */
static int place_collective(const void *comm, const char *data, size_t bytes, int64_t *offset) {
  int good = 1;
  *offset = -1;
  pthread_mutex_lock(&piece_lock);
  for (struct piece *p = pieces; p; p = p->next) {
    if (data + bytes <= p->data || data >= p->data + p->size) continue;
    good = data >= p->data && data + bytes <= p->data + p->size;
    /* To others than those that know it, it is memory as any. */
    if (knowing(p, comm)) *offset = data - p->data;
  }
  *(*offset < 0 ? &collectives_outside : &collectives_inside) += 1;
  pthread_mutex_unlock(&piece_lock);
  return good;
}
