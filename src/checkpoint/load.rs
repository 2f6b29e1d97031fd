//! Loading: each rank reads the pieces that overlap its shards, at whatever world size they were saved.

use super::manifest::{checksum, File, Manifest, Metadata, Piece};
use super::{damaged, entries, gather, label, Entry, StateTensor};
use crate::dtype::DType;
use crate::engine::Engine;
use crate::error::{Error, Result};
use memmap2::Mmap;
use safetensors::SafeTensors;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

/// Fills the shards of `engine` and the data of `states` from the checkpoint in `dir`. Collective. Changes nothing on
/// any rank unless every rank has read and checked all of its part; a checkpoint of another model (names, shapes,
/// dtypes) is refused by the first parameter that differs. No backward may be under way.
///
/// # Safety
/// Each state's data must be writable for the parameter's piece.
pub unsafe fn load(engine: &Engine, dir: &Path, states: &[StateTensor]) -> Result<()> {
    let read = entries(engine, states).and_then(|entries| {
        let data = read(engine, dir, &entries)?;
        Ok((entries, data))
    });
    gather(engine.comm().as_ref(), read.as_ref().map(|_| String::new()).map_err(Error::clone))?;
    engine.begin_write()?;
    let (entries, data) = read?;
    for (e, values) in entries.iter().zip(&data) {
        // SAFETY: `values` has the entry's length; the entry is the engine's own piece, writable since begin_write, or
        // the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), e.data, e.len) };
    }
    Ok(())
}

/// The metadata given when the checkpoint in `dir` was saved. Local.
pub fn metadata(dir: &Path) -> Result<Metadata> {
    Ok(Manifest::read(dir)?.metadata)
}

/// Every entry's values, in memory of their own.
fn read(engine: &Engine, dir: &Path, entries: &[Entry]) -> Result<Vec<Vec<f32>>> {
    let manifest = Manifest::read(dir)?;
    let indices = same_model(engine, dir, &manifest)?;
    let mut data: Vec<Vec<f32>> = entries.iter().map(|e| vec![0.0; e.len]).collect();
    let mut missing: Vec<usize> = entries.iter().map(|e| e.len).collect();
    for file in &manifest.files {
        let overlaps = |e: &Entry, p: &Piece| {
            let of_entry = p.parameter == indices[e.param as usize] && p.state == e.state;
            of_entry && p.first < e.first + e.len && e.first < p.first.saturating_add(p.len)
        };
        let wanted: Vec<(usize, &Piece)> = entries
            .iter()
            .enumerate()
            .flat_map(|(i, e)| file.pieces.iter().filter(move |p| overlaps(e, p)).map(move |p| (i, p)))
            .collect();
        if wanted.is_empty() {
            continue;
        }
        let path = dir.join(&file.name);
        let mapped = map(&path, file)?;
        let tensors = SafeTensors::deserialize(&mapped).map_err(|e| damaged(&path, e))?;
        for (i, piece) in wanted {
            let e = &entries[i];
            let view = tensors.tensor(&piece.tensor).map_err(|e| damaged(&path, e))?;
            let bytes = view.data();
            if view.dtype() != safetensors::Dtype::F32 || bytes.len() != piece.len * DType::F32.size() {
                return Err(damaged(&path, format_args!("{} has another dtype or size", e.label(engine))));
            }
            if checksum(bytes) != piece.checksum {
                return Err(damaged(&path, format_args!("{} is damaged: its checksum does not fit", e.label(engine))));
            }
            let from = e.first.max(piece.first);
            let len = (e.first + e.len).min(piece.first + piece.len) - from;
            let source = bytes[(from - piece.first) * DType::F32.size()..].chunks_exact(DType::F32.size());
            for (to, from) in data[i][from - e.first..][..len].iter_mut().zip(source) {
                *to = f32::from_le_bytes([from[0], from[1], from[2], from[3]]);
            }
            missing[i] -= len;
        }
    }
    match missing.iter().position(|m| *m > 0) {
        Some(i) => Err(damaged(dir, format_args!("{} is not (all) in it", entries[i].label(engine)))),
        None => Ok(data),
    }
}

fn map(path: &Path, file: &File) -> Result<Mmap> {
    let open = fs::File::open(path).map_err(|e| damaged(path, e))?;
    let bytes = open.metadata().map_err(|e| damaged(path, e))?.len();
    if bytes != file.bytes {
        return Err(damaged(path, format_args!("has {bytes} bytes, but was saved with {}", file.bytes)));
    }
    // SAFETY: the map is read only while the file keeps its size; a checkpoint is never changed after it was completed,
    // and whoever cuts it short during a load stops the process as with any mapped file.
    unsafe { Mmap::map(&open) }.map_err(|e| damaged(path, e))
}

/// For each parameter of the engine its index in the manifest; names, shapes and dtypes must agree.
fn same_model(engine: &Engine, dir: &Path, manifest: &Manifest) -> Result<Vec<usize>> {
    let theirs: HashMap<&str, usize> =
        manifest.parameters.iter().enumerate().map(|(i, p)| (p.name.as_str(), i)).collect();
    let other = |why: String| damaged(dir, format_args!("is of another model: {why}"));
    let mut indices = Vec::new();
    for p in &engine.plan().params {
        let name = label(&p.fqn, None);
        let Some(i) = theirs.get(p.fqn.as_str()) else { return Err(other(format!("it has no {name}"))) };
        let q = &manifest.parameters[*i];
        if q.shape != p.shape || q.dtype != DType::F32.name() {
            let (there, here) = (format!("{} {:?}", q.dtype, q.shape), format!("{} {:?}", DType::F32, p.shape));
            return Err(other(format!("{name} is {there} there and {here} here")));
        }
        indices.push(*i);
    }
    let ours: HashSet<&str> = engine.plan().params.iter().map(|p| p.fqn.as_str()).collect();
    match manifest.parameters.iter().find(|q| !ours.contains(q.name.as_str())) {
        Some(q) => Err(other(format!("the model has no {}", label(&q.name, None)))),
        None => Ok(indices),
    }
}
