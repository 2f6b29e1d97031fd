//! What queues are made with besides communicators: shards, and which means go where.

use cudarc::driver::sys::CUdeviceptr;

/// A range of a shard whose mean is written to the gradient shard, or added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mean {
    /// First float in the shard.
    pub at: usize,
    pub len: usize,
    pub add: bool,
}

/// Where this rank's shards of a unit are: addresses of as many floats as a shard has.
#[derive(Clone, Copy, Debug)]
pub struct UnitShards {
    pub masters: CUdeviceptr,
    pub grads: CUdeviceptr,
}

/// The shards that queues work on.
pub struct Shards<'a> {
    /// Of each unit of the plan.
    pub units: &'a [UnitShards],
    /// They are in pinned host memory.
    pub on_host: bool,
}
