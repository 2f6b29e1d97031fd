//! The fixed unit buffers and gradient slots of an engine as memory of NCCL's own, which the communicators that move them
//! know, so that NCCL copies nothing in between.
//!
//! Buffers are one piece of memory and slots another, since NCCL rounds every piece up to what its hardware maps (2 MiB and
//! more). 2.19 registers them with a communicator; 2.27 has windows, in which ranks see each other's memory: every rank uses
//! the same places of them for the same collective, since a pipeline decides alike on every rank.

use super::comm::NcclComm;
use super::comms::NcclPair;
use super::library::Nccl;
use super::watch::What;
use crate::agree;
use crate::comm::Communicator;
use crate::config::Registration;
use crate::device::cuda::Context;
use crate::error::{err, Error, Result};
use crate::log;
use crate::pipeline::Limits;
use cudarc::driver::sys::CUdeviceptr;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// NCCL_WIN_COLL_SYMMETRIC: at the same offset on every rank.
pub(super) const SYMMETRIC: c_int = 1;
/// What device memory is aligned to.
const ALIGNMENT: usize = 256;

/// How a version registers memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// With one communicator, locally (2.19).
    Buffer,
    /// Symmetrically, by all ranks of the communicator (2.27).
    Window,
}

impl Form {
    /// The best that this library has.
    fn best(nccl: &Nccl) -> Option<Form> {
        let fns = &nccl.fns;
        let memory = fns.ncclMemAlloc.is_some() && fns.ncclMemFree.is_some();
        let window = fns.ncclCommWindowRegister.is_some() && fns.ncclCommWindowDeregister.is_some();
        let buffer = fns.ncclCommRegister.is_some() && fns.ncclCommDeregister.is_some();
        match (memory, window, buffer) {
            (true, true, _) => Some(Form::Window),
            (true, false, true) => Some(Form::Buffer),
            _ => None,
        }
    }

    fn name(form: Option<Form>) -> &'static str {
        match form {
            None => "one that registers no buffers",
            Some(Form::Buffer) => "one that registers buffers",
            Some(Form::Window) => "one with windows",
        }
    }

    /// What `wanted` comes to with this library; None: nothing is registered.
    fn of(nccl: &Nccl, wanted: Registration, lent: bool) -> Result<Option<Form>> {
        match (wanted, Form::best(nccl)) {
            (Registration::Never, _) => Ok(None),
            (Registration::Auto, _) if lent => Ok(None),
            (Registration::Auto, best) => Ok(best),
            (Registration::Always, Some(best)) => Ok(Some(best)),
            (Registration::Always, None) => {
                let ((major, minor, patch), path) = (nccl.version(), nccl.path());
                Err(err!(
                    Unsupported,
                    "unit buffers cannot be registered: NCCL {major}.{minor}.{patch} cannot do it, {path} lacks \
                     ncclMemAlloc, or both ncclCommWindowRegister and ncclCommRegister, or what undoes them"
                ))
            }
        }
    }
}

/// Device memory of NCCL's own kind.
struct NcclMemory {
    nccl: &'static Nccl,
    context: Arc<Context>,
    data: *mut c_void,
    bytes: usize,
}

// SAFETY: an address inside memory that this keeps; its users decide who touches what when.
unsafe impl Send for NcclMemory {}
// SAFETY: as above.
unsafe impl Sync for NcclMemory {}

impl NcclMemory {
    /// `bytes` (more than 0), when `Form::of` has found the functions.
    fn new(nccl: &'static Nccl, context: &Arc<Context>, bytes: usize, what: &str) -> Result<NcclMemory> {
        let alloc = nccl.fns.ncclMemAlloc.ok_or_else(|| err!(Unsupported, "NCCL has no memory of its own"))?;
        let _current = context.enter()?;
        let mut data = std::ptr::null_mut();
        // SAFETY: the pointer is valid; freed when dropped.
        let code = unsafe { alloc(&mut data, bytes) };
        nccl.check(format_args!("{bytes} bytes of NCCL's memory for {what}"), code)?;
        Ok(NcclMemory { nccl, context: context.clone(), data, bytes })
    }
}

impl Drop for NcclMemory {
    fn drop(&mut self) {
        if let (Ok(_current), Some(free)) = (self.context.enter(), self.nccl.fns.ncclMemFree) {
            // SAFETY: allocated by `new`, freed once.
            unsafe { free(self.data) };
        }
    }
}

/// Memory that a communicator knows until this is dropped; then it forgets the memory, and that is freed.
struct Registered {
    comm: Arc<NcclComm>,
    form: Form,
    handle: *mut c_void,
    /// Dropped after `Drop::drop`.
    memory: NcclMemory,
}

