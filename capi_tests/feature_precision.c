/* Mixed precision: parameters of several registered types in one unit, computed in float32, float16
 * and bfloat16 by registration, engine, unit and parameter. Masters stay float32. What is unsharded
 * is the masters rounded, what is reduced is the float32 sum, in rank order, of rounded gradients:
 * bitwise, against arithmetic by hand on every element. */
#include "ranks.h"

#include <math.h>

typedef enum { AS_ENGINE, F32, F16, BF16 } type_t;

enum { W, H, F, V, N, E, R, PARAMS };
enum { ROOT, A, B, MODULES };
enum { MAX_NUMEL = 700, STEPS = 3 };

/* Unit A: w, h, f of three types; unit B: v, frozen n, empty e; the root: r. */
static const char *const NAMES[PARAMS] = {"w", "h", "f", "v", "n", "e", "r"};
static const uint32_t OWNERS[PARAMS] = {A, A, A, B, B, B, ROOT};
static const type_t REGISTERED[PARAMS] = {BF16, F16, F32, F32, BF16, BF16, F32};
static const int64_t SHAPES[PARAMS][2] = {{37, 3}, {13, 50}, {7, 1}, {33, 9},
                                          {9, 1},  {0, 4},   {5, 1}};

typedef struct {
  const char *name;
  type_t param, reduce;             /* the engine's */
  type_t unit_param, unit_reduce;   /* those of A */
  type_t override;                  /* that of h */
  type_t computed[PARAMS];
  type_t reduced[MODULES];
} case_t;

static const case_t CASES[] = {
    {"as registered", AS_ENGINE, F32, AS_ENGINE, AS_ENGINE, AS_ENGINE,
     {BF16, F16, F32, F32, BF16, BF16, F32}, {F32, F32, F32}},
    {"all float32", F32, BF16, AS_ENGINE, AS_ENGINE, AS_ENGINE,
     {F32, F32, F32, F32, F32, F32, F32}, {BF16, BF16, BF16}},
    {"all bfloat16", BF16, BF16, AS_ENGINE, AS_ENGINE, AS_ENGINE,
     {BF16, BF16, BF16, BF16, BF16, BF16, BF16}, {BF16, BF16, BF16}},
    {"all float16, reduced in float32", F16, F32, AS_ENGINE, AS_ENGINE, AS_ENGINE,
     {F16, F16, F16, F16, F16, F16, F16}, {F32, F32, F32}},
    {"a unit and a parameter of their own", BF16, F32, F16, F16, F32,
     {F16, F32, F16, BF16, BF16, BF16, BF16}, {F32, F16, F32}},
    {"a unit in float32 around a parameter in bfloat16", F16, BF16, F32, F32, BF16,
     {F32, BF16, F32, F16, F16, F16, F16}, {BF16, F32, BF16}},
};

static fsdp_dtype_t c_dtype(type_t type) {
  static const fsdp_dtype_t dtypes[] = {{0, 0, 0},
                                        {FSDP_DTYPE_FLOAT, 32, 1},
                                        {FSDP_DTYPE_FLOAT, 16, 1},
                                        {FSDP_DTYPE_BFLOAT, 16, 1}};
  return dtypes[type];
}

static int64_t numel(uint32_t p) { return SHAPES[p][0] * SHAPES[p][1]; }

static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* The nearest value of the type, ties to the even one: `mantissa` bits are kept of one in
 * [2^lowest, 2^(highest + 1)), fewer below. */
static float rounded_to(float x, int mantissa, int lowest, int highest) {
  if (isnan(x) || isinf(x) || x == 0) return x;
  int exponent;
  frexp((double)x, &exponent); /* x = f * 2^exponent, f in [0.5, 1) */
  exponent -= 1;
  if (exponent < lowest) exponent = lowest;
  const double quantum = ldexp(1.0, exponent - mantissa);
  const double y = nearbyint((double)x / quantum) * quantum; /* exact but for the rounding */
  if (fabs(y) >= ldexp(1.0, highest + 1)) return x > 0 ? INFINITY : -INFINITY;
  return (float)y;
}

static float rounded(type_t type, float x) {
  if (type == F16) return rounded_to(x, 10, -14, 15);
  if (type == BF16) return rounded_to(x, 7, -126, 127);
  return x;
}

