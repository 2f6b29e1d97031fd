/* Memory of NCCL's own, which it has of the driver, and which of it communicators know. Strict: what is registered is a whole piece of that memory, it is
 * forgotten before it is freed and before its communicator goes, and a collective lies in it as a whole or not at all. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

struct piece {
  char *data;
  size_t size;
  /* Which communicator knows it. */
  const void *comm;
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
  const int good = found && !found->comm;
  if (good) *at = found->next;
  pthread_mutex_unlock(&piece_lock);
  if (!good) return 0;
  free(found);
  return give_back && give_back((uintptr_t)data, NULL) == 0;
}

/* `comm` knows the piece from here on; NULL: nobody does. Whether that is a change. */
static inline int know_piece(void *data, size_t size, const void *comm) {
  pthread_mutex_lock(&piece_lock);
  struct piece *p = piece_of(data);
  const int good = p && (!comm || p->size == size) && !p->comm == !!comm;
  if (good) p->comm = comm;
  pthread_mutex_unlock(&piece_lock);
  return good;
}

/* How many `comm` knows; it forgets them if `forget`. */
static int known_pieces(const void *comm, int forget) {
  int count = 0;
  pthread_mutex_lock(&piece_lock);
  for (struct piece *p = pieces; p; p = p->next) {
    if (p->comm != comm) continue;
    count++;
    if (forget) p->comm = NULL;
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
    if (p->comm == comm) *offset = data - p->data;
  }
  *(*offset < 0 ? &collectives_outside : &collectives_inside) += 1;
  pthread_mutex_unlock(&piece_lock);
  return good;
}
