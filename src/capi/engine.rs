//! `fsdp_engine_t`: a sharded model, the hooks a host calls around its compute, and access to shards.

use super::handle::{fsdp_comm_t, fsdp_engine_t, fsdp_model_t, fsdp_trace_t, get, insert, remove};
use super::model::{fsdp_module_init_fn, lock, module_init};
use super::status::{boundary, boundary_void, fsdp_status_t, out, read_sized, write_sized, Sized_};
use super::tensor::{self, fsdp_dtype_t, fsdp_tensor_t, HostTensor};
use crate::config::{EngineConfig, OrderCheck, Strategy};
use crate::dtype::DType;
use crate::engine::Engine;
use crate::error::{err, Result};
use std::ffi::{c_char, c_void, CString};
use std::sync::Arc;

/// fsdp_unit_info_t.state: the unit's parameters cannot be read.
pub const FSDP_UNIT_SHARDED: i32 = 0;
/// The unit's parameters can be read as views of the unit buffer.
pub const FSDP_UNIT_UNSHARDED: i32 = 1;

/// fsdp_engine_config_t.strategy: a unit is unsharded only while it computes, in forward and in backward (ZeRO-3).
pub const FSDP_FULL_SHARD: i32 = 0;
/// A unit stays unsharded from its forward until its backward has ended (ZeRO-2).
pub const FSDP_SHARD_GRAD_OP: i32 = 1;
/// Every rank holds all parameters, and gradients are averaged over the ranks (data parallel).
pub const FSDP_NO_SHARD: i32 = 2;
/// FSDP_FULL_SHARD within groups of shard_size consecutive ranks. The groups are replicas of each other: once an iteration
/// they average their gradients.
pub const FSDP_HYBRID_SHARD: i32 = 3;
/// FSDP_SHARD_GRAD_OP within such groups (PyTorch's _HYBRID_SHARD_ZERO2).
pub const FSDP_HYBRID_SHARD_GRAD_OP: i32 = 4;

/// fsdp_engine_config_t.order_check: every unshard is compared with the other ranks'; a difference is
/// FSDP_ERR_MISMATCH on every rank.
pub const FSDP_ORDER_CHECK_ERROR: i32 = 0;
/// The first training iteration is compared as above. A rank whose forward later differs from its first logs one warning
/// (fsdp_set_log_callback), and goes on: units are matched by their number, and one that a rank skips counts as zero
/// from it.
pub const FSDP_ORDER_CHECK_WARN: i32 = 1;
/// The same without the comparison and without the warning.
pub const FSDP_ORDER_CHECK_OFF: i32 = 2;

/// Options of an engine, the same on every rank. Initialize with FSDP_ENGINE_CONFIG_INIT, then set what differs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_engine_config_t {
    /// sizeof(fsdp_engine_config_t).
    pub struct_size: usize,
    /// Buffers per rank for a unit's full gradients: how many units may collect or reduce gradients at once. 0: one
    /// more than the levels of nested units. A unit that finds all taken collects in memory of its own.
    pub gradient_slots: u32,
    /// FSDP_FULL_SHARD, FSDP_SHARD_GRAD_OP, FSDP_NO_SHARD, FSDP_HYBRID_SHARD or FSDP_HYBRID_SHARD_GRAD_OP. Whatever it is,
    /// the root stays unsharded between its forward and its backward: see fsdp_engine_set_reshard_after_forward.
    pub strategy: i32,
    /// FSDP_ORDER_CHECK_ERROR, _WARN or _OFF. Reductions are matched by unit in every case; everything else is always
    /// compared.
    pub order_check: i32,
    /// The type that each rank rounds its gradients to (to nearest even) before they are summed; the sum and the gradient
    /// shards are float32. {FSDP_DTYPE_FLOAT, 16, 1}, {FSDP_DTYPE_BFLOAT, 16, 1}, or {0, 0, 0} for float32.
    pub reduce_dtype: fsdp_dtype_t,
    /// Initializes the parameters without storage, module by module, in place of the reset functions (also of modules
    /// without parameters) and parameter initializers of the model; NULL to use those. Called by fsdp_engine_create only,
    /// in its thread.
    pub param_init_fn: fsdp_module_init_fn,
    /// Passed to param_init_fn.
    pub param_init_user_data: *mut c_void,
    /// What parameters are computed in (unsharded to), unless the model says otherwise (fsdp_model_set_unit_dtypes,
    /// fsdp_model_set_param_dtype): float32, float16, bfloat16, or {0, 0, 0} for the dtype each was registered with. Shards
    /// are float32 whatever it is. A part of the model that was sharded before keeps what it had.
    pub param_dtype: fsdp_dtype_t,
    /// Ranks of a shard group, a divisor of the world size, with the hybrid strategies; else 0.
    pub shard_size: u32,
    /// 1: every rank starts from rank 0's values, which it broadcasts. The others' memory and initializers are not looked at,
    /// and a parameter may have storage on some ranks only. 0: each rank cuts its own.
    pub sync_module_states: i32,
    /// 1: this rank's shards, gradient shards and optimizer state (of fsdp_optimizer_t) lie in host memory, apart from the
    /// unit buffers, which are on the device; shards are uploaded when they are first needed after they were written. On the
    /// CPU this is a second copy of the shards in the same kind of memory, and gives the same results. 0: they lie on the
    /// device, and shards in the unit buffers. A part of the model that was sharded before stays where it was.
    pub cpu_offload: i32,
}

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
    /// First byte of its 16-bit copy among those of its unit; 0 if it is computed in float32.
    pub compute_offset: i64,
}

