//! `fsdp_model_t`: registering modules, parameters and what initializes them, and wrapping modules into units.

use super::handle::{fsdp_engine_t, fsdp_model_t, fsdp_trace_t, get, insert, remove};
use super::status::{boundary, boundary_void, fsdp_status_t, out, string};
use super::tensor::{self, fsdp_dtype_t, fsdp_tensor_t, HostTensor};
use crate::error::{err, Error, Result};
use crate::materialize::{InitParam, ModuleInit, ParamInit};
use crate::module::ModuleTree;
use crate::precision::UnitDtypes;
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

/// A module to initialize. The library sets struct_size; pointers are borrowed for the call. A newer library appends
/// fields.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_module_init_t {
    /// Bytes of the struct.
    pub struct_size: usize,
    /// The module's number.
    pub module: u32,
    /// Its fully qualified name, "" for the root.
    pub fqn: *const c_char,
    /// As given to fsdp_model_add_module.
    pub class_name: *const c_char,
    /// Parameters to fill; 0 for a module without any.
    pub param_count: u32,
    /// Their numbers, in order of registration.
    pub params: *const u32,
    /// Their memory: contiguous, of the dtype they were registered with, on a 64-byte line. Its contents are undefined; every element must be written.
    pub tensors: *const fsdp_tensor_t,
}

/// Initializes the parameters of a module; 0 when done, any other number stops with FSDP_ERR_CALLBACK. Called in the
/// thread of fsdp_engine_create; must not throw or unwind.
pub type fsdp_module_init_fn =
    Option<unsafe extern "C" fn(init: *const fsdp_module_init_t, user_data: *mut c_void) -> i32>;

/// Initializes one parameter: writes every element of `tensor` (as in fsdp_module_init_t, borrowed for the call).
/// Otherwise as fsdp_module_init_fn.
pub type fsdp_param_init_fn =
    Option<unsafe extern "C" fn(param: u32, tensor: *const fsdp_tensor_t, user_data: *mut c_void) -> i32>;

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

/// Adds a parameter that `module` owns; *out_param is its number. `tensor`: contiguous float32, float16 or
/// bfloat16 in host memory, or on the GPU that the engine will be on (what is written there is on the engine's compute stream
/// by then); its data is borrowed until the last fsdp_engine_create on this model has returned, shape and
/// name for the call. Shards are float32 whatever the dtype (16 bits are widened exactly); it is what the parameter is
/// computed in, if nothing says otherwise (fsdp_model_set_param_dtype). data NULL:
/// the parameter has no storage; fsdp_engine_create gives it its values, one unit at a time, by the engine's
/// param_init_fn, else fsdp_model_set_param_init, else fsdp_model_set_reset. `requires_grad`: 0 for a frozen parameter.
/// Local. Errors: FSDP_ERR_UNSUPPORTED for other dtypes, devices and layouts. Since 0.1.
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
        let (t, gpu) = unsafe { HostTensor::read_anywhere(tensor, &format!("parameter \"{name}\"")) }?;
        out.write(edit(model, |tree| {
            let param = tree.add_param(module, name, &t.shape, t.dtype, requires_grad != 0, t.data)?;
            gpu.map_or(Ok(()), |gpu| tree.set_param_gpu(param, t.data, gpu)).map(|()| param)
        })?);
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

/// Sets what initializes the parameters without storage that `module` was the first to register, in place of an earlier
/// function. fsdp_engine_create calls it once on every rank, with those that have no initializer of their own; units in
/// order, within a unit modules in order of registration. A module without any parameter is called too, with none: the
/// place to fill buffers. A module whose parameters all have storage is not. If the engine has a param_init_fn, that one is
/// called instead. `fn` and `user_data` (passed on untouched) must stay valid until the last fsdp_engine_create on this
/// model has returned. Local. Since 0.1.
///
/// # Safety
/// `fn_` is NULL or a function that may be called with `user_data`, from any thread.
#[no_mangle]
pub unsafe extern "C" fn fsdp_model_set_reset(
    model: *mut fsdp_model_t,
    module: u32,
    fn_: fsdp_module_init_fn,
    user_data: *mut c_void,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let init = unsafe { module_init(fn_, user_data) };
        edit(model, |tree| {
            let name = &tree.module(module)?.fqn;
            let init = init.ok_or_else(|| not_callable(format_args!("the reset function of module \"{name}\"")))?;
            tree.set_reset(module, init)
        })
    })
}

