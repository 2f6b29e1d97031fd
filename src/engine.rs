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
use crate::comm::Communicator;
use crate::config::{EngineConfig, Strategy};
use crate::device::{Buffer, Cpu, Device, Home};
use crate::error::{err, Result};
use crate::gradients::{Gradients, HostSlots, Reducer};
use crate::hook::{self, CommHook, HookFn};
use crate::log;
use crate::mesh::Mesh;
use crate::module::{ModuleTree, ParamId};
use crate::order::Order;
use crate::plan::{ParamPlan, Plan, UnitId, UnitPlan};
use crate::schedule::Schedule;
use crate::shards::{ShardStore, ShardedModel};
use crate::timeline::Timeline;
use crate::trace::Trace;
use crate::unit::{AfterForward, Unit, UnitState};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use accumulate::Accumulation;
use gather::Gathers;
use regroup::Group;

mod access;
mod accumulate;
mod full;
mod gather;
mod gpu;
mod iteration;
mod regroup;
mod replicate;
mod stats;
mod values;

pub use access::{FullGradient, Shard};
pub use full::{FullOptions, FullParams};
pub use gpu::CudaStats;
pub use regroup::ReshardAfterForward;
pub use replicate::ReplicaCounters;
pub use stats::{Stats, UnitCounts};

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
    /// What is here of other ranks' shards, where bytes move.
    gathers: Gathers,
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
    /// What `device` is, if it is a GPU: units and gradients move on its queues then.
    gpu: Option<gpu::Gpu>,
    gradient_slot_bytes: u64,
    materialized_peak_bytes: u64,
    saves: Saves,
    timeline: Option<Arc<Timeline>>,
    state: Mutex<State>,
}

/// The engine's lock. What has changed under it goes to the timeline; what was resharded under it is given back.
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
        self.engine.release_resharded(&mut self.state);
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
        config.check()?;
        let mesh = match tree.adopted().first() {
            Some(model) => Mesh::adopted(model, tree, config)?,
            None => Arc::new(Mesh::new(world.clone(), config)?),
        };
        let comm = mesh.shard.clone();
        let tree = &tree.clone().with_engine_dtypes(config);
        let mut plan = Plan::new(tree, comm.rank(), comm.world_size())?;
        if comm.moves_bytes() {
            plan.collect_as_reduced();
        }
        agree::on_model(&plan.description(tree, config), world.as_ref())?;
        let opened = gpu::open(tree, config, world.as_ref())?;
        let device: Arc<dyn Device> = match &opened {
            Some(opened) => opened.device.clone(),
            None => Arc::new(Cpu),
        };
        let first_unit =
            comm.name_units(&(0..plan.units.len() as UnitId).map(|u| plan.unit_name(u)).collect::<Vec<_>>());
        let in_arena = opened.is_none();
        let own = Arc::new(ShardStore::new(comm.clone(), &plan, device.clone(), config.cpu_offload, in_arena)?);
        let stores = Plan::stores(tree, own);
        let slots = config.gradient_slots as usize;
        let (gpu, reducer): (_, Box<dyn Reducer>) = match opened {
            Some(opened) => {
                let (gpu, slots) = opened.start(&plan, config, &mesh, &stores)?;
                (Some(gpu), Box::new(slots))
            }
            None => (None, Box::new(HostSlots::new(comm.clone(), &plan, first_unit, &stores, slots)?)),
        };
        let gradients = Gradients::new(&plan, reducer);
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let mut engine = Engine {
            strategy: config.strategy,
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            first_unit,
            gradient_slot_bytes: match &gpu {
                Some(gpu) => gpu.slot_bytes(),
                None => plan.slot_bytes(slots).iter().sum::<usize>() as u64,
            },
            device,
            gpu,
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
                gathers: Gathers::default(),
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

    /// What does arithmetic on shards, where they have their home.
    pub(crate) fn at_home(&self) -> &dyn Device {
        match self.home {
            Home::Device => self.device.as_ref(),
            Home::Host => &Cpu,
        }
    }

    /// The same for what waits: on a GPU the collectives under way are waited for first, with their deadline.
    pub(crate) fn settled_at_home(&self) -> Result<&dyn Device> {
        if let Some(gpu) = &self.gpu {
            // A hook is called with the queues locked.
            hook::refuse_inside(self.number)?;
            gpu.settle()?;
        }
        Ok(self.at_home())
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

    pub(crate) fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Tells engines apart.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    #[inline]
    fn lock(&self) -> Result<Locked<'_>> {
        // Whoever gets it is not inside of a hook, which runs under it.
        let state = self.state.try_lock().or_else(|_| self.wait_for_lock())?;
        Ok(Locked { engine: self, state })
    }

    #[cold]
    fn wait_for_lock(&self) -> Result<MutexGuard<'_, State>> {
        hook::refuse_inside(self.number)?;
        self.state.lock().map_err(|_| err!(Panic, "the engine is unusable: an earlier call on it failed inside"))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop_reading();
        // The shards' memory goes first.
        self.gpu.iter().for_each(|gpu| gpu.leave());
    }
}
