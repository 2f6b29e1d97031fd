/* Reads a safetensors file for a test: the tensors of capi_tests/scenario_data and what its
 * metadata says. For C and for C++; the file is read into memory once. Single thread.
 *
 * A function that fails returns NULL (or -1) and says why in safetensors_error(), naming the file
 * and the tensor.
 */
#ifndef FSDP_TEST_SAFETENSORS_FILE_H
#define FSDP_TEST_SAFETENSORS_FILE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct safetensors safetensors_t;

typedef struct {
  const char *dtype; /* as in the file: "F32", "I64", ... */
  int32_t ndim;
  const int64_t *shape;
  const void *data; /* contiguous, little-endian; suitably aligned for its type */
  int64_t numel;
} safetensors_tensor_t;

/* Opens and checks the file. The caller owns the result: safetensors_close. Everything that is got
 * from it is borrowed until then. */
safetensors_t *safetensors_open(const char *path);
void safetensors_close(safetensors_t *file);

/* Number of tensors, and the name of one, in alphabetical order. */
size_t safetensors_count(const safetensors_t *file);
const char *safetensors_name(const safetensors_t *file, size_t index);

/* A tensor, whatever its type and shape. 0, or -1. */
int safetensors_tensor(const safetensors_t *file, const char *name, safetensors_tensor_t *out);

/* The elements of a tensor that must be float32 and of this shape. */
const float *safetensors_f32(const safetensors_t *file, const char *name, int32_t ndim,
                             const int64_t *shape);

/* The metadata "about" is JSON: the value at an RFC 6901 pointer, e.g. "/texts/error". A string as
 * it is, any other value as compact JSON. */
const char *safetensors_about(const safetensors_t *file, const char *pointer);

/* Why the last call failed. */
const char *safetensors_error(void);

#ifdef __cplusplus
}
#endif

#endif