/* The bits of a float that is a value of the type. */
static uint16_t narrow_bits(type_t type, float x) {
  const uint32_t bits = bits_of(x);
  if (type == BF16) return (uint16_t)(bits >> 16);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  const int exponent = (int)(bits >> 23 & 0xff) - 127;
  if (exponent == 128) return (uint16_t)(sign | 0x7c00);
  if (exponent < -14) return (uint16_t)(sign | (uint16_t)fabs(ldexp((double)x, 24)));
  return (uint16_t)(sign | (exponent + 15) << 10 | (bits >> 13 & 0x3ff));
}

/* Values with ties, subnormals, overflow of float16, and what the types do not hold. */
static float initial(uint32_t p, int64_t i) {
  static const float special[] = {1.00390625f, 1.01171875f, 65519.996f, 65520.0f,  1e-7f,
                                  -6.1e-5f,    3.0e-8f,     -0.0f,      INFINITY,  2049.0f,
                                  1e38f,       3.39e38f,    1e-40f,     -2051.0f,  0.1f};
  if (i % 5 == 0) return special[(i / 5 + p) % (sizeof special / sizeof special[0])];
  return (float)((i * 37 + (int64_t)p * 11) % 211 - 105) / 97.0f;
}

/* The gradient that a rank has for an element: in the first of two uses, or the second. */
static float gradient(uint32_t p, int64_t i, int rank, int step, int use) {
  if (i % 7 == 3) return rank == 0 && use == 0 ? 2048.0f : 1.0f; /* lost when summed in 16 bits */
  return (float)((i * 13 + (int64_t)p * 5 + rank * 29 + step * 3 + use * 17) % 101 - 50) / 31.0f;
}

/* Every rank keeps all masters, to compare with. */
typedef struct {
  const case_t *c;
  const job_t *job;
  int narrow; /* the engine has grads_in_param_dtype */
  float masters[PARAMS][MAX_NUMEL];
  float grads[PARAMS][MAX_NUMEL];
} reference_t;

static fsdp_model_t *make_model(reference_t *ref) {
  static float values[PARAMS][MAX_NUMEL];
  static int64_t shapes[PARAMS][2];
  fsdp_model_t *model = NULL;
  uint32_t number = 0;
  CHECK_OK(fsdp_model_create("Net", &model));
  CHECK_OK(fsdp_model_add_module(model, ROOT, "a", "Block", &number));
  CHECK_OK(fsdp_model_add_module(model, ROOT, "b", "Block", &number));
  for (uint32_t p = 0; p < PARAMS; p++) {
    const type_t type = REGISTERED[p];
    uint16_t *halves = (uint16_t *)values[p];
    memcpy(shapes[p], SHAPES[p], sizeof shapes[p]);
    for (int64_t i = 0; i < numel(p); i++) {
      const float value = rounded(type, initial(p, i));
      ref->masters[p][i] = value;
      if (type == F32) {
        values[p][i] = value;
      } else {
        halves[i] = narrow_bits(type, value);
      }
    }
    fsdp_tensor_t t = tensor_f32(values[p], 2, shapes[p]);
    t.dtype = c_dtype(type);
    CHECK_OK(fsdp_model_add_parameter(model, OWNERS[p], NAMES[p], &t, p != N, &number));
    CHECK_EQ(number, p);
  }
  CHECK_OK(fsdp_model_wrap_class(model, "Block"));
  return model;
}

/* What unit `u` unshards is the masters in the type that they are computed in. */
static void check_params(const reference_t *ref, fsdp_engine_t *engine, uint32_t u) {
  for (uint32_t p = 0; p < PARAMS; p++) {
    if (OWNERS[p] != u) continue;
    const type_t type = ref->c->computed[p];
    const fsdp_dtype_t dtype = c_dtype(type);
    fsdp_tensor_t t;
    CHECK_OK(fsdp_engine_param_data(engine, p, &t));
    CHECK(memcmp(&t.dtype, &dtype, sizeof dtype) == 0);
    CHECK_EQ((uintptr_t)t.data % 64, 0);
    for (int64_t i = 0; i < numel(p); i++) {
      const float want = rounded(type, ref->masters[p][i]);
      if (type == F32) {
        CHECK_EQ(bits_of(((const float *)t.data)[i]), bits_of(want));
      } else {
        CHECK_EQ(((const uint16_t *)t.data)[i], narrow_bits(type, want));
      }
    }
  }
}

/* In odd steps each parameter is used once. */
static int uses_of(int step) { return step % 2 == 0 ? 2 : 1; }

