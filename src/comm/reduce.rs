//! The reduction of gradients: the mean over ranks of vectors, summed in fp32 in the order the sources are given.
//!
//! Sources are float32, or 16-bit types that are widened (exactly) as they are read. Every element is `(s0 + s1 + ... ) / W` evaluated left to right in fp32, whatever the vector width: the work is split
//! over elements only, never over ranks, and no fused multiply-add is used. For a power of two `W` the division is a
//! multiplication by the exact reciprocal, which gives the same bits.

use super::Tag;
use crate::dtype::DType;
use crate::halves::Half;
use half::{bf16, f16};

/// Outputs of more floats than this are written past the cache: they are not read before it is full of other things,
/// and fetching their lines only to overwrite them would cost a third of the memory's bandwidth. Smaller ones stay in a
/// last-level cache, which is faster than the memory.
const STREAM: usize = 1 << 20;

/// Floats of a block: small enough that the running sum stays in the first-level cache while ranks are added.
const BLOCK: usize = 2048;

/// Whether gradients of this type can be summed.
pub fn supports(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// Whether the float32s of a reduction that moves no bytes fit a slot of so many bytes.
pub fn fits(tag: Tag, slot: usize) -> bool {
    tag.bytes / tag.dtype.size() as u64 * DType::F32.size() as u64 <= slot as u64
}

/// [`mean_f32`] of sources of `dtype`, one that [`supports`] names.
///
/// # Safety
/// As for [`mean_f32`], for `len` elements of `dtype`, aligned for it.
pub(crate) unsafe fn mean(
    dtype: DType,
    sources: &[*const u8],
    world: usize,
    out: *mut f32,
    len: usize,
    accumulate: bool,
) {
    // SAFETY: the caller's promise; a list of pointers may be read as one of pointers to another type.
    unsafe {
        match dtype {
            DType::F16 => mean_16::<f16>(cast(sources), world, out, len, accumulate),
            DType::BF16 => mean_16::<bf16>(cast(sources), world, out, len, accumulate),
            _ => mean_f32(cast(sources), world, out, len, accumulate),
        }
    }
}

/// [`mean_f32`] of what `dtype`, one that [`supports`] names, holds of float32 sources: the bits of [`narrow`] and
/// [`mean`], in one pass over the memory instead of two.
///
/// # Safety
/// As for [`mean_f32`].
pub(crate) unsafe fn mean_rounded(
    dtype: DType,
    sources: &[*const f32],
    world: usize,
    out: *mut f32,
    len: usize,
    accumulate: bool,
) {
    // SAFETY: the caller's promise.
    unsafe {
        // SAFETY: `mean_read` asks for what lies within `len`.
        let source = |i: usize, at: usize, n: usize| std::slice::from_raw_parts(sources[i].add(at), n);
        match dtype {
            DType::F16 => {
                let read = |i: usize, at: usize, to: &mut [f32]| f16::rounded(source(i, at, to.len()), to);
                mean_read(sources.len(), read, world, out, len, accumulate)
            }
            DType::BF16 => {
                let read = |i: usize, at: usize, to: &mut [f32]| bf16::rounded(source(i, at, to.len()), to);
                mean_read(sources.len(), read, world, out, len, accumulate)
            }
            _ => mean_f32(sources, world, out, len, accumulate),
        }
    }
}

fn cast<T>(sources: &[*const u8]) -> &[*const T] {
    // SAFETY: thin pointers have one layout, whatever they point to.
    unsafe { std::slice::from_raw_parts(sources.as_ptr().cast(), sources.len()) }
}

/// Widens block by block, then does what [`mean_f32`] does, with the same bits for the same values.
unsafe fn mean_16<T: Half>(sources: &[*const T], world: usize, out: *mut f32, len: usize, accumulate: bool) {
    // SAFETY: `mean_read` asks for what lies within `len`, and the caller promised as many readable elements.
    let source = |i: usize, at: usize, n: usize| unsafe { std::slice::from_raw_parts(sources[i].add(at), n) };
    let read = |i: usize, at: usize, to: &mut [f32]| T::widen(source(i, at, to.len()), to);
    // SAFETY: the caller's promise.
    unsafe { mean_read(sources.len(), read, world, out, len, accumulate) }
}

/// [`mean_f32`] of sources that `read(source, from, to)` brings to float32, block by block.
unsafe fn mean_read(
    sources: usize,
    read: impl Fn(usize, usize, &mut [f32]),
    world: usize,
    out: *mut f32,
    len: usize,
    accumulate: bool,
) {
    let mut sum = [0f32; BLOCK];
    let mut next = [0f32; BLOCK];
    let mut at = 0;
    while at < len && sources > 0 {
        let n = BLOCK.min(len - at);
        read(0, at, &mut sum[..n]);
        for i in 1..sources {
            read(i, at, &mut next[..n]);
            for (s, a) in sum[..n].iter_mut().zip(&next[..n]) {
                *s += *a;
            }
        }
        // SAFETY: the sum is a source of `n` floats; `out` is the caller's promise.
        unsafe { mean_part(&[sum.as_ptr()], world, out.add(at), n, accumulate, len) };
        at += n;
    }
}

/// Rounds `len` floats at `from` to a 16-bit type (to nearest, ties to even) and writes them to `to`, which may lie at or
/// before `from` in the same memory.
///
/// # Safety
/// `from` is readable for `len` floats, `to` writable for `len` elements of `dtype`; if they overlap, `to <= from`.
pub(crate) unsafe fn narrow(dtype: DType, from: *const f32, to: *mut u8, len: usize) {
    let mut wide = [0f32; BLOCK];
    let mut at = 0;
    while at < len {
        let n = BLOCK.min(len - at);
        // The block is read as a whole before anything is written: what is written lies before what is still to be read.
        // SAFETY: `at + n <= len`; the copy is made before the overlapping bytes are written.
        unsafe { std::ptr::copy_nonoverlapping(from.add(at), wide.as_mut_ptr(), n) };
        match dtype {
            // SAFETY: the caller's promise for `to`, and 16-bit elements.
            DType::F16 => {
                Half::round(&wide[..n], unsafe { std::slice::from_raw_parts_mut(to.cast::<f16>().add(at), n) })
            }
            // SAFETY: as above.
            _ => Half::round(&wide[..n], unsafe { std::slice::from_raw_parts_mut(to.cast::<bf16>().add(at), n) }),
        }
        at += n;
    }
}

/// `out[i] = mean` or `out[i] += mean`, where `mean = (sum of sources[..][i] in the given order) / world`. Ranks without
/// a source count as zero; with no source at all nothing is written.
///
/// # Safety
/// Every source must be readable for `len` floats, `out` writable for `len` floats; `out` must overlap no source, and
/// nobody may write the sources or touch `out` meanwhile.
pub(crate) unsafe fn mean_f32(sources: &[*const f32], world: usize, out: *mut f32, len: usize, accumulate: bool) {
    // SAFETY: the caller's promise.
    unsafe { mean_part(sources, world, out, len, accumulate, len) }
}

/// The same for a part of an output of `whole` floats.
unsafe fn mean_part(sources: &[*const f32], world: usize, out: *mut f32, len: usize, accumulate: bool, whole: usize) {
    if sources.is_empty() || len == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // Up to the next cache line, and what is less than a line at the end, in the ordinary way.
        let head = (out.align_offset(64)).min(len);
        let body = if accumulate || whole <= STREAM { 0 } else { (len - head) / 16 * 16 };
        // SAFETY: the processor has AVX2; `head + body <= len`, and `out + head` is aligned to 64 bytes; the rest is the
        // caller's promise.
        return unsafe {
            if body == 0 {
                return mean_avx2(sources, 0, world, out, len, accumulate);
            }
            mean_avx2(sources, 0, world, out, head, false);
            mean_streamed(sources, head, world, out.add(head), body);
            let done = head + body;
            mean_avx2(sources, done, world, out.add(done), len - done, false)
        };
    }
    // SAFETY: the caller's promise.
    unsafe { mean_any(sources, 0, world, out, len, accumulate) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn mean_avx2(sources: &[*const f32], from: usize, world: usize, out: *mut f32, len: usize, accumulate: bool) {
    // SAFETY: the caller's promise.
    unsafe { mean_any(sources, from, world, out, len, accumulate) }
}

/// The same for an `out` on a cache line and a `len` of whole lines, block by block through the cache and then past it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn mean_streamed(sources: &[*const f32], from: usize, world: usize, out: *mut f32, len: usize) {
    use std::arch::x86_64::{_mm256_loadu_ps, _mm256_stream_ps, _mm_sfence};
    let mut block = [0f32; BLOCK];
    let mut at = 0;
    while at < len {
        let n = BLOCK.min(len - at);
        // SAFETY: the caller's promise, `at + n <= len`, and `n` is a multiple of 16: 8 floats from `i` on lie in the
        // block and in the output, there aligned to 32 bytes.
        unsafe {
            mean_any(sources, from + at, world, block.as_mut_ptr(), n, false);
            for i in (0..n).step_by(8) {
                _mm256_stream_ps(out.add(at + i), _mm256_loadu_ps(block.as_ptr().add(i)));
            }
        }
        at += n;
    }
    // Such stores are ordered by nothing else before the mark that this part is done.
    _mm_sfence();
}

/// `from` is where in the sources the first element of `out` comes from.
#[inline(always)]
unsafe fn mean_any(sources: &[*const f32], from: usize, world: usize, out: *mut f32, len: usize, accumulate: bool) {
    let w = world as f32;
    let reciprocal = 1.0 / w;
    // SAFETY: the caller's promise, in all four.
    unsafe {
        match (world.is_power_of_two(), accumulate) {
            (true, false) => blocks(sources, from, out, len, |_, sum| sum * reciprocal),
            (true, true) => blocks(sources, from, out, len, |old, sum| old + sum * reciprocal),
            (false, false) => blocks(sources, from, out, len, |_, sum| sum / w),
            (false, true) => blocks(sources, from, out, len, |old, sum| old + sum / w),
        }
    }
}

#[inline(always)]
unsafe fn blocks(sources: &[*const f32], from: usize, out: *mut f32, len: usize, last: impl Fn(f32, f32) -> f32) {
    // SAFETY: the caller promised `len` readable floats of each source from `from` on.
    let source = |i: usize, at: usize, n: usize| unsafe { std::slice::from_raw_parts(sources[i].add(from + at), n) };
    // SAFETY: as above, for the output, which overlaps no source.
    let out = unsafe { std::slice::from_raw_parts_mut(out, len) };
    match sources.len() {
        1 => {
            for (o, a) in out.iter_mut().zip(source(0, 0, len)) {
                *o = last(*o, *a);
            }
        }
        2 => {
            for ((o, a), b) in out.iter_mut().zip(source(0, 0, len)).zip(source(1, 0, len)) {
                *o = last(*o, *a + *b);
            }
        }
        count => {
            let mut scratch = [0f32; BLOCK];
            for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                let (at, n) = (block * BLOCK, out.len());
                let sum = &mut scratch[..n];
                for ((s, a), b) in sum.iter_mut().zip(source(0, at, n)).zip(source(1, at, n)) {
                    *s = *a + *b;
                }
                for i in 2..count - 1 {
                    for (s, a) in sum.iter_mut().zip(source(i, at, n)) {
                        *s += *a;
                    }
                }
                for ((o, s), a) in out.iter_mut().zip(sum.iter()).zip(source(count - 1, at, n)) {
                    *o = last(*o, *s + *a);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference(sources: &[Vec<f32>], world: usize, out: &mut [f32], accumulate: bool) {
        for (i, o) in out.iter_mut().enumerate() {
            let mut sum = sources[0][i];
            for s in &sources[1..] {
                sum += s[i];
            }
            let mean = sum / world as f32;
            *o = if accumulate { *o + mean } else { mean };
        }
    }

    fn noise(seed: u64, n: usize) -> Vec<f32> {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..n)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                ((x >> 40) as f32 / 8388608.0 - 1.0) * 10f32.powi((x % 9) as i32 - 4)
            })
            .collect()
    }

    fn check(world: usize, present: usize, len: usize, shift: usize, accumulate: bool) {
        let sources: Vec<Vec<f32>> = (0..present).map(|r| noise(r as u64 + 7, len + shift)).collect();
        let shifted: Vec<Vec<f32>> = sources.iter().map(|s| s[shift..].to_vec()).collect();
        let mut got = noise(99, len + 2);
        let mut want = got.clone();
        reference(&shifted, world, &mut want[1..len + 1], accumulate);
        let pointers: Vec<*const f32> = sources.iter().map(|s| s[shift..].as_ptr()).collect();
        // SAFETY: the vectors have `len` floats from these addresses on, and do not overlap.
        unsafe { mean_f32(&pointers, world, got[1..].as_mut_ptr(), len, accumulate) };
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&got), bits(&want), "world {world} present {present} len {len} shift {shift} {accumulate}");
    }

    #[test]
    fn same_bits_as_the_scalar_sum_in_rank_order() {
        for world in 1..=9 {
            for present in 1..=world {
                for len in [1, 3, 8, 31, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, STREAM + 37] {
                    check(world, present, len, 0, false);
                    check(world, present, len, 3, true);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_shape(world in 1usize..65, part in 0usize..64, len in 0usize..5000, shift in 0usize..9, acc: bool) {
            check(world, part % world + 1, len, shift, acc);
        }
    }

    #[test]
    fn sixteen_bits_are_summed_in_float32() {
        for (dtype, len) in [
            (DType::F16, 3 * BLOCK + 5),
            (DType::BF16, STREAM + 37),
            (DType::BF16, 1000),
            (DType::F16, 1),
            (DType::BF16, 0),
        ] {
            let wide: Vec<Vec<f32>> = (0..3).map(|r| noise(r + 3, len)).collect();
            // Rounded in place, as gradients in their slots are.
            let mut narrow_ones: Vec<Vec<f32>> = wide.clone();
            for v in &mut narrow_ones {
                let at = v.as_mut_ptr();
                // SAFETY: in place: `to == from`, and 16 bits need less room than 32.
                unsafe { narrow(dtype, at, at.cast(), len) };
            }
            let round = |x: f32| match dtype {
                DType::F16 => f16::from_f32(x).to_f32(),
                _ => bf16::from_f32(x).to_f32(),
            };
            let rounded: Vec<Vec<f32>> = wide.iter().map(|v| v.iter().map(|x| round(*x)).collect()).collect();
            for accumulate in [false, true] {
                let mut got = noise(99, len);
                let mut want = got.clone();
                if len > 0 {
                    reference(&rounded, 4, &mut want, accumulate);
                }
                let sources: Vec<*const u8> = narrow_ones.iter().map(|v| v.as_ptr().cast()).collect();
                // SAFETY: the vectors hold `len` 16-bit elements.
                unsafe { mean(dtype, &sources, 4, got.as_mut_ptr(), len, accumulate) };
                assert!(got.iter().zip(&want).all(|(g, w)| g.to_bits() == w.to_bits()), "{dtype} {len} {accumulate}");
                let mut got = noise(99, len);
                let sources: Vec<*const f32> = wide.iter().map(|v| v.as_ptr()).collect();
                // SAFETY: the vectors hold `len` floats.
                unsafe { mean_rounded(dtype, &sources, 4, got.as_mut_ptr(), len, accumulate) };
                assert!(got.iter().zip(&want).all(|(g, w)| g.to_bits() == w.to_bits()), "{dtype} {len} {accumulate}");
            }
        }
    }

    #[test]
    fn no_source_leaves_the_output_alone() {
        let mut out = [1.0f32, 2.0];
        // SAFETY: nothing is read; `out` has two floats.
        unsafe { mean_f32(&[], 2, out.as_mut_ptr(), 2, false) };
        assert_eq!(out, [1.0, 2.0]);
    }
}
