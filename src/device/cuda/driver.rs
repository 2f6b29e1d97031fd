//! CUDA's driver and its compiler, as far as they are used: loaded at run time, every result code checked.
//!
//! Result codes are numbers here and not cudarc's enums: a newer driver may return one that an enum does not have.

use crate::error::{err, Error, Result, Status};
use crate::library::{functions, Library, Search};
use cudarc::driver::sys::{CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmemoryPool, CUmodule, CUstream};
use cudarc::nvrtc::sys::nvrtcProgram;
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::sync::OnceLock;

/// CUresult.
pub type Code = c_int;

const SUCCESS: Code = 0;
const OUT_OF_MEMORY: Code = 2;
/// CUDA_ERROR_STUB_LIBRARY, NO_DEVICE, NO_BINARY_FOR_GPU, UNSUPPORTED_PTX_VERSION, NOT_SUPPORTED,
/// SYSTEM_DRIVER_MISMATCH, COMPAT_NOT_SUPPORTED_ON_DEVICE: what this machine cannot do.
const UNSUPPORTED: [Code; 7] = [34, 100, 209, 222, 801, 803, 804];

functions! {
    /// The driver's functions, by their C names. Optional is what came with CUDA 12.4.
    pub struct DriverFunctions {
        fn cuInit(c_uint) -> Code;
        fn cuDriverGetVersion(*mut c_int) -> Code;
        fn cuGetErrorName(Code, *mut *const c_char) -> Code;
        fn cuGetErrorString(Code, *mut *const c_char) -> Code;
        fn cuDeviceGetCount(*mut c_int) -> Code;
        fn cuDeviceGet(*mut CUdevice, c_int) -> Code;
        fn cuDeviceGetName(*mut c_char, c_int, CUdevice) -> Code;
        fn cuDeviceGetAttribute(*mut c_int, c_int, CUdevice) -> Code;
        fn cuDeviceTotalMem_v2(*mut usize, CUdevice) -> Code;
        fn cuDeviceGetDefaultMemPool(*mut CUmemoryPool, CUdevice) -> Code;
        fn cuMemPoolSetAttribute(CUmemoryPool, c_int, *mut c_void) -> Code;
        fn cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice) -> Code;
        fn cuDevicePrimaryCtxRelease_v2(CUdevice) -> Code;
        fn cuCtxGetCurrent(*mut CUcontext) -> Code;
        fn cuCtxPushCurrent_v2(CUcontext) -> Code;
        fn cuCtxPopCurrent_v2(*mut CUcontext) -> Code;
        fn cuCtxGetStreamPriorityRange(*mut c_int, *mut c_int) -> Code;
        fn cuStreamCreateWithPriority(*mut CUstream, c_uint, c_int) -> Code;
        fn cuStreamDestroy_v2(CUstream) -> Code;
        fn cuStreamSynchronize(CUstream) -> Code;
        fn cuStreamWaitEvent(CUstream, CUevent, c_uint) -> Code;
        fn cuEventCreate(*mut CUevent, c_uint) -> Code;
        fn cuEventDestroy_v2(CUevent) -> Code;
        fn cuEventRecord(CUevent, CUstream) -> Code;
        fn cuEventQuery(CUevent) -> Code;
        fn cuEventSynchronize(CUevent) -> Code;
        fn cuMemGetInfo_v2(*mut usize, *mut usize) -> Code;
        fn cuMemAllocAsync(*mut CUdeviceptr, usize, CUstream) -> Code;
        fn cuMemFreeAsync(CUdeviceptr, CUstream) -> Code;
        fn cuMemHostAlloc(*mut *mut c_void, usize, c_uint) -> Code;
        fn cuMemFreeHost(*mut c_void) -> Code;
        fn cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream) -> Code;
        fn cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream) -> Code;
        fn cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream) -> Code;
        fn cuMemsetD8Async(CUdeviceptr, u8, usize, CUstream) -> Code;
        fn cuModuleLoadData(*mut CUmodule, *const c_void) -> Code;
        fn cuModuleUnload(CUmodule) -> Code;
        fn cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char) -> Code;
        fn cuLaunchKernel(
            CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void,
            *mut *mut c_void
        ) -> Code;
    }
    optional {
        fn cuFuncLoad(CUfunction) -> Code;
    }
}

