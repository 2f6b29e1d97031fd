//! `fsdp_plan`: what a model will take and move when it is sharded, before anything is allocated.

use super::engine::{param_dtype, reduce_dtype, strategy};
use super::handle::{fsdp_model_t, get};
use super::model::lock;
use super::status::{boundary, fsdp_status_t, read_sized, write_sized, Sized_};
use super::tensor::{fsdp_dtype_t, FSDP_DEVICE_CPU, FSDP_DEVICE_CUDA};
use crate::config::{CudaConfig, EngineConfig};
use crate::error::{err, Result};
use crate::forecast::{Forecast, Request};

/// fsdp_plan_request_t.rank: the rank with the most bytes, the lowest of several.
pub const FSDP_LARGEST_RANK: i32 = -1;

/// What to plan. Initialize with FSDP_PLAN_REQUEST_INIT, then set what differs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_plan_request_t {
    /// sizeof(fsdp_plan_request_t).
    pub struct_size: usize,
    /// Ranks, 1 to 2^24: any number, whatever a communicator can do today.
    pub world_size: u32,
    /// As in fsdp_engine_config_t.
    pub strategy: i32,
    /// As in fsdp_engine_config_t.
    pub reduce_dtype: fsdp_dtype_t,
    /// As in fsdp_engine_config_t.
    pub gradient_slots: u32,
    /// Bytes of optimizer state per element of a trained parameter: 0 for plain SGD, 8 for Adam in float32; at most 4096.
    pub optimizer_bytes_per_element: u32,
    /// Whose bytes to tell: a rank, or FSDP_LARGEST_RANK.
    pub rank: i32,
    /// As in fsdp_engine_config_t.
    pub param_dtype: fsdp_dtype_t,
    /// As in fsdp_engine_config_t.
    pub shard_size: u32,
    /// As in fsdp_engine_config_t.
    pub cpu_offload: i32,
    /// Where the engine will compute: FSDP_DEVICE_CUDA, or FSDP_DEVICE_CPU or 0.
    pub device_type: i32,
    /// On a GPU: as in fsdp_cuda_config_t.
    pub prefetch: u32,
    /// As in fsdp_engine_config_t.
    pub grads_in_param_dtype: i32,
}

/// What an engine will use and do. "This rank" is the one asked for; ranks differ in padding and optimizer state only. A
/// step is one forward and one backward through the hooks, in which each unit is used once; a unit that is used k times
/// is gathered k times as often. Set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_plan_t {
    /// sizeof(fsdp_plan_t).
    pub struct_size: usize,
    /// This rank.
    pub rank: u32,
    /// Units, the root included.
    pub unit_count: u32,
    /// Elements of all parameters, tied ones counted once.
    pub numel: u64,
    /// Elements of the parameters that are not frozen.
    pub trained_numel: u64,
    /// As fsdp_stats_t will say.
    pub param_shard_bytes: u64,
    /// As fsdp_stats_t will say.
    pub grad_shard_bytes: u64,
    /// Optimizer state of this rank: optimizer_bytes_per_element for each element of a trained parameter in its shards. What
    /// aligns it comes on top: with fsdp_optimizer_t less than 64 bytes per parameter and state.
    pub optimizer_bytes: u64,
    /// As fsdp_stats_t will say.
    pub gradient_slot_bytes: u64,
    /// Bytes of this rank's shards that belong to no parameter.
    pub shard_padding_bytes: u64,
    /// Bytes of all unit buffers that belong to no parameter: the padding of all ranks of a shard group together.
    pub padding_bytes: u64,
    /// As fsdp_stats_t will say: on shm once per host.
    pub unit_buffer_bytes: u64,
    /// Most bytes of unit buffers unsharded at once, parameters that are computed in 16 bits counted so: where units are
    /// resharded after their forward the largest sum along a path of nested units, else all. No memory of its own on shm;
    /// where bytes move, each rank needs it besides its shards.
    pub unsharded_peak_bytes: u64,
    /// This rank at its peak: its shards, gradient shards, gradient slots and optimizer state.
    pub rank_peak_bytes: u64,
    /// All ranks together, as on shm, where they are on one host: each shard group's unit buffers and copies in 16 bits, and
    /// every rank's gradient shards, gradient slots and optimizer state.
    pub host_peak_bytes: u64,
    /// All-gathers of a step.
    pub all_gathers: u64,
    /// Bytes of the unit buffers that they fill, parameters that are computed in 16 bits counted so. On shm they move none
    /// of them.
    pub all_gather_bytes: u64,
    /// Bytes of them that each rank sends where bytes move: (world_size - 1) / world_size of each one's, rounded up.
    pub all_gather_sent_bytes: u64,
    /// In so many messages, around a ring: world_size - 1 per all-gather.
    pub all_gather_messages: u64,
    /// Reduce-scatters of a step.
    pub reduce_scatters: u64,
    /// Bytes of the gradients that each rank gives to them. On shm they stay where they are: each rank reads its own range
    /// of every rank's, as many bytes in all.
    pub reduce_scatter_bytes: u64,
    /// Bytes that each rank sends where bytes move: (world_size - 1) / world_size of reduce_scatter_bytes.
    pub reduce_scatter_sent_bytes: u64,
    /// In so many messages, around a ring: world_size - 1 per reduce-scatter.
    pub reduce_scatter_messages: u64,
    /// All-reduces of a step, over the replicas of a hybrid or unsharded engine, of float32 means; on a GPU of whole shards.
    pub all_reduces: u64,
    /// Bytes of the gradients that each rank gives to them.
    pub all_reduce_bytes: u64,
    /// Bytes that each rank sends where bytes move: 2 (n - 1) / n of all_reduce_bytes with n replicas.
    pub all_reduce_sent_bytes: u64,
    /// In so many messages, around a ring: 2 (n - 1) per all-reduce.
    pub all_reduce_messages: u64,
    /// As fsdp_stats_t will say: on shm once per host.
    pub compute_buffer_bytes: u64,
    /// As fsdp_stats_t will count for each step after which this rank's shards are written.
    pub all_gather_bytes_moved: u64,
    /// As fsdp_stats_t will say. Part of rank_peak_bytes.
    pub offloaded_bytes: u64,
    /// On a GPU, else 0, as the next: the fixed pool of unit buffers, as fsdp_cuda_stats_t will say. gradient_slot_bytes is of
    /// the fixed slots there.
    pub pool_bytes: u64,
    /// This rank's device memory at its peak: pool, gradient slots and, without cpu_offload, shards, gradient shards and
    /// optimizer state; as fsdp_cuda_stats_t will say, if nothing is taken beyond the pool. Activations are the host's.
    pub device_peak_bytes: u64,
}

