//! A GPU as the engine's [`Device`]: memory of it, or pinned host memory, and the engine's arithmetic in its kernels, on the
//! host's compute stream.

use super::compute::{Compute, ComputeMemory};
use super::context::Context;
use super::kernels::{Kernels, NormOrder, Piece, Step};
use super::memory::PinnedMemory;
use crate::device::{Buffer, Device, Floats, Given, Home, Update, UpdateRule};
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::{norm, precision};
use std::sync::Arc;

/// Floats that are widened on the host at once on their way up.
const CHUNK: usize = 1 << 22;

/// See the module's text.
pub struct Cuda {
    compute: Arc<Compute>,
    kernels: Arc<Kernels>,
}

impl Cuda {
    pub fn new(compute: &Arc<Compute>, kernels: &Arc<Kernels>) -> Cuda {
        Cuda { compute: compute.clone(), kernels: kernels.clone() }
    }

    fn context(&self) -> Arc<Context> {
        self.compute.context()
    }

    /// Memory for numbers that a kernel gives, `bytes` of zeros.
    fn zeros(&self, bytes: usize, what: &str) -> Result<ComputeMemory> {
        let memory = self.compute.take(bytes, what)?;
        // SAFETY: as many bytes were taken.
        unsafe { self.compute.stream().fill(memory.address(), 0, bytes) }?;
        Ok(memory)
    }
}

fn piece(to: *const f32, len: usize) -> Piece {
    Piece { from: to as u64, to: to as u64, len: len as u64, add: 0 }
}

fn pieces(floats: &[Floats]) -> Vec<Piece> {
    floats.iter().map(|f| piece(f.data, f.len)).collect()
}

impl Device for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn gpu(&self) -> Option<usize> {
        Some(self.context().info().ordinal)
    }

    fn alloc(&self, home: Home, len: usize, what: &str) -> Result<Buffer> {
        let bytes = len.checked_mul(DType::F32.size());
        let bytes =
            bytes.ok_or_else(|| err!(OutOfMemory, "memory for {what}: {len} elements exceed the address space"))?;
        match home {
            Home::Host => {
                let memory = PinnedMemory::zeroed(&self.context(), bytes, what)?;
                Ok(Buffer::new(memory.as_ptr().cast(), memory))
            }
            Home::Device if bytes == 0 => Ok(Buffer::new(std::ptr::dangling_mut(), ())),
            Home::Device => {
                let memory = self.zeros(bytes, what)?;
                Ok(Buffer::new(memory.address() as *mut f32, memory))
            }
        }
    }

    unsafe fn put(&self, dtype: DType, from: *const u8, to: *mut f32, len: usize) -> Result<()> {
        let stream = self.compute.stream();
        let mut floats = Vec::new();
        for first in (0..len).step_by(CHUNK) {
            let here = CHUNK.min(len - first);
            floats.resize(here, 0f32);
            // SAFETY: the caller's promise; waited for before the floats are written again.
            unsafe {
                precision::widen(dtype, from.add(first * dtype.size()), floats.as_mut_ptr(), here);
                stream.upload(floats.as_ptr().cast(), to.add(first) as u64, here * DType::F32.size())?;
            }
            stream.synchronize()?;
        }
        Ok(())
    }

    unsafe fn get(&self, from: *const u8, to: &mut [u8]) -> Result<()> {
        let stream = self.compute.stream();
        // SAFETY: the caller's promise; waited for.
        unsafe { stream.download(from as u64, to.as_mut_ptr(), to.len()) }?;
        stream.synchronize()
    }

    unsafe fn accumulate(&self, dtype: DType, given: &[Given]) -> Result<()> {
        let piece = |g: &Given| Piece { from: g.from as u64, to: g.to as u64, len: g.len as u64, add: g.add.into() };
        let pieces: Vec<Piece> = given.iter().map(piece).collect();
        // SAFETY: the caller's promise.
        unsafe { self.kernels.copy_in(&self.compute.stream(), dtype, &pieces) }
    }

    unsafe fn scale(&self, floats: &[Floats], factor: f32) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.kernels.scale(&self.compute.stream(), DType::F32, &pieces(floats), factor) }
    }

    unsafe fn all_finite(&self, floats: &[Floats]) -> Result<bool> {
        let found = self.zeros(4, "a number")?;
        // SAFETY: the caller's promise; a factor of 1 writes nothing but the number.
        unsafe { self.kernels.unscale(&self.compute.stream(), &pieces(floats), 1.0, found.address()) }?;
        let mut number = [0; 4];
        // SAFETY: four bytes were taken.
        unsafe { self.get(found.address() as *const u8, &mut number) }?;
        Ok(u32::from_ne_bytes(number) == 0)
    }

    unsafe fn norm_parts(&self, order: norm::Order, floats: &[Floats]) -> Result<Vec<f64>> {
        if floats.is_empty() {
            return Ok(Vec::new());
        }
        let order = match order {
            norm::Order::Largest => NormOrder::Largest,
            norm::Order::Smallest => NormOrder::Smallest,
            norm::Order::Count => NormOrder::Count,
            norm::Order::Power(p) => NormOrder::Power(p),
        };
        let scratch = self.compute.take(Kernels::norm_scratch(floats.len()), "the parts of a norm")?;
        let out = self.compute.take(floats.len() * size_of::<f64>(), "the parts of a norm")?;
        let (stream, pieces) = (self.compute.stream(), pieces(floats));
        // SAFETY: the caller's promise; both have the room that is needed.
        unsafe { self.kernels.norm_parts(&stream, order, &pieces, scratch.address(), out.address()) }?;
        let mut bytes = vec![0; out.bytes()];
        // SAFETY: as many bytes were taken.
        unsafe { self.get(out.address() as *const u8, &mut bytes) }?;
        Ok(bytes.chunks_exact(8).map(|b| f64::from_ne_bytes(b.try_into().expect("eight bytes"))).collect())
    }

    unsafe fn update(&self, updates: &[Update]) -> Result<()> {
        let stream = self.compute.stream();
        // Parameters with the same numbers go together, as far as they are neighbours.
        for same in updates.chunk_by(|a, b| a.rule == b.rule && a.states[0].is_null() == b.states[0].is_null()) {
            let step = |u: &Update| Step {
                param: u.param.data as u64,
                grad: u.grad as u64,
                states: u.states.map(|s| s as u64),
                len: u.param.len as u64,
            };
            let steps: Vec<Step> = same.iter().map(step).collect();
            let momentum = !same[0].states[0].is_null();
            // SAFETY: the caller's promise.
            unsafe {
                match &same[0].rule {
                    UpdateRule::Sgd { numbers, first } => self.kernels.sgd(&stream, numbers, momentum, *first, &steps),
                    UpdateRule::AdamW { numbers } => self.kernels.adamw(&stream, numbers, &steps),
                }
            }?;
        }
        Ok(())
    }
}
