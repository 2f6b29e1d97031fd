/* The heap of large blocks: owners, addresses inside of blocks and outside, errors. */
#include "test.h"

#include <string.h>

int main(void) {
  const size_t bytes = 1 << 20;
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
