//! Status codes, the last error message of each thread, and the boundary that every C function goes through.

use crate::error::{err, Error, Result, Status};
use crate::log;
use std::cell::{Cell, RefCell};
use std::ffi::{c_char, CStr, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// What every fallible function returns: FSDP_OK or one of the FSDP_ERR_ codes. Numbers are never reused.
pub type fsdp_status_t = i32;

/// Success.
pub const FSDP_OK: i32 = 0;
/// An argument is NULL, out of range, malformed, or names something that does not exist.
pub const FSDP_ERR_INVALID_ARGUMENT: i32 = 1;
/// A handle was destroyed, never existed, or is of another kind.
pub const FSDP_ERR_INVALID_HANDLE: i32 = 2;
/// The call is not allowed now, e.g. reading a parameter of a sharded unit.
pub const FSDP_ERR_INVALID_STATE: i32 = 3;
/// A thing this version cannot do, e.g. a dtype.
pub const FSDP_ERR_UNSUPPORTED: i32 = 4;
/// No memory (host, or shared between ranks).
pub const FSDP_ERR_OUT_OF_MEMORY: i32 = 5;
/// The operating system failed a call on a file or a socket.
pub const FSDP_ERR_IO: i32 = 6;
/// The ranks could not find each other, or do not fit together.
pub const FSDP_ERR_RENDEZVOUS: i32 = 7;
/// Another rank's process ended. The communicator is broken.
pub const FSDP_ERR_PEER_DIED: i32 = 8;
/// Another rank did not arrive within the deadline. The communicator is broken.
pub const FSDP_ERR_TIMEOUT: i32 = 9;
/// Ranks run different collectives or have different models.
pub const FSDP_ERR_MISMATCH: i32 = 10;
/// A rank called fsdp_comm_abort. The communicator is broken.
pub const FSDP_ERR_ABORTED: i32 = 11;
/// A checkpoint is incomplete, damaged, or of another model.
pub const FSDP_ERR_CHECKPOINT: i32 = 12;
/// A callback of the host reported failure.
pub const FSDP_ERR_CALLBACK: i32 = 13;
/// A defect of the library. The engine concerned is unusable.
pub const FSDP_ERR_PANIC: i32 = 14;
/// A norm is infinite or NaN, and the call was asked to refuse that.
pub const FSDP_ERR_NONFINITE: i32 = 15;
/// A device (a GPU), or a library that drives it, failed a call.
pub const FSDP_ERR_DEVICE: i32 = 16;

const _: () = assert!(
    FSDP_OK == Status::Ok as i32
        && FSDP_ERR_INVALID_ARGUMENT == Status::InvalidArgument as i32
        && FSDP_ERR_INVALID_HANDLE == Status::InvalidHandle as i32
        && FSDP_ERR_INVALID_STATE == Status::InvalidState as i32
        && FSDP_ERR_UNSUPPORTED == Status::Unsupported as i32
        && FSDP_ERR_OUT_OF_MEMORY == Status::OutOfMemory as i32
        && FSDP_ERR_IO == Status::Io as i32
        && FSDP_ERR_RENDEZVOUS == Status::Rendezvous as i32
        && FSDP_ERR_PEER_DIED == Status::PeerDied as i32
        && FSDP_ERR_TIMEOUT == Status::Timeout as i32
        && FSDP_ERR_MISMATCH == Status::Mismatch as i32
        && FSDP_ERR_ABORTED == Status::Aborted as i32
        && FSDP_ERR_CHECKPOINT == Status::Checkpoint as i32
        && FSDP_ERR_CALLBACK == Status::Callback as i32
        && FSDP_ERR_PANIC == Status::Panic as i32
        && FSDP_ERR_NONFINITE == Status::Nonfinite as i32
        && FSDP_ERR_DEVICE == Status::Device as i32
);

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
    /// Whether it is not "": a call that succeeds asks no more of it.
    static FAILED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` and turns its outcome into a status; a panic becomes FSDP_ERR_PANIC.
#[inline]
pub fn boundary(f: impl FnOnce() -> Result<()>) -> fsdp_status_t {
    let outcome = catch_unwind(AssertUnwindSafe(|| log::deferred(f)));
    if matches!(outcome, Ok(Ok(()))) && !FAILED.get() {
        return FSDP_OK;
    }
    remember(outcome)
}

/// The status of an outcome, whose message becomes the thread's last.
#[cold]
#[inline(never)]
fn remember(outcome: std::thread::Result<Result<()>>) -> fsdp_status_t {
    let outcome = outcome.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(err!(Panic, "internal error, please report it: {text}"))
    });
    let (status, message) = match outcome {
        Ok(()) => (Status::Ok, String::new()),
        Err(Error { status, message }) => (status, message),
    };
    FAILED.set(!message.is_empty());
    LAST_ERROR.set(CString::new(message.replace('\0', "?")).unwrap_or_default());
    status as i32
}

/// Runs the body of a function that returns no status. The last error message stays, so that a host can free things
/// before it prints; a panic is dropped with its object.
pub fn boundary_void(f: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(f));
}

/// What went wrong in this thread's latest call that returns a status: a sentence that names the parameter, unit, rank
/// or file. "" if that call succeeded. Local; the pointer is valid until the thread's next call that returns a status.
#[no_mangle]
pub extern "C" fn fsdp_last_error_message() -> *const c_char {
    LAST_ERROR.with(|last| last.borrow().as_ptr())
}

/// A short name of a status code, e.g. "peer died"; "unknown status" for other numbers. Static, never NULL.
#[no_mangle]
pub extern "C" fn fsdp_status_name(status: fsdp_status_t) -> *const c_char {
    let name: &CStr = match Status::from_code(status) {
        Some(status) => status_cstr(status),
        None => c"unknown status",
    };
    name.as_ptr()
}

fn status_cstr(status: Status) -> &'static CStr {
    use std::sync::OnceLock;
    static NAMES: OnceLock<Vec<CString>> = OnceLock::new();
    let names = NAMES.get_or_init(|| Status::ALL.iter().map(|s| CString::new(s.name()).unwrap_or_default()).collect());
    &names[status as usize]
}

/// The library's version, "major.minor.patch". Static, never NULL.
#[no_mangle]
pub extern "C" fn fsdp_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// A NULL-checked out-pointer.
///
/// # Safety
/// `out` is NULL or valid for writing a `T`, for as long as the result is used.
pub unsafe fn out<'a, T>(out: *mut T, name: &str) -> Result<&'a mut std::mem::MaybeUninit<T>> {
    // SAFETY: NULL is turned into None; else the caller's promise. MaybeUninit because C need not have initialized it.
    unsafe { out.cast::<std::mem::MaybeUninit<T>>().as_mut() }.ok_or_else(|| err!(InvalidArgument, "{name} is NULL"))
}

/// A NULL-checked C string.
///
/// # Safety
/// `text` is NULL or a NUL-terminated string that stays unchanged while the result is used.
pub unsafe fn string<'a>(text: *const c_char, name: &str) -> Result<&'a str> {
    if text.is_null() {
        return Err(err!(InvalidArgument, "{name} is NULL"));
    }
    // SAFETY: not NULL; else the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| err!(InvalidArgument, "{name} is not valid UTF-8"))
}

/// `count` pointers to pieces, one for each parameter.
///
/// # Safety
/// `pieces` is NULL or points to `count` pointers that stay as they are while the result is used.
pub unsafe fn pieces<'a, T>(pieces: *const T, count: usize, name: &str) -> Result<&'a [T]> {
    match (pieces.is_null(), count) {
        (_, 0) => Ok(&[]),
        (true, _) => Err(err!(InvalidArgument, "{name} is NULL")),
        // SAFETY: not NULL; else the caller's promise.
        _ => Ok(unsafe { std::slice::from_raw_parts(pieces, count) }),
    }
}

/// A struct of the ABI that begins with its own size and only ever grows at the end.
///
/// # Safety
/// Implementors are `repr(C)`, start with `struct_size: usize`, and are valid for any bit pattern.
pub unsafe trait Sized_: Copy {
    const NAME: &'static str;
}

/// Reads a configuration; a larger struct of a newer header is accepted when the fields unknown here are zero.
///
/// # Safety
/// `config` is NULL or points to `struct_size` readable bytes.
pub unsafe fn read_sized<T: Sized_>(config: *const T) -> Result<T> {
    let ours = size_of::<T>();
    // SAFETY: the caller's promise; every such struct begins with its size.
    let size = unsafe { config.cast::<usize>().as_ref() };
    let size = *size.ok_or_else(|| err!(InvalidArgument, "{} is NULL", T::NAME))?;
    check_size::<T>(size)?;
    // SAFETY: the caller has `size >= ours` bytes there.
    let rest = unsafe { std::slice::from_raw_parts(config.cast::<u8>().add(ours), size - ours) };
    if rest.iter().any(|b| *b != 0) {
        return Err(err!(Unsupported, "{} has fields that this version of the library does not know", T::NAME));
    }
    // SAFETY: as above; plain data.
    Ok(unsafe { *config })
}

/// Fills an output struct whose `struct_size` the caller has set; fields beyond this version's stay untouched.
///
/// # Safety
/// `out` is NULL or points to `struct_size` writable bytes.
pub unsafe fn write_sized<T: Sized_>(out: *mut T, value: T) -> Result<()> {
    // SAFETY: the caller's promise; every such struct begins with its size.
    let size = unsafe { out.cast::<usize>().as_ref() };
    let size = *size.ok_or_else(|| err!(InvalidArgument, "out is NULL"))?;
    check_size::<T>(size)?;
    // SAFETY: `size` bytes are writable, at least those of T; the size field is put back.
    unsafe {
        *out = value;
        *out.cast::<usize>() = size;
    }
    Ok(())
}

fn check_size<T: Sized_>(size: usize) -> Result<()> {
    let ours = size_of::<T>();
    // The bound keeps an uninitialized struct_size from being read as an enormous struct.
    if size < ours || size > 16 * ours {
        return Err(err!(
            InvalidArgument,
            "{}.struct_size is {size}, not {ours}: initialize the struct with its size",
            T::NAME
        ));
    }
    Ok(())
}
