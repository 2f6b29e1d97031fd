// Parts of norms, in float64, as src/norm.rs defines them: sums of powers, counts, largest and smallest magnitudes.
//
// The order of additions depends on a piece's length and on nothing else: `flag` says how many blocks share it, at most
// THREADS.

enum Order { LARGEST, SMALLEST, COUNT, ONE, TWO, POWER };

__device__ inline double max_nan(double a, double b) { return a != a || a > b ? a : b; }

template <int ORDER>
__device__ inline double join(double a, double b) {
  return ORDER == LARGEST || ORDER == SMALLEST ? max_nan(a, b) : a + b;
}

template <int ORDER>
__device__ inline double add(double a, double x, double power) {
  switch (ORDER) {
    case LARGEST: return max_nan(a, fabs(x));
    case SMALLEST: return max_nan(a, -fabs(x));
    case COUNT: return a + (x != 0);
    case ONE: return a + fabs(x);
    case TWO: return a + x * x;
    default: return a + pow(fabs(x), power);
  }
}

// The combination of all threads' values, for thread 0.
template <int ORDER>
__device__ inline double block_join(double value) {
  __shared__ double values[THREADS];
  values[threadIdx.x] = value;
  __syncthreads();
  for (u32 half = THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) values[threadIdx.x] = join<ORDER>(values[threadIdx.x], values[threadIdx.x + half]);
    __syncthreads();
  }
  return values[0];
}

template <int ORDER>
__device__ inline double first() {
  return ORDER == SMALLEST ? -__longlong_as_double(0x7ff0000000000000ll) : 0;
}

template <int ORDER>
__device__ inline void norm_parts(const Piece p, double power, double *parts) {
  const float *from = (const float *)p.from;
  double part = first<ORDER>();
  walk_over(
      p.flag, p.len, aligned(from),
      [&](u64 i) {
        float x[8];
        load8(from + i, x);
        for (int k = 0; k < 8; k++) part = add<ORDER>(part, x[k], power);
      },
      [&](u64 i) { part = add<ORDER>(part, from[i], power); });
  part = block_join<ORDER>(part);
  if (threadIdx.x == 0) parts[(u64)blockIdx.y * THREADS + blockIdx.x] = part;
}

// The part of each block: `parts` has room for THREADS of each piece.
KERNEL fsdp_norm_parts(PARAM Pieces pieces, int order, double power, double *parts) {
  const Piece p = pieces.piece[blockIdx.y];
  if (blockIdx.x >= p.flag) return;
  switch (order) {
    case LARGEST: return norm_parts<LARGEST>(p, power, parts);
    case SMALLEST: return norm_parts<SMALLEST>(p, power, parts);
    case COUNT: return norm_parts<COUNT>(p, power, parts);
    case ONE: return norm_parts<ONE>(p, power, parts);
    case TWO: return norm_parts<TWO>(p, power, parts);
    default: return norm_parts<POWER>(p, power, parts);
  }
}

// out[piece] = the combination of its blocks' parts.
KERNEL fsdp_norm_join(PARAM Pieces pieces, int order, const double *parts, double *out) {
  const bool there = threadIdx.x < pieces.piece[blockIdx.y].flag;
  double part = order == SMALLEST ? first<SMALLEST>() : 0;
  if (there) part = parts[(u64)blockIdx.y * THREADS + threadIdx.x];
  const bool largest = order == LARGEST || order == SMALLEST;
  const double joined = largest ? block_join<LARGEST>(part) : block_join<TWO>(part);
  if (threadIdx.x == 0) out[blockIdx.y] = joined;
}
