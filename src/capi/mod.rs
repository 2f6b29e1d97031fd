//! The C ABI: convert, call, convert; no logic. One file per C noun.
//!
//! Every function goes through [`status::boundary`], so no panic crosses into C and every failure leaves a message for
//! `fsdp_last_error_message`. Handles are numbers in pointer form, looked up and never dereferenced, so that a stale or
//! wrong one is an error. Names are those of C; cbindgen makes include/fsdp.h of this folder.

#![allow(non_camel_case_types)]

pub mod checkpoint;
pub mod checkpoint_job;
pub mod comm;
pub mod comm_host;
pub mod consolidate;
pub mod cuda;
pub mod device;
pub mod engine;
pub mod engine_info;
pub mod full;
pub mod handle;
pub mod heap;
pub mod hook;
mod host_table;
pub mod iteration;
pub mod log;
pub mod model;
pub mod norm;
pub mod optim;
pub mod plan;
pub mod scaler;
pub mod shard;
pub mod status;
pub mod tensor;
pub mod trace;
