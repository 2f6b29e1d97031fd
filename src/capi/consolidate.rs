//! Checkpoints as Hugging Face's libraries read them.

use super::status::{boundary, fsdp_status_t, read_sized, string, Sized_};
use super::tensor::{fsdp_dtype_t, unsupported};
use crate::checkpoint::{self, ConsolidateOptions};
use crate::dtype::DType;
use crate::error::Result;
use std::ffi::c_char;
use std::path::Path;

/// How to consolidate. Initialize with FSDP_CONSOLIDATE_CONFIG_INIT, then set what differs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_consolidate_config_t {
    /// sizeof(fsdp_consolidate_config_t).
    pub struct_size: usize,
    /// Bytes of tensors per file, unless a single tensor has more; 0: 5,000,000,000.
    pub max_file_bytes: u64,
    /// What parameters are rounded to, to nearest even: float32, {FSDP_DTYPE_FLOAT, 16, 1}, {FSDP_DTYPE_BFLOAT, 16, 1},
    /// or {0, 0, 0} for as they are.
    pub dtype: fsdp_dtype_t,
}

// SAFETY: repr(C), begins with its size, plain data.
unsafe impl Sized_ for fsdp_consolidate_config_t {
    const NAME: &'static str = "fsdp_consolidate_config_t";
}

/// Writes parameters and tensors of the checkpoint in `dir`, whole and under their original names, into the new folder
/// `out_dir`, as Hugging Face's libraries (and PyTorch's HuggingFaceStorageReader, and fsdp_checkpoint_load) read them:
/// model.safetensors, or model-0000i-of-0000n.safetensors and model.safetensors.index.json. States and texts stay behind;
/// tensors that are no parameters keep their dtype. Complete or absent, as fsdp_checkpoint_save; every checksum is compared;
/// memory for 4 MiB at a time. `dir` may be in that layout already, to be cut or rounded anew: its floating tensors then
/// all count as parameters. `config` may be NULL for the defaults. Local: one process does it, without ranks.
/// Errors: FSDP_ERR_CHECKPOINT names file and parameter if the checkpoint is damaged, a number is too large for float16, or
/// `out_dir` exists; FSDP_ERR_IO; FSDP_ERR_OUT_OF_MEMORY for a full disk. Since 0.1.
///
/// # Safety
/// Strings are NULL or NUL-terminated; `config` is NULL or points to `struct_size` readable bytes.
#[no_mangle]
pub unsafe extern "C" fn fsdp_checkpoint_consolidate(
    dir: *const c_char,
    out_dir: *const c_char,
    config: *const fsdp_consolidate_config_t,
) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let (dir, out) = unsafe { (string(dir, "dir")?, string(out_dir, "out_dir")?) };
        let options = match config.is_null() {
            true => ConsolidateOptions::default(),
            // SAFETY: the caller's promise.
            false => options(unsafe { read_sized(config) }?)?,
        };
        checkpoint::consolidate(Path::new(dir), Path::new(out), &options)
    })
}

fn options(c: fsdp_consolidate_config_t) -> Result<ConsolidateOptions> {
    let dtype = match c.dtype {
        fsdp_dtype_t { code: 0, bits: 0, lanes: 0 } => None,
        t => {
            let known = DType::from_dlpack(t.code, t.bits).filter(|_| t.lanes == 1);
            Some(known.ok_or_else(|| unsupported("fsdp_consolidate_config_t.dtype", t))?)
        }
    };
    Ok(ConsolidateOptions { max_file_bytes: c.max_file_bytes, dtype })
}
