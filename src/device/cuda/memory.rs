//! Memory of a GPU, and host memory that it reaches.
//!
//! Device memory is taken and given back in the order of a stream: from the driver's pool, or from an allocator that
//! the host lends, so that one allocator has all memory. Whoever uses memory on other streams makes them wait for each
//! other; nothing here does.

use super::context::Context;
use super::stream::Stream;
use crate::error::{err, Result};
use cudarc::driver::sys::{CUdeviceptr, CUmemPool_attribute};
use std::ffi::c_void;
use std::sync::Arc;

/// CU_MEMHOSTALLOC_PORTABLE: pinned for every context.
pub(super) const PORTABLE: u32 = 1;

/// A host's allocator of device memory.
pub trait DeviceAllocator: Send + Sync {
    /// `bytes` (more than 0) that work on `stream` (a CUstream) may use from here on, at an address of a multiple of
    /// 256; None if there are no more.
    fn alloc(&self, bytes: usize, stream: *mut c_void) -> Option<CUdeviceptr>;
    /// Gives back what `alloc` gave: work that comes later on `stream` may use it for something else.
    fn free(&self, address: CUdeviceptr, bytes: usize, stream: *mut c_void);
}

/// Where device memory comes from.
#[derive(Clone)]
pub enum Source {
    /// The driver's pool of the GPU.
    Pool,
    Host(Arc<dyn DeviceAllocator>),
}

impl Source {
    /// The driver's pool, which keeps what is given back for later instead of returning it to the system at every
    /// synchronization.
    pub fn pool(context: &Context) -> Result<Source> {
        let mut pool = std::ptr::null_mut();
        // SAFETY: the pointer is valid.
        let code = unsafe { (context.driver.fns.cuDeviceGetDefaultMemPool)(&mut pool, context.device) };
        context.check("asking for the memory pool", code)?;
        let mut all = u64::MAX;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as i32;
        // SAFETY: the attribute is a 64-bit number.
        let code = unsafe { (context.driver.fns.cuMemPoolSetAttribute)(pool, attribute, (&raw mut all).cast()) };
        context.check("setting up the memory pool", code)?;
        Ok(Source::Pool)
    }
}

/// Device memory, given back in the order of its stream when dropped.
pub struct DeviceMemory {
    stream: Arc<Stream>,
    source: Source,
    address: CUdeviceptr,
    bytes: usize,
}

impl DeviceMemory {
    /// `bytes` for work on `stream`; `what` names the purpose in an error. The contents are arbitrary.
    pub fn new(source: &Source, stream: &Arc<Stream>, bytes: usize, what: &str) -> Result<DeviceMemory> {
        let mut memory = DeviceMemory { stream: stream.clone(), source: source.clone(), address: 0, bytes };
        if bytes == 0 {
            return Ok(memory);
        }
        let context = stream.context();
        let _current = context.enter()?;
        memory.address = match source {
            Source::Pool => {
                let mut address = 0;
                // SAFETY: the pointer and the stream are valid; given back when dropped.
                let code = unsafe { (context.driver.fns.cuMemAllocAsync)(&mut address, bytes, stream.raw()) };
                context.check(&format!("memory for {what}: {bytes} bytes"), code)?;
                address
            }
            Source::Host(allocator) => match allocator.alloc(bytes, stream.raw().cast()) {
                Some(address) if address != 0 && address % 256 == 0 => address,
                Some(address) => {
                    return Err(err!(
                        Callback,
                        "memory for {what}: the host's allocator gave the address {address:#x}"
                    ));
                }
                None => {
                    return Err(err!(OutOfMemory, "memory for {what}: the host's allocator has not got {bytes} bytes"))
                }
            },
        };
        Ok(memory)
    }

    /// Null for no bytes, else a multiple of 256.
    pub fn address(&self) -> CUdeviceptr {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.address == 0 {
            return;
        }
        let Ok(_current) = self.stream.context().enter() else { return };
        match &self.source {
            // SAFETY: taken by `new`, given back once.
            Source::Pool => unsafe {
                (self.stream.context().driver.fns.cuMemFreeAsync)(self.address, self.stream.raw());
            },
            Source::Host(allocator) => allocator.free(self.address, self.bytes, self.stream.raw().cast()),
        }
    }
}