// SAFETY: a handle of NCCL's, used under the communicator's lock.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    /// Collective: every rank gives as much.
    fn new(comm: &Arc<NcclComm>, form: Form, memory: NcclMemory) -> Result<Registered> {
        let mut handle = std::ptr::null_mut();
        let what = What::named(&format!("the registration of {} bytes with NCCL", memory.bytes));
        let missing = |nccl: &Nccl| err!(Unsupported, "{} cannot register memory", nccl.path());
        comm.with_all(&what, |nccl, raw| {
            let (fns, data, bytes) = (&nccl.fns, memory.data, memory.bytes);
            match form {
                Form::Buffer => {
                    let register = fns.ncclCommRegister.ok_or_else(|| missing(nccl))?;
                    // SAFETY: the memory is kept with the registration.
                    Ok(unsafe { register(raw, data, bytes, &mut handle) })
                }
                Form::Window => {
                    let register = fns.ncclCommWindowRegister.ok_or_else(|| missing(nccl))?;
                    // SAFETY: as above; the handle is set once the call is done, which is waited for.
                    Ok(unsafe { register(raw, data, bytes, &mut handle, SYMMETRIC) })
                }
            }
        })?;
        Ok(Registered { comm: comm.clone(), form, handle, memory })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // Null: NCCL did not need to know it. A communicator that was aborted has forgotten it.
        if self.handle.is_null() || self.comm.async_error().is_some() {
            return;
        }
        let what = What::named(&format!("forgetting {} registered bytes", self.memory.bytes));
        let forgotten = self.comm.with_all(&what, |nccl, raw| {
            let deregister = match self.form {
                Form::Buffer => nccl.fns.ncclCommDeregister,
                Form::Window => nccl.fns.ncclCommWindowDeregister,
            };
            // SAFETY: registered once with this communicator, forgotten once.
            Ok(deregister.map_or(super::library::SUCCESS, |deregister| unsafe { deregister(raw, self.handle) }))
        });
        if let Err(e) = forgotten {
            log::warn(&e.message);
        }
    }
}

/// See the module's text. Whoever drops this has waited for what uses it on this rank's GPU.
pub struct FixedMemory {
    /// Where each fixed unit buffer, and each gradient slot, of [`Limits`] is.
    pub(super) buffers: Vec<CUdeviceptr>,
    pub(super) slots: Vec<CUdeviceptr>,
    /// Of both, as NCCL was asked for them.
    pub(super) bytes: usize,
    _registered: [Option<Registered>; 2],
}

impl FixedMemory {
    /// Takes what `limits` says, and registers unit buffers with `pair.gather` and slots with `pair.reduce`; None if `wanted`
    /// comes to nothing. `lent`: device memory is a host's allocator's, from which NCCL's own does not come. Collective over
    /// the pair's ranks, of which `comm` is a communicator on the host; what one rank lacks is the error of all.
    pub fn new(
        nccl: &'static Nccl,
        wanted: Registration,
        lent: bool,
        pair: &NcclPair,
        limits: &Limits,
        comm: &dyn Communicator,
    ) -> Result<Option<FixedMemory>> {
        let form = Form::of(nccl, wanted, lent);
        agree::on_result(form.as_ref().map(|_| 0).map_err(Error::clone), comm)?;
        let form = form?;
        agree::on_lines(&[Form::name(form).to_string()], |_| "versions of NCCL", comm)?;
        let Some(form) = form else { return Ok(None) };
        let bytes = |sizes: &[usize]| sizes.iter().map(|b| b.next_multiple_of(ALIGNMENT)).sum::<usize>();
        let take = |comm: &NcclComm, sizes: &[usize], what: &str| match bytes(sizes) {
            0 => Ok(None),
            bytes => NcclMemory::new(nccl, comm.context(), bytes, what).map(Some),
        };
        let (buffers, slots) = (&limits.unit_buffers, &limits.gradient_slots);
        let taken = take(&pair.gather, buffers, "the unit buffers")
            .and_then(|first| Ok([first, take(&pair.reduce, slots, "the gradient slots")?]));
        // Registering waits for all ranks: nobody does before all have the memory.
        agree::on_result(taken.as_ref().map(|_| 0).map_err(Error::clone), comm)?;
        let [first, second] = taken?;
        let places = [places(first.as_ref(), buffers), places(second.as_ref(), slots)];
        let register = |memory: Option<NcclMemory>, comm: &Arc<NcclComm>, what: &str| {
            let registered = memory.map(|memory| Registered::new(comm, form, memory)).transpose();
            registered.map_err(|e| e.context(format!("{what} could not be registered")))
        };
        let registered = register(first, &pair.gather, "the unit buffers")
            .and_then(|first| Ok([first, register(second, &pair.reduce, "the gradient slots")?]));
        agree::on_result(registered.as_ref().map(|_| 0).map_err(Error::clone), comm)?;
        let bytes = bytes(&limits.unit_buffers) + bytes(&limits.gradient_slots);
        let [buffers, slots] = places;
        Ok(Some(FixedMemory { buffers, slots, bytes, _registered: registered? }))
    }
}

/// One after the other from where the memory begins.
fn places(memory: Option<&NcclMemory>, sizes: &[usize]) -> Vec<CUdeviceptr> {
    let begin = memory.map_or(0, |m| m.data as CUdeviceptr);
    let next = |at: &mut CUdeviceptr, bytes: &usize| {
        Some(std::mem::replace(at, *at + bytes.next_multiple_of(ALIGNMENT) as CUdeviceptr))
    };
    sizes.iter().scan(begin, next).collect()
}
