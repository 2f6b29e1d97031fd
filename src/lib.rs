//! fsdp: fully sharded data parallel training for hosts that speak C.
//!
//! The path of a parameter, and who takes it there:
//!
//! ```text
//!   register   module     the host's tree of modules and parameters
//!   wrap       wrap       modules become units
//!   plan       layout     one unit's buffer, cut over the ranks      plan     all units, on this rank
//!   shard      engine     each rank keeps its cut, in memory of the communicator
//!                         materialize  gives parameters without storage their values first, a unit at a time
//!   unshard    engine     wait until every rank's cut can be read (shm: no bytes move)
//!   compute    (host)     reads parameters as views of the unit buffer
//!   reduce     gradients  full gradients in a slot; their mean into this rank's gradient shard
//!   reshard    engine     views end
//!   step       optim      SGD or AdamW on the shards, or an optimizer of the host's
//!   save       checkpoint shards to files, and back at any world size
//! ```
//!
//! `mesh` says which ranks share shards and which are replicas, `precision` what parameters are computed in (`halves` rounds and widens), `device`
//! where memory lies, `heap` where gradient shards and a host's activations take turns. `trace` records in which order a
//! forward needs what; from that, `schedule` says what comes next. `hook`, `norm` and `scaler` are what happens to gradients before and after they are reduced. Messages for a person
//! go through `log`, and a timeline of all ranks through `timeline`. `pipeline` says what waits for what on a device
//! whose collectives run beside its compute. `forecast` says what all of it will take and move, from the plan alone.
//! `comm` connects ranks (`shm`: shared pages of one host; `host`: collectives that a host lends; `single`: one rank;
//! `nccl`: GPUs). `capi` is the C ABI: it converts, calls, converts, and is the only part that knows C. See
//! ARCHITECTURE.md for the protocol between the ranks.

mod agree;
pub mod capi;
pub mod checkpoint;
pub mod comm;
pub mod config;
mod describe;
pub mod device;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod forecast;
mod gradients;
mod halves;
#[cfg(test)]
mod headers;
mod heap;
pub mod hook;
pub mod layout;
mod library;
pub mod log;
pub mod materialize;
mod memory;
pub mod mesh;
pub mod module;
pub mod norm;
pub mod optim;
mod order;
pub mod pipeline;
pub mod plan;
pub mod precision;
pub mod scaler;
pub mod schedule;
pub mod shards;
mod timeline;
pub mod trace;
mod unit;
pub mod wrap;