/// A unit, the same on every rank. Set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_plan_unit_t {
    /// sizeof(fsdp_plan_unit_t).
    pub struct_size: usize,
    /// Number of its module.
    pub module: u32,
    /// Parameters that it owns.
    pub param_count: u32,
    /// Their elements.
    pub numel: u64,
    /// Bytes of the unit buffer: world_size times shard_bytes.
    pub unit_bytes: u64,
    /// Bytes of each rank's shard.
    pub shard_bytes: u64,
    /// Bytes of the unit buffer that belong to no parameter.
    pub padding_bytes: u64,
    /// All-gathers of a step.
    pub all_gathers: u64,
    /// Reduce-scatters of a step: 0 for a unit that is frozen.
    pub reduce_scatters: u64,
    /// Bytes of the gradients that each rank gives to them.
    pub reduce_scatter_bytes: u64,
    /// All-reduces of a step.
    pub all_reduces: u64,
    /// Bytes of the gradients that this rank gives to them.
    pub all_reduce_bytes: u64,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_plan_request_t {
    const NAME: &'static str = "fsdp_plan_request_t";
}
// SAFETY: as above.
unsafe impl Sized_ for fsdp_plan_t {
    const NAME: &'static str = "fsdp_plan_t";
}
// SAFETY: as above.
unsafe impl Sized_ for fsdp_plan_unit_t {
    const NAME: &'static str = "fsdp_plan_unit_t";
}

