//! Where an engine computes: memory there, and the engine's arithmetic on it.
//!
//! Unit buffers lie on the device. Shards, gradient shards and optimizer state have a *home*: the device, or the host's
//! memory (CPU offload), where the CPU does the arithmetic.

use crate::dtype::DType;
use crate::error::Result;
use crate::norm;
use crate::optim::{AdamWStep, SgdStep};
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

/// Floats of the device.
#[derive(Clone, Copy, Debug)]
pub struct Floats {
    pub data: *mut f32,
    pub len: usize,
}

/// Elements of a gradient that a host gives.
#[derive(Clone, Copy, Debug)]
pub struct Given {
    pub from: *const u8,
    /// Floats of the device.
    pub to: *mut f32,
    pub len: usize,
    /// To be added; else to be written.
    pub add: bool,
}

/// One parameter's piece in an optimizer's step: memory of the device.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    pub rule: UpdateRule,
    pub param: Floats,
    /// As long as the parameter's piece, like the states.
    pub grad: *const f32,
    /// SGD: the momentum buffer, null without momentum. AdamW: exp_avg, exp_avg_sq.
    pub states: [*mut f32; 2],
}

/// What an optimizer does in a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum UpdateRule {
    /// What the momentum buffer holds does not matter in the `first` step.
    Sgd {
        numbers: SgdStep,
        first: bool,
    },
    AdamW {
        numbers: AdamWStep,
    },
}

/// A kind of device. Addresses are of its memory unless said otherwise. What changes memory happens in the order of calls, and
/// in that of the host's compute; what returns numbers or bytes has waited for them.
pub trait Device: Send + Sync {
    /// How messages call it.
    fn name(&self) -> &'static str;

    /// The number of the GPU that it is; None: the CPU.
    fn gpu(&self) -> Option<usize> {
        None
    }

    /// `len` floats; `what` names the purpose in an error. Takes memory when written, where the system can do that.
    fn alloc(&self, home: Home, len: usize, what: &str) -> Result<Buffer>;

    /// Widens `len` elements of `dtype` in host memory to floats of the device. Returns when `from` may be written again.
    ///
    /// # Safety
    /// `from` is readable and `to` writable for as many, by nobody else meanwhile; they do not overlap.
    unsafe fn put(&self, dtype: DType, from: *const u8, to: *mut f32, len: usize) -> Result<()>;

    /// Copies bytes of the device to host memory.
    ///
    /// # Safety
    /// `from` is readable for as many.
    unsafe fn get(&self, from: *const u8, to: &mut [u8]) -> Result<()>;

    /// Widens or adds, in float32, gradients of `dtype` on the device; all at once.
    ///
    /// # Safety
    /// Of each as [`Device::put`], with `from` on the device. No two are written to the same place.
    unsafe fn accumulate(&self, dtype: DType, given: &[Given]) -> Result<()>;

    /// Multiplies all by `factor`.
    ///
    /// # Safety
    /// The pieces are writable, by nobody else meanwhile.
    unsafe fn scale(&self, pieces: &[Floats], factor: f32) -> Result<()>;

    /// Whether no element is infinite or NaN.
    ///
    /// # Safety
    /// The pieces are readable.
    unsafe fn all_finite(&self, pieces: &[Floats]) -> Result<bool>;

    /// The part of a norm that each piece is: see [`crate::norm`].
    ///
    /// # Safety
    /// The pieces are readable.
    unsafe fn norm_parts(&self, order: norm::Order, pieces: &[Floats]) -> Result<Vec<f64>>;

    /// An optimizer's step.
    ///
    /// # Safety
    /// All memory of the updates is there, used by nobody else meanwhile, and does not overlap.
    unsafe fn update(&self, updates: &[Update]) -> Result<()>;
}
