//! A GPU (or what stands in for it) with all that a test needs, and random data of awkward sizes.

use fsdp::device::cuda::kernels::{Kernels, Piece};
use fsdp::device::cuda::{Context, DeviceMemory, Priority, Source, Stream};
use std::sync::Arc;

pub struct Gpu {
    pub stream: Arc<Stream>,
    pub kernels: Arc<Kernels>,
    pub source: Source,
}

/// Lengths around the groups of eight and the blocks of 256 threads.
pub const LENGTHS: [usize; 9] = [1, 7, 8, 9, 64, 255, 2049, 4096, 20_011];

impl Gpu {
    pub fn new() -> Gpu {
        let context = Context::new(0).unwrap();
        let stream = Stream::new(&context, Priority::Usual).unwrap();
        let kernels = Kernels::load(&context).unwrap();
        let source = Source::pool(&context).unwrap();
        Gpu { stream, kernels, source }
    }

    pub fn put<T: Copy>(&self, data: &[T]) -> DeviceMemory {
        let memory = DeviceMemory::new(&self.source, &self.stream, size_of_val(data), "a test").unwrap();
        // SAFETY: as many bytes on both sides; waited for, so that the data may go.
        unsafe { self.stream.upload(data.as_ptr().cast(), memory.address(), size_of_val(data)) }.unwrap();
        self.stream.synchronize().unwrap();
        memory
    }

    pub fn get<T: Copy + Default>(&self, memory: &DeviceMemory) -> Vec<T> {
        let mut data = vec![T::default(); memory.bytes() / size_of::<T>()];
        // SAFETY: as many bytes on both sides; waited for.
        unsafe { self.stream.download(memory.address(), data.as_mut_ptr().cast(), memory.bytes()) }.unwrap();
        self.stream.synchronize().unwrap();
        data
    }
}

/// Pieces of these lengths one after the other with a gap of at least one element, at addresses that are a multiple of
/// 16 bytes, or one element past one where `shift`. Returns each piece's first element and length, and how many
/// elements there are in all.
pub fn places(lengths: &[usize], shift: bool) -> (Vec<(usize, usize)>, usize) {
    let mut at = 16;
    let mut places = Vec::new();
    for len in lengths {
        places.push((at + usize::from(shift), *len));
        at += (len + 2).next_multiple_of(16);
    }
    (places, at + 16)
}

/// Pieces from and to such places in buffers of elements of these sizes.
pub fn pieces(places: &[(usize, usize)], from: (u64, usize), to: (u64, usize)) -> Vec<Piece> {
    let piece = |(at, len): &(usize, usize)| Piece {
        from: from.0 + (at * from.1) as u64,
        to: to.0 + (at * to.1) as u64,
        len: *len as u64,
        add: 0,
    };
    places.iter().map(piece).collect()
}

/// Numbers of many magnitudes and both signs; every tenth is 0.
pub fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = |i: usize| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        match i % 10 {
            9 => 0.0,
            _ => ((x >> 40) as f32 / 8388608.0 - 1.0) * 10f32.powi((x % 5) as i32 - 4),
        }
    };
    (0..n).map(&mut next).collect()
}

/// The same bits, NaNs aside.
pub fn same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan()), "{what}: element {i} is {g}, not {w}");
    }
}
