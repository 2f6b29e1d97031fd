//! Gradient accumulation: what a backward does with its gradients, when several make one step.
//!
//! Three ways, with PyTorch FSDP2's names:
//! - *In shards* (default): every backward reduces, and adds to the gradient shards that are not cleared between.
//! - *Unsharded* (`requires_gradient_sync` off): a backward reduces nothing; each unit's full gradients stay in its slot, or in its
//!   spare one, and later backwards add to them. The first one that reduces, reduces the sum. Costs a unit's size per unit.
//! - *Over replicas* (`requires_all_reduce` off): a backward reduces within its shard group only.
//!
//! `is_last_backward` off keeps the iteration open, so that ranks need not wait for each other between micro-batches: the next
//! forward may begin, shards cannot be written yet.

use super::Engine;
use crate::error::Result;

/// The choices for the backwards from here on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accumulation {
    pub requires_gradient_sync: bool,
    pub is_last_backward: bool,
    pub requires_all_reduce: bool,
}

impl Default for Accumulation {
    fn default() -> Accumulation {
        Accumulation { requires_gradient_sync: true, is_last_backward: true, requires_all_reduce: true }
    }
}

impl Engine {
    /// Whether backwards from here on reduce their gradients, or leave them unsharded for a later one. The same on every
    /// rank. Local.
    pub fn set_requires_gradient_sync(&self, required: bool) -> Result<()> {
        let mut state = self.lock()?;
        state.accumulation.requires_gradient_sync = required;
        state.gradients.adds_later = !required;
        Ok(())
    }

    /// Whether backwards from here on end the iteration: see the module's text. The same on every rank. Local.
    pub fn set_is_last_backward(&self, last: bool) -> Result<()> {
        self.accumulate(|a| a.is_last_backward = last)
    }

    /// Whether backwards from here on average their gradients over replicas, or only within their shard group, for a later
    /// one to average the sum. The same on every rank. Local.
    pub fn set_requires_all_reduce(&self, required: bool) -> Result<()> {
        self.accumulate(|a| a.requires_all_reduce = required)
    }

    fn accumulate(&self, change: impl FnOnce(&mut Accumulation)) -> Result<()> {
        let mut state = self.lock()?;
        change(&mut state.accumulation);
        let Accumulation { is_last_backward, requires_all_reduce, .. } = state.accumulation;
        // A GPU averages over replicas as it reduces.
        self.gpu.iter().for_each(|gpu| gpu.set_averaging(is_last_backward && requires_all_reduce));
        Ok(())
    }
}
