//! `fsdp_trace_t`: the execution order of a forward, as a host announces it.

use super::handle::{fsdp_model_t, fsdp_trace_t, get, insert, remove};
use super::status::{boundary, boundary_void, fsdp_status_t, out};
use crate::error::{err, Result};
use crate::trace::Trace;
use std::sync::{Arc, Mutex, MutexGuard};

/// Makes an empty trace of one forward of `model` as it is now; the model is not needed afterwards. No data is
/// involved: announce what a forward does with fsdp_trace_enter, fsdp_trace_use and fsdp_trace_leave, the root (module
/// 0) first. *out is owned by the caller: fsdp_trace_destroy. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_trace_create(model: *const fsdp_model_t, out: *mut *mut fsdp_trace_t) -> fsdp_status_t {
    boundary(|| {
        let model = get(model)?;
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        let trace = Trace::new(&*super::model::lock(&model)?);
        out.write(insert(Arc::new(Mutex::new(trace))));
        Ok(())
    })
}

/// The forward of `module` begins, inside that of the module entered last; containers and modules without parameters
/// are announced too. What an earlier call of the module had used is forgotten. FSDP_ERR_INVALID_STATE unless the root
/// is entered first, and once. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_trace_enter(trace: *mut fsdp_trace_t, module: u32) -> fsdp_status_t {
    boundary(|| with(trace, |t| t.enter(module)))
}

/// One operation of the module entered last reads these `count` parameters (borrowed for the call; NULL if there are
/// none, and then nothing happens). FSDP_ERR_INVALID_STATE outside the root's forward. Local. Since 0.1.
///
/// # Safety
/// `params` is NULL or points to `count` numbers.
#[no_mangle]
pub unsafe extern "C" fn fsdp_trace_use(trace: *mut fsdp_trace_t, params: *const u32, count: u32) -> fsdp_status_t {
    boundary(|| {
        let params = match (params.is_null(), count) {
            (_, 0) => &[],
            (true, _) => return Err(err!(InvalidArgument, "params is NULL, but count is {count}")),
            // SAFETY: the caller's promise.
            (false, _) => unsafe { std::slice::from_raw_parts(params, count as usize) },
        };
        with(trace, |t| t.use_params(params))
    })
}

/// The forward of `module` ends. FSDP_ERR_INVALID_STATE unless it is the module entered last. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_trace_leave(trace: *mut fsdp_trace_t, module: u32) -> fsdp_status_t {
    boundary(|| with(trace, |t| t.leave(module)))
}

/// The modules in the order they were entered, each as often as it was. *out_modules is borrowed until the next call on
/// the trace or its destruction; NULL if there are none. Local. Since 0.1.
///
/// # Safety
/// `out_modules` and `out_count` are NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_trace_module_order(
    trace: *const fsdp_trace_t,
    out_modules: *mut *const u32,
    out_count: *mut u32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        with(trace, |t| unsafe { write(t.module_order(), out_modules, "out_modules", out_count) })
    })
}

/// The parameters in the order of their first use. *out_params is borrowed until the next call on the trace or its
/// destruction; NULL if there are none. Local. Since 0.1.
///
/// # Safety
/// `out_params` and `out_count` are NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_trace_param_order(
    trace: *const fsdp_trace_t,
    out_params: *mut *const u32,
    out_count: *mut u32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        with(trace, |t| unsafe { write(t.param_order(), out_params, "out_params", out_count) })
    })
}

/// *out is 1 if an operation used the parameter, else 0. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_trace_visited(trace: *const fsdp_trace_t, param: u32, out: *mut i32) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(with(trace, |t| t.visited(param))?.into());
        Ok(())
    })
}

/// How many usages were recorded in the module's own forward, in its latest call: one for each operation that read
/// parameters, and one for each module it called that has parameters in or below it. 0 for a module that was never
/// entered. Local. Since 0.1.
///
/// # Safety
/// `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_trace_usage_count(
    trace: *const fsdp_trace_t,
    module: u32,
    out: *mut u32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { self::out(out, "out") }?;
        out.write(with(trace, |t| Ok(t.usages(module)?.len() as u32))?);
        Ok(())
    })
}

/// Usage number `index` of the module, in order. *out_module: the module called, with all parameters in and below it,
/// or `module` itself, with those that its operation read. *out_params is borrowed until the next call on the trace or
/// its destruction. Local. Since 0.1.
///
/// # Safety
/// The out-pointers are NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_trace_usage(
    trace: *const fsdp_trace_t,
    module: u32,
    index: u32,
    out_module: *mut u32,
    out_params: *mut *const u32,
    out_count: *mut u32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out_module = unsafe { self::out(out_module, "out_module") }?;
        out_module.write(with(trace, |t| {
            let usages = t.usages(module)?;
            let usage = usages.get(index as usize).ok_or_else(|| {
                err!(InvalidArgument, "usage {index} does not exist: module {module} has {} of them", usages.len())
            })?;
            // SAFETY: as above.
            unsafe { write(&usage.params, out_params, "out_params", out_count) }?;
            Ok(usage.module)
        })?);
        Ok(())
    })
}

/// Frees the trace; NULL does nothing. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_trace_destroy(trace: *mut fsdp_trace_t) {
    boundary_void(|| remove(trace));
}

/// Locks a trace.
pub fn lock(trace: &Mutex<Trace>) -> Result<MutexGuard<'_, Trace>> {
    trace.lock().map_err(|_| err!(Panic, "the trace is unusable: an earlier call on it failed inside"))
}

fn with<T>(trace: *const fsdp_trace_t, f: impl FnOnce(&mut Trace) -> Result<T>) -> Result<T> {
    let trace = get(trace)?;
    let mut trace = lock(&trace)?;
    f(&mut trace)
}

/// Hands out a list.
///
/// # Safety
/// `out_list` and `out_count` are NULL or writable.
unsafe fn write(list: &[u32], out_list: *mut *const u32, name: &str, out_count: *mut u32) -> Result<()> {
    // SAFETY: the caller's promise; both are checked before either is written.
    let (out_list, out_count) = unsafe { (out(out_list, name)?, out(out_count, "out_count")?) };
    out_list.write(if list.is_empty() { std::ptr::null() } else { list.as_ptr() });
    out_count.write(list.len() as u32);
    Ok(())
}
