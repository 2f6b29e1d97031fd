//! Gradients on their way from a unit's backward to this rank's shards.
//!
//! A unit that gets its first gradient *opens*: it takes a slot and collects its full gradients there. When they are
//! complete its reduce-scatter is *started*; this rank's part of it (the mean of its own range, into the gradient shards)
//! is done later, and the slot is free again when nobody needs it any more.
//!
//! Which unit is open and which of its parameters have a gradient is kept here. Slots, and what is done with them, are a
//! [`Reducer`]'s: `slots` in memory that the host computes on, `queued` on a GPU.
//!
//! A unit that collects in 16 bits ([`UnitPlan::grad_dtype`]) has two places for each parameter in its slot: one in that
//! type, for a gradient that is written once, and one in float32 behind all of those, for one that is added to. So nothing
//! is rounded that would not be in float32 throughout. Which of the two counts is published with the slot ([`Held`]).
//!
//! Invariant: a reduction is started at the moment the host says so, whatever slot its unit has.

use crate::comm::Held;
use crate::dtype::DType;
use crate::error::Result;
use crate::hook::{CommHook, HookGradient, UnitGradients};
use crate::plan::{Plan, UnitId, UnitPlan};
use crate::precision;
use crate::timeline::Timeline;
use std::ffi::c_void;
use std::sync::Arc;

pub mod queued;
mod slots;

pub use slots::HostSlots;

/// A slot that a unit collects in.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub slot: usize,
    /// Its start, on the device.
    pub data: *mut f32,
}

// SAFETY: a plain address in memory that the reducer keeps; used under the engine's lock.
unsafe impl Send for Place {}

/// What a host does with gradients before they are reduced; it is given the stream to do it on, null on the CPU.
pub type Change<'a> = &'a mut dyn FnMut(*mut c_void) -> Result<()>;

/// Slots for full gradients, and what brings them to the shards.
pub trait Reducer: Send {
    /// A slot for `unit`, which has elements and none now. May wait for one.
    fn acquire(&mut self, plan: &Plan, unit: UnitId) -> Result<Place>;
    /// The gradients in the unit's slot are not wanted.
    fn discard(&mut self, unit: UnitId, place: Place);
    /// Starts the reduce-scatter of what the unit has collected, after `change`: `held` says of each of its parameters what.
    /// The slot is the unit's no more. `change` breaks the communicators if it fails.
    fn start(
        &mut self,
        plan: &Plan,
        unit: UnitId,
        place: Place,
        held: &[Held],
        change: Option<Change<'_>>,
    ) -> Result<()>;
    /// The unit, which could collect in 16 bits, uses float32 places of its slot.
    fn widened(&mut self, _plan: &Plan, _unit: UnitId, _place: Place) {}
    /// A unit without elements has nothing to send: its parameters have a gradient if they have one here.
    fn reduced(&mut self, unit: UnitId, present: &[bool]);
    /// Does this rank's part of what can be done now. Does not wait.
    fn progress(&mut self) -> Result<()>;
    /// Ends a backward: returns when this rank's part of everything that any rank has started is done. Collective.
    fn end(&mut self, plan: &Plan) -> Result<()>;
    /// Of each parameter: whether a mean was written to its gradient shard since the last call.
    fn take_reduced(&mut self, plan: &Plan) -> Vec<bool>;
    /// Bytes of the slots in use.
    fn used_bytes(&self) -> u64;
    /// Most regular slots, and most others, in use at once.
    fn peaks(&self) -> [usize; 2];
    /// Where this rank's parts of reductions are shown.
    fn set_timeline(&mut self, timeline: Option<Arc<Timeline>>);
}

struct OpenUnit {
    /// None for a unit without elements.
    place: Option<Place>,
    /// Of each parameter: its gradient so far.
    held: Vec<Held>,
    /// What is written once stays in 16 bits. Not where it will be added to, or seen by a hook: it would be widened then.
    narrow: bool,
    /// A backward that did not reduce has left gradients here.
    kept: bool,
    /// The backward under way has added to them.
    touched: bool,
}

/// Where a parameter's full gradient goes.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// The parameter's elements, of `dtype`.
    pub data: *mut u8,
    pub dtype: DType,
    /// It holds a gradient of this backward, to be added to; else it is to be overwritten.
    pub held: bool,
}

/// Counts that tests and `fsdp_engine_stats` read.
#[derive(Clone, Copy, Debug, Default)]
pub struct GradientCounters {
    pub reduce_scatters: u64,
    /// Bytes of the gradients that this rank published for them.
    pub reduce_scatter_bytes: u64,
    /// Most regular slots in use at once.
    pub slots_peak: usize,
    /// Most spare slots in use at once.
    pub overflow_peak: usize,
}

