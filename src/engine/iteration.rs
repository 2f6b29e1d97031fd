//! An iteration: the hooks a host calls around each unit's forward and backward, and what they are made of.

use super::accumulate::Accumulation;
use super::{Engine, State};
use crate::comm::{Kind, Tag};
use crate::device::Home;
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::log;
use crate::order::Deviation;
use crate::plan::{Plan, UnitId};
use crate::schedule::Schedule;
use crate::timeline;
use crate::unit::{Unit, UnitState};

impl Engine {
    /// A forward of the whole model begins: units that the last one left unsharded are resharded, and the order of
    /// unshards is recorded or, for a `training` one, compared. Local.
    pub fn begin_forward(&self, training: bool) -> Result<()> {
        self.begin_forward_locked(&mut *self.lock()?, training);
        Ok(())
    }

    /// The forward of the whole model has ended: what is unsharded from here on is for a backward. Local.
    pub fn end_forward(&self) -> Result<()> {
        self.lock()?.order.end_forward();
        Ok(())
    }

    // ---- the four hooks ----

    /// Before a unit's forward: unshards it. The root's begins a forward.
    pub fn pre_forward(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        let mut state = self.lock()?;
        if unit == Plan::ROOT_UNIT && !state.order.in_forward() {
            let training = state.grad_enabled;
            self.begin_forward_locked(&mut state, training);
        }
        self.unshard_locked(&mut state, unit)?;
        state.units[unit as usize].enter_forward();
        Ok(())
    }

    /// After a unit's forward: reshards it, unless it is kept for its backward. The root's ends an iteration that no backward
    /// follows.
    pub fn post_forward(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        let mut state = self.lock()?;
        let grad_enabled = state.grad_enabled;
        if state.units[unit as usize].leave_forward(grad_enabled)? {
            match grad_enabled {
                true => state.units[unit as usize].reshard_after_forward(),
                false => state.units[unit as usize].reshard(),
            }
            if unit == Plan::ROOT_UNIT {
                state.order.end_forward();
                if !grad_enabled {
                    return self.finish_forward_locked(&mut state);
                }
            }
        }
        state.gradients.progress()
    }

    /// Before a unit's backward: unshards it. There must have been a forward with gradients enabled.
    pub fn pre_backward(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        let mut state = self.lock()?;
        state.order.end_forward();
        state.units[unit as usize].enter_backward()?;
        self.unshard_locked(&mut state, unit)
    }

    /// After a unit's backward. When it was that of the unit's last use: reduces its gradients (a rank may have none) and
    /// reshards it; the root's ends the iteration as `finish_backward` does.
    pub fn post_backward(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        let mut state = self.lock()?;
        if !state.units[unit as usize].leave_backward()? {
            return Ok(());
        }
        self.reduce_locked(&mut state, unit)?;
        state.units[unit as usize].reshard();
        match unit {
            Plan::ROOT_UNIT => self.finish_backward_locked(&mut state),
            _ => Ok(()),
        }
    }

    // ---- what the hooks are made of ----

    /// Returns the unit buffer, whose parameters can be read until the unit is resharded. Collective; nothing happens
    /// when the unit is unsharded already. Null for a unit without elements.
    pub fn unshard(&self, unit: UnitId) -> Result<*mut u8> {
        self.unit(unit)?;
        self.unshard_locked(&mut *self.lock()?, unit)?;
        Ok(self.unit_buffer(unit))
    }

    /// The host reads this unit's parameters no more. Local; nothing happens when it is sharded already.
    pub fn reshard(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        let mut state = self.lock()?;
        state.units[unit as usize].reshard();
        state.gradients.progress()
    }

    /// The host reads this unit's parameters no more until a backward does: reshards it as after a forward. Local.
    pub fn reshard_after_forward(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        let mut state = self.lock()?;
        state.units[unit as usize].reshard_after_forward();
        state.gradients.progress()
    }

    /// This unit's gradients are complete: starts its reduce-scatter. Collective, does not wait for peers unless every
    /// slot is taken. A rank that has no gradients for the unit takes part with none.
    pub fn reduce(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        self.reduce_locked(&mut *self.lock()?, unit)
    }

    /// Ends an iteration that has no backward: reshards all units, drops gradients being collected, closes the READ
    /// phase. Waits for reductions that were started, else local.
    pub fn finish_forward(&self) -> Result<()> {
        self.finish_forward_locked(&mut *self.lock()?)
    }

    /// Ends a backward: reduces what is left, waits until all gradients are in the shards, reshards all units, and waits
    /// until every rank reads no more, so that shards can be written. Collective.
    pub fn finish_backward(&self) -> Result<()> {
        self.finish_backward_locked(&mut *self.lock()?)
    }

    /// From its return until the next unshard this rank may write its shards. Nothing to do after `finish_backward`;
    /// else it ends a forward that no backward followed, and waits until every rank has done so too.
    pub fn begin_write(&self) -> Result<()> {
        self.write(|| ())
    }

