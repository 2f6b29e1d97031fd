//! The mean of sources that is written past the cache, with AVX2.
//!
//! A store that goes through the cache fetches its line first, only to overwrite it: a quarter of the bytes that are moved where two
//! float32 sources are summed, a third where they have 16 bits. An output as large as this is hardly in the cache when it is
//! read next, however it was written.

use super::Term;
use std::arch::x86_64::*;

/// Outputs of at least so many floats are written past the cache: 2 MiB. What a smaller one saves here, its reader pays.
pub(super) const STREAM: usize = 1 << 19;

/// Floats that are summed at once, in registers: whole cache lines of every source and of the output.
pub(super) const STEP: usize = 32;

/// How many bytes ahead sources are asked for. The processor's own prefetching stops at each page.
const AHEAD: usize = 2048;

/// As `mean_any`, without adding to the output.
///
/// # Safety
/// As there; `out` lies on a cache line, `len` is a multiple of [`STEP`], there is a source, and the processor has AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn mean_streamed<T: Term>(
    sources: &[*const T],
    from: usize,
    world: usize,
    out: *mut f32,
    len: usize,
) {
    const VECTORS: usize = STEP / 8;
    let w = _mm256_set1_ps(world as f32);
    let reciprocal = _mm256_set1_ps(1.0 / world as f32);
    let exact = world.is_power_of_two();
    for at in (0..len).step_by(STEP) {
        let mut sum = [_mm256_setzero_ps(); VECTORS];
        for (number, source) in sources.iter().enumerate() {
            // SAFETY: the caller promised elements up to `from + len`, and `at + STEP <= len`. What is fetched ahead may lie
            // behind them, or nowhere: that is no access.
            unsafe {
                let source = source.add(from + at);
                for line in (0..STEP * size_of::<T>()).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(source.cast::<i8>().wrapping_add(AHEAD + line));
                }
                for (i, s) in sum.iter_mut().enumerate() {
                    let values = T::wide8(source.add(8 * i));
                    // Not added to zero, which would turn -0 into 0.
                    *s = if number == 0 { values } else { _mm256_add_ps(*s, values) };
                }
            }
        }
        for (i, s) in sum.into_iter().enumerate() {
            let mean = if exact { _mm256_mul_ps(s, reciprocal) } else { _mm256_div_ps(s, w) };
            // SAFETY: `at + STEP <= len`; `out` lies on a cache line, so every eighth float from it on is aligned to 32 bytes.
            unsafe { _mm256_stream_ps(out.add(at + 8 * i), mean) };
        }
    }
    // Such stores are ordered by nothing else before the mark that this part is done.
    _mm_sfence();
}
