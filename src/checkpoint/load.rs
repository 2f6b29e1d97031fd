//! Loading: each rank reads the ranges that are its own, whatever world size they were saved at.

use super::contents::{reserve, Contents, Entry, Listing};
use super::manifest::{Kind, Manifest, Metadata};
use super::source::Source;
use super::{damaged, gather};
use crate::engine::Engine;
use crate::error::{err, Error, Result};
use safetensors::Dtype;
use std::collections::HashSet;
use std::path::Path;

/// Fills the shards of `engine` and the data of the states and extra tensors of `contents` from the checkpoint in `dir`.
/// Collective. Changes nothing on any rank unless every rank has read and checked all of its part, for which it needs
/// memory as for what it fills. A sharded checkpoint of another model (names, shapes, dtypes) is refused by the first
/// parameter that differs; a folder in Hugging Face's layout must have all parameters and may have more, in float32, float16
/// or bfloat16. No backward may be under way.
///
/// # Safety
/// The data of states and extra tensors must be writable.
pub unsafe fn load(engine: &Engine, dir: &Path, contents: &Contents) -> Result<()> {
    let read = Listing::to_load(engine, contents).and_then(|listing| {
        let data = read(&Source::open(dir)?, &listing)?;
        Ok((listing, data))
    });
    gather(engine.world().as_ref(), read.as_ref().map(|_| String::new()).map_err(Error::clone))?;
    engine.begin_write()?;
    let (listing, data) = read?;
    for (e, values) in listing.entries.iter().zip(&data) {
        // SAFETY: `values` has the entry's length; the entry is the engine's own piece, writable since begin_write, or
        // the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), e.data, values.len()) };
    }
    Ok(())
}

/// The metadata given when the checkpoint in `dir` was saved. Local.
pub fn metadata(dir: &Path) -> Result<Metadata> {
    Ok(Manifest::read(dir)?.metadata)
}

/// Every entry's bytes, in memory of their own.
fn read(source: &Source, listing: &Listing) -> Result<Vec<Vec<u8>>> {
    let numbers = same_model(source, listing)?;
    listing.entries.iter().map(|e| read_entry(source, listing, e, numbers[e.tensor])).collect()
}

fn read_entry(source: &Source, listing: &Listing, e: &Entry, tensor: usize) -> Result<Vec<u8>> {
    let mut data = reserve(listing.bytes_of(e), &listing.label(e))?;
    let stored = source.tensors[tensor].dtype;
    let exact = stored == listing.tensors[e.tensor].dtype;
    source.read(tensor, e.state.as_deref(), e.first, e.len, &mut |bytes| {
        match exact {
            true => data.extend_from_slice(bytes),
            false => widen(stored, bytes, &mut data)?,
        }
        Ok(())
    })?;
    Ok(data)
}

/// Appends 16-bit floating numbers as float32, without loss.
fn widen(stored: Dtype, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let numbers = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match stored {
        Dtype::F16 => out.extend(numbers.flat_map(|b| half::f16::from_le_bytes(b).to_f32().to_le_bytes())),
        Dtype::BF16 => out.extend(numbers.flat_map(|b| half::bf16::from_le_bytes(b).to_f32().to_le_bytes())),
        other => return Err(err!(Panic, "{other} was taken for a 16-bit floating type")),
    }
    Ok(())
}

/// For each tensor of the listing its number in the source; names, shapes and dtypes must agree.
fn same_model(source: &Source, listing: &Listing) -> Result<Vec<usize>> {
    let other = |why: String| damaged(&source.dir, format_args!("is of another model: {why}"));
    let mut numbers = Vec::new();
    for t in &listing.tensors {
        let name = super::label(Some(t.kind), &t.name, None);
        let Some(i) = source.find(&t.name) else { return Err(other(format!("it has no {name}"))) };
        let there = &source.tensors[i];
        let widened = source.sharded.is_none() && t.kind == Kind::Parameter;
        let fits = there.dtype == t.dtype || (widened && matches!(there.dtype, Dtype::F16 | Dtype::BF16));
        if there.shape != t.shape || !fits {
            let (there, here) = (format!("{} {:?}", there.dtype, there.shape), format!("{} {:?}", t.dtype, t.shape));
            return Err(other(format!("{name} is {there} there and {here} here")));
        }
        if source.sharded.is_some() && there.kind != t.kind {
            return Err(other(format!("{name} is {} there", super::label(Some(there.kind), &t.name, None))));
        }
        numbers.push(i);
    }
    // What a Hugging Face folder has besides may be anything; what a checkpoint of ours was made of is known.
    let ours: HashSet<&str> = listing.tensors.iter().map(|t| t.name.as_str()).collect();
    let surplus =
        (0..source.tensors.len()).find(|i| source.is_parameter(*i) && !ours.contains(source.tensors[*i].name.as_str()));
    match surplus {
        Some(i) if source.sharded.is_some() => Err(other(format!("the model has no {}", source.label(i, None)))),
        _ => Ok(numbers),
    }
}
