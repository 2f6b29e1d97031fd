// Gradients: into the unit's float32 slot, zeros, and the search for what is not finite.

// Writes `from` to the floats at `to`, or adds it to them where `flag` is not 0.
template <class T>
__device__ inline void copy_in(const Piece p) {
  const T *from = (const T *)p.from;
  float *to = (float *)p.to;
  const bool add = p.flag != 0;
  walk(
      p.len, aligned(from, to),
      [=](u64 i) {
        float x[8];
        load8(from + i, x);
        if (add) {
          float sum[8];
          load8(to + i, sum);
          for (int k = 0; k < 8; k++) x[k] = sum[k] + x[k];
        }
        store8(to + i, x);
      },
      [=](u64 i) { to[i] = add ? to[i] + widen(from[i]) : widen(from[i]); });
}

KERNEL fsdp_copy_in_f32(PARAM Pieces pieces) { copy_in<float>(pieces.piece[blockIdx.y]); }
KERNEL fsdp_copy_in_bf16(PARAM Pieces pieces) { copy_in<Bf16>(pieces.piece[blockIdx.y]); }
KERNEL fsdp_copy_in_f16(PARAM Pieces pieces) { copy_in<F16>(pieces.piece[blockIdx.y]); }

KERNEL fsdp_zero(PARAM Pieces pieces) {
  const Piece p = pieces.piece[blockIdx.y];
  float *to = (float *)p.to;
  walk(
      p.len, aligned(to),
      [=](u64 i) {
        const float zeros[8] = {};
        store8(to + i, zeros);
      },
      [=](u64 i) { to[i] = 0; });
}

// Not NaN, not infinite.
__device__ inline bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Multiplies the floats at `to` by `factor`, unless that is 1; *found = 1 if one of them was not finite before.
KERNEL fsdp_unscale(PARAM Pieces pieces, float factor, u32 *found) {
  const Piece p = pieces.piece[blockIdx.y];
  float *to = (float *)p.to;
  bool bad = false;
  walk(
      p.len, aligned(to),
      [&](u64 i) {
        float x[8];
        load8(to + i, x);
        for (int k = 0; k < 8; k++) {
          bad |= !finite(x[k]);
          x[k] *= factor;
        }
        if (factor != 1) store8(to + i, x);
      },
      [&](u64 i) {
        bad |= !finite(to[i]);
        if (factor != 1) to[i] *= factor;
      });
  if (bad) *found = 1;
}
