//! `fsdp_comm_t`: making communicators, and collectives on the caller's memory.

use super::handle::{fsdp_comm_t, get, insert, remove};
use super::status::{boundary, boundary_void, fsdp_status_t, out, read_sized, string, Sized_};
use super::tensor::{fsdp_tensor_t, HostTensor};
use crate::comm::{env, shm, single, ReduceOp};
use crate::dtype::DType;
use crate::error::{err, Result};
use std::ffi::c_char;
use std::time::Duration;

/// Sum over the ranks, in rank order.
pub const FSDP_REDUCE_SUM: i32 = 0;
/// Sum divided by the world size; floating dtypes only.
pub const FSDP_REDUCE_AVG: i32 = 1;
/// Largest of the ranks' values.
pub const FSDP_REDUCE_MAX: i32 = 2;
/// Smallest of the ranks' values.
pub const FSDP_REDUCE_MIN: i32 = 3;

/// How a rank joins a job on one host. Initialize with FSDP_SHM_CONFIG_INIT, then set what differs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_shm_config_t {
    /// sizeof(fsdp_shm_config_t).
    pub struct_size: usize,
    /// The job's name, the same on every rank and used by no other running job of this user. Borrowed for the call.
    pub job: *const c_char,
    /// This process's rank, 0 to world_size - 1.
    pub rank: i32,
    /// Number of processes of the job.
    pub world_size: i32,
    /// Milliseconds to wait for the other ranks to join; 0: 120,000.
    pub rendezvous_timeout_ms: i64,
    /// Milliseconds to wait for a living rank in a collective; 0: 600,000. A dead rank is noticed at once.
    pub timeout_ms: i64,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_shm_config_t {
    const NAME: &'static str = "fsdp_shm_config_t";
}

/// Makes a communicator of world size 1. Local. *out is owned by the caller: fsdp_comm_destroy. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_init_single(out: *mut *mut fsdp_comm_t) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(insert(single::init()));
        Ok(())
    })
}

/// Joins a job of ranks on this host. Collective: returns when all ranks of the job have joined. Uses abstract unix
/// sockets and memory files: nothing in the file system, nothing left behind however a process ends. *out is owned by
/// the caller: fsdp_comm_destroy. Errors: FSDP_ERR_RENDEZVOUS names missing ranks at the deadline, ranks claimed twice,
/// different world sizes, and a job name in use; a process of another user is refused. Since 0.1.
///
/// # Safety
/// `config` is NULL or points to `struct_size` readable bytes, `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_init_shm(
    config: *const fsdp_shm_config_t,
    out: *mut *mut fsdp_comm_t,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (config, out) = unsafe { (read_sized(config)?, self::out(out, "out")?) };
        // SAFETY: a borrowed C string, by the contract of the field.
        let job = unsafe { string(config.job, "job") }?.to_string();
        let defaults = shm::Config::new(job, index(config.rank, "rank")?, index(config.world_size, "world_size")?);
        let config = shm::Config {
            rendezvous_timeout: timeout(
                config.rendezvous_timeout_ms,
                defaults.rendezvous_timeout,
                "rendezvous_timeout_ms",
            )?,
            timeout: timeout(config.timeout_ms, defaults.timeout, "timeout_ms")?,
            ..defaults
        };
        out.write(insert(shm::init(&config)?));
        Ok(())
    })
}

/// Joins the job that a launcher started this process in, by its environment variables: `fsdp run` and torchrun (RANK,
/// WORLD_SIZE, MASTER_ADDR, MASTER_PORT), Open MPI, Slurm, MPICH. None set: world size 1. FSDP_JOB names the job where
/// the launcher's own variables should not; FSDP_TIMEOUT_MS and FSDP_RENDEZVOUS_TIMEOUT_MS are as in
/// fsdp_shm_config_t. Else as fsdp_comm_init_shm. Errors: FSDP_ERR_INVALID_ARGUMENT names a variable that is missing or
/// no number, FSDP_ERR_UNSUPPORTED says that ranks are on several hosts. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_init_env(out: *mut *mut fsdp_comm_t) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(insert(env::init()?));
        Ok(())
    })
}

