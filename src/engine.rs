//! The engine: units, their shards and their gradients, moved through an iteration by the hooks a host calls.
//!
//! An iteration is a READ phase (every rank computes with every rank's shards) and then a WRITE phase (every rank
//! updates its own shards). The first unshard opens the READ phase; `finish_backward` or `finish_forward` closes it;
//! shards may be written once *every* rank has closed it. On shared pages this is what keeps a rank from reading half
//! an update; see ARCHITECTURE.md.
//!
//! One lock: a host may call from several threads, one call runs at a time. After an error of a collective the
//! communicator is broken and every later call returns that error.

use crate::agree;
use crate::checkpoint::Saves;
use crate::comm::{Communicator, Kind, Tag};
use crate::config::{EngineConfig, Strategy};
use crate::device::{Buffer, Cpu, Device, Home};
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::gradients::{GradientCounters, Gradients};
use crate::hook::{self, CommHook, HookFn};
use crate::log;
use crate::mesh::Mesh;
use crate::module::{ModuleTree, ParamId};
use crate::order::{Deviation, Order};
use crate::plan::{ParamPlan, Plan, UnitId, UnitPlan};
use crate::precision;
use crate::schedule::Schedule;
use crate::shards::{ShardStore, ShardedModel};
use crate::timeline::{self, Memory, Timeline};
use crate::trace::Trace;
use crate::unit::{AfterForward, Unit, UnitState};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use accumulate::Accumulation;
use regroup::Group;

mod accumulate;
mod full;
mod regroup;
mod replicate;
mod values;

pub use full::{FullOptions, FullParams};
pub use regroup::ReshardAfterForward;
pub use replicate::ReplicaCounters;

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
    /// The 16-bit compute copies of all units; on shm one copy a host.
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

struct State {
    /// In an iteration: units are or may be unsharded.
    reading: bool,
    grad_enabled: bool,
    /// The host holds full parameters outside of an iteration.
    summoned: bool,
    units: Vec<Unit>,
    /// By parameter.
    requires_grad: Vec<bool>,
    gradients: Gradients,
    order: Order,
    /// What to gather ahead.
    schedule: Option<Schedule>,
    /// Smaller groups that units are resharded to after their forward.
    groups: Vec<Group>,
    accumulation: Accumulation,
    all_gathers: u64,
    all_gather_bytes: u64,
    all_gather_sent_bytes: u64,
    cast_bytes: u64,
    prefetches: u64,
    replicas: ReplicaCounters,
}

/// See the module's text.
pub struct Engine {
    model: Arc<ShardedModel>,
    strategy: Strategy,
    /// Tells engines that share stores apart.
    number: u64,
    /// The communicator's number of unit 0.
    first_unit: u32,
    device: Arc<dyn Device>,
    home: Home,
    gradient_slot_bytes: u64,
    materialized_peak_bytes: u64,
    saves: Saves,
    timeline: Option<Arc<Timeline>>,
    state: Mutex<State>,
}

/// The engine's lock. What has changed under it goes to the timeline.
struct Locked<'a> {
    engine: &'a Engine,
    state: MutexGuard<'a, State>,
}

impl Deref for Locked<'_> {
    type Target = State;
    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if let Some(timeline) = &self.engine.timeline {
            timeline.observe(&self.state.units, self.state.order.in_forward(), self.engine.memory(&self.state));
        }
    }
}

