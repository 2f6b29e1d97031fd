//! A host's communication hook: sees a unit's full gradients just before they are published, and may change them. On a GPU it
//! launches what changes them, on the stream that their reduction goes to.

use crate::comm::Communicator;
use crate::error::{err, Error, Result, Status};
use crate::module::ParamId;
use crate::plan::UnitId;
use std::cell::Cell;
use std::ffi::c_void;
use std::sync::Arc;

/// One parameter's full gradient, in the parameter's shape.
pub struct HookGradient {
    pub param: ParamId,
    pub data: *mut f32,
    pub numel: usize,
}

/// What a hook is called with: the gradients that this rank has for a unit.
pub struct UnitGradients<'a> {
    pub unit: UnitId,
    /// The fully qualified name of its module, "" for the root.
    pub name: &'a str,
    /// In the order of the unit's parameters; only those present.
    pub gradients: &'a [HookGradient],
    /// On a GPU, where the gradients lie then: the stream (a CUstream) that they are complete on, and reduced on afterwards.
    /// Null on the CPU.
    pub stream: *mut c_void,
}

/// The function itself.
pub type HookFn = Arc<dyn Fn(&UnitGradients) -> Result<()> + Send + Sync>;

thread_local! {
    /// The engine whose hook this thread is in; 0: none.
    static INSIDE: Cell<u64> = const { Cell::new(0) };
}

/// A hook of the engine with this number.
#[derive(Clone)]
pub struct CommHook {
    pub engine: u64,
    pub function: HookFn,
    /// All that ranks may wait in for this one.
    pub comms: Vec<Arc<dyn Communicator>>,
}

impl CommHook {
    /// Runs it. Calls on the same engine from inside are refused by [`refuse_inside`]. An error is a `Callback`'s, and breaks the
    /// communicators: the other ranks would wait for gradients that never come.
    pub fn run(&self, gradients: &UnitGradients) -> Result<()> {
        /// Leaves even if the function panics.
        struct Leave(u64);
        impl Drop for Leave {
            fn drop(&mut self) {
                INSIDE.set(self.0);
            }
        }
        let _leave = Leave(INSIDE.replace(self.engine));
        (self.function)(gradients).map_err(|e| {
            let unit = if gradients.name.is_empty() { "(root)" } else { gradients.name };
            let e = e.context(format!("the communication hook of unit \"{unit}\" failed"));
            let e = Error { status: Status::Callback, ..e };
            self.comms.iter().for_each(|c| c.abort(&e.message));
            e
        })
    }
}

/// An error if this thread is in the hook of the engine with this number: the engine is locked.
pub fn refuse_inside(engine: u64) -> Result<()> {
    match INSIDE.get() == engine {
        true => Err(err!(InvalidState, "a communication hook cannot call the engine that it was called by")),
        false => Ok(()),
    }
}
