//! What a checkpoint is made of on this rank: the engine's shards, and what a host adds.

use super::label;
use super::manifest::{key, Kind, Metadata, Tensor};
use crate::engine::Engine;
use crate::error::{err, Error, Result};
use crate::module::ParamId;
use safetensors::Dtype;
use std::collections::HashSet;

/// A tensor of optimizer state that is sharded like its parameter: `data` has as many floats as the parameter's piece
/// on this rank.
#[derive(Clone, Debug)]
pub struct StateTensor {
    pub param: ParamId,
    /// The optimizer's name for it, e.g. `exp_avg`.
    pub name: String,
    pub data: *mut f32,
}

/// A whole tensor, the same on every rank: written by rank 0, read by every rank.
#[derive(Clone, Debug)]
pub struct ExtraTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: *mut u8,
}

/// What is saved or loaded beside the engine's shards.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    pub states: Vec<StateTensor>,
    pub extras: Vec<ExtraTensor>,
    /// Texts to keep (rank 0's are kept). Not used in loading.
    pub metadata: Metadata,
}

/// One range of memory to save or to fill.
pub struct Entry {
    /// Index into [`Listing::tensors`].
    pub tensor: usize,
    pub state: Option<String>,
    pub data: *mut u8,
    /// `data` is float32 where the engine's shards have their home, perhaps on a GPU; else in host memory.
    pub at_home: bool,
    /// First element in the flattened tensor.
    pub first: usize,
    /// Elements.
    pub len: usize,
}

/// All of it, checked.
pub struct Listing {
    /// The parameters in their order, then the extra tensors.
    pub tensors: Vec<Tensor>,
    /// This rank's ranges.
    pub entries: Vec<Entry>,
    /// What `entries` point into, if it is not the engine's and the host's.
    pub memory: Vec<Vec<u8>>,
    /// How this rank's files begin; None if it writes none.
    pub stem: Option<String>,
}

// SAFETY: the pointers are plain addresses; a listing goes to another thread only when `memory` has everything.
unsafe impl Send for Listing {}

impl Listing {
    /// What this rank fills in a load.
    pub fn to_load(engine: &Engine, contents: &Contents) -> Result<Listing> {
        Listing::new(engine, contents, true)
    }

    /// What this rank saves. Of ranks that hold the same shards (HYBRID_SHARD, NO_SHARD) the first writes them.
    pub fn to_save(engine: &Engine, contents: &Contents) -> Result<Listing> {
        let mut listing = Listing::new(engine, contents, engine.world().rank() == 0)?;
        let group = engine.comm();
        match engine.replica() {
            0 => listing.stem = Some(format!("shard-{:05}-of-{:05}", group.rank() + 1, group.world_size())),
            _ => listing.entries.clear(),
        }
        Ok(listing)
    }

