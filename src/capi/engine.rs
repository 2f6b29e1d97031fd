//! `fsdp_engine_t`: options, making and destroying a sharded model.

use super::cuda::{cuda_config, fsdp_cuda_config_t};
use super::handle::{fsdp_comm_t, fsdp_engine_t, fsdp_model_t, get, insert, remove};
use super::model::{fsdp_module_init_fn, lock, module_init};
use super::status::{boundary, boundary_void, fsdp_status_t, out, read_sized, Sized_};
use super::tensor::{self, fsdp_dtype_t};
use crate::config::{EngineConfig, OrderCheck, Strategy};
use crate::dtype::DType;
use crate::engine::Engine;
use crate::error::{err, Result};
use std::ffi::{c_void, CString};
use std::sync::Arc;

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
    /// more than the levels of nested units and, but on a GPU, as many small ones more (256 at most) as fit in 1 MiB. A unit
    /// that finds all taken collects in memory of its own.
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
    /// device, and shards in the unit buffers. A part of the model that was sharded before stays where it was. On a GPU host
    /// memory is pinned, shards go up as units are gathered, and gradients come down as they are reduced.
    pub cpu_offload: i32,
    /// The engine computes on a GPU: see fsdp_cuda_config_t; borrowed for the call. On every rank or on none. NULL: on the CPU.
    pub cuda: *const fsdp_cuda_config_t,
    /// 1: gradients come in the dtype that their parameters are computed in. A unit whose parameters are all computed in the
    /// same 16-bit dtype then collects its gradients in it: the regions of fsdp_engine_param_grad have that dtype, and take
    /// and move half of the memory. That is so for the first gradient of a parameter in a backward: what is added to is
    /// float32, as is everything while backwards leave their gradients for later ones
    /// (fsdp_engine_set_requires_gradient_sync) or a communication hook is set, so that nothing is rounded that would not be
    /// with 0. Ranks sum as ever: each gradient rounded to reduce_dtype, in float32. On lent collectives only in units whose
    /// reduce_dtype is the same. 0: all regions are float32. FSDP_ERR_UNSUPPORTED on a GPU.
    pub grads_in_param_dtype: i32,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_engine_config_t {
    const NAME: &'static str = "fsdp_engine_config_t";
}

/// An engine and the names C reads.
pub struct EngineObject {
    pub engine: Arc<Engine>,
    pub(super) unit_names: Vec<CString>,
    pub(super) param_names: Vec<CString>,
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

/// # Safety
/// What the configuration points to is as fsdp.h says.
unsafe fn engine_config(c: &fsdp_engine_config_t) -> Result<EngineConfig> {
    let of = fsdp_engine_config_t::NAME;
    let order_check = OrderCheck::ALL.into_iter().find(|o| *o as i32 == c.order_check);
    let order_check =
        order_check.ok_or_else(|| err!(InvalidArgument, "{of}.order_check cannot be {}", c.order_check))?;
    let (strategy, reduce_dtype) = (strategy(c.strategy, of)?, reduce_dtype(c.reduce_dtype, of)?);
    let param_dtype = param_dtype(c.param_dtype, of)?;
    // SAFETY: the caller's promise.
    let cuda = unsafe { cuda_config(c.cuda) }?;
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
        grads_in_param_dtype: c.grads_in_param_dtype != 0,
        cuda,
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
            false => unsafe { engine_config(&read_sized(config)?) }?,
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