/// This rank's piece of a parameter. The pointers are borrowed until fsdp_engine_destroy; when data may be written is
/// said at fsdp_engine_begin_write.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_shard_t {
    /// numel elements.
    pub data: *mut f32,
    /// The mean gradient of the piece, numel elements; NULL while there is none. May be written any time outside
    /// backward, e.g. to clip it.
    pub grad: *mut f32,
    /// Elements; may be 0.
    pub numel: i64,
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
    /// copy a host.
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
    /// Bytes of the copies of all parameters that are computed in 16 bits; on shm one copy a host.
    pub compute_buffer_bytes: u64,
    /// Bytes of this rank's shards in host memory, besides their place in the unit buffers (cpu_offload).
    pub offloaded_bytes: u64,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_engine_config_t {
    const NAME: &'static str = "fsdp_engine_config_t";
}
// SAFETY: as above.
unsafe impl Sized_ for fsdp_unit_info_t {
    const NAME: &'static str = "fsdp_unit_info_t";
}
// SAFETY: as above.
unsafe impl Sized_ for fsdp_param_info_t {
    const NAME: &'static str = "fsdp_param_info_t";
}
// SAFETY: as above.
unsafe impl Sized_ for fsdp_stats_t {
    const NAME: &'static str = "fsdp_stats_t";
}

/// An engine and the names C reads.
pub struct EngineObject {
    pub engine: Arc<Engine>,
    unit_names: Vec<CString>,
    param_names: Vec<CString>,
}

impl EngineObject {
    fn new(engine: Engine) -> EngineObject {
        let names = |n: &String| CString::new(n.as_str()).unwrap_or_default();
        EngineObject {
            unit_names: engine.plan().units.iter().map(|u| names(&u.name)).collect(),
            param_names: engine.plan().params.iter().map(|p| names(&p.fqn)).collect(),
            engine: Arc::new(engine),
        }
    }
}

impl Drop for EngineObject {
    /// An optimizer may keep the engine.
    fn drop(&mut self) {
        self.engine.stop_reading();
    }
}

/// The strategy that a field of the struct `of` names.
pub(super) fn strategy(value: i32, of: &str) -> Result<Strategy> {
    let known = Strategy::ALL.into_iter().find(|s| *s as i32 == value);
    known.ok_or_else(|| err!(InvalidArgument, "{of}.strategy cannot be {value}"))
}

/// The reduce_dtype of the struct `of`; all zero is float32.
pub(super) fn reduce_dtype(value: fsdp_dtype_t, of: &str) -> Result<DType> {
    let fsdp_dtype_t { code, bits, lanes } = value;
    let known = match (code, bits, lanes) {
        (0, 0, 0) => Some(DType::F32),
        (code, bits, 1) => DType::from_dlpack(code, bits),
        _ => None,
    };
    known.filter(|d| crate::comm::can_reduce(*d)).ok_or_else(|| {
        err!(
            Unsupported,
            "gradients cannot be reduced as {{code {code}, bits {bits}, lanes {lanes}}} ({of}.reduce_dtype): float32, float16 \
             and bfloat16 can"
        )
    })
}