/// Sets what initializes one parameter without storage, in place of an earlier function; it comes before its module's
/// reset function. FSDP_ERR_INVALID_ARGUMENT for a parameter with storage. Otherwise as fsdp_model_set_reset. Since
/// 0.1.
///
/// # Safety
/// `fn_` is NULL or a function that may be called with `user_data`, from any thread.
#[no_mangle]
pub unsafe extern "C" fn fsdp_model_set_param_init(
    model: *mut fsdp_model_t,
    param: u32,
    fn_: fsdp_param_init_fn,
    user_data: *mut c_void,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let init = unsafe { param_init(fn_, user_data) };
        edit(model, |tree| {
            let name = &tree.param(param)?.fqn;
            let init = init.ok_or_else(|| not_callable(format_args!("the initializer of parameter \"{name}\"")))?;
            tree.set_param_init(param, init)
        })
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

/// As fsdp_model_wrap_size, but only modules that the trace entered become units, and only parameters that it used
/// count. The trace is of this model, complete (FSDP_ERR_INVALID_STATE), and not needed afterwards. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_model_wrap_trace(
    model: *mut fsdp_model_t,
    trace: *const fsdp_trace_t,
    min_numel: u64,
) -> fsdp_status_t {
    boundary(|| {
        let trace = get(trace)?;
        edit(model, |tree| wrap::by_trace(tree, &*super::trace::lock(&trace)?, min_numel))
    })
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

/// Adds the whole module tree of an existing engine below `parent` as `name` (borrowed for the call; with "" its
/// modules and parameters keep their own names below the parent's): a model that is sharded already becomes a part of a
/// bigger one. Its modules get the numbers *out_module, *out_module + 1, ... and its parameters *out_param, ..., in
/// their old order; its units stay units, and values and gradients stay where they are: engines made of this model
/// share them with `engine`, which may be destroyed. Only one of these engines may be in an iteration at a time
/// (FSDP_ERR_INVALID_STATE). FSDP_ERR_INVALID_STATE if the engine is a part of this model already. Local. Since 0.1.
///
/// # Safety
/// `name` is NULL or NUL-terminated, `out_module` and `out_param` are NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_model_add_sharded(
    model: *mut fsdp_model_t,
    parent: u32,
    name: *const c_char,
    engine: *const fsdp_engine_t,
    out_module: *mut u32,
    out_param: *mut u32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (name, out_module) = unsafe { (string(name, "name")?, self::out(out_module, "out_module")?) };
        // SAFETY: as above.
        let out_param = unsafe { self::out(out_param, "out_param") }?;
        let sharded = get(engine)?.engine.model().clone();
        let (module, param) = edit(model, |tree| tree.adopt(parent, name, sharded))?;
        out_module.write(module);
        out_param.write(param);
        Ok(())
    })
}

/// Overrides the types of the unit that `module` is, or will be when an engine is made (an error then if it is none):
/// `param_dtype`, what its parameters are computed in, and `reduce_dtype`, what its gradients are rounded to before they
/// are summed. Each is float32, float16, bfloat16, or {0, 0, 0} for the engine's own (fsdp_engine_config_t); a later call
/// replaces both. The same on every rank. Errors: FSDP_ERR_UNSUPPORTED for other dtypes, FSDP_ERR_INVALID_STATE for
/// another param_dtype than that of a unit that is sharded already. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_model_set_unit_dtypes(
    model: *mut fsdp_model_t,
    module: u32,
    param_dtype: fsdp_dtype_t,
    reduce_dtype: fsdp_dtype_t,
) -> fsdp_status_t {
    boundary(|| {
        let param = tensor::optional_dtype(param_dtype, "param_dtype")?;
        let reduce = tensor::optional_dtype(reduce_dtype, "reduce_dtype")?;
        edit(model, |tree| tree.set_unit_dtypes(module, UnitDtypes { param, reduce }))
    })
}

/// Overrides the type that a parameter is computed in, before that of its unit and of the engine: float32, float16,
/// bfloat16, or {0, 0, 0} for no override. The same on every rank. Errors as for fsdp_model_set_unit_dtypes. Local. Since
/// 0.1.
#[no_mangle]
pub extern "C" fn fsdp_model_set_param_dtype(
    model: *mut fsdp_model_t,
    param: u32,
    dtype: fsdp_dtype_t,
) -> fsdp_status_t {
    boundary(|| {
        let dtype = tensor::optional_dtype(dtype, "dtype")?;
        edit(model, |tree| tree.set_param_dtype(param, dtype))
    })
}

/// Frees the model; NULL does nothing. Engines made from it live on. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_model_destroy(model: *mut fsdp_model_t) {
    boundary_void(|| remove(model));
}

/// A callback of C as an initializer; None for NULL.
///
/// # Safety
/// `function` may be called with `user_data` as long as the result lives, from any thread.
pub unsafe fn module_init(function: fsdp_module_init_fn, user_data: *mut c_void) -> Option<ModuleInit> {
    let function = function?;
    let user_data = UserData(user_data);
    Some(Arc::new(move |m| {
        let (fqn, class_name) = (c_string(m.fqn)?, c_string(m.class_name)?);
        let params: Vec<u32> = m.params.iter().map(|p| p.param).collect();
        let tensors: Vec<fsdp_tensor_t> = m.params.iter().map(describe).collect();
        let init = fsdp_module_init_t {
            struct_size: size_of::<fsdp_module_init_t>(),
            module: m.module,
            fqn: fqn.as_ptr(),
            class_name: class_name.as_ptr(),
            param_count: params.len() as u32,
            params: params.as_ptr(),
            tensors: tensors.as_ptr(),
        };
        // SAFETY: the caller's promise; all pointers live until the call returns.
        returned(unsafe { function(&init, user_data.get()) })
    }))
}

/// The same for one parameter.
///
/// # Safety
/// As for `module_init`.
unsafe fn param_init(function: fsdp_param_init_fn, user_data: *mut c_void) -> Option<ParamInit> {
    let function = function?;
    let user_data = UserData(user_data);
    Some(Arc::new(move |p| {
        // SAFETY: the caller's promise; the tensor lives until the call returns.
        returned(unsafe { function(p.param, &describe(p), user_data.get()) })
    }))
}

fn describe(p: &InitParam) -> fsdp_tensor_t {
    tensor::describe(p.bytes.as_ptr().cast_mut().cast(), p.dtype, p.shape)
}

fn returned(code: i32) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(err!(Callback, "returned {code}")),
    }
}

fn not_callable(what: std::fmt::Arguments) -> Error {
    err!(InvalidArgument, "expected {what} to be callable: fn is NULL")
}

/// A host's pointer, passed on untouched.
#[derive(Clone, Copy)]
pub struct UserData(pub *mut c_void);

impl UserData {
    /// A method, so that a closure takes the whole struct along.
    pub fn get(self) -> *mut c_void {
        self.0
    }
}

// SAFETY: never dereferenced here; that the callback it goes to may run in any thread is the host's promise.
unsafe impl Send for UserData {}
// SAFETY: as above.
unsafe impl Sync for UserData {}

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
