//! Checkpoints: every rank's shards and optimizer state in safetensors files, and a manifest that says what is where.
//!
//! A checkpoint is a folder: `manifest.json` and, for each rank, `shard-0000i-of-0000n.safetensors` with flat pieces of
//! parameters (under the parameter's name) and of optimizer state (under `optimizer.STATE:NAME`). The manifest says for
//! each piece which range of the flattened parameter it is, so a checkpoint loads at any world size and wrapping.
//!
//! Complete or absent: everything is written into `.NAME.incomplete` beside the target, flushed to disk, the manifest
//! last, and then renamed. An existing checkpoint is never overwritten. Loading checks sizes and checksums (XXH3-64) of
//! all that it reads, and changes nothing before every rank has read all of its part.

mod load;
mod manifest;
mod save;

pub use load::{load, metadata};
pub use manifest::Metadata;
pub use save::save;

use crate::comm::Communicator;
use crate::engine::Engine;
use crate::error::{err, Error, Result, Status};
use crate::module::ParamId;
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

/// What is saved or filled on this rank: each parameter's piece (state `None`), then the given states.
struct Entry {
    param: ParamId,
    state: Option<String>,
    data: *mut f32,
    /// First element in the flattened parameter.
    first: usize,
    len: usize,
}

impl Entry {
    /// How messages call it.
    fn label(&self, engine: &Engine) -> String {
        label(&engine.plan().params[self.param as usize].fqn, self.state.as_deref())
    }
}

/// How messages call a piece of a parameter or of its state.
fn label(fqn: &str, state: Option<&str>) -> String {
    match state {
        None => format!("parameter \"{fqn}\""),
        Some(state) => format!("state \"{state}\" of parameter \"{fqn}\""),
    }
}

/// Checks the states and lists everything of this rank.
fn entries(engine: &Engine, states: &[StateTensor]) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for (p, param) in engine.plan().params.iter().enumerate() {
        let shard = engine.shard(p as ParamId)?;
        let first = param.piece.param_offset;
        entries.push(Entry { param: p as ParamId, state: None, data: shard.data, first, len: shard.len });
    }
    let mut seen = HashSet::new();
    for s in states {
        let param = engine.param(s.param)?;
        if s.name.is_empty() || s.name.contains(':') {
            return Err(err!(InvalidArgument, "\"{}\" is no name of a state: empty, or with a colon", s.name));
        }
        if !seen.insert((s.param, &s.name)) {
            return Err(err!(InvalidArgument, "{} is given twice", label(&param.fqn, Some(&s.name))));
        }
        if s.data.is_null() && param.piece.len > 0 {
            return Err(err!(InvalidArgument, "the data of {} is NULL", label(&param.fqn, Some(&s.name))));
        }
        let state = Some(s.name.clone());
        let (first, len) = (param.piece.param_offset, param.piece.len);
        entries.push(Entry { param: s.param, state, data: s.data, first, len });
    }
    Ok(entries)
}

/// Every rank's outcome of a local step: all values in rank order, or one error, the same on every rank. Collective.
fn gather(comm: &dyn Communicator, outcome: Result<String>) -> Result<Vec<String>> {
    let message = match &outcome {
        Ok(value) => format!("0 {value}"),
        Err(e) => format!("{} {}", e.status as i32, e.message),
    };
    let mut values = Vec::new();
    for (rank, bytes) in comm.exchange(message.as_bytes())?.into_iter().enumerate() {
        let text = String::from_utf8_lossy(&bytes);
        let (code, rest) = text.split_once(' ').unwrap_or((&text, ""));
        match code.parse().ok().and_then(Status::from_code) {
            Some(Status::Ok) => values.push(rest.to_string()),
            Some(status) => return Err(Error::new(status, format!("rank {rank}: {rest}"))),
            None => return Err(err!(Mismatch, "rank {rank} runs something else than this checkpoint")),
        }
    }
    Ok(values)
}

/// The error for a file or folder that fails or is damaged.
fn damaged(path: &std::path::Path, why: impl std::fmt::Display) -> Error {
    err!(Checkpoint, "\"{}\": {why}", path.display())
}
