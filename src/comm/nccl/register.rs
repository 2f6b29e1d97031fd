//! Buffers that NCCL knows: memory of its own kind, and registrations for zero-copy, where the version has them.
//!
//! 2.19 registers any buffer; 2.27 has windows over memory of its own, in which ranks see each other's buffers
//! symmetrically.

use super::comm::NcclComm;
use super::library::Nccl;
use super::watch::What;
use crate::device::cuda::Context;
use crate::error::{err, Result};
use cudarc::driver::sys::CUdeviceptr;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// NCCL_WIN_COLL_SYMMETRIC: at the same offset on every rank.
const SYMMETRIC: c_int = 1;

/// Device memory of NCCL's own kind, which windows need.
pub struct RegisteredMemory {
    nccl: &'static Nccl,
    context: Arc<Context>,
    data: *mut c_void,
    bytes: usize,
}

// SAFETY: an address inside memory that this keeps; its users decide who touches what when.
unsafe impl Send for RegisteredMemory {}
// SAFETY: as above.
unsafe impl Sync for RegisteredMemory {}

impl RegisteredMemory {
    /// `bytes` (more than 0). `Unsupported` if the version has none.
    pub fn new(nccl: &'static Nccl, context: &Arc<Context>, bytes: usize) -> Result<RegisteredMemory> {
        let (Some(alloc), Some(_)) = (nccl.fns.ncclMemAlloc, nccl.fns.ncclMemFree) else {
            return Err(too_old(nccl, "memory of its own", "ncclMemAlloc"));
        };
        let _current = context.enter()?;
        let mut data = std::ptr::null_mut();
        // SAFETY: the pointer is valid; freed when dropped.
        nccl.check(format_args!("memory of NCCL's: {bytes} bytes"), unsafe { alloc(&mut data, bytes) })?;
        Ok(RegisteredMemory { nccl, context: context.clone(), data, bytes })
    }

    pub fn address(&self) -> CUdeviceptr {
        self.data as CUdeviceptr
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for RegisteredMemory {
    fn drop(&mut self) {
        if let (Ok(_current), Some(free)) = (self.context.enter(), self.nccl.fns.ncclMemFree) {
            // SAFETY: allocated by `new`, freed once.
            unsafe { free(self.data) };
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Buffer,
    Window,
}

/// A buffer that a communicator knows until this is dropped.
pub struct Registered {
    comm: Arc<NcclComm>,
    form: Form,
    handle: *mut c_void,
    /// What the window is over.
    _memory: Option<Arc<RegisteredMemory>>,
}

// SAFETY: a handle of NCCL's, used under the communicator's lock.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    /// Registers any device memory. Local. `Unsupported` before 2.19.
    ///
    /// # Safety
    /// The memory is there until the result is dropped.
    pub unsafe fn buffer(comm: &Arc<NcclComm>, data: CUdeviceptr, bytes: usize) -> Result<Registered> {
        let handle = comm.with(|nccl, raw| {
            let register = nccl.fns.ncclCommRegister.filter(|_| nccl.fns.ncclCommDeregister.is_some());
            let register = register.ok_or_else(|| too_old(nccl, "registered buffers", "ncclCommRegister"))?;
            let mut handle = std::ptr::null_mut();
            // SAFETY: the caller's promise.
            let code = unsafe { register(raw, data as *mut c_void, bytes, &mut handle) };
            nccl.check(format_args!("registering a buffer of {bytes} bytes"), code).map(|()| handle)
        })?;
        Ok(Registered { comm: comm.clone(), form: Form::Buffer, handle, _memory: None })
    }

    /// A symmetric window over all of `memory`. Collective: every rank gives as much. `Unsupported` before 2.27.
    pub fn window(comm: &Arc<NcclComm>, memory: &Arc<RegisteredMemory>) -> Result<Registered> {
        let mut handle = std::ptr::null_mut();
        let what = What::named(&format!("the registration of {} bytes", memory.bytes));
        comm.with_all(&what, |nccl, raw| {
            let register = nccl.fns.ncclCommWindowRegister.filter(|_| nccl.fns.ncclCommWindowDeregister.is_some());
            let register = register.ok_or_else(|| too_old(nccl, "windows", "ncclCommWindowRegister"))?;
            // SAFETY: the memory is kept with the window; the handle is set once the call is done, which is waited for.
            Ok(unsafe { register(raw, memory.data, memory.bytes, &mut handle, SYMMETRIC) })
        })?;
        Ok(Registered { comm: comm.clone(), form: Form::Window, handle, _memory: Some(memory.clone()) })
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.handle.is_null() {
            // A window that NCCL did not need.
            return;
        }
        // A communicator that was aborted has forgotten it.
        let _ = self.comm.with(|nccl, raw| {
            let deregister = match self.form {
                Form::Buffer => nccl.fns.ncclCommDeregister,
                Form::Window => nccl.fns.ncclCommWindowDeregister,
            };
            // SAFETY: registered once with this communicator, forgotten once.
            deregister
                .map_or(Ok(()), |deregister| nccl.check("forgetting a buffer", unsafe { deregister(raw, self.handle) }))
        });
    }
}

fn too_old(nccl: &Nccl, what: &str, function: &str) -> crate::error::Error {
    let (major, minor, patch) = nccl.version();
    err!(Unsupported, "NCCL {major}.{minor}.{patch} has no {what}: {} has no function {function}", nccl.path())
}
