//! Loading: each rank reads the ranges that are its own, whatever world size they were saved at.

use super::contents::{Contents, Listing};
use super::manifest::{Kind, Manifest, Metadata};
use super::source::Source;
use super::{damaged, gather};
use crate::dtype::DType;
use crate::engine::Engine;
use crate::error::{err, Error, Result};
use crate::memory::HostBuffer;
use safetensors::Dtype;
use std::collections::HashSet;
use std::path::Path;
use std::slice::ChunksExactMut;

/// Fills the shards of `engine` and the data of the states and extra tensors of `contents` from the checkpoint in `dir`.
/// Collective. Changes nothing on any rank unless every rank has read and checked all of its part; then all is read again, as
/// a rule from the system's page cache, so that no memory for a second copy is needed. A sharded checkpoint of another model
/// (names, shapes, dtypes) is refused by the first parameter that differs; a folder in Hugging Face's layout must have all
/// parameters and may have more, in float32, float16 or bfloat16. No backward may be under way.
///
/// # Safety
/// The data of states and extra tensors must be writable.
pub unsafe fn load(engine: &Engine, dir: &Path, contents: &Contents) -> Result<()> {
    let checked = Listing::to_load(engine, contents).and_then(|listing| {
        let source = Source::open(dir)?;
        let numbers = check(&source, &listing)?;
        Ok((source, listing, numbers))
    });
    gather(engine.world().as_ref(), checked.as_ref().map(|_| String::new()).map_err(Error::clone))?;
    engine.begin_write()?;
    let (source, listing, numbers) = checked?;
    // SAFETY: the entries are the engine's own pieces, writable since begin_write, or the caller's promise.
    let filled = unsafe { fill(engine, &source, &listing, &numbers) };
    let changed = "the checkpoint changed or failed after it was checked; what was being loaded is undefined now";
    gather(engine.world().as_ref(), filled.map(|()| String::new()).map_err(|e| e.context(changed))).map(|_| ())
}

/// The metadata given when the checkpoint in `dir` was saved. Local.
pub fn metadata(dir: &Path) -> Result<Metadata> {
    Ok(Manifest::read(dir)?.metadata)
}

/// Reads all that the entries need, and compares what can be compared.
fn check(source: &Source, listing: &Listing) -> Result<Vec<usize>> {
    let numbers = same_model(source, listing)?;
    for e in &listing.entries {
        source.read(numbers[e.tensor], e.state.as_deref(), e.first, e.len, &mut |_| Ok(()))?;
    }
    Ok(numbers)
}

/// Fills the entries from the tensors of these numbers.
///
/// # Safety
/// The entries' data are writable, and nobody else uses them meanwhile.
unsafe fn fill(engine: &Engine, source: &Source, listing: &Listing, numbers: &[usize]) -> Result<()> {
    for e in &listing.entries {
        let (tensor, state) = (numbers[e.tensor], e.state.as_deref());
        // What belongs on a GPU goes through the host's memory.
        let goes_up = e.at_home && engine.shards_on_gpu();
        let staged = HostBuffer::zeroed(if goes_up { e.len } else { 0 }, &listing.label(e))?;
        let to = if goes_up { staged.as_ptr().cast() } else { e.data };
        // SAFETY: the caller's promise, for as many bytes as the entry has; what is staged is as long.
        let out = match listing.bytes_of(e) {
            0 => &mut [],
            bytes => unsafe { std::slice::from_raw_parts_mut(to, bytes) },
        };
        let stored = source.tensors[tensor].dtype;
        if stored == listing.tensors[e.tensor].dtype {
            source.read_again(tensor, state, e.first, out)?;
        } else {
            let mut out = out.chunks_exact_mut(size_of::<f32>());
            source.read(tensor, state, e.first, e.len, &mut |bytes| widen(stored, bytes, &mut out))?;
        }
        if goes_up {
            // SAFETY: the caller's promise; what is staged has as many floats.
            unsafe { engine.settled_at_home()?.put(DType::F32, to, e.data.cast(), e.len) }?;
        }
    }
    source.require_unchanged()
}

/// Writes 16-bit floating numbers as float32, without loss.
fn widen(stored: Dtype, bytes: &[u8], out: &mut ChunksExactMut<'_, u8>) -> Result<()> {
    let numbers = bytes.chunks_exact(2).map(|b| [b[0], b[1]]).zip(out);
    match stored {
        Dtype::F16 => numbers.for_each(|(b, o)| o.copy_from_slice(&half::f16::from_le_bytes(b).to_f32().to_le_bytes())),
        Dtype::BF16 => {
            numbers.for_each(|(b, o)| o.copy_from_slice(&half::bf16::from_le_bytes(b).to_f32().to_le_bytes()))
        }
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
