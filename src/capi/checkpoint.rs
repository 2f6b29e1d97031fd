//! Checkpoints through the C ABI.

use super::handle::{fsdp_engine_t, get};
use super::status::{boundary, fsdp_status_t, out, string};
use crate::checkpoint::{self, StateTensor};
use crate::error::{err, Result};
use std::ffi::{c_char, c_void};
use std::path::Path;

/// A tensor of optimizer state that is sharded like its parameter.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_state_t {
    /// The parameter it belongs to.
    pub param: u32,
    /// The optimizer's name for it, e.g. "exp_avg"; not empty, no colon.
    pub name: *const c_char,
    /// float32, as many as the parameter's piece on this rank (fsdp_shard_t.numel).
    pub data: *mut c_void,
}

/// Saves all shards and `states` into the new folder `dir`: a safetensors file per rank and a manifest with checksums,
/// written aside, flushed, and renamed when complete, so that `dir` is complete or absent whenever a process ends.
/// Collective: same `dir` (on a file system all ranks share) and states of the same parameters and names on every rank;
/// a failure on one rank is the error of all. `metadata_json`: any JSON to keep with it (rank 0's is kept), NULL for
/// null. All pointers are borrowed for the call. Not during a backward. Errors: FSDP_ERR_CHECKPOINT if `dir` exists,
/// FSDP_ERR_IO, FSDP_ERR_OUT_OF_MEMORY for a full disk. Since 0.1.
///
/// # Safety
/// Strings are NULL or NUL-terminated; `states` points to `state_count` entries whose data are readable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_save(
    engine: *mut fsdp_engine_t,
    dir: *const c_char,
    states: *const fsdp_state_t,
    state_count: usize,
    metadata_json: *const c_char,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let (dir, states) = unsafe { (string(dir, "dir")?, read_states(states, state_count)?) };
        let metadata = match metadata_json.is_null() {
            true => "null",
            // SAFETY: the caller's promise.
            false => unsafe { string(metadata_json, "metadata_json") }?,
        };
        // SAFETY: the caller's promise.
        unsafe { checkpoint::save(&object.engine, Path::new(dir), &states, metadata) }
    })
}

/// Fills all shards and the data of `states` from the checkpoint in `dir`, saved at any world size and wrapping of the
/// same model. Collective. Nothing is changed on any rank unless every rank has read and checked all of its part. All
/// pointers are borrowed for the call. Not during a backward. Errors: FSDP_ERR_CHECKPOINT names the file and the
/// parameter if it is absent, incomplete, damaged, or of another model. Since 0.1.
///
/// # Safety
/// `dir` is NULL or NUL-terminated; `states` points to `state_count` entries whose data are writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_load(
    engine: *mut fsdp_engine_t,
    dir: *const c_char,
    states: *const fsdp_state_t,
    state_count: usize,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let (dir, states) = unsafe { (string(dir, "dir")?, read_states(states, state_count)?) };
        // SAFETY: the caller's promise.
        unsafe { checkpoint::load(&object.engine, Path::new(dir), &states) }
    })
}

/// The metadata_json that the checkpoint in `dir` was saved with. *out_size is its size with the terminating NUL;
/// `buffer` of `buffer_size` bytes receives it, or may be NULL (with buffer_size 0) to ask for the size.
/// FSDP_ERR_INVALID_ARGUMENT if the buffer is too small. Local. Since 0.1.
///
/// # Safety
/// `dir` is NULL or NUL-terminated, `buffer` is NULL or has `buffer_size` writable bytes, `out_size` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_metadata(
    dir: *const c_char,
    buffer: *mut c_char,
    buffer_size: usize,
    out_size: *mut usize,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (dir, out_size) = unsafe { (string(dir, "dir")?, out(out_size, "out_size")?) };
        let text = checkpoint::metadata(Path::new(dir))?;
        let size = text.len() + 1;
        if !buffer.is_null() {
            if buffer_size < size {
                return Err(err!(InvalidArgument, "buffer has {buffer_size} bytes, the metadata needs {size}"));
            }
            // SAFETY: the caller's promise; checked to be large enough.
            unsafe {
                std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, text.len());
                *buffer.add(text.len()) = 0;
            }
        }
        out_size.write(size);
        Ok(())
    })
}

/// # Safety
/// `states` points to `count` entries with NUL-terminated names.
unsafe fn read_states(states: *const fsdp_state_t, count: usize) -> Result<Vec<StateTensor>> {
    if states.is_null() && count > 0 {
        return Err(err!(InvalidArgument, "states is NULL but state_count is {count}"));
    }
    (0..count)
        .map(|i| {
            // SAFETY: the caller's promise.
            let s = unsafe { *states.add(i) };
            // SAFETY: as above.
            let name = unsafe { string(s.name, "the name of a state") }?.to_string();
            Ok(StateTensor { param: s.param, name, data: s.data.cast() })
        })
        .collect()
}
