//! The fixed unit buffers of an engine as memory of NCCL's own, which the communicators that gather into them know, so that
//! NCCL copies nothing in between: that of the shard group, and those of smaller groups.
//!
//! They are one piece of memory, since NCCL rounds every piece up to what its hardware maps (2 MiB and more). 2.19 registers it
//! with a communicator; 2.27 has windows, in which ranks see each other's memory. With both, every rank has to use the same
//! place for the same collective. Ranks that unshard and reshard in the same order do: a pipeline decides alike on each. That they
//! do is compared when a gather is announced.
//!
//! Gradient slots are not registered. Which one a unit has follows from when a rank has its first gradient, and a rank may
//! have none of a parameter that others have some of.

use super::comm::NcclComm;
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

/// What avoids errors of all this.
const WITHOUT: &str = "registered_buffers = FSDP_REGISTERED_BUFFERS_NEVER (false, in LibTorch) does without";

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
                     ncclMemAlloc, or both ncclCommWindowRegister and ncclCommRegister, or what undoes them; {WITHOUT}"
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
    fn new(nccl: &'static Nccl, context: &Arc<Context>, bytes: usize) -> Result<NcclMemory> {
        let alloc = nccl.fns.ncclMemAlloc.ok_or_else(|| err!(Unsupported, "NCCL has no memory of its own"))?;
        let _current = context.enter()?;
        let mut data = std::ptr::null_mut();
        // SAFETY: the pointer is valid; freed when dropped.
        let code = unsafe { alloc(&mut data, bytes) };
        let what = format_args!("{bytes} bytes of NCCL's memory for the unit buffers ({WITHOUT})");
        nccl.check(what, code)?;
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

/// Memory that a communicator knows until this is dropped; then it forgets the memory, which is freed when none knows it.
struct Registered {
    comm: Arc<NcclComm>,
    form: Form,
    handle: *mut c_void,
    /// Dropped after `Drop::drop`.
    memory: Arc<NcclMemory>,
}

// SAFETY: a handle of NCCL's, used under the communicator's lock.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    /// Collective over the ranks of `comm`: every one gives as much.
    fn new(comm: &Arc<NcclComm>, form: Form, memory: &Arc<NcclMemory>) -> Result<Registered> {
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
        })
        .map_err(|e| e.context(format!("the unit buffers could not be registered ({WITHOUT})")))?;
        Ok(Registered { comm: comm.clone(), form, handle, memory: memory.clone() })
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
    /// Where each fixed unit buffer of [`Limits`] is.
    pub(super) buffers: Vec<CUdeviceptr>,
    /// Of all, as NCCL was asked for them.
    pub(super) bytes: usize,
    form: Form,
    /// None: they have no bytes.
    memory: Option<Arc<NcclMemory>>,
    registered: Vec<Registered>,
}

impl FixedMemory {
    /// Takes what `limits` says of unit buffers and registers it with `gather`; None if `wanted` comes to nothing. `lent`: device
    /// memory is a host's allocator's, from which NCCL's own does not come. Collective over the ranks of `comm`, on the host, of
    /// which `gather` has all or a group; what one rank lacks is the error of all.
    pub fn new(
        nccl: &'static Nccl,
        wanted: Registration,
        lent: bool,
        gather: &Arc<NcclComm>,
        limits: &Limits,
        comm: &dyn Communicator,
    ) -> Result<Option<FixedMemory>> {
        let form = Form::of(nccl, wanted, lent);
        agree::on_result(form.as_ref().map(|_| 0).map_err(Error::clone), comm)?;
        let form = form?;
        agree::on_lines(&[Form::name(form).to_string()], |_| "versions of NCCL", comm)?;
        let Some(form) = form else { return Ok(None) };
        let bytes = limits.unit_buffers.iter().map(|b| b.next_multiple_of(ALIGNMENT)).sum::<usize>();
        let taken = match bytes {
            0 => Ok(None),
            bytes => NcclMemory::new(nccl, gather.context(), bytes).map(|memory| Some(Arc::new(memory))),
        };
        // Registering waits for all ranks: nobody does before all have the memory.
        agree::on_result(taken.as_ref().map(|_| 0).map_err(Error::clone), comm)?;
        let memory = taken?;
        let buffers = places(memory.as_deref(), &limits.unit_buffers);
        let mut fixed = FixedMemory { buffers, bytes, form, memory, registered: Vec::new() };
        let known = fixed.register_with(gather);
        agree::on_result(known.as_ref().map(|_| 0).map_err(Error::clone), comm)?;
        known.map(|()| Some(fixed))
    }

    /// Another communicator knows the memory, too, from here on. Collective over its ranks.
    pub(super) fn register_with(&mut self, comm: &Arc<NcclComm>) -> Result<()> {
        if let Some(memory) = &self.memory {
            self.registered.push(Registered::new(comm, self.form, memory)?);
        }
        Ok(())
    }

    /// What ranks compare of a gather into unit buffer `buffer`: 0 for one that is not fixed, else which it is, from 1 on.
    pub(super) fn place(&self, buffer: usize) -> u32 {
        if buffer < self.buffers.len() {
            buffer as u32 + 1
        } else {
            0
        }
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
