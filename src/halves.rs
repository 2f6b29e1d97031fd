//! Between float32 and 16-bit floating types, a slice at a time.
//!
//! Rounding is to nearest, ties to even; widening is exact; NaNs stay NaNs and become quiet: what crate half does for single
//! numbers, bit for bit. It has instructions for float16, but goes number by number for bfloat16, where bits can be moved
//! in vectors: so that is done here.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A 16-bit floating type.
pub(crate) trait Half: Copy {
    /// `to[i] = from[i]`, rounded.
    fn round(from: &[f32], to: &mut [Self]);
    /// `to[i] = from[i]`, exactly.
    fn widen(from: &[Self], to: &mut [f32]);
    /// `to[i] = from[i]`, rounded to this type and widened again.
    fn rounded(from: &[f32], to: &mut [f32]);
}

impl Half for f16 {
    fn round(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }

    fn widen(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn rounded(from: &[f32], to: &mut [f32]) {
        const BLOCK: usize = 512;
        let mut narrow = [f16::ZERO; BLOCK];
        for (from, to) in from.chunks(BLOCK).zip(to.chunks_mut(BLOCK)) {
            f16::round(from, &mut narrow[..from.len()]);
            f16::widen(&narrow[..from.len()], to);
        }
    }
}

impl Half for bf16 {
    fn round(from: &[f32], to: &mut [bf16]) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { round_avx2(from, to) };
        }
        round_any(from, to)
    }

    fn widen(from: &[bf16], to: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { widen_avx2(from, to) };
        }
        widen_any(from, to)
    }

    fn rounded(from: &[f32], to: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { rounded_avx2(from, to) };
        }
        rounded_any(from, to)
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn round_avx2(from: &[f32], to: &mut [bf16]) {
    round_any(from, to)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn widen_avx2(from: &[bf16], to: &mut [f32]) {
    widen_any(from, to)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn rounded_avx2(from: &[f32], to: &mut [f32]) {
    rounded_any(from, to)
}

/// The upper half of a float's bits, rounded.
#[inline(always)]
fn upper(from: f32) -> u32 {
    let bits = from.to_bits();
    // Half of the last place, less one where it is even; the carry may go up to infinity, as it should.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        quiet
    } else {
        rounded
    }
}

#[inline(always)]
fn round_any(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16::from_bits(upper(*from) as u16);
    }
}

#[inline(always)]
fn rounded_any(from: &[f32], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits(upper(*from) << 16);
    }
}

#[inline(always)]
fn widen_any(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        let bits = u32::from(from.to_bits()) << 16;
        let quiet = if bits & 0x7fff_ffff > 0x7f80_0000 { 0x40_0000 } else { 0 };
        *to = f32::from_bits(bits | quiet);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bfloat16_widens_as_half_does() {
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut wide = vec![0f32; all.len()];
        Half::widen(&all, &mut wide);
        assert!(all.iter().zip(&wide).all(|(narrow, wide)| narrow.to_f32().to_bits() == wide.to_bits()));
    }

    #[test]
    fn floats_round_as_half_does() {
        // Every upper half with lower halves around the ties.
        let lower = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let all: Vec<f32> =
            (0..=u16::MAX).flat_map(|u| lower.map(|l| f32::from_bits(u32::from(u) << 16 | l))).collect();
        let mut narrow = vec![bf16::ZERO; all.len()];
        Half::round(&all, &mut narrow);
        assert!(all.iter().zip(&narrow).all(|(x, got)| bf16::from_f32(*x).to_bits() == got.to_bits()));
        let (mut rounded, mut widened) = (vec![0f32; all.len()], vec![0f32; all.len()]);
        bf16::rounded(&all, &mut rounded);
        Half::widen(&narrow, &mut widened);
        assert!(rounded.iter().zip(&widened).all(|(got, want)| got.to_bits() == want.to_bits()));
    }
}
