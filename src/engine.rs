//! The engine: units, their shards and their gradients, moved through an iteration by the hooks a host calls.
//!
//! An iteration is a READ phase (every rank computes with every rank's shards) and then a WRITE phase (every rank
//! updates its own shards). The first unshard opens the READ phase; `finish_backward` or `finish_forward` closes it;
//! shards may be written once *every* rank has closed it. On shared pages this is what keeps a rank from reading half
//! an update; see ARCHITECTURE.md.
//!
//! One lock: a host may call from several threads, one call runs at a time. After an error of a collective the
//! communicator is broken and every later call returns that error.

use crate::comm::{Arena, Communicator, Kind, Tag};
use crate::config::EngineConfig;
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use crate::gradients::{GradientCounters, Gradients};
use crate::module::{ModuleTree, ParamId};
use crate::plan::{ParamPlan, Plan, UnitId, UnitPlan};
use crate::unit::{Unit, UnitState};
use std::sync::{Arc, Mutex, MutexGuard};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Own shards may be written.
    Writable,
    /// Units are or may be unsharded.
    Reading,
    /// This rank reads no more, others may.
    Closed,
}

/// A parameter's piece on this rank.
#[derive(Clone, Copy, Debug)]
pub struct Shard {
    pub data: *mut f32,
    /// Null while there is no gradient.
    pub grad: *mut f32,
    /// Elements of each.
    pub len: usize,
}

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
    /// All unit buffers, each on a line of its own; on shm one copy a host.
    pub unit_buffer_bytes: u64,
    pub all_gathers: u64,
    /// Bytes that all-gathers copied; 0 on shared pages.
    pub all_gather_bytes_moved: u64,
    pub gradients: GradientCounters,
}

struct State {
    phase: Phase,
    grad_enabled: bool,
    units: Vec<Unit>,
    gradients: Gradients,
    all_gathers: u64,
}

/// See the module's text.
pub struct Engine {
    comm: Arc<dyn Communicator>,
    plan: Plan,
    arena: Arena,
    /// The communicator's number of unit 0.
    first_unit: u32,
    grad_shards: usize,
    gradient_slot_bytes: u64,
    state: Mutex<State>,
}

impl Engine {
    /// Plans the units of `tree`, allocates shards and slots, and copies this rank's cut of every parameter. Collective:
    /// every rank passes the same tree and configuration, and an error names the first parameter that differs.
    ///
    /// # Safety
    /// Every parameter's `data` must be readable for its `numel()` floats.
    pub unsafe fn new(tree: &ModuleTree, comm: Arc<dyn Communicator>, config: &EngineConfig) -> Result<Engine> {
        let plan = Plan::new(tree, comm.rank(), comm.world_size())?;
        agree(&plan.description(tree), config, comm.as_ref())?;
        let names: Vec<String> = plan.units.iter().map(|u| u.label().to_string()).collect();
        let first_unit = comm.name_units(&names);
        let arena = comm.alloc_arena(plan.arena_bytes)?;
        let gradients = Gradients::new(comm.clone(), &plan, config.gradient_slots as usize)?;
        let engine = Engine {
            first_unit,
            grad_shards: gradients.shards() as usize,
            gradient_slot_bytes: plan.slot_bytes(config.gradient_slots as usize).iter().sum::<usize>() as u64,
            state: Mutex::new(State {
                phase: Phase::Writable,
                grad_enabled: true,
                units: plan.units.iter().map(|u| Unit::new(u.label())).collect(),
                gradients,
                all_gathers: 0,
            }),
            comm,
            plan,
            arena,
        };
        for (p, param) in tree.params().iter().enumerate() {
            let piece = &engine.plan.params[p].piece;
            let from = param.data.cast::<f32>().wrapping_add(piece.param_offset);
            // SAFETY: the piece lies inside the parameter, which the caller says is readable, and inside this rank's
            // shard, which no rank reads before this one opens a READ phase.
            unsafe { std::ptr::copy_nonoverlapping(from, engine.shard_data(p), piece.len) };
        }
        Ok(engine)
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.comm
    }

    pub fn unit(&self, unit: UnitId) -> Result<&UnitPlan> {
        self.plan.units.get(unit as usize).ok_or_else(|| {
            err!(InvalidArgument, "unit {unit} does not exist: the engine has {} units", self.plan.units.len())
        })
    }

    pub fn param(&self, param: ParamId) -> Result<&ParamPlan> {
        self.plan.params.get(param as usize).ok_or_else(|| {
            err!(InvalidArgument, "parameter {param} does not exist: the engine has {}", self.plan.params.len())
        })
    }

    pub fn unit_state(&self, unit: UnitId) -> Result<UnitState> {
        self.unit(unit)?;
        Ok(self.lock()?.units[unit as usize].state)
    }

    /// Whether a backward follows the forwards from here on. Local.
    pub fn set_grad_enabled(&self, enabled: bool) -> Result<()> {
        self.lock()?.grad_enabled = enabled;
        Ok(())
    }

    // ---- the four hooks ----

