//! CUDA's part of the engine on a driver that is this machine's CPU (tests/cuda/fake_driver.cpp): the kernels'
//! arithmetic, and that what is made is given back.

mod cuda;
#[path = "cuda/fake.rs"]
mod fake;

use cuda::gpu::Gpu;
use cuda::{elements, reductions};
use fsdp::device::cuda::kernels::{Kernels, Piece};
use fsdp::device::cuda::{
    devices, Context, DeviceAllocator, DeviceMemory, Event, PinnedMemory, Priority, Source, Stream,
};
use fsdp::error::Status;
use libloading::Library;
use std::ffi::{c_long, c_void, CString};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// The fake's own functions.
struct Fake(Library);

impl Fake {
    /// The one driver of this process, for one test at a time.
    fn lock() -> (MutexGuard<'static, ()>, &'static Fake) {
        static FAKE: OnceLock<Fake> = OnceLock::new();
        static LOCK: Mutex<()> = Mutex::new(());
        let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let fake = FAKE.get_or_init(|| {
            let library = fake::library();
            std::env::set_var("FSDP_CUDA_LIBRARY", &library);
            std::env::set_var("FSDP_NVRTC_LIBRARY", &library);
            // Nothing of other processes, and nothing is left for them.
            std::env::set_var("XDG_CACHE_HOME", "/proc/none");
            // SAFETY: it has no initializers beyond C++'s.
            Fake(unsafe { Library::new(&library) }.unwrap())
        });
        (guard, fake)
    }

    /// The function of this name fails from here on.
    fn fail(&self, name: &str) {
        let name = CString::new(name).unwrap();
        // SAFETY: as fake_driver.cpp declares it.
        unsafe { self.0.get::<extern "C" fn(*const std::ffi::c_char)>(b"fake_cuda_fail\0").unwrap()(name.as_ptr()) }
    }

    fn calls(&self, name: &str) -> c_long {
        let name = CString::new(name).unwrap();
        // SAFETY: as above.
        unsafe {
            self.0.get::<extern "C" fn(*const std::ffi::c_char) -> c_long>(b"fake_cuda_calls\0").unwrap()(name.as_ptr())
        }
    }

    /// Bytes of device memory, pieces of pinned memory, streams, events, modules, retained contexts.
    fn alive(&self) -> [c_long; 6] {
        let mut counts = [-1; 6];
        // SAFETY: as above.
        unsafe { self.0.get::<extern "C" fn(*mut c_long)>(b"fake_cuda_alive\0").unwrap()(counts.as_mut_ptr()) };
        counts
    }
}

/// Runs `f` and sees that everything is given back.
fn check(f: impl FnOnce(&Gpu)) {
    let (_guard, fake) = Fake::lock();
    f(&Gpu::new());
    assert_eq!(fake.alive(), [0; 6]);
}

#[test]
fn casts() {
    check(elements::casts);
}

#[test]
fn scaling() {
    check(elements::scaling);
}

#[test]
fn gradients() {
    check(elements::gradients);
}

#[test]
fn unscaling() {
    check(elements::unscaling);
}

#[test]
fn adamw() {
    check(reductions::adamw);
}

#[test]
fn sgd() {
    check(reductions::sgd);
}

#[test]
fn norms() {
    check(reductions::norms);
}

#[test]
fn kernels_are_compiled_once_a_process() {
    let (_guard, fake) = Fake::lock();
    let context = Context::new(0).unwrap();
    let compiled = fake.calls("nvrtcCompileProgram");
    let kernels = [Kernels::load(&context).unwrap(), Kernels::load(&context).unwrap()];
    assert!(fake.calls("nvrtcCompileProgram") <= compiled + 1);
    drop((kernels, context));
    assert_eq!(fake.calls("nvrtcCompileProgram"), 1);
    assert_eq!(fake.alive(), [0; 6]);
}

#[test]
fn nothing_to_do_launches_nothing() {
    let (_guard, fake) = Fake::lock();
    let gpu = Gpu::new();
    let before = fake.calls("cuLaunchKernel");
    // SAFETY: there are no elements.
    unsafe { gpu.kernels.zero(&gpu.stream, &[Piece::default(); 3]) }.unwrap();
    assert_eq!(fake.calls("cuLaunchKernel"), before);
}

#[test]
fn devices_are_described_and_one_that_is_not_there_is_an_error() {
    let (_guard, _fake) = Fake::lock();
    let found = devices().unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), found[0].capability, found[0].memory), ("Fake GPU", (9, 0), 1 << 30));
    let e = Context::new(7).err().unwrap();
    assert_eq!(e.status, Status::Unsupported);
    assert!(e.message.contains("no GPU 7") && e.message.contains("sees 1"), "{e}");
}

