//! Casts, scaling, gradients and zeros, element by element against float64. A float32 operation computed in float64 and
//! rounded once is the float32 operation, so results must be equal, not close.

use super::gpu::{noise, pieces, places, same, Gpu, LENGTHS};
use fsdp::device::cuda::{Compute, Cuda};
use fsdp::device::{Device, Home};
use fsdp::dtype::DType;
use half::{bf16, f16};

/// Values that are hard to round, too.
fn values(n: usize) -> Vec<f32> {
    let hard = [
        f32::from_bits(0x3f80_8000), // a tie in bfloat16, down to even
        f32::from_bits(0x3f81_8000), // up to even
        f32::from_bits(0x3f80_8001),
        1.0 + 1.0 / 2048.0, // a tie in float16
        1.0 + 3.0 / 2048.0,
        f32::MAX,
        65520.0, // rounds to infinity in float16
        65519.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        f32::from_bits(0x7f80_0001), // a NaN whose upper half is infinity
        -0.0,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        5.0e-8, // subnormal in float16
    ];
    let mut values = noise(3, n);
    values.iter_mut().enumerate().filter(|(i, _)| i % 3 == 0).for_each(|(i, v)| *v = hard[i / 3 % hard.len()]);
    values
}

/// The nearest number of this type, ties to even, by its definition: so many bits of a multiple of a power of two.
fn rounded(dtype: DType, x: f64) -> f64 {
    let (precision, least, infinity) = match dtype {
        DType::BF16 => (8, -126, 2f64.powi(128)),
        _ => (11, -14, 2f64.powi(16)),
    };
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let exponent = ((x.to_bits() >> 52 & 0x7ff) as i32 - 1023).max(least);
    let unit = 2f64.powi(exponent - precision + 1);
    let y = (x / unit).round_ties_even() * unit;
    if y.abs() >= infinity {
        y.signum() * f64::INFINITY
    } else {
        y
    }
}

/// Its bits, of a number that the type has.
fn to_bits(dtype: DType, x: f64) -> u16 {
    let x = rounded(dtype, x) as f32;
    match dtype {
        DType::BF16 => bf16::from_f32(x).to_bits(),
        _ => f16::from_f32(x).to_bits(),
    }
}

fn to_f64(dtype: DType, bits: u16) -> f64 {
    match dtype {
        DType::BF16 => bf16::from_bits(bits).to_f64(),
        _ => f16::from_bits(bits).to_f64(),
    }
}

/// Both layouts of pieces: more of them than a launch takes.
fn layouts() -> Vec<(Vec<(usize, usize)>, usize)> {
    let lengths: Vec<usize> = LENGTHS.into_iter().chain((0..70).map(|i| i * 5 % 33)).collect();
    vec![places(&lengths, false), places(&lengths, true)]
}

fn inside(places: &[(usize, usize)], i: usize) -> bool {
    places.iter().any(|(at, len)| (*at..at + len).contains(&i))
}

pub fn casts(gpu: &Gpu) {
    for dtype in [DType::BF16, DType::F16] {
        for (places, n) in layouts() {
            let (wide, narrow) = (values(n), vec![0xabcd_u16; n]);
            let (from, to) = (gpu.put(&wide), gpu.put(&narrow));
            let there = pieces(&places, (from.address(), 4), (to.address(), 2));
            // SAFETY: the pieces lie in the buffers.
            unsafe { gpu.kernels.cast(&gpu.stream, DType::F32, dtype, &there) }.unwrap();
            let got: Vec<u16> = gpu.get(&to);
            for i in 0..n {
                match inside(&places, i) {
                    true if wide[i].is_nan() => assert!(to_f64(dtype, got[i]).is_nan(), "{dtype}: element {i}"),
                    true => assert_eq!(got[i], to_bits(dtype, wide[i].into()), "{dtype}: element {i}, {}", wide[i]),
                    false => assert_eq!(got[i], 0xabcd, "{dtype}: element {i} is in no piece"),
                }
            }
            let back = gpu.put(&vec![7f32; n]);
            let there = pieces(&places, (to.address(), 2), (back.address(), 4));
            // SAFETY: as above.
            unsafe { gpu.kernels.cast(&gpu.stream, dtype, DType::F32, &there) }.unwrap();
            let want: Vec<f32> =
                (0..n).map(|i| if inside(&places, i) { to_f64(dtype, got[i]) as f32 } else { 7.0 }).collect();
            same(&gpu.get::<f32>(&back), &want, dtype.name());
        }
    }
    // SAFETY: refused before anything is done.
    let e = unsafe { gpu.kernels.cast(&gpu.stream, DType::F32, DType::F64, &[]) }.unwrap_err();
    assert!(e.message.contains("float32 cannot be cast to float64"), "{e}");
}