/// The param_dtype of the struct `of`; all zero is as registered.
pub(super) fn param_dtype(value: fsdp_dtype_t, of: &str) -> Result<Option<DType>> {
    let dtype = tensor::optional_dtype(value, &format!("{of}.param_dtype"))?;
    if let Some(d) = dtype.filter(|d| !crate::precision::can_compute(*d)) {
        return Err(err!(
            Unsupported,
            "parameters cannot be computed in {d} ({of}.param_dtype): float32, float16 and bfloat16 are supported"
        ));
    }
    Ok(dtype)
}

fn engine_config(c: &fsdp_engine_config_t) -> Result<EngineConfig> {
    let of = fsdp_engine_config_t::NAME;
    let order_check = OrderCheck::ALL.into_iter().find(|o| *o as i32 == c.order_check);
    let order_check =
        order_check.ok_or_else(|| err!(InvalidArgument, "{of}.order_check cannot be {}", c.order_check))?;
    let (strategy, reduce_dtype) = (strategy(c.strategy, of)?, reduce_dtype(c.reduce_dtype, of)?);
    let param_dtype = param_dtype(c.param_dtype, of)?;
    // SAFETY: the host's promise for a function it gives: it may be called with its user data.
    let param_init = unsafe { module_init(c.param_init_fn, c.param_init_user_data) };
    if param_init.is_none() && !c.param_init_user_data.is_null() {
        return Err(err!(
            InvalidArgument,
            "expected param_init_fn to be callable: it is NULL, and param_init_user_data is not"
        ));
    }
    Ok(EngineConfig {
        gradient_slots: c.gradient_slots,
        strategy,
        shard_size: c.shard_size,
        order_check,
        reduce_dtype,
        param_dtype,
        param_init,
        sync_module_states: c.sync_module_states != 0,
        cpu_offload: c.cpu_offload != 0,
    })
}

pub(super) fn with<T>(engine: *const fsdp_engine_t, f: impl FnOnce(&Engine) -> Result<T>) -> Result<T> {
    f(&get(engine)?.engine)
}

/// Shards a model over the ranks of `comm`: copies this rank's cut of every parameter; the host's own memory is not
/// needed afterwards. Parameters without storage are initialized first, one unit at a time, in private memory that is
/// released before the next unit: every rank runs every initializer, so seed them alike. An initializer that fails, or
/// leaves an element untouched, on one rank is the same error on every rank. Collective: same model, wrapping and configuration on every rank, else FSDP_ERR_MISMATCH names
/// the first parameter that differs. `config` may be NULL for the defaults. `model` and `comm` stay the caller's and may
/// be destroyed while the engine lives. *out is owned by the caller: fsdp_engine_destroy. Since 0.1.
///
/// # Safety
/// The data of every parameter of `model` is readable; `config` is NULL or points to `struct_size` readable bytes; `out`
/// is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_create(
    model: *const fsdp_model_t,
    comm: *mut fsdp_comm_t,
    config: *const fsdp_engine_config_t,
    out: *mut *mut fsdp_engine_t,
) -> fsdp_status_t {
    boundary(|| {
        let (model, comm) = (get(model)?, get(comm as *const fsdp_comm_t)?);
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        let config = match config.is_null() {
            true => EngineConfig::default(),
            // SAFETY: the caller's promise.
            false => engine_config(&unsafe { read_sized(config) }?)?,
        };
        let tree = lock(&model)?.clone();
        // SAFETY: the caller's promise.
        let engine = unsafe { Engine::new(&tree, comm, &config) }?;
        out.write(insert(Arc::new(EngineObject::new(engine))));
        Ok(())
    })
}

/// Frees the engine and this rank's shards; NULL does nothing. Local. All pointers got from it end here. An optimizer
/// of it keeps the shards' memory until it is destroyed too. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_destroy(engine: *mut fsdp_engine_t) {
    boundary_void(|| remove(engine));
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
            compute_offset: p.compute_offset as i64,
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

/// Says whether a backward follows the forwards from here on (default: 1). With 0 the root's post_forward ends the
/// iteration. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_set_grad_enabled(engine: *mut fsdp_engine_t, enabled: i32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.set_grad_enabled(enabled != 0)))
}

