//! An engine described in JSON, for people and tools: units, parameters, their places on this rank, states, counters.

use crate::engine::Engine;
use crate::error::Result;
use crate::module::ParamId;
use crate::plan::UnitId;
use crate::unit::UnitState;
use serde_json::{json, Value};

impl Engine {
    /// See include/fsdp.h, fsdp_engine_describe, for the fields. Local.
    pub fn describe(&self) -> Result<String> {
        let units =
            (0..self.plan().units.len() as UnitId).map(|u| self.describe_unit(u)).collect::<Result<Vec<_>>>()?;
        let s = self.stats()?;
        let description = json!({
            "rank": self.world().rank(),
            "world_size": self.world().world_size(),
            "shard_group_size": self.comm().world_size(),
            "replica": self.replica(),
            "strategy": self.strategy().name(),
            "stats": {
                "param_shard_bytes": s.param_shard_bytes,
                "grad_shard_bytes": s.grad_shard_bytes,
                "gradient_slot_bytes": s.gradient_slot_bytes,
                "padding_bytes": s.padding_bytes,
                "unit_buffer_bytes": s.unit_buffer_bytes,
                "all_gathers": s.all_gathers,
                "all_gather_bytes": s.all_gather_bytes,
                "all_gather_sent_bytes": s.all_gather_sent_bytes,
                "all_gather_bytes_moved": s.all_gather_bytes_moved,
                "reduce_scatters": s.gradients.reduce_scatters,
                "reduce_scatter_bytes": s.gradients.reduce_scatter_bytes,
                "all_reduces": s.replicas.all_reduces,
                "all_reduce_bytes": s.replicas.all_reduce_bytes,
                "slots_peak": s.gradients.slots_peak,
                "overflow_peak": s.gradients.overflow_peak,
                "materialized_peak_bytes": s.materialized_peak_bytes,
                "prefetches": s.prefetches,
            },
            "units": units,
        });
        Ok(format!("{description:#}"))
    }

    fn describe_unit(&self, unit: UnitId) -> Result<Value> {
        let u = self.unit(unit)?;
        let counts = self.unit_counts(unit)?;
        let params = u.params.iter().map(|p| self.describe_param(*p)).collect::<Result<Vec<_>>>()?;
        Ok(json!({
            "name": u.name,
            "state": if counts.state == UnitState::Unsharded { "unsharded" } else { "sharded" },
            "unit_bytes": u.bytes(),
            "shard_bytes": u.shard_bytes(),
            "all_gathers": counts.all_gathers,
            "reduce_scatters": counts.reduce_scatters,
            "params": params,
        }))
    }

    fn describe_param(&self, param: ParamId) -> Result<Value> {
        let p = self.param(param)?;
        Ok(json!({
            "name": p.fqn,
            "shape": p.shape,
            "unit_offset": self.unit(p.unit)?.layout.offsets[p.index],
            "shard_offset": p.piece.param_offset,
            "shard_numel": p.piece.len,
            "requires_grad": self.requires_grad(param)?,
            "has_grad": !self.shard(param)?.grad.is_null(),
        }))
    }

    /// One line about an engine that was just made.
    pub(crate) fn describe_made(&self) -> String {
        let plan = self.plan();
        let bytes: usize = plan.units.iter().map(|u| u.shard_bytes()).sum();
        format!(
            "rank {} of {}: sharded {} parameters in {} units, {bytes} bytes of them here",
            self.world().rank(),
            self.world().world_size(),
            plan.params.len(),
            plan.units.len()
        )
    }
}
