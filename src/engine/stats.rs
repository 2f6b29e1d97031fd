//! What an engine uses, and what it has done.

use super::replicate::ReplicaCounters;
use super::{Engine, State};
use crate::error::Result;
use crate::gradients::GradientCounters;
use crate::module::ParamId;
use crate::plan::{UnitId, UnitPlan};
use crate::timeline::Memory;
use crate::unit::UnitState;

/// What an engine uses and has done. Bytes are exact.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// This rank's shards of all units, padding included.
    pub param_shard_bytes: u64,
    pub grad_shard_bytes: u64,
    /// Capacity of this rank's gradient slots.
    pub gradient_slot_bytes: u64,
    /// Padding in all unit buffers, of all ranks together.
    pub padding_bytes: u64,
    /// All unit buffers, each on a line of its own; on shm one copy a host. On a GPU the fixed pool.
    pub unit_buffer_bytes: u64,
    pub all_gathers: u64,
    /// Bytes of the unit buffers that they fill, 16-bit parameters counted so.
    pub all_gather_bytes: u64,
    /// What each rank sends of them where bytes move: (n-1)/n of each one's, rounded up, in a group of n ranks.
    pub all_gather_sent_bytes: u64,
    /// Bytes that this rank rounded its masters to for them; on shared pages nothing else is moved.
    pub all_gather_bytes_moved: u64,
    /// Most bytes of full parameters in private memory at once while the engine was made.
    pub materialized_peak_bytes: u64,
    /// All-gathers issued ahead of the unit that was asked for.
    pub prefetches: u64,
    /// The 16-bit compute copies of all units; on shm one copy a host. None on a GPU, whose unit buffers have both types.
    pub compute_buffer_bytes: u64,
    /// This rank's shards in host memory, besides their place in the unit buffers (CPU offload).
    pub offloaded_bytes: u64,
    pub gradients: GradientCounters,
    pub replicas: ReplicaCounters,
}

/// What a unit is and has done.
#[derive(Clone, Copy, Debug)]
pub struct UnitCounts {
    pub state: UnitState,
    pub all_gathers: u64,
    pub reduce_scatters: u64,
}

impl Engine {
    pub fn stats(&self) -> Result<Stats> {
        let state = self.lock()?;
        Ok(Stats {
            param_shard_bytes: self.plan().units.iter().map(|u| u.shard_bytes() as u64).sum(),
            grad_shard_bytes: self.plan().units.iter().map(|u| u.grad_shard_bytes() as u64).sum(),
            gradient_slot_bytes: self.gradient_slot_bytes,
            padding_bytes: self.plan().padding_bytes() as u64,
            unit_buffer_bytes: match &self.gpu {
                Some(gpu) => gpu.pool_bytes(),
                None => self.plan().units.iter().map(|u| u.arena_bytes() as u64).sum(),
            },
            all_gathers: state.all_gathers,
            all_gather_bytes: state.all_gather_bytes,
            all_gather_sent_bytes: state.all_gather_sent_bytes,
            all_gather_bytes_moved: state.cast_bytes,
            materialized_peak_bytes: self.materialized_peak_bytes,
            prefetches: state.prefetches,
            compute_buffer_bytes: match &self.gpu {
                Some(_) => 0,
                None => self.plan().units.iter().map(|u| u.compute_bytes as u64).sum(),
            },
            offloaded_bytes: self.offloaded_bytes(),
            gradients: state.gradients.counters(),
            replicas: state.replicas,
        })
    }

    /// A unit's state and how often it was gathered and reduced.
    pub fn unit_counts(&self, unit: UnitId) -> Result<UnitCounts> {
        self.unit(unit)?;
        let state = self.lock()?;
        let u = &state.units[unit as usize];
        let reduce_scatters = state.gradients.reductions[unit as usize];
        Ok(UnitCounts { state: u.state, all_gathers: u.all_gathers, reduce_scatters })
    }

    /// Whether a parameter gets gradients now.
    pub fn requires_grad(&self, param: ParamId) -> Result<bool> {
        self.param(param)?;
        Ok(self.lock()?.requires_grad[param as usize])
    }

    pub(super) fn offloaded_bytes(&self) -> u64 {
        let offloaded = |u: &&UnitPlan| self.model.stores[u.store].offloads();
        self.plan().units.iter().filter(offloaded).map(|u| u.grad_shard_bytes() as u64).sum()
    }

    pub(super) fn memory(&self, state: &State) -> Memory {
        let units = self.plan().units.iter();
        let unsharded = units.zip(&state.units).filter(|(_, unit)| unit.state == UnitState::Unsharded);
        Memory {
            units_unsharded: unsharded.map(|(u, _)| u.gathered_bytes(&self.plan().params) as u64).sum(),
            gradient_slots: state.gradients.used_bytes(),
            param_shards: self.plan().units.iter().map(|u| u.shard_bytes() as u64).sum(),
            grad_shards: self.plan().units.iter().map(|u| u.grad_shard_bytes() as u64).sum(),
            materialized_peak: self.materialized_peak_bytes,
        }
    }
}
