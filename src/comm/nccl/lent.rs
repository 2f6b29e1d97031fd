//! What queues are made with: communicators, shards, and which means go where.

use super::comm::NcclComm;
use super::register::FixedMemory;
use crate::comm::Communicator;
use cudarc::driver::sys::CUdeviceptr;
use std::sync::Arc;

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

/// NCCL's communicators of a shard group.
pub struct NcclPair {
    pub gather: Arc<NcclComm>,
    pub reduce: Arc<NcclComm>,
}

/// Where ranks compare on the host what they launch.
pub struct Plane {
    /// Nobody else's, since its order of collectives is the queues' own.
    pub control: Arc<dyn Communicator>,
    /// The control communicator's number of the plan's unit 0, of [`Communicator::name_units`].
    pub first_unit: u32,
    /// Another communicator of the same ranks, the engine's own: an error breaks it, and it breaks the others.
    pub host: Arc<dyn Communicator>,
    /// Which ranks these are, where there are several such groups: errors begin with it.
    pub place: Option<String>,
}

/// The ranks that hold the same shards in different shard groups.
pub struct Replicas {
    pub plane: Plane,
    pub nccl: Arc<NcclComm>,
}

/// The communicators that queues work with.
pub struct Comms {
    /// Of the shard group, as the next two.
    pub plane: Plane,
    /// None for one rank.
    pub nccl: Option<NcclPair>,
    /// Fixed unit buffers and slots, if they are registered with those; else they are device memory as all else.
    pub fixed: Option<FixedMemory>,
    /// None where there is one shard group.
    pub replicas: Option<Replicas>,
}

/// The shards that queues work on.
pub struct Shards<'a> {
    /// Of each unit of the plan.
    pub units: &'a [UnitShards],
    /// They are in pinned host memory.
    pub on_host: bool,
}
