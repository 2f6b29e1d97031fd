//! Gradient shards averaged over the replicas: the ranks that hold the same shard in different shard groups.
//!
//! Once per iteration, after the reductions within the shard groups: one all-reduce per unit of the pieces that have a
//! new mean in any group, in float32, summed in the order of the groups. What a shard held from earlier iterations is equal
//! in all groups and is averaged with it, which changes nothing but, for group counts that are no power of two, its rounding.
//!
//! On a GPU the same happens unit by unit, behind each reduction (`src/comm/nccl/queues.rs`), one all-reduce of the whole shard;
//! what is left of it is done by the end of the backward (`src/gradients/queued.rs`).

use super::values::as_bytes;
use super::{Engine, State};
use crate::comm::{Communicator, ReduceOp};
use crate::dtype::DType;
use crate::error::Result;
use crate::plan::{ParamPlan, UnitPlan};

/// All-reduces over replicas so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReplicaCounters {
    pub all_reduces: u64,
    /// Bytes of this rank's gradients that it gave to them.
    pub all_reduce_bytes: u64,
}

impl Engine {
    /// Collective over the replicas. Nothing happens where there are none.
    pub(super) fn average_over_replicas(&self, state: &mut State) -> Result<()> {
        let Some(replicate) = &self.model.mesh.replicate else { return Ok(()) };
        let reduced = state.gradients.take_reduced(self.plan());
        if let Some(gpu) = &self.gpu {
            state.replicas = gpu.averages();
            return Ok(());
        }
        // A parameter may have been used in one group only: it counts as zero in the others.
        let mut reduced: Vec<u8> = reduced.into_iter().map(u8::from).collect();
        replicate.all_reduce(&mut reduced, DType::U8, ReduceOp::Max)?;
        for unit in &self.plan().units {
            let params = unit.params.iter().filter(|p| reduced[**p as usize] != 0);
            let params: Vec<&ParamPlan> = params.map(|p| &self.plan().params[*p as usize]).collect();
            self.average_unit(state, unit, &params, replicate.as_ref())?;
        }
        Ok(())
    }

    fn average_unit(
        &self,
        state: &mut State,
        unit: &UnitPlan,
        params: &[&ParamPlan],
        comm: &dyn Communicator,
    ) -> Result<()> {
        let store = &self.model.stores[unit.store];
        let mut means: Vec<f32> = Vec::new();
        for p in params {
            let end = means.len() + p.piece.len;
            if store.grads.holds(p.store_param) {
                // SAFETY: the piece lies in this rank's gradient shards, which nobody else writes under the engine's lock.
                means.extend_from_slice(unsafe { std::slice::from_raw_parts(self.shard_grad(p), p.piece.len) });
            }
            means.resize(end, 0.0);
        }
        if !means.is_empty() {
            let bytes = as_bytes(&mut means);
            comm.all_reduce(bytes, DType::F32, ReduceOp::Avg)?;
            state.replicas.all_reduces += 1;
            state.replicas.all_reduce_bytes += bytes.len() as u64;
        }
        let mut rest = &means[..];
        for p in params {
            let (mean, others) = rest.split_at(p.piece.len);
            store.grads.open(p.store_param);
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(mean.as_ptr(), self.shard_grad(p), mean.len()) };
            store.grads.hold(p.store_param);
            rest = others;
        }
        Ok(())
    }
}
