//! `fsdp_model_t`: registering modules and parameters, and wrapping modules into units.

use super::handle::{fsdp_model_t, get, insert, remove};
use super::status::{boundary, boundary_void, fsdp_status_t, out, string};
use super::tensor::{fsdp_tensor_t, HostTensor};
use crate::error::{err, Result};
use crate::module::ModuleTree;
use crate::wrap;
use std::ffi::{c_char, c_void, CString};
use std::sync::{Arc, Mutex};

/// Decides whether a module becomes a unit: positive yes, 0 no, negative stops with FSDP_ERR_CALLBACK. `fqn` and
/// `class_name` are borrowed for the call; `numel` counts the elements in and below the module. Called in the calling
/// thread, parents before their children; must not throw or unwind.
pub type fsdp_wrap_fn = Option<
    unsafe extern "C" fn(
        module: u32,
        fqn: *const c_char,
        class_name: *const c_char,
        numel: u64,
        user_data: *mut c_void,
    ) -> i32,
>;

/// Makes a model that has its root module only: number 0, name "". `class_name` is borrowed for the call. *out is owned
/// by the caller: fsdp_model_destroy. Local. Since 0.1.
///
/// # Safety
/// `class_name` is NULL or a NUL-terminated string, `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_model_create(class_name: *const c_char, out: *mut *mut fsdp_model_t) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (class_name, out) = unsafe { (string(class_name, "class_name")?, self::out(out, "out")?) };
        out.write(insert(Arc::new(Mutex::new(ModuleTree::new(class_name)))));
        Ok(())
    })
}

/// Adds a module below `parent`; *out_module is its number. `name` has no dots and is unique below its parent; both
/// strings are borrowed for the call. Register in the same order on every rank. Local. Since 0.1.
///
/// # Safety
/// The strings are NULL or NUL-terminated, `out_module` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_model_add_module(
    model: *mut fsdp_model_t,
    parent: u32,
    name: *const c_char,
    class_name: *const c_char,
    out_module: *mut u32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (name, class_name) = unsafe { (string(name, "name")?, string(class_name, "class_name")?) };
        // SAFETY: as above.
        let out = unsafe { self::out(out_module, "out_module") }?;
        out.write(edit(model, |tree| tree.add_module(parent, name, class_name))?);
        Ok(())
    })
}

/// Adds a parameter that `module` owns; *out_param is its number. `tensor`: contiguous float32 in host memory; its data
/// is borrowed until the last fsdp_engine_create on this model has returned, shape and name for the call. `requires_grad`:
/// 0 for a frozen parameter. Local. Errors: FSDP_ERR_UNSUPPORTED for other dtypes, devices and layouts. Since 0.1.
///
/// # Safety
/// `name` is NULL or NUL-terminated, `tensor` is NULL or readable, `out_param` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_model_add_parameter(
    model: *mut fsdp_model_t,
    module: u32,
    name: *const c_char,
    tensor: *const fsdp_tensor_t,
    requires_grad: i32,
    out_param: *mut u32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (name, out) = unsafe { (string(name, "name")?, self::out(out_param, "out_param")?) };
        // SAFETY: as above.
        let t = unsafe { HostTensor::read(tensor, &format!("parameter \"{name}\"")) }?;
        out.write(edit(model, |tree| tree.add_param(module, name, &t.shape, t.dtype, requires_grad != 0, t.data))?);
        Ok(())
    })
}

/// Registers an existing parameter again, in `module` under `name` (borrowed for the call): a tied parameter. It is
/// sharded once, in the innermost unit that contains all modules which use it. Local. Since 0.1.
///
/// # Safety
/// `name` is NULL or NUL-terminated.
#[no_mangle]
pub unsafe extern "C" fn fsdp_model_tie_parameter(
    model: *mut fsdp_model_t,
    module: u32,
    name: *const c_char,
    param: u32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let name = unsafe { string(name, "name") }?;
        edit(model, |tree| tree.tie_param(module, name, param))
    })
}

/// Makes `module` a unit. FSDP_ERR_INVALID_STATE if it is one already (the root always is). Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_model_wrap_module(model: *mut fsdp_model_t, module: u32) -> fsdp_status_t {
    boundary(|| edit(model, |tree| tree.wrap(module)))
}

/// Makes every module a unit, like PyTorch's always_wrap_policy. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_model_wrap_always(model: *mut fsdp_model_t) -> fsdp_status_t {
    boundary(|| edit(model, wrap::always))
}

/// Makes every module of the class a unit, like PyTorch's ModuleWrapPolicy. FSDP_ERR_INVALID_ARGUMENT if there is none.
/// `class_name` is borrowed for the call. Local. Since 0.1.
///
/// # Safety
/// `class_name` is NULL or NUL-terminated.
#[no_mangle]
pub unsafe extern "C" fn fsdp_model_wrap_class(model: *mut fsdp_model_t, class_name: *const c_char) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let class_name = unsafe { string(class_name, "class_name") }?;
        edit(model, |tree| wrap::by_class(tree, class_name))
    })
}

/// Children first, makes a module a unit whose parameters not yet in a nested unit have at least `min_numel` (1 or
/// more) elements, like PyTorch's size_based_auto_wrap_policy. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_model_wrap_size(model: *mut fsdp_model_t, min_numel: u64) -> fsdp_status_t {
    boundary(|| edit(model, |tree| wrap::by_size(tree, min_numel)))
}

/// Makes every module a unit for which `fn` says so, like PyTorch's CustomPolicy. If `fn` stops, no module is wrapped.
/// `user_data` is passed on untouched. Local. Since 0.1.
///
/// # Safety
/// `fn_` is NULL or a function that may be called with `user_data`.
#[no_mangle]
pub unsafe extern "C" fn fsdp_model_wrap_if(
    model: *mut fsdp_model_t,
    fn_: fsdp_wrap_fn,
    user_data: *mut c_void,
) -> fsdp_status_t {
    boundary(|| {
        let decide = fn_.ok_or_else(|| err!(InvalidArgument, "fn is NULL"))?;
        let model = get(model as *const fsdp_model_t)?;
        // The callback runs on a copy, outside the lock: it may call back into the model.
        let mut tree = lock(&model)?.clone();
        wrap::by_callback(&mut tree, |module, fqn, class_name, numel| {
            let (fqn, class_name) = (c_string(fqn)?, c_string(class_name)?);
            // SAFETY: the caller's promise.
            match unsafe { decide(module, fqn.as_ptr(), class_name.as_ptr(), numel, user_data) } {
                code if code < 0 => Err(err!(Callback, "the wrap callback returned {code} for module {fqn:?}")),
                code => Ok(code > 0),
            }
        })?;
        *lock(&model)? = tree;
        Ok(())
    })
}

/// Frees the model; NULL does nothing. Engines made from it live on. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_model_destroy(model: *mut fsdp_model_t) {
    boundary_void(|| remove(model));
}

/// Locks a model.
pub fn lock(model: &Mutex<ModuleTree>) -> Result<std::sync::MutexGuard<'_, ModuleTree>> {
    model.lock().map_err(|_| err!(Panic, "the model is unusable: an earlier call on it failed inside"))
}

fn edit<T>(model: *mut fsdp_model_t, f: impl FnOnce(&mut ModuleTree) -> Result<T>) -> Result<T> {
    let model = get(model as *const fsdp_model_t)?;
    let mut tree = lock(&model)?;
    f(&mut tree)
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| err!(InvalidArgument, "a name contains a NUL byte"))
}