/* The type that a gradient which is written once is collected in. */
static type_t collected(const reference_t *ref, uint32_t u) {
  type_t type = AS_ENGINE;
  for (uint32_t p = 0; p < PARAMS; p++) {
    if (OWNERS[p] != u) continue;
    if (type != AS_ENGINE && type != ref->c->computed[p]) return F32;
    type = ref->c->computed[p];
  }
  /* Lent collectives are given gradients as they lie there. */
  return ref->narrow && (!sums_are_narrow() || type == ref->c->reduced[u]) ? type : F32;
}

/* Writes a gradient where it is collected, in the type that it is collected in. */
static void write_gradient(const reference_t *ref, fsdp_engine_t *engine, uint32_t p, int step) {
  const type_t type = collected(ref, OWNERS[p]);
  const fsdp_dtype_t dtype = c_dtype(type);
  fsdp_tensor_t region;
  int32_t accumulate = 1;
  CHECK_OK(fsdp_engine_param_grad(engine, p, &region, &accumulate));
  CHECK(memcmp(&region.dtype, &dtype, sizeof dtype) == 0);
  CHECK_EQ(accumulate, 0);
  for (int64_t i = 0; i < numel(p); i++) {
    const float g = rounded(ref->c->computed[p], gradient(p, i, ref->job->rank, step, 0));
    if (type == F32) {
      ((float *)region.data)[i] = g;
    } else {
      ((uint16_t *)region.data)[i] = narrow_bits(type, g);
    }
  }
}

/* Gives this rank's gradients of unit `u`: the first use in the type it is computed in, the second
 * in float32. */
static void give_gradients(const reference_t *ref, fsdp_engine_t *engine, uint32_t u, int step) {
  static float grad[MAX_NUMEL];
  uint16_t *halves = (uint16_t *)grad;
  for (uint32_t p = 0; p < PARAMS; p++) {
    if (OWNERS[p] != u || p == N) continue;
    if (uses_of(step) == 1) {
      write_gradient(ref, engine, p, step);
      continue;
    }
    for (int use = 0; use < 2; use++) {
      const type_t type = use == 0 ? ref->c->computed[p] : F32;
      int64_t shape[2] = {SHAPES[p][0], SHAPES[p][1]};
      for (int64_t i = 0; i < numel(p); i++) {
        const float g = rounded(type, gradient(p, i, ref->job->rank, step, use));
        if (type == F32) {
          grad[i] = g;
        } else {
          halves[i] = narrow_bits(type, g);
        }
      }
      fsdp_tensor_t t = tensor_f32(grad, 2, shape);
      t.dtype = c_dtype(type);
      CHECK_OK(fsdp_engine_accumulate_grad(engine, p, &t));
    }
    fsdp_tensor_t region;
    int32_t accumulate = 0;
    CHECK_OK(fsdp_engine_param_grad(engine, p, &region, &accumulate));
    CHECK_EQ(region.dtype.bits, 32);
    CHECK_EQ(accumulate, 1);
  }
}

/* The mean by hand. */
static void reduce(reference_t *ref, int step) {
  for (uint32_t p = 0; p < PARAMS; p++) {
    const type_t reduced = ref->c->reduced[OWNERS[p]];
    for (int64_t i = 0; i < numel(p); i++) {
      float sum = 0;
      for (int r = 0; r < ref->job->world; r++) {
        float own = rounded(ref->c->computed[p], gradient(p, i, r, step, 0));
        if (uses_of(step) == 2) own += gradient(p, i, r, step, 1);
        const float term = rounded(reduced, own);
        sum = r == 0 ? term : sum + term;
      }
      if (sums_are_narrow()) sum = rounded(reduced, sum);
      ref->grads[p][i] = sum / (float)ref->job->world;
    }
  }
}

/* Compares this rank's pieces, and steps on them as on all of the masters. */
static void check_and_step(reference_t *ref, fsdp_engine_t *engine) {
  for (uint32_t p = 0; p < PARAMS; p++) {
    fsdp_param_info_t info = param_info_init();
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_param_info(engine, p, &info));
    CHECK_OK(fsdp_engine_shard(engine, p, &shard));
    CHECK_EQ(shard.grad != NULL, p != N);
    for (int64_t k = 0; k < shard.numel; k++) {
      const int64_t i = info.shard_offset + k;
      CHECK_EQ(bits_of(shard.data[k]), bits_of(ref->masters[p][i]));
      if (p == N) continue;
      CHECK_EQ(bits_of(shard.grad[k]), bits_of(ref->grads[p][i]));
      shard.data[k] -= shard.grad[k] * 0.0078125f;
    }
    for (int64_t i = 0; i < numel(p) && p != N; i++) {
      ref->masters[p][i] -= ref->grads[p][i] * 0.0078125f;
    }
  }
  CHECK_OK(fsdp_engine_zero_grad(engine));
}

