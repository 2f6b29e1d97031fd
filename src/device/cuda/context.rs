//! A GPU and its primary context.

use super::driver::Driver;
use crate::error::{err, Result};
use cudarc::driver::sys::{CUcontext, CUdevice, CUdevice_attribute};
use std::ffi::{c_char, CStr};
use std::marker::PhantomData;
use std::sync::Arc;

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number among those that this process sees (CUDA_VISIBLE_DEVICES).
    pub ordinal: usize,
    pub name: String,
    /// Compute capability (major, minor).
    pub capability: (i32, i32),
    pub multiprocessors: usize,
    /// Bytes of its memory.
    pub memory: usize,
    /// Whether memory can be taken and given back in the order of a stream.
    pub has_pools: bool,
}

/// All GPUs that this process sees.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    let driver = Driver::get()?;
    (0..driver.device_count()?).map(|ordinal| Ok(describe(driver, ordinal)?.1)).collect()
}

fn describe(driver: &Driver, ordinal: usize) -> Result<(CUdevice, DeviceInfo)> {
    let doing = format!("describing GPU {ordinal}");
    let mut device = 0;
    // SAFETY: the pointers are valid; the driver refuses a number that is no GPU's.
    driver.check(&doing, unsafe { (driver.fns.cuDeviceGet)(&mut device, ordinal as i32) })?;
    let attribute = |attribute: CUdevice_attribute| {
        let mut value = 0;
        // SAFETY: as above.
        let code = unsafe { (driver.fns.cuDeviceGetAttribute)(&mut value, attribute as i32, device) };
        driver.check(&doing, code).map(|()| value)
    };
    let mut name: [c_char; 256] = [0; 256];
    let mut memory = 0;
    // SAFETY: the driver writes at most as many bytes as it is told, and a NUL among them.
    driver.check(&doing, unsafe { (driver.fns.cuDeviceGetName)(name.as_mut_ptr(), 255, device) })?;
    // SAFETY: the pointer is valid.
    driver.check(&doing, unsafe { (driver.fns.cuDeviceTotalMem_v2)(&mut memory, device) })?;
    // SAFETY: the array was zero, and its last byte still is.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    use CUdevice_attribute as A;
    let info = DeviceInfo {
        ordinal,
        name,
        capability: (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        memory,
        has_pools: attribute(A::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? != 0,
    };
    Ok((device, info))
}

/// A GPU's primary context, kept while this lives.
pub struct Context {
    pub(super) driver: &'static Driver,
    pub(super) device: CUdevice,
    raw: CUcontext,
    info: DeviceInfo,
}

// SAFETY: contexts may be used by any thread that makes them current, which `enter` does.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Context {}

/// While it lives, the context is this thread's current one.
pub struct Current<'a> {
    context: &'a Context,
    /// Whether it was not before.
    pushed: bool,
    /// Belongs to its thread.
    _thread: PhantomData<*const ()>,
}

impl Context {
    /// The primary context of GPU `ordinal`. `Unsupported` without a driver, without such a GPU, or if the GPU has no
    /// memory pools.
    pub fn new(ordinal: usize) -> Result<Arc<Context>> {
        let driver = Driver::get().map_err(|e| e.context(format!("GPU {ordinal} cannot be used")))?;
        let count = driver.device_count()?;
        if ordinal >= count {
            let visible =
                std::env::var("CUDA_VISIBLE_DEVICES").map_or(String::new(), |v| format!(" (CUDA_VISIBLE_DEVICES={v})"));
            return Err(err!(Unsupported, "there is no GPU {ordinal}: this process sees {count}{visible}"));
        }
        let (device, info) = describe(driver, ordinal)?;
        if !info.has_pools {
            return Err(err!(
                Unsupported,
                "GPU {ordinal} ({}) has no memory pools: a newer one or its driver is needed",
                info.name
            ));
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: the device is one; released when dropped.
        let code = unsafe { (driver.fns.cuDevicePrimaryCtxRetain)(&mut raw, device) };
        driver.check(format_args!("opening the context of GPU {ordinal}"), code)?;
        Ok(Arc::new(Context { driver, device, raw, info }))
    }

    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Whether it is the same GPU's.
    pub fn is(&self, other: &Context) -> bool {
        self.raw == other.raw
    }

    /// Makes the context this thread's current one until the result is dropped.
    pub fn enter(&self) -> Result<Current<'_>> {
        let mut now = std::ptr::null_mut();
        // SAFETY: the pointer is valid.
        self.check("asking for the current context", unsafe { (self.driver.fns.cuCtxGetCurrent)(&mut now) })?;
        let pushed = now != self.raw;
        if pushed {
            // SAFETY: the context is retained.
            self.check("entering the context", unsafe { (self.driver.fns.cuCtxPushCurrent_v2)(self.raw) })?;
        }
        Ok(Current { context: self, pushed, _thread: PhantomData })
    }

    /// Free and all bytes of the GPU's memory.
    pub fn memory_info(&self) -> Result<(usize, usize)> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are valid.
        self.check("asking for free memory", unsafe { (self.driver.fns.cuMemGetInfo_v2)(&mut free, &mut total) })?;
        Ok((free, total))
    }

    /// [`Driver::check`] with the GPU's number.
    pub(super) fn check(&self, doing: &str, code: super::driver::Code) -> Result<()> {
        match code {
            0 => Ok(()),
            code => self.driver.check(format_args!("GPU {}: {doing}", self.info.ordinal), code),
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `new`. A failure leaves nothing to be done: the process is ending.
        unsafe { (self.driver.fns.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = std::ptr::null_mut();
            // SAFETY: the context that this thread pushed last: guards are dropped in reverse.
            unsafe { (self.context.driver.fns.cuCtxPopCurrent_v2)(&mut popped) };
        }
    }
}
