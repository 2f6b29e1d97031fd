/* Ranks that are threads of this process and exchange what they really have: each collective is a meeting, in which all show
 * where their data is. A rank that waits longer than half a minute gives up. */
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct meeting {
  char id[160];
  int world, here;
  long number;
  const void *from[16];
  size_t bytes[16];
  struct meeting *next;
};

static struct meeting *meetings;
static pthread_mutex_t meeting_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t all_here = PTHREAD_COND_INITIALIZER;

/* The meeting of this name, for as long as the process lives. */
static struct meeting *find_meeting(const char *id, int world) {
  pthread_mutex_lock(&meeting_lock);
  struct meeting *m = meetings;
  while (m && strcmp(m->id, id) != 0) m = m->next;
  if (!m) {
    m = calloc(1, sizeof *m);
    snprintf(m->id, sizeof m->id, "%s", id);
    m->world = world;
    m->next = meetings;
    meetings = m;
  }
  pthread_mutex_unlock(&meeting_lock);
  return m;
}

/* Returns when all ranks have come, whether with as many bytes. What `from` says stays until all have come again, to leave
 * (`from` NULL). */
static int come(struct meeting *m, int rank, const void *from, size_t bytes) {
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until);
  until.tv_sec += 30;
  pthread_mutex_lock(&meeting_lock);
  const long number = m->number;
  if (from) {
    m->from[rank] = from;
    m->bytes[rank] = bytes;
  }
  int late = 0;
  if (++m->here == m->world) {
    m->here = 0;
    m->number++;
    pthread_cond_broadcast(&all_here);
  }
  while (m->number == number && late != ETIMEDOUT) late = pthread_cond_timedwait(&all_here, &meeting_lock, &until);
  int same = m->number != number;
  /* When they leave, some may have come to the next meeting. */
  for (int r = 0; r < m->world && from; r++) same &= m->bytes[r] == bytes;
  pthread_mutex_unlock(&meeting_lock);
  return same;
}

/* What a rank says when a communicator is split: those of a color are one, in the order of (key, rank). */
struct part {
  int color, key;
};

/* Where `rank` will be among which, when all show their parts. */
static void place_in_part(const struct meeting *m, int rank, int *place, int *world) {
  const struct part *mine = m->from[rank];
  *place = *world = 0;
  for (int r = 0; r < m->world; r++) {
    const struct part *other = m->from[r];
    if (other->color != mine->color) continue;
    *world += 1;
    *place += other->key < mine->key || (other->key == mine->key && r < rank);
  }
}

/* bfloat16 is the upper half of a float32; sums are rounded to nearest, ties to even. */
static float from_bfloat16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

static uint16_t to_bfloat16(float x) {
  uint32_t wide;
  memcpy(&wide, &x, sizeof wide);
  return (uint16_t)((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
}

/* The sum over the ranks, in rank order, of their range `rank` of `count` elements, divided by their number if `mean`.
 * float32 and bfloat16. */
static int mean_of_all(const struct meeting *m, int rank, void *to, size_t count, int dtype, int mean) {
  if (dtype != 7 && dtype != 9) return 0;
  for (size_t i = 0; i < count; i++) {
    const size_t at = (size_t)rank * count + i;
    float sum = 0;
    for (int r = 0; r < m->world; r++) {
      const float x = dtype == 7 ? ((const float *)m->from[r])[at] : from_bfloat16(((const uint16_t *)m->from[r])[at]);
      sum = r == 0 ? x : sum + x;
    }
    if (mean) sum /= (float)m->world;
    if (dtype == 7)
      ((float *)to)[i] = sum;
    else
      ((uint16_t *)to)[i] = to_bfloat16(sum);
  }
  return 1;
}
