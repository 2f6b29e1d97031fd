// What the kernels are made of: tables of pieces, 16-byte accesses with a scalar rest, 16-bit floats.
//
// NVRTC compiles this file and the others as one program, without any header; the tests compile the same text for the
// CPU behind a header that defines CUDA's words. Every float operation is rounded to nearest and none is contracted
// (--fmad=false), so that results are those of the engine's code for the CPU.
//
// A launch is over (blocks, pieces): blockIdx.y is the piece, the blocks of blockIdx.x share its elements.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 256
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define PARAM const __grid_constant__

// A range of elements. What `flag` says is the kernel's matter.
struct Piece {
  const void *from;
  void *to;
  u64 len;
  u64 flag;
};

struct Pieces {
  Piece piece[64];
};

struct Bf16 {
  u16 bits;
};

struct F16 {
  u16 bits;
};

#ifdef __CUDACC_RTC__
__device__ inline float half_to_float(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

__device__ inline u16 float_to_half(float x) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(Bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ inline float widen(F16 x) { return half_to_float(x.bits); }

__device__ inline void narrow(float x, float &to) { to = x; }
__device__ inline void narrow(float x, F16 &to) { to.bits = float_to_half(x); }
// To nearest, ties to even; a NaN stays one.
__device__ inline void narrow(float x, Bf16 &to) {
  const u32 bits = __float_as_uint(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = (u16)(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Eight elements at an address of a multiple of 16 bytes, as floats: two accesses of 16 bytes, or one.
union Sixteen {
  uint4 raw;
  float f[4];
  u16 h[8];
};

__device__ inline void load8(const float *from, float *x) {
  for (int half = 0; half < 2; half++) {
    Sixteen s;
    s.raw = ((const uint4 *)from)[half];
    for (int i = 0; i < 4; i++) x[4 * half + i] = s.f[i];
  }
}

__device__ inline void store8(float *to, const float *x) {
  for (int half = 0; half < 2; half++) {
    Sixteen s;
    for (int i = 0; i < 4; i++) s.f[i] = x[4 * half + i];
    ((uint4 *)to)[half] = s.raw;
  }
}

template <class T>
__device__ inline void load8(const T *from, float *x) {
  Sixteen s;
  s.raw = *(const uint4 *)from;
  for (int i = 0; i < 8; i++) {
    T t;
    t.bits = s.h[i];
    x[i] = widen(t);
  }
}

template <class T>
__device__ inline void store8(T *to, const float *x) {
  Sixteen s;
  for (int i = 0; i < 8; i++) {
    T t;
    narrow(x[i], t);
    s.h[i] = t.bits;
  }
  *(uint4 *)to = s.raw;
}

__device__ inline bool aligned(const void *a) { return ((u64)a & 15) == 0; }
__device__ inline bool aligned(const void *a, const void *b) { return aligned(a) && aligned(b); }

// Calls `eight(i)` for groups of eight elements from i on, if `vector`, and `one(i)` for the rest, over `blocks`
// blocks.
template <class Eight, class One>
__device__ inline void walk_over(u64 blocks, u64 len, bool vector, Eight eight, One one) {
  const u64 thread = (u64)blockIdx.x * THREADS + threadIdx.x;
  const u64 threads = blocks * THREADS;
  const u64 groups = vector ? len / 8 : 0;
  for (u64 g = thread; g < groups; g += threads) eight(8 * g);
  for (u64 i = 8 * groups + thread; i < len; i += threads) one(i);
}

// Over all blocks of a piece.
template <class Eight, class One>
__device__ inline void walk(u64 len, bool vector, Eight eight, One one) {
  walk_over(gridDim.x, len, vector, eight, one);
}
