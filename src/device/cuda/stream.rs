//! Streams and events of a GPU: what runs after what.

use super::context::Context;
use crate::error::{err, Result};
use cudarc::driver::sys::{CUevent, CUstream};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

/// CU_STREAM_NON_BLOCKING: does not wait for the default stream.
pub(super) const NON_BLOCKING: u32 = 1;
/// CU_STREAM_LEGACY, the same as null, and CU_STREAM_PER_THREAD.
pub(super) const LEGACY: usize = 1;
pub(super) const PER_THREAD: usize = 2;
/// CU_EVENT_DISABLE_TIMING.
pub(super) const DISABLE_TIMING: u32 = 2;
/// CUDA_ERROR_NOT_READY.
pub(super) const NOT_READY: i32 = 600;

/// Which work the GPU starts first when several streams have some ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    Usual,
    /// For collectives: they need few multiprocessors, and compute waits for them.
    Highest,
}

/// See [`Stream::keep`].
static KEPT: Mutex<Vec<Arc<Stream>>> = Mutex::new(Vec::new());

/// Work that runs in order. One that was made here is destroyed when dropped, after its work is done.
pub struct Stream {
    context: Arc<Context>,
    raw: CUstream,
    owned: bool,
}

// SAFETY: the driver's streams may be used by any thread; every call enters the context.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream of its own, which does not wait for the default stream.
    pub fn new(context: &Arc<Context>, priority: Priority) -> Result<Arc<Stream>> {
        let _current = context.enter()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the pointers are valid.
        let code = unsafe { (context.driver.fns.cuCtxGetStreamPriorityRange)(&mut least, &mut greatest) };
        context.check("asking for the streams' priorities", code)?;
        // The usual one is 0, wherever the range lies.
        let priority = if priority == Priority::Highest { greatest } else { 0 };
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is valid; destroyed when dropped.
        let code = unsafe { (context.driver.fns.cuStreamCreateWithPriority)(&mut raw, NON_BLOCKING, priority) };
        context.check("making a stream", code)?;
        Ok(Arc::new(Stream { context: context.clone(), raw, owned: true }))
    }

    /// A stream of the host's (a cudaStream_t or CUstream; null is the legacy default stream). `InvalidArgument` for the
    /// per-thread default stream: its handle means another stream on every thread.
    ///
    /// # Safety
    /// `raw` is a stream of this context until the result is dropped.
    pub unsafe fn borrowed(context: &Arc<Context>, raw: *mut c_void) -> Result<Arc<Stream>> {
        let raw = match raw as usize {
            LEGACY => std::ptr::null_mut(),
            PER_THREAD => {
                return Err(err!(
                    InvalidArgument,
                    "GPU {}: the compute stream is cudaStreamPerThread, which is another stream on every thread: give \
                     one that was made",
                    context.info().ordinal
                ))
            }
            _ => raw.cast(),
        };
        Ok(Arc::new(Stream { context: context.clone(), raw, owned: false }))
    }

    /// It is there for ever from here on.
    pub fn keep(self: &Arc<Self>) {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.iter().any(|stream| Arc::ptr_eq(stream, self)) {
            kept.push(self.clone());
        }
    }

    /// One of the context that is there for ever and that nobody uses any more. Of those that are kept all are equal: for
    /// collectives.
    pub fn kept(context: &Context) -> Option<Arc<Stream>> {
        let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = |stream: &&Arc<Stream>| stream.context.is(context) && Arc::strong_count(stream) == 1;
        kept.iter().find(is_free).cloned()
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The driver's handle.
    pub fn raw(&self) -> CUstream {
        self.raw
    }

    /// What is given to this stream from here on starts after `event`'s work. Does not wait.
    pub fn wait(&self, event: &Event) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: both live.
        let code = unsafe { (self.context.driver.fns.cuStreamWaitEvent)(self.raw, event.raw, 0) };
        self.context.check("making a stream wait for an event", code)
    }

    /// Waits until its work is done. Reports what went wrong in it.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the stream lives.
        let code = unsafe { (self.context.driver.fns.cuStreamSynchronize)(self.raw) };
        self.context.check("waiting for a stream", code)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(_current) = self.owned.then(|| self.context.enter().ok()).flatten() {
            // SAFETY: made by `new`, destroyed once. The driver keeps it until its work is done.
            unsafe { (self.context.driver.fns.cuStreamDestroy_v2)(self.raw) };
        }
    }
}

/// A place in a stream's work. It may be recorded again and again; whoever waits, waits for the latest record before
/// the wait.
pub struct Event {
    context: Arc<Context>,
    raw: CUevent,
}

// SAFETY: as for streams.
unsafe impl Send for Event {}
// SAFETY: as for streams.
unsafe impl Sync for Event {}

impl Event {
    /// Not recorded yet: nothing waits for it.
    pub fn new(context: &Arc<Context>) -> Result<Event> {
        let _current = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is valid; destroyed when dropped.
        context.check("making an event", unsafe { (context.driver.fns.cuEventCreate)(&mut raw, DISABLE_TIMING) })?;
        Ok(Event { context: context.clone(), raw })
    }

    /// The end of what `stream` has been given so far.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: both live.
        self.context
            .check("recording an event", unsafe { (self.context.driver.fns.cuEventRecord)(self.raw, stream.raw) })
    }

    /// Whether the work before it is done.
    pub fn is_done(&self) -> Result<bool> {
        let _current = self.context.enter()?;
        // SAFETY: the event lives.
        match unsafe { (self.context.driver.fns.cuEventQuery)(self.raw) } {
            NOT_READY => Ok(false),
            code => self.context.check("asking for an event", code).map(|()| true),
        }
    }

    /// Waits until it is.
    pub fn synchronize(&self) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the event lives.
        self.context.check("waiting for an event", unsafe { (self.context.driver.fns.cuEventSynchronize)(self.raw) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: made by `new`, destroyed once.
            unsafe { (self.context.driver.fns.cuEventDestroy_v2)(self.raw) };
        }
    }
}
