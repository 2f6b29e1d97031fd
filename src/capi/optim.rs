//! `fsdp_optimizer_t`: SGD or AdamW on an engine's shards.

use super::checkpoint::{fsdp_metadata_t, fsdp_state_t, read_metadata, read_states};
use super::handle::{fsdp_engine_t, fsdp_optimizer_t, get, insert, remove};
use super::status::{boundary, boundary_void, fsdp_status_t, out, read_sized, string, Sized_};
use crate::checkpoint::Contents;
use crate::error::Result;
use crate::optim::{AdamWOptions, Optimizer, Rule, SgdOptions};
use std::ffi::c_char;
use std::path::Path;
use std::sync::Arc;

/// Options of stochastic gradient descent, with the meaning that they have in torch.optim.SGD. Initialize with
/// FSDP_SGD_CONFIG_INIT, then set what differs.
///
/// Lower-case names are float32; [x] is x computed in double and rounded to float32 once. Each line is one operation after
/// the other, left to right, each rounded to nearest, without fused multiply-add, so that the result is the same bit for
/// bit (NaNs aside) whatever the world size, the wrapping and the processor's vectors, in the processor's default
/// floating-point mode. lr is the optimizer's times the parameter's factor.
///
///   g = grad                                        (maximize: -grad)
///   g = g + [weight_decay] * p                      (only if weight_decay is not 0)
///   b = [momentum] * b + [1 - dampening] * g        (only with momentum; b = g in the parameter's first step)
///   d = b                                           (nesterov: g + [momentum] * b; without momentum: g)
///   p = p - [lr] * d
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_sgd_config_t {
    /// sizeof(fsdp_sgd_config_t).
    pub struct_size: usize,
    /// Learning rate, at least 0.
    pub lr: f64,
    /// At least 0. With 0 there is no state; else the state "momentum_buffer".
    pub momentum: f64,
    /// Any finite number.
    pub dampening: f64,
    /// At least 0.
    pub weight_decay: f64,
    /// Not 0: Nesterov's momentum, which needs a momentum and no dampening.
    pub nesterov: i32,
    /// Not 0: climb instead of descending.
    pub maximize: i32,
}

/// Options of AdamW (Adam with decoupled weight decay: Loshchilov & Hutter, arXiv 1711.05101), with the meaning that they
/// have in torch.optim.AdamW. Initialize with FSDP_ADAMW_CONFIG_INIT, then set what differs; weight_decay 0 is plain Adam.
/// The states are "exp_avg" (m) and "exp_avg_sq" (v), both 0 at first.
///
/// Notation and promise as for fsdp_sgd_config_t. t is the parameter's number of steps, this one included; powers are
/// computed in double by squaring (result *= base for each set bit of t, lowest first, base *= base after each bit).
///
///   g = grad                                        (maximize: -grad)
///   w = p * [1 - lr * weight_decay]
///   m = [beta1] * m + [1 - beta1] * g
///   v = [beta2] * v + [1 - beta2] * g * g
///   d = sqrt(v) / [sqrt(1 - beta2^t)] + [eps]
///   p = w - [lr / (1 - beta1^t)] * m / d
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_adamw_config_t {
    /// sizeof(fsdp_adamw_config_t).
    pub struct_size: usize,
    /// Learning rate, at least 0.
    pub lr: f64,
    /// At least 0, less than 1.
    pub beta1: f64,
    /// At least 0, less than 1.
    pub beta2: f64,
    /// At least 0.
    pub eps: f64,
    /// At least 0.
    pub weight_decay: f64,
    /// Not 0: climb instead of descending.
    pub maximize: i32,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_sgd_config_t {
    const NAME: &'static str = "fsdp_sgd_config_t";
}
// SAFETY: as above.
unsafe impl Sized_ for fsdp_adamw_config_t {
    const NAME: &'static str = "fsdp_adamw_config_t";
}

/// The rule is read after the engine's handle and `out` were found good.
unsafe fn create(
    engine: *mut fsdp_engine_t,
    rule: impl FnOnce() -> Result<Rule>,
    out: *mut *mut fsdp_optimizer_t,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(insert(Arc::new(Optimizer::new(object.engine.clone(), rule()?)?)));
        Ok(())
    })
}