    /// Lists the parameters' pieces, then states and extra tensors; `all` is whether this rank has what is whole, too.
    fn new(engine: &Engine, contents: &Contents, all: bool) -> Result<Listing> {
        let mut tensors = Vec::new();
        let mut entries = Vec::new();
        let numel = |shape: &[usize]| shape.iter().product::<usize>();
        for (p, param) in engine.plan().params.iter().enumerate() {
            let shape: Vec<usize> = param.shape.iter().map(|d| *d as usize).collect();
            let shard = engine.shard(p as ParamId)?;
            let (first, data) = (param.piece.param_offset, shard.data.cast());
            if shard.len > 0 || (all && numel(&shape) == 0) {
                entries.push(Entry { tensor: p, state: None, data, at_home: true, first, len: shard.len });
            }
            tensors.push(Tensor { name: param.fqn.clone(), shape, dtype: Dtype::F32, kind: Kind::Parameter });
        }
        let mut seen = HashSet::new();
        for s in &contents.states {
            let param = engine.param(s.param)?;
            if s.name.is_empty() || s.name.contains(':') {
                return Err(err!(InvalidArgument, "\"{}\" is no name of a state: empty, or with a colon", s.name));
            }
            let called = || label(Some(Kind::Parameter), &param.fqn, Some(&s.name));
            if !seen.insert((s.param, &s.name)) {
                return Err(err!(InvalidArgument, "{} is given twice", called()));
            }
            let (first, len) = (param.piece.param_offset, param.piece.len);
            if s.data.is_null() && len > 0 {
                return Err(err!(InvalidArgument, "the data of {} is NULL", called()));
            }
            let tensor = s.param as usize;
            if len > 0 || (all && tensors[tensor].numel() == 0) {
                let (state, data) = (Some(s.name.clone()), s.data.cast());
                entries.push(Entry { tensor, state, data, at_home: true, first, len });
            }
        }
        let mut names: HashSet<String> = tensors.iter().map(|t| t.name.clone()).collect();
        for x in &contents.extras {
            let tensor = Tensor { name: x.name.clone(), shape: x.shape.clone(), dtype: x.dtype, kind: Kind::Extra };
            if x.name.is_empty() || x.name.contains(':') || x.name == "__metadata__" {
                return Err(err!(InvalidArgument, "\"{}\" is no name of a tensor: empty, or with a colon", x.name));
            }
            if !names.insert(x.name.clone()) {
                return Err(err!(InvalidArgument, "the tensor \"{}\" is given twice, or is a parameter", x.name));
            }
            if x.data.is_null() && tensor.numel() > 0 {
                return Err(err!(InvalidArgument, "the data of tensor \"{}\" is NULL", x.name));
            }
            if all {
                let (number, len) = (tensors.len(), tensor.numel());
                entries.push(Entry { tensor: number, state: None, data: x.data, at_home: false, first: 0, len });
            }
            tensors.push(tensor);
        }
        Ok(Listing { tensors, entries, memory: Vec::new(), stem: None })
    }

    pub fn bytes_of(&self, e: &Entry) -> usize {
        e.len * (self.tensors[e.tensor].dtype.bitsize() / 8)
    }

    /// The memory of an entry, which is the host's.
    ///
    /// # Safety
    /// The entry's memory is valid, of the host, and nobody writes it while the result lives.
    pub unsafe fn slice(&self, e: &Entry) -> &[u8] {
        match self.bytes_of(e) {
            0 => &[],
            // SAFETY: the caller's promise; an entry with elements has data.
            bytes => unsafe { std::slice::from_raw_parts(e.data, bytes) },
        }
    }

    /// How messages call an entry.
    pub fn label(&self, e: &Entry) -> String {
        let t = &self.tensors[e.tensor];
        label(Some(t.kind), &t.name, e.state.as_deref())
    }

    /// What must be the same on every rank that saves, as text: all names, types and shapes.
    pub fn description(&self, contents: &Contents) -> String {
        let mut lines: Vec<String> =
            self.tensors.iter().map(|t| format!("{} {} {:?}", key(&t.name, None), t.dtype, t.shape)).collect();
        lines.extend(contents.states.iter().map(|s| key(&self.tensors[s.param as usize].name, Some(&s.name))));
        lines.join("\n")
    }

    /// Copies all entries, of `engine`, into host memory of the listing's own.
    ///
    /// # Safety
    /// The entries' memory is valid and nobody writes it meanwhile.
    pub unsafe fn copy(&mut self, engine: &Engine) -> Result<()> {
        let mut memory = Vec::with_capacity(self.entries.len());
        for e in &self.entries {
            let mut copy = reserve(self.bytes_of(e), &self.label(e))?;
            if e.at_home {
                copy.resize(self.bytes_of(e), 0);
                // SAFETY: the caller's promise.
                unsafe { engine.settled_at_home()?.get(e.data, &mut copy) }?;
            } else {
                // SAFETY: the caller's promise.
                copy.extend_from_slice(unsafe { self.slice(e) });
            }
            memory.push(copy);
        }
        for (e, copy) in self.entries.iter_mut().zip(&mut memory) {
            (e.data, e.at_home) = (copy.as_mut_ptr(), false);
        }
        self.memory = memory;
        Ok(())
    }
}

/// An empty vector with room for `bytes`; a lack of memory is an error.
fn reserve(bytes: usize, what: &str) -> Result<Vec<u8>> {
    let mut memory = Vec::new();
    let full = |_| Error::new(crate::error::Status::OutOfMemory, format!("no memory to copy {what}: {bytes} bytes"));
    memory.try_reserve_exact(bytes).map_err(full)?;
    Ok(memory)
}
