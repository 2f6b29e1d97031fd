//! `fsdp_full_params_t` and full states: whole parameters outside of an iteration.

use super::handle::{fsdp_engine_t, fsdp_full_params_t, fsdp_optimizer_t, get, insert, remove};
use super::status::{boundary, boundary_void, fsdp_status_t, out, read_sized, Sized_};
use super::tensor::{self, fsdp_tensor_t};
use crate::dtype::DType;
use crate::engine::{Engine, FullOptions, FullParams};
use crate::error::{err, Error, Result};
use crate::module::ParamId;
use std::ffi::{c_char, c_void, CString};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a scope of full parameters holds, the same on every rank. Initialize with FSDP_FULL_PARAMS_CONFIG_INIT, then set
/// what differs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_full_params_config_t {
    /// sizeof(fsdp_full_params_config_t).
    pub struct_size: usize,
    /// 1: what the scope holds when it is closed goes to the shards, of parameters and (with_grads) gradients. 0: it is
    /// dropped.
    pub writeback: i32,
    /// 1: only rank 0 holds the full parameters; it is its values that are written back. 0: every rank holds them, and
    /// writes its own piece back.
    pub rank0_only: i32,
    /// 1: full gradients too.
    pub with_grads: i32,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_full_params_config_t {
    const NAME: &'static str = "fsdp_full_params_config_t";
}

/// Receives a full tensor: a parameter (`state` NULL) or the state of an optimizer that belongs to it. `name` is the
/// parameter's fully qualified name, `tensor` contiguous float32 of its shape, to be read only; all are borrowed for the
/// call. Returns 0, or another number to make it an error. Called in the calling thread; must not call functions of this
/// engine, throw or unwind.
pub type fsdp_full_state_fn = Option<
    unsafe extern "C" fn(
        param: u32,
        name: *const c_char,
        state: *const c_char,
        tensor: *const fsdp_tensor_t,
        user_data: *mut c_void,
    ) -> i32,
>;

/// Opens a scope that holds the full float32 parameters of some units in host memory of its own (a copy: as much as the
/// units have, on every rank or on rank 0). Ends a forward that no backward followed. No iteration can begin until the
/// scope is closed; another scope cannot be opened. `units`: `unit_count` numbers of units, or NULL for all; `config` may be
/// NULL. Collective: the same on every rank, else FSDP_ERR_MISMATCH. FSDP_ERR_INVALID_STATE in a backward, or while a scope
/// is open. *out is owned by the caller: fsdp_full_params_destroy. As summon_full_params in PyTorch. Since 0.1.
///
/// # Safety
/// `units` is NULL or `unit_count` readable numbers; `config` is NULL or points to `struct_size` readable bytes; `out` is
/// NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_full_params_open(
    engine: *mut fsdp_engine_t,
    units: *const u32,
    unit_count: usize,
    config: *const fsdp_full_params_config_t,
    out: *mut *mut fsdp_full_params_t,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        if units.is_null() && unit_count > 0 {
            return Err(err!(InvalidArgument, "units is NULL, but unit_count is {unit_count}"));
        }
        // SAFETY: the caller's promise.
        let units = (!units.is_null()).then(|| unsafe { std::slice::from_raw_parts(units, unit_count) });
        let options = match config.is_null() {
            true => FullOptions::default(),
            false => {
                // SAFETY: the caller's promise.
                let c = unsafe { read_sized(config) }?;
                FullOptions {
                    writeback: c.writeback != 0,
                    rank0_only: c.rank0_only != 0,
                    with_grads: c.with_grads != 0,
                }
            }
        };
        let full = FullParams::open(object.engine.clone(), units, options)?;
        out.write(insert(Arc::new(Mutex::new(full))));
        Ok(())
    })
}

/// The full value of a parameter, readable and writable until the scope is closed: contiguous float32 of its shape; data is
/// NULL where only rank 0 holds it. FSDP_ERR_INVALID_ARGUMENT if its unit is not in the scope. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_full_params_data(
    full: *const fsdp_full_params_t,
    param: u32,
    out: *mut fsdp_tensor_t,
) -> fsdp_status_t {
    // SAFETY: the caller's promise.
    boundary(|| unsafe { describe(full, param, out, FullParams::data) })
}

/// The same for its full gradient; data is NULL, too, where it has none or the scope is without gradients. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_full_params_grad(
    full: *const fsdp_full_params_t,
    param: u32,
    out: *mut fsdp_tensor_t,
) -> fsdp_status_t {
    // SAFETY: the caller's promise.
    boundary(|| unsafe { describe(full, param, out, FullParams::grad) })
}

/// Ends the scope and frees its memory, after writing back what it holds if it was opened so; all pointers got from it end
/// here. Collective with writeback, else local; the second time nothing happens. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_full_params_close(full: *mut fsdp_full_params_t) -> fsdp_status_t {
    boundary(|| {
        let object = get(full as *const fsdp_full_params_t)?;
        let mut full = lock(&object)?;
        full.close()
    })
}

