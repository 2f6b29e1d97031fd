//! Combining elements of two ranks for the control-plane collectives, on unaligned bytes of any element type.

use super::ReduceOp;
use crate::dtype::DType;
use crate::error::{err, Result};

/// Refuses what no rank can compute: a length that is not whole elements, or the average of integers.
pub(crate) fn check(bytes: usize, dtype: DType, op: ReduceOp) -> Result<()> {
    if bytes % dtype.size() != 0 {
        return Err(err!(InvalidArgument, "data of {bytes} bytes is not a whole number of {dtype} elements"));
    }
    if op == ReduceOp::Avg && !matches!(dtype, DType::F32 | DType::F64) {
        return Err(err!(InvalidArgument, "op avg needs float32 or float64, not {dtype}"));
    }
    Ok(())
}

/// `acc[i] = acc[i] (op) other[i]`; `Avg` adds. Integers wrap; a NaN on either side stays.
pub(crate) fn combine(acc: &mut [u8], other: &[u8], dtype: DType, op: ReduceOp) {
    macro_rules! each {
        ($t:ty, $f:expr) => {{
            const N: usize = std::mem::size_of::<$t>();
            let f = $f;
            for (a, b) in acc.chunks_exact_mut(N).zip(other.chunks_exact(N)) {
                let x = <$t>::from_ne_bytes((&*a).try_into().expect("chunk of one element"));
                let y = <$t>::from_ne_bytes(b.try_into().expect("chunk of one element"));
                a.copy_from_slice(&<$t>::to_ne_bytes(f(x, y)));
            }
        }};
    }
    macro_rules! float {
        ($t:ty) => {
            match op {
                ReduceOp::Sum | ReduceOp::Avg => each!($t, |x: $t, y: $t| x + y),
                ReduceOp::Max => each!($t, |x: $t, y: $t| if x.is_nan() || x > y { x } else { y }),
                ReduceOp::Min => each!($t, |x: $t, y: $t| if x.is_nan() || x < y { x } else { y }),
            }
        };
    }
    macro_rules! integer {
        ($t:ty) => {
            match op {
                ReduceOp::Sum | ReduceOp::Avg => each!($t, <$t>::wrapping_add),
                ReduceOp::Max => each!($t, Ord::max),
                ReduceOp::Min => each!($t, Ord::min),
            }
        };
    }
    match dtype {
        DType::F32 => float!(f32),
        DType::F64 => float!(f64),
        DType::I32 => integer!(i32),
        DType::I64 => integer!(i64),
        DType::U8 => integer!(u8),
    }
}

/// Turns a sum into what `op` asks for: `Avg` divides by `world`, the others are complete.
pub(crate) fn complete(acc: &mut [u8], dtype: DType, op: ReduceOp, world: usize) {
    if op != ReduceOp::Avg || world == 1 {
        return;
    }
    macro_rules! divide {
        ($t:ty) => {
            for a in acc.chunks_exact_mut(std::mem::size_of::<$t>()) {
                let x = <$t>::from_ne_bytes((&*a).try_into().expect("chunk of one element"));
                a.copy_from_slice(&(x / world as $t).to_ne_bytes());
            }
        };
    }
    match dtype {
        DType::F32 => divide!(f32),
        DType::F64 => divide!(f64),
        // `check` refused these.
        DType::I32 | DType::I64 | DType::U8 => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(dtype: DType, op: ReduceOp, a: &[u8], b: &[u8]) -> Vec<u8> {
        let mut acc = a.to_vec();
        combine(&mut acc, b, dtype, op);
        complete(&mut acc, dtype, op, 2);
        acc
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
    fn refuses_integer_averages_and_broken_elements() {
        assert!(check(8, DType::I32, ReduceOp::Avg).unwrap_err().message.contains("avg"));
        assert!(check(7, DType::F32, ReduceOp::Sum).unwrap_err().message.contains("7 bytes"));
        assert!(check(0, DType::F32, ReduceOp::Avg).is_ok());
    }
}
