/* Which devices there are, on a machine without CUDA's driver (made so here). */
#include "test.h"

#include <stdlib.h>

int main(void) {
  int32_t count = -7;
  CHECK(setenv("FSDP_CUDA_LIBRARY", "/nonexistent/libcuda.so.1", 1) == 0);
  CHECK_OK(fsdp_device_count(FSDP_DEVICE_CPU, &count));
  CHECK_EQ(count, 1);
  count = -7;
  CHECK_ERR(fsdp_device_count(FSDP_DEVICE_CUDA, &count), FSDP_ERR_UNSUPPORTED,
            "/nonexistent/libcuda.so.1");
  /* The same again. */
  CHECK_ERR(fsdp_device_count(FSDP_DEVICE_CUDA, &count), FSDP_ERR_UNSUPPORTED, "FSDP_CUDA_LIBRARY");
  CHECK_ERR(fsdp_device_count(0, &count), FSDP_ERR_INVALID_ARGUMENT, "device_type cannot be 0");
  CHECK_ERR(fsdp_device_count(INT32_MAX, &count), FSDP_ERR_INVALID_ARGUMENT, "device_type");
  CHECK_EQ(count, -7);
  CHECK_ERR(fsdp_device_count(FSDP_DEVICE_CPU, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out_count is NULL");
  return 0;
}
