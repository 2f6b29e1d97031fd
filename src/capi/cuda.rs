//! Engines on GPUs: what a host chooses for one, the stream it computes on, and what the engine has taken there.

use super::engine::with;
use super::handle::fsdp_engine_t;
use super::model::UserData;
use super::status::{boundary, fsdp_status_t, read_sized, write_sized, Sized_};
use crate::config::{CudaConfig, Registration};
use crate::device::cuda::DeviceAllocator;
use crate::error::{err, Result};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of fsdp_cuda_config_t.nccl_unique_id.
pub const FSDP_NCCL_UNIQUE_ID_BYTES: usize = 128;

/// fsdp_cuda_config_t.registered_buffers: where NCCL's version can register memory and no allocator is lent.
pub const FSDP_REGISTERED_BUFFERS_AUTO: i32 = 0;
/// fsdp_cuda_config_t.registered_buffers: none.
pub const FSDP_REGISTERED_BUFFERS_NEVER: i32 = 1;
/// fsdp_cuda_config_t.registered_buffers: with a lent allocator, too; where NCCL's version cannot, the engine is not made.
pub const FSDP_REGISTERED_BUFFERS_ALWAYS: i32 = 2;

/// An engine on a GPU: what fsdp_engine_config_t.cuda points to. Initialize with FSDP_CUDA_CONFIG_INIT, then set what
/// differs.
///
/// CUDA's driver and NVRTC, and with several ranks NCCL, are looked for when the engine is made: what this machine lacks is
/// FSDP_ERR_UNSUPPORTED, with a message that says what was looked for and where. Each rank has a GPU; the communicator that
/// the engine is made with stays on the host: it compares what ranks do and carries small things, NCCL moves the rest.
///
/// Addresses of an engine on a GPU are device addresses: of fsdp_engine_unshard, fsdp_engine_param_data and
/// fsdp_engine_param_grad always; those of fsdp_shard_t and of an optimizer's states, too, unless cpu_offload is set: they are
/// pinned host memory then. Tensors say which (fsdp_tensor_t.device). What the host launches that uses them, it launches on
/// the compute stream; the engine orders its own queues after and before that, and waits on the host only where a function
/// says so. Pieces and states that the host gives (fsdp_engine_total_norm, fsdp_grad_scaler_*, fsdp_state_t,
/// fsdp_engine_gather) lie where the engine's shards do; full parameters, whole tensors of checkpoints and initializers'
/// tensors are in host memory.
///
/// With several ranks units are unsharded and reduced in the same
/// order on every rank (reduced: of every shard group), whatever order_check says, and 16-bit gradients are summed by NCCL in that
/// type. A unit that is resharded over a number of ranks (fsdp_engine_set_reshard_after_forward) keeps a part of its unit buffer in
/// memory that is taken and given back as it is used. Engines that share shards (fsdp_model_add_sharded) are on one GPU, with the
/// same cpu_offload (else FSDP_ERR_UNSUPPORTED), and are used on one compute stream, or the host orders their streams; the first
/// one's stream and allocator are used until the last of them is destroyed.
/// With replicas (hybrid strategies, FSDP_NO_SHARD) each reduce-scatter of a backward that averages over them is followed by an
/// all-reduce of the shard, in float32; fsdp_engine_set_is_last_backward and fsdp_engine_set_requires_all_reduce are called before
/// the backward that they are for, the same on every rank.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_cuda_config_t {
    /// sizeof(fsdp_cuda_config_t).
    pub struct_size: usize,
    /// The GPU's number among those that this process sees; may differ between ranks.
    pub device: i32,
    /// Units gathered ahead of their use at most, where fsdp_engine_set_prefetch_order gives an order; 0: none. Each may take
    /// a unit buffer.
    pub prefetch: u32,
    /// Most unit buffers at once; a unit that needs one more is FSDP_ERR_INVALID_STATE. 0: as many as needed: a
    /// fixed pool for the deepest path of nested units and `prefetch` more (without resharding after forward: for all units),
    /// and memory taken and given back as it is used for what the pool has no room for.
    pub max_units_in_flight: u32,
    /// The host's stream (a cudaStream_t or CUstream of the GPU's primary context) until fsdp_engine_set_compute_stream says
    /// otherwise; NULL: the legacy default stream. It outlives the engine and its optimizers. cudaStreamPerThread is
    /// FSDP_ERR_INVALID_ARGUMENT: it is another stream on every thread.
    pub compute_stream: *mut c_void,
    /// Milliseconds that a collective may take on the GPU once it is its turn; 0: 600,000.
    pub timeout_ms: i64,
    /// FSDP_NCCL_UNIQUE_ID_BYTES bytes, the same on every rank, of which no other communicator was made (ncclGetUniqueId); NULL
    /// on every rank: rank 0 makes one. Not used with one rank, which needs no NCCL.
    pub nccl_unique_id: *const c_void,
    /// Takes device memory that work on `stream` may use from here on, at an address of a multiple of 256; NULL if there is
    /// none. `bytes` is more than 0. NULL: memory comes from the driver's pool. May be called in every function of the
    /// engine, in its thread, with the GPU's primary context current; must not call the engine.
    pub alloc: Option<unsafe extern "C" fn(user_data: *mut c_void, bytes: usize, stream: *mut c_void) -> *mut c_void>,
    /// Gives it back: work that comes later on `stream`, the one it was taken for, may use it for something else. NULL exactly
    /// if alloc is.
    pub free:
        Option<unsafe extern "C" fn(user_data: *mut c_void, memory: *mut c_void, bytes: usize, stream: *mut c_void)>,
    /// Passed to alloc and free; used until the engine and its optimizers are destroyed.
    pub allocator_user_data: *mut c_void,
    /// Whether the fixed unit buffers of shard groups of several ranks are memory of NCCL's own (ncclMemAlloc) that is registered
    /// with the communicators that gather into it (the group's, and those of smaller groups), so that NCCL copies nothing in
    /// between: FSDP_REGISTERED_BUFFERS_AUTO, _NEVER or _ALWAYS, the same on every rank. As windows where the version has them
    /// (2.27), else as buffers (2.19); before that AUTO registers nothing, and ALWAYS is FSDP_ERR_UNSUPPORTED. A registration that
    /// NCCL refuses is an error of every rank: no engine is made, or it is broken (smaller groups). NCCL wants every rank to use the same
    /// buffer for the same all-gather: ranks must reshard in the same order as well, relative to what they unshard; a rank that
    /// does not is FSDP_ERR_MISMATCH on all, which NEVER avoids. Gradient slots are not registered, neither for reduce-scatters nor
    /// for the replicas' all-reduces, since which slot a unit has depends on which gradients a rank has; nor is what is taken
    /// beyond the pool. NCCL rounds the memory up to pieces of 2 MiB or more, which is not counted; fsdp_engine_destroy waits for
    /// the GPU before it is freed.
    pub registered_buffers: i32,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_cuda_config_t {
    const NAME: &'static str = "fsdp_cuda_config_t";
}

