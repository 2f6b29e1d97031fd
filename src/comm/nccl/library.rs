//! The NCCL library, as far as it is used: loaded at run time, shared with LibTorch, every result code checked.
//!
//! Numbers instead of cudarc's enums: NCCL returns values that those do not have (its own reduction operators, newer
//! errors).

use crate::error::{Error, Result, Status};
use crate::library::{functions, Library, Search};
use cudarc::driver::sys::CUstream;
use cudarc::nccl::sys::{ncclComm_t, ncclUniqueId};
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::sync::OnceLock;

/// ncclResult_t.
pub type Code = c_int;

pub const SUCCESS: Code = 0;
const REMOTE_ERROR: Code = 6;
pub const IN_PROGRESS: Code = 7;
const INVALID_ARGUMENT: Code = 4;
const INVALID_USAGE: Code = 5;
const TIMED_OUT: Code = 8;

/// The head of ncclConfig_t, as it still is: a library reads as many bytes as `size` says and gives what follows its
/// defaults. Its last number came with 2.26; to older ones it is padding.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct NcclConfig {
    size: usize,
    magic: c_uint,
    version: c_uint,
    pub blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    pub split_share: c_int,
    traffic_class: c_int,
}

impl NcclConfig {
    /// Calls return before they are done, if they are not done at once; nothing is shared with what is split off.
    pub fn non_blocking() -> NcclConfig {
        NcclConfig {
            size: size_of::<NcclConfig>(),
            magic: 0xcafe_beef,
            version: 21800,
            blocking: 0,
            cga_cluster_size: c_int::MIN,
            min_ctas: c_int::MIN,
            max_ctas: c_int::MIN,
            net_name: std::ptr::null(),
            split_share: 0,
            traffic_class: c_int::MIN,
        }
    }
}

functions! {
    /// NCCL's functions, by their C names. Optional are those that came after 2.18.
    pub struct NcclFunctions {
        fn ncclGetVersion(*mut c_int) -> Code;
        fn ncclGetUniqueId(*mut ncclUniqueId) -> Code;
        fn ncclCommInitRankConfig(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut NcclConfig) -> Code;
        fn ncclCommGetAsyncError(ncclComm_t, *mut Code) -> Code;
        fn ncclCommAbort(ncclComm_t) -> Code;
        fn ncclCommFinalize(ncclComm_t) -> Code;
        fn ncclCommDestroy(ncclComm_t) -> Code;
        fn ncclCommSplit(ncclComm_t, c_int, c_int, *mut ncclComm_t, *mut NcclConfig) -> Code;
        fn ncclAllGather(*const c_void, *mut c_void, usize, c_int, ncclComm_t, CUstream) -> Code;
        fn ncclReduceScatter(*const c_void, *mut c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> Code;
        fn ncclAllReduce(*const c_void, *mut c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> Code;
        fn ncclBroadcast(*const c_void, *mut c_void, usize, c_int, c_int, ncclComm_t, CUstream) -> Code;
        fn ncclGroupStart() -> Code;
        fn ncclGroupEnd() -> Code;
        fn ncclGetErrorString(Code) -> *const c_char;
        fn ncclGetLastError(ncclComm_t) -> *const c_char;
        fn ncclRedOpCreatePreMulSum(*mut c_int, *mut c_void, c_int, c_int, ncclComm_t) -> Code;
        fn ncclRedOpDestroy(c_int, ncclComm_t) -> Code;
    }
    optional {
        fn ncclMemAlloc(*mut *mut c_void, usize) -> Code;
        fn ncclMemFree(*mut c_void) -> Code;
        fn ncclCommRegister(ncclComm_t, *mut c_void, usize, *mut *mut c_void) -> Code;
        fn ncclCommDeregister(ncclComm_t, *mut c_void) -> Code;
        fn ncclCommWindowRegister(ncclComm_t, *mut c_void, usize, *mut *mut c_void, c_int) -> Code;
        fn ncclCommWindowDeregister(ncclComm_t, *mut c_void) -> Code;
    }
}

/// The library.
pub struct Nccl {
    pub fns: NcclFunctions,
    library: Library,
    version: c_int,
}

impl Nccl {
    /// Where it is looked for.
    pub const SEARCH: Search<'static> = Search {
        what: "NCCL",
        variable: "FSDP_NCCL_LIBRARY",
        names: &["libnccl.so.2", "libnccl.so"],
        symbol: "ncclGetVersion",
    };

    /// The process's NCCL: found by the first call, whose error every later call returns too.
    pub fn get() -> Result<&'static Nccl> {
        static NCCL: OnceLock<Result<Nccl>> = OnceLock::new();
        NCCL.get_or_init(|| Nccl::open(Nccl::SEARCH.load()?)).as_ref().map_err(Error::clone)
    }

    /// NCCL from a library that was found. 2.18 is the first that has all that is needed.
    pub fn open(library: Library) -> Result<Nccl> {
        let mut nccl = Nccl { fns: NcclFunctions::load(&library)?, library, version: 0 };
        let mut version = 0;
        // SAFETY: the pointer is valid.
        let code = unsafe { (nccl.fns.ncclGetVersion)(&mut version) };
        nccl.check("asking for NCCL's version", code)?;
        nccl.version = version;
        Ok(nccl)
    }

    /// The file that it was loaded from.
    pub fn path(&self) -> &str {
        self.library.path()
    }

    /// (major, minor, patch).
    pub fn version(&self) -> (i32, i32, i32) {
        match self.version {
            v if v < 10000 => (v / 1000, v % 1000 / 100, v % 100),
            v => (v / 10000, v % 10000 / 100, v % 100),
        }
    }

    /// An error that says `doing` what failed and how, unless `code` is success.
    pub fn check(&self, doing: impl std::fmt::Display, code: Code) -> Result<()> {
        match code {
            SUCCESS => Ok(()),
            // SAFETY: the last error of no communicator in particular is asked for.
            _ => Err(Error::new(
                status_of(code),
                format!("{doing}: {}", unsafe { self.describe(code, std::ptr::null_mut()) }),
            )),
        }
    }

    /// What NCCL says about a code, and about its last error.
    ///
    /// # Safety
    /// `comm` is null or a communicator that lives.
    pub unsafe fn describe(&self, code: Code, comm: ncclComm_t) -> String {
        let owned = |text: *const c_char| {
            // SAFETY: null, or a string of the library's.
            (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_string())
        };
        // SAFETY: it takes any number.
        let name =
            owned(unsafe { (self.fns.ncclGetErrorString)(code) }).unwrap_or_else(|| format!("NCCL error {code}"));
        // SAFETY: the caller's promise.
        match owned(unsafe { (self.fns.ncclGetLastError)(comm) }).filter(|last| !last.is_empty()) {
            Some(last) => format!("{name}: {last}"),
            None => name,
        }
    }
}

