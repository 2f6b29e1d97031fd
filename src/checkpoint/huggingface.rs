//! The layout that Hugging Face's libraries read and write: `model.safetensors`, or several files and an index.

use super::damaged;
use super::manifest::{File, Kind, Piece, Tensor};
use crate::error::Result;
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The name of a model that is one file.
pub const SINGLE: &str = "model.safetensors";
/// The name of the index of several files.
pub const INDEX: &str = "model.safetensors.index.json";
/// The limit that the `safetensors` crate has for a header, too.
const MAX_HEADER: u64 = 100_000_000;

/// The file that says where each tensor is.
#[derive(Deserialize, Serialize)]
pub struct Index {
    #[serde(default)]
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// File by name of tensor.
    pub weight_map: BTreeMap<String, String>,
}

/// What there is, without the tensors' values.
pub struct Model {
    pub folder: PathBuf,
    pub tensors: Vec<Tensor>,
    /// Each tensor is one piece, without checksums.
    pub files: Vec<File>,
}

/// The name of file `i` of `n`, counted from 1.
pub fn file_name(i: usize, n: usize) -> String {
    match n {
        1 => SINGLE.to_string(),
        n => format!("model-{i:05}-of-{n:05}.safetensors"),
    }
}

/// What a folder, an index or a single file in this layout has; None if `path` is none of these.
pub fn open(path: &Path) -> Result<Option<Model>> {
    let parent = || path.parent().unwrap_or(Path::new("")).to_path_buf();
    let is = |extension: &str| path.is_file() && path.extension().is_some_and(|e| e == extension);
    let (folder, index, single) = match path {
        _ if path.join(INDEX).is_file() => (path.to_path_buf(), Some(path.join(INDEX)), None),
        _ if path.join(SINGLE).is_file() => (path.to_path_buf(), None, Some(SINGLE.to_string())),
        _ if is("json") => (parent(), Some(path.to_path_buf()), None),
        _ if is("safetensors") => (parent(), None, path.file_name().map(|n| n.to_string_lossy().into_owned())),
        _ => return Ok(None),
    };
    let index: Option<(PathBuf, Index)> = match index {
        Some(path) => {
            let text = fs::read_to_string(&path).map_err(|e| damaged(&path, e))?;
            let index = serde_json::from_str(&text)
                .map_err(|e| damaged(&path, format_args!("is no index of safetensors files: {e}")))?;
            Some((path, index))
        }
        None => None,
    };
    let names: BTreeSet<String> = match &index {
        Some((_, index)) => index.weight_map.values().cloned().collect(),
        None => single.into_iter().collect(),
    };
    let (mut tensors, mut files) = (Vec::new(), Vec::new());
    for name in names {
        files.push(read_header(&folder, &name, &mut tensors)?);
    }
    if let Some((path, index)) = &index {
        same_as_index(path, index, &tensors, &files)?;
    }
    Ok(Some(Model { folder, tensors, files }))
}

/// The index and the files' headers must say the same.
fn same_as_index(path: &Path, index: &Index, tensors: &[Tensor], files: &[File]) -> Result<()> {
    let mut found = BTreeMap::new();
    for file in files {
        for piece in &file.pieces {
            let name = &tensors[piece.tensor].name;
            if index.weight_map.get(name) != Some(&file.name) {
                return Err(damaged(
                    path,
                    format_args!("\"{}\" has tensor \"{name}\", which the index does not say", file.name),
                ));
            }
            found.insert(name, ());
        }
    }
    match index.weight_map.iter().find(|(name, _)| !found.contains_key(name)) {
        Some((name, file)) => Err(damaged(path, format_args!("\"{file}\" has no tensor \"{name}\""))),
        None => Ok(()),
    }
}

/// Reads the header of a file, and nothing else.
fn read_header(folder: &Path, name: &str, tensors: &mut Vec<Tensor>) -> Result<File> {
    let path = folder.join(name);
    let bad = |why: &dyn std::fmt::Display| damaged(&path, format_args!("is no safetensors file: {why}"));
    let file = fs::File::open(&path).map_err(|e| damaged(&path, e))?;
    let bytes = file.metadata().map_err(|e| damaged(&path, e))?.len();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(|e| bad(&e))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || 8 + length > bytes {
        return Err(bad(&format_args!("its header is said to have {length} bytes, the file has {bytes}")));
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, 8).map_err(|e| damaged(&path, e))?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| bad(&e))?;
    let data = 8 + length;
    let mut pieces = Vec::new();
    let mut end = 0;
    for key in metadata.offset_keys() {
        let Some(info) = metadata.info(&key) else { continue };
        let (begin, stop) = info.data_offsets;
        let tensor = Tensor { name: key.clone(), shape: info.shape.clone(), dtype: info.dtype, kind: Kind::Parameter };
        if begin != end || tensor.dtype.bitsize() % 8 != 0 || tensor.bytes() != stop.checked_sub(begin) {
            return Err(bad(&format_args!("the header does not fit tensor \"{key}\"")));
        }
        end = stop;
        let (len, offset) = (tensor.numel(), data + begin as u64);
        pieces.push(Piece { tensor: tensors.len(), state: None, first: 0, len, offset, checksums: Vec::new() });
        tensors.push(tensor);
    }
    if data + end as u64 != bytes {
        return Err(damaged(&path, format_args!("has {bytes} bytes, but its header says {}", data + end as u64)));
    }
    Ok(File { name: name.to_string(), bytes, header_bytes: data, header_checksum: String::new(), pieces })
}
