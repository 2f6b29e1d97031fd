//! Communicators on collectives that the host lends.

use super::comm::{index, timeout, FSDP_REDUCE_MAX, FSDP_REDUCE_MIN, FSDP_REDUCE_SUM};
use super::handle::{fsdp_comm_t, insert};
use super::model::UserData;
use super::status::{boundary, fsdp_status_t, out, read_sized, Sized_};
use super::tensor::fsdp_dtype_t;
use crate::comm::host::table::{Collectives, Lane, Request, Started};
use crate::comm::host::{self, MESSAGE};
use crate::comm::{shm, ReduceOp};
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use std::any::Any;
use std::ffi::{c_char, c_void, CStr, CString};
use std::sync::Arc;
use std::time::Duration;

/// Lanes of fsdp_host_collectives_t: announcements, and collectives on the caller's memory.
pub const FSDP_HOST_LANE_CONTROL: i32 = 0;
/// All-gathers of units.
pub const FSDP_HOST_LANE_GATHER: i32 = 1;
/// Reduce-scatters of units.
pub const FSDP_HOST_LANE_REDUCE: i32 = 2;
/// Number of lanes.
pub const FSDP_HOST_LANES: i32 = 3;
/// Bytes of every message of fsdp_host_collectives_t.post and poll.
pub const FSDP_HOST_MESSAGE_BYTES: usize = 1024;

const _: () = assert!(
    FSDP_HOST_LANE_CONTROL == Lane::Control as i32
        && FSDP_HOST_LANE_GATHER == Lane::Gather as i32
        && FSDP_HOST_LANE_REDUCE == Lane::Reduce as i32
        && FSDP_HOST_LANES as usize == host::table::LANES
        && FSDP_HOST_MESSAGE_BYTES == MESSAGE
);

/// Which rank this is. Initialize with FSDP_HOST_COMM_CONFIG_INIT, then set what differs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_host_comm_config_t {
    /// sizeof(fsdp_host_comm_config_t).
    pub struct_size: usize,
    /// This rank, 0 to world_size - 1.
    pub rank: i32,
    /// Number of ranks; any.
    pub world_size: i32,
    /// Milliseconds that a collective waits while nothing moves; 0: 600,000. Callbacks that block are not interrupted.
    pub timeout_ms: i64,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_host_comm_config_t {
    const NAME: &'static str = "fsdp_host_comm_config_t";
}