/// Makes a communicator of the ranks that give the same `color` (0 or more), in the order of (`key`, rank), as
/// MPI_Comm_split does. Collective over `comm`. The result is independent of `comm`: it has its own order of collectives,
/// breaks alone, may be used in another thread, and outlives `comm`. *out is owned by the caller: fsdp_comm_destroy.
/// Errors: as of fsdp_comm_init_shm. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_split(
    comm: *mut fsdp_comm_t,
    color: i32,
    key: i32,
    out: *mut *mut fsdp_comm_t,
) -> fsdp_status_t {
    boundary(|| {
        let comm = get(comm as *const fsdp_comm_t)?;
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        let color =
            u32::try_from(color).map_err(|_| err!(InvalidArgument, "color is {color}: it must be 0 or more"))?;
        out.write(insert(comm.split(color, key)?));
        Ok(())
    })
}

/// This process's rank. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_rank(comm: *const fsdp_comm_t, out: *mut i32) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        unsafe { self::out(out, "out") }?.write(get(comm)?.rank() as i32);
        Ok(())
    })
}

/// Number of ranks. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_world_size(comm: *const fsdp_comm_t, out: *mut i32) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        unsafe { self::out(out, "out") }?.write(get(comm)?.world_size() as i32);
        Ok(())
    })
}

/// Returns when every rank has called it. Collective. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_comm_barrier(comm: *mut fsdp_comm_t) -> fsdp_status_t {
    boundary(|| get(comm as *const fsdp_comm_t)?.barrier())
}

/// Combines the ranks' tensors in place, in rank order, so that every rank gets the same bits. Collective; blocks.
/// `tensor`: same dtype (float32, float64, float16, bfloat16, int32, int64, uint8) and elements on every rank, borrowed for
/// the call. `op`: FSDP_REDUCE_*. Since 0.1.
///
/// # Safety
/// `tensor` is NULL or describes memory that this call alone may read and write.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_all_reduce(
    comm: *mut fsdp_comm_t,
    tensor: *const fsdp_tensor_t,
    op: i32,
) -> fsdp_status_t {
    boundary(|| {
        let comm = get(comm as *const fsdp_comm_t)?;
        // SAFETY: the caller's promise.
        let (tensor, data) = unsafe { host(tensor, "tensor") }?;
        comm.all_reduce(data, tensor.dtype, reduce_op(op)?)
    })
}

/// Copies rank `root`'s tensor into every rank's. Collective; blocks. `tensor`: same dtype and elements on every rank,
/// borrowed for the call. Since 0.1.
///
/// # Safety
/// As fsdp_comm_all_reduce.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_broadcast(
    comm: *mut fsdp_comm_t,
    tensor: *const fsdp_tensor_t,
    root: i32,
) -> fsdp_status_t {
    boundary(|| {
        let comm = get(comm as *const fsdp_comm_t)?;
        // SAFETY: the caller's promise.
        let (tensor, data) = unsafe { host(tensor, "tensor") }?;
        let root = usize::try_from(root).ok().filter(|r| *r < comm.world_size());
        let root =
            root.ok_or_else(|| err!(InvalidArgument, "root is no rank: the world size is {}", comm.world_size()))?;
        comm.broadcast(data, tensor.dtype, root)
    })
}

/// Concatenates the ranks' inputs in rank order into every rank's output. Collective; blocks. `output` has world_size
/// times the elements of `input`; both are borrowed for the call and must not overlap (FSDP_ERR_INVALID_ARGUMENT). Since 0.1.
///
/// # Safety
/// As fsdp_comm_all_reduce, for both tensors.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_all_gather(
    comm: *mut fsdp_comm_t,
    input: *const fsdp_tensor_t,
    output: *const fsdp_tensor_t,
) -> fsdp_status_t {
    boundary(|| {
        let comm = get(comm as *const fsdp_comm_t)?;
        // SAFETY: the caller's promise.
        let (from, to, dtype) = unsafe { pair(input, output) }?;
        if from.len().checked_mul(comm.world_size()) != Some(to.len()) {
            return Err(sizes(from.len(), to.len(), "world_size times the bytes of input"));
        }
        comm.all_gather_host(from, to, dtype)
    })
}

/// Combines the ranks' inputs in rank order and leaves range `rank` of the result in each rank's output. Collective;
/// blocks. `input` has world_size times the elements of `output`; both are borrowed for the call and must not overlap (FSDP_ERR_INVALID_ARGUMENT).
/// Since 0.1.
///
/// # Safety
/// As fsdp_comm_all_reduce, for both tensors.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_reduce_scatter(
    comm: *mut fsdp_comm_t,
    input: *const fsdp_tensor_t,
    output: *const fsdp_tensor_t,
    op: i32,
) -> fsdp_status_t {
    boundary(|| {
        let comm = get(comm as *const fsdp_comm_t)?;
        // SAFETY: the caller's promise.
        let (from, to, dtype) = unsafe { pair(input, output) }?;
        if to.len().checked_mul(comm.world_size()) != Some(from.len()) {
            return Err(sizes(from.len(), to.len(), "the bytes of input divided by world_size"));
        }
        comm.reduce_scatter_host(from, to, dtype, reduce_op(op)?)
    })
}

