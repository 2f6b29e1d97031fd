//! What an engine is and has done: its units, parameters, sizes and counters.

use super::engine::with;
use super::handle::{fsdp_engine_t, get};
use super::status::{boundary, fsdp_status_t, out, write_sized, Sized_};
use super::tensor::{self, fsdp_dtype_t};
use crate::dtype::DType;
use crate::error::err;
use std::ffi::c_char;

/// fsdp_unit_info_t.state: the unit's parameters cannot be read.
pub const FSDP_UNIT_SHARDED: i32 = 0;
/// The unit's parameters can be read as views of the unit buffer.
pub const FSDP_UNIT_UNSHARDED: i32 = 1;

/// A unit. Set struct_size before the call; pointers are borrowed until fsdp_engine_destroy.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_unit_info_t {
    /// sizeof(fsdp_unit_info_t).
    pub struct_size: usize,
    /// Fully qualified name of its module, "" for the root.
    pub name: *const c_char,
    /// Number of its module.
    pub module: u32,
    /// Parameters that it owns.
    pub param_count: u32,
    /// Their numbers, in order of registration.
    pub params: *const u32,
    /// Bytes of the unit buffer: world_size times shard_bytes.
    pub unit_bytes: u64,
    /// Bytes of this rank's shard.
    pub shard_bytes: u64,
    /// Bytes of the unit buffer that belong to no parameter.
    pub padding_bytes: u64,
    /// FSDP_UNIT_SHARDED or FSDP_UNIT_UNSHARDED.
    pub state: i32,
    /// The type that its gradients are rounded to before they are summed.
    pub reduce_dtype: fsdp_dtype_t,
    /// Bytes of the copies of its parameters that are computed in 16 bits, each on a 64-byte line; on shm one copy a host.
    pub compute_bytes: u64,
    /// All-gathers of the unit so far.
    pub all_gathers: u64,
    /// Reduce-scatters of it that this rank has started.
    pub reduce_scatters: u64,
    /// Bytes at the address that fsdp_engine_unshard gives. On the CPU unit_bytes; on a GPU the unit's layout in each type that
    /// one of its parameters is computed in, one behind the other: float32, bfloat16, float16.
    pub buffer_bytes: u64,
}

/// A parameter and its place. Set struct_size before the call; pointers are borrowed until fsdp_engine_destroy.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_param_info_t {
    /// sizeof(fsdp_param_info_t).
    pub struct_size: usize,
    /// Fully qualified name of its first registration.
    pub name: *const c_char,
    /// The unit that owns it.
    pub unit: u32,
    /// Number of dimensions.
    pub ndim: i32,
    /// ndim sizes.
    pub shape: *const i64,
    /// Elements.
    pub numel: i64,
    /// First element in the unit buffer, in elements from its start.
    pub unit_offset: i64,
    /// First element of this rank's piece in the flattened (row-major) parameter; 0 if the piece is empty.
    pub shard_offset: i64,
    /// Elements of this rank's piece; may be 0.
    pub shard_numel: i64,
    /// 0 if it is frozen.
    pub requires_grad: i32,
    /// What it is computed in: the dtype of fsdp_engine_param_data.
    pub dtype: fsdp_dtype_t,
    /// First byte of its 16-bit copy among those of its unit; 0 if it is computed in float32. On a GPU, of every parameter: its
    /// first byte in the unit buffer.
    pub compute_offset: i64,
}

