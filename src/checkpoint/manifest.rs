//! The manifest: what a checkpoint holds, where each piece is, and checksums of all of it.

use super::damaged;
use crate::error::{err, Result};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use xxhash_rust::xxh3::xxh3_64;

/// Its name in the checkpoint's folder.
pub const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "fsdp-checkpoint";
const VERSION: u32 = 1;

/// Bytes that one checksum covers: what is read at least of a piece, and the size of buffers.
pub const BLOCK: usize = 4 << 20;

/// The file: the content, and a checksum of its text.
#[derive(Deserialize, Serialize)]
struct Envelope {
    format: String,
    version: u32,
    /// XXH3-64 of the content's text, hexadecimal.
    checksum: String,
    content: Box<RawValue>,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Manifest {
    /// World size of the run that saved it.
    pub world_size: usize,
    /// [`BLOCK`] of the library that saved it.
    pub block_bytes: usize,
    pub tensors: Vec<Tensor>,
    pub files: Vec<File>,
    /// The caller's own texts.
    pub metadata: Metadata,
}

/// A whole tensor, by its original name.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: Dtype,
    pub kind: Kind,
}

impl Tensor {
    /// None if it is more than an address can hold.
    pub fn bytes(&self) -> Option<usize> {
        let numel = self.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        numel.checked_mul(self.dtype.bitsize() / 8)
    }

    /// Elements of a tensor that was checked to fit.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Cut over the ranks; float32.
    Parameter,
    /// Whole, the same on every rank; e.g. a module's buffer.
    Extra,
}

/// Texts by key.
pub type Metadata = BTreeMap<String, String>;

/// A safetensors file.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct File {
    pub name: String,
    pub bytes: u64,
    /// Bytes before the first tensor's, and their XXH3-64.
    pub header_bytes: u64,
    pub header_checksum: String,
    pub pieces: Vec<Piece>,
}

/// A range of a flattened tensor, or of a parameter's state. In its file it is a box under [`key`].
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Piece {
    /// Index into `tensors`.
    pub tensor: usize,
    /// None for the tensor itself.
    pub state: Option<String>,
    /// First element in the flattened tensor.
    pub first: usize,
    pub len: usize,
    /// First byte in the file.
    pub offset: u64,
    /// XXH3-64 of each `block_bytes` (the last may have fewer), hexadecimal. None where nothing checks them.
    pub checksums: Vec<String>,
}

/// The name of a tensor or of a parameter's state in a safetensors file.
pub fn key(name: &str, state: Option<&str>) -> String {
    match state {
        None => name.to_string(),
        Some(state) => format!("optimizer.{state}:{name}"),
    }
}

/// XXH3-64 of `bytes`, as the manifest writes it.
pub fn checksum(bytes: &[u8]) -> String {
    format!("{:016x}", xxh3_64(bytes))
}

impl Manifest {
    /// The text of the file.
    pub fn to_text(&self) -> Result<String> {
        let content = serde_json::to_string(self).and_then(RawValue::from_string).map_err(internal)?;
        let checksum = checksum(content.get().as_bytes());
        serde_json::to_string(&Envelope { format: FORMAT.into(), version: VERSION, checksum, content })
            .map_err(internal)
    }

    /// Reads and checks the manifest of the checkpoint in `dir`.
    pub fn read(dir: &Path) -> Result<Manifest> {
        let path = dir.join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound if dir.is_dir() => {
                damaged(dir, format_args!("is no complete checkpoint: it has no {MANIFEST}"))
            }
            std::io::ErrorKind::NotFound => damaged(dir, "there is no such checkpoint"),
            _ => damaged(&path, e),
        })?;
        let envelope: Envelope =
            serde_json::from_str(&text).map_err(|e| damaged(&path, format_args!("is no manifest: {e}")))?;
        if envelope.format != FORMAT || envelope.version != VERSION {
            let Envelope { format, version, .. } = envelope;
            return Err(damaged(
                &path,
                format_args!(
                    "has the format {format:?} version {version}: this library reads {FORMAT:?} version {VERSION}"
                ),
            ));
        }
        let content = envelope.content.get();
        if checksum(content.as_bytes()) != envelope.checksum {
            return Err(damaged(&path, "is damaged: its checksum does not fit its content"));
        }
        let manifest: Manifest =
            serde_json::from_str(content).map_err(|e| damaged(&path, format_args!("has unexpected content: {e}")))?;
        manifest.check().map_err(|why| damaged(&path, format_args!("has unexpected content: {why}")))?;
        Ok(manifest)
    }

    /// What the rest of the library takes for granted.
    fn check(&self) -> std::result::Result<(), String> {
        if self.block_bytes == 0 {
            return Err("blocks of no bytes".into());
        }
        for t in &self.tensors {
            if t.bytes().is_none() || t.dtype.bitsize() % 8 != 0 {
                return Err(format!("\"{}\" has the shape {:?} of {}", t.name, t.shape, t.dtype));
            }
        }
        for f in &self.files {
            for p in &f.pieces {
                let tensor =
                    self.tensors.get(p.tensor).ok_or_else(|| format!("\"{}\" has a piece of no tensor", f.name))?;
                let end = p.first.checked_add(p.len).filter(|end| *end <= tensor.numel());
                let bytes = p.len.saturating_mul(tensor.dtype.bitsize() / 8);
                if end.is_none() || p.checksums.len() != bytes.div_ceil(self.block_bytes) {
                    return Err(format!("a piece of \"{}\" in \"{}\"", tensor.name, f.name));
                }
            }
        }
        Ok(())
    }
}

fn internal(error: serde_json::Error) -> crate::error::Error {
    err!(Checkpoint, "the manifest cannot be written as JSON: {error}")
}