/// Says what an engine on `model`, as it is wrapped by now, would take and move: bytes on a rank and on a host, and the
/// collectives of a training step. Allocates nothing of it; parameters need no storage (data NULL) and no initializer.
/// Takes time by the number of parameters and units, not by world size or elements. Local. Errors:
/// FSDP_ERR_INVALID_ARGUMENT for a rank that the world has not, and for a model with a part that is sharded already over
/// another number of ranks. Since 0.1.
///
/// # Safety
/// `request` is NULL or points to `struct_size` readable bytes, `out` is NULL or points to `struct_size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn fsdp_plan(
    model: *const fsdp_model_t,
    request: *const fsdp_plan_request_t,
    out: *mut fsdp_plan_t,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let f = unsafe { forecast(model, request) }?;
        let plan = fsdp_plan_t {
            struct_size: 0,
            rank: f.rank as u32,
            unit_count: f.units.len() as u32,
            numel: f.numel,
            trained_numel: f.trained_numel,
            param_shard_bytes: f.param_shard_bytes,
            grad_shard_bytes: f.grad_shard_bytes,
            optimizer_bytes: f.optimizer_bytes,
            gradient_slot_bytes: f.gradient_slot_bytes,
            shard_padding_bytes: f.shard_padding_bytes,
            padding_bytes: f.padding_bytes,
            unit_buffer_bytes: f.unit_buffer_bytes,
            unsharded_peak_bytes: f.unsharded_peak_bytes,
            rank_peak_bytes: f.rank_peak_bytes,
            host_peak_bytes: f.host_peak_bytes,
            all_gathers: f.all_gather.collectives,
            all_gather_bytes: f.all_gather.bytes,
            all_gather_sent_bytes: f.all_gather.sent_bytes,
            all_gather_messages: f.all_gather.sent_messages,
            reduce_scatters: f.reduce_scatter.collectives,
            reduce_scatter_bytes: f.reduce_scatter.bytes,
            reduce_scatter_sent_bytes: f.reduce_scatter.sent_bytes,
            reduce_scatter_messages: f.reduce_scatter.sent_messages,
            all_reduces: f.all_reduce.collectives,
            all_reduce_bytes: f.all_reduce.bytes,
            all_reduce_sent_bytes: f.all_reduce.sent_bytes,
            all_reduce_messages: f.all_reduce.sent_messages,
            compute_buffer_bytes: f.compute_buffer_bytes,
            all_gather_bytes_moved: f.cast_bytes,
            offloaded_bytes: f.offloaded_bytes,
            pool_bytes: f.pool_bytes,
            device_peak_bytes: f.device_peak_bytes,
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(out, plan) }
    })
}

/// The same for one unit: 0 is the root, the others follow in depth-first order of the module tree, as in an engine. Plans
/// the whole model on each call. Local. Since 0.1.
///
/// # Safety
/// As for fsdp_plan.
#[no_mangle]
pub unsafe extern "C" fn fsdp_plan_unit(
    model: *const fsdp_model_t,
    request: *const fsdp_plan_request_t,
    unit: u32,
    out: *mut fsdp_plan_unit_t,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let f = unsafe { forecast(model, request) }?;
        let u = f.unit(unit)?;
        let unit = fsdp_plan_unit_t {
            struct_size: 0,
            module: u.module,
            param_count: u.params as u32,
            numel: u.numel,
            unit_bytes: u.bytes,
            shard_bytes: u.shard_bytes,
            padding_bytes: u.padding_bytes,
            all_gathers: u.all_gather.collectives,
            reduce_scatters: u.reduce_scatter.collectives,
            reduce_scatter_bytes: u.reduce_scatter.bytes,
            all_reduces: u.all_reduce.collectives,
            all_reduce_bytes: u.all_reduce.bytes,
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(out, unit) }
    })
}

/// # Safety
/// `request` is NULL or points to `struct_size` readable bytes.
unsafe fn forecast(model: *const fsdp_model_t, request: *const fsdp_plan_request_t) -> Result<Forecast> {
    let model = get(model)?;
    // SAFETY: the caller's promise.
    let r = unsafe { read_sized(request) }?;
    let of = fsdp_plan_request_t::NAME;
    let rank = match r.rank {
        FSDP_LARGEST_RANK => None,
        rank => Some(usize::try_from(rank).map_err(|_| err!(InvalidArgument, "{of}.rank cannot be {rank}"))?),
    };
    let config = EngineConfig {
        gradient_slots: r.gradient_slots,
        strategy: strategy(r.strategy, of)?,
        shard_size: r.shard_size,
        reduce_dtype: reduce_dtype(r.reduce_dtype, of)?,
        param_dtype: param_dtype(r.param_dtype, of)?,
        cpu_offload: r.cpu_offload != 0,
        grads_in_param_dtype: r.grads_in_param_dtype != 0,
        cuda: match r.device_type {
            0 | FSDP_DEVICE_CPU => None,
            FSDP_DEVICE_CUDA => Some(CudaConfig { prefetch: r.prefetch as usize, ..CudaConfig::default() }),
            other => return Err(err!(InvalidArgument, "{of}.device_type cannot be {other}")),
        },
        ..EngineConfig::default()
    };
    let (world_size, optimizer_bytes_per_element) = (r.world_size as usize, r.optimizer_bytes_per_element);
    // Planned outside the lock, on a copy, as an engine is.
    let tree = lock(&model)?.clone();
    Forecast::new(&tree, &Request { world_size, rank, config, optimizer_bytes_per_element })
}
