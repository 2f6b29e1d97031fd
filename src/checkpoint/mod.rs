//! Checkpoints: every rank's shards and optimizer state in safetensors files, and a manifest that says what is where.
//!
//! A checkpoint is a folder: `manifest.json`, and for each rank `shard-0000i-of-0000n.safetensors`. A rank's pieces are
//! flat ranges of parameters and of their states; each is written as boxes (`boxes`), under the parameter's name and
//! under `optimizer.STATE:NAME`. A name can be in a file once, so second and later boxes, which are less than a row (a
//! plane, ...) each, are in `shard-0000i-of-0000n-part-k.safetensors`. The headers say where each box belongs in the words of
//! PyTorch's torch.distributed.checkpoint, whose HuggingFaceStorageReader therefore reads every such folder. The manifest
//! says it for us, with checksums (XXH3-64) of all headers and of every 4 MiB: a checkpoint loads at any world size and
//! wrapping, and a rank reads and checks just the blocks that it needs. Whole tensors besides (a module's buffers) are in
//! rank 0's file.
//!
//! Complete or absent: everything is written into `.NAME.incomplete` beside the target, flushed to disk, the manifest
//! last, and then renamed. An existing checkpoint is never overwritten. Loading changes nothing before every rank has
//! read and checked all of its part.
//!
//! `save` and `load` are what ranks do together; `job` saves in the background. `consolidate` makes a folder as Hugging
//! Face has them (`huggingface`), which `load` reads, too; `inspect` says what is in either. `source` reads both.

mod boxes;
mod consolidate;
mod contents;
mod folder;
mod huggingface;
mod inspect;
mod job;
mod load;
mod manifest;
mod save;
mod source;
mod writer;

pub use consolidate::{consolidate, ConsolidateOptions};
pub use contents::{Contents, ExtraTensor, StateTensor};
pub use inspect::{inspect, verify, Summary, TensorSummary};
pub use job::{Job, Saves};
pub use load::{load, metadata};
pub use manifest::{Kind, Metadata};
pub use save::save;

use crate::comm::Communicator;
use crate::error::{err, Error, Result, Status};

/// How messages call a tensor (`kind` None where it is not known) or a state of a parameter.
fn label(kind: Option<Kind>, name: &str, state: Option<&str>) -> String {
    match (kind, state) {
        (_, Some(state)) => format!("state \"{state}\" of parameter \"{name}\""),
        (Some(Kind::Parameter), None) => format!("parameter \"{name}\""),
        (_, None) => format!("tensor \"{name}\""),
    }
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

// Files are little-endian, and memory is written and read as it is.
const _: () = assert!(cfg!(target_endian = "little"));