impl Engine {
    /// Plans the units of `tree`, allocates shards and slots, and copies this rank's cut of every parameter. Parameters
    /// without storage are initialized one unit at a time; those of adopted models stay where they are. Collective: every
    /// rank passes the same tree and configuration, and an error names the first parameter that differs.
    ///
    /// # Safety
    /// Every parameter's `data` must be null or readable for its `numel()` elements, and aligned for them.
    pub unsafe fn new(tree: &ModuleTree, world: Arc<dyn Communicator>, config: &EngineConfig) -> Result<Engine> {
        if let Some(other) = tree.adopted().iter().find(|m| !Arc::ptr_eq(&m.mesh.world, &world)) {
            return Err(err!(InvalidArgument, "the {other:?} that was added is sharded over another communicator"));
        }
        agree::on_options(config, world.as_ref())?;
        let mesh = match tree.adopted().first() {
            Some(model) => Mesh::adopted(model, tree, config)?,
            None => Arc::new(Mesh::new(world.clone(), config)?),
        };
        let comm = mesh.shard.clone();
        let device: Arc<dyn Device> = Arc::new(Cpu);
        let tree = &tree.clone().with_engine_dtypes(config);
        let plan = Plan::new(tree, comm.rank(), comm.world_size())?;
        agree::on_model(&plan.description(tree, config), world.as_ref())?;
        let first_unit =
            comm.name_units(&(0..plan.units.len() as UnitId).map(|u| plan.unit_name(u)).collect::<Vec<_>>());
        let own = Arc::new(ShardStore::new(comm.clone(), &plan, device.clone(), config.cpu_offload)?);
        let stores = Plan::stores(tree, own);
        let slots = config.gradient_slots as usize;
        let gradients = Gradients::new(comm.clone(), &plan, first_unit, &stores, slots)?;
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let mut engine = Engine {
            strategy: config.strategy,
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            first_unit,
            gradient_slot_bytes: plan.slot_bytes(slots).iter().sum::<usize>() as u64,
            device,
            home: if config.cpu_offload { Home::Host } else { Home::Device },
            materialized_peak_bytes: 0,
            saves: Saves::default(),
            timeline: None,
            state: Mutex::new(State {
                reading: false,
                grad_enabled: true,
                summoned: false,
                units: plan.units.iter().map(|u| Unit::new(u.label(), AfterForward::Keep)).collect(),
                requires_grad: plan.params.iter().map(|p| p.requires_grad).collect(),
                gradients,
                order: Order::new(config.order_check),
                schedule: None,
                groups: Vec::new(),
                accumulation: Accumulation::default(),
                all_gathers: 0,
                all_gather_bytes: 0,
                all_gather_sent_bytes: 0,
                cast_bytes: 0,
                prefetches: 0,
                replicas: ReplicaCounters::default(),
            }),
            model: Arc::new(ShardedModel { tree: tree.clone().without_host(), plan, stores, mesh }),
        };
        let defaults: Vec<_> =
            (0..engine.plan().units.len() as UnitId).map(|u| engine.default_after_forward(u)).collect();
        for (unit, after) in engine.lock()?.units.iter_mut().zip(defaults) {
            unit.after_forward = after;
        }
        // SAFETY: the caller's promise.
        engine.materialized_peak_bytes = unsafe { engine.take_values(tree, config) }?;
        engine.timeline = Timeline::open(engine.world().as_ref(), engine.plan(), engine.number)?.map(Arc::new);
        engine.lock()?.gradients.set_timeline(engine.timeline.clone());
        log::info(|| engine.describe_made());
        Ok(engine)
    }

    /// What another engine needs in order to adopt this one's units.
    pub fn model(&self) -> &Arc<ShardedModel> {
        &self.model
    }

    pub fn plan(&self) -> &Plan {
        &self.model.plan
    }

