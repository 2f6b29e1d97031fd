//! Communicators on collectives that the host lends.

use super::comm::{index, timeout};
use super::handle::{fsdp_comm_t, insert};
use super::host_table::{Table, User};
use super::status::{boundary, fsdp_status_t, out, read_sized, Sized_};
use super::tensor::fsdp_dtype_t;
use crate::comm::host::table::{Lane, LANES};
use crate::comm::host::{self, MESSAGE};
use crate::comm::shm;
use crate::error::{err, Result};
use std::ffi::{c_char, c_void};
use std::sync::Arc;

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
        && FSDP_HOST_LANES as usize == LANES
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
    /// Number of ranks, 1 to 1,048,576.
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
///           returns without waiting for other ranks; it has ended when `test` says so. The memory stays as it is until
///           then, and for ever if that never comes. Without `test` all must block; with it none may wait for other
///           ranks. Several may be under way at once, on each lane.
/// Threads   One thread at a time calls collectives, test, wait and split of one user_data; those of a split one may be
///           called by another thread at the same time. post, poll, abort, alloc, free and describe_error: by any thread,
///           at any time. release: by whichever thread destroys the last user.
/// Memory    Never overlaps but where that is said; may have any alignment that fits its elements.
///
/// Types are float32, float64, float16, bfloat16, int32, int64 and uint8, as fsdp_dtype_t; op is FSDP_REDUCE_SUM, _MAX or
/// _MIN. Order and rounding of sums are the host's: those of reduce_scatter are what gradients are made of. What all_reduce
/// gives must be the same bits on every rank.
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
    /// The last use of a user_data, of fsdp_comm_init_host or of split: nothing is called with it any more. Local. NULL:
    /// nothing. Not called where a collective has never ended.
    pub release: Option<unsafe extern "C" fn(user_data: *mut c_void)>,
    /// Sends FSDP_HOST_MESSAGE_BYTES to a rank without waiting for it; the message is copied. By these ranks learn at once of
    /// an error or an abort of another, and a missed deadline names who is missing. NULL, as poll then: they learn by
    /// their deadline.
    pub post: Option<unsafe extern "C" fn(user_data: *mut c_void, rank: i32, message: *const c_void) -> i32>,
    /// A message that has come: *rank = its sender, message is filled. *rank = -1: none. Does not wait.
    pub poll: Option<unsafe extern "C" fn(user_data: *mut c_void, rank: *mut i32, message: *mut c_void) -> i32>,
    /// The communicator has failed: the host may end what it can, e.g. blocking callbacks of other threads. Local. NULL:
    /// nothing.
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
        let user = Arc::new(User::new(calls, user_data));
        let comm = host::init(&config, Arc::new(Table::new(user.clone())))?;
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