fn with<T>(optimizer: *const fsdp_optimizer_t, f: impl FnOnce(&Optimizer) -> Result<T>) -> Result<T> {
    f(&*get(optimizer)?)
}

/// Makes an optimizer of all parameters of an engine. It keeps its state in float32, for this rank's shards only, from
/// the first step on. `config` may be NULL for the defaults. Collective: same options on every rank, else
/// FSDP_ERR_MISMATCH names the first that differs; FSDP_ERR_INVALID_ARGUMENT names an option out of its limits. Optimizer
/// and engine may be destroyed in either order. *out is owned by the caller: fsdp_optimizer_destroy. Since 0.1.
///
/// # Safety
/// `config` is NULL or points to `struct_size` readable bytes; `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_optimizer_create_sgd(
    engine: *mut fsdp_engine_t,
    config: *const fsdp_sgd_config_t,
    out: *mut *mut fsdp_optimizer_t,
) -> fsdp_status_t {
    let rule = || {
        if config.is_null() {
            return Ok(Rule::Sgd(SgdOptions::default()));
        }
        // SAFETY: the caller's promise.
        let c = unsafe { read_sized(config) }?;
        Ok(Rule::Sgd(SgdOptions {
            lr: c.lr,
            momentum: c.momentum,
            dampening: c.dampening,
            weight_decay: c.weight_decay,
            nesterov: c.nesterov != 0,
            maximize: c.maximize != 0,
        }))
    };
    // SAFETY: the caller's promise.
    unsafe { create(engine, rule, out) }
}

/// The same with AdamW. Since 0.1.
///
/// # Safety
/// As for fsdp_optimizer_create_sgd.
#[no_mangle]
pub unsafe extern "C" fn fsdp_optimizer_create_adamw(
    engine: *mut fsdp_engine_t,
    config: *const fsdp_adamw_config_t,
    out: *mut *mut fsdp_optimizer_t,
) -> fsdp_status_t {
    let rule = || {
        if config.is_null() {
            return Ok(Rule::AdamW(AdamWOptions::default()));
        }
        // SAFETY: the caller's promise.
        let c = unsafe { read_sized(config) }?;
        Ok(Rule::AdamW(AdamWOptions {
            lr: c.lr,
            beta1: c.beta1,
            beta2: c.beta2,
            eps: c.eps,
            weight_decay: c.weight_decay,
            maximize: c.maximize != 0,
        }))
    };
    // SAFETY: the caller's promise.
    unsafe { create(engine, rule, out) }
}

/// Frees the optimizer and its state; NULL does nothing. Local. All pointers got from it end here. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_optimizer_destroy(optimizer: *mut fsdp_optimizer_t) {
    boundary_void(|| remove(optimizer));
}

/// Updates this rank's shards from their gradients, which stay: fsdp_engine_zero_grad forgets them. A parameter without a
/// gradient (none on any rank) is left alone and does not count the step. Begins as fsdp_engine_begin_write does: local
/// after a backward; else it ends a forward without backward, and is collective. FSDP_ERR_INVALID_STATE in the middle of
/// a backward; FSDP_ERR_OUT_OF_MEMORY if there is none for the state; nothing has changed then. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_optimizer_step(optimizer: *mut fsdp_optimizer_t) -> fsdp_status_t {
    boundary(|| with(optimizer, |o| o.step()))
}

/// Sets the learning rate (at least 0) from the next step on. Local; set the same on every rank. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_optimizer_set_lr(optimizer: *mut fsdp_optimizer_t, lr: f64) -> fsdp_status_t {
    boundary(|| with(optimizer, |o| o.set_lr(lr)))
}

/// The learning rate. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_optimizer_get_lr(optimizer: *const fsdp_optimizer_t, out: *mut f64) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(with(optimizer, |o| o.lr())?);
        Ok(())
    })
}

