//! The library that stands in for NCCL (fake_nccl.c), and a rank with a communicator of it.

use crate::fake;
use fsdp::comm::nccl::{Nccl, NcclComm, NcclConfig, Part, UniqueId, What};
use fsdp::comm::Kind;
use fsdp::device::cuda::{Context, DeviceMemory, Priority, Source, Stream};
use fsdp::dtype::DType;
use fsdp::error::Error;
use libloading::Library;
use std::ffi::{c_char, c_int, CStr, CString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// For tests that wait until it has passed.
pub const SHORT: Duration = Duration::from_millis(200);
/// For the others, which never wait for it, however busy the machine.
pub const LONG: Duration = Duration::from_secs(60);

/// The library, made once for every version of its source and these options.
pub fn build(name: &str, options: &[&str]) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nccl/fake_nccl.c");
    let parts = ["fake_nccl.c", "meeting.h", "memory.h"];
    let text = parts.map(|file| std::fs::read_to_string(source.with_file_name(file)).unwrap());
    let all = text.concat() + &options.concat();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let library = folder.join(format!("{name}-{:016x}.so", xxhash_rust::xxh3::xxh3_64(all.as_bytes())));
    if library.exists() {
        return library;
    }
    let made = folder.join(format!("{}-{name}.so", std::process::id()));
    let compiler = std::env::var("CC").unwrap_or("cc".to_string());
    let done = std::process::Command::new(&compiler)
        .args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread", "-o"])
        .args([&made, &source])
        .args(options)
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}"));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    std::fs::rename(made, &library).unwrap();
    library
}

/// The library's own functions, for one test at a time.
pub struct Fake {
    nccl: Library,
    cuda: Library,
    _turn: MutexGuard<'static, ()>,
}

impl Fake {
    /// Ranks that are threads meet in its collectives.
    pub fn meeting() -> Fake {
        let fake = Fake::new();
        fake.tell("meet", 1);
        fake
    }

    pub fn new() -> Fake {
        static LIBRARIES: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (nccl, cuda) = LIBRARIES.get_or_init(|| {
            let (nccl, cuda) = (build("libfake-nccl", &[]), fake::library());
            std::env::set_var("FSDP_NCCL_LIBRARY", &nccl);
            std::env::set_var("FSDP_CUDA_LIBRARY", &cuda);
            std::env::set_var("FSDP_NVRTC_LIBRARY", &cuda);
            std::env::set_var("XDG_CACHE_HOME", "/proc/none");
            (nccl, cuda)
        });
        // SAFETY: no initializers beyond the languages'.
        let open = |file: &Path| unsafe { Library::new(file) }.unwrap();
        let fake = Fake { nccl: open(nccl), cuda: open(cuda), _turn: turn };
        // SAFETY: as fake_nccl.c declares it.
        unsafe { fake.nccl.get::<extern "C" fn()>(b"fake_nccl_reset\0").unwrap()() };
        fake
    }

    pub fn fail(&self, name: &str, code: c_int) {
        let name = CString::new(name).unwrap();
        // SAFETY: as above.
        unsafe {
            self.nccl.get::<extern "C" fn(*const c_char, c_int)>(b"fake_nccl_fail\0").unwrap()(name.as_ptr(), code)
        }
    }

    pub fn tell(&self, what: &str, number: c_int) {
        let name = CString::new(format!("fake_nccl_{what}")).unwrap();
        // SAFETY: as above.
        unsafe { self.nccl.get::<extern "C" fn(c_int)>(name.as_bytes_with_nul()).unwrap()(number) }
    }

    pub fn count(&self, what: &str) -> c_int {
        let name = CString::new(format!("fake_nccl_{what}")).unwrap();
        // SAFETY: as above.
        unsafe { self.nccl.get::<extern "C" fn() -> c_int>(name.as_bytes_with_nul()).unwrap()() }
    }

    /// The GPU comes to no event from here on, or does again.
    pub fn hold(&self, hold: bool) {
        // SAFETY: as fake_driver.cpp declares it.
        unsafe { self.cuda.get::<extern "C" fn(c_int)>(b"fake_cuda_hold\0").unwrap()(hold.into()) }
    }

    /// Bytes of device memory that are taken.
    pub fn device_bytes(&self) -> i64 {
        let mut counts: [std::ffi::c_long; 6] = [0; 6];
        // SAFETY: as fake_driver.cpp declares it, with room for six numbers.
        unsafe {
            self.cuda.get::<extern "C" fn(*mut std::ffi::c_long)>(b"fake_cuda_alive\0").unwrap()(counts.as_mut_ptr())
        };
        counts[0]
    }

    pub fn log(&self) -> Vec<String> {
        // SAFETY: as above; the text ends with NUL.
        let text =
            unsafe { CStr::from_ptr(self.nccl.get::<extern "C" fn() -> *const c_char>(b"fake_nccl_log\0").unwrap()()) };
        text.to_str().unwrap().lines().map(str::to_string).collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.hold(false);
    }
}

/// A communicator of rank `rank` of `world`, and a GPU.
pub struct Rank {
    pub comm: Arc<NcclComm>,
    pub stream: Arc<Stream>,
    pub source: Source,
}

pub fn config(rank: usize, world_size: usize, timeout: Duration) -> NcclConfig {
    NcclConfig { rank, world_size, timeout }
}

impl Rank {
    pub fn new(rank: usize, world: usize) -> Rank {
        Rank::with_timeout(rank, world, LONG)
    }

    pub fn with_timeout(rank: usize, world: usize, timeout: Duration) -> Rank {
        let context = Context::new(0).unwrap();
        let nccl = Nccl::get().unwrap();
        let id = UniqueId::from_bytes(&[b'i'; 1].into_iter().chain([0; 127]).collect::<Vec<u8>>()).unwrap();
        let comm = NcclComm::new(nccl, &context, &id, config(rank, world, timeout)).unwrap();
        let stream = Stream::new(&context, Priority::Highest).unwrap();
        Rank { comm, source: Source::pool(&context).unwrap(), stream }
    }

    pub fn put(&self, data: &[f32]) -> DeviceMemory {
        let memory = DeviceMemory::new(&self.source, &self.stream, size_of_val(data), "a test").unwrap();
        // SAFETY: as many bytes.
        unsafe { self.stream.upload(data.as_ptr().cast(), memory.address(), size_of_val(data)) }.unwrap();
        memory
    }

    pub fn get(&self, memory: &DeviceMemory) -> Vec<f32> {
        let mut data = vec![0f32; memory.bytes() / 4];
        // SAFETY: as many bytes.
        unsafe { self.stream.download(memory.address(), data.as_mut_ptr().cast(), memory.bytes()) }.unwrap();
        data
    }

    pub fn gather(&self, memory: &DeviceMemory, shard_len: usize) -> Result<(), Error> {
        let part = Part { data: memory.address(), shard_len, dtype: DType::F32 };
        // SAFETY: the memory is large enough.
        unsafe { self.comm.all_gather(&What::of_unit(Kind::AllGather, "layers.3"), &[part], &self.stream) }
    }
}