static void forward(const reference_t *ref, fsdp_engine_t *engine) {
  for (uint32_t u = ROOT; u <= B; u++) {
    CHECK_OK(fsdp_engine_pre_forward(engine, u));
    check_params(ref, engine, u);
    if (u != ROOT) CHECK_OK(fsdp_engine_post_forward(engine, u));
  }
  CHECK_OK(fsdp_engine_post_forward(engine, ROOT));
}

static void train(reference_t *ref, fsdp_engine_t *engine, int step) {
  forward(ref, engine);
  CHECK_OK(fsdp_engine_pre_backward(engine, ROOT));
  for (uint32_t u = B; u >= A; u--) {
    CHECK_OK(fsdp_engine_pre_backward(engine, u));
    check_params(ref, engine, u);
    give_gradients(ref, engine, u, step);
    CHECK_OK(fsdp_engine_post_backward(engine, u));
  }
  give_gradients(ref, engine, ROOT, step);
  CHECK_OK(fsdp_engine_post_backward(engine, ROOT));
  reduce(ref, step);
  check_and_step(ref, engine);
}

/* Bytes that this rank rounds its shards to, and those of all copies. */
static void count_copies(const reference_t *ref, const fsdp_engine_t *engine, uint64_t *own,
                         uint64_t *all) {
  *own = *all = 0;
  for (uint32_t p = 0; p < PARAMS; p++) {
    fsdp_param_info_t info = param_info_init();
    CHECK_OK(fsdp_engine_param_info(engine, p, &info));
    const fsdp_dtype_t want = c_dtype(ref->c->computed[p]);
    CHECK(memcmp(&info.dtype, &want, sizeof want) == 0);
    if (ref->c->computed[p] == F32) continue;
    *own += 2 * (uint64_t)info.shard_numel;
    *all += (2 * (uint64_t)info.numel + 63) / 64 * 64;
  }
}

static void configure(const case_t *c, fsdp_model_t *model, fsdp_engine_config_t *config) {
  const fsdp_engine_config_t defaults = FSDP_ENGINE_CONFIG_INIT;
  *config = defaults;
  config->param_dtype = c_dtype(c->param);
  config->reduce_dtype = c_dtype(c->reduce);
  if (c->unit_param != AS_ENGINE || c->unit_reduce != AS_ENGINE) {
    CHECK_OK(fsdp_model_set_unit_dtypes(model, A, c_dtype(c->unit_param), c_dtype(c->unit_reduce)));
  }
  CHECK_OK(fsdp_model_set_param_dtype(model, H, c_dtype(c->override)));
}

