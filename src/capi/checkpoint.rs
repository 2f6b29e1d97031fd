//! Checkpoints through the C ABI.

use super::handle::{fsdp_engine_t, fsdp_optimizer_t, get};
use super::status::{boundary, fsdp_status_t, out, read_sized, string, Sized_};
use super::tensor::{fsdp_tensor_t, unsupported, RawTensor};
use super::tensor::{FSDP_DTYPE_BFLOAT, FSDP_DTYPE_BOOL, FSDP_DTYPE_FLOAT, FSDP_DTYPE_INT, FSDP_DTYPE_UINT};
use crate::checkpoint::{self, Contents, ExtraTensor, Metadata, StateTensor};
use crate::engine::Engine;
use crate::error::{err, Result};
use crate::optim::Optimizer;
use safetensors::Dtype;
use std::ffi::{c_char, c_void, CString};
use std::path::Path;
use std::sync::Arc;

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

/// A whole tensor with a name, e.g. a module's buffer: the same on every rank.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_named_tensor_t {
    /// Its original name; not empty, no colon, not that of a parameter.
    pub name: *const c_char,
    /// Contiguous, in host memory: integers of 8 to 64 bits, floating types of 16 to 64, bfloat16, bool.
    pub tensor: fsdp_tensor_t,
}

/// What a checkpoint holds beside the engine's shards. Initialize with FSDP_CHECKPOINT_CONTENTS_INIT, then set what there
/// is. All pointers are borrowed for the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_checkpoint_contents_t {
    /// sizeof(fsdp_checkpoint_contents_t).
    pub struct_size: usize,
    /// An optimizer of the same engine, or NULL: its states and counts, as fsdp_optimizer_save and _load treat them.
    pub optimizer: *mut fsdp_optimizer_t,
    /// State of an optimizer of the host's.
    pub states: *const fsdp_state_t,
    pub state_count: usize,
    /// Whole tensors: rank 0's are saved, every rank's are filled.
    pub tensors: *const fsdp_named_tensor_t,
    pub tensor_count: usize,
    /// Texts to keep (rank 0's are kept). Ignored in loading.
    pub metadata: *const fsdp_metadata_t,
    pub metadata_count: usize,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_checkpoint_contents_t {
    const NAME: &'static str = "fsdp_checkpoint_contents_t";
}

/// Saves all shards and `states` into the new folder `dir`: for each rank a safetensors file (and small ones with what is
/// less than a row of a parameter), and a manifest with checksums, written aside, flushed, and renamed when complete, so
/// that `dir` is complete or absent whenever a process ends. PyTorch's torch.distributed.checkpoint reads `dir` through its
/// HuggingFaceStorageReader; a parameter's state is called "optimizer.STATE:NAME" there. Of the shard groups of
/// FSDP_HYBRID_SHARD and FSDP_NO_SHARD the first one writes.
/// Collective: same `dir` (on a file system all ranks share) and states of the same parameters and names on every rank;
/// a failure on one rank is the error of all. `metadata`: texts to keep with it (rank 0's are kept), NULL for none. All
/// pointers are borrowed for the call. Not during a backward. Errors: FSDP_ERR_CHECKPOINT if `dir` exists,
/// FSDP_ERR_INVALID_STATE while fsdp_checkpoint_save_async saves this engine, FSDP_ERR_IO, FSDP_ERR_OUT_OF_MEMORY for a
/// full disk. Since 0.1.
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
        let contents = Contents { states, metadata, ..Contents::default() };
        // SAFETY: the caller's promise.
        unsafe { checkpoint::save(&object.engine, Path::new(dir), &contents) }
    })
}

/// The same with everything that a checkpoint can hold. Collective. Since 0.1.
///
/// # Safety
/// `dir` is NULL or NUL-terminated, `contents` is NULL or points to `struct_size` bytes whose arrays are as said there.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_save_contents(
    engine: *mut fsdp_engine_t,
    dir: *const c_char,
    contents: *const fsdp_checkpoint_contents_t,
) -> fsdp_status_t {
    boundary(|| {
        let engine = get(engine as *const fsdp_engine_t)?.engine.clone();
        // SAFETY: the caller's promise.
        let (dir, given) = unsafe { (string(dir, "dir")?, Given::read(&engine, contents)?) };
        // SAFETY: the caller's promise.
        unsafe {
            match given.optimizer {
                Some(optimizer) => optimizer.save(Path::new(dir), &given.contents),
                None => checkpoint::save(&engine, Path::new(dir), &given.contents),
            }
        }
    })
}

