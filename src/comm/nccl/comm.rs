//! A communicator of NCCL: collectives on streams of a GPU, in place.
//!
//! It never blocks: NCCL's calls return while they are still at work, and are polled with a deadline. The first
//! failure, of NCCL, of a peer, or of the deadline, aborts the communicator, so that no kernel waits on the GPU for
//! ever; every later call returns the same error.

use super::id::UniqueId;
use super::library::{self, status_of, Code, Nccl, IN_PROGRESS, SUCCESS};
use super::types::{number_of, pointer, scalar_of, Part, Reduction, HOST_IMMEDIATE, NCCL_AVG, NCCL_MAX, NCCL_SUM};
use super::watch::{Watch, What};
use crate::device::cuda::{Context, Stream};
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use cudarc::driver::sys::CUdeviceptr;
use cudarc::nccl::sys::ncclComm_t;
use std::ffi::c_int;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two polls of what takes longer than this.
const PAUSE: Duration = Duration::from_micros(50);

/// Who this rank is among which.
#[derive(Clone, Debug)]
pub struct NcclConfig {
    pub rank: usize,
    pub world_size: usize,
    /// How long a call may be at work, and a collective at the head of the GPU's queue.
    pub timeout: Duration,
}

struct State {
    /// Null once it is aborted.
    raw: ncclComm_t,
    watch: Watch,
    /// What broke it.
    error: Option<Error>,
}

// SAFETY: a communicator may be used by any thread, one at a time: it lies behind a lock.
unsafe impl Send for State {}

/// See the module's text. Collective means: all ranks call it, in the same order.
pub struct NcclComm {
    nccl: &'static Nccl,
    context: Arc<Context>,
    config: NcclConfig,
    /// The host has asked for an abort, perhaps while another thread holds the state.
    asked: Mutex<Option<Error>>,
    state: Mutex<State>,
}

impl NcclComm {
    /// Joins the communicator of `id` with `context`'s GPU. Collective.
    pub fn new(
        nccl: &'static Nccl,
        context: &Arc<Context>,
        id: &UniqueId,
        config: NcclConfig,
    ) -> Result<Arc<NcclComm>> {
        if config.rank >= config.world_size || c_int::try_from(config.world_size).is_err() {
            return Err(err!(InvalidArgument, "there is no rank {} of {}", config.rank, config.world_size));
        }
        let _current = context.enter()?;
        let mut raw = std::ptr::null_mut();
        let (rank, world) = (config.rank as c_int, config.world_size as c_int);
        let mut options = library::NcclConfig::non_blocking();
        // SAFETY: the pointers are valid; NCCL copies the options, and has set the communicator when the call returns.
        let code = unsafe { (nccl.fns.ncclCommInitRankConfig)(&mut raw, world, id.0, rank, &mut options) };
        if code != IN_PROGRESS {
            nccl.check(format_args!("rank {rank} of {world}: joining NCCL's ranks"), code)?;
        }
        NcclComm::connected(nccl, context, config, raw)
    }

    /// A communicator of the ranks that give the same `color`, in the order of (`key`, rank), with a GPU queue of its
    /// own; `rank` and `world_size` are what this rank will be there. Collective over this one's ranks.
    pub fn split(&self, color: u32, key: i32, rank: usize, world_size: usize) -> Result<Arc<NcclComm>> {
        let color =
            c_int::try_from(color).map_err(|_| err!(InvalidArgument, "{color} is too large a color for NCCL"))?;
        let config = NcclConfig { rank, world_size, ..self.config };
        let _current = self.context.enter()?;
        let mut raw = std::ptr::null_mut();
        let mut options = library::NcclConfig::non_blocking();
        let mut state = self.working()?;
        // SAFETY: this one lives, the pointers are valid; the new one is set once this one is done.
        let code = unsafe { (self.nccl.fns.ncclCommSplit)(state.raw, color, key, &mut raw, &mut options) };
        self.settle(&mut state, &What::named("the split of the communicator"), code)?;
        drop(state);
        NcclComm::connected(self.nccl, &self.context, config, raw)
    }

    pub fn rank(&self) -> usize {
        self.config.rank
    }

