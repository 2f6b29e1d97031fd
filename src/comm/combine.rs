//! Combining elements of the ranks for the control-plane collectives, on unaligned bytes of any element type.
//!
//! float16 and bfloat16 are combined in float32, and only the result is rounded: once, to nearest even.

use super::ReduceOp;
use crate::dtype::DType;
use crate::error::{err, Result};
use half::{bf16, f16};

/// Refuses what no rank can compute: a length that is not whole elements, or the average of integers.
pub(crate) fn check(bytes: usize, dtype: DType, op: ReduceOp) -> Result<()> {
    if bytes % dtype.size() != 0 {
        return Err(err!(InvalidArgument, "data of {bytes} bytes is not a whole number of {dtype} elements"));
    }
    if op == ReduceOp::Avg && !dtype.is_float() {
        return Err(err!(InvalidArgument, "op avg needs a floating dtype, not {dtype}"));
    }
    Ok(())
}

/// `out[i]` = elements `i` of the ranks' `sources` combined in their order; `Avg` divides the sum by their number.
/// Integers wrap; a NaN stays.
pub(crate) fn combine(out: &mut [u8], sources: &[&[u8]], dtype: DType, op: ReduceOp) {
    macro_rules! float {
        ($t:ty, $wide:ty, $widen:expr, $narrow:expr) => {{
            let read = |bytes| $widen(<$t>::from_ne_bytes(bytes));
            let divisor = if op == ReduceOp::Avg { sources.len() as $wide } else { 1.0 };
            let write = |x: $wide| <$t>::to_ne_bytes($narrow(x / divisor));
            match op {
                ReduceOp::Sum | ReduceOp::Avg => fold(out, sources, read, |x, y| x + y, write),
                ReduceOp::Max => fold(out, sources, read, |x: $wide, y| if x.is_nan() || x > y { x } else { y }, write),
                ReduceOp::Min => fold(out, sources, read, |x: $wide, y| if x.is_nan() || x < y { x } else { y }, write),
            }
        }};
    }
    macro_rules! integer {
        ($t:ty) => {
            match op {
                // `check` refused averages.
                ReduceOp::Sum | ReduceOp::Avg => {
                    fold(out, sources, <$t>::from_ne_bytes, <$t>::wrapping_add, <$t>::to_ne_bytes)
                }
                ReduceOp::Max => fold(out, sources, <$t>::from_ne_bytes, Ord::max, <$t>::to_ne_bytes),
                ReduceOp::Min => fold(out, sources, <$t>::from_ne_bytes, Ord::min, <$t>::to_ne_bytes),
            }
        };
    }
    match dtype {
        DType::F32 => float!(f32, f32, |x| x, |x| x),
        DType::F64 => float!(f64, f64, |x| x, |x| x),
        DType::F16 => float!(f16, f32, f16::to_f32, f16::from_f32),
        DType::BF16 => float!(bf16, f32, bf16::to_f32, bf16::from_f32),
        DType::I32 => integer!(i32),
        DType::I64 => integer!(i64),
        DType::U8 => integer!(u8),
    }
}

/// Elements combined at a time: few enough to stay in the first-level cache.
const BLOCK: usize = 1024;