/// What an engine uses and has done. Set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_stats_t {
    /// sizeof(fsdp_stats_t).
    pub struct_size: usize,
    /// Bytes of this rank's shards of all units, padding included.
    pub param_shard_bytes: u64,
    /// Bytes of this rank's gradient shards, padding and alignment included.
    pub grad_shard_bytes: u64,
    /// Bytes of this rank's gradient slots, when all are used to the full. A unit that finds all taken uses as much
    /// again as the largest of them.
    pub gradient_slot_bytes: u64,
    /// Bytes of all unit buffers that belong to no parameter.
    pub padding_bytes: u64,
    /// Bytes of all unit buffers, each on a cache line of its own. On shm they are the ranks' shards laid end to end: one
    /// copy a host. On a GPU: of the fixed pool.
    pub unit_buffer_bytes: u64,
    /// All-gathers so far.
    pub all_gathers: u64,
    /// Bytes that they moved. On shm: what this rank's shards took in 16 bits, when they were rounded for those parameters
    /// that are computed so; once after each time that shards could be written, and nothing else.
    pub all_gather_bytes_moved: u64,
    /// Reduce-scatters so far.
    pub reduce_scatters: u64,
    /// Bytes of the gradients that this rank gave to them.
    pub reduce_scatter_bytes: u64,
    /// Most gradient slots in use at once.
    pub slots_peak: u32,
    /// Most units at once that collected gradients in memory of their own.
    pub overflow_peak: u32,
    /// Most bytes of full parameters in private memory at once while fsdp_engine_create gave parameters without storage
    /// their values: the largest unit of such parameters, alignment included.
    pub materialized_peak_bytes: u64,
    /// All-gathers issued ahead of the unit that was asked for (fsdp_engine_set_prefetch_order).
    pub prefetches: u64,
    /// Bytes of the unit buffers that all-gathers have filled.
    pub all_gather_bytes: u64,
    /// Bytes of them that each rank sends where bytes move: (n - 1) / n of them in a group of n ranks.
    pub all_gather_sent_bytes: u64,
    /// All-reduces of gradients over replicas so far: one per unit with gradients and iteration.
    pub all_reduces: u64,
    /// Bytes of this rank's gradients that it gave to them.
    pub all_reduce_bytes: u64,
    /// Bytes of the copies of all parameters that are computed in 16 bits; on shm one copy a host. 0 on a GPU, whose unit
    /// buffers have them.
    pub compute_buffer_bytes: u64,
    /// Bytes of this rank's shards in host memory, besides their place in the unit buffers (cpu_offload).
    pub offloaded_bytes: u64,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_unit_info_t {
    const NAME: &'static str = "fsdp_unit_info_t";
}
// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_param_info_t {
    const NAME: &'static str = "fsdp_param_info_t";
}
// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_stats_t {
    const NAME: &'static str = "fsdp_stats_t";
}

/// Number of units; unit 0 is the root, the others follow in depth-first order of the module tree. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_unit_count(engine: *const fsdp_engine_t, out: *mut u32) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(with(engine, |e| Ok(e.plan().units.len() as u32))?);
        Ok(())
    })
}

/// Number of parameters, tied ones counted once; numbers are those of the model. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_param_count(engine: *const fsdp_engine_t, out: *mut u32) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(with(engine, |e| Ok(e.plan().params.len() as u32))?);
        Ok(())
    })
}

/// Describes a unit. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or points to `struct_size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_unit_info(
    engine: *const fsdp_engine_t,
    unit: u32,
    out: *mut fsdp_unit_info_t,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine)?;
        let u = object.engine.unit(unit)?;
        let counts = object.engine.unit_counts(unit)?;
        let info = fsdp_unit_info_t {
            struct_size: 0,
            name: object.unit_names[unit as usize].as_ptr(),
            module: u.module,
            param_count: u.params.len() as u32,
            params: u.params.as_ptr(),
            unit_bytes: u.bytes() as u64,
            shard_bytes: u.shard_bytes() as u64,
            padding_bytes: (u.layout.padding() * DType::F32.size()) as u64,
            state: counts.state as i32,
            reduce_dtype: tensor::c_dtype(u.reduce_dtype),
            compute_bytes: u.compute_bytes as u64,
            all_gathers: counts.all_gathers,
            reduce_scatters: counts.reduce_scatters,
            buffer_bytes: object.engine.buffer_bytes(unit) as u64,
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(out, info) }
    })
}

