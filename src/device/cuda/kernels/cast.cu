// Casts between float32 and 16 bits, and scaling in place.

template <class From, class To>
__device__ inline void cast(const Piece p) {
  const From *from = (const From *)p.from;
  To *to = (To *)p.to;
  walk(
      p.len, aligned(from, to),
      [=](u64 i) {
        float x[8];
        load8(from + i, x);
        store8(to + i, x);
      },
      [=](u64 i) { narrow(widen(from[i]), to[i]); });
}

KERNEL fsdp_cast_f32_bf16(PARAM Pieces pieces) { cast<float, Bf16>(pieces.piece[blockIdx.y]); }
KERNEL fsdp_cast_f32_f16(PARAM Pieces pieces) { cast<float, F16>(pieces.piece[blockIdx.y]); }
KERNEL fsdp_cast_bf16_f32(PARAM Pieces pieces) { cast<Bf16, float>(pieces.piece[blockIdx.y]); }
KERNEL fsdp_cast_f16_f32(PARAM Pieces pieces) { cast<F16, float>(pieces.piece[blockIdx.y]); }

// to = to * factor, in float32, rounded once.
template <class T>
__device__ inline void scale(const Piece p, float factor) {
  T *to = (T *)p.to;
  walk(
      p.len, aligned(to),
      [=](u64 i) {
        float x[8];
        load8(to + i, x);
        for (int k = 0; k < 8; k++) x[k] *= factor;
        store8(to + i, x);
      },
      [=](u64 i) { narrow(widen(to[i]) * factor, to[i]); });
}

KERNEL fsdp_scale_f32(PARAM Pieces pieces, float factor) { scale<float>(pieces.piece[blockIdx.y], factor); }
KERNEL fsdp_scale_bf16(PARAM Pieces pieces, float factor) { scale<Bf16>(pieces.piece[blockIdx.y], factor); }
KERNEL fsdp_scale_f16(PARAM Pieces pieces, float factor) { scale<F16>(pieces.piece[blockIdx.y], factor); }
