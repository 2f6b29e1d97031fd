//! The manifest: what a checkpoint holds, where each piece is, and checksums of all of it.

use super::damaged;
use crate::error::{err, Result};
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
    pub parameters: Vec<Parameter>,
    pub files: Vec<File>,
    /// The caller's own texts.
    pub metadata: Metadata,
}

#[derive(Debug, Deserialize, Serialize)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<i64>,
    pub dtype: String,
}

/// Texts by key.
pub type Metadata = BTreeMap<String, String>;

/// One rank's file.
#[derive(Debug, Deserialize, Serialize)]
pub struct File {
    pub name: String,
    pub bytes: u64,
    pub pieces: Vec<Piece>,
}

/// A range of a flattened parameter, or of its state.
#[derive(Debug, Deserialize, Serialize)]
pub struct Piece {
    /// Name in the safetensors file.
    pub tensor: String,
    /// Index into `parameters`.
    pub parameter: usize,
    /// None for the parameter itself.
    pub state: Option<String>,
    /// First element in the flattened parameter.
    pub first: usize,
    pub len: usize,
    /// XXH3-64 of the bytes, hexadecimal.
    pub checksum: String,
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
        serde_json::from_str(content).map_err(|e| damaged(&path, format_args!("has unexpected content: {e}")))
    }
}

fn internal(error: serde_json::Error) -> crate::error::Error {
    err!(Checkpoint, "the manifest cannot be written as JSON: {error}")
}