/// See the module's text. Used under the engine's lock.
pub struct Gradients {
    reducer: Box<dyn Reducer>,
    open: Vec<Option<OpenUnit>>,
    /// This rank has started reductions since the last backward ended.
    started: bool,
    /// Called with each unit's gradients before they are rounded and published.
    pub hook: Option<CommHook>,
    /// Backwards leave their gradients for later ones to add to.
    pub adds_later: bool,
    counters: GradientCounters,
    /// By unit.
    pub reductions: Vec<u64>,
}

impl Gradients {
    pub fn new(plan: &Plan, reducer: Box<dyn Reducer>) -> Gradients {
        Gradients {
            reducer,
            open: plan.units.iter().map(|_| None).collect(),
            started: false,
            hook: None,
            adds_later: false,
            counters: GradientCounters::default(),
            reductions: vec![0; plan.units.len()],
        }
    }

    /// Where this rank's parts of reductions are shown.
    pub fn set_timeline(&mut self, timeline: Option<Arc<Timeline>>) {
        self.reducer.set_timeline(timeline);
    }

    pub fn counters(&self) -> GradientCounters {
        let [slots_peak, overflow_peak] = self.reducer.peaks();
        GradientCounters { slots_peak, overflow_peak, ..self.counters }
    }

    /// Bytes of the slots in use.
    pub fn used_bytes(&self) -> u64 {
        self.reducer.used_bytes()
    }

    /// Whether this rank has started reductions since the last backward ended.
    pub fn started(&self) -> bool {
        self.started
    }

    /// A unit that is collecting gradients of a backward under way.
    pub fn collecting(&self) -> Option<UnitId> {
        let collects = |open: &OpenUnit| !open.kept || open.touched;
        self.open.iter().position(|u| u.as_ref().is_some_and(collects)).map(|u| u as UnitId)
    }

    /// The backward has ended and reduces nothing: what was collected stays, for later ones to add to.
    pub fn keep(&mut self) {
        for open in self.open.iter_mut().flatten() {
            (open.kept, open.touched) = (true, false);
        }
    }

    /// Of each parameter: whether a mean was written to its gradient shard since the last call.
    pub fn take_reduced(&mut self, plan: &Plan) -> Vec<bool> {
        self.reducer.take_reduced(plan)
    }

    /// The place for a full gradient of `dtype` of parameter `index` of `unit`. It counts as there from here on. Opens the
    /// unit, which may wait for a slot.
    pub fn region(&mut self, plan: &Plan, unit: UnitId, index: usize, dtype: DType) -> Result<Region> {
        let found = self.reserve(plan, unit, index, dtype)?;
        let held = if found.dtype == DType::F32 { Held::Float32 } else { Held::Narrow };
        self.open[unit as usize].as_mut().expect("opened above").held[index] = held;
        Ok(found)
    }

    /// As `region`, but what is written there does not count as a gradient yet.
    pub fn reserve(&mut self, plan: &Plan, unit: UnitId, index: usize, dtype: DType) -> Result<Region> {
        if self.open[unit as usize].is_none() {
            self.open_unit(plan, unit)?;
        }
        let u = &plan.units[unit as usize];
        let open = self.open[unit as usize].as_mut().expect("opened above");
        open.touched = true;
        let held = open.held[index].is_there();
        let base = open.place.map_or(std::ptr::null_mut(), |p| p.data);
        if u.grad_dtype != DType::F32 {
            if open.narrow && !held && dtype == u.grad_dtype {
                return Ok(Region { data: narrow_place(u, base, index), dtype, held });
            }
            self.widen(plan, unit, index);
        }
        Ok(Region { data: wide_place(u, base, index).cast(), dtype: DType::F32, held })
    }

    /// What an open unit holds of a parameter is in float32 from here on, and so is what it will hold.
    fn widen(&mut self, plan: &Plan, unit: UnitId, index: usize) {
        let u = &plan.units[unit as usize];
        let Some((open, place)) = self.open[unit as usize].as_mut().and_then(|o| o.place.map(|place| (o, place)))
        else {
            return;
        };
        self.reducer.widened(plan, unit, place);
        if open.held[index] == Held::Narrow {
            let (from, to) = (narrow_place(u, place.data, index), wide_place(u, place.data, index));
            // SAFETY: both places lie in the unit's slot, apart from each other, and have the parameter's elements.
            unsafe { precision::widen(u.grad_dtype, from, to, u.layout.numels[index]) };
            open.held[index] = Held::Float32;
        }
    }