/// Describes a parameter. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or points to `struct_size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_param_info(
    engine: *const fsdp_engine_t,
    param: u32,
    out: *mut fsdp_param_info_t,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine)?;
        let p = object.engine.param(param)?;
        let layout = &object.engine.unit(p.unit)?.layout;
        let info = fsdp_param_info_t {
            struct_size: 0,
            name: object.param_names[param as usize].as_ptr(),
            unit: p.unit,
            ndim: p.shape.len() as i32,
            shape: p.shape.as_ptr(),
            numel: layout.numels[p.index] as i64,
            unit_offset: layout.offsets[p.index] as i64,
            shard_offset: p.piece.param_offset as i64,
            shard_numel: p.piece.len as i64,
            requires_grad: p.requires_grad.into(),
            dtype: tensor::c_dtype(p.compute),
            compute_offset: object.engine.offset_in_buffer(param) as i64,
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(out, info) }
    })
}

/// Describes the engine as JSON, for people and tools: rank, world_size, shard_group_size,
/// replica, strategy; stats (the fields of fsdp_stats_t);
/// units, each with name, state ("sharded" or "unsharded"), unit_bytes, shard_bytes, all_gathers, reduce_scatters, and
/// params, each with name, shape, unit_offset, shard_offset, shard_numel, requires_grad, has_grad. Later versions may add
/// fields. *out_size is its size with the terminating NUL; `buffer` of `buffer_size` bytes receives it, or may be NULL to
/// ask for the size. FSDP_ERR_INVALID_ARGUMENT if the buffer is too small. Local. Since 0.1.
///
/// # Safety
/// `buffer` is NULL or has `buffer_size` writable bytes; `out_size` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_describe(
    engine: *const fsdp_engine_t,
    buffer: *mut c_char,
    buffer_size: usize,
    out_size: *mut usize,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine)?;
        // SAFETY: the caller's promise.
        let out_size = unsafe { self::out(out_size, "out_size") }?;
        let text = object.engine.describe()?.into_bytes();
        if !buffer.is_null() {
            if buffer_size <= text.len() {
                let needed = text.len() + 1;
                return Err(err!(InvalidArgument, "buffer has {buffer_size} bytes, the description needs {needed}"));
            }
            // SAFETY: the caller's promise; checked to be large enough for the text and a NUL.
            unsafe {
                std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, text.len());
                buffer.add(text.len()).write(0);
            }
        }
        out_size.write(text.len() + 1);
        Ok(())
    })
}

/// The unit that a module belongs to: itself if it was wrapped, else its nearest wrapped ancestor. Local. Since 0.1.
///
/// # Safety
/// `out_unit` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_unit_of_module(
    engine: *const fsdp_engine_t,
    module: u32,
    out_unit: *mut u32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out_unit, "out_unit") }?;
        let unit = with(engine, |e| Ok(e.plan().unit_of_module.get(module as usize).copied()))?;
        out.write(unit.ok_or_else(|| err!(InvalidArgument, "module {module} does not exist"))?);
        Ok(())
    })
}

/// What the engine uses and has done so far. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or points to `struct_size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_stats(engine: *const fsdp_engine_t, out: *mut fsdp_stats_t) -> fsdp_status_t {
    boundary(|| {
        let s = with(engine, |e| e.stats())?;
        let stats = fsdp_stats_t {
            struct_size: 0,
            param_shard_bytes: s.param_shard_bytes,
            grad_shard_bytes: s.grad_shard_bytes,
            gradient_slot_bytes: s.gradient_slot_bytes,
            padding_bytes: s.padding_bytes,
            unit_buffer_bytes: s.unit_buffer_bytes,
            all_gathers: s.all_gathers,
            all_gather_bytes_moved: s.all_gather_bytes_moved,
            reduce_scatters: s.gradients.reduce_scatters,
            reduce_scatter_bytes: s.gradients.reduce_scatter_bytes,
            slots_peak: s.gradients.slots_peak as u32,
            overflow_peak: s.gradients.overflow_peak as u32,
            materialized_peak_bytes: s.materialized_peak_bytes,
            prefetches: s.prefetches,
            all_gather_bytes: s.all_gather_bytes,
            all_gather_sent_bytes: s.all_gather_sent_bytes,
            all_reduces: s.replicas.all_reduces,
            all_reduce_bytes: s.replicas.all_reduce_bytes,
            compute_buffer_bytes: s.compute_buffer_bytes,
            offloaded_bytes: s.offloaded_bytes,
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(out, stats) }
    })
}
