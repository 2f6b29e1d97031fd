/* What every C scenario program shares: PyTorch's numbers (scripts/make_scenario_data.py says what
 * is in the files), and comparing with them. */
#ifndef FSDP_TEST_SCENARIO_H
#define FSDP_TEST_SCENARIO_H

#include "test.h"

#include "safetensors_file.h"
#include "scenario_break.h"

#include <math.h>

#ifndef FSDP_SCENARIO_DATA
#error "FSDP_SCENARIO_DATA is the folder of the data; link the CMake target fsdp_scenario_data"
#endif

/* The data of a scenario at a world size; 0 for a file that is the same for all. Ends the program
 * if there is none. The caller owns it: safetensors_close. */
static inline safetensors_t *scenario_open(const char *scenario, int world) {
  char path[512], suffix[16] = "";
  if (world != 0) snprintf(suffix, sizeof suffix, "_w%d", world);
  snprintf(path, sizeof path, "%s/%s%s.safetensors", FSDP_SCENARIO_DATA, scenario, suffix);
  safetensors_t *file = safetensors_open(path);
  if (file == NULL) test_fail(__FILE__, __LINE__, "%s", safetensors_error());
  return file;
}

/* A float32 tensor of `ndim` sizes (others 0); ends the program if it is missing or has another
 * shape. */
static inline const float *scenario_f32(const safetensors_t *file, const char *name, int32_t ndim,
                                        int64_t d0, int64_t d1, int64_t d2, int64_t d3) {
  const int64_t shape[4] = {d0, d1, d2, d3};
  const float *data = safetensors_f32(file, name, ndim, shape);
  if (data == NULL) test_fail(__FILE__, __LINE__, "%s", safetensors_error());
  return data;
}

/* The value at a JSON pointer of the file's metadata; ends the program if there is none. */
static inline const char *scenario_about(const safetensors_t *file, const char *pointer) {
  const char *text = safetensors_about(file, pointer);
  if (text == NULL) test_fail(__FILE__, __LINE__, "%s", safetensors_error());
  return text;
}

/* Every element differs by at most `tolerance` times the largest magnitude of `want`. */
static inline void check_close(const float *got, const float *want, int64_t n, double tolerance,
                               const char *what) {
  double largest = 0;
  for (int64_t i = 0; i < n; i++) largest = fmax(largest, fabs((double)want[i]));
  for (int64_t i = 0; i < n; i++) {
    /* So written that NaN fails. */
    if (!(fabs((double)got[i] - (double)want[i]) <= tolerance * largest)) {
      test_fail(__FILE__, __LINE__, "%s, element %lld: %.9g, not %.9g (tolerance %g of %g)", what,
                (long long)i, (double)got[i], (double)want[i], tolerance, largest);
    }
  }
}

/* The same bits. */
static inline void check_bits(const float *got, const float *want, int64_t n, const char *what) {
  for (int64_t i = 0; i < n; i++) {
    if (memcmp(&got[i], &want[i], sizeof got[i]) != 0) {
      test_fail(__FILE__, __LINE__, "%s, element %lld: %.9g, not bitwise %.9g", what, (long long)i,
                (double)got[i], (double)want[i]);
    }
  }
}

#endif