/// Breaks the communicator on every rank: their pending and later calls return FSDP_ERR_ABORTED with a message that
/// names this rank and `reason`. Local, from any thread. `reason`: NUL-terminated, borrowed for the call. Since 0.1.
///
/// # Safety
/// `reason` is NULL or a NUL-terminated string.
#[no_mangle]
pub unsafe extern "C" fn fsdp_comm_abort(comm: *mut fsdp_comm_t, reason: *const c_char) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let reason = unsafe { string(reason, "reason") }?;
        get(comm as *const fsdp_comm_t)?.abort(reason);
        Ok(())
    })
}

/// The error that broke the communicator (a peer's death, an abort), without waiting: returns its status and leaves its
/// message for fsdp_last_error_message; FSDP_OK while it works. Local, from any thread. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_comm_async_error(comm: *const fsdp_comm_t) -> fsdp_status_t {
    boundary(|| get(comm)?.async_error().map_or(Ok(()), Err))
}

/// Leaves the job; NULL does nothing. Local: peers that still wait for this rank get an error that says it has left.
/// Engines made on the communicator keep it until they are destroyed. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_comm_destroy(comm: *mut fsdp_comm_t) {
    boundary_void(|| remove(comm));
}

/// A tensor and its memory.
///
/// # Safety
/// `tensor` is NULL or describes memory that the caller may read and write while the result lives.
unsafe fn host<'a>(tensor: *const fsdp_tensor_t, name: &str) -> Result<(HostTensor, &'a mut [u8])> {
    // SAFETY: the caller's promise, for both.
    unsafe {
        let tensor = HostTensor::read(tensor, name)?;
        let data = tensor.slice(name)?;
        Ok((tensor, data))
    }
}

/// Input and output of one collective: same dtype, no overlap.
///
/// # Safety
/// As [`host`], for both.
unsafe fn pair<'a>(
    input: *const fsdp_tensor_t,
    output: *const fsdp_tensor_t,
) -> Result<(&'a [u8], &'a mut [u8], DType)> {
    // SAFETY: the caller's promise.
    let (from, to) = unsafe { (HostTensor::read(input, "input")?, HostTensor::read(output, "output")?) };
    if from.dtype != to.dtype {
        return Err(err!(InvalidArgument, "input is {} but output is {}", from.dtype, to.dtype));
    }
    let (a, b) = (from.data as usize, to.data as usize);
    if a < b.saturating_add(to.bytes()) && b < a.saturating_add(from.bytes()) {
        return Err(err!(InvalidArgument, "input and output overlap"));
    }
    // SAFETY: the caller's promise; checked not to overlap.
    unsafe { Ok((from.slice("input")?, to.slice("output")?, from.dtype)) }
}

fn sizes(input: usize, output: usize, expected: &str) -> crate::error::Error {
    err!(InvalidArgument, "input has {input} bytes and output {output}: output must have {expected}")
}

fn reduce_op(op: i32) -> Result<ReduceOp> {
    match op {
        FSDP_REDUCE_SUM => Ok(ReduceOp::Sum),
        FSDP_REDUCE_AVG => Ok(ReduceOp::Avg),
        FSDP_REDUCE_MAX => Ok(ReduceOp::Max),
        FSDP_REDUCE_MIN => Ok(ReduceOp::Min),
        _ => Err(err!(InvalidArgument, "op {op} is not one of FSDP_REDUCE_*")),
    }
}

pub(super) fn index(value: i32, name: &str) -> Result<usize> {
    usize::try_from(value).map_err(|_| err!(InvalidArgument, "{name} is {value}: it must not be negative"))
}

pub(super) fn timeout(ms: i64, default: Duration, name: &str) -> Result<Duration> {
    match u64::try_from(ms) {
        Ok(0) => Ok(default),
        Ok(ms) => Ok(Duration::from_millis(ms)),
        Err(_) => Err(err!(InvalidArgument, "{name} is {ms}: it must not be negative")),
    }
}
