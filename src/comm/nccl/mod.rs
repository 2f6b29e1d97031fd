//! NCCL: collectives of GPUs, loaded at run time and shared with LibTorch if that has it.
//!
//! `library` finds it, `id` is how ranks meet, `comm` is a communicator: collectives on streams, in place in the unit
//! buffer or gradient slot, never blocking the host without a deadline. `watch` follows what runs on the GPU: an error
//! or a deadline aborts the communicator and names the unit, the rank and the collective. `register` is memory of
//! NCCL's own that its communicators know, where its version can do that. `queues` is a pipeline's device: streams and memory, and
//! `comms` its communicators, each with one on the host that compares what ranks launch.
//!
//! A communicator's collectives run in order; an engine takes one for all-gathers and one for reduce-scatters of its shard
//! group, and one for its replicas (`NcclComm::split`).

mod comm;
mod comms;
mod id;
mod lent;
mod library;
mod queues;
mod register;
mod types;
mod watch;

pub use comm::{NcclComm, NcclConfig};
pub use comms::{Comms, NcclPair, Plane, Replicas, SmallerGroup};
pub use id::UniqueId;
pub use lent::{Mean, Shards, UnitShards};
pub use library::Nccl;
pub use queues::NcclQueues;
pub use register::FixedMemory;
pub use types::{Part, Reduction};
pub use watch::What;