/// Combines elements of `N` bytes, held as `W` meanwhile.
fn fold<W: Copy, const N: usize>(
    out: &mut [u8],
    sources: &[&[u8]],
    read: impl Fn([u8; N]) -> W,
    combine: impl Fn(W, W) -> W,
    write: impl Fn(W) -> [u8; N],
) {
    let mut sum: Vec<W> = Vec::with_capacity(BLOCK);
    for (i, out) in out.chunks_mut(BLOCK * N).enumerate() {
        let at = i * BLOCK * N;
        let elements = |source: usize| {
            let bytes = &sources[source][at..at + out.len()];
            bytes.chunks_exact(N).map(|e| read(e.try_into().expect("N bytes")))
        };
        sum.clear();
        sum.extend(elements(0));
        for source in 1..sources.len() {
            sum.iter_mut().zip(elements(source)).for_each(|(s, x)| *s = combine(*s, x));
        }
        out.chunks_exact_mut(N).zip(&sum).for_each(|(o, s)| o.copy_from_slice(&write(*s)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(dtype: DType, op: ReduceOp, a: &[u8], b: &[u8]) -> Vec<u8> {
        let mut out = vec![0; a.len()];
        combine(&mut out, &[a, b], dtype, op);
        out
    }

    #[test]
    fn every_dtype_and_op() {
        macro_rules! case {
            ($t:ty, $d:expr, $op:expr, $want:expr) => {{
                let a: [$t; 2] = [3 as $t, 10 as $t];
                let b: [$t; 2] = [5 as $t, 2 as $t];
                let raw = |v: &[$t]| v.iter().flat_map(|x| x.to_ne_bytes()).collect::<Vec<u8>>();
                let want: [$t; 2] = $want;
                assert_eq!(run($d, $op, &raw(&a), &raw(&b)), raw(&want), "{} {:?}", $d, $op);
            }};
        }
        macro_rules! dtype {
            ($t:ty, $d:expr) => {
                case!($t, $d, ReduceOp::Sum, [8 as $t, 12 as $t]);
                case!($t, $d, ReduceOp::Max, [5 as $t, 10 as $t]);
                case!($t, $d, ReduceOp::Min, [3 as $t, 2 as $t]);
            };
        }
        dtype!(f32, DType::F32);
        dtype!(f64, DType::F64);
        dtype!(i32, DType::I32);
        dtype!(i64, DType::I64);
        dtype!(u8, DType::U8);
        case!(f32, DType::F32, ReduceOp::Avg, [4.0, 6.0]);
        case!(f64, DType::F64, ReduceOp::Avg, [4.0, 6.0]);
        macro_rules! half {
            ($t:ty, $d:expr) => {
                for (op, want) in [
                    (ReduceOp::Sum, [8.0, 12.0]),
                    (ReduceOp::Avg, [4.0, 6.0]),
                    (ReduceOp::Max, [5.0, 10.0]),
                    (ReduceOp::Min, [3.0, 2.0]),
                ] {
                    let raw = |v: [f32; 2]| v.map(|x| <$t>::from_f32(x).to_ne_bytes()).concat();
                    assert_eq!(run($d, op, &raw([3.0, 10.0]), &raw([5.0, 2.0])), raw(want), "{} {op:?}", $d);
                }
            };
        }
        half!(f16, DType::F16);
        half!(bf16, DType::BF16);
    }

    #[test]
    fn blocks_fit_together() {
        let raw = |n: usize, k: i32| (0..n as i32).flat_map(|i| (k * i).to_ne_bytes()).collect::<Vec<u8>>();
        for n in [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 7] {
            assert_eq!(run(DType::I32, ReduceOp::Sum, &raw(n, 2), &raw(n, 5)), raw(n, 7));
        }
    }

    #[test]
    fn nan_stays_in_max_and_min() {
        let (n, one) = (f32::NAN.to_ne_bytes(), 1f32.to_ne_bytes());
        for op in [ReduceOp::Max, ReduceOp::Min] {
            for (a, b) in [(n, one), (one, n)] {
                let r = run(DType::F32, op, &a, &b);
                assert!(f32::from_ne_bytes(r.try_into().unwrap()).is_nan());
            }
        }
    }

    #[test]
    fn halves_round_once_to_nearest_even() {
        macro_rules! sum {
            ($t:ty, $d:expr, $a:expr, $b:expr) => {{
                let raw = |x: f32| <$t>::from_f32(x).to_ne_bytes();
                let r = run($d, ReduceOp::Sum, &raw($a), &raw($b));
                <$t>::from_ne_bytes(r.try_into().unwrap()).to_f32()
            }};
        }
        // Ties: float16 has 11 significant bits, bfloat16 8.
        assert_eq!(sum!(f16, DType::F16, 2048.0, 1.0), 2048.0);
        assert_eq!(sum!(f16, DType::F16, 2048.0, 3.0), 2052.0);
        assert_eq!(sum!(f16, DType::F16, 65504.0, 65504.0), f32::INFINITY);
        assert_eq!(sum!(f16, DType::F16, 2f32.powi(-24), 2f32.powi(-24)), 2f32.powi(-23), "subnormal");
        assert_eq!(sum!(bf16, DType::BF16, 256.0, 1.0), 256.0);
        assert_eq!(sum!(bf16, DType::BF16, 256.0, 3.0), 260.0);
        // Three ranks: what two of them sum to need not be a float16.
        let raw = |x: f32| f16::from_f32(x).to_ne_bytes();
        let three = |op, [a, b, c]: [f32; 3]| {
            let mut out = [0; 2];
            combine(&mut out, &[&raw(a), &raw(b), &raw(c)], DType::F16, op);
            f16::from_ne_bytes(out).to_f32()
        };
        assert_eq!(three(ReduceOp::Sum, [2048.0, 1.0, 1.0]), 2050.0);
        assert_eq!(three(ReduceOp::Avg, [65504.0, 65504.0, 65504.0]), 65504.0);
    }

    #[test]
    fn refuses_integer_averages_and_broken_elements() {
        assert!(check(8, DType::I32, ReduceOp::Avg).unwrap_err().message.contains("avg"));
        assert!(check(8, DType::BF16, ReduceOp::Avg).is_ok());
        assert!(check(3, DType::F16, ReduceOp::Sum).unwrap_err().message.contains("3 bytes"));
        assert!(check(7, DType::F32, ReduceOp::Sum).unwrap_err().message.contains("7 bytes"));
        assert!(check(0, DType::F32, ReduceOp::Avg).is_ok());
    }
}
