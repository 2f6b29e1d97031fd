//! The CPU as a device: its memory is the host's, so both homes are the same kind, and an upload is a copy.

use super::{Buffer, Device, Home};
use crate::error::Result;
use crate::memory::HostBuffer;

pub struct Cpu;

impl Device for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn alloc(&self, _home: Home, len: usize, what: &str) -> Result<Buffer> {
        let memory = HostBuffer::zeroed(len, what)?;
        Ok(Buffer::new(memory.as_ptr(), memory))
    }

    unsafe fn upload(&self, from: *const f32, to: *mut f32, len: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_homes_are_zeroed_memory_that_uploads() {
        let (host, device) = (Cpu.alloc(Home::Host, 100, "a").unwrap(), Cpu.alloc(Home::Device, 100, "b").unwrap());
        // SAFETY: 100 floats each, of this test alone.
        unsafe {
            assert_eq!(*device.as_ptr().add(99), 0.0);
            host.as_ptr().add(99).write(7.0);
            Cpu.upload(host.as_ptr(), device.as_ptr(), 100).unwrap();
            assert_eq!(*device.as_ptr().add(99), 7.0);
        }
        assert_eq!(Cpu.name(), "cpu");
    }
}
