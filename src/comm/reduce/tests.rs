//! Every way to a mean has the bits of the scalar loop.

use super::*;
use proptest::prelude::*;

/// Floats of an output that is written past the cache where that is done, and a few that are no whole step.
const LONG: usize = (1 << 19) + 37;

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
    let pointers: Vec<*const u8> = sources.iter().map(|s| s[shift..].as_ptr().cast()).collect();
    let types = vec![DType::F32; present];
    // SAFETY: the vectors have `len` floats from these addresses on, and do not overlap.
    unsafe { mean(DType::F32, &types, &pointers, world, got[1..].as_mut_ptr(), len, accumulate) };
    let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&want), "world {world} present {present} len {len} shift {shift} {accumulate}");
}

#[test]
fn same_bits_as_the_scalar_sum_in_rank_order() {
    for world in 1..=9 {
        for present in 1..=world {
            for len in [1, 3, 8, 31, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, LONG] {
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

fn bytes_of<T>(vectors: &[Vec<T>]) -> Vec<*const u8> {
    vectors.iter().map(|v| v.as_ptr().cast()).collect()
}

#[test]
fn sixteen_bits_are_summed_in_float32() {
    for (dtype, len, world) in [
        (DType::F16, 3 * BLOCK + 5, 4),
        (DType::BF16, LONG, 4),
        (DType::BF16, LONG, 2),
        (DType::BF16, LONG, 3),
        (DType::BF16, 1000, 3),
        (DType::BF16, 4 * BLOCK + 9, 1),
        (DType::F16, 1, 3),
        (DType::BF16, 0, 4),
    ] {
        let other = if dtype == DType::F16 { DType::BF16 } else { DType::F16 };
        let present = world.min(3);
        let wide: Vec<Vec<f32>> = (0..present as u64).map(|r| noise(r + 3, len)).collect();
        // Rounded in place, as gradients in their slots are.
        let narrowed = |dtype: DType| {
            let mut all: Vec<Vec<f32>> = wide.clone();
            for v in &mut all {
                let at = v.as_mut_ptr();
                // SAFETY: in place: `to == from`, and 16 bits need less room than 32.
                unsafe { narrow(dtype, at, at.cast(), len) };
            }
            all
        };
        let (narrow_ones, other_ones) = (narrowed(dtype), narrowed(other));
        let round = |dtype: DType, x: f32| match dtype {
            DType::F16 => f16::from_f32(x).to_f32(),
            _ => bf16::from_f32(x).to_f32(),
        };
        let rounded: Vec<Vec<f32>> = wide.iter().map(|v| v.iter().map(|x| round(dtype, *x)).collect()).collect();
        let twice: Vec<Vec<f32>> =
            wide.iter().map(|v| v.iter().map(|x| round(dtype, round(other, *x))).collect()).collect();
        let mut mixed = rounded.clone();
        mixed[0] = wide[0].clone();
        let first = |wide_one: *const u8| -> Vec<*const u8> {
            std::iter::once(wide_one).chain(bytes_of(&narrow_ones).into_iter().skip(1)).collect()
        };
        let one_wide: Vec<DType> = (0..present).map(|i| if i == 0 { DType::F32 } else { dtype }).collect();
        let cases = [
            ("as they are", dtype, vec![dtype; present], bytes_of(&narrow_ones), &rounded),
            ("reduced in float32", DType::F32, vec![dtype; present], bytes_of(&narrow_ones), &rounded),
            ("rounded", dtype, vec![DType::F32; present], bytes_of(&wide), &rounded),
            ("one is float32", dtype, one_wide.clone(), first(wide[0].as_ptr().cast()), &rounded),
            ("one is float32, as all are reduced", DType::F32, one_wide, first(wide[0].as_ptr().cast()), &mixed),
            ("of the other type", dtype, vec![other; present], bytes_of(&other_ones), &twice),
        ];
        for (what, reduced, types, sources, values) in &cases {
            for accumulate in [false, true] {
                let mut got = noise(99, len);
                let mut want = got.clone();
                reference(values, world, &mut want, accumulate);
                // SAFETY: the vectors hold `len` elements of these types.
                unsafe { mean(*reduced, types, sources, world, got.as_mut_ptr(), len, accumulate) };
                let same = got.iter().zip(&want).all(|(g, w)| g.to_bits() == w.to_bits());
                assert!(same, "{dtype} {len} {world} {what} {accumulate}");
            }
        }
    }
}

#[test]
fn infinities_and_nans_come_through() {
    let of = |x: f32| bf16::from_f32(x);
    let a = [of(f32::INFINITY), of(f32::NAN), bf16::from_bits(0x7f81), of(f32::MAX), of(-0.0)];
    let b = [of(f32::NEG_INFINITY), of(1.0), of(1.0), of(f32::MAX), of(-0.0)];
    let mut out = [7f32; 5];
    let sources = [a.as_ptr().cast(), b.as_ptr().cast()];
    // SAFETY: five elements each.
    unsafe { mean(DType::BF16, &[DType::BF16; 2], &sources, 2, out.as_mut_ptr(), 5, false) };
    assert!(out[..3].iter().all(|x| x.is_nan()), "{out:?}");
    assert_eq!((out[3], out[4].to_bits()), (f32::INFINITY, (-0f32).to_bits()));
}

#[test]
fn no_source_leaves_the_output_alone() {
    let mut out = [1.0f32, 2.0];
    // SAFETY: nothing is read; `out` has two floats.
    unsafe { mean(DType::F32, &[], &[], 2, out.as_mut_ptr(), 2, false) };
    assert_eq!(out, [1.0, 2.0]);
}
