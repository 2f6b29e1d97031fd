//! A checkpoint as Hugging Face's libraries read it: whole tensors, in one file or several with an index.
//!
//! Local: one process, no ranks. Streams a block at a time. Optimizer state and texts stay behind.

use super::damaged;
use super::folder::Incomplete;
use super::huggingface::{file_name, Index, INDEX};
use super::source::Source;
use super::writer::{write_text, Spec, Writer};
use crate::dtype::DType;
use crate::error::{err, Result};
use safetensors::Dtype;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// What is as usual for Hugging Face's libraries: 5 GB.
pub const DEFAULT_FILE_BYTES: u64 = 5_000_000_000;

/// How to write.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConsolidateOptions {
    /// Bytes of tensors that a file holds at most, unless a single one has more; 0 is [`DEFAULT_FILE_BYTES`].
    pub max_file_bytes: u64,
    /// What parameters are rounded to (to nearest, ties to even): float32, float16 or bfloat16. None: as they are.
    pub dtype: Option<DType>,
}

/// Writes all parameters and extra tensors of the checkpoint in `dir` into the new folder `out`, complete or not at all.
/// Every checksum is compared. `dir` may also be in Hugging Face's layout, to be cut or rounded anew; all its tensors then
/// count as parameters, and those that are not floating stay as they are. A number that float16 cannot hold is an error.
pub fn consolidate(dir: &Path, out: &Path, options: &ConsolidateOptions) -> Result<()> {
    let target = match options.dtype {
        None => None,
        Some(DType::F32) => Some(Dtype::F32),
        Some(DType::F16) => Some(Dtype::F16),
        Some(DType::BF16) => Some(Dtype::BF16),
        Some(other) => {
            return Err(err!(Unsupported, "a checkpoint is rounded to float32, float16 or bfloat16, not to {other}"))
        }
    };
    let source = Source::open(dir)?;
    let specs: Vec<Spec> = (0..source.tensors.len()).map(|i| spec(&source, i, target)).collect();
    let max = if options.max_file_bytes == 0 { DEFAULT_FILE_BYTES } else { options.max_file_bytes };
    let files = distribute(&specs, max);
    let folder = Incomplete::create(out)?;
    let mut index = Index { metadata: Default::default(), weight_map: BTreeMap::new() };
    for (i, tensors) in files.iter().enumerate() {
        let name = file_name(i + 1, files.len());
        write_file(&source, &specs, tensors, &folder.path().join(&name))?;
        index.weight_map.extend(tensors.iter().map(|t| (specs[*t].key.clone(), name.clone())));
    }
    if files.len() > 1 {
        let total: u64 = specs.iter().map(Spec::bytes).sum();
        index.metadata.insert("total_size".into(), json!(total));
        let text = serde_json::to_string_pretty(&index).map_err(|e| err!(Checkpoint, "the index as JSON: {e}"))?;
        write_text(&folder.path().join(INDEX), &(text + "\n"))?;
    }
    folder.publish()
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

fn spec(source: &Source, tensor: usize, target: Option<Dtype>) -> Spec {
    let t = &source.tensors[tensor];
    let dtype = target.filter(|_| source.is_parameter(tensor) && is_float(t.dtype)).unwrap_or(t.dtype);
    Spec { key: t.name.clone(), dtype, shape: t.shape.clone() }
}

/// Tensors in their order, as many per file as fit; at least one file.
fn distribute(specs: &[Spec], max: u64) -> Vec<Vec<usize>> {
    let mut files = vec![Vec::new()];
    let mut bytes = 0;
    for (i, spec) in specs.iter().enumerate() {
        if bytes > 0 && bytes + spec.bytes() > max {
            files.push(Vec::new());
            bytes = 0;
        }
        bytes += spec.bytes();
        files.last_mut().expect("there is a file").push(i);
    }
    for file in &mut files {
        file.sort_by_key(|i| std::cmp::Reverse(specs[*i].dtype.bitsize()));
    }
    files
}

fn write_file(source: &Source, specs: &[Spec], tensors: &[usize], path: &Path) -> Result<()> {
    let list: Vec<Spec> = tensors.iter().map(|t| specs[*t].clone()).collect();
    // Hugging Face's transformers refuses files that do not say this.
    let about = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let mut writer = Writer::create(path, &list, &about)?;
    for t in tensors {
        let (from, to) = (source.tensors[*t].dtype, specs[*t].dtype);
        let mut rounded = Vec::new();
        source.read(*t, None, 0, source.tensors[*t].numel(), &mut |bytes| {
            if from == to {
                return writer.write(bytes);
            }
            rounded.clear();
            if !round(from, bytes, to, &mut rounded) {
                let why = format!("{} has a number that float16 cannot hold", source.label(*t, None));
                return Err(damaged(&source.dir, why));
            }
            writer.write(&rounded)
        })?;
    }
    writer.finish().map(|_| ())
}

/// Appends `bytes` of one floating type as another. False if a finite number becomes infinite.
fn round(from: Dtype, bytes: &[u8], to: Dtype, out: &mut Vec<u8>) -> bool {
    let mut fits = true;
    let mut put = |x: f32| match to {
        Dtype::F16 => {
            let y = half::f16::from_f32(x);
            fits &= y.is_finite() || !x.is_finite();
            out.extend_from_slice(&y.to_le_bytes());
        }
        Dtype::BF16 => out.extend_from_slice(&half::bf16::from_f32(x).to_le_bytes()),
        _ => out.extend_from_slice(&x.to_le_bytes()),
    };
    match from {
        Dtype::F16 => bytes.chunks_exact(2).for_each(|b| put(half::f16::from_le_bytes([b[0], b[1]]).to_f32())),
        Dtype::BF16 => bytes.chunks_exact(2).for_each(|b| put(half::bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        _ => bytes.chunks_exact(4).for_each(|b| put(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
    }
    fits
}