/// Freezes or trains a parameter from the next iteration on: a frozen one gets no gradients (fsdp_engine_param_grad
/// refuses it). FSDP_ERR_INVALID_STATE while gradients are being collected. Local; may differ between ranks: those that
/// have no gradient for it count as zero. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_set_requires_grad(
    engine: *mut fsdp_engine_t,
    param: u32,
    requires_grad: i32,
) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.set_requires_grad(param, requires_grad != 0)))
}

/// Issues the all-gather of each unit when the one before it in the order of `trace` is unsharded (in backward: in the
/// reverse order). A unit that turns out not to be needed has been gathered in vain. Give the same trace on every rank,
/// between iterations; it is not needed afterwards. FSDP_ERR_INVALID_ARGUMENT for a trace of a model of another shape.
/// Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_set_prefetch_order(
    engine: *mut fsdp_engine_t,
    trace: *const fsdp_trace_t,
) -> fsdp_status_t {
    boundary(|| {
        let trace = get(trace)?;
        let trace = super::trace::lock(&trace)?;
        with(engine, |e| e.set_prefetch_order(&trace))
    })
}

/// Says that a forward of the whole model begins. Units that the last one left unsharded are resharded. The order of
/// unshards up to fsdp_engine_end_forward is recorded if `training` is not 0 and this is the first, else compared with the
/// first (order_check). Not needed by hosts that call pre_forward of the root, which begins a forward by itself
/// (training: as fsdp_engine_set_grad_enabled says). Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_begin_forward(engine: *mut fsdp_engine_t, training: i32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.begin_forward(training != 0)))
}

/// Says that the forward has ended: what is unsharded from here on is for a backward. Not needed by hosts that call
/// post_forward of the root. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_end_forward(engine: *mut fsdp_engine_t) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.end_forward()))
}

/// Call before a unit's forward, in the same order on every rank: unshards the unit. A unit may be used several times
/// and nested in itself. Collective. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_pre_forward(engine: *mut fsdp_engine_t, unit: u32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.pre_forward(unit)))
}

/// Call after a unit's forward: reshards it, except under FSDP_SHARD_GRAD_OP when a backward follows. FSDP_ERR_INVALID_STATE without a pre_forward. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_post_forward(engine: *mut fsdp_engine_t, unit: u32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.post_forward(unit)))
}

/// Call before the backward of each use of a unit: unshards it. FSDP_ERR_INVALID_STATE without a forward that had
/// gradients enabled. Collective. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_pre_backward(engine: *mut fsdp_engine_t, unit: u32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.pre_backward(unit)))
}

/// Call after the backward of each use of a unit. After that of its last use, its gradients (all uses summed) are
/// reduced to their mean over the ranks (a rank may have none) and the unit is resharded. The root's ends the iteration: when it returns, every
/// gradient is in its shard and this rank may write its shards. Collective. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_post_backward(engine: *mut fsdp_engine_t, unit: u32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.post_backward(unit)))
}

/// Unshards a unit; nothing happens if it is unsharded already. *out_unit_buffer is the unit buffer (NULL for a unit
/// without elements), readable until the unit is resharded; it is at the same address every time. Collective. For hosts
/// that see parameters being touched instead of modules being entered. Since 0.1.
///
/// # Safety
/// `out_unit_buffer` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_unshard(
    engine: *mut fsdp_engine_t,
    unit: u32,
    out_unit_buffer: *mut *mut c_void,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out_unit_buffer, "out_unit_buffer") }?;
        out.write(with(engine, |e| e.unshard(unit))?.cast());
        Ok(())
    })
}

/// Reshards a unit; nothing happens if it is sharded already. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_reshard(engine: *mut fsdp_engine_t, unit: u32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.reshard(unit)))
}

/// Starts the reduction of the gradients collected for a unit; a rank that has none takes part with none. More gradients
/// may come later in the same backward: they are reduced again, and added. Collective: same order on every rank.
/// FSDP_ERR_INVALID_STATE if nothing was unsharded since the last iteration ended. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_reduce(engine: *mut fsdp_engine_t, unit: u32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.reduce(unit)))
}

/// Ends an iteration that has no backward: reshards all units and drops gradients being collected. Waits for reductions
/// that were started, else local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_finish_forward(engine: *mut fsdp_engine_t) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.finish_forward()))
}

