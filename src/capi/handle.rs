//! Handles: numbers in pointer form that stand for objects in one table, so that a stale or wrong handle is an error.

use super::engine::EngineObject;
use crate::checkpoint::Job;
use crate::comm::Communicator;
use crate::engine::FullParams;
use crate::error::{err, Error, Result};
use crate::module::ModuleTree;
use crate::optim::Optimizer;
use crate::scaler::GradScaler;
use crate::trace::Trace;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, RwLock};

/// A communicator: how this process and the other ranks reach each other.
pub struct fsdp_comm_t {
    _opaque: [u8; 0],
}

/// A host's tree of modules and parameters, and which modules are units.
pub struct fsdp_model_t {
    _opaque: [u8; 0],
}

/// The execution order of a forward.
pub struct fsdp_trace_t {
    _opaque: [u8; 0],
}

/// A sharded model.
pub struct fsdp_engine_t {
    _opaque: [u8; 0],
}

/// An optimizer of a sharded model.
pub struct fsdp_optimizer_t {
    _opaque: [u8; 0],
}

/// Full parameters outside of an iteration.
pub struct fsdp_full_params_t {
    _opaque: [u8; 0],
}

/// A checkpoint that is being saved in the background.
pub struct fsdp_checkpoint_job_t {
    _opaque: [u8; 0],
}

/// A scaler of float16 gradients.
pub struct fsdp_grad_scaler_t {
    _opaque: [u8; 0],
}

enum Object {
    Comm(Arc<dyn Communicator>),
    Model(Arc<Mutex<ModuleTree>>),
    Trace(Arc<Mutex<Trace>>),
    Engine(Arc<EngineObject>),
    Optimizer(Arc<Optimizer>),
    FullParams(Arc<Mutex<FullParams>>),
    CheckpointJob(Arc<Job>),
    GradScaler(Arc<GradScaler>),
}

impl Object {
    fn kind(&self) -> &'static str {
        match self {
            Object::Comm(_) => "a communicator",
            Object::Model(_) => "a model",
            Object::Trace(_) => "a trace",
            Object::Engine(_) => "an engine",
            Object::Optimizer(_) => "an optimizer",
            Object::FullParams(_) => "full parameters",
            Object::CheckpointJob(_) => "a save in the background",
            Object::GradScaler(_) => "a gradient scaler",
        }
    }
}

struct Table {
    last: usize,
    objects: HashMap<usize, AnyObject, BuildHasherDefault<NumberHasher>>,
}

/// Handles are numbers of our own making, looked up in every call: no hash against malice is needed.
#[derive(Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_usize(*byte as usize);
        }
    }

    /// Fibonacci hashing: the table takes the upper bits (Knuth, The Art of Computer Programming, volume 3, 6.4).
    fn write_usize(&mut self, number: usize) {
        self.0 = (self.0 ^ number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

static TABLE: RwLock<Table> = RwLock::new(Table { last: 0, objects: HashMap::with_hasher(BuildHasherDefault::new()) });

/// Something that C can hold a handle of.
pub trait Handle: Sized {
    type Object: Clone;
    const KIND: &'static str;
    #[doc(hidden)]
    fn pick(any: &AnyObject) -> Option<Self::Object>;
    #[doc(hidden)]
    fn wrap(object: Self::Object) -> AnyObject;
}

/// An entry of the table, opaque outside this file.
pub struct AnyObject(Object);

macro_rules! handle {
    ($handle:ty, $variant:ident, $object:ty, $kind:literal) => {
        impl Handle for $handle {
            type Object = $object;
            const KIND: &'static str = $kind;
            fn pick(any: &AnyObject) -> Option<Self::Object> {
                match &any.0 {
                    Object::$variant(object) => Some(object.clone()),
                    _ => None,
                }
            }
            fn wrap(object: Self::Object) -> AnyObject {
                AnyObject(Object::$variant(object))
            }
        }
    };
}

handle!(fsdp_comm_t, Comm, Arc<dyn Communicator>, "a communicator");
handle!(fsdp_model_t, Model, Arc<Mutex<ModuleTree>>, "a model");
handle!(fsdp_trace_t, Trace, Arc<Mutex<Trace>>, "a trace");
handle!(fsdp_engine_t, Engine, Arc<EngineObject>, "an engine");
handle!(fsdp_optimizer_t, Optimizer, Arc<Optimizer>, "an optimizer");
handle!(fsdp_full_params_t, FullParams, Arc<Mutex<FullParams>>, "full parameters");
handle!(fsdp_checkpoint_job_t, CheckpointJob, Arc<Job>, "a save in the background");
handle!(fsdp_grad_scaler_t, GradScaler, Arc<GradScaler>, "a gradient scaler");

/// Puts an object into the table. Numbers are never used again.
pub fn insert<H: Handle>(object: H::Object) -> *mut H {
    let mut table = TABLE.write().unwrap_or_else(|e| e.into_inner());
    // Steps of 16 keep a handle from looking like a small integer or an index.
    table.last += 16;
    let id = table.last;
    table.objects.insert(id, H::wrap(object));
    id as *mut H
}

/// The object a handle stands for.
pub fn get<H: Handle>(handle: *const H) -> Result<H::Object> {
    let table = TABLE.read().unwrap_or_else(|e| e.into_inner());
    let object = table.objects.get(&(handle as usize));
    object.and_then(H::pick).ok_or_else(|| wrong(handle as usize, H::KIND, object))
}

/// Why a number is no handle of `kind`: `object` is what it is a handle of.
#[cold]
fn wrong(handle: usize, kind: &str, object: Option<&AnyObject>) -> Error {
    match object {
        _ if handle == 0 => err!(InvalidArgument, "the handle of {kind} is NULL"),
        None => err!(InvalidHandle, "the handle is not that of {kind}: it was destroyed or never existed"),
        Some(other) => err!(InvalidHandle, "the handle is not that of {kind}, but of {}", other.0.kind()),
    }
}

/// Takes an object out of the table; what else still uses it keeps it alive. A stale or wrong handle does nothing.
pub fn remove<H: Handle>(handle: *mut H) {
    if get(handle as *const H).is_ok() {
        let object = TABLE.write().unwrap_or_else(|e| e.into_inner()).objects.remove(&(handle as usize));
        // Dropped here, after the lock: dropping an object may take long.
        drop(object);
    }
}
