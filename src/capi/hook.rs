//! The host's communication hook.

use super::handle::{fsdp_engine_t, get};
use super::model::UserData;
use super::status::{boundary, fsdp_status_t};
use super::tensor::{fsdp_device_t, on};
use crate::error::err;
use crate::hook::{HookFn, UnitGradients};
use std::ffi::{c_char, c_void, CString};
use std::sync::Arc;

/// One parameter's full gradient, in the parameter's shape.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_full_gradient_t {
    /// The parameter's number.
    pub param: u32,
    /// numel floats, to be read and changed; on a GPU an address there.
    pub data: *mut f32,
    /// Elements; may be 0.
    pub numel: i64,
}

/// The gradients that a rank has collected for a unit. Borrowed for the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_unit_gradients_t {
    /// sizeof(fsdp_unit_gradients_t) of the library; later versions may be longer.
    pub struct_size: usize,
    /// The unit's number.
    pub unit: u32,
    /// Parameters that have a gradient on this rank: at least 1.
    pub count: u32,
    /// Fully qualified name of the unit's module, "" for the root.
    pub name: *const c_char,
    /// `count` of them, in the order of the unit's parameters.
    pub gradients: *const fsdp_full_gradient_t,
    /// Where they lie.
    pub device: fsdp_device_t,
    /// On a GPU: the stream (a CUstream or cudaStream_t) that the hook puts its work on. NULL on the CPU.
    pub cuda_stream: *mut c_void,
}

/// Compresses or changes a unit's gradients in place. Returns 0, or anything else when it has failed. Called in the thread
/// that starts the unit's reduction, from within fsdp_engine_reduce, post_backward or finish_backward, with the engine
/// locked: a call on that engine from inside is FSDP_ERR_INVALID_STATE. Other libraries and other engines may be called;
/// it must not throw or unwind.
///
/// On a GPU nobody waits: the gradients may not be there yet when the hook is called. On cuda_stream they are complete, and what
/// the hook launches on that stream runs before the reduction does, which is launched there when it returns. Work on other
/// streams the hook orders by events, after and before that one; memory that it takes for the work it gives back in the
/// stream's order. The GPU's primary context is current. An engine's stream is the same in every call, and is there until the
/// process ends.
pub type fsdp_comm_hook_fn =
    Option<unsafe extern "C" fn(gradients: *const fsdp_unit_gradients_t, user_data: *mut c_void) -> i32>;

/// Calls `fn` on this rank with each unit's gradients just before they are reduced: all uses summed, float32 (with
/// grads_in_param_dtype and on a GPU, too), before they are rounded to reduce_dtype and before they are averaged over the ranks. Not called for a unit of which this rank has
/// no gradient. Once a reduction: a unit that is reduced twice in a backward is seen twice, each time with what came
/// since. NULL: no hook, as at first. A hook that fails makes the call that it was called by fail with
/// FSDP_ERR_CALLBACK, naming the unit, and aborts the communicator, so that every other rank gets FSDP_ERR_ABORTED with
/// that message instead of waiting. Local; ranks may have different hooks. From the next reduction on. Since 0.1.
///
/// # Safety
/// `fn_` is NULL or a function that may be called with `user_data` until it is replaced or the engine is destroyed.
#[no_mangle]
pub unsafe extern "C" fn fsdp_engine_set_comm_hook(
    engine: *mut fsdp_engine_t,
    fn_: fsdp_comm_hook_fn,
    user_data: *mut c_void,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        let (user_data, device) = (UserData(user_data), on(object.engine.gpu()));
        let hook = fn_.map(|function| -> HookFn {
            Arc::new(move |unit: &UnitGradients| {
                let name = CString::new(unit.name).map_err(|_| err!(Panic, "a unit's name has a NUL"))?;
                let gradient = |g: &crate::hook::HookGradient| fsdp_full_gradient_t {
                    param: g.param,
                    data: g.data,
                    numel: g.numel as i64,
                };
                let gradients: Vec<fsdp_full_gradient_t> = unit.gradients.iter().map(gradient).collect();
                let unit = fsdp_unit_gradients_t {
                    struct_size: size_of::<fsdp_unit_gradients_t>(),
                    unit: unit.unit,
                    count: gradients.len() as u32,
                    name: name.as_ptr(),
                    gradients: gradients.as_ptr(),
                    device,
                    cuda_stream: unit.stream,
                };
                // SAFETY: the caller's promise; what the struct points to lives until the call returns.
                match unsafe { function(&unit, user_data.get()) } {
                    0 => Ok(()),
                    code => Err(err!(Callback, "it returned {code}")),
                }
            })
        });
        object.engine.set_comm_hook(hook)
    })
}