static void run_case(const job_t *job, const case_t *c, int narrow) {
  static reference_t ref;
  uint64_t own = 0, all = 0;
  fsdp_engine_config_t config;
  fsdp_engine_t *engine = NULL;
  ref.c = c;
  ref.job = job;
  ref.narrow = narrow;
  fsdp_model_t *model = make_model(&ref);
  configure(c, model, &config);
  config.grads_in_param_dtype = narrow;
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &engine));
  fsdp_model_destroy(model);
  count_copies(&ref, engine, &own, &all);
  for (uint32_t u = 0; u < MODULES; u++) {
    fsdp_unit_info_t info = unit_info_init();
    const fsdp_dtype_t want = c_dtype(c->reduced[u]);
    CHECK_OK(fsdp_engine_unit_info(engine, u, &info));
    CHECK(memcmp(&info.reduce_dtype, &want, sizeof want) == 0);
  }
  CHECK_EQ(stats_of(engine).compute_buffer_bytes, all);
  for (int step = 0; step < STEPS; step++) {
    train(&ref, engine, step);
    CHECK_EQ(stats_of(engine).all_gather_bytes_moved, (uint64_t)(step + 1) * own);
  }
  /* Nothing is written between forwards without gradients: the first alone rounds. */
  CHECK_OK(fsdp_engine_set_grad_enabled(engine, 0));
  for (int i = 0; i < 3; i++) {
    forward(&ref, engine);
    CHECK_EQ(stats_of(engine).all_gather_bytes_moved, (STEPS + 1) * own);
  }
  /* What a host writes by itself is rounded by the next one. */
  CHECK_OK(fsdp_engine_begin_write(engine));
  for (uint32_t p = 0; p < PARAMS; p++) {
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_shard(engine, p, &shard));
    for (int64_t k = 0; k < shard.numel; k++) shard.data[k] *= 0.3f;
    for (int64_t i = 0; i < numel(p); i++) ref.masters[p][i] *= 0.3f;
  }
  forward(&ref, engine);
  CHECK_EQ(stats_of(engine).all_gather_bytes_moved, (STEPS + 2) * own);

  /* The model becomes a part of another one: types and copies stay. */
  fsdp_model_t *outer = NULL;
  fsdp_engine_t *adopter = NULL;
  uint32_t module = 0, param = 0;
  CHECK_OK(fsdp_model_create("Outer", &outer));
  CHECK_OK(fsdp_model_add_sharded(outer, 0, "inner", engine, &module, &param));
  const type_t other = c->computed[W] == F32 ? BF16 : F32;
  CHECK_ERR(fsdp_model_set_param_dtype(outer, param + W, c_dtype(other)), FSDP_ERR_INVALID_STATE,
            "\"inner.a.w\" is sharded already");
  CHECK_OK(fsdp_model_set_param_dtype(outer, param + W, c_dtype(c->computed[W])));
  fsdp_engine_config_t outer_config = FSDP_ENGINE_CONFIG_INIT;
  outer_config.param_dtype = c_dtype(other);
  outer_config.reduce_dtype = c_dtype(c->reduce);
  CHECK_OK(fsdp_engine_create(outer, job->comm, &outer_config, &adopter));
  fsdp_model_destroy(outer);
  CHECK_EQ(stats_of(adopter).compute_buffer_bytes, all);
  for (uint32_t p = 0; p < PARAMS; p++) {
    fsdp_param_info_t info = param_info_init();
    CHECK_OK(fsdp_engine_param_info(adopter, param + p, &info));
    const fsdp_dtype_t want = c_dtype(c->computed[p]);
    CHECK(memcmp(&info.dtype, &want, sizeof want) == 0);
  }
  for (uint32_t u = 0; u < MODULES; u++) {
    uint32_t unit = 0;
    fsdp_unit_info_t info = unit_info_init();
    const fsdp_dtype_t want = c_dtype(c->reduced[u]);
    CHECK_OK(fsdp_engine_unit_of_module(adopter, module + u, &unit));
    CHECK_OK(fsdp_engine_unit_info(adopter, unit, &info));
    CHECK(memcmp(&info.reduce_dtype, &want, sizeof want) == 0);
  }
  void *buffer = NULL;
  CHECK_OK(fsdp_engine_begin_write(adopter));
  for (uint32_t u = 0; u <= MODULES; u++) CHECK_OK(fsdp_engine_unshard(adopter, u, &buffer));
  CHECK_EQ(param, 0); /* as check_params counts */
  for (uint32_t u = 0; u < MODULES; u++) check_params(&ref, adopter, u);
  CHECK_EQ(stats_of(adopter).all_gather_bytes_moved, own);
  CHECK_OK(fsdp_engine_finish_forward(adopter));
  fsdp_engine_destroy(adopter);
  fsdp_engine_destroy(engine);
}

/* A NaN master is a NaN, and what is summed in 16 bits would lose is kept. */
static void sums_and_nans(const job_t *job, type_t type, float big) {
  float value = from_bits(0x7f800001), grad = 0; /* rounding its bits alone would give infinity */
  int64_t one = 1;
  uint32_t param = 0;
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  config.param_dtype = config.reduce_dtype = c_dtype(type);
  CHECK_OK(fsdp_model_create("Net", &model));
  fsdp_tensor_t t = tensor_f32(&value, 1, &one);
  CHECK_OK(fsdp_model_add_parameter(model, 0, "x", &t, 1, &param));
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &engine));
  fsdp_model_destroy(model);
  CHECK_OK(fsdp_engine_pre_forward(engine, 0));
  CHECK_OK(fsdp_engine_param_data(engine, 0, &t));
  const uint16_t bits = *(const uint16_t *)t.data, infinity = narrow_bits(type, INFINITY);
  CHECK((bits & infinity) == infinity && (bits & 0x7fff) > infinity);
  CHECK_OK(fsdp_engine_post_forward(engine, 0));
  CHECK_OK(fsdp_engine_pre_backward(engine, 0));
  grad = job->rank == 0 ? big : 1.0f;
  CHECK(rounded(type, big + 1) == big);
  t = tensor_f32(&grad, 1, &one);
  CHECK_OK(fsdp_engine_accumulate_grad(engine, 0, &t));
  CHECK_OK(fsdp_engine_post_backward(engine, 0));
  fsdp_shard_t shard;
  CHECK_OK(fsdp_engine_shard(engine, 0, &shard));
  if (shard.numel == 1) {
    const float mean = (big + (float)(job->world - 1)) / (float)job->world;
    CHECK(sums_are_narrow() || shard.grad[0] == mean);
  }
  fsdp_engine_destroy(engine);
}