    /// `begin_write`, and then `f` before any other call on this engine.
    pub(crate) fn write<T>(&self, f: impl FnOnce() -> T) -> Result<T> {
        let mut state = self.lock()?;
        self.end_forward_locked(&mut state, "parameters cannot be written yet")?;
        self.model.stores.iter().try_for_each(|s| s.require_free(self.number))?;
        let writable = self.waiting("every rank to read no more", || self.wait_writable(&state));
        self.model.mesh.spread(writable)?;
        Ok(f())
    }

    /// Ends a forward that no backward followed; an error that begins with `doing` in a backward.
    pub(super) fn end_forward_locked(&self, state: &mut State, doing: &str) -> Result<()> {
        if !state.reading {
            return Ok(());
        }
        if let Some(unit) = state.gradients.collecting() {
            return Err(err!(
                InvalidState,
                "{doing}: the backward has not ended, unit \"{}\" has gradients to reduce",
                self.plan().units[unit as usize].label()
            ));
        }
        if state.gradients.started() {
            return Err(err!(InvalidState, "{doing}: the backward has not ended"));
        }
        self.finish_forward_locked(state)
    }

    /// The host reads no unit any more, wherever it was in an iteration: other ranks may wait for that. Local.
    pub fn stop_reading(&self) {
        self.model.stores.iter().for_each(|s| s.close(self.number));
        self.timeline.iter().for_each(|t| t.flush());
    }

    /// Runs `f`, which waits for other ranks; shown as a wait for `what`.
    pub(super) fn waiting<T>(&self, what: &str, f: impl FnOnce() -> T) -> T {
        let Some(timeline) = &self.timeline else { return f() };
        let start = timeline::now();
        let done = f();
        timeline.wait_span(what, start);
        done
    }

    pub(super) fn wait_writable(&self, state: &State) -> Result<()> {
        self.model.stores.iter().try_for_each(|s| s.wait_writable())?;
        let on_host = self.home == Home::Host;
        self.gpu.iter().try_for_each(|gpu| gpu.begin_write(&state.units, &state.groups, on_host))
    }

    pub(super) fn begin_forward_locked(&self, state: &mut State, training: bool) {
        state.units.iter_mut().for_each(Unit::reshard);
        state.order.begin_forward(training);
        state.schedule.iter_mut().for_each(Schedule::restart);
    }

    pub(super) fn unshard_locked(&self, state: &mut State, unit: UnitId) -> Result<()> {
        self.model.mesh.spread(self.try_unshard(state, unit))
    }

    pub(super) fn try_unshard(&self, state: &mut State, unit: UnitId) -> Result<()> {
        if state.units[unit as usize].state == UnitState::Unsharded {
            return Ok(());
        }
        if state.summoned {
            return Err(err!(InvalidState, "no iteration can begin while full parameters are open: close them first"));
        }
        let start = self.timeline.as_ref().map_or(0, |_| timeline::now());
        if !state.reading {
            let stores = &self.model.stores;
            stores.iter().try_for_each(|s| s.require_free(self.number))?;
            self.gpu.iter().try_for_each(|gpu| gpu.begin_read(&state.units, &state.groups))?;
            state.reading = true;
            let open = || {
                let mut cast_bytes = 0;
                for store in stores {
                    cast_bytes += store.open(self.number)?;
                }
                state.groups.iter().try_for_each(|g| g.comm.open_reads(&g.arena))?;
                Ok(cast_bytes)
            };
            state.cast_bytes += self.waiting("every rank to begin", open)?;
        }
        if let Some(deviation) = state.order.record(unit) {
            self.warn_about_order(deviation);
        }
        self.bring(state, unit)?;
        state.gradients.progress()?;
        // Last: after an error the next call meets it again.
        state.units[unit as usize].state = UnitState::Unsharded;
        self.timeline.iter().for_each(|t| t.unit_span("unshard", unit, start));
        log::debug(|| {
            format!("rank {}: unit \"{}\" is unsharded", self.world().rank(), self.plan().units[unit as usize].label())
        });
        Ok(())
    }

    pub(super) fn all_gather(&self, state: &mut State, unit: UnitId) -> Result<()> {
        let u = &self.plan().units[unit as usize];
        if u.bytes() == 0 {
            return Ok(());
        }
        let kind = if state.order.in_forward() { Kind::ForwardAllGather } else { Kind::AllGather };
        let (comm, arena, first_unit) = match state.units[unit as usize].group.map(|g| &state.groups[g]) {
            Some(group) => (&group.comm, &group.arena, group.first_unit),
            None => (self.comm(), &self.store(unit).arena, self.first_unit),
        };
        let tag = Tag { kind, unit: first_unit + unit, dtype: DType::F32, bytes: u.bytes() as u64 };
        let check = state.order.check();
        let ranks = comm.world_size();
        match comm.moves_bytes() {
            true => self.start_gather(state, unit, tag)?,
            false => self.waiting(u.label(), || comm.all_gather(tag, arena, check))?,
        }
        state.all_gathers += 1;
        state.units[unit as usize].all_gathers += 1;
        let bytes = u.gathered_bytes(&self.plan().params);
        state.all_gather_bytes += bytes as u64;
        state.all_gather_sent_bytes += (bytes * (ranks - 1)).div_ceil(ranks) as u64;
        Ok(())
    }