/// What a host lends: collectives on plain memory of this process. Initialize with FSDP_HOST_COLLECTIVES_INIT.
///
/// Every callback gets the user_data first. It returns 0, or anything else when it has failed: the communicator is broken
/// then, and the error, FSDP_ERR_CALLBACK, names collective, unit and number. None may throw, unwind or longjmp.
///
/// Lanes     Collectives of one lane are started in the same order, with the same sizes, on every rank. Lanes are
///           independent of each other: on MPI each is a communicator of its own.
/// Requests  A collective either ends before the callback returns (*request stays NULL), or sets *request, not NULL, and
///           returns without waiting for other ranks; it has ended when `test` says so. The memory stays as it is until then, and for ever
///           if that never comes. Without `test` all must block; with it none may wait for other ranks. Several may be
///           under way at once, on each lane.
/// Threads   One thread at a time calls collectives, test, wait and split of one user_data, those of a split one may be called
///           by another thread at the same time. post, poll, abort, alloc, free and describe_error: any thread, at any time.
/// Memory    Never overlaps but where that is said; may have any alignment that fits its elements.
///
/// Types are float32, float64, float16, bfloat16, int32, int64 and uint8, as fsdp_dtype_t; op is FSDP_REDUCE_SUM, _MAX or _MIN.
/// Units' gradients are float32 unless reduce_dtype says else, summed in what order and with what rounding the host likes; rank
/// results of an all_reduce must be the same bits on every rank.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_host_collectives_t {
    /// sizeof(fsdp_host_collectives_t).
    pub struct_size: usize,
    /// output = the ranks' inputs, `bytes` each, in rank order. input may be its place in output. Required, as are the next
    /// four.
    pub all_gather: Option<
        unsafe extern "C" fn(
            user_data: *mut c_void,
            lane: i32,
            input: *const c_void,
            output: *mut c_void,
            bytes: usize,
            request: *mut *mut c_void,
        ) -> i32,
    >,
    /// output = elements rank * count to (rank + 1) * count - 1 of the ranks' inputs (world_size * count each) combined.
    pub reduce_scatter: Option<
        unsafe extern "C" fn(
            user_data: *mut c_void,
            lane: i32,
            input: *const c_void,
            output: *mut c_void,
            count: usize,
            dtype: fsdp_dtype_t,
            op: i32,
            request: *mut *mut c_void,
        ) -> i32,
    >,
    /// data, `count` elements, combined over the ranks, in place.
    pub all_reduce: Option<
        unsafe extern "C" fn(
            user_data: *mut c_void,
            lane: i32,
            data: *mut c_void,
            count: usize,
            dtype: fsdp_dtype_t,
            op: i32,
            request: *mut *mut c_void,
        ) -> i32,
    >,
    /// Rank root's data on every rank.
    pub broadcast: Option<
        unsafe extern "C" fn(
            user_data: *mut c_void,
            lane: i32,
            data: *mut c_void,
            bytes: usize,
            root: i32,
            request: *mut *mut c_void,
        ) -> i32,
    >,
    /// Ends when every rank has started it.
    pub barrier: Option<unsafe extern "C" fn(user_data: *mut c_void, lane: i32, request: *mut *mut c_void) -> i32>,
    /// Whether a request has ended: *done = 1, and the request is gone, or 0. Does not wait. NULL: all collectives block.
    pub test: Option<unsafe extern "C" fn(user_data: *mut c_void, request: *mut c_void, done: *mut i32) -> i32>,
    /// The same, after sleeping until it has ended, at most timeout_ms. NULL: `test` is called again and again.
    pub wait: Option<
        unsafe extern "C" fn(user_data: *mut c_void, request: *mut c_void, timeout_ms: i64, done: *mut i32) -> i32,
    >,
    /// Collective: *part = the user_data of a communicator of those ranks that give the same color: members, count numbers of
    /// this communicator's ranks in the order of their new ranks ((key, rank), as of MPI_Comm_split). May wait. NULL: hybrid
    /// strategies, reshard_after_forward over fewer ranks and saves in the background are FSDP_ERR_UNSUPPORTED.
    pub split: Option<
        unsafe extern "C" fn(
            user_data: *mut c_void,
            color: i32,
            key: i32,
            members: *const i32,
            count: i32,
            part: *mut *mut c_void,
        ) -> i32,
    >,
    /// The last use of a user_data, of fsdp_comm_init_host or of split: nothing is called with it any more. Local. NULL: nothing.
    pub release: Option<unsafe extern "C" fn(user_data: *mut c_void)>,
    /// Sends FSDP_HOST_MESSAGE_BYTES to a rank without waiting for it; the message is copied. By these ranks learn of an error or an
    /// abort of another at once, and a missed deadline names who is missing. NULL, as poll then: they learn by deadline.
    pub post: Option<unsafe extern "C" fn(user_data: *mut c_void, rank: i32, message: *const c_void) -> i32>,
    /// A message that has come: *rank = its sender, message is filled. *rank = -1: none. Does not wait.
    pub poll: Option<unsafe extern "C" fn(user_data: *mut c_void, rank: *mut i32, message: *mut c_void) -> i32>,
    /// The communicator has failed: the host may end what it can, e.g. blocking callbacks of other threads. Local. NULL: nothing.
    pub abort: Option<unsafe extern "C" fn(user_data: *mut c_void, reason: *const c_char)>,
    /// Memory for sums and staging that collectives run best on (registered, pinned), 64-byte aligned; NULL if there is none
    /// left. Unit buffers and gradient slots are never of it: their pages come and go. Both NULL: the library's own.
    pub alloc: Option<unsafe extern "C" fn(user_data: *mut c_void, bytes: usize) -> *mut c_void>,
    pub free: Option<unsafe extern "C" fn(user_data: *mut c_void, memory: *mut c_void, bytes: usize)>,
    /// Writes what a callback's number means, NUL-terminated, to text. NULL: messages have the number.
    pub describe_error: Option<unsafe extern "C" fn(user_data: *mut c_void, code: i32, text: *mut c_char, size: usize)>,
}

