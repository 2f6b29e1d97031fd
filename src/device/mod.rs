//! Where an engine computes, and how memory gets there.
//!
//! Unit buffers lie on the device, in memory of the communicator. Shards, gradient shards and optimizer state have a *home*:
//! the device, or the host's memory (CPU offload), from where masters are uploaded when a READ phase opens.

use crate::error::Result;
use std::any::Any;

mod cpu;
pub mod cuda;

pub use cpu::Cpu;

/// Where shards, gradient shards and optimizer state lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    Device,
    Host,
}

/// Floats, zero at first; freed when dropped.
pub struct Buffer {
    data: *mut f32,
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: an address inside memory that `_owner` keeps; its users decide who touches what when.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Memory at `data`, kept by `owner`.
    pub fn new(data: *mut f32, owner: impl Any + Send + Sync) -> Buffer {
        Buffer { data, _owner: Box::new(owner) }
    }

    /// Never null.
    pub fn as_ptr(&self) -> *mut f32 {
        self.data
    }
}

/// A kind of device.
pub trait Device: Send + Sync {
    /// How messages call it.
    fn name(&self) -> &'static str;

    /// `len` floats; `what` names the purpose in an error. Takes memory when written, where the system can do that.
    fn alloc(&self, home: Home, len: usize, what: &str) -> Result<Buffer>;

    /// Copies floats from a buffer whose home is the host to the device. Returns when `from` may be written again.
    ///
    /// # Safety
    /// `from` is readable and `to`, on the device, writable for `len` floats, by nobody else meanwhile; they do not overlap.
    unsafe fn upload(&self, from: *const f32, to: *mut f32, len: usize) -> Result<()>;
}