/* An initializer writes the registered type. */
static int32_t fill(const fsdp_module_init_t *init, void *user_data) {
  const int64_t missing = *(const int64_t *)user_data;
  CHECK_EQ(init->param_count, 2);
  CHECK(init->tensors[0].dtype.code == FSDP_DTYPE_BFLOAT && init->tensors[0].dtype.bits == 16);
  CHECK(init->tensors[1].dtype.code == FSDP_DTYPE_FLOAT && init->tensors[1].dtype.bits == 16);
  for (int64_t p = 0; p < 2; p++) {
    uint16_t *data = (uint16_t *)init->tensors[p].data;
    CHECK_EQ((uintptr_t)data % 64, 0);
    for (int64_t i = 0; i < 101; i++) {
      if (i != missing) data[i] = narrow_bits(p == 0 ? BF16 : F16, (float)i - 50);
    }
  }
  return 0;
}

static void without_storage(const job_t *job) {
  int64_t shape = 101, missing = 100;
  uint32_t param = 0;
  fsdp_model_t *model = NULL;
  fsdp_engine_t *engine = NULL;
  CHECK_OK(fsdp_model_create("Net", &model));
  fsdp_tensor_t t = tensor_of(NULL, 1, &shape, FSDP_DTYPE_BFLOAT, 16);
  CHECK_OK(fsdp_model_add_parameter(model, 0, "x", &t, 1, &param));
  t = tensor_of(NULL, 1, &shape, FSDP_DTYPE_FLOAT, 16);
  CHECK_OK(fsdp_model_add_parameter(model, 0, "y", &t, 1, &param));
  CHECK_OK(fsdp_model_set_reset(model, 0, fill, &missing));
  CHECK_ERR(fsdp_engine_create(model, job->comm, NULL, &engine), FSDP_ERR_INVALID_STATE,
            "\"x\" was left uninitialized by the reset function of module \"(root)\" (Net) "
            "(element 100)");
  missing = -1;
  CHECK_OK(fsdp_engine_create(model, job->comm, NULL, &engine));
  CHECK_EQ(stats_of(engine).materialized_peak_bytes, 2 * 2 * 101);
  for (uint32_t p = 0; p < 2; p++) {
    fsdp_param_info_t info = param_info_init();
    fsdp_shard_t shard;
    CHECK_OK(fsdp_engine_param_info(engine, p, &info));
    CHECK_OK(fsdp_engine_shard(engine, p, &shard));
    for (int64_t k = 0; k < shard.numel; k++) {
      CHECK(shard.data[k] == (float)(info.shard_offset + k) - 50);
    }
  }
  fsdp_engine_destroy(engine);
  fsdp_model_destroy(model);
}

