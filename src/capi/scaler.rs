//! `fsdp_grad_scaler_t`: scaling the loss so that float16 gradients neither vanish nor overflow.

use super::handle::{fsdp_engine_t, fsdp_grad_scaler_t, fsdp_optimizer_t, get, insert, remove};
use super::status::{boundary, boundary_void, fsdp_status_t, out, pieces, read_sized, write_sized, Sized_};
use crate::error::{err, Result};
use crate::scaler::{GradScaler, ScalerState};
use std::sync::Arc;

/// Options and state of a gradient scaler, with the meaning that they have in torch.amp.GradScaler; all of it is what a
/// checkpoint should keep. Initialize with FSDP_GRAD_SCALER_CONFIG_INIT, then set what differs.
///
/// An update multiplies the scale (a float32) by backoff_factor and sets growth_tracker to 0 if any gradient of any rank
/// was not finite; else it adds 1 to growth_tracker, and at growth_interval multiplies the scale by growth_factor, if that
/// is finite, and sets growth_tracker to 0.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_grad_scaler_config_t {
    /// sizeof(fsdp_grad_scaler_config_t).
    pub struct_size: usize,
    /// What the loss is multiplied by: above 0.
    pub scale: f64,
    /// Above 1.
    pub growth_factor: f64,
    /// Above 0 and below 1.
    pub backoff_factor: f64,
    /// Updates without a non-finite gradient before the scale grows: at least 1.
    pub growth_interval: u64,
    /// How many of them there were since the scale last changed.
    pub growth_tracker: u64,
    /// 0: the scale is 1, nothing is unscaled, every step is made.
    pub enabled: i32,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_grad_scaler_config_t {
    const NAME: &'static str = "fsdp_grad_scaler_config_t";
}

/// # Safety
/// `config` is NULL or points to `struct_size` readable bytes.
unsafe fn read(config: *const fsdp_grad_scaler_config_t) -> Result<(ScalerState, bool)> {
    // SAFETY: the caller's promise.
    let c = unsafe { read_sized(config) }?;
    let state = ScalerState {
        scale: c.scale,
        growth_factor: c.growth_factor,
        backoff_factor: c.backoff_factor,
        growth_interval: c.growth_interval,
        growth_tracker: c.growth_tracker,
    };
    Ok((state, c.enabled != 0))
}

fn with<T>(scaler: *const fsdp_grad_scaler_t, f: impl FnOnce(&GradScaler) -> Result<T>) -> Result<T> {
    f(&*get(scaler)?)
}

/// Makes a gradient scaler; `config` may be NULL for the defaults, which are torch's. Every rank makes one of the same
/// options, and calls its functions alike. Use: multiply the loss by fsdp_grad_scaler_scale; backward;
/// fsdp_grad_scaler_unscale, if the gradients are to be clipped; fsdp_grad_scaler_step; fsdp_grad_scaler_update. One
/// scaler may serve several engines. Local. *out is owned by the caller: fsdp_grad_scaler_destroy. Since 0.1.
///
/// # Safety
/// `config` is NULL or points to `struct_size` readable bytes; `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_grad_scaler_create(
    config: *const fsdp_grad_scaler_config_t,
    out: *mut *mut fsdp_grad_scaler_t,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        let (state, enabled) = match config.is_null() {
            true => (ScalerState::default(), true),
            // SAFETY: the caller's promise.
            false => unsafe { read(config) }?,
        };
        out.write(insert(Arc::new(GradScaler::new(state, enabled)?)));
        Ok(())
    })
}

/// Frees the scaler; NULL does nothing. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_grad_scaler_destroy(scaler: *mut fsdp_grad_scaler_t) {
    boundary_void(|| remove(scaler));
}

/// What the loss is to be multiplied by: a float32; 1 if the scaler is not enabled. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_grad_scaler_scale(scaler: *const fsdp_grad_scaler_t, out: *mut f64) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(with(scaler, |s| s.scale())?);
        Ok(())
    })
}