// SAFETY: repr(C), begins with its size, plain data: a table of functions and NULLs.
unsafe impl Sized_ for fsdp_host_collectives_t {
    const NAME: &'static str = "fsdp_host_collectives_t";
}

/// Makes a communicator on collectives that the host lends, for any number of ranks on any hosts. Collective: returns when
/// every rank has called it. Parameters are sharded as on shm, but bytes move: a rank's memory holds its shards and the units
/// that are unsharded.
///
/// Every collective is announced to all ranks before its data moves: a difference is FSDP_ERR_MISMATCH on every rank, a
/// rank that does not come FSDP_ERR_TIMEOUT. Both name unit, collective and ranks. Units must be unsharded and reduced in the same
/// order on every rank whatever order_check says; a rank that ends its backward takes part without gradients in
/// what the others still reduce.
///
/// `callbacks` is copied. `user_data` is used until `release` is called: when the communicator and all engines on it are
/// destroyed. If this function fails, `release` is not called for it. *out is owned by the caller: fsdp_comm_destroy. Errors:
/// FSDP_ERR_INVALID_ARGUMENT names a callback that is missing. Since 0.1.
///
/// # Safety
/// `config` and `callbacks` are NULL or point to `struct_size` readable bytes; the callbacks do what fsdp_host_collectives_t
/// says, with `user_data`; `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_init_host(
    config: *const fsdp_host_comm_config_t,
    callbacks: *const fsdp_host_collectives_t,
    user_data: *mut c_void,
    out: *mut *mut fsdp_comm_t,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (config, out) = unsafe { (read_sized(config)?, self::out(out, "out")?) };
        if callbacks.is_null() {
            return Err(err!(InvalidArgument, "callbacks is NULL"));
        }
        // SAFETY: the caller's promise.
        let calls = unsafe { read_sized(callbacks) }?;
        check(&calls)?;
        let config = host::Config {
            rank: index(config.rank, "rank")?,
            world_size: index(config.world_size, "world_size")?,
            timeout: timeout(config.timeout_ms, shm::DEFAULT_TIMEOUT, "timeout_ms")?,
        };
        let user =
            Arc::new(User { calls, data: UserData(user_data), owned: std::sync::atomic::AtomicBool::new(false) });
        let comm = host::init(&config, Arc::new(Table(user.clone())))?;
        user.own();
        out.write(insert(comm));
        Ok(())
    })
}

fn check(calls: &fsdp_host_collectives_t) -> Result<()> {
    let required = [
        ("all_gather", calls.all_gather.is_some()),
        ("reduce_scatter", calls.reduce_scatter.is_some()),
        ("all_reduce", calls.all_reduce.is_some()),
        ("broadcast", calls.broadcast.is_some()),
        ("barrier", calls.barrier.is_some()),
    ];
    if let Some((name, _)) = required.iter().find(|(_, is)| !is) {
        return Err(err!(InvalidArgument, "callbacks.{name} is NULL"));
    }
    let together = [
        ("post", calls.post.is_some(), "poll", calls.poll.is_some()),
        ("alloc", calls.alloc.is_some(), "free", calls.free.is_some()),
    ];
    if let Some((a, is, b, _)) = together.iter().find(|(_, a, _, b)| a != b) {
        let (missing, given) = if *is { (b, a) } else { (a, b) };
        return Err(err!(InvalidArgument, "callbacks.{missing} is NULL, but {given} is not: both or neither"));
    }
    if calls.wait.is_some() && calls.test.is_none() {
        return Err(err!(InvalidArgument, "callbacks.test is NULL, but wait is not"));
    }
    Ok(())
}

/// The host's functions and what they are called with.
struct User {
    calls: fsdp_host_collectives_t,
    data: UserData,
    /// To be released.
    owned: std::sync::atomic::AtomicBool,
}

// SAFETY: the host promises which threads may call with its user_data.
unsafe impl Send for User {}
// SAFETY: as above.
unsafe impl Sync for User {}

impl User {
    fn own(&self) {
        self.owned.store(true, std::sync::atomic::Ordering::SeqCst);
    }