functions! {
    /// The run-time compiler's functions, by their C names.
    pub struct CompilerFunctions {
        fn nvrtcVersion(*mut c_int, *mut c_int) -> c_int;
        fn nvrtcGetErrorString(c_int) -> *const c_char;
        fn nvrtcGetNumSupportedArchs(*mut c_int) -> c_int;
        fn nvrtcGetSupportedArchs(*mut c_int) -> c_int;
        fn nvrtcCreateProgram(
            *mut nvrtcProgram, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        ) -> c_int;
        fn nvrtcDestroyProgram(*mut nvrtcProgram) -> c_int;
        fn nvrtcCompileProgram(nvrtcProgram, c_int, *const *const c_char) -> c_int;
        fn nvrtcGetProgramLogSize(nvrtcProgram, *mut usize) -> c_int;
        fn nvrtcGetProgramLog(nvrtcProgram, *mut c_char) -> c_int;
        fn nvrtcGetPTXSize(nvrtcProgram, *mut usize) -> c_int;
        fn nvrtcGetPTX(nvrtcProgram, *mut c_char) -> c_int;
        fn nvrtcGetCUBINSize(nvrtcProgram, *mut usize) -> c_int;
        fn nvrtcGetCUBIN(nvrtcProgram, *mut c_char) -> c_int;
    }
    optional {}
}

/// The driver, initialized.
pub struct Driver {
    pub fns: DriverFunctions,
    library: Library,
}

/// The run-time compiler.
pub struct Compiler {
    pub fns: CompilerFunctions,
    library: Library,
}