/// Multiplies the engine's gradient shards by the inverse of the scale, rounded to float32. *out_found_inf is 1 if any
/// element of any rank was infinite or NaN before, on every rank, else 0. With `pieces` not NULL those are unscaled
/// instead: `piece_count` (fsdp_engine_param_count) pointers to this rank's pieces, NULL where a parameter has no gradient
/// here. FSDP_ERR_INVALID_STATE in the middle of a backward, and when called twice for an engine before an update;
/// FSDP_ERR_MISMATCH if ranks have different scales, and then nothing has changed. Collective. Since 0.1.
///
/// # Safety
/// `pieces` is NULL or points to `piece_count` pointers as described; `out_found_inf` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_grad_scaler_unscale(
    scaler: *mut fsdp_grad_scaler_t,
    engine: *mut fsdp_engine_t,
    pieces: *const *mut f32,
    piece_count: usize,
    out_found_inf: *mut i32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (pieces, out) = unsafe { (own(pieces, piece_count)?, self::out(out_found_inf, "out_found_inf")?) };
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        out.write(with(scaler, |s| unsafe { s.unscale(&object.engine, pieces) })?.into());
        Ok(())
    })
}

/// Asks whether a host's own optimizer is to step: unscales as fsdp_grad_scaler_unscale does, unless that has been called;
/// *out_step is 0 on every rank if any gradient of any rank was not finite, else 1. Once before an update. Otherwise as
/// fsdp_grad_scaler_unscale. Collective. Since 0.1.
///
/// # Safety
/// As for fsdp_grad_scaler_unscale.
#[no_mangle]
pub unsafe extern "C" fn fsdp_grad_scaler_may_step(
    scaler: *mut fsdp_grad_scaler_t,
    engine: *mut fsdp_engine_t,
    pieces: *const *mut f32,
    piece_count: usize,
    out_step: *mut i32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (pieces, out) = unsafe { (own(pieces, piece_count)?, self::out(out_step, "out_step")?) };
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        out.write(with(scaler, |s| unsafe { s.may_step(&object.engine, pieces) })?.into());
        Ok(())
    })
}

/// Asks fsdp_grad_scaler_may_step, and if so calls fsdp_optimizer_step. *out_stepped says which. Collective. Since 0.1.
///
/// # Safety
/// `out_stepped` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_grad_scaler_step(
    scaler: *mut fsdp_grad_scaler_t,
    optimizer: *mut fsdp_optimizer_t,
    out_stepped: *mut i32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out_stepped, "out_stepped") }?;
        let optimizer = get(optimizer as *const fsdp_optimizer_t)?;
        out.write(with(scaler, |s| s.step(&optimizer))?.into());
        Ok(())
    })
}

/// Ends an iteration: the scale grows or backs off as said at fsdp_grad_scaler_config_t. FSDP_ERR_INVALID_STATE if
/// nothing was unscaled since the last update. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_grad_scaler_update(scaler: *mut fsdp_grad_scaler_t) -> fsdp_status_t {
    boundary(|| with(scaler, |s| s.update()))
}

/// Writes options and state, for a checkpoint. Set out->struct_size before the call. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or points to `struct_size` writable bytes.
#[no_mangle]
pub unsafe extern "C" fn fsdp_grad_scaler_get_state(
    scaler: *const fsdp_grad_scaler_t,
    out: *mut fsdp_grad_scaler_config_t,
) -> fsdp_status_t {
    boundary(|| {
        let (state, enabled) = with(scaler, |s| Ok((s.state()?, s.is_enabled())))?;
        let config = fsdp_grad_scaler_config_t {
            struct_size: 0,
            scale: state.scale,
            growth_factor: state.growth_factor,
            backoff_factor: state.backoff_factor,
            growth_interval: state.growth_interval,
            growth_tracker: state.growth_tracker,
            enabled: enabled.into(),
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(out, config) }
    })
}

/// Takes options and state, the same on every rank. FSDP_ERR_INVALID_ARGUMENT if `enabled` is not the scaler's;
/// FSDP_ERR_INVALID_STATE between unscaling and update. Local. Since 0.1.
///
/// # Safety
/// `config` is NULL or points to `struct_size` readable bytes.
#[no_mangle]
pub unsafe extern "C" fn fsdp_grad_scaler_set_state(
    scaler: *mut fsdp_grad_scaler_t,
    config: *const fsdp_grad_scaler_config_t,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (state, enabled) = unsafe { read(config) }?;
        with(scaler, |s| match enabled == s.is_enabled() {
            true => s.set_state(state),
            false => Err(err!(InvalidArgument, "whether a scaler is enabled is said when it is made")),
        })
    })
}

/// NULL means the engine's own gradient shards.
///
/// # Safety
/// As [`pieces`].
unsafe fn own<'a>(pieces: *const *mut f32, count: usize) -> Result<Option<&'a [*mut f32]>> {
    match pieces.is_null() {
        true => Ok(None),
        // SAFETY: the caller's promise.
        false => unsafe { self::pieces(pieces, count, "pieces") }.map(Some),
    }
}