    /// The gradients of `unit` are complete: starts its reduce-scatter. A unit that is not open has nothing to reduce.
    pub fn start(&mut self, plan: &Plan, unit: UnitId) -> Result<()> {
        if self.hook.is_some() && plan.units[unit as usize].grad_dtype != DType::F32 {
            (0..plan.units[unit as usize].params.len()).for_each(|index| self.widen(plan, unit, index));
        }
        let Some(open) = self.open[unit as usize].take() else { return Ok(()) };
        let Some(place) = open.place else {
            let present: Vec<bool> = open.held.iter().map(|h| h.is_there()).collect();
            self.reducer.reduced(unit, &present);
            return Ok(());
        };
        let u = &plan.units[unit as usize];
        let gradients = self.hook.as_ref().map_or(Vec::new(), |_| hook_gradients(u, place, &open.held));
        let hook = self.hook.as_ref().filter(|_| !gradients.is_empty());
        let mut change =
            hook.map(|hook| |stream| hook.run(&UnitGradients { unit, name: &u.name, gradients: &gradients, stream }));
        self.reducer.start(plan, unit, place, &open.held, change.as_mut().map(|change| change as Change<'_>))?;
        self.started = true;
        self.counters.reduce_scatters += 1;
        self.reductions[unit as usize] += 1;
        self.counters.reduce_scatter_bytes += (u.layout.len * u.reduce_dtype.size()) as u64;
        self.progress()
    }

    /// Makes `unit` take part in its next reduction even if it has no gradient on this rank, so that the other ranks'
    /// part of it need not wait for the end of this one's backward.
    pub fn join(&mut self, plan: &Plan, unit: UnitId) -> Result<()> {
        match self.open[unit as usize].is_none() && plan.units[unit as usize].bytes() > 0 {
            true => self.open_unit(plan, unit),
            false => Ok(()),
        }
    }

    /// Starts every open unit, in order.
    pub fn start_all(&mut self, plan: &Plan) -> Result<()> {
        (0..self.open.len() as UnitId).try_for_each(|unit| self.start(plan, unit))
    }

    /// Does this rank's part of what every rank has started by now.
    pub fn progress(&mut self) -> Result<()> {
        self.reducer.progress()
    }

    /// Ends a backward: returns when this rank's part of everything that any rank has started is done. Collective.
    pub fn end(&mut self, plan: &Plan) -> Result<()> {
        self.reducer.end(plan)?;
        self.started = false;
        Ok(())
    }

    /// Drops gradients of a backward that failed or was given up, with what its units had kept from earlier ones, since
    /// it was added to. Started reductions go on.
    pub fn discard_open(&mut self) {
        self.discard_where(|open| !open.kept || open.touched);
    }

    /// Drops what backwards that did not reduce have left.
    pub fn discard_kept(&mut self) {
        self.discard_where(|open| open.kept);
    }

    fn discard_where(&mut self, discard: impl Fn(&OpenUnit) -> bool) {
        for unit in 0..self.open.len() {
            if let Some(place) = self.open[unit].take_if(|open| discard(open)).and_then(|open| open.place) {
                self.reducer.discard(unit as UnitId, place);
            }
        }
    }

    fn open_unit(&mut self, plan: &Plan, unit: UnitId) -> Result<()> {
        let u = &plan.units[unit as usize];
        let place = match u.bytes() {
            0 => None,
            _ => Some(self.reducer.acquire(plan, unit)?),
        };
        let held = vec![Held::Nothing; u.params.len()];
        let narrow = u.grad_dtype != DType::F32 && !self.adds_later && self.hook.is_none();
        self.open[unit as usize] = Some(OpenUnit { place, held, narrow, kept: false, touched: false });
        Ok(())
    }
}

/// The gradients that a unit holds in its slot, as hooks see them.
fn hook_gradients(u: &UnitPlan, place: Place, held: &[Held]) -> Vec<HookGradient> {
    let there = held.iter().enumerate().filter(|(_, held)| held.is_there());
    let gradient = |(index, _)| HookGradient {
        param: u.params[index],
        data: wide_place(u, place.data, index),
        numel: u.layout.numels[index],
    };
    there.map(gradient).collect()
}

/// A parameter's place in 16 bits in its unit's slot, which starts at `base`.
fn narrow_place(u: &UnitPlan, base: *mut f32, index: usize) -> *mut u8 {
    base.cast::<u8>().wrapping_add(u.layout.offsets[index] * u.grad_dtype.size())
}

/// Its place in float32.
fn wide_place(u: &UnitPlan, base: *mut f32, index: usize) -> *mut f32 {
    base.wrapping_byte_add(u.wide_offset()).wrapping_add(u.layout.offsets[index])
}
