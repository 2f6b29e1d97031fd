//! Which ranks share a set of shards: all of them, groups that are replicas of each other, or each rank alone.
//!
//! HYBRID_SHARD (PyTorch's name; ZeRO++ and MiCS call it hierarchical partitioning, arXiv 2205.00119) lays the ranks out
//! as a table: a row is a *shard group* of `shard_size` consecutive ranks, a column the ranks that hold the same shard.
//! Gradients are reduced within the row and then averaged over the column. NO_SHARD is the table of one column: every
//! rank is a shard group of its own.

use crate::comm::{single, Communicator};
use crate::config::EngineConfig;
use crate::error::{err, Error, Result, Status};
use crate::module::ModuleTree;
use crate::shards::ShardedModel;
use std::sync::Arc;

/// This rank's place in the table.
pub struct Mesh {
    /// All ranks: what the host gave.
    pub world: Arc<dyn Communicator>,
    /// The ranks that this one's shards are spread over.
    pub shard: Arc<dyn Communicator>,
    /// The ranks that hold the same shards, by shard group; None where there is one group.
    pub replicate: Option<Arc<dyn Communicator>>,
}

impl Mesh {
    /// Collective over `world`, whose ranks have the same `config`.
    pub fn new(world: Arc<dyn Communicator>, config: &EngineConfig) -> Result<Mesh> {
        let size = config.shard_group_size(world.world_size())?;
        if size == world.world_size() {
            return Ok(Mesh { shard: world.clone(), replicate: None, world });
        }
        let rank = world.rank();
        let (shard, replicate) = match size {
            1 => (single::init(), world.clone()),
            _ => (world.split((rank / size) as u32, 0)?, world.split((rank % size) as u32, 0)?),
        };
        Ok(Mesh { world, shard, replicate: Some(replicate) })
    }

    /// The mesh of `model`, one of those that `tree` has adopted, for an engine with `config`: the same as of all of them.
    pub fn adopted(model: &ShardedModel, tree: &ModuleTree, config: &EngineConfig) -> Result<Arc<Mesh>> {
        let mesh = &model.mesh;
        let size = config.shard_group_size(mesh.world.world_size())?;
        if size != mesh.shard.world_size() {
            return Err(err!(
                InvalidArgument,
                "the {model:?} that was added is sharded over {} ranks, which strategy {} would shard over {size}",
                mesh.shard.world_size(),
                config.strategy.name()
            ));
        }
        match tree.adopted().iter().find(|other| !Arc::ptr_eq(&other.mesh.shard, &mesh.shard)) {
            None => Ok(mesh.clone()),
            Some(other) => Err(err!(
                Unsupported,
                "the {model:?} and the {other:?} that were added have shard groups of their own: hybrid and unsharded \
                 models can be put together one at a time"
            )),
        }
    }

    /// All communicators of it.
    pub fn comms(&self) -> Vec<Arc<dyn Communicator>> {
        [&self.world, &self.shard].into_iter().chain(&self.replicate).cloned().collect()
    }

    /// Number of this rank's shard group.
    pub fn replica(&self) -> usize {
        self.replicate.as_ref().map_or(0, |r| r.rank())
    }

    /// How messages call this rank's shard group, if there are several of several ranks.
    pub fn shard_place(&self) -> Option<String> {
        let first = self.replica() * self.shard.world_size();
        let several = self.replicate.is_some() && self.shard.world_size() > 1;
        several.then(|| format!("in the shard group that begins at rank {first}"))
    }

    /// How messages call this rank's replicas, if they are not all ranks.
    pub fn replicas_place(&self) -> Option<String> {
        let some = self.replicate.as_ref().is_some_and(|replicate| !Arc::ptr_eq(replicate, &self.world));
        some.then(|| format!("among the replicas of rank {}", self.shard.rank()))
    }

    /// Passes on a result of a collective. The error of one communicator breaks the others too, so that no rank waits for
    /// one that has failed elsewhere; and it says whose ranks its numbers are.
    pub fn spread<T>(&self, result: Result<T>) -> Result<T> {
        let Some(replicate) = &self.replicate else { return result };
        result.map_err(|e| {
            if !breaks(&e) {
                return e;
            }
            // What came by way of an abort was named where it happened.
            let is_of =
                |comm: &dyn Communicator| comm.async_error().is_some_and(|own| e.message.contains(&own.message));
            let place = match is_of(self.shard.as_ref()) {
                true => self.shard_place(),
                false if is_of(replicate.as_ref()) => self.replicas_place(),
                false => None,
            };
            let e = match place {
                Some(place) if !e.message.contains(&place) => e.context(place),
                _ => e,
            };
            self.comms().iter().for_each(|comm| comm.abort(&e.message));
            e
        })
    }
}

/// Whether the error is one that breaks a communicator.
fn breaks(e: &Error) -> bool {
    matches!(e.status, Status::Mismatch | Status::PeerDied | Status::Timeout | Status::Aborted)
}

impl EngineConfig {
    /// Ranks of a shard group in a world of `world` ranks.
    pub fn shard_group_size(&self, world: usize) -> Result<usize> {
        use crate::config::Strategy::{FullShard, HybridShard, HybridShardGradOp, NoShard, ShardGradOp};
        let given = self.shard_size as usize;
        match self.strategy {
            HybridShard | HybridShardGradOp if given == 0 || world % given != 0 => Err(err!(
                InvalidArgument,
                "shard_size is {given}: strategy {} needs a divisor of the world size {world}",
                self.strategy.name()
            )),
            HybridShard | HybridShardGradOp => Ok(given),
            FullShard | ShardGradOp | NoShard if given != 0 => {
                Err(err!(InvalidArgument, "shard_size is {given}: strategy {} has none", self.strategy.name()))
            }
            FullShard | ShardGradOp => Ok(world),
            NoShard => Ok(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Strategy;

    fn size(strategy: Strategy, shard_size: u32, world: usize) -> Result<usize> {
        EngineConfig { strategy, shard_size, ..EngineConfig::default() }.shard_group_size(world)
    }

    #[test]
    fn group_sizes() {
        assert_eq!(size(Strategy::FullShard, 0, 6).unwrap(), 6);
        assert_eq!(size(Strategy::NoShard, 0, 6).unwrap(), 1);
        assert_eq!(size(Strategy::HybridShard, 3, 6).unwrap(), 3);
        assert_eq!(size(Strategy::HybridShardGradOp, 6, 6).unwrap(), 6);
        let e = size(Strategy::HybridShard, 4, 6).unwrap_err();
        assert_eq!(e.message, "shard_size is 4: strategy HYBRID_SHARD needs a divisor of the world size 6");
        assert!(size(Strategy::HybridShard, 0, 6).is_err());
        assert!(size(Strategy::FullShard, 2, 6).unwrap_err().message.contains("FULL_SHARD has none"));
    }
}