    /// Issues the all-gather of the unit that comes after `unit`, if an order was given.
    pub(super) fn prefetch(&self, state: &mut State, unit: UnitId) -> Result<()> {
        let forward = state.order.in_forward();
        let Some(next) = state.schedule.as_mut().and_then(|s| s.next_after(unit, forward)) else { return Ok(()) };
        if state.units[next as usize].is_sharded_and_not_gathered() {
            self.all_gather(state, next)?;
            state.units[next as usize].set_gathered();
            state.prefetches += 1;
        }
        Ok(())
    }

    pub(super) fn warn_about_order(&self, deviation: Deviation) {
        let name = |unit: Option<UnitId>| match unit {
            Some(unit) => self.plan().unit_name(unit).to_string(),
            None => "nothing more".to_string(),
        };
        log::warn(&format!(
            "Forward order differs from that of the first iteration on rank {}. Collectives are matched by unit: one that \
             this rank skips counts as zero in the gradients, and nothing waits for it. It unshards {} where the first \
             iteration had {}. This is the only warning",
            self.comm().rank(),
            name(deviation.unit),
            name(deviation.first)
        ));
    }

    pub(super) fn reduce_locked(&self, state: &mut State, unit: UnitId) -> Result<()> {
        let u = &self.plan().units[unit as usize];
        if !state.reading {
            return Err(err!(
                InvalidState,
                "unit \"{}\" is reduced outside an iteration: no unit was unsharded since the last one ended",
                u.label()
            ));
        }
        state.order.end_forward();
        if !state.accumulation.requires_gradient_sync {
            return Ok(());
        }
        let trained = u.params.iter().any(|p| state.requires_grad[*p as usize]);
        let joined = if trained { state.gradients.join(self.plan(), unit) } else { Ok(()) };
        let started = joined.and_then(|()| state.gradients.start(self.plan(), unit));
        self.model.mesh.spread(started)
    }

    pub(super) fn finish_forward_locked(&self, state: &mut State) -> Result<()> {
        state.gradients.discard_open();
        self.close(state, false);
        match state.gradients.started() {
            true => self.model.mesh.spread(state.gradients.end(self.plan())),
            false => Ok(()),
        }
    }

    pub(super) fn finish_backward_locked(&self, state: &mut State) -> Result<()> {
        self.model.mesh.spread(self.try_finish_backward(state))
    }

    pub(super) fn try_finish_backward(&self, state: &mut State) -> Result<()> {
        let Accumulation { requires_gradient_sync, is_last_backward, requires_all_reduce } = state.accumulation;
        match requires_gradient_sync {
            true => state.gradients.start_all(self.plan())?,
            false => state.gradients.keep(),
        }
        if !is_last_backward {
            self.end_pass(state, true);
            return state.gradients.progress();
        }
        // Before waiting for the reductions: whoever has finished those then knows that nobody reads any more.
        self.close(state, true);
        if requires_gradient_sync || state.gradients.started() {
            self.waiting("every rank's gradients", || state.gradients.end(self.plan()))?;
            if requires_all_reduce {
                self.waiting("the replicas", || self.average_over_replicas(state))?;
            }
        }
        if !requires_gradient_sync {
            // Where other ranks reduce, this is a mismatch at once, before anybody takes a step.
            self.comm().barrier()?;
            self.model.mesh.replicate.iter().try_for_each(|r| r.barrier())?;
        }
        self.waiting("every rank to read no more", || self.wait_writable(state))?;
        self.timeline.iter().for_each(|t| t.end_iteration());
        let (rank, c) = (self.world().rank(), state.gradients.counters());
        log::debug(|| format!("rank {rank}: a backward has ended; {} reduce-scatters so far", c.reduce_scatters));
        Ok(())
    }

    /// The forward, and the backward if there was one, have ended.
    pub(super) fn end_pass(&self, state: &mut State, backward: bool) {
        state.units.iter_mut().for_each(Unit::reset);
        if let Some(deviation) = state.order.end_iteration(backward && state.reading) {
            self.warn_about_order(deviation);
        }
    }

    pub(super) fn close(&self, state: &mut State, backward: bool) {
        self.end_pass(state, backward);
        if std::mem::take(&mut state.reading) {
            state.groups.iter().for_each(|g| g.comm.close_reads(&g.arena));
            self.gpu.iter().for_each(|gpu| gpu.end_read());
        }
        self.model.stores.iter().for_each(|s| s.close(self.number));
    }
}
