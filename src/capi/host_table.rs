//! A host's callbacks as the communicator knows them: converted, called, converted.

use super::comm::{FSDP_REDUCE_MAX, FSDP_REDUCE_MIN, FSDP_REDUCE_SUM};
use super::comm_host::fsdp_host_collectives_t;
use super::model::UserData;
use super::tensor::fsdp_dtype_t;
use crate::comm::host::table::{Collectives, Lane, Request, Started};
use crate::comm::host::MESSAGE;
use crate::comm::ReduceOp;
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use std::any::Any;
use std::ffi::{c_void, CStr, CString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// What lent memory is aligned to.
const ALIGNMENT: usize = 64;

/// The host's functions and what they are called with.
pub struct User {
    calls: fsdp_host_collectives_t,
    data: UserData,
    /// To be released.
    owned: AtomicBool,
}

// SAFETY: the host promises which threads may call with its user_data.
unsafe impl Send for User {}
// SAFETY: as above.
unsafe impl Sync for User {}

impl User {
    pub fn new(calls: fsdp_host_collectives_t, user_data: *mut c_void) -> User {
        User { calls, data: UserData(user_data), owned: AtomicBool::new(false) }
    }

    /// It is to be released from now on.
    pub fn own(&self) {
        self.owned.store(true, Ordering::SeqCst);
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
        if let (true, Some(release)) = (self.owned.load(Ordering::SeqCst), self.calls.release) {
            // SAFETY: the host's promise; nobody calls with it any more.
            unsafe { release(self.data.get()) };
        }
    }
}

/// See the module's text.
pub struct Table(Arc<User>);

impl Table {
    pub fn new(user: Arc<User>) -> Table {
        Table(user)
    }

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
        let part = User::new(self.0.calls, part);
        part.own();
        Ok(Arc::new(Table(Arc::new(part))))
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
        let lent = Lent { user: self.0.clone(), memory: memory as usize, bytes };
        if lent.memory % ALIGNMENT != 0 {
            return Err(err!(
                Callback,
                "the host's alloc gave memory at {memory:p}, which is not {ALIGNMENT}-byte aligned"
            ));
        }
        Ok(Some((memory.cast(), Arc::new(lent))))
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
