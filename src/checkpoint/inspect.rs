//! What a checkpoint has, for a person or a program to look at; and whether all of it is intact.

use super::manifest::{Kind, Metadata};
use super::source::Source;
use crate::error::Result;
use std::path::Path;

/// A checkpoint in numbers and names.
#[derive(Clone, Debug)]
pub struct Summary {
    /// None for Hugging Face's layout.
    pub world_size: Option<usize>,
    pub tensors: Vec<TensorSummary>,
    /// Name and bytes.
    pub files: Vec<(String, u64)>,
    pub metadata: Metadata,
}

/// A whole tensor.
#[derive(Clone, Debug)]
pub struct TensorSummary {
    pub name: String,
    /// As safetensors calls it, e.g. F32.
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: u64,
    /// None where the layout does not say.
    pub kind: Option<Kind>,
    pub states: Vec<String>,
}

/// Reads what the checkpoint in `dir` says of itself; of its files nothing but headers. Local.
pub fn inspect(dir: &Path) -> Result<Summary> {
    let source = Source::open(dir)?;
    let mut tensors: Vec<TensorSummary> = source
        .tensors
        .iter()
        .map(|t| TensorSummary {
            name: t.name.clone(),
            dtype: t.dtype.to_string(),
            shape: t.shape.clone(),
            bytes: t.bytes().unwrap_or(0) as u64,
            kind: source.sharded.is_some().then_some(t.kind),
            states: Vec::new(),
        })
        .collect();
    source.states().into_iter().for_each(|(t, state)| tensors[t].states.push(state));
    Ok(Summary {
        world_size: source.sharded.as_ref().map(|s| s.world_size),
        tensors,
        files: source.files.iter().map(|f| (f.name.clone(), f.bytes)).collect(),
        metadata: source.sharded.map(|s| s.metadata).unwrap_or_default(),
    })
}

/// Reads every byte of the checkpoint in `dir` and compares what can be compared: sizes and headers of files, that every
/// tensor and state is complete, and, of a sharded checkpoint, all checksums. Returns how many bytes of tensors it read.
/// Local.
pub fn verify(dir: &Path) -> Result<u64> {
    let source = Source::open(dir)?;
    for f in 0..source.files.len() {
        source.check_file(f)?;
    }
    let all = (0..source.tensors.len()).map(|t| (t, None));
    let mut bytes = 0;
    for (tensor, state) in all.chain(source.states().into_iter().map(|(t, s)| (t, Some(s)))) {
        source.read(tensor, state.as_deref(), 0, source.tensors[tensor].numel(), &mut |block| {
            bytes += block.len() as u64;
            Ok(())
        })?;
    }
    Ok(bytes)
}
