/* The heap of large blocks: owners, addresses inside of blocks and outside, errors. */
#include "test.h"

#include <string.h>

static fsdp_heap_stats_t stats(void) {
  fsdp_heap_stats_t now = {.struct_size = sizeof now};
  CHECK_OK(fsdp_heap_stats(&now));
  CHECK_EQ(now.struct_size, sizeof now);
  return now;
}

static void counts(void) {
  const size_t bytes = 3 << 20;
  void *blocks[2];
  for (int i = 0; i < 2; i++) CHECK_OK(fsdp_heap_alloc(bytes, &blocks[i]));
  CHECK(stats().live_bytes >= 2 * bytes && stats().live_bytes < 3 * bytes);
  CHECK_EQ(stats().peak_bytes, stats().live_bytes);
  CHECK_EQ(stats().resident_bytes, 8 << 20);
  CHECK_EQ(fsdp_heap_release(blocks[1]), 1);
  CHECK(stats().live_bytes >= bytes && stats().live_bytes < 2 * bytes);
  CHECK(stats().peak_bytes >= 2 * bytes);
  CHECK_EQ(stats().resident_bytes, 8 << 20);
  CHECK_EQ(fsdp_heap_release(blocks[0]), 1);
  fsdp_heap_trim();
  CHECK(stats().live_bytes == 0 && stats().peak_bytes == 0 && stats().resident_bytes == 0);
  fsdp_heap_stats_t small = {.struct_size = 8};
  CHECK_ERR(fsdp_heap_stats(&small), FSDP_ERR_INVALID_ARGUMENT, "fsdp_heap_stats_t.struct_size is 8");
  CHECK_ERR(fsdp_heap_stats(NULL), FSDP_ERR_INVALID_ARGUMENT, "NULL");
}

int main(void) {
  const size_t bytes = 1 << 20;
  CHECK(stats().live_bytes == 0 && stats().peak_bytes == 0 && stats().resident_bytes == 0);
  counts();
  void *block = NULL, *other = NULL;
  CHECK_OK(fsdp_heap_alloc(bytes, &block));
  CHECK((uintptr_t)block % 64 == 0);
  memset(block, 7, bytes);
  /* A second owner, by an address inside. */
  CHECK_EQ(fsdp_heap_retain((char *)block + bytes - 1), 1);
  CHECK_EQ(fsdp_heap_release(block), 1);
  CHECK_OK(fsdp_heap_alloc(bytes, &other));
  memset(other, 8, bytes);
  for (size_t i = 0; i < bytes; i++) CHECK(((char *)block)[i] == 7);
  CHECK_EQ(fsdp_heap_release(block), 1);
  /* It is gone. */
  CHECK_EQ(fsdp_heap_retain(block), 0);
  CHECK_EQ(fsdp_heap_release(block), 0);
  CHECK_EQ(fsdp_heap_release(other), 1);
  /* Its memory goes back, and is zero when it comes again. */
  fsdp_heap_trim();
  CHECK_OK(fsdp_heap_alloc(bytes, &other));
  for (size_t i = 0; i < bytes; i++) CHECK(((char *)other)[i] == 0);
  CHECK_EQ(fsdp_heap_release(other), 1);
  /* Other memory. */
  CHECK_EQ(fsdp_heap_retain(&block), 0);
  CHECK_EQ(fsdp_heap_release(&block), 0);
  CHECK_EQ(fsdp_heap_release(NULL), 0);
  block = &other;
  CHECK_ERR(fsdp_heap_alloc(SIZE_MAX, &block), FSDP_ERR_OUT_OF_MEMORY, "18446744073709551615 bytes");
  CHECK(block == (void *)&other);
  CHECK_ERR(fsdp_heap_alloc(bytes, NULL), FSDP_ERR_INVALID_ARGUMENT, "out_block is NULL");
  CHECK_OK(fsdp_heap_alloc(0, &block));
  CHECK_EQ(fsdp_heap_release(block), 1);
  return 0;
}