#[test]
fn memory_comes_from_the_pool_or_the_host_and_goes_back() {
    #[derive(Default)]
    struct Lent(Mutex<Vec<(u64, usize)>>);
    impl DeviceAllocator for Lent {
        fn alloc(&self, bytes: usize, stream: *mut c_void) -> Option<u64> {
            assert!(!stream.is_null());
            let address = if bytes == 13 { 8 } else { 4096 * bytes as u64 };
            self.0.lock().unwrap().push((address, bytes));
            (bytes < 1000).then_some(address)
        }
        fn free(&self, address: u64, bytes: usize, stream: *mut c_void) {
            assert!(!stream.is_null());
            let mut lent = self.0.lock().unwrap();
            let at = lent.iter().position(|l| *l == (address, bytes)).expect("what was lent");
            lent.remove(at);
        }
    }
    let (_guard, fake) = Fake::lock();
    {
        let gpu = Gpu::new();
        let memory = DeviceMemory::new(&gpu.source, &gpu.stream, 1000, "a unit buffer").unwrap();
        assert_eq!((memory.bytes(), memory.address() % 256), (1000, 0));
        assert_eq!(fake.alive()[0], 1000);
        assert_eq!(gpu.stream.context().memory_info().unwrap(), ((1 << 30) - 1000, 1 << 30));
        let none = DeviceMemory::new(&gpu.source, &gpu.stream, 0, "nothing").unwrap();
        assert_eq!(none.address(), 0);
        let e = DeviceMemory::new(&gpu.source, &gpu.stream, 2 << 30, "a unit buffer").err().unwrap();
        assert_eq!(e.status, Status::OutOfMemory);
        assert!(e.message.contains("GPU 0") && e.message.contains("a unit buffer: 2147483648 bytes"), "{e}");

        let lent = Arc::new(Lent::default());
        let source = Source::Host(lent.clone());
        let memory = DeviceMemory::new(&source, &gpu.stream, 100, "a slot").unwrap();
        assert_eq!(memory.address(), 409_600);
        assert_eq!(*lent.0.lock().unwrap(), [(409_600, 100)]);
        drop(memory);
        assert!(lent.0.lock().unwrap().is_empty());
        let e = DeviceMemory::new(&source, &gpu.stream, 2000, "a slot").err().unwrap();
        assert_eq!(e.status, Status::OutOfMemory);
        let e = DeviceMemory::new(&source, &gpu.stream, 13, "a slot").err().unwrap();
        assert_eq!(e.status, Status::Callback);
        assert!(e.message.contains("0x8"), "{e}");

        let pinned = PinnedMemory::zeroed(gpu.stream.context(), 4096, "offloaded shards").unwrap();
        // SAFETY: 4096 bytes of this test's own.
        assert!(unsafe { std::slice::from_raw_parts(pinned.as_ptr(), 4096) }.iter().all(|b| *b == 0));
        assert_eq!(fake.alive()[1], 1);
        assert!(!PinnedMemory::zeroed(gpu.stream.context(), 0, "nothing").unwrap().as_ptr().is_null());
    }
    assert_eq!(fake.alive(), [0; 6]);
}

#[test]
fn both_homes_are_zeroed_memory_that_uploads() {
    check(elements::homes);
}

#[test]
fn copies_streams_and_events() {
    check(|gpu| {
        let data: Vec<u8> = (0..=255).collect();
        let (a, b) = (gpu.put(&data), gpu.put(&[0u8; 256]));
        let other = Stream::new(gpu.stream.context(), Priority::Highest).unwrap();
        let event = Event::new(gpu.stream.context()).unwrap();
        event.record(&gpu.stream).unwrap();
        other.wait(&event).unwrap();
        // SAFETY: 256 bytes each.
        unsafe { other.copy_on_device(a.address(), b.address(), 256) }.unwrap();
        event.record(&other).unwrap();
        event.synchronize().unwrap();
        assert!(event.is_done().unwrap());
        assert_eq!(gpu.get::<u8>(&b), data);
        // A stream that the host made stays the host's.
        // SAFETY: the default streams.
        let borrow = |handle: usize| unsafe { Stream::borrowed(gpu.stream.context(), handle as *mut c_void) };
        let borrowed = borrow(0).unwrap();
        assert!(borrow(1).unwrap().raw().is_null(), "another name of the default stream");
        let e = borrow(2).err().unwrap();
        assert_eq!(e.status, Status::InvalidArgument);
        assert!(e.message.contains("GPU 0") && e.message.contains("cudaStreamPerThread"), "{e}");
        // SAFETY: 256 bytes.
        unsafe { borrowed.fill(b.address(), 9, 256) }.unwrap();
        borrowed.synchronize().unwrap();
        assert_eq!(gpu.get::<u8>(&b), [9; 256]);
        // Other threads have no current context until they enter it.
        std::thread::scope(|scope| {
            scope.spawn(|| event.record(&other).unwrap());
        });
    });
}

#[test]
fn a_failure_says_what_was_done_and_on_which_gpu() {
    let (_guard, fake) = Fake::lock();
    {
        let gpu = Gpu::new();
        let memory = gpu.put(&[1f32; 4]);
        let piece = Piece { to: memory.address(), len: 4, ..Piece::default() };
        // SAFETY: four floats.
        let zero = || unsafe { gpu.kernels.zero(&gpu.stream, &[piece]) };
        type Call<'a> = &'a dyn Fn() -> fsdp::error::Result<()>;
        let cases: [(&str, Call, &str); 5] = [
            ("cuLaunchKernel", &zero, "launching fsdp_zero"),
            ("cuStreamSynchronize", &|| gpu.stream.synchronize(), "waiting for a stream"),
            ("cuEventCreate", &|| Event::new(gpu.stream.context()).map(|_| ()), "making an event"),
            ("cuModuleLoadData", &|| Kernels::load(gpu.stream.context()).map(|_| ()), "loading the kernels"),
            (
                "cuFuncLoad",
                &|| Kernels::load(gpu.stream.context()).map(|_| ()),
                "loading the kernel fsdp_cast_f32_bf16",
            ),
        ];
        for (function, call, doing) in cases {
            fake.fail(function);
            let e = call().unwrap_err();
            fake.fail("");
            assert_eq!(e.status, Status::Device, "{e}");
            for words in ["GPU 0", doing, "illegal memory access", "CUDA_ERROR_ILLEGAL_ADDRESS"] {
                assert!(e.message.contains(words), "{words} is not in: {e}");
            }
            call().unwrap();
        }
    }
    assert_eq!(fake.alive(), [0; 6]);
}