    fn failed(&self, name: &str, code: i32) -> Error {
        let Some(describe) = self.calls.describe_error else {
            return err!(Callback, "the host's {name} returned {code}");
        };
        let mut text = [0u8; 512];
        // SAFETY: the host's promise; the text has room for as many bytes as it says, and ends with a NUL whatever is written.
        unsafe { describe(self.data.get(), code, text.as_mut_ptr().cast(), text.len() - 1) };
        let text = CStr::from_bytes_until_nul(&text).unwrap_or_default().to_string_lossy();
        err!(Callback, "the host's {name} returned {code}: {text}")
    }

    fn done(&self, name: &str, code: i32) -> Result<()> {
        if code == 0 {
            Ok(())
        } else {
            Err(self.failed(name, code))
        }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        if let (true, Some(release)) = (self.owned.load(std::sync::atomic::Ordering::SeqCst), self.calls.release) {
            // SAFETY: the host's promise; nobody calls with it any more.
            unsafe { release(self.data.get()) };
        }
    }
}

struct Table(Arc<User>);

impl Table {
    /// What a collective's callback has returned.
    fn started(&self, name: &str, code: i32, request: *mut c_void) -> Started {
        self.0.done(name, code)?;
        match (request.is_null(), self.0.calls.test) {
            (true, _) => Ok(None),
            (false, Some(_)) => Ok(Some(Request(request as usize))),
            (false, None) => Err(err!(Callback, "the host's {name} returned a request, but callbacks.test is NULL")),
        }
    }

    /// Calls a required callback with the rest of its arguments.
    fn start<F>(
        &self,
        name: &str,
        function: Option<F>,
        call: impl FnOnce(F, *mut c_void, *mut *mut c_void) -> i32,
    ) -> Started {
        let function = function.ok_or_else(|| err!(Panic, "the host's {name} is missing"))?;
        let mut request = std::ptr::null_mut();
        let code = call(function, self.0.data.get(), &mut request);
        self.started(name, code, request)
    }
}

fn dtype(dtype: DType) -> fsdp_dtype_t {
    let (code, bits) = dtype.dlpack();
    fsdp_dtype_t { code, bits, lanes: 1 }
}

fn op(op: ReduceOp) -> i32 {
    match op {
        ReduceOp::Sum | ReduceOp::Avg => FSDP_REDUCE_SUM,
        ReduceOp::Max => FSDP_REDUCE_MAX,
        ReduceOp::Min => FSDP_REDUCE_MIN,
    }
}

impl Collectives for Table {
    unsafe fn all_gather(&self, lane: Lane, input: *const u8, output: *mut u8, bytes: usize) -> Started {
        self.start("all_gather", self.0.calls.all_gather, |f, user, request| {
            // SAFETY: the host's promise, and the caller's for the memory; so for all of these.
            unsafe { f(user, lane as i32, input.cast(), output.cast(), bytes, request) }
        })
    }

    unsafe fn reduce_scatter(
        &self,
        lane: Lane,
        input: *const u8,
        output: *mut u8,
        count: usize,
        of: DType,
        with: ReduceOp,
    ) -> Started {
        self.start("reduce_scatter", self.0.calls.reduce_scatter, |f, user, request| {
            // SAFETY: as of `all_gather`.
            unsafe { f(user, lane as i32, input.cast(), output.cast(), count, dtype(of), op(with), request) }
        })
    }

    unsafe fn all_reduce(&self, lane: Lane, data: *mut u8, count: usize, of: DType, with: ReduceOp) -> Started {
        self.start("all_reduce", self.0.calls.all_reduce, |f, user, request| {
            // SAFETY: as of `all_gather`.
            unsafe { f(user, lane as i32, data.cast(), count, dtype(of), op(with), request) }
        })
    }

    unsafe fn broadcast(&self, lane: Lane, data: *mut u8, bytes: usize, root: usize) -> Started {
        self.start("broadcast", self.0.calls.broadcast, |f, user, request| {
            // SAFETY: as of `all_gather`.
            unsafe { f(user, lane as i32, data.cast(), bytes, root as i32, request) }
        })
    }