/// Ends a backward: reduces what is left, and returns when every gradient is in its shard, all units are resharded, and
/// this rank may write its shards. Collective. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_finish_backward(engine: *mut fsdp_engine_t) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.finish_backward()))
}

/// From its return until the next unshard this rank may write the data of its shards. Needed for writes that do not
/// follow a backward (loading, clamping, averaging weights): it ends a forward without backward and waits until no rank
/// reads any more. Collective; returns at once after a backward. FSDP_ERR_INVALID_STATE during a backward. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_begin_write(engine: *mut fsdp_engine_t) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.begin_write()))
}

/// The full parameter in the dtype that it is computed in, to be read until its unit is resharded: a view of the unit
/// buffer, or of the unit's copy in 16 bits, at the same address every time. FSDP_ERR_INVALID_STATE while the unit is
/// sharded. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_param_data(
    engine: *const fsdp_engine_t,
    param: u32,
    out: *mut fsdp_tensor_t,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine)?;
        let (data, p) = (object.engine.param_data(param)?, object.engine.param(param)?);
        // SAFETY: the caller's promise; the shape lives as long as the engine.
        unsafe { tensor::write(out, data, p.compute, &p.shape) }
    })
}

/// The memory that collects a parameter's full gradient in this backward, in the parameter's shape: float32, whatever the
/// parameter is computed in. *out_accumulate 0:
/// overwrite all of it (its contents are undefined); 1: add to it. The parameter counts as having a gradient from here
/// on. Writable until its unit is reduced. Local, but may wait for an earlier reduction. Errors: FSDP_ERR_INVALID_STATE
/// if the parameter is frozen or nothing was unsharded since the last iteration ended. Since 0.1.
///
/// # Safety
/// `out` and `out_accumulate` are NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_param_grad(
    engine: *mut fsdp_engine_t,
    param: u32,
    out: *mut fsdp_tensor_t,
    out_accumulate: *mut i32,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise; both are checked before anything changes.
        let (_, out_accumulate) = unsafe { (self::out(out, "out")?, self::out(out_accumulate, "out_accumulate")?) };
        let (region, held) = object.engine.param_grad(param)?;
        out_accumulate.write(held.into());
        // SAFETY: the caller's promise; the shape lives as long as the engine.
        unsafe { tensor::write(out, region.cast(), DType::F32, &object.engine.param(param)?.shape) }
    })
}

/// Adds a full gradient (contiguous, of the parameter's shape; float32 or what the parameter is computed in; borrowed for
/// the call) in float32 to what this backward has collected for the parameter. Otherwise as fsdp_engine_param_grad. Since 0.1.
///
/// # Safety
/// `grad` is NULL or describes readable memory.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_accumulate_grad(
    engine: *mut fsdp_engine_t,
    param: u32,
    grad: *const fsdp_tensor_t,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        let p = object.engine.param(param)?;
        let name = format!("the gradient of \"{}\"", p.fqn);
        // SAFETY: the caller's promise.
        let grad = unsafe { HostTensor::read(grad, &name) }?;
        if (grad.dtype != DType::F32 && grad.dtype != p.compute) || grad.shape != p.shape {
            return Err(err!(
                InvalidArgument,
                "{name} is {} of shape {:?}, the parameter is {} of shape {:?}",
                grad.dtype,
                grad.shape,
                p.compute,
                p.shape
            ));
        }
        // SAFETY: the caller's promise; NULL with elements is refused.
        let data = unsafe { grad.slice(&name) }?;
        // SAFETY: as large as the parameter: the shapes are equal.
        unsafe { object.engine.accumulate_grad(param, grad.dtype, data.as_ptr()) }
    })
}

/// This rank's piece of a parameter and of its gradient. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_shard(
    engine: *const fsdp_engine_t,
    param: u32,
    out: *mut fsdp_shard_t,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        let shard = with(engine, |e| e.shard(param))?;
        out.write(fsdp_shard_t { data: shard.data, grad: shard.grad, numel: shard.len as i64 });
        Ok(())
    })
}

/// Forgets a parameter's gradient: the next reduction overwrites it. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_clear_grad(engine: *mut fsdp_engine_t, param: u32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.clear_grad(param)))
}

/// Forgets all gradients. Without it the next backward adds to them. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_zero_grad(engine: *mut fsdp_engine_t) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.zero_grad()))
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