/// Fills all shards and the data of `states` from the checkpoint in `dir`, saved at any world size and wrapping of the
/// same model, reading of each file what this rank needs. Collective. Nothing is changed on any rank unless every rank has
/// read and checked all of its part; then it is read again into its place. All pointers are borrowed for the call.
/// Not during a backward. Errors: FSDP_ERR_CHECKPOINT names the file and the parameter if it is absent, incomplete,
/// damaged, or of another model.
///
/// `dir` may also be a model in Hugging Face's layout: a folder with model.safetensors or model.safetensors.index.json, or
/// such a file itself. It must have every parameter by its original name and in its shape, in float32, float16 or bfloat16
/// (widened without loss), and may have more; it has no states. Files that change or fail after that leave
/// what was being loaded undefined, and the error says so. Since 0.1.
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
        let contents = Contents { states, ..Contents::default() };
        // SAFETY: the caller's promise.
        unsafe { checkpoint::load(&object.engine, Path::new(dir), &contents) }
    })
}

/// The same with everything that a checkpoint can hold: also fills the optimizer, and the tensors, which must be there
/// with the same names, shapes and dtypes. What the checkpoint has of those besides is left. Collective. Since 0.1.
///
/// # Safety
/// As for fsdp_checkpoint_save_contents; the data of states and tensors are writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_load_contents(
    engine: *mut fsdp_engine_t,
    dir: *const c_char,
    contents: *const fsdp_checkpoint_contents_t,
) -> fsdp_status_t {
    boundary(|| {
        let engine = get(engine as *const fsdp_engine_t)?.engine.clone();
        // SAFETY: the caller's promise.
        let (dir, given) = unsafe { (string(dir, "dir")?, Given::read(&engine, contents)?) };
        // SAFETY: the caller's promise.
        unsafe {
            match given.optimizer {
                Some(optimizer) => optimizer.load(Path::new(dir), &given.contents),
                None => checkpoint::load(&engine, Path::new(dir), &given.contents),
            }
        }
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

/// What C gives to save or load.
pub struct Given {
    pub optimizer: Option<Arc<Optimizer>>,
    pub contents: Contents,
}

impl Given {
    /// Checks and converts; the optimizer must be one of `engine`.
    ///
    /// # Safety
    /// As for fsdp_checkpoint_save_contents.
    pub unsafe fn read(engine: &Arc<Engine>, contents: *const fsdp_checkpoint_contents_t) -> Result<Given> {
        // SAFETY: the caller's promise.
        let c = unsafe { read_sized(contents) }?;
        let optimizer = match c.optimizer.is_null() {
            true => None,
            false => Some(get(c.optimizer as *const fsdp_optimizer_t)?),
        };
        if optimizer.as_ref().is_some_and(|o| !Arc::ptr_eq(o.engine(), engine)) {
            return Err(err!(InvalidArgument, "the optimizer is of another engine"));
        }
        // SAFETY: the caller's promise.
        let contents = unsafe {
            Contents {
                states: read_states(c.states, c.state_count)?,
                extras: read_tensors(c.tensors, c.tensor_count)?,
                metadata: read_metadata(c.metadata, c.metadata_count)?,
            }
        };
        Ok(Given { optimizer, contents })
    }
}

/// # Safety
/// `tensors` points to `count` entries with NUL-terminated names and readable shapes.
unsafe fn read_tensors(tensors: *const fsdp_named_tensor_t, count: usize) -> Result<Vec<ExtraTensor>> {
    if tensors.is_null() && count > 0 {
        return Err(err!(InvalidArgument, "tensors is NULL but tensor_count is {count}"));
    }
    (0..count)
        .map(|i| {
            // SAFETY: the caller's promise.
            let t = unsafe { *tensors.add(i) };
            // SAFETY: as above.
            let name = unsafe { string(t.name, "the name of a tensor") }?;
            let called = format!("tensor \"{name}\"");
            // SAFETY: as above.
            let raw = unsafe { RawTensor::read(&t.tensor, &called) }?;
            let dtype = match (raw.dtype.code, raw.dtype.bits) {
                (FSDP_DTYPE_INT, 8) => Dtype::I8,
                (FSDP_DTYPE_INT, 16) => Dtype::I16,
                (FSDP_DTYPE_INT, 32) => Dtype::I32,
                (FSDP_DTYPE_INT, 64) => Dtype::I64,
                (FSDP_DTYPE_UINT, 8) => Dtype::U8,
                (FSDP_DTYPE_UINT, 16) => Dtype::U16,
                (FSDP_DTYPE_UINT, 32) => Dtype::U32,
                (FSDP_DTYPE_UINT, 64) => Dtype::U64,
                (FSDP_DTYPE_FLOAT, 16) => Dtype::F16,
                (FSDP_DTYPE_FLOAT, 32) => Dtype::F32,
                (FSDP_DTYPE_FLOAT, 64) => Dtype::F64,
                (FSDP_DTYPE_BFLOAT, 16) => Dtype::BF16,
                (FSDP_DTYPE_BOOL, 8) => Dtype::BOOL,
                _ => return Err(unsupported(&called, raw.dtype)),
            };
            let shape = raw.shape.iter().map(|d| *d as usize).collect();
            Ok(ExtraTensor { name: name.to_string(), dtype, shape, data: raw.data })
        })
        .collect()
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
