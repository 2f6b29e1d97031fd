/* Ranks that are threads of one process, and the collectives that they lend:
 * fsdp_host_collectives_t on memory that all of them see. Requests or blocking; with messages or
 * without. Sums are float32 (16-bit types and integers as well as floats), in rank order. */
#ifndef FSDP_TEST_HUB_H
#define FSDP_TEST_HUB_H

#include "test.h"

enum { HUB_RANKS = 8 };

/* What the ranks of a job lend. */
typedef struct {
  /* Collectives block, instead of being tested. */
  int blocking;
  /* `wait` sleeps. */
  int waits;
  /* Without post and poll. */
  int no_messages;
  /* alloc and free. */
  int allocates;
  /* Without split. */
  int no_split;
} hub_kind_t;

typedef struct hub hub_t;

/* One rank: what its thread gets. */
typedef struct {
  hub_t *hub;
  int32_t rank, world;
  fsdp_comm_t *comm;
  /* Callbacks of the given name (collectives, test, poll, alloc, split) fail on this rank from now
   * on with this code; 0: none. */
  const char *failing;
  int32_t code;
  int64_t timeout_ms;
} hub_rank_t;

/* Fills in the table of the hub's kind. */
fsdp_host_collectives_t hub_table(const hub_t *hub);

/* What to give to fsdp_comm_init_host beside it. */
void *hub_user_data(hub_rank_t *rank);

/* Runs `body` as ranks 0 to world - 1, each with a communicator of its own (destroyed afterwards),
 * and returns when all have ended. Checks that everything that was lent was given back, unless the
 * job fails by intention. */
void hub_run(int world, hub_kind_t kind, int64_t timeout_ms, int fails,
             void (*body)(hub_rank_t *rank));

#endif