/// What an engine on a GPU has taken there and done. Set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_cuda_stats_t {
    /// sizeof(fsdp_cuda_stats_t).
    pub struct_size: usize,
    /// Bytes of the fixed pool of unit buffers.
    pub pool_bytes: u64,
    /// Unit buffers in the pool.
    pub pool_buffers: u32,
    /// Most unit buffers that held a unit at once, gathered ahead included.
    pub buffers_peak: u32,
    /// Bytes of the fixed gradient slots.
    pub slot_bytes: u64,
    /// Bytes of device memory that the engine and its optimizers have now: the pool, slots, shards, gradient shards, states,
    /// and what was taken beyond the pool.
    pub device_bytes: u64,
    /// Most of it at once.
    pub device_bytes_peak: u64,
    /// All-gathers that were issued ahead and had to make room before they were used.
    pub evictions: u64,
    /// Times that unit buffers, and gradient slots, were taken beyond the pool.
    pub overflows: u64,
    /// Bytes of the pool that are registered with NCCL, what aligns them included: all of them, or 0.
    pub registered_bytes: u64,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_cuda_stats_t {
    const NAME: &'static str = "fsdp_cuda_stats_t";
}

/// What the host launches from here on for this engine, it launches on `stream` (NULL: the legacy default stream): the new
/// stream starts after what the one before has been given so far. Call it before the engine's other functions where the
/// host's current stream may have changed (another thread, backward); nothing happens if it is the same. FSDP_ERR_UNSUPPORTED
/// for an engine on the CPU, FSDP_ERR_INVALID_ARGUMENT for cudaStreamPerThread. Local; does not wait. Since 0.1.
///
/// # Safety
/// `stream` is a stream of the engine's GPU as long as the engine and its optimizers live.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_set_compute_stream(
    engine: *mut fsdp_engine_t,
    stream: *mut c_void,
) -> fsdp_status_t {
    // SAFETY: the caller's promise.
    boundary(|| with(engine, |e| unsafe { e.set_compute_stream(stream) }))
}

