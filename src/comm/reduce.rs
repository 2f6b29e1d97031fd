//! The reduction of gradients: the mean over ranks of vectors, summed in fp32 in the order the sources are given.
//!
//! Sources are float32, or 16-bit types that are widened (exactly) as they are read. Every element is `(s0 + s1 + ... ) / W`
//! evaluated left to right in fp32, whatever the vector width: the work is split over elements only, never over ranks, and no
//! fused multiply-add is used. For a power of two `W` the division is a multiplication by the exact reciprocal, which gives the
//! same bits.

use super::Tag;
use crate::dtype::DType;
use crate::halves::Half;
use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
#[cfg(target_arch = "x86_64")]
use streamed::{mean_streamed, STEP, STREAM};

#[cfg(target_arch = "x86_64")]
mod streamed;

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

/// What a loop reads: as float32, with one instruction or two.
trait Term: Copy {
    fn wide(self) -> f32;
    /// Eight of them, from any address.
    #[cfg(target_arch = "x86_64")]
    unsafe fn wide8(at: *const Self) -> __m256;
}

impl Term for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn wide8(at: *const f32) -> __m256 {
        // SAFETY: the caller's promise: eight readable floats.
        unsafe { _mm256_loadu_ps(at) }
    }
}

impl Term for bf16 {
    /// A signalling NaN stays one until it is added.
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn wide8(at: *const bf16) -> __m256 {
        // SAFETY: the caller's promise: eight readable elements, of 16 bits.
        let narrow = unsafe { _mm_loadu_si128(at.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16))
    }
}

/// `out[i] = mean` or `out[i] += mean`, where `mean = (sum of sources[..][i] in the given order) / world`, each rounded to
/// `reduced` first; source i is of type `types[i]`. All types are ones that [`supports`] names. What is of the type that it would
/// be rounded to is read as it is, and one pass over the memory does everything. Ranks without a source count as zero; with
/// no source at all nothing is written.
///
/// # Safety
/// Every source must be readable for `len` elements of its type and aligned for it, `out` writable for `len` floats; `out`
/// must overlap no source, and nobody may write the sources or touch `out` meanwhile.
pub(crate) unsafe fn mean(
    reduced: DType,
    types: &[DType],
    sources: &[*const u8],
    world: usize,
    out: *mut f32,
    len: usize,
    accumulate: bool,
) {
    assert_eq!(types.len(), sources.len());
    let Some(&first) = types.first() else { return };
    let alike = types.iter().all(|t| *t == first) && (reduced == first || reduced == DType::F32);
    // SAFETY: the caller's promise; `mean_read` asks for what lies within `len`.
    unsafe {
        match first {
            DType::F32 if alike => mean_part::<f32>(cast(sources), world, out, len, accumulate, len),
            DType::BF16 if alike => mean_part::<bf16>(cast(sources), world, out, len, accumulate, len),
            _ => {
                let read = |i: usize, at: usize, to: &mut [f32]| read_rounded(types[i], sources[i], at, reduced, to);
                mean_read(sources.len(), read, world, out, len, accumulate)
            }
        }
    }
}

fn cast<T>(sources: &[*const u8]) -> &[*const T] {
    // SAFETY: thin pointers have one layout, whatever they point to.
    unsafe { std::slice::from_raw_parts(sources.as_ptr().cast(), sources.len()) }
}

/// Elements of `dtype` from number `at` on, rounded to `reduced` unless they are of that type.
///
/// # Safety
/// `source` is readable for as many elements of `dtype` as `to` has, from number `at` on, and aligned for them.
unsafe fn read_rounded(dtype: DType, source: *const u8, at: usize, reduced: DType, to: &mut [f32]) {
    let round = |from: &[f32], to: &mut [f32]| match reduced {
        DType::F16 => f16::rounded(from, to),
        DType::BF16 => bf16::rounded(from, to),
        _ => to.copy_from_slice(from),
    };
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::F16 => f16::widen(std::slice::from_raw_parts(source.cast::<f16>().add(at), to.len()), to),
            DType::BF16 => bf16::widen(std::slice::from_raw_parts(source.cast::<bf16>().add(at), to.len()), to),
            _ => return round(std::slice::from_raw_parts(source.cast::<f32>().add(at), to.len()), to),
        }
    }
    if dtype != reduced && reduced != DType::F32 {
        let mut wide = [0f32; BLOCK];
        wide[..to.len()].copy_from_slice(to);
        round(&wide[..to.len()], to);
    }
}

/// The mean of sources that `read(source, from, to)` brings to float32, block by block.
///
/// # Safety
/// `out` is writable for `len` floats.
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

/// [`mean`] of sources of one type, for a part of an output of `whole` floats.
///
/// # Safety
/// As for [`mean`].
unsafe fn mean_part<T: Term>(
    sources: &[*const T],
    world: usize,
    out: *mut f32,
    len: usize,
    accumulate: bool,
    whole: usize,
) {
    if sources.is_empty() || len == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // Up to the next cache line, and what is less than a step at the end, in the ordinary way.
        let head = (out.align_offset(64)).min(len);
        let body = if accumulate || whole < STREAM { 0 } else { (len - head) / STEP * STEP };
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
unsafe fn mean_avx2<T: Term>(
    sources: &[*const T],
    from: usize,
    world: usize,
    out: *mut f32,
    len: usize,
    accumulate: bool,
) {
    // SAFETY: the caller's promise.
    unsafe { mean_any(sources, from, world, out, len, accumulate) }
}

/// `from` is where in the sources the first element of `out` comes from.
#[inline(always)]
unsafe fn mean_any<T: Term>(
    sources: &[*const T],
    from: usize,
    world: usize,
    out: *mut f32,
    len: usize,
    accumulate: bool,
) {
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
unsafe fn blocks<T: Term>(
    sources: &[*const T],
    from: usize,
    out: *mut f32,
    len: usize,
    last: impl Fn(f32, f32) -> f32,
) {
    // SAFETY: the caller promised `len` readable elements of each source from `from` on.
    let source = |i: usize, at: usize, n: usize| unsafe { std::slice::from_raw_parts(sources[i].add(from + at), n) };
    // SAFETY: as above, for the output, which overlaps no source.
    let out = unsafe { std::slice::from_raw_parts_mut(out, len) };
    match sources.len() {
        1 => {
            for (o, a) in out.iter_mut().zip(source(0, 0, len)) {
                *o = last(*o, a.wide());
            }
        }
        2 => {
            for ((o, a), b) in out.iter_mut().zip(source(0, 0, len)).zip(source(1, 0, len)) {
                *o = last(*o, a.wide() + b.wide());
            }
        }
        count => {
            let mut scratch = [0f32; BLOCK];
            for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                let (at, n) = (block * BLOCK, out.len());
                let sum = &mut scratch[..n];
                for ((s, a), b) in sum.iter_mut().zip(source(0, at, n)).zip(source(1, at, n)) {
                    *s = a.wide() + b.wide();
                }
                for i in 2..count - 1 {
                    for (s, a) in sum.iter_mut().zip(source(i, at, n)) {
                        *s += a.wide();
                    }
                }
                for ((o, s), a) in out.iter_mut().zip(sum.iter()).zip(source(count - 1, at, n)) {
                    *o = last(*o, *s + a.wide());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
