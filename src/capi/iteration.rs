//! How an engine's iterations run: when units are resharded, which backwards reduce, which ones end an iteration.

use super::engine::with;
use super::handle::fsdp_engine_t;
use super::status::{boundary, fsdp_status_t};
use crate::engine::ReshardAfterForward;
use crate::error::err;

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