/// Frees the handle; NULL does nothing. A scope that is open ends without writing back. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_full_params_destroy(full: *mut fsdp_full_params_t) {
    boundary_void(|| remove(full));
}

/// Calls `fn_` with every full parameter, gathered one unit at a time: a full state dict. Units in order, in each the
/// parameters in order of registration. Ends a forward that no backward followed. With `rank0_only` the other ranks only take
/// part. An error of `fn_` on one rank is FSDP_ERR_CALLBACK on every rank. FSDP_ERR_INVALID_STATE in a backward. Collective.
/// Since 0.1.
///
/// # Safety
/// `fn_` may be called with `user_data`.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_full_state(
    engine: *mut fsdp_engine_t,
    rank0_only: i32,
    fn_: fsdp_full_state_fn,
    user_data: *mut c_void,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let call = unsafe { receiver(&object.engine, fn_, user_data) }?;
        object.engine.each_full_param(rank0_only != 0, &mut |param, data, _| call(param, None, data))
    })
}

/// Calls `fn_` with every state of every parameter that has taken a step, gathered one at a time, in the order of parameters.
/// Otherwise as fsdp_engine_full_state; counts of steps are fsdp_optimizer_step_count's. Collective. Since 0.1.
///
/// # Safety
/// `fn_` may be called with `user_data`.
#[no_mangle]
pub unsafe extern "C" fn fsdp_optimizer_full_state(
    optimizer: *mut fsdp_optimizer_t,
    rank0_only: i32,
    fn_: fsdp_full_state_fn,
    user_data: *mut c_void,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(optimizer as *const fsdp_optimizer_t)?;
        // SAFETY: the caller's promise.
        let call = unsafe { receiver(object.engine(), fn_, user_data) }?;
        object.each_full_state(rank0_only != 0, &mut |param, state, data| call(param, Some(state), data.as_ptr()))
    })
}

/// Gathers a float32 tensor of the host's that is sharded like a parameter (an optimizer's state): each rank gives its piece of
/// fsdp_shard_t.numel floats and gets the whole, the parameter's numel floats, row-major. Collective over the shard group.
/// FSDP_ERR_INVALID_STATE on every rank if one has no piece (NULL) where it has elements. Since 0.1.
///
/// # Safety
/// `piece` is NULL or readable, `out` writable for so many floats.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_gather(
    engine: *mut fsdp_engine_t,
    param: u32,
    piece: *const f32,
    out: *mut f32,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        let full = object.engine.gather_flat(param, piece)?;
        if full.is_empty() {
            return Ok(());
        }
        if out.is_null() {
            return Err(err!(InvalidArgument, "out is NULL"));
        }
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(full.as_ptr(), out, full.len()) };
        Ok(())
    })
}

/// What calls `f` with a full tensor.
///
/// # Safety
/// `f` may be called with `user_data`, as long as the result is.
unsafe fn receiver<'a>(
    engine: &'a Engine,
    f: fsdp_full_state_fn,
    user_data: *mut c_void,
) -> Result<impl Fn(ParamId, Option<&str>, *const f32) -> Result<()> + 'a> {
    let f = f.ok_or_else(|| err!(InvalidArgument, "fn_ is NULL"))?;
    Ok(move |param: ParamId, state: Option<&str>, data: *const f32| {
        let p = engine.param(param)?;
        let tensor = tensor::describe(data.cast_mut().cast(), DType::F32, &p.shape);
        let text = |s: &str| CString::new(s).unwrap_or_default();
        let (name, state) = (text(&p.fqn), state.map(text));
        let state = state.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
        // SAFETY: the caller's promise; all arguments live as long as the call.
        match unsafe { f(param, name.as_ptr(), state, &tensor, user_data) } {
            0 => Ok(()),
            code => Err(err!(Callback, "the full-state callback returned {code} for parameter \"{}\"", p.fqn)),
        }
    })
}

fn lock(full: &Mutex<FullParams>) -> Result<MutexGuard<'_, FullParams>> {
    full.lock()
        .map_err(|_| Error::new(crate::error::Status::Panic, "an earlier call on these full parameters failed inside"))
}

/// # Safety
/// `out` is NULL or writable.
unsafe fn describe(
    full: *const fsdp_full_params_t,
    param: u32,
    out: *mut fsdp_tensor_t,
    of: impl Fn(&FullParams, ParamId) -> Result<Option<*mut f32>>,
) -> Result<()> {
    let object = get(full)?;
    let full = lock(&object)?;
    let data = of(&full, param)?.unwrap_or(std::ptr::null_mut());
    // SAFETY: the caller's promise; the shape lives as long as the engine, which the scope keeps.
    unsafe { tensor::write(out, data.cast(), DType::F32, &full.engine().param(param)?.shape) }
}
