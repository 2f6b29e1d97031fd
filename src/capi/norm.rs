//! Norms over all shards, and clipping gradients to one.

use super::handle::{fsdp_engine_t, get};
use super::status::{boundary, fsdp_status_t, out, pieces};

/// The norm of order `p` of the gradients over all parameters and ranks: the norm of the parameters' norms, a parameter
/// counted once, one without a gradient on every rank not at all (0 if none has one). As torch.nn.utils.get_total_norm,
/// but in float64 throughout:
///
///   p = inf, -inf   the largest, the smallest magnitude
///   p = 0           how many parameters' norms are not 0; such a norm is how many of the elements are not
///   other p         (sum of |x|^p)^(1/p)
///
/// A rank sums its piece in an order that depends on its length alone; the ranks' sums are added in rank order, so *out
/// has the same bits on every rank. FSDP_ERR_INVALID_ARGUMENT if p is NaN, or is below 0 and a parameter with a gradient
/// has no elements; FSDP_ERR_INVALID_STATE in the middle of a backward. Collective. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_grad_norm(engine: *mut fsdp_engine_t, p: f64, out: *mut f64) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(object.engine.grad_norm(p)?);
        Ok(())
    })
}

/// Clips the gradients: multiplies every gradient shard by min(1, max_norm / (norm + 1e-6)), rounded to float32 once, where
/// norm is what fsdp_engine_grad_norm gives; *out_norm is the norm from before. As torch.nn.utils.clip_grad_norm_: an
/// infinite norm makes finite gradients 0 and others NaN, a NaN makes all NaN; with `error_if_nonfinite` not 0 it is
/// FSDP_ERR_NONFINITE instead, on every rank, with a message that names the first parameter whose norm is not finite, and
/// no gradient has changed. FSDP_ERR_INVALID_ARGUMENT also if max_norm is NaN or below 0. Collective. Since 0.1.
///
/// # Safety
/// `out_norm` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_clip_grad_norm(
    engine: *mut fsdp_engine_t,
    max_norm: f64,
    p: f64,
    error_if_nonfinite: i32,
    out_norm: *mut f64,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out_norm, "out_norm") }?;
        out.write(object.engine.clip_grad_norm(max_norm, p, error_if_nonfinite != 0)?);
        Ok(())
    })
}

/// The norm of anything that is sharded as the parameters are, defined as for fsdp_engine_grad_norm: `pieces[i]` is this
/// rank's piece of it for parameter i (fsdp_param_info_t.shard_numel floats), or NULL where a parameter has none here;
/// one that is NULL on every rank is not counted. `piece_count` is fsdp_engine_param_count. E.g. the norm of the
/// parameters, or of gradients in a host's own memory. With `error_if_nonfinite` not 0, FSDP_ERR_NONFINITE as for
/// fsdp_engine_clip_grad_norm. Collective. Since 0.1.
///
/// # Safety
/// `pieces` is NULL or points to `piece_count` pointers as described; `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_total_norm(
    engine: *mut fsdp_engine_t,
    pieces: *const *const f32,
    piece_count: usize,
    p: f64,
    error_if_nonfinite: i32,
    out: *mut f64,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let (pieces, out) = unsafe { (self::pieces(pieces, piece_count, "pieces")?, self::out(out, "out")?) };
        // SAFETY: the caller's promise.
        out.write(unsafe { object.engine.total_norm(pieces, p, error_if_nonfinite != 0) }?);
        Ok(())
    })
}
