//! Checkpoints through the C ABI.

use super::handle::{fsdp_engine_t, get};
use super::status::{boundary, fsdp_status_t, out, string};
use crate::checkpoint::{self, Metadata, StateTensor};
use crate::error::{err, Result};
use std::ffi::{c_char, c_void, CString};
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

/// A text to keep with a checkpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_metadata_t {
    /// Unique among those of a checkpoint.
    pub key: *const c_char,
    /// Any UTF-8 text.
    pub value: *const c_char,
}

/// Saves all shards and `states` into the new folder `dir`: a safetensors file per rank and a manifest with checksums,
/// written aside, flushed, and renamed when complete, so that `dir` is complete or absent whenever a process ends.
/// Collective: same `dir` (on a file system all ranks share) and states of the same parameters and names on every rank;
/// a failure on one rank is the error of all. `metadata`: texts to keep with it (rank 0's are kept), NULL for none. All
/// pointers are borrowed for the call. Not during a backward. Errors: FSDP_ERR_CHECKPOINT if `dir` exists,
/// FSDP_ERR_IO, FSDP_ERR_OUT_OF_MEMORY for a full disk. Since 0.1.
///
/// # Safety
/// Strings are NULL or NUL-terminated; `states` points to `state_count` entries whose data are readable, `metadata` to
/// `metadata_count` entries.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_save(
    engine: *mut fsdp_engine_t,
    dir: *const c_char,
    states: *const fsdp_state_t,
    state_count: usize,
    metadata: *const fsdp_metadata_t,
    metadata_count: usize,
) -> fsdp_status_t {
    boundary(|| {
        let object = get(engine as *const fsdp_engine_t)?;
        // SAFETY: the caller's promise.
        let (dir, states) = unsafe { (string(dir, "dir")?, read_states(states, state_count)?) };
        // SAFETY: the caller's promise.
        let metadata = unsafe { read_metadata(metadata, metadata_count) }?;
        // SAFETY: the caller's promise.
        unsafe { checkpoint::save(&object.engine, Path::new(dir), &states, &metadata) }
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

/// The text that the checkpoint in `dir` keeps under `key`. *out_size is its size with the terminating NUL, or 0 if there
/// is none; `buffer` of `buffer_size` bytes receives it, or may be NULL to ask for the size. FSDP_ERR_INVALID_ARGUMENT if
/// the buffer is too small, FSDP_ERR_CHECKPOINT if there is no complete checkpoint. Local. Since 0.1.
///
/// # Safety
/// Strings are NULL or NUL-terminated, `buffer` is NULL or has `buffer_size` writable bytes, `out_size` is NULL or
/// writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_metadata(
    dir: *const c_char,
    key: *const c_char,
    buffer: *mut c_char,
    buffer_size: usize,
    out_size: *mut usize,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (dir, key, out_size) = unsafe { (string(dir, "dir")?, string(key, "key")?, out(out_size, "out_size")?) };
        let metadata = checkpoint::metadata(Path::new(dir))?;
        let text = match metadata.get(key) {
            Some(text) => c_string(text, key)?.into_bytes_with_nul(),
            None => Vec::new(),
        };
        if !buffer.is_null() {
            if buffer_size < text.len() {
                return Err(err!(
                    InvalidArgument,
                    "buffer has {buffer_size} bytes, the metadata \"{key}\" needs {}",
                    text.len()
                ));
            }
            // SAFETY: the caller's promise; checked to be large enough.
            unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), buffer, text.len()) };
        }
        out_size.write(text.len());
        Ok(())
    })
}

fn c_string(text: &str, key: &str) -> Result<CString> {
    CString::new(text).map_err(|_| err!(Checkpoint, "the metadata \"{key}\" contains a NUL byte"))
}

/// # Safety
/// `metadata` points to `count` entries of NUL-terminated strings.
pub unsafe fn read_metadata(metadata: *const fsdp_metadata_t, count: usize) -> Result<Metadata> {
    if metadata.is_null() && count > 0 {
        return Err(err!(InvalidArgument, "metadata is NULL but metadata_count is {count}"));
    }
    let mut map = Metadata::new();
    for i in 0..count {
        // SAFETY: the caller's promise.
        let m = unsafe { *metadata.add(i) };
        // SAFETY: as above.
        let (key, value) =
            unsafe { (string(m.key, "a key of the metadata")?, string(m.value, "a value of the metadata")?) };
        if map.insert(key.to_string(), value.to_string()).is_some() {
            return Err(err!(InvalidArgument, "the metadata has the key \"{key}\" twice"));
        }
    }
    Ok(map)
}

/// # Safety
/// `states` points to `count` entries with NUL-terminated names.
pub unsafe fn read_states(states: *const fsdp_state_t, count: usize) -> Result<Vec<StateTensor>> {
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