pub fn scaling(gpu: &Gpu) {
    let factor = 0.3f32;
    for (places, n) in layouts() {
        let wide = values(n);
        let to = gpu.put(&wide);
        let there = pieces(&places, (0, 0), (to.address(), 4));
        // SAFETY: the pieces lie in the buffer.
        unsafe { gpu.kernels.scale(&gpu.stream, DType::F32, &there, factor) }.unwrap();
        let scaled = |i: usize| (f64::from(wide[i]) * f64::from(factor)) as f32;
        let want: Vec<f32> = (0..n).map(|i| if inside(&places, i) { scaled(i) } else { wide[i] }).collect();
        same(&gpu.get::<f32>(&to), &want, "scale");
        for dtype in [DType::BF16, DType::F16] {
            let narrow: Vec<u16> = wide.iter().map(|x| to_bits(dtype, (*x).into())).collect();
            let to = gpu.put(&narrow);
            let there = pieces(&places, (0, 0), (to.address(), 2));
            // SAFETY: as above.
            unsafe { gpu.kernels.scale(&gpu.stream, dtype, &there, factor) }.unwrap();
            for (i, got) in gpu.get::<u16>(&to).into_iter().enumerate() {
                let exact = (to_f64(dtype, narrow[i]) * f64::from(factor)) as f32;
                match inside(&places, i) {
                    true if exact.is_nan() => assert!(to_f64(dtype, got).is_nan(), "{dtype}: element {i}"),
                    true => assert_eq!(got, to_bits(dtype, exact.into()), "{dtype}: element {i}"),
                    false => assert_eq!(got, narrow[i], "{dtype}: element {i} is in no piece"),
                }
            }
        }
    }
}

pub fn gradients(gpu: &Gpu) {
    for (places, n) in layouts() {
        let (first, gradient) = (noise(11, n), values(n));
        let check = |dtype: DType, gradient: &[f32], from: u64, size: usize| {
            let to = gpu.put(&first);
            let mut there = pieces(&places, (from, size), (to.address(), 4));
            // Every other piece is added to.
            there.iter_mut().enumerate().for_each(|(i, p)| p.add = (i % 2) as u64);
            // SAFETY: the pieces lie in the buffers.
            unsafe { gpu.kernels.copy_in(&gpu.stream, dtype, &there) }.unwrap();
            let mut want = first.clone();
            for (i, (at, len)) in places.iter().enumerate() {
                for e in *at..at + len {
                    let sum = (f64::from(first[e]) + f64::from(gradient[e])) as f32;
                    want[e] = if i % 2 == 1 { sum } else { gradient[e] };
                }
            }
            same(&gpu.get::<f32>(&to), &want, dtype.name());
        };
        check(DType::F32, &gradient, gpu.put(&gradient).address(), 4);
        for dtype in [DType::BF16, DType::F16] {
            let narrow: Vec<u16> = gradient.iter().map(|x| to_bits(dtype, (*x).into())).collect();
            let rounded: Vec<f32> = narrow.iter().map(|bits| to_f64(dtype, *bits) as f32).collect();
            let from = gpu.put(&narrow);
            check(dtype, &rounded, from.address(), 2);
        }

        let to = gpu.put(&first);
        // SAFETY: the pieces lie in the buffer.
        unsafe { gpu.kernels.zero(&gpu.stream, &pieces(&places, (0, 0), (to.address(), 4))) }.unwrap();
        let want: Vec<f32> = (0..n).map(|i| if inside(&places, i) { 0.0 } else { first[i] }).collect();
        same(&gpu.get::<f32>(&to), &want, "zero");
    }
}