impl Driver {
    /// Where it is looked for.
    pub const SEARCH: Search<'static> = Search {
        what: "CUDA's driver",
        variable: "FSDP_CUDA_LIBRARY",
        names: &["libcuda.so.1", "libcuda.so"],
        symbol: "cuInit",
    };

    /// The process's driver: found and initialized by the first call, whose error every later call returns too.
    pub fn get() -> Result<&'static Driver> {
        static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
        DRIVER.get_or_init(Driver::load).as_ref().map_err(Error::clone)
    }

    fn load() -> Result<Driver> {
        let library = Driver::SEARCH.load()?;
        let driver = Driver { fns: DriverFunctions::load(&library)?, library };
        // SAFETY: 0 is the one flag there is.
        driver.check("starting CUDA's driver (cuInit)", unsafe { (driver.fns.cuInit)(0) })?;
        Ok(driver)
    }

    /// The file that it was loaded from.
    pub fn path(&self) -> &str {
        self.library.path()
    }

    /// The newest CUDA that it can serve, as (major, minor).
    pub fn version(&self) -> Result<(i32, i32)> {
        let mut version = 0;
        // SAFETY: the pointer is valid.
        self.check("asking for the driver's version", unsafe { (self.fns.cuDriverGetVersion)(&mut version) })?;
        Ok((version / 1000, version % 1000 / 10))
    }

    /// How many GPUs this process sees; the driver calls none an error, this does not.
    pub fn device_count(&self) -> Result<usize> {
        let mut count = 0;
        // SAFETY: the pointer is valid.
        match unsafe { (self.fns.cuDeviceGetCount)(&mut count) } {
            100 => Ok(0),
            code => self.check("counting GPUs", code).map(|()| count as usize),
        }
    }

    /// An error that says `doing` what failed and how, unless `code` is success.
    pub fn check(&self, doing: impl std::fmt::Display, code: Code) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        let status = match code {
            OUT_OF_MEMORY => Status::OutOfMemory,
            _ if UNSUPPORTED.contains(&code) => Status::Unsupported,
            _ => Status::Device,
        };
        Err(Error::new(status, format!("{doing}: {}", self.describe(code))))
    }

    fn describe(&self, code: Code) -> String {
        let text = |of: unsafe extern "C" fn(Code, *mut *const c_char) -> Code| {
            let mut text = std::ptr::null();
            // SAFETY: the driver sets the pointer to a string of its own, or to null for a code that it does not know.
            unsafe {
                of(code, &mut text);
                (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        match (text(self.fns.cuGetErrorName), text(self.fns.cuGetErrorString)) {
            (Some(name), Some(words)) => format!("{words} ({name})"),
            _ => format!("CUDA error {code}"),
        }
    }
}

impl Compiler {
    /// Where it is looked for: the newest CUDA's first.
    pub const SEARCH: Search<'static> = Search {
        what: "CUDA's run-time compiler (NVRTC)",
        variable: "FSDP_NVRTC_LIBRARY",
        names: &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"],
        symbol: "nvrtcCompileProgram",
    };

    /// The process's compiler: found by the first call, whose error every later call returns too.
    pub fn get() -> Result<&'static Compiler> {
        static COMPILER: OnceLock<Result<Compiler>> = OnceLock::new();
        let load = || {
            let library = Compiler::SEARCH.load()?;
            Ok(Compiler { fns: CompilerFunctions::load(&library)?, library })
        };
        COMPILER.get_or_init(load).as_ref().map_err(Error::clone)
    }

    /// The file that it was loaded from.
    pub fn path(&self) -> &str {
        self.library.path()
    }

    /// (major, minor).
    pub fn version(&self) -> Result<(i32, i32)> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the pointers are valid.
        self.check("asking for NVRTC's version", unsafe { (self.fns.nvrtcVersion)(&mut major, &mut minor) })?;
        Ok((major, minor))
    }

    /// The architectures that it compiles for, ascending: 90 is compute capability 9.0.
    pub fn architectures(&self) -> Result<Vec<i32>> {
        let doing = "asking for NVRTC's architectures";
        let mut count = 0;
        // SAFETY: the pointer is valid.
        self.check(doing, unsafe { (self.fns.nvrtcGetNumSupportedArchs)(&mut count) })?;
        let mut found = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: there is room for as many as it has just said.
        self.check(doing, unsafe { (self.fns.nvrtcGetSupportedArchs)(found.as_mut_ptr()) })?;
        found.sort_unstable();
        Ok(found)
    }

    /// As [`Driver::check`].
    pub fn check(&self, doing: impl std::fmt::Display, code: c_int) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: it takes any number and returns a static string.
        let text = unsafe { (self.fns.nvrtcGetErrorString)(code) };
        let text = match text.is_null() {
            true => format!("NVRTC error {code}"),
            // SAFETY: as above.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        };
        Err(err!(Device, "{doing}: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{memory, stream};
    use super::*;
    use crate::headers::Header;
    use cudarc::driver::sys::{CUdevice_attribute as A, CUmemPool_attribute};

    #[test]
    fn declarations_agree_with_the_drivers_header() {
        let unsupported = [
            "STUB_LIBRARY",
            "NO_DEVICE",
            "NO_BINARY_FOR_GPU",
            "UNSUPPORTED_PTX_VERSION",
            "NOT_SUPPORTED",
            "SYSTEM_DRIVER_MISMATCH",
            "COMPAT_NOT_SUPPORTED_ON_DEVICE",
        ];
        let mut facts: Vec<String> =
            unsupported.iter().zip(UNSUPPORTED).map(|(name, code)| format!("CUDA_ERROR_{name} == {code}")).collect();
        let numbers = [
            ("CUDA_SUCCESS", SUCCESS),
            ("CUDA_ERROR_OUT_OF_MEMORY", OUT_OF_MEMORY),
            ("CUDA_ERROR_NOT_READY", stream::NOT_READY),
            ("CU_STREAM_NON_BLOCKING", stream::NON_BLOCKING as i32),
            ("CU_EVENT_DISABLE_TIMING", stream::DISABLE_TIMING as i32),
            ("CU_MEMHOSTALLOC_PORTABLE", memory::PORTABLE as i32),
            ("CU_MEMPOOL_ATTR_RELEASE_THRESHOLD", CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as i32),
            ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as i32),
            ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR", A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as i32),
            ("CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT", A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as i32),
            ("CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED", A::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED as i32),
        ];
        facts.extend(numbers.map(|(name, number)| format!("{name} == {number}")));
        let (versions, functions) = ("CUDA_VERSION >= 12040", DriverFunctions::DECLARED);
        facts.push(format!("CU_STREAM_LEGACY == (CUstream){:#x}", stream::LEGACY));
        facts.push(format!("CU_STREAM_PER_THREAD == (CUstream){:#x}", stream::PER_THREAD));
        Header { name: "cuda.h", versions, shims: &[], functions, facts }.agrees();
    }

    #[test]
    fn declarations_agree_with_the_compilers_header() {
        let functions = CompilerFunctions::DECLARED;
        Header { name: "nvrtc.h", versions: "1", shims: &[], functions, facts: Vec::new() }.agrees();
    }
}
