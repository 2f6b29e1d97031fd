//! A GPU as the engine's [`Device`]: shards in its memory, or with a home in pinned host memory.

use super::context::Context;
use super::memory::{DeviceMemory, PinnedMemory, Source};
use super::stream::Stream;
use crate::device::{Buffer, Device, Home};
use crate::dtype::DType;
use crate::error::{err, Result};
use std::sync::Arc;

/// See the module's text. Memory is zeroed and copied in the order of one stream, and there when a call returns.
pub struct Cuda {
    stream: Arc<Stream>,
    source: Source,
}

impl Cuda {
    /// Takes device memory from `source`, for work on `stream`.
    pub fn new(stream: &Arc<Stream>, source: Source) -> Cuda {
        Cuda { stream: stream.clone(), source }
    }

    pub fn context(&self) -> &Arc<Context> {
        self.stream.context()
    }
}

impl Device for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn alloc(&self, home: Home, len: usize, what: &str) -> Result<Buffer> {
        let bytes = len.checked_mul(DType::F32.size());
        let bytes =
            bytes.ok_or_else(|| err!(OutOfMemory, "memory for {what}: {len} elements exceed the address space"))?;
        match home {
            Home::Host => {
                let memory = PinnedMemory::zeroed(self.context(), bytes, what)?;
                Ok(Buffer::new(memory.as_ptr().cast(), memory))
            }
            Home::Device if bytes == 0 => Ok(Buffer::new(std::ptr::dangling_mut(), ())),
            Home::Device => {
                let memory = DeviceMemory::new(&self.source, &self.stream, bytes, what)?;
                // SAFETY: as many bytes were allocated.
                unsafe { self.stream.fill(memory.address(), 0, bytes) }?;
                self.stream.synchronize()?;
                Ok(Buffer::new(memory.address() as *mut f32, memory))
            }
        }
    }

    unsafe fn upload(&self, from: *const f32, to: *mut f32, len: usize) -> Result<()> {
        // SAFETY: the caller's promise; waited for.
        unsafe { self.stream.upload(from.cast(), to as u64, len * DType::F32.size()) }?;
        self.stream.synchronize()
    }
}