/// Pinned host memory: copies from and to it do not wait for each other.
pub struct PinnedMemory {
    context: Arc<Context>,
    data: *mut u8,
    bytes: usize,
}

// SAFETY: an address inside memory that this keeps; its users decide who touches what when.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// `bytes`, zero at first; `what` names the purpose in an error.
    pub fn zeroed(context: &Arc<Context>, bytes: usize, what: &str) -> Result<PinnedMemory> {
        let mut data = std::ptr::dangling_mut::<u64>().cast::<c_void>();
        if bytes > 0 {
            let _current = context.enter()?;
            // SAFETY: the pointer is valid; freed when dropped.
            let code = unsafe { (context.driver.fns.cuMemHostAlloc)(&mut data, bytes, PORTABLE) };
            context.check(&format!("pinned memory for {what}: {bytes} bytes"), code)?;
            // SAFETY: as many bytes were allocated.
            unsafe { data.write_bytes(0, bytes) };
        }
        Ok(PinnedMemory { context: context.clone(), data: data.cast(), bytes })
    }

    /// Aligned to a page; dangling for no bytes.
    pub fn as_ptr(&self) -> *mut u8 {
        self.data
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        if let Ok(_current) = self.context.enter() {
            // SAFETY: allocated by `zeroed`, freed once.
            unsafe { (self.context.driver.fns.cuMemFreeHost)(self.data.cast()) };
        }
    }
}

impl Stream {
    /// Copies host memory to the device, in the stream's order. From pinned memory it does not wait.
    ///
    /// # Safety
    /// `from` is readable and `to` writable for `bytes`; pinned memory until the copy is done, other memory until this
    /// returns.
    pub unsafe fn upload(&self, from: *const u8, to: CUdeviceptr, bytes: usize) -> Result<()> {
        self.copy(bytes, "a copy to the device", |fns| {
            // SAFETY: the caller's promise.
            unsafe { (fns.cuMemcpyHtoDAsync_v2)(to, from.cast(), bytes, self.raw()) }
        })
    }

    /// Copies device memory to the host, in the stream's order. To pinned memory it does not wait, so the bytes are
    /// there once the stream has come that far.
    ///
    /// # Safety
    /// As [`Stream::upload`].
    pub unsafe fn download(&self, from: CUdeviceptr, to: *mut u8, bytes: usize) -> Result<()> {
        self.copy(bytes, "a copy from the device", |fns| {
            // SAFETY: the caller's promise.
            unsafe { (fns.cuMemcpyDtoHAsync_v2)(to.cast(), from, bytes, self.raw()) }
        })
    }

    /// Copies within the device, in the stream's order.
    ///
    /// # Safety
    /// `from` is readable and `to` writable for `bytes` when the copy runs; they do not overlap.
    pub unsafe fn copy_on_device(&self, from: CUdeviceptr, to: CUdeviceptr, bytes: usize) -> Result<()> {
        self.copy(bytes, "a copy on the device", |fns| {
            // SAFETY: the caller's promise.
            unsafe { (fns.cuMemcpyDtoDAsync_v2)(to, from, bytes, self.raw()) }
        })
    }

    /// Fills device memory with a byte, in the stream's order.
    ///
    /// # Safety
    /// `to` is writable for `bytes` when this runs.
    pub unsafe fn fill(&self, to: CUdeviceptr, value: u8, bytes: usize) -> Result<()> {
        self.copy(bytes, "filling memory of the device", |fns| {
            // SAFETY: the caller's promise.
            unsafe { (fns.cuMemsetD8Async)(to, value, bytes, self.raw()) }
        })
    }

    fn copy(&self, bytes: usize, doing: &str, f: impl FnOnce(&super::driver::DriverFunctions) -> i32) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let _current = self.context().enter()?;
        self.context().check(doing, f(&self.context().driver.fns))
    }
}