pub fn unscaling(gpu: &Gpu) {
    let found = gpu.put(&[0u32]);
    for shift in [false, true] {
        let (places, n) = places(&[1, 20_011, 9, 2049], shift);
        let clean = noise(5, n);
        // In a group, in the rest, in the first piece, nowhere, and where no piece is.
        let at = [Some(places[1].0 + 4096), Some(places[1].0 + 20_010), Some(places[0].0), None, Some(places[3].0 - 1)];
        for (case, bad) in at.into_iter().enumerate() {
            for (factor, value) in [(1.0f32, f32::NAN), (0.25, f32::INFINITY), (0.5, f32::NEG_INFINITY)] {
                let mut data = clean.clone();
                bad.iter().for_each(|i| data[*i] = value);
                let to = gpu.put(&data);
                let there = pieces(&places, (0, 0), (to.address(), 4));
                // SAFETY: the pieces lie in the buffer.
                unsafe {
                    gpu.stream.fill(found.address(), 0, 4).unwrap();
                    gpu.kernels.unscale(&gpu.stream, &there, factor, found.address()).unwrap();
                }
                assert_eq!(gpu.get::<u32>(&found), [u32::from(case < 3)], "case {case}, {value}");
                let scaled = |i: usize| (f64::from(data[i]) * f64::from(factor)) as f32;
                let want: Vec<f32> = (0..n).map(|i| if inside(&places, i) { scaled(i) } else { data[i] }).collect();
                same(&gpu.get::<f32>(&to), &want, "unscale");
            }
        }
    }
}

pub fn homes(gpu: &Gpu) {
    let compute = Compute::new(&gpu.stream, gpu.source.clone()).unwrap();
    let device = Cuda::new(&compute, &gpu.kernels);
    let (host, there) = (device.alloc(Home::Host, 1001, "a").unwrap(), device.alloc(Home::Device, 1001, "b").unwrap());
    let read = || {
        let mut data = vec![7f32; 1001];
        // SAFETY: 1001 floats each; waited for.
        unsafe { gpu.stream.download(there.as_ptr() as u64, data.as_mut_ptr().cast(), 4004) }.unwrap();
        gpu.stream.synchronize().unwrap();
        data
    };
    assert_eq!(read(), [0.0; 1001]);
    // SAFETY: 1001 floats of this test's own.
    let masters = unsafe { std::slice::from_raw_parts_mut(host.as_ptr(), 1001) };
    assert_eq!(masters, [0.0; 1001]);
    masters.copy_from_slice(&noise(21, 1001));
    // SAFETY: as above.
    unsafe { device.put(DType::F32, host.as_ptr().cast(), there.as_ptr(), 1001) }.unwrap();
    assert_eq!(read(), masters);
    let mut last = [0; 4];
    // SAFETY: the last of 1001 floats.
    unsafe { device.get(there.as_ptr().wrapping_add(1000).cast(), &mut last) }.unwrap();
    assert_eq!(f32::from_ne_bytes(last), masters[1000]);
    assert_eq!(compute.usage().now, 4004, "pinned memory is the host's");
    assert_eq!(device.name(), "cuda");
    assert!(!device.alloc(Home::Device, 0, "nothing").unwrap().as_ptr().is_null());
    assert!(device.alloc(Home::Device, usize::MAX, "all").is_err());
}
