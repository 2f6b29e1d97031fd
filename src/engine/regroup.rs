//! Units that are resharded after their forward over fewer ranks than their shard group has, so that the all-gather of
//! their backward stays among those: FSDP2's integer `reshard_after_forward`.
//!
//! A smaller group is a communicator of its own, of consecutive ranks, with an arena of no bytes: its READ phases are
//! opened and closed with the stores', so that an all-gather in the group waits for its ranks alone, and is compared with
//! theirs alone. On shared pages there is nothing else to it: the full parameters are there once a host in any case. On a GPU the
//! group has a communicator of NCCL's besides, and each rank keeps its part of the unit meanwhile (`src/pipeline`).

use super::Engine;
use crate::agree;
use crate::comm::{Arena, Communicator};
use crate::error::{err, Result};
use crate::plan::{Plan, UnitId};
use crate::unit::AfterForward;
use std::sync::Arc;

/// A smaller group of ranks.
pub(super) struct Group {
    pub comm: Arc<dyn Communicator>,
    pub arena: Arena,
    /// The communicator's number of unit 0.
    pub first_unit: u32,
}

/// What a host says about a unit after a forward that a backward follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReshardAfterForward {
    /// As the strategy says: the root stays unsharded.
    Default,
    Never,
    Always,
    /// Over groups of so many ranks.
    Over(usize),
}

impl Engine {
    /// Sets what happens to `unit` after its forward, from the next iteration on. Collective: the same on every rank of
    /// the shard group. A group size must divide the shard group's; 1 rank is `Never`, all of them `Always`.
    pub fn set_reshard_after_forward(&self, unit: UnitId, choice: ReshardAfterForward) -> Result<()> {
        let label = self.unit(unit)?.label();
        let world = self.comm().world_size();
        let line = format!("reshard_after_forward of unit \"{label}\" = {choice:?}");
        let mut state = self.lock()?;
        agree::on_lines(&[line], |_| "options", self.comm().as_ref())?;
        if state.reading {
            return Err(err!(InvalidState, "reshard_after_forward of unit \"{label}\" cannot change in an iteration"));
        }
        let after = match choice {
            ReshardAfterForward::Default => self.default_after_forward(unit),
            ReshardAfterForward::Never | ReshardAfterForward::Over(1) => AfterForward::Keep,
            ReshardAfterForward::Always => AfterForward::Reshard,
            ReshardAfterForward::Over(ranks) if ranks == world => AfterForward::Reshard,
            ReshardAfterForward::Over(ranks) if ranks == 0 || world % ranks != 0 => {
                return Err(err!(
                    InvalidArgument,
                    "unit \"{label}\" cannot be resharded over {ranks} ranks: its shard group has {world}"
                ))
            }
            ReshardAfterForward::Over(ranks) => {
                let known = state.groups.iter().position(|g| g.comm.world_size() == ranks);
                let index = match known {
                    Some(index) => index,
                    None => {
                        let group = self.make_group(ranks)?;
                        state.groups.push(group);
                        state.groups.len() - 1
                    }
                };
                AfterForward::ReshardTo(index)
            }
        };
        state.units[unit as usize].after_forward = after;
        Ok(())
    }

    pub(super) fn default_after_forward(&self, unit: UnitId) -> AfterForward {
        // The root's backward comes right after its forward.
        match unit != Plan::ROOT_UNIT && self.strategy.reshards_after_forward() {
            true => AfterForward::Reshard,
            false => AfterForward::Keep,
        }
    }

    fn make_group(&self, ranks: usize) -> Result<Group> {
        let number = self.comm().rank() / ranks;
        let comm = self.comm().split(number as u32, 0)?;
        let names: Vec<_> = (0..self.plan().units.len() as UnitId).map(|u| self.plan().unit_name(u)).collect();
        let group = Group { first_unit: comm.name_units(&names), arena: comm.alloc_arena(0)?, comm };
        if let Some(gpu) = &self.gpu {
            let first = self.replica() * self.comm().world_size() + number * ranks;
            let place = format!("in the group of {ranks} ranks that begins at rank {first}");
            self.model.mesh.spread(gpu.add_group(number as u32, &group.comm, &names, place))?;
        }
        Ok(group)
    }
}