static void what_is_refused(const job_t *job) {
  static reference_t ref;
  const fsdp_dtype_t none = {0, 0, 0}, f64 = {FSDP_DTYPE_FLOAT, 64, 1}, odd = {9, 16, 1};
  const fsdp_dtype_t bf16 = c_dtype(BF16);
  fsdp_engine_t *engine = NULL;
  fsdp_engine_config_t config = FSDP_ENGINE_CONFIG_INIT;
  fsdp_model_t *model = make_model(&ref);
  CHECK_ERR(fsdp_model_set_param_dtype(model, W, f64), FSDP_ERR_UNSUPPORTED,
            "\"a.w\" cannot be computed in float64");
  CHECK_ERR(fsdp_model_set_param_dtype(model, W, odd), FSDP_ERR_UNSUPPORTED, "code 9");
  CHECK_ERR(fsdp_model_set_param_dtype(model, PARAMS, bf16), FSDP_ERR_INVALID_ARGUMENT,
            "parameter 7");
  CHECK_ERR(fsdp_model_set_unit_dtypes(model, A, f64, none), FSDP_ERR_UNSUPPORTED,
            "\"a\" cannot be computed in float64");
  CHECK_ERR(fsdp_model_set_unit_dtypes(model, A, none, f64), FSDP_ERR_UNSUPPORTED,
            "\"a\" cannot be reduced in float64");
  CHECK_ERR(fsdp_model_set_unit_dtypes(model, 9, bf16, none), FSDP_ERR_INVALID_ARGUMENT,
            "module 9");
  CHECK_ERR(fsdp_model_set_unit_dtypes(NULL, A, bf16, none), FSDP_ERR_INVALID_ARGUMENT, "model");
  CHECK_ERR(fsdp_model_set_param_dtype(NULL, W, bf16), FSDP_ERR_INVALID_ARGUMENT, "model");
  config.param_dtype = f64;
  CHECK_ERR(fsdp_engine_create(model, job->comm, &config, &engine), FSDP_ERR_UNSUPPORTED,
            "computed in float64");
  config.param_dtype = none;

  uint32_t leaf = 0;
  CHECK_OK(fsdp_model_add_module(model, B, "leaf", "Leaf", &leaf));
  CHECK_OK(fsdp_model_set_unit_dtypes(model, leaf, bf16, none));
  CHECK_ERR(fsdp_engine_create(model, job->comm, &config, &engine), FSDP_ERR_INVALID_ARGUMENT,
            "\"b.leaf\" was given types of its own");
  CHECK_OK(fsdp_model_wrap_module(model, leaf));

  /* A gradient of a third type. */
  CHECK_OK(fsdp_engine_create(model, job->comm, &config, &engine));
  CHECK_OK(fsdp_engine_pre_forward(engine, 1));
  static float zeros[MAX_NUMEL];
  int64_t shape[2] = {SHAPES[W][0], SHAPES[W][1]};
  fsdp_tensor_t t = tensor_of(zeros, 2, shape, FSDP_DTYPE_FLOAT, 16);
  CHECK_ERR(fsdp_engine_accumulate_grad(engine, W, &t), FSDP_ERR_INVALID_ARGUMENT,
            "the gradient of \"a.w\" is float16 of shape [37, 3], the parameter is bfloat16");
  CHECK_OK(fsdp_engine_finish_forward(engine));
  fsdp_engine_destroy(engine);

  /* Ranks that disagree. */
  if (job->world > 1) {
    const int other = job->rank == job->world - 1;
    CHECK_OK(fsdp_model_set_param_dtype(model, W, other ? c_dtype(F16) : none));
    CHECK_ERR(fsdp_engine_create(model, job->comm, NULL, &engine), FSDP_ERR_MISMATCH,
              "bfloat16 computed in float16");
    CHECK_OK(fsdp_model_set_param_dtype(model, W, none));
    CHECK_OK(fsdp_model_set_unit_dtypes(model, A, none, other ? bf16 : none));
    CHECK_ERR(fsdp_engine_create(model, job->comm, NULL, &engine), FSDP_ERR_MISMATCH,
              "reduced in bfloat16");
    CHECK_OK(fsdp_model_set_unit_dtypes(model, A, none, none));
    config.param_dtype = other ? bf16 : none;
    CHECK_ERR(fsdp_engine_create(model, job->comm, &config, &engine), FSDP_ERR_MISMATCH,
              "param_dtype = bfloat16");
    config.param_dtype = none;
    config.grads_in_param_dtype = other;
    CHECK_ERR(fsdp_engine_create(model, job->comm, &config, &engine), FSDP_ERR_MISMATCH,
              "grads_in_param_dtype");
  }
  fsdp_model_destroy(model);
}

int main(void) {
  const job_t job = join_job();
  for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
    test_context(CASES[i].name);
    run_case(&job, &CASES[i], 0);
    run_case(&job, &CASES[i], 1);
  }
  test_context("sums and NaNs");
  sums_and_nans(&job, BF16, 256);
  sums_and_nans(&job, F16, 2048);
  test_context("without storage");
  without_storage(&job);
  test_context("what is refused");
  what_is_refused(&job);
  CHECK_OK(fsdp_comm_barrier(job.comm));
  fsdp_comm_destroy(job.comm);
  return 0;
}