    /// Before a unit's forward: unshards it.
    pub fn pre_forward(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        let mut state = self.lock()?;
        self.unshard_locked(&mut state, unit)?;
        state.units[unit as usize].enter_forward();
        Ok(())
    }

    /// After a unit's forward: reshards it. The root's ends an iteration that no backward follows.
    pub fn post_forward(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        let mut state = self.lock()?;
        let grad_enabled = state.grad_enabled;
        if state.units[unit as usize].leave_forward(grad_enabled)? {
            state.units[unit as usize].state = UnitState::Sharded;
            if unit == Plan::ROOT_UNIT && !grad_enabled {
                return self.finish_forward_locked(&mut state);
            }
        }
        state.gradients.progress(&self.plan, false)
    }

    /// Before a unit's backward: unshards it. There must have been a forward with gradients enabled.
    pub fn pre_backward(&self, unit: UnitId) -> Result<()> {
        self.unit(unit)?;
        let mut state = self.lock()?;
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
        state.units[unit as usize].state = UnitState::Sharded;
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
        state.units[unit as usize].state = UnitState::Sharded;
        state.gradients.progress(&self.plan, false)
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
        let mut state = self.lock()?;
        if state.phase == Phase::Reading {
            if let Some(unit) = state.gradients.unfinished() {
                return Err(err!(
                    InvalidState,
                    "parameters cannot be written yet: the backward has not ended, unit \"{}\" has gradients to reduce",
                    self.plan.units[unit as usize].label()
                ));
            }
            self.finish_forward_locked(&mut state)?;
        }
        if state.phase == Phase::Closed {
            self.comm.wait_writable(&self.arena)?;
            state.phase = Phase::Writable;
        }
        Ok(())
    }

    /// The address of a full parameter in the unit buffer; an error while its unit is sharded.
    pub fn param_data(&self, param: ParamId) -> Result<*mut u8> {
        let p = self.param(param)?;
        self.lock()?.units[p.unit as usize].require_unsharded()?;
        let offset = self.plan.units[p.unit as usize].layout.offsets[p.index] * DType::F32.size();
        Ok(self.unit_buffer(p.unit).wrapping_add(offset))
    }

    /// The region for a parameter's full gradient, and whether it holds one already (add) or not (overwrite). Counts as
    /// written. May wait for a slot.
    pub fn param_grad(&self, param: ParamId) -> Result<(*mut f32, bool)> {
        let p = self.param(param)?;
        if !p.requires_grad {
            return Err(err!(InvalidState, "parameter \"{}\" does not require a gradient", p.fqn));
        }
        let mut state = self.lock()?;
        if state.phase != Phase::Reading {
            return Err(err!(
                InvalidState,
                "parameter \"{}\" gets a gradient outside an iteration: no unit was unsharded since the last one ended",
                p.fqn
            ));
        }
        state.gradients.region(&self.plan, p.unit, p.index)
    }

    /// Adds `grad` (the parameter's `numel` floats, in its shape's order) to what this backward has collected for it.
    ///
    /// # Safety
    /// `grad` must be readable for the parameter's elements.
    pub unsafe fn accumulate_grad(&self, param: ParamId, grad: *const f32) -> Result<()> {
        let (region, held) = self.param_grad(param)?;
        let p = self.param(param)?;
        let len = self.plan.units[p.unit as usize].layout.numels[p.index];
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the region has room for the parameter, and no peer reads it before its unit is reduced.
        let region = unsafe { std::slice::from_raw_parts_mut(region, len) };
        // SAFETY: the caller's promise.
        let grad = unsafe { std::slice::from_raw_parts(grad, len) };
        match held {
            false => region.copy_from_slice(grad),
            true => region.iter_mut().zip(grad).for_each(|(sum, g)| *sum += g),
        }
        Ok(())
    }

    /// This rank's piece of a parameter and of its gradient.
    pub fn shard(&self, param: ParamId) -> Result<Shard> {
        let p = self.param(param)?;
        let holds = self.lock()?.gradients.holds(param as usize);
        let grad = if holds { self.shard_grad(p) } else { std::ptr::null_mut() };
        Ok(Shard { data: self.shard_data(param as usize), grad, len: p.piece.len })
    }

    /// Forgets a parameter's gradient; the next reduction overwrites it. Local.
    pub fn clear_grad(&self, param: ParamId) -> Result<()> {
        self.param(param)?;
        self.lock()?.gradients.clear(param as usize);
        Ok(())
    }

    /// Forgets all gradients. Local.
    pub fn zero_grad(&self) -> Result<()> {
        let mut state = self.lock()?;
        (0..self.plan.params.len()).for_each(|p| state.gradients.clear(p));
        Ok(())
    }

    pub fn stats(&self) -> Result<Stats> {
        let state = self.lock()?;
        let shards = (self.plan.shard_elements * DType::F32.size()) as u64;
        Ok(Stats {
            param_shard_bytes: self.plan.units.iter().map(|u| u.shard_bytes() as u64).sum(),
            grad_shard_bytes: shards,
            gradient_slot_bytes: self.gradient_slot_bytes,
            padding_bytes: self.plan.padding_bytes() as u64,
            unit_buffer_bytes: self.plan.arena_bytes as u64,
            all_gathers: state.all_gathers,
            all_gather_bytes_moved: 0,
            gradients: state.gradients.counters,
        })
    }

