//! The files that `fsdp plan` reads: safetensors files (their headers only), an index of such files, or a description.

use super::description::{self, Builder, NO_CLASS};
use super::Described;
use fsdp::dtype::DType;
use fsdp::module::ROOT;
use memmap2::Mmap;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

/// The part of an index that says what is where.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The model that the files are, without the parameters that fit a pattern of `ignored`.
pub fn read(files: &[PathBuf], ignored: &[String]) -> Result<Described, String> {
    let is_json = |path: &PathBuf| path.extension().is_some_and(|e| e == "json");
    match files {
        [json] if is_json(json) => {
            let text = std::fs::read_to_string(json).map_err(|e| about(json, e))?;
            let value: serde_json::Value = serde_json::from_str(&text).map_err(|e| about(json, e))?;
            if !value.is_object() {
                return Err(about(json, "an object is expected"));
            }
            match value.get("weight_map") {
                Some(_) => {
                    let index: Index = serde_json::from_value(value).map_err(|e| about(json, e))?;
                    indexed(json, &index, ignored).map_err(|e| about(json, e))
                }
                None => description::read(&text, ignored).map_err(|e| about(json, e)),
            }
        }
        files => {
            if let Some(json) = files.iter().find(|f| is_json(f)) {
                return Err(about(json, "an index or a description is a whole model: give it alone"));
            }
            let headers = files.iter().map(|f| Ok((f.clone(), header(f)?))).collect::<Result<Vec<_>, String>>()?;
            named(&headers, ignored)
        }
    }
}

fn about(path: &Path, what: impl std::fmt::Display) -> String {
    format!("{}: {what}", path.display())
}

fn indexed(path: &Path, index: &Index, ignored: &[String]) -> Result<Described, String> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let files: BTreeSet<&String> = index.weight_map.values().collect();
    let mut headers = Vec::new();
    for file in files {
        let path = folder.join(file);
        headers.push((path.clone(), header(&path)?));
        let held = &headers[headers.len() - 1].1;
        if let Some((name, _)) = index.weight_map.iter().find(|(n, f)| *f == file && held.info(n).is_none()) {
            return Err(format!("\"{name}\" is said to be in {file}, which does not have it"));
        }
        if let Some(name) = held.offset_keys().iter().find(|n| index.weight_map.get(*n) != Some(file)) {
            return Err(format!("\"{name}\" is in {file}, which the index does not say"));
        }
    }
    named(&headers, ignored)
}

/// Reads no more of the file than its header.
fn header(path: &Path) -> Result<Metadata, String> {
    let file = File::open(path).map_err(|e| about(path, e))?;
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Err(about(path, "is no file"));
    }
    // SAFETY: the map is read only in here; whoever cuts the file short meanwhile stops the process, as with any mapped
    // file.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| about(path, e))?;
    let read =
        SafeTensors::read_metadata(&map).map_err(|e| about(path, format_args!("is no safetensors file: {e}")))?;
    Ok(read.1)
}

/// The tree of the tensors' names. Parameters are in the order of the files and of their data in them: safetensors keeps
/// no order of registration.
fn named(headers: &[(PathBuf, Metadata)], ignored: &[String]) -> Result<Described, String> {
    let mut builder = Builder::new(NO_CLASS, ignored);
    let mut others: BTreeMap<String, usize> = BTreeMap::new();
    let mut narrow: BTreeMap<&str, usize> = BTreeMap::new();
    for (path, header) in headers {
        for name in header.offset_keys() {
            let tensor = header.info(&name).ok_or_else(|| about(path, "has no such tensor"))?;
            if builder.ignores(&name) {
                continue;
            }
            let dtype = match tensor.dtype {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                Dtype::F64 => {
                    *others.entry(format!("{:?}", tensor.dtype)).or_default() += 1;
                    DType::F32
                }
                dtype => {
                    return Err(about(
                        path,
                        format_args!(
                            "\"{name}\" is {dtype:?}: parameters are floating; leave it out by --ignore '{name}'"
                        ),
                    ))
                }
            };
            if dtype != DType::F32 {
                *narrow.entry(dtype.name()).or_default() += 1;
            }
            let shape: Vec<i64> = tensor.shape.iter().map(|d| i64::try_from(*d).unwrap_or(-1)).collect();
            builder.param(ROOT, &name, &shape, dtype, true).map_err(|e| about(path, e))?;
        }
    }
    let others = others.into_iter().map(|(dtype, count)| {
        format!("{dtype} tensors ({count}) are planned as float32: the engine does not shard them")
    });
    let narrow = narrow.into_iter().map(|(dtype, count)| {
        format!(
            "{dtype} tensors ({count}) have float32 shards, and are computed in {dtype} unless --param-dtype is given"
        )
    });
    builder.finish(others.chain(narrow).collect())
}
