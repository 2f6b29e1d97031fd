//! The CPU as a device: its memory is the host's, so both homes are the same kind, and an upload is a copy.

use super::{Buffer, Device, Floats, Given, Home, Update, UpdateRule};
use crate::dtype::DType;
use crate::error::Result;
use crate::memory::HostBuffer;
use crate::{norm, precision};
use std::slice::{from_raw_parts, from_raw_parts_mut};

pub struct Cpu;

impl Device for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn alloc(&self, _home: Home, len: usize, what: &str) -> Result<Buffer> {
        let memory = HostBuffer::zeroed(len, what)?;
        Ok(Buffer::new(memory.as_ptr(), memory))
    }

    unsafe fn put(&self, dtype: DType, from: *const u8, to: *mut f32, len: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { precision::widen(dtype, from, to, len) };
        Ok(())
    }

    unsafe fn get(&self, from: *const u8, to: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn accumulate(&self, dtype: DType, given: &[Given]) -> Result<()> {
        for Given { from, to, len, add } in given.iter().copied() {
            // SAFETY: the caller's promise.
            unsafe {
                match add {
                    false => precision::widen(dtype, from, to, len),
                    true => precision::add(dtype, from, to, len),
                }
            }
        }
        Ok(())
    }

    unsafe fn scale(&self, pieces: &[Floats], factor: f32) -> Result<()> {
        for piece in pieces.iter().filter(|p| p.len > 0) {
            // SAFETY: the caller's promise.
            let floats = unsafe { from_raw_parts_mut(piece.data, piece.len) };
            floats.iter_mut().for_each(|x| *x *= factor);
        }
        Ok(())
    }

    unsafe fn all_finite(&self, pieces: &[Floats]) -> Result<bool> {
        // SAFETY: the caller's promise.
        let finite = |p: &Floats| unsafe { from_raw_parts(p.data, p.len) }.iter().all(|x| x.is_finite());
        Ok(pieces.iter().filter(|p| p.len > 0).all(finite))
    }

    unsafe fn norm_parts(&self, order: norm::Order, pieces: &[Floats]) -> Result<Vec<f64>> {
        let part = |p: &Floats| match p.len {
            0 => order.part::<f32>(&[]),
            // SAFETY: the caller's promise.
            len => order.part(unsafe { from_raw_parts(p.data, len) }),
        };
        Ok(pieces.iter().map(part).collect())
    }

    unsafe fn update(&self, updates: &[Update]) -> Result<()> {
        for Update { rule, param: Floats { data, len }, grad, states } in updates.iter().filter(|u| u.param.len > 0) {
            // SAFETY: the caller's promise.
            let (param, grad) = unsafe { (from_raw_parts_mut(*data, *len), from_raw_parts(*grad, *len)) };
            // SAFETY: as above.
            let state = |i: usize| (!states[i].is_null()).then(|| unsafe { from_raw_parts_mut(states[i], *len) });
            match rule {
                UpdateRule::Sgd { numbers, first } => numbers.step(param, grad, state(0), *first),
                UpdateRule::AdamW { numbers } => {
                    if let (Some(exp_avg), Some(exp_avg_sq)) = (state(0), state(1)) {
                        numbers.step(param, grad, exp_avg, exp_avg_sq);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_homes_are_zeroed_memory_of_the_host() {
        let (host, device) = (Cpu.alloc(Home::Host, 100, "a").unwrap(), Cpu.alloc(Home::Device, 100, "b").unwrap());
        // SAFETY: 100 floats each, of this test alone.
        unsafe {
            assert_eq!(*device.as_ptr().add(99), 0.0);
            host.as_ptr().add(99).write(7.0);
            Cpu.put(DType::F32, host.as_ptr().cast(), device.as_ptr(), 100).unwrap();
            let mut last = [0; 4];
            Cpu.get(device.as_ptr().add(99).cast(), &mut last).unwrap();
            assert_eq!(f32::from_ne_bytes(last), 7.0);
        }
        assert_eq!(Cpu.name(), "cpu");
    }
}