    /// The shard group: the ranks that this engine's shards are spread over.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.model.mesh.shard
    }

    /// All ranks of the engine, of every shard group.
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.model.mesh.world
    }

    /// Memory where this engine's shards have their home; `what` names the purpose in an error.
    pub(crate) fn alloc_home(&self, len: usize, what: &str) -> Result<Buffer> {
        self.device.alloc(self.home, len, what)
    }

    /// The number of this rank's shard group; 0 where all ranks are one.
    pub fn replica(&self) -> usize {
        self.model.mesh.replica()
    }

    /// This engine's saves in the background.
    pub(crate) fn saves(&self) -> &Saves {
        &self.saves
    }

    pub fn unit(&self, unit: UnitId) -> Result<&UnitPlan> {
        self.plan().units.get(unit as usize).ok_or_else(|| {
            err!(InvalidArgument, "unit {unit} does not exist: the engine has {} units", self.plan().units.len())
        })
    }

    pub fn param(&self, param: ParamId) -> Result<&ParamPlan> {
        self.plan().params.get(param as usize).ok_or_else(|| {
            err!(InvalidArgument, "parameter {param} does not exist: the engine has {}", self.plan().params.len())
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

    /// Whether a parameter gets gradients from the next backward on. Local.
    pub fn set_requires_grad(&self, param: ParamId, requires_grad: bool) -> Result<()> {
        let p = self.param(param)?;
        let mut state = self.lock()?;
        if let Some(unit) = state.gradients.collecting() {
            return Err(err!(
                InvalidState,
                "parameter \"{}\" cannot be frozen or trained in the middle of a backward: unit \"{}\" is collecting \
                 gradients",
                p.fqn,
                self.plan().units[unit as usize].label()
            ));
        }
        state.requires_grad[param as usize] = requires_grad;
        Ok(())
    }

    /// Issues all-gathers one unit ahead, in the order in which `trace` entered units (and its reverse in backward).
    /// The same on every rank. Local.
    pub fn set_prefetch_order(&self, trace: &Trace) -> Result<()> {
        let params = self.plan().params.iter().map(|p| p.fqn.as_str());
        trace.check_fits(self.plan().unit_of_module.len(), params)?;
        self.lock()?.schedule = Some(Schedule::new(trace.unit_order(self.plan())));
        Ok(())
    }

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
        let writable = self.waiting("every rank to read no more", || self.wait_writable());
        self.model.mesh.spread(writable)?;
        Ok(f())
    }

    /// Ends a forward that no backward followed; an error that begins with `doing` in a backward.
    fn end_forward_locked(&self, state: &mut State, doing: &str) -> Result<()> {
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

    /// The address of a full parameter in its compute dtype: in the unit buffer, or among the compute copies. An error
    /// while its unit is sharded.
    pub fn param_data(&self, param: ParamId) -> Result<*mut u8> {
        let p = self.param(param)?;
        self.lock()?.units[p.unit as usize].require_unsharded()?;
        if p.compute != DType::F32 {
            return Ok(self
                .store(p.unit)
                .copy_at(self.plan().units[p.unit as usize].compute_offset + p.compute_offset));
        }
        let offset = self.plan().units[p.unit as usize].layout.offsets[p.index] * DType::F32.size();
        Ok(self.unit_buffer(p.unit).wrapping_add(offset))
    }

    /// The region for a parameter's full gradient, and whether it holds one already (add) or not (overwrite). Counts as
    /// written. May wait for a slot.
    pub fn param_grad(&self, param: ParamId) -> Result<(*mut f32, bool)> {
        let p = self.param(param)?;
        let mut state = self.lock()?;
        if !state.requires_grad[param as usize] {
            return Err(err!(InvalidState, "parameter \"{}\" does not require a gradient", p.fqn));
        }
        if !state.reading {
            return Err(err!(
                InvalidState,
                "parameter \"{}\" gets a gradient outside an iteration: no unit was unsharded since the last one ended",
                p.fqn
            ));
        }
        state.gradients.region(self.plan(), p.unit, p.index)
    }

    /// Adds `grad` (the parameter's `numel` elements of `dtype`, in its shape's order) in float32 to what this backward has
    /// collected for it. `dtype` is float32 or the one that the parameter is computed in.
    ///
    /// # Safety
    /// `grad` must be readable for the parameter's elements, and aligned for them.
    pub unsafe fn accumulate_grad(&self, param: ParamId, dtype: DType, grad: *const u8) -> Result<()> {
        let p = self.param(param)?;
        if dtype != DType::F32 && dtype != p.compute {
            let (f32, compute) = (DType::F32, p.compute);
            let or = if compute == f32 { String::new() } else { format!(" or {compute}, which it is computed in") };
            return Err(err!(InvalidArgument, "the gradient of \"{}\" is {dtype}: it can be {f32}{or}", p.fqn));
        }
        let (region, held) = self.param_grad(param)?;
        let len = self.plan().units[p.unit as usize].layout.numels[p.index];
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the region has room for the parameter, and no peer reads it before its unit is reduced; `grad` is the
        // caller's promise.
        unsafe {
            match held {
                false => precision::widen(dtype, grad, region, len),
                true => precision::add(dtype, grad, region, len),
            }
        }
        Ok(())
    }

    /// This rank's piece of a parameter and of its gradient.
    pub fn shard(&self, param: ParamId) -> Result<Shard> {
        let p = self.param(param)?;
        let holds = self.store(p.unit).holds(p.store_param);
        let grad = if holds { self.shard_grad(p) } else { std::ptr::null_mut() };
        Ok(Shard { data: self.shard_data(param as usize), grad, len: p.piece.len })
    }

    /// Forgets a parameter's gradient shard; the next reduction overwrites it. Local.
    pub fn clear_grad(&self, param: ParamId) -> Result<()> {
        let p = self.param(param)?;
        let _one_at_a_time = self.lock()?;
        self.store(p.unit).set_held(p.store_param, false);
        Ok(())
    }

    /// Forgets all gradients, also those that backwards without reduction have left. Local.
    pub fn zero_grad(&self) -> Result<()> {
        let mut state = self.lock()?;
        state.gradients.discard_kept();
        state.gradients.take_reduced(self.plan());
        self.plan().params.iter().for_each(|p| self.store(p.unit).set_held(p.store_param, false));
        Ok(())
    }

    pub fn stats(&self) -> Result<Stats> {
        let state = self.lock()?;
        Ok(Stats {
            param_shard_bytes: self.plan().units.iter().map(|u| u.shard_bytes() as u64).sum(),
            grad_shard_bytes: self.plan().units.iter().map(|u| u.grad_shard_bytes() as u64).sum(),
            gradient_slot_bytes: self.gradient_slot_bytes,
            padding_bytes: self.plan().padding_bytes() as u64,
            unit_buffer_bytes: self.plan().units.iter().map(|u| u.arena_bytes() as u64).sum(),
            all_gathers: state.all_gathers,
            all_gather_bytes: state.all_gather_bytes,
            all_gather_sent_bytes: state.all_gather_sent_bytes,
            all_gather_bytes_moved: state.cast_bytes,
            materialized_peak_bytes: self.materialized_peak_bytes,
            prefetches: state.prefetches,
            compute_buffer_bytes: self.plan().units.iter().map(|u| u.compute_bytes as u64).sum(),
            offloaded_bytes: self.offloaded_bytes(),
            gradients: state.gradients.counters,
            replicas: state.replicas,
        })
    }

    /// Calls `hook` with each unit's gradients on this rank just before they are rounded and published; None: nothing.
    /// Local. See [`crate::hook`].
    pub fn set_comm_hook(&self, hook: Option<HookFn>) -> Result<()> {
        let comms = self.model.mesh.comms();
        let hook = hook.map(|function| CommHook { engine: self.number, function, comms });
        // Dropped after the lock: dropping it may run code of the host.
        let _old = std::mem::replace(&mut self.lock()?.gradients.hook, hook);
        Ok(())
    }

    /// Runs `f` while nothing moves: gradient shards are final. An error that says what else `can_be_done` in the middle of
    /// an iteration with a backward.
    pub(crate) fn between_iterations<T>(&self, can_be_done: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let state = self.lock()?;
        if state.reading && (state.gradients.started() || state.gradients.collecting().is_some()) {
            return Err(err!(InvalidState, "{can_be_done} when the backward has ended"));
        }
        f()
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

    pub(crate) fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Tells engines apart.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The host reads no unit any more, wherever it was in an iteration: other ranks may wait for that. Local.
    pub fn stop_reading(&self) {
        self.model.stores.iter().for_each(|s| s.close(self.number));
        self.timeline.iter().for_each(|t| t.flush());
    }

    // ---- internals ----

    fn lock(&self) -> Result<Locked<'_>> {
        if hook::inside(self.number) {
            return Err(err!(InvalidState, "a communication hook cannot call the engine that it was called by"));
        }
        let locked = self.state.lock().map(|state| Locked { engine: self, state });
        locked.map_err(|_| err!(Panic, "the engine is unusable: an earlier call on it failed inside"))
    }

    /// Runs `f`, which waits for other ranks; shown as a wait for `what`.
    fn waiting<T>(&self, what: &str, f: impl FnOnce() -> T) -> T {
        let Some(timeline) = &self.timeline else { return f() };
        let start = timeline::now();
        let done = f();
        timeline.wait_span(what, start);
        done
    }

    fn wait_writable(&self) -> Result<()> {
        self.model.stores.iter().try_for_each(|s| s.wait_writable())
    }

    fn memory(&self, state: &State) -> Memory {
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

    fn store(&self, unit: UnitId) -> &ShardStore {
        &self.model.stores[self.plan().units[unit as usize].store]
    }

    fn offloaded_bytes(&self) -> u64 {
        let offloaded = |u: &&UnitPlan| self.model.stores[u.store].offloads();
        self.plan().units.iter().filter(offloaded).map(|u| u.grad_shard_bytes() as u64).sum()
    }

    fn unit_buffer(&self, unit: UnitId) -> *mut u8 {
        match &self.plan().units[unit as usize] {
            u if u.bytes() == 0 => std::ptr::null_mut(),
            u => self.store(unit).arena.base.wrapping_add(u.arena_offset),
        }
    }

    fn shard_data(&self, param: usize) -> *mut f32 {
        let p = &self.plan().params[param];
        let offset = self.plan().units[p.unit as usize].arena_offset + p.piece.unit_offset * DType::F32.size();
        self.store(p.unit).master_at(self.place_in_shards(p), offset)
    }

    /// The first float of a parameter's piece among this rank's gradient shards.
    fn place_in_shards(&self, p: &ParamPlan) -> usize {
        let unit = &self.plan().units[p.unit as usize];
        unit.grad_offset + p.piece.unit_offset - unit.layout.shard(self.comm().rank()).start
    }

    fn shard_grad(&self, p: &ParamPlan) -> *mut f32 {
        self.store(p.unit).grads.as_ptr().wrapping_add(self.place_in_shards(p))
    }

    fn begin_forward_locked(&self, state: &mut State, training: bool) {
        state.units.iter_mut().for_each(Unit::reshard);
        state.order.begin_forward(training);
        state.schedule.iter_mut().for_each(Schedule::restart);
    }

    fn unshard_locked(&self, state: &mut State, unit: UnitId) -> Result<()> {
        self.model.mesh.spread(self.try_unshard(state, unit))
    }

    fn try_unshard(&self, state: &mut State, unit: UnitId) -> Result<()> {
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
        if !state.units[unit as usize].take_gathered() {
            self.all_gather(state, unit)?;
        }
        self.prefetch(state, unit)?;
        state.gradients.progress()?;
        // Last: after an error the next call meets it again.
        state.units[unit as usize].state = UnitState::Unsharded;
        self.timeline.iter().for_each(|t| t.unit_span("unshard", unit, start));
        log::debug(|| {
            format!("rank {}: unit \"{}\" is unsharded", self.world().rank(), self.plan().units[unit as usize].label())
        });
        Ok(())
    }

    fn all_gather(&self, state: &mut State, unit: UnitId) -> Result<()> {
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
        self.waiting(u.label(), || comm.all_gather(tag, arena, check))?;
        let ranks = comm.world_size();
        state.all_gathers += 1;
        state.units[unit as usize].all_gathers += 1;
        let bytes = u.gathered_bytes(&self.plan().params);
        state.all_gather_bytes += bytes as u64;
        state.all_gather_sent_bytes += (bytes * (ranks - 1)).div_ceil(ranks) as u64;
        Ok(())
    }

    /// Issues the all-gather of the unit that comes after `unit`, if an order was given.
    fn prefetch(&self, state: &mut State, unit: UnitId) -> Result<()> {
        let forward = state.order.in_forward();
        let Some(next) = state.schedule.as_mut().and_then(|s| s.next_after(unit, forward)) else { return Ok(()) };
        if state.units[next as usize].is_sharded_and_not_gathered() {
            self.all_gather(state, next)?;
            state.units[next as usize].set_gathered();
            state.prefetches += 1;
        }
        Ok(())
    }

    fn warn_about_order(&self, deviation: Deviation) {
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

    fn reduce_locked(&self, state: &mut State, unit: UnitId) -> Result<()> {
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
        let started = joined.and_then(|()| state.gradients.start(self.plan(), unit, self.first_unit + unit));
        self.model.mesh.spread(started)
    }

    fn finish_forward_locked(&self, state: &mut State) -> Result<()> {
        state.gradients.discard_open();
        self.close(state, false);
        match state.gradients.started() {
            true => self.model.mesh.spread(state.gradients.end()),
            false => Ok(()),
        }
    }

    fn finish_backward_locked(&self, state: &mut State) -> Result<()> {
        self.model.mesh.spread(self.try_finish_backward(state))
    }

    fn try_finish_backward(&self, state: &mut State) -> Result<()> {
        let Accumulation { requires_gradient_sync, is_last_backward, requires_all_reduce } = state.accumulation;
        match requires_gradient_sync {
            true => state.gradients.start_all(self.plan(), self.first_unit)?,
            false => state.gradients.keep(),
        }
        if !is_last_backward {
            self.end_pass(state, true);
            return state.gradients.progress();
        }
        // Before waiting for the reductions: whoever has finished those then knows that nobody reads any more.
        self.close(state, true);
        if requires_gradient_sync || state.gradients.started() {
            self.waiting("every rank's gradients", || state.gradients.end())?;
            if requires_all_reduce {
                self.waiting("the replicas", || self.average_over_replicas(state))?;
            }
        }
        if !requires_gradient_sync {
            // Where other ranks reduce, this is a mismatch at once, before anybody takes a step.
            self.comm().barrier()?;
            self.model.mesh.replicate.iter().try_for_each(|r| r.barrier())?;
        }
        self.waiting("every rank to read no more", || self.wait_writable())?;
        self.timeline.iter().for_each(|t| t.end_iteration());
        let (rank, c) = (self.world().rank(), state.gradients.counters);
        log::debug(|| format!("rank {rank}: a backward has ended; {} reduce-scatters so far", c.reduce_scatters));
        Ok(())
    }

    /// The forward, and the backward if there was one, have ended.
    fn end_pass(&self, state: &mut State, backward: bool) {
        state.units.iter_mut().for_each(Unit::reset);
        if let Some(deviation) = state.order.end_iteration(backward && state.reading) {
            self.warn_about_order(deviation);
        }
    }

    fn close(&self, state: &mut State, backward: bool) {
        self.end_pass(state, backward);
        if std::mem::take(&mut state.reading) {
            state.groups.iter().for_each(|g| g.comm.close_reads(&g.arena));
        }
        self.model.stores.iter().for_each(|s| s.close(self.number));
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop_reading();
    }
}
