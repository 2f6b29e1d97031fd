//! The host's compute stream, which may change, and device memory for work on it.
//!
//! Work on the compute stream is one sequence, whichever stream it is at a time: a new one starts after what the old one has
//! been given. Memory is taken for the stream of that moment, and given back in the order of the whole sequence.

use super::context::Context;
use super::memory::{DeviceMemory, Source};
use super::stream::{Event, Stream};
use crate::error::Result;
use cudarc::driver::sys::CUdeviceptr;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub now: u64,
    pub peak: u64,
}

/// See the module's text.
pub struct Compute {
    source: Source,
    stream: Mutex<Arc<Stream>>,
    /// Where one stream was left for another.
    left: Event,
    usage: Mutex<Usage>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Compute {
    /// Begins with `stream`; memory comes from `source`.
    pub fn new(stream: &Arc<Stream>, source: Source) -> Result<Arc<Compute>> {
        Ok(Arc::new(Compute {
            source,
            left: Event::new(stream.context())?,
            stream: Mutex::new(stream.clone()),
            usage: Mutex::default(),
        }))
    }

    /// The stream that the host computes on now.
    pub fn stream(&self) -> Arc<Stream> {
        lock(&self.stream).clone()
    }

    pub fn context(&self) -> Arc<Context> {
        lock(&self.stream).context().clone()
    }

    /// The host computes on `raw` (a CUstream) from here on.
    ///
    /// # Safety
    /// It is a stream of the context as long as this is used.
    pub unsafe fn switch(&self, raw: *mut c_void) -> Result<()> {
        let mut stream = lock(&self.stream);
        if stream.raw().cast() == raw {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let new = unsafe { Stream::borrowed(stream.context(), raw) }?;
        self.left.record(&stream)?;
        new.wait(&self.left)?;
        *stream = new;
        Ok(())
    }

    /// `bytes` of memory; `what` names the purpose in an error. The contents are arbitrary.
    pub fn take(self: &Arc<Self>, bytes: usize, what: &str) -> Result<ComputeMemory> {
        let stream = self.stream();
        let memory = DeviceMemory::new(&self.source, &stream, bytes, what)?;
        self.count(bytes, 0);
        Ok(ComputeMemory { memory, stream, compute: self.clone() })
    }

    /// So many bytes of device memory were taken, and so many given back.
    pub fn count(&self, taken: usize, given_back: usize) {
        let mut usage = lock(&self.usage);
        usage.now = usage.now + taken as u64 - given_back as u64;
        usage.peak = usage.peak.max(usage.now);
    }

    /// What is taken now, and was at most.
    pub fn usage(&self) -> Usage {
        *lock(&self.usage)
    }
}

/// Device memory, given back after what the compute stream has been given by then.
pub struct ComputeMemory {
    memory: DeviceMemory,
    /// The one that it was taken for.
    stream: Arc<Stream>,
    compute: Arc<Compute>,
}

impl ComputeMemory {
    /// Null for no bytes, else a multiple of 256.
    pub fn address(&self) -> CUdeviceptr {
        self.memory.address()
    }

    pub fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

impl Drop for ComputeMemory {
    fn drop(&mut self) {
        let now = lock(&self.compute.stream);
        if now.raw() != self.stream.raw() {
            // A device that fails now frees it all the same.
            let _ = self.compute.left.record(&now).and_then(|()| self.stream.wait(&self.compute.left));
        }
        self.compute.count(0, self.memory.bytes());
    }
}