    // ---- internals ----

    fn lock(&self) -> Result<MutexGuard<'_, State>> {
        self.state.lock().map_err(|_| err!(Panic, "the engine is unusable: an earlier call on it failed inside"))
    }

    fn tag(&self, kind: Kind, unit: UnitId) -> Tag {
        let bytes = self.plan.units[unit as usize].bytes() as u64;
        Tag { kind, unit: self.first_unit + unit, dtype: DType::F32, bytes }
    }

    fn unit_buffer(&self, unit: UnitId) -> *mut u8 {
        match &self.plan.units[unit as usize] {
            u if u.bytes() == 0 => std::ptr::null_mut(),
            u => self.arena.base.wrapping_add(u.arena_offset),
        }
    }

    fn shard_data(&self, param: usize) -> *mut f32 {
        let p = &self.plan.params[param];
        let offset = self.plan.units[p.unit as usize].arena_offset + p.piece.unit_offset * DType::F32.size();
        self.arena.base.wrapping_add(offset).cast()
    }

    fn shard_grad(&self, p: &ParamPlan) -> *mut f32 {
        let unit = &self.plan.units[p.unit as usize];
        let at = unit.grad_offset + p.piece.unit_offset - unit.layout.shard(self.comm.rank()).start;
        (self.grad_shards as *mut f32).wrapping_add(at)
    }

    fn unshard_locked(&self, state: &mut State, unit: UnitId) -> Result<()> {
        if state.units[unit as usize].state == UnitState::Unsharded {
            return Ok(());
        }
        if state.phase != Phase::Reading {
            self.comm.open_reads(&self.arena)?;
            state.phase = Phase::Reading;
        }
        if self.plan.units[unit as usize].bytes() > 0 {
            self.comm.all_gather(self.tag(Kind::AllGather, unit), &self.arena)?;
            state.all_gathers += 1;
        }
        state.units[unit as usize].state = UnitState::Unsharded;
        state.gradients.progress(&self.plan, false)
    }

    fn reduce_locked(&self, state: &mut State, unit: UnitId) -> Result<()> {
        if state.phase != Phase::Reading {
            return Err(err!(
                InvalidState,
                "unit \"{}\" is reduced outside an iteration: no unit was unsharded since the last one ended",
                self.plan.units[unit as usize].label()
            ));
        }
        state.gradients.join(&self.plan, unit)?;
        state.gradients.start(&self.plan, unit, self.tag(Kind::ReduceScatter, unit))
    }

    fn finish_forward_locked(&self, state: &mut State) -> Result<()> {
        state.gradients.discard_open();
        state.gradients.progress(&self.plan, true)?;
        self.close(state);
        Ok(())
    }

    fn finish_backward_locked(&self, state: &mut State) -> Result<()> {
        state.gradients.start_all(&self.plan, |unit| self.tag(Kind::ReduceScatter, unit))?;
        // Before waiting for the reductions: whoever has finished those then knows that nobody reads any more.
        self.close(state);
        state.gradients.progress(&self.plan, true)?;
        if state.phase == Phase::Closed {
            self.comm.wait_writable(&self.arena)?;
            state.phase = Phase::Writable;
        }
        Ok(())
    }

    fn close(&self, state: &mut State) {
        state.units.iter_mut().for_each(Unit::reset);
        if state.phase == Phase::Reading {
            self.comm.close_reads(&self.arena);
            state.phase = Phase::Closed;
        }
    }
}

impl Drop for Engine {
    /// Other ranks may still wait for this one to stop reading; it does now.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        if state.phase == Phase::Reading {
            self.comm.close_reads(&self.arena);
        }
    }
}

/// Compares the model and the configuration of all ranks; every rank gets the same error.
fn agree(description: &[String], config: &EngineConfig, comm: &dyn Communicator) -> Result<()> {
    let mine: Vec<&str> = description.iter().map(String::as_str).collect();
    let text = format!("{}\n{}", config.gradient_slots, mine.join("\n"));
    let all = comm.exchange(text.as_bytes())?;
    let differs = |rank: usize| -> Option<Error> {
        if all[rank] == all[0] {
            return None;
        }
        let first = String::from_utf8_lossy(&all[0]);
        let other = String::from_utf8_lossy(&all[rank]);
        let mut pairs = (first.lines(), other.lines());
        if let (Some(a), Some(b)) = (pairs.0.next(), pairs.1.next()) {
            if a != b {
                return Some(err!(Mismatch, "rank 0 has gradient_slots = {a}, but rank {rank} has {b}"));
            }
        }
        loop {
            let (a, b) = (pairs.0.next(), pairs.1.next());
            if a != b {
                let (a, b) = (a.unwrap_or("nothing there"), b.unwrap_or("nothing there"));
                return Some(err!(Mismatch, "ranks have different models: rank 0 has {a}, but rank {rank} has {b}"));
            }
        }
    };
    match (1..all.len()).find_map(differs) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