    fn barrier(&self, lane: Lane) -> Started {
        self.start("barrier", self.0.calls.barrier, |f, user, request| {
            // SAFETY: the host's promise.
            unsafe { f(user, lane as i32, request) }
        })
    }

    fn test(&self, request: Request) -> Result<bool> {
        let test = self.0.calls.test.ok_or_else(|| err!(Panic, "the host's test is missing"))?;
        let mut done = 0;
        // SAFETY: the host's promise; the request is one that it made and has not ended.
        let code = unsafe { test(self.0.data.get(), request.0 as *mut c_void, &mut done) };
        self.0.done("test", code).map(|()| done != 0)
    }

    fn wait(&self, request: Request, limit: Duration) -> Result<bool> {
        let Some(wait) = self.0.calls.wait else { return Ok(false) };
        let mut done = 0;
        let ms = limit.as_millis() as i64;
        // SAFETY: as of `test`.
        let code = unsafe { wait(self.0.data.get(), request.0 as *mut c_void, ms, &mut done) };
        self.0.done("wait", code).map(|()| done != 0)
    }

    fn can_wait(&self) -> bool {
        self.0.calls.wait.is_some()
    }

    fn can_split(&self) -> bool {
        self.0.calls.split.is_some()
    }

    fn split(&self, color: u32, key: i32, members: &[usize]) -> Result<Arc<dyn Collectives>> {
        let split = self.0.calls.split.ok_or_else(|| err!(Panic, "the host's split is missing"))?;
        let members: Vec<i32> = members.iter().map(|m| *m as i32).collect();
        let mut part = std::ptr::null_mut();
        let (first, count) = (members.as_ptr(), members.len() as i32);
        // SAFETY: the host's promise; the members live until it returns.
        let code = unsafe { split(self.0.data.get(), color as i32, key, first, count, &mut part) };
        self.0.done("split", code)?;
        let owned = std::sync::atomic::AtomicBool::new(true);
        Ok(Arc::new(Table(Arc::new(User { calls: self.0.calls, data: UserData(part), owned }))))
    }

    fn has_messages(&self) -> bool {
        self.0.calls.post.is_some()
    }

    fn post(&self, rank: usize, message: &[u8]) -> Result<()> {
        let Some(post) = self.0.calls.post else { return Ok(()) };
        debug_assert_eq!(message.len(), MESSAGE);
        // SAFETY: the host's promise; the message is as long as all are.
        let code = unsafe { post(self.0.data.get(), rank as i32, message.as_ptr().cast()) };
        self.0.done("post", code)
    }

    fn poll(&self, message: &mut [u8]) -> Result<Option<usize>> {
        let Some(poll) = self.0.calls.poll else { return Ok(None) };
        debug_assert_eq!(message.len(), MESSAGE);
        let mut rank = -1;
        // SAFETY: as of `post`.
        let code = unsafe { poll(self.0.data.get(), &mut rank, message.as_mut_ptr().cast()) };
        self.0.done("poll", code).map(|()| usize::try_from(rank).ok())
    }

    fn abort(&self, reason: &str) {
        if let Some(abort) = self.0.calls.abort {
            let reason = CString::new(reason.replace('\0', "?")).unwrap_or_default();
            // SAFETY: the host's promise; the text lives until it returns.
            unsafe { abort(self.0.data.get(), reason.as_ptr()) };
        }
    }

    fn alloc(&self, bytes: usize) -> Result<Option<(*mut u8, Arc<dyn Any + Send + Sync>)>> {
        let Some(alloc) = self.0.calls.alloc else { return Ok(None) };
        // SAFETY: the host's promise.
        let memory = unsafe { alloc(self.0.data.get(), bytes) };
        if memory.is_null() {
            return Err(err!(OutOfMemory, "the host's alloc has no {bytes} bytes"));
        }
        Ok(Some((memory.cast(), Arc::new(Lent { user: self.0.clone(), memory: memory as usize, bytes }))))
    }
}

/// Memory of the host's.
struct Lent {
    user: Arc<User>,
    memory: usize,
    bytes: usize,
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(free) = self.user.calls.free {
            // SAFETY: the host's promise; it is what `alloc` gave, and nobody uses it any more.
            unsafe { free(self.user.data.get(), self.memory as *mut c_void, self.bytes) };
        }
    }
}
