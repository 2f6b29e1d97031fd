//! Parameters and gradients of an engine: full ones in an iteration, this rank's pieces at any time.

use super::engine::{with, EngineObject};
use super::handle::{fsdp_engine_t, get};
use super::status::{boundary, fsdp_status_t, out, pieces};
use super::tensor::{self, fsdp_tensor_t, HostTensor};
use crate::dtype::DType;
use crate::engine::{Engine, FullGradient};
use crate::error::{err, Result};
use crate::gradients::Region;

/// This rank's piece of a parameter. The pointers are borrowed until fsdp_engine_destroy; when data may be written is
/// said at fsdp_engine_begin_write. Of an engine on a GPU they are device addresses, to be used on the compute stream; with
/// cpu_offload pinned host memory.
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

/// The full parameter in the dtype that it is computed in, to be read until its unit is resharded: a view of the unit
/// buffer, or of the unit's copy in 16 bits, at the same address every time. FSDP_ERR_INVALID_STATE while the unit is
/// sharded. On a GPU always a view of the unit buffer, at fsdp_param_info_t.compute_offset, wherever that is since the last
/// unshard. Local. Since 0.1.
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
        unsafe { tensor::write_on(object.engine.gpu(), out, data, p.compute, &p.shape) }
    })
}

/// The memory that collects a parameter's full gradient in this backward, in the parameter's shape: float32, whatever the
/// parameter is computed in, unless the engine has grads_in_param_dtype: then out->dtype says what. *out_accumulate 0:
/// overwrite all of it (its contents are undefined); 1: add to it, in float32 (what was written in 16 bits has been widened,
/// to another address; other parameters' regions stay). The parameter counts as having a gradient from here
/// on. Writable until its unit is reduced. Local, but may wait for an earlier reduction. Errors: FSDP_ERR_INVALID_STATE
/// if the parameter is frozen or nothing was unsharded since the last iteration ended. On a GPU: device memory, to be written
/// on the compute stream; does not wait; another address in each backward, the same until the unit is reduced. Parameters that
/// get no gradient need nothing: the engine zeroes their place. Since 0.1.
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
        // SAFETY: the caller's promise.
        unsafe { gradient_region(&object, param, Engine::param_grad, out, out_accumulate) }
    })
}

/// The same memory, for an operator that is about to compute a parameter's gradient: what it writes there does not count
/// until fsdp_engine_param_grad is called for the parameter, and is nothing if that is never called. Otherwise as
/// fsdp_engine_param_grad. Since 0.1.
///
/// # Safety
/// `out` and `out_accumulate` are NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_reserve_grad(
    engine: *mut fsdp_engine_t,
    param: u32,
    out: *mut fsdp_tensor_t,
    out_accumulate: *mut i32,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        unsafe { gradient_region(&object, param, Engine::reserve_grad, out, out_accumulate) }
    })
}

/// # Safety
/// As of both above.
unsafe fn gradient_region(
    object: &EngineObject,
    param: u32,
    region: fn(&Engine, u32) -> Result<Region>,
    out: *mut fsdp_tensor_t,
    out_accumulate: *mut i32,
) -> Result<()> {
    // SAFETY: the caller's promise; both are checked before anything changes.
    let (_, out_accumulate) = unsafe { (self::out(out, "out")?, self::out(out_accumulate, "out_accumulate")?) };
    let region = region(&object.engine, param)?;
    out_accumulate.write(region.held.into());
    // SAFETY: the caller's promise; the shape lives as long as the engine.
    unsafe {
        let shape = &object.engine.param(param)?.shape;
        tensor::write_on(object.engine.gpu(), out, region.data, region.dtype, shape)
    }
}

/// Adds a full gradient (contiguous, of the parameter's shape; float32 or what the parameter is computed in; borrowed for
/// the call) in float32 to what this backward has collected for the parameter. On a GPU it lies there, and what is launched on
/// the compute stream reads it: several are quicker together (fsdp_engine_accumulate_grads). Otherwise as
/// fsdp_engine_param_grad. Since 0.1.
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
        // SAFETY: the caller's promise.
        let FullGradient { dtype, data, .. } = unsafe { full_gradient(&object.engine, param, grad) }?;
        // SAFETY: as large as the parameter.
        unsafe { object.engine.accumulate_grad(param, dtype, data) }
    })
}

/// fsdp_engine_accumulate_grad of `count` parameters, each of them once: grads[i] is the gradient of params[i]. All arguments
/// are looked at before anything changes: with an error that names a parameter no gradient was taken. On a GPU they are taken
/// by one launch for each dtype, however many they are. Since 0.1.
///
/// # Safety
/// `params` and `grads` point to `count` readable elements (NULL if it is 0), as of fsdp_engine_accumulate_grad.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_accumulate_grads(
    engine: *mut fsdp_engine_t,
    params: *const u32,
    grads: *const fsdp_tensor_t,
    count: usize,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let (params, grads) = unsafe { (pieces(params, count, "params")?, pieces(grads, count, "grads")?) };
        // SAFETY: as above.
        let read = |(param, grad): (&u32, &fsdp_tensor_t)| unsafe { full_gradient(&object.engine, *param, grad) };
        let grads = params.iter().zip(grads).map(read).collect::<Result<Vec<_>>>()?;
        // SAFETY: each as large as its parameter.
        unsafe { object.engine.accumulate_grads(&grads) }
    })
}

/// A gradient that fits its parameter and the engine.
///
/// # Safety
/// `grad` is NULL or describes readable memory.
unsafe fn full_gradient(engine: &Engine, param: u32, grad: *const fsdp_tensor_t) -> Result<FullGradient> {
    let p = engine.param(param)?;
    let name = format!("the gradient of \"{}\"", p.fqn);
    // SAFETY: the caller's promise.
    let (grad, gpu) = unsafe { HostTensor::read_anywhere(grad, &name) }?;
    if gpu != engine.gpu() {
        let on = |gpu: Option<usize>| gpu.map_or("in host memory".to_string(), |gpu| format!("on GPU {gpu}"));
        let (there, here) = (on(gpu), on(engine.gpu()));
        return Err(err!(InvalidArgument, "{name} is {there}: the engine needs it {here}"));
    }
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
    Ok(FullGradient { param, dtype: grad.dtype, data: data.as_ptr() })
}

/// This rank's piece of a parameter and of its gradient, whose address holds until the gradient is cleared (or longer:
/// fsdp_heap_retain). Local. Since 0.1.
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
