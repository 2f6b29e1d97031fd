/* What fsdp_mpi.c computes itself: 16-bit types, against arithmetic on doubles, and types for more
 * bytes than an int counts. */
#include "../src/fsdp_mpi.c"

#include <math.h>

#include "test.h"

/* The nearest value with `mantissa` bits, ties to the even one, as of a type whose exponents are
 * lowest to highest. */
static float nearest(float x, int mantissa, int lowest, int highest) {
  int exponent;
  if (isnan(x) || isinf(x) || x == 0) return x;
  frexp((double)x, &exponent);
  exponent -= 1;
  if (exponent < lowest) exponent = lowest;
  const double quantum = ldexp(1.0, exponent - mantissa);
  const double y = nearbyint((double)x / quantum) * quantum;
  if (fabs(y) >= ldexp(1.0, highest + 1)) return x > 0 ? INFINITY : -INFINITY;
  return (float)y;
}

static void check(float x) {
  const float f16 = nearest(x, 10, -14, 15), bf16 = nearest(x, 7, -126, 127);
  if (isnan(x)) {
    CHECK(isnan(from_f16(to_f16(x))) && isnan(from_bf16(to_bf16(x))));
    return;
  }
  if (as_bits(from_f16(to_f16(x))) != as_bits(f16))
    test_fail(__FILE__, __LINE__, "%a is %a in float16, not %a", (double)x,
              (double)from_f16(to_f16(x)), (double)f16);
  if (as_bits(from_bf16(to_bf16(x))) != as_bits(bf16))
    test_fail(__FILE__, __LINE__, "%a is %a in bfloat16, not %a", (double)x,
              (double)from_bf16(to_bf16(x)), (double)bf16);
}

static void conversions(void) {
  uint32_t state = 1;
  for (uint32_t v = 0; v < 65536; v++) {
    const float f16 = from_f16((uint16_t)v), bf16 = from_bf16((uint16_t)v);
    check(f16);
    check(bf16);
    if (!isnan(f16)) CHECK_EQ(to_f16(f16), v);
    if (!isnan(bf16)) CHECK_EQ(to_bf16(bf16), v);
    /* Between this value and the next: the tie, and beside it. */
    if (isfinite(f16) && (v & 0x7fff) < 0x7bff) {
      const float tie = (f16 + from_f16((uint16_t)(v + 1))) / 2;
      check(tie);
      check(nextafterf(tie, 1e30f));
      check(nextafterf(tie, -1e30f));
    }
  }
  for (int i = 0; i < 2000000; i++) {
    state = state * 1664525u + 1013904223u;
    check(as_float(state ^ state >> 13));
  }
}

static void operations(void) {
  uint16_t a[3] = {to_bf16(256), to_bf16(3), to_bf16(-1)},
           b[3] = {to_bf16(1), to_bf16(5), to_bf16(NAN)};
  int three = 3;
  MPI_Datatype type = MPI_UINT16_T;
  bf16_sum(a, b, &three, &type);
  CHECK(from_bf16(b[0]) == 256 && from_bf16(b[1]) == 8 && isnan(from_bf16(b[2])));
  bf16_max(a, b, &three, &type);
  CHECK(from_bf16(b[1]) == 8 && isnan(from_bf16(b[2])));
  uint16_t c[2] = {to_f16(2048), to_f16(-3)}, d[2] = {to_f16(3), to_f16(2)};
  int two = 2;
  f16_sum(c, d, &two, &type);
  CHECK(from_f16(d[0]) == 2052 && from_f16(d[1]) == -1);
  f16_min(c, d, &two, &type);
  CHECK(from_f16(d[0]) == 2048 && from_f16(d[1]) == -3);
}

static void large_types(void) {
  const size_t sizes[] = {
      0, 1, INT_MAX, (size_t)INT_MAX + 1, (size_t)5 << 30, ((size_t)7 << 32) + 13};
  for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
    int count = 0;
    MPI_Datatype type;
    MPI_Count size = 0, first = 0, extent = 0;
    CHECK_EQ(bytes_type(sizes[i], &count, &type), 0);
    CHECK_EQ(MPI_Type_size_x(type, &size), MPI_SUCCESS);
    CHECK_EQ((size_t)size * (size_t)count, sizes[i]);
    CHECK_EQ(MPI_Type_get_extent_x(type, &first, &extent), MPI_SUCCESS);
    CHECK_EQ((size_t)extent * (size_t)count, sizes[i]); /* ranks' parts lie end to end */
    if (type != MPI_BYTE) CHECK_EQ(MPI_Type_free(&type), MPI_SUCCESS);
  }
}

/* What is refused before any rank is waited for. */
static void refusals(void) {
  fsdp_mpi_config_t config = FSDP_MPI_CONFIG_INIT;
  fsdp_comm_t *comm = NULL;
  CHECK_ERR(fsdp_comm_init_mpi(MPI_COMM_NULL, NULL, &comm), FSDP_ERR_CALLBACK, "MPI_COMM_NULL");
  config.struct_size = 1;
  CHECK_ERR(fsdp_comm_init_mpi(MPI_COMM_WORLD, &config, &comm), FSDP_ERR_CALLBACK,
            "struct_size is 1");
  CHECK_ERR(fsdp_comm_init_mpi(MPI_COMM_WORLD, NULL, NULL), FSDP_ERR_INVALID_ARGUMENT,
            "out is NULL");
  CHECK_OK(fsdp_comm_init_mpi(MPI_COMM_WORLD, NULL, &comm));
  context_t *c = (context_t *)calloc(1, sizeof *c);
  const fsdp_dtype_t f32 = {FSDP_DTYPE_FLOAT, 32, 1}, f8 = {FSDP_DTYPE_FLOAT, 8, 1};
  void *request = NULL;
  char text[256];
  CHECK(c != NULL);
  c->lanes[FSDP_HOST_LANE_REDUCE] = MPI_COMM_WORLD;
  CHECK_EQ(reduce_scatter(c, FSDP_HOST_LANE_REDUCE, NULL, NULL, (size_t)INT_MAX + 1, f32,
                          FSDP_REDUCE_SUM, &request),
           TOO_LARGE);
  describe_error(c, TOO_LARGE, text, sizeof text);
  CHECK(strstr(text, "make smaller units") != NULL);
  CHECK_EQ(reduce_scatter(c, FSDP_HOST_LANE_REDUCE, NULL, NULL, 1, f8, FSDP_REDUCE_SUM, &request),
           NO_TYPE);
  free(c);
  fsdp_comm_destroy(comm);
}

int main(void) {
  fsdp_comm_t *comm = NULL;
  CHECK_ERR(fsdp_comm_init_mpi(MPI_COMM_WORLD, NULL, &comm), FSDP_ERR_CALLBACK,
            "MPI is not initialized");
  conversions();
  operations();
  CHECK_EQ(MPI_Init(NULL, NULL), MPI_SUCCESS);
  large_types();
  refusals();
  MPI_Finalize();
  CHECK_ERR(fsdp_comm_init_mpi(MPI_COMM_WORLD, NULL, &comm), FSDP_ERR_CALLBACK, "MPI is finalized");
  return 0;
}
