//! An engine's iterations: the hooks a host calls, and how they run: when units are resharded, which backwards reduce, which
//! ones end an iteration.

use super::engine::with;
use super::handle::{fsdp_engine_t, fsdp_trace_t, get};
use super::status::{boundary, fsdp_status_t, out};
use crate::engine::ReshardAfterForward;
use crate::error::err;
use std::ffi::c_void;

/// fsdp_engine_set_reshard_after_forward: as the strategy says. FSDP_FULL_SHARD and FSDP_HYBRID_SHARD reshard every unit but
/// the root, the others none.
pub const FSDP_RESHARD_DEFAULT: i32 = -1;
/// The unit stays unsharded until its backward.
pub const FSDP_RESHARD_NEVER: i32 = 0;
/// The unit is resharded, and gathered again for its backward.
pub const FSDP_RESHARD_ALWAYS: i32 = 1;

/// What happens to a unit after a forward that a backward follows: FSDP_RESHARD_DEFAULT, _NEVER, _ALWAYS, or a number of
/// ranks from 2 on: the unit is resharded over groups of so many consecutive ranks, so that its all-gather in backward
/// stays within a group (on shm it moves nothing in any case). The number divides that of the shard group; all of them is
/// as _ALWAYS. From the next iteration on. Collective: the same on every rank, else FSDP_ERR_MISMATCH;
/// FSDP_ERR_INVALID_STATE in an iteration. As fully_shard's reshard_after_forward in PyTorch. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_set_reshard_after_forward(
    engine: *mut fsdp_engine_t,
    unit: u32,
    reshard_after_forward: i32,
) -> fsdp_status_t {
    boundary(|| {
        let choice = match reshard_after_forward {
            FSDP_RESHARD_DEFAULT => ReshardAfterForward::Default,
            FSDP_RESHARD_NEVER => ReshardAfterForward::Never,
            FSDP_RESHARD_ALWAYS => ReshardAfterForward::Always,
            ranks => ReshardAfterForward::Over(usize::try_from(ranks).map_err(|_| {
                err!(InvalidArgument, "reshard_after_forward cannot be {ranks}: FSDP_RESHARD_* or a number of ranks")
            })?),
        };
        with(engine, |e| e.set_reshard_after_forward(unit, choice))
    })
}

/// The host reads this unit's parameters no more until a backward does: reshards it as fsdp_engine_set_reshard_after_forward
/// says, which fsdp_engine_post_forward does by itself. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_reshard_after_forward(engine: *mut fsdp_engine_t, unit: u32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.reshard_after_forward(unit)))
}

/// Whether backwards from here on reduce their gradients (1, the default). With 0 a backward leaves each unit's full gradients
/// where they are, and later ones add to them, until one that reduces: it reduces all that has come together. Costs memory
/// for the full gradients of every unit (in its spare gradient slot), saves the reductions; PyTorch's no_sync. With 1,
/// accumulation is in shards: every backward reduces, and adds to what fsdp_engine_zero_grad has not cleared. The same on
/// every rank: FSDP_ERR_MISMATCH at the end of the backward where it is not. Gradients are kept over forwards without
/// backward; fsdp_engine_zero_grad drops them. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_set_requires_gradient_sync(engine: *mut fsdp_engine_t, required: i32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.set_requires_gradient_sync(required != 0)))
}

/// Whether backwards from here on end the iteration (1, the default). With 0 the end of a backward waits for no rank and
/// for no reduction, units can be unsharded again at once, and shards cannot be written: gradient shards are undefined until
/// a backward with 1 has ended. For the micro-batches of a step, all but the last. The same on every rank. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_set_is_last_backward(engine: *mut fsdp_engine_t, last: i32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.set_is_last_backward(last != 0)))
}

/// Whether backwards from here on average their gradients over the replicas of a hybrid or unsharded engine (1, the default).
/// With 0 they are reduced within the shard group only; the next backward with 1 averages all that has come together. The
/// same on every rank. No effect where all ranks are one shard group. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_set_requires_all_reduce(engine: *mut fsdp_engine_t, required: i32) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.set_requires_all_reduce(required != 0)))
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

/// Call after a unit's forward: reshards it or, when a backward follows, does what fsdp_engine_set_reshard_after_forward says.
/// FSDP_ERR_INVALID_STATE without a pre_forward. Local. Since 0.1.
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
/// that see parameters being touched instead of modules being entered. On a GPU: a device address, another one each time,
/// that work given to the compute stream from here on may read; fsdp_unit_info_t.buffer_bytes long. Since 0.1.
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
/// this rank may write its shards. On a GPU that holds for work that the compute stream is given from here on; with
/// cpu_offload it waits for the GPU, and holds for the host. Collective. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_finish_backward(engine: *mut fsdp_engine_t) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.finish_backward()))
}

/// From its return until the next unshard this rank may write the data of its shards. Needed for writes that do not
/// follow a backward (loading, clamping, averaging weights): it ends a forward without backward and waits until no rank
/// reads any more. Collective; returns at once after a backward. FSDP_ERR_INVALID_STATE during a backward. On a GPU it is
/// local, and says so for work that the compute stream is given from here on (with cpu_offload: for the host). Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_engine_begin_write(engine: *mut fsdp_engine_t) -> fsdp_status_t {
    boundary(|| with(engine, |e| e.begin_write()))
}
