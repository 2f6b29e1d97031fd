//! `fsdp_checkpoint_job_t`: a checkpoint that is saved in the background.

use super::checkpoint::{fsdp_checkpoint_contents_t, Given};
use super::handle::{fsdp_checkpoint_job_t, fsdp_engine_t, get, insert, remove};
use super::status::{boundary, boundary_void, fsdp_status_t, out, string};
use crate::checkpoint::Job;
use std::ffi::c_char;
use std::path::Path;
use std::sync::Arc;

/// As fsdp_checkpoint_save_contents, in the background: returns when this rank's shards, states and tensors are copied in
/// host memory; a thread of its own writes the copy, on a communicator of its own. Training may go on at once; engine,
/// optimizer and communicator may be destroyed. A process that ends before leaves no checkpoint: fsdp_checkpoint_job_wait first.
///
/// One save at a time: while one of this engine runs, on any rank, further saves of it, in the background or not, are
/// refused on every rank by FSDP_ERR_INVALID_STATE, whose message names the folder that is being written.
///
/// Collective. *out is owned by the caller: fsdp_checkpoint_job_destroy. Errors here are those that can be seen at once:
/// arguments, FSDP_ERR_CHECKPOINT if `dir` exists, FSDP_ERR_OUT_OF_MEMORY for the copy; the others are the outcome of
/// fsdp_checkpoint_job_wait. Since 0.1.
///
/// # Safety
/// As for fsdp_checkpoint_save_contents; `out` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_save_async(
    engine: *mut fsdp_engine_t,
    dir: *const c_char,
    contents: *const fsdp_checkpoint_contents_t,
    out: *mut *mut fsdp_checkpoint_job_t,
) -> fsdp_status_t {
    boundary(|| {
        let engine = get(engine as *const fsdp_engine_t)?.engine.clone();
        // SAFETY: the caller's promise.
        let (dir, given, out) =
            unsafe { (string(dir, "dir")?, Given::read(&engine, contents)?, self::out(out, "out")?) };
        // SAFETY: the caller's promise.
        let job = unsafe {
            match given.optimizer {
                Some(optimizer) => optimizer.save_async(Path::new(dir), &given.contents),
                None => Job::start(&engine, Path::new(dir), &given.contents),
            }
        }?;
        out.write(insert(Arc::new(job)));
        Ok(())
    })
}

/// Waits until the save has ended on this rank and returns its outcome, the same on every rank. After FSDP_OK the
/// checkpoint is complete and on disk. May be called again. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_checkpoint_job_wait(job: *mut fsdp_checkpoint_job_t) -> fsdp_status_t {
    boundary(|| get(job as *const fsdp_checkpoint_job_t)?.wait())
}

/// Sets *out_done to 1 if the save has ended on this rank, well or not, and fsdp_checkpoint_job_wait would not wait, else
/// to 0. Local. Since 0.1.
///
/// # Safety
/// `out_done` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_job_done(
    job: *const fsdp_checkpoint_job_t,
    out_done: *mut i32,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let out = unsafe { out(out_done, "out_done") }?;
        out.write(i32::from(get(job)?.done()));
        Ok(())
    })
}

/// Waits until the save has ended, and frees the job; NULL does nothing. Local. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_checkpoint_job_destroy(job: *mut fsdp_checkpoint_job_t) {
    boundary_void(|| remove(job));
}