/// The error that has broken the engine's communicators, if there is one; on a GPU it looks for failures of peers and for
/// collectives that are late, as every hook does. For a host that waits for the GPU by itself. Local; does not wait. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_async_error(engine: *mut fsdp_engine_t) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.poll()))
}

/// Waits until the GPU has done what this engine has given it, with the deadline of its collectives; an error names unit, rank
/// and collective. Nothing to do on the CPU. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_synchronize(engine: *mut fsdp_engine_t) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.synchronize()))
}

/// What the engine has taken on its GPU and done there. FSDP_ERR_UNSUPPORTED for an engine on the CPU. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or points to `struct_size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_cuda_stats(
    engine: *const fsdp_engine_t,
    out: *mut fsdp_cuda_stats_t,
) -> fsdp_status_t {
    boundary(|| {
        let s = with(engine, |e| e.cuda_stats())?;
        let stats = fsdp_cuda_stats_t {
            struct_size: 0,
            pool_bytes: s.pool_bytes,
            pool_buffers: s.pool_buffers as u32,
            buffers_peak: s.buffers_peak as u32,
            slot_bytes: s.slot_bytes,
            device_bytes: s.device_bytes,
            device_bytes_peak: s.device_bytes_peak,
            evictions: s.evictions,
            overflows: s.overflows,
            registered_bytes: s.registered_bytes,
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(out, stats) }
    })
}

/// The config that a host gave.
///
/// # Safety
/// `config` is NULL or points to `struct_size` readable bytes; what it points to is as fsdp.h says.
pub(super) unsafe fn cuda_config(config: *const fsdp_cuda_config_t) -> Result<Option<CudaConfig>> {
    if config.is_null() {
        return Ok(None);
    }
    let of = fsdp_cuda_config_t::NAME;
    // SAFETY: the caller's promise.
    let c = unsafe { read_sized(config) }?;
    let device = usize::try_from(c.device).map_err(|_| err!(InvalidArgument, "{of}.device cannot be {}", c.device))?;
    let timeout = match c.timeout_ms {
        0 => CudaConfig::default().timeout,
        ms => u64::try_from(ms)
            .map(Duration::from_millis)
            .map_err(|_| err!(InvalidArgument, "{of}.timeout_ms cannot be {ms}"))?,
    };
    let allocator: Option<Arc<dyn DeviceAllocator>> = match (c.alloc, c.free) {
        (None, None) if !c.allocator_user_data.is_null() => {
            return Err(err!(InvalidArgument, "{of}.allocator_user_data is set, but alloc and free are NULL"));
        }
        (None, None) => None,
        (Some(alloc), Some(free)) => {
            Some(Arc::new(Allocator { alloc, free, user_data: UserData(c.allocator_user_data) }))
        }
        _ => return Err(err!(InvalidArgument, "{of}.alloc and free: one is NULL and the other is not")),
    };
    let registration = Registration::ALL.into_iter().find(|r| *r as i32 == c.registered_buffers);
    let registration = registration
        .ok_or_else(|| err!(InvalidArgument, "{of}.registered_buffers cannot be {}", c.registered_buffers))?;
    let id = (!c.nccl_unique_id.is_null()).then(|| {
        // SAFETY: the caller's promise.
        unsafe { *c.nccl_unique_id.cast::<[u8; FSDP_NCCL_UNIQUE_ID_BYTES]>() }
    });
    Ok(Some(CudaConfig {
        device,
        prefetch: c.prefetch as usize,
        max_units_in_flight: c.max_units_in_flight as usize,
        compute_stream: c.compute_stream as usize,
        timeout,
        unique_id: id,
        allocator,
        registration,
    }))
}

/// The host's allocator as the crate knows it.
struct Allocator {
    alloc: unsafe extern "C" fn(*mut c_void, usize, *mut c_void) -> *mut c_void,
    free: unsafe extern "C" fn(*mut c_void, *mut c_void, usize, *mut c_void),
    user_data: UserData,
}

// SAFETY: the host promises that any thread that calls the engine may call these.
unsafe impl Send for Allocator {}
// SAFETY: as above.
unsafe impl Sync for Allocator {}

impl DeviceAllocator for Allocator {
    fn alloc(&self, bytes: usize, stream: *mut c_void) -> Option<u64> {
        // SAFETY: the host's promise.
        let memory = unsafe { (self.alloc)(self.user_data.get(), bytes, stream) };
        (!memory.is_null()).then_some(memory as u64)
    }

    fn free(&self, address: u64, bytes: usize, stream: *mut c_void) {
        // SAFETY: the host's promise; it is what `alloc` gave, and used no more.
        unsafe { (self.free)(self.user_data.get(), address as *mut c_void, bytes, stream) }
    }
}
