//! CUDA: contexts, streams, events, memory and kernels of one GPU, through the driver and the run-time compiler.
//!
//! Neither is linked: `driver` looks for them when a GPU is asked for, and a machine without them gets an error that
//! says so. `context` is a GPU's primary context, the one that LibTorch uses too, so that streams and addresses can be
//! exchanged with it. `stream` orders work, `memory` is taken and given back in the order of a stream, `compute` is the host's
//! stream and memory for work on it, `compile` turns
//! the sources in `kernels/` into machine code once, and `kernels` launches them. `device` is the engine's view of all
//! that.

pub mod compile;
mod compute;
mod context;
mod device;
mod driver;
pub mod kernels;
mod memory;
mod stream;

pub use compute::{Compute, ComputeMemory, Usage};
pub use context::{devices, Context, Current, DeviceInfo};
pub use device::Cuda;
pub use driver::{Compiler, Driver};
pub use memory::{DeviceAllocator, DeviceMemory, PinnedMemory, Source};
pub use stream::{Event, Priority, Stream};