/// Gives one parameter options of its own from the next step on: its learning rate is `lr_factor` (at first 1) times the
/// optimizer's, its weight decay `weight_decay` (at least 0) instead of the configuration's. E.g. 1 and 0 for biases.
/// Local; set the same on every rank. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_optimizer_set_param_options(
    optimizer: *mut fsdp_optimizer_t,
    param: u32,
    lr_factor: f64,
    weight_decay: f64,
) -> fsdp_status_t {
    boundary(|| with(optimizer, |o| o.set_param_options(param, lr_factor, weight_decay)))
}

/// How many steps a parameter has taken: those in which it had a gradient. 0 for one without elements. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_optimizer_step_count(
    optimizer: *const fsdp_optimizer_t,
    param: u32,
    out: *mut u64,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(with(optimizer, |o| o.steps(param))?);
        Ok(())
    })
}

/// The state `name` ("momentum_buffer", "exp_avg", "exp_avg_sq") of this rank's piece of a parameter: *out_data has
/// fsdp_shard_t.numel floats, or is NULL before the parameter's first step. Borrowed until fsdp_optimizer_destroy. Local.
/// FSDP_ERR_INVALID_ARGUMENT if the optimizer has no such state. Since 0.1.
///
/// # Safety
/// `name` is NULL or NUL-terminated; `out_data` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_optimizer_state(
    optimizer: *const fsdp_optimizer_t,
    param: u32,
    name: *const c_char,
    out_data: *mut *mut f32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (name, out) = unsafe { (string(name, "name")?, self::out(out_data, "out_data")?) };
        out.write(with(optimizer, |o| o.state(param, name))?);
        Ok(())
    })
}

/// Saves a checkpoint of the engine's shards and of this optimizer: its states, and each parameter's count of steps as
/// the text "fsdp.optimizer". Otherwise as fsdp_checkpoint_save: `states` are further ones of the host's. The options
/// (learning rate, ...) are not in it: the host sets them again. fsdp_checkpoint_load reads such a checkpoint's
/// parameters, too. FSDP_ERR_MISMATCH if parameters have not taken the same steps on every rank. Collective. Since 0.1.
///
/// # Safety
/// As for fsdp_checkpoint_save.
#[no_mangle]
pub unsafe extern "C" fn fsdp_optimizer_save(
    optimizer: *mut fsdp_optimizer_t,
    dir: *const c_char,
    states: *const fsdp_state_t,
    state_count: usize,
    metadata: *const fsdp_metadata_t,
    metadata_count: usize,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(optimizer as *const fsdp_optimizer_t)?;
        // SAFETY: the caller's promise.
        let (dir, states) = unsafe { (string(dir, "dir")?, read_states(states, state_count)?) };
        // SAFETY: the caller's promise.
        let metadata = unsafe { read_metadata(metadata, metadata_count) }?;
        // SAFETY: the caller's promise.
        unsafe { object.save(Path::new(dir), &Contents { states, metadata, ..Contents::default() }) }
    })
}

/// Loads what fsdp_optimizer_save has saved, at any world size and wrapping: shards, this optimizer's states and counts,
/// and the data of `states`. With the same options and the same world size, training goes on bit for bit as if it had
/// not stopped. Otherwise as fsdp_checkpoint_load: on an error nothing has changed. FSDP_ERR_CHECKPOINT if it was saved
/// without an optimizer, with another one, or with SGD without the momentum that this one has. Collective. Since 0.1.
///
/// # Safety
/// As for fsdp_checkpoint_load.
#[no_mangle]
pub unsafe extern "C" fn fsdp_optimizer_load(
    optimizer: *mut fsdp_optimizer_t,
    dir: *const c_char,
    states: *const fsdp_state_t,
    state_count: usize,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(optimizer as *const fsdp_optimizer_t)?;
        // SAFETY: the caller's promise.
        let (dir, states) = unsafe { (string(dir, "dir")?, read_states(states, state_count)?) };
        // SAFETY: the caller's promise.
        unsafe { object.load(Path::new(dir), &Contents { states, ..Contents::default() }) }
    })
}