    pub fn world_size(&self) -> usize {
        self.config.world_size
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// In place: of each part, rank r's elements are at r times its length, and then all are everywhere. Several parts
    /// (a unit whose parameters have several types) are one launch. Collective.
    ///
    /// # Safety
    /// The memory is there, and touched by nothing else, from when `stream` comes to it until it is done.
    pub unsafe fn all_gather(&self, what: &What, parts: &[Part], stream: &Stream) -> Result<()> {
        self.collective(what, stream, |raw| {
            let gather = |part: &Part| {
                let own = part.at(self.config.rank);
                let (to, len, dtype) = (pointer(part.data), part.shard_len, number_of(part.dtype));
                // SAFETY: the caller's promise.
                unsafe { (self.nccl.fns.ncclAllGather)(own, to, len, dtype, raw, stream.raw()) }
            };
            if let [part] = parts {
                return gather(part);
            }
            // SAFETY: takes nothing, and is ended below whatever happens in between.
            let started = unsafe { (self.nccl.fns.ncclGroupStart)() };
            let failed = |code: &Code| *code != SUCCESS && *code != IN_PROGRESS;
            let first = parts.iter().map(gather).find(failed);
            // SAFETY: ends what was started above.
            let ended = unsafe { (self.nccl.fns.ncclGroupEnd)() };
            Some(started).filter(failed).or(first).unwrap_or(ended)
        })
    }

    /// In place: rank r gets the combination of all ranks' elements from r times the length on, there; the rest is left
    /// as NCCL leaves it. Collective.
    ///
    /// # Safety
    /// As [`NcclComm::all_gather`].
    pub unsafe fn reduce_scatter(&self, what: &What, part: Part, reduction: Reduction, stream: &Stream) -> Result<()> {
        let (from, own) = (pointer(part.data), part.at(self.config.rank));
        self.reducing(what, stream, part.dtype, reduction, |raw, dtype, op| {
            // SAFETY: the caller's promise.
            unsafe { (self.nccl.fns.ncclReduceScatter)(from, own, part.shard_len, dtype, op, raw, stream.raw()) }
        })
    }

    /// In place over `len` elements. Collective.
    ///
    /// # Safety
    /// As [`NcclComm::all_gather`].
    pub unsafe fn all_reduce(
        &self,
        what: &What,
        data: CUdeviceptr,
        len: usize,
        dtype: DType,
        reduction: Reduction,
        stream: &Stream,
    ) -> Result<()> {
        self.reducing(what, stream, dtype, reduction, |raw, dtype, op| {
            // SAFETY: the caller's promise.
            unsafe { (self.nccl.fns.ncclAllReduce)(pointer(data), pointer(data), len, dtype, op, raw, stream.raw()) }
        })
    }

    /// `root`'s `len` elements on every rank, in place. Collective.
    ///
    /// # Safety
    /// As [`NcclComm::all_gather`].
    pub unsafe fn broadcast(
        &self,
        what: &What,
        data: CUdeviceptr,
        len: usize,
        dtype: DType,
        root: usize,
        stream: &Stream,
    ) -> Result<()> {
        if root >= self.config.world_size {
            return Err(err!(
                InvalidArgument,
                "there is no rank {root} of {} to broadcast from",
                self.config.world_size
            ));
        }
        let (data, dtype, root) = (pointer(data), number_of(dtype), root as c_int);
        self.collective(what, stream, |raw| {
            // SAFETY: the caller's promise.
            unsafe { (self.nccl.fns.ncclBroadcast)(data, data, len, dtype, root, raw, stream.raw()) }
        })
    }

    /// Looks for errors of peers, and for a collective that has been at work for too long, without waiting; whether all
    /// that was given to the GPU is done.
    pub fn poll(&self) -> Result<bool> {
        let mut state = self.working()?;
        let mut now: Code = SUCCESS;
        // SAFETY: the communicator lives, the pointer is valid.
        let code = unsafe { (self.nccl.fns.ncclCommGetAsyncError)(state.raw, &mut now) };
        let what = state.watch.oldest().cloned().unwrap_or_else(|| What::named("the communicator"));
        for code in [code, now] {
            if code != SUCCESS && code != IN_PROGRESS {
                return Err(self.fail(&mut state, &what, code));
            }
        }
        let done = match state.watch.look() {
            Ok(done) => done,
            Err(e) => return Err(self.broken(&mut state, e.context(self.place(&what)))),
        };
        if let Some(what) = state.watch.stuck(self.config.timeout).cloned() {
            return Err(self.late(&mut state, &what));
        }
        Ok(done)
    }

    /// Waits until all that was given to the GPU is done, with the deadline for each of it.
    pub fn wait(&self) -> Result<()> {
        while !self.poll()? {
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Ends all of it at once: nothing of it runs on the GPU any more, and peers that wait for this rank fail or meet
    /// their deadlines. Every later call returns an error with `reason`.
    pub fn abort(&self, reason: &str) {
        let error = err!(Aborted, "rank {} of {} has aborted: {reason}", self.config.rank, self.config.world_size);
        // Another thread may hold the lock while it waits for a peer.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.clone());
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.broken(&mut state, error);
    }

    /// The error that broke it.
    pub fn async_error(&self) -> Option<Error> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).error.clone()
    }

    /// Runs `f` with the communicator, for calls that are done when they return.
    pub(super) fn with<T>(&self, f: impl FnOnce(&'static Nccl, ncclComm_t) -> Result<T>) -> Result<T> {
        let _current = self.context.enter()?;
        f(self.nccl, self.working()?.raw)
    }

    /// As `with`, for a call that may be at work when it returns, waiting for other ranks, say. A failure of it aborts.
    pub(super) fn with_all(
        &self,
        what: &What,
        f: impl FnOnce(&'static Nccl, ncclComm_t) -> Result<Code>,
    ) -> Result<()> {
        let _current = self.context.enter()?;
        let mut state = self.working()?;
        let code = f(self.nccl, state.raw)?;
        self.settle(&mut state, what, code)
    }

    fn connected(
        nccl: &'static Nccl,
        context: &Arc<Context>,
        config: NcclConfig,
        raw: ncclComm_t,
    ) -> Result<Arc<NcclComm>> {
        if raw.is_null() {
            return Err(err!(Device, "rank {} of {}: NCCL has made no communicator", config.rank, config.world_size));
        }
        let state = Mutex::new(State { raw, watch: Watch::default(), error: None });
        let comm = NcclComm { nccl, context: context.clone(), config, asked: Mutex::new(None), state };
        comm.settle(&mut *comm.working()?, &What::named("joining NCCL's ranks"), SUCCESS)?;
        Ok(Arc::new(comm))
    }

    fn collective(&self, what: &What, stream: &Stream, call: impl FnOnce(ncclComm_t) -> Code) -> Result<()> {
        let _current = self.context.enter()?;
        let mut state = self.working()?;
        let code = call(state.raw);
        self.settle(&mut state, what, code)?;
        let added = state.watch.add(&self.context, stream, what);
        added.map_err(|e| self.broken(&mut state, e.context(self.place(what))))
    }

    fn reducing(
        &self,
        what: &What,
        stream: &Stream,
        dtype: DType,
        reduction: Reduction,
        call: impl FnOnce(ncclComm_t, c_int, c_int) -> Code,
    ) -> Result<()> {
        let number = number_of(dtype);
        let simple = match reduction {
            Reduction::Sum => Some(NCCL_SUM),
            Reduction::Max => Some(NCCL_MAX),
            Reduction::Mean if !dtype.is_float() => {
                return Err(err!(InvalidArgument, "{dtype} has no averages"));
            }
            // Of one rank the mean is the sum: nothing depends on what NCCL's averages do there.
            Reduction::Mean if self.config.world_size == 1 => Some(NCCL_SUM),
            Reduction::Mean => Some(NCCL_AVG),
            Reduction::Scaled(_) => None,
        };
        let (Reduction::Scaled(factor), None) = (reduction, simple) else {
            return self.collective(what, stream, |raw| call(raw, number, simple.unwrap_or(NCCL_SUM)));
        };
        let mut scalar = scalar_of(dtype, factor)?;
        let op = self.with(|nccl, raw| {
            let mut op = 0;
            let scalar = scalar.as_mut_ptr().cast();
            // SAFETY: the scalar is of the type, and read before the call returns.
            let code = unsafe { (nccl.fns.ncclRedOpCreatePreMulSum)(&mut op, scalar, number, HOST_IMMEDIATE, raw) };
            nccl.check(format_args!("{}: making a scaled sum", self.place(what)), code).map(|()| op)
        })?;
        // After a failure it has gone with the communicator.
        self.collective(what, stream, |raw| call(raw, number, op))?;
        self.with(|nccl, raw| {
            // SAFETY: made above for this communicator. What uses it has been launched.
            nccl.check("giving back a scaled sum", unsafe { (nccl.fns.ncclRedOpDestroy)(op, raw) })
        })
    }

    /// The communicator, unless it is broken.
    fn working(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &state.error {
            Some(e) => Err(e.clone()),
            None => Ok(state),
        }
    }

    /// Waits until a call that returned `code` is done, with the deadline.
    fn settle(&self, state: &mut State, what: &What, code: Code) -> Result<()> {
        if code != SUCCESS && code != IN_PROGRESS {
            return Err(self.fail(state, what, code));
        }
        let start = Instant::now();
        loop {
            let mut now: Code = SUCCESS;
            // SAFETY: the communicator lives, the pointer is valid.
            let code = unsafe { (self.nccl.fns.ncclCommGetAsyncError)(state.raw, &mut now) };
            match (code, now) {
                (SUCCESS, SUCCESS) => return Ok(()),
                (SUCCESS, IN_PROGRESS) => {}
                (SUCCESS, now) => return Err(self.fail(state, what, now)),
                (code, _) => return Err(self.fail(state, what, code)),
            }
            if let Some(error) = self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone() {
                return Err(self.broken(state, error));
            }
            if start.elapsed() > self.config.timeout {
                return Err(self.late(state, what));
            }
            // Most calls are done at once; the first ones of a communicator connect it.
            match start.elapsed() < PAUSE {
                true => std::thread::yield_now(),
                false => std::thread::sleep(PAUSE),
            }
        }
    }

    fn place(&self, what: &What) -> String {
        format!("rank {} of {}: {what}", self.config.rank, self.config.world_size)
    }

    fn late(&self, state: &mut State, what: &What) -> Error {
        let ms = self.config.timeout.as_millis();
        self.broken(
            state,
            err!(Timeout, "{} was not done within {ms} ms: another rank has not come to it", self.place(what)),
        )
    }

    fn fail(&self, state: &mut State, what: &What, code: Code) -> Error {
        // SAFETY: the communicator has not been aborted yet.
        let says = unsafe { self.nccl.describe(code, state.raw) };
        self.broken(state, Error::new(status_of(code), format!("{}: {says}", self.place(what))))
    }

    /// Aborts; the first error counts.
    fn broken(&self, state: &mut State, error: Error) -> Error {
        if !state.raw.is_null() {
            if let Ok(_current) = self.context.enter() {
                // SAFETY: it lives, and is used no more.
                unsafe { (self.nccl.fns.ncclCommAbort)(state.raw) };
            }
            state.raw = std::ptr::null_mut();
        }
        state.error.get_or_insert(error).clone()
    }
}

impl Drop for NcclComm {
    /// Waits, with the deadline, for what was given to the GPU; the other ranks do not matter once that is done.
    fn drop(&mut self) {
        let done = self.wait().is_ok();
        let Ok(_current) = self.context.enter() else { return };
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.raw.is_null() {
            return;
        }
        let start = Instant::now();
        // SAFETY: it lives; finalizing leaves it there until it is destroyed or aborted.
        let mut code = unsafe { (self.nccl.fns.ncclCommFinalize)(state.raw) };
        while done && code == IN_PROGRESS && start.elapsed() < self.config.timeout {
            std::thread::sleep(PAUSE);
            // SAFETY: as above.
            let asked = unsafe { (self.nccl.fns.ncclCommGetAsyncError)(state.raw, &mut code) };
            if asked != SUCCESS {
                break;
            }
        }
        // SAFETY: used no more. What could not be finalized is aborted instead, which waits for nobody.
        unsafe {
            match done && code == SUCCESS {
                true => (self.nccl.fns.ncclCommDestroy)(state.raw),
                false => (self.nccl.fns.ncclCommAbort)(state.raw),
            }
        };
    }
}

impl std::fmt::Debug for NcclComm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NcclComm, rank {} of {}", self.config.rank, self.config.world_size)
    }
}