/// The status that a failure is reported with.
pub fn status_of(code: Code) -> Status {
    match code {
        INVALID_ARGUMENT | INVALID_USAGE => Status::InvalidArgument,
        REMOTE_ERROR => Status::PeerDied,
        TIMED_OUT => Status::Timeout,
        _ => Status::Device,
    }
}

#[cfg(test)]
mod tests {
    use super::super::register::SYMMETRIC;
    use super::super::types::{number_of, HOST_IMMEDIATE, NCCL_AVG, NCCL_MAX, NCCL_SUM};
    use super::*;
    use crate::dtype::DType;
    use crate::headers::Header;
    use std::mem::offset_of;

    /// What nccl.h needs of the CUDA run time.
    const SHIMS: &[(&str, &str)] = &[
        (
            "cuda_runtime.h",
            "#include <stddef.h>\ntypedef struct CUstream_st* cudaStream_t;\n#define CUDART_VERSION 11000\n",
        ),
        ("cuda_fp16.h", ""),
        ("cuda_bf16.h", ""),
    ];

    #[test]
    fn declarations_agree_with_nccls_header() {
        let numbers = [
            ("ncclSuccess", SUCCESS),
            ("ncclRemoteError", REMOTE_ERROR),
            ("ncclInProgress", IN_PROGRESS),
            ("ncclInvalidArgument", INVALID_ARGUMENT),
            ("ncclInvalidUsage", INVALID_USAGE),
            ("ncclSum", NCCL_SUM),
            ("ncclMax", NCCL_MAX),
            ("ncclAvg", NCCL_AVG),
            ("ncclScalarHostImmediate", HOST_IMMEDIATE),
            ("ncclUint8", number_of(DType::U8)),
            ("ncclInt32", number_of(DType::I32)),
            ("ncclInt64", number_of(DType::I64)),
            ("ncclFloat16", number_of(DType::F16)),
            ("ncclFloat32", number_of(DType::F32)),
            ("ncclFloat64", number_of(DType::F64)),
            ("ncclBfloat16", number_of(DType::BF16)),
            ("ncclTimeout", TIMED_OUT),
            ("NCCL_WIN_COLL_SYMMETRIC", SYMMETRIC),
        ];
        let config = NcclConfig::non_blocking();
        let offsets = [
            ("size", offset_of!(NcclConfig, size)),
            ("magic", offset_of!(NcclConfig, magic)),
            ("version", offset_of!(NcclConfig, version)),
            ("blocking", offset_of!(NcclConfig, blocking)),
            ("cgaClusterSize", offset_of!(NcclConfig, cga_cluster_size)),
            ("minCTAs", offset_of!(NcclConfig, min_ctas)),
            ("maxCTAs", offset_of!(NcclConfig, max_ctas)),
            ("netName", offset_of!(NcclConfig, net_name)),
            ("splitShare", offset_of!(NcclConfig, split_share)),
            ("trafficClass", offset_of!(NcclConfig, traffic_class)),
        ];
        let mut facts: Vec<String> = numbers.map(|(name, number)| format!("{name} == {number}")).into();
        facts.extend(offsets.map(|(name, at)| format!("offsetof(ncclConfig_t, {name}) == {at}")));
        facts.push(format!("sizeof(ncclConfig_t) >= {}", config.size));
        facts.push(format!("NCCL_API_MAGIC == {}u", config.magic));
        facts.push(format!("NCCL_CONFIG_UNDEF_INT == {} - 1", config.traffic_class + 1));
        facts.push(format!("NCCL_VERSION(2, 18, 0) == {}", config.version));
        let (versions, functions) = ("NCCL_VERSION_CODE >= 22700", NcclFunctions::DECLARED);
        Header { name: "nccl.h", versions, shims: SHIMS, functions, facts }.agrees();
    }
}
