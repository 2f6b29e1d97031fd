//! Gradients on their way from a unit's backward to this rank's shards.
//!
//! A unit that gets its first gradient *opens*: it takes a slot and collects its full gradients there. When they are
//! complete its reduce-scatter is *started*; this rank's part of it (the mean of its own range, into the gradient shards)
//! is done inside a later hook, as soon as every rank has started it or has ended its backward. A slot is free when every
//! rank has done its part.
//!
//! There are a few *regular* slots, sized as the largest units, and one *spare* slot for each unit. A unit collects in a
//! spare one when other open units have the regular ones, or when waiting for one could be for ever because ranks reduce
//! in different orders. Slots take memory only where they are written; a spare one gives it back.
//!
//! Invariant: a reduction is started at the moment the host says so, whatever slot its unit has.

use crate::comm::{reduce, Communicator, ReduceTarget, Segment, Slots, Tag, Ticket};
use crate::dtype::DType;
use crate::error::Result;
use crate::hook::{CommHook, HookGradient, UnitGradients};
use crate::plan::{Plan, UnitId};
use crate::shards::ShardStore;
use crate::timeline::{self, Timeline};
use std::sync::Arc;

#[derive(Clone, Copy)]
enum SlotUse {
    Free,
    Open,
    Started(Ticket),
}

struct OpenUnit {
    /// None for a unit without elements.
    slot: Option<usize>,
    /// Which parameters have a gradient by now.
    present: Vec<bool>,
    /// A backward that did not reduce has left gradients here.
    kept: bool,
    /// The backward under way has added to them.
    touched: bool,
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
    comm: Arc<dyn Communicator>,
    memory: Slots,
    uses: Vec<SlotUse>,
    /// The slots whose reduce-scatters were started and not yet seen done.
    in_flight: Vec<usize>,
    /// How many regular and spare slots are in use.
    used: [usize; 2],
    /// Regular slots come first.
    regular: usize,
    /// The spare slot of each unit that has elements.
    spare: Vec<Option<usize>>,
    open: Vec<Option<OpenUnit>>,
    /// This rank has started reductions since the last backward ended.
    started: bool,
    means: Means,
    /// Called with each unit's gradients before they are rounded and published.
    pub hook: Option<CommHook>,
    pub counters: GradientCounters,
    /// By unit.
    pub reductions: Vec<u64>,
}

/// Where means go: the pieces of each unit, and the stores that say whether they are added to.
struct Means {
    /// Of each unit's parameters: whether a mean was written since [`Gradients::take_reduced`].
    reduced: Vec<Vec<bool>>,
    segments: Vec<Vec<Segment>>,
    /// Of each unit's parameters: their number in the store.
    params: Vec<Vec<usize>>,
    stores: Vec<Arc<ShardStore>>,
    timeline: Option<Arc<Timeline>>,
    /// When the part that is being done began.
    began: u64,
}

// SAFETY: the raw pointers in the segments point into the stores, which are kept; slots are `Send` for the same reason.
unsafe impl Send for Gradients {}

impl ReduceTarget for Means {
    fn segments(&mut self, unit: usize) -> &[Segment] {
        self.began = self.timeline.as_ref().map_or(0, |_| timeline::now());
        let (segments, params, store) = (&mut self.segments[unit], &self.params[unit], &self.stores[unit]);
        for s in segments.iter_mut() {
            s.accumulate = store.holds(params[s.param]);
        }
        segments
    }

    fn reduced(&mut self, unit: usize, present: &[bool]) {
        for (param, _) in self.params[unit].iter().zip(present).filter(|(_, present)| **present) {
            self.stores[unit].set_held(*param, true);
        }
        for (reduced, present) in self.reduced[unit].iter_mut().zip(present) {
            *reduced |= present;
        }
        if let Some(timeline) = self.timeline.as_ref().filter(|_| self.began > 0) {
            timeline.unit_span("reduce", unit as UnitId, std::mem::take(&mut self.began));
        }
    }
}

impl Gradients {
    /// Collective: allocates the slots. `first_unit` is the communicator's number of unit 0, `stores` the plan's.
    pub fn new(
        comm: Arc<dyn Communicator>,
        plan: &Plan,
        first_unit: u32,
        stores: &[Arc<ShardStore>],
        slots: usize,
    ) -> Result<Gradients> {
        let flags = plan.units.iter().map(|u| u.params.len()).max().unwrap_or(0);
        let mut sizes = plan.slot_bytes(slots);
        let regular = sizes.len();
        let mut spare = Vec::new();
        for unit in &plan.units {
            spare.push((unit.bytes() > 0).then_some(sizes.len()));
            sizes.extend(Some(unit.bytes()).filter(|bytes| *bytes > 0));
        }
        let units = plan.units.len() as UnitId;
        let memory = comm.alloc_slots(&sizes, flags, first_unit..first_unit + units)?;
        let of_unit = |u: &crate::plan::UnitPlan| stores[u.store].clone();
        let numbers = |p: &u32| plan.params[*p as usize].store_param;
        Ok(Gradients {
            uses: vec![SlotUse::Free; sizes.len()],
            in_flight: Vec::new(),
            used: [0; 2],
            regular,
            spare,
            open: (0..units).map(|_| None).collect(),
            started: false,
            means: Means {
                reduced: plan.units.iter().map(|u| vec![false; u.params.len()]).collect(),
                segments: (0..units)
                    .map(|u| plan.segments(u, comm.rank(), of_unit(&plan.units[u as usize]).grads.as_ptr()))
                    .collect(),
                params: plan.units.iter().map(|u| u.params.iter().map(numbers).collect()).collect(),
                stores: plan.units.iter().map(of_unit).collect(),
                timeline: None,
                began: 0,
            },
            memory,
            comm,
            hook: None,
            counters: GradientCounters::default(),
            reductions: vec![0; units as usize],
        })
    }

    /// Where this rank's parts of reductions are shown.
    pub fn set_timeline(&mut self, timeline: Option<Arc<Timeline>>) {
        self.means.timeline = timeline;
    }

    /// Bytes of the slots in use.
    pub fn used_bytes(&self) -> u64 {
        let used = self.uses.iter().zip(&self.memory.slots).filter(|(u, _)| !matches!(u, SlotUse::Free));
        used.map(|(_, slot)| slot.bytes as u64).sum()
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
        let take = |p: &crate::plan::ParamPlan| std::mem::take(&mut self.means.reduced[p.unit as usize][p.index]);
        plan.params.iter().map(take).collect()
    }

    /// The full gradient region of parameter `index` of `unit`, and whether it already holds a gradient of this
    /// backward (add to it) or not (overwrite it). It counts as present from here on. Opens the unit, which may wait
    /// for a slot.
    pub fn region(&mut self, plan: &Plan, unit: UnitId, index: usize) -> Result<(*mut f32, bool)> {
        let found = self.reserve(plan, unit, index)?;
        self.open[unit as usize].as_mut().expect("opened above").present[index] = true;
        Ok(found)
    }

    /// As `region`, but what is written there does not count as a gradient yet.
    pub fn reserve(&mut self, plan: &Plan, unit: UnitId, index: usize) -> Result<(*mut f32, bool)> {
        if self.open[unit as usize].is_none() {
            self.open_unit(plan, unit)?;
        }
        let open = self.open[unit as usize].as_mut().expect("opened above");
        let base = open.slot.map_or(std::ptr::null_mut(), |s| self.memory.slots[s].data.cast::<f32>());
        open.touched = true;
        Ok((base.wrapping_add(plan.units[unit as usize].layout.offsets[index]), open.present[index]))
    }

    /// The gradients of `unit` are complete: starts its reduce-scatter as the communicator's unit `number`. A unit that
    /// is not open has nothing to reduce.
    pub fn start(&mut self, plan: &Plan, unit: UnitId, number: u32) -> Result<()> {
        let Some(open) = self.open[unit as usize].take() else { return Ok(()) };
        let Some(slot) = open.slot else {
            // Nothing to send: its parameters have a gradient if they have one here.
            self.means.reduced(unit as usize, &open.present);
            return Ok(());
        };
        let (layout, dtype) = (&plan.units[unit as usize].layout, plan.units[unit as usize].reduce_dtype);
        let bytes = (layout.len * dtype.size()) as u64;
        if let Err(e) = self.run_hook(plan, unit, slot, &open.present) {
            self.free(slot);
            return Err(e);
        }
        if dtype != DType::F32 {
            let data = self.memory.slots[slot].data;
            for (index, _) in open.present.iter().enumerate().filter(|(_, present)| **present) {
                let (at, len) = (layout.offsets[index], layout.numels[index]);
                // SAFETY: the slot holds the unit's floats. Parameters lie in ascending order, and a narrower one never
                // reaches the floats of those that follow.
                unsafe { reduce::narrow(dtype, data.cast::<f32>().add(at), data.add(at * 2), len) };
            }
        }
        if self.comm.moves_bytes() {
            // What another rank has a gradient for is summed as a whole.
            for (index, _) in open.present.iter().enumerate().filter(|(_, present)| !**present) {
                let (at, bytes) = (layout.offsets[index] * dtype.size(), layout.numels[index] * dtype.size());
                // SAFETY: the parameter's place in the slot, in elements of the reduce dtype.
                unsafe { self.memory.slots[slot].data.add(at).write_bytes(0, bytes) };
            }
        }
        let tag = Tag { kind: crate::comm::Kind::ReduceScatter, unit: number, dtype, bytes };
        let ticket = self.comm.reduce_start(tag, &self.memory.slots[slot], &open.present)?;
        self.uses[slot] = SlotUse::Started(ticket);
        self.in_flight.push(slot);
        self.started = true;
        self.counters.reduce_scatters += 1;
        self.reductions[unit as usize] += 1;
        self.counters.reduce_scatter_bytes += bytes;
        self.progress()
    }

    fn run_hook(&self, plan: &Plan, unit: UnitId, slot: usize, present: &[bool]) -> Result<()> {
        let Some(hook) = &self.hook else { return Ok(()) };
        let u = &plan.units[unit as usize];
        let base = self.memory.slots[slot].data.cast::<f32>();
        let there = present.iter().enumerate().filter(|(_, present)| **present);
        let gradients: Vec<HookGradient> = there
            .map(|(index, _)| HookGradient {
                param: u.params[index],
                data: base.wrapping_add(u.layout.offsets[index]),
                numel: u.layout.numels[index],
            })
            .collect();
        if gradients.is_empty() {
            return Ok(());
        }
        hook.run(&UnitGradients { unit, name: &u.name, gradients: &gradients })
    }

    /// Makes `unit` take part in its next reduction even if it has no gradient on this rank, so that the other ranks'
    /// part of it need not wait for the end of this one's backward.
    pub fn join(&mut self, plan: &Plan, unit: UnitId) -> Result<()> {
        match self.open[unit as usize].is_none() && self.spare[unit as usize].is_some() {
            true => self.open_unit(plan, unit),
            false => Ok(()),
        }
    }

    /// Starts every open unit, in order; unit 0 is the communicator's `first_unit`.
    pub fn start_all(&mut self, plan: &Plan, first_unit: u32) -> Result<()> {
        (0..self.open.len() as UnitId).try_for_each(|unit| self.start(plan, unit, first_unit + unit))
    }

    /// Does this rank's part of what every rank has started by now.
    pub fn progress(&mut self) -> Result<()> {
        self.comm.reduce_ready(self.memory.id, &mut self.means)
    }

    /// Ends a backward: returns when this rank's part of everything that any rank has started is done. Collective.
    pub fn end(&mut self) -> Result<()> {
        self.comm.reduce_end(self.memory.id, &mut self.means)?;
        self.started = false;
        self.release()
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
            if let Some(slot) = self.open[unit].take_if(|open| discard(open)).and_then(|open| open.slot) {
                self.free(slot);
            }
        }
    }

    fn open_unit(&mut self, plan: &Plan, unit: UnitId) -> Result<()> {
        let u = &plan.units[unit as usize];
        let slot = match self.spare[unit as usize] {
            None => None,
            Some(spare) => Some(self.acquire(u.bytes(), spare)?),
        };
        if let Some(slot) = slot {
            self.uses[slot] = SlotUse::Open;
            self.used[(slot >= self.regular) as usize] += 1;
        }
        let present = vec![false; u.params.len()];
        self.open[unit as usize] = Some(OpenUnit { slot, present, kept: false, touched: false });
        self.counters.slots_peak = self.counters.slots_peak.max(self.used[0]);
        self.counters.overflow_peak = self.counters.overflow_peak.max(self.used[1]);
        Ok(())
    }

    /// A slot for a unit of `bytes`: of the smallest regular kind that fits among those no open unit has, a free one,
    /// else the one that was started first, waited for; else the unit's spare one.
    fn acquire(&mut self, bytes: usize, spare: usize) -> Result<usize> {
        self.release()?;
        let fits = |i: &usize| self.memory.slots[*i].bytes >= bytes && !matches!(self.uses[*i], SlotUse::Open);
        let kind = (0..self.regular).filter(fits).map(|i| self.memory.slots[i].bytes).min();
        let candidates = (0..self.regular).filter(fits).filter(|i| Some(self.memory.slots[*i].bytes) == kind);
        let first = candidates.min_by_key(|i| match self.uses[*i] {
            SlotUse::Started(ticket) => Some(ticket),
            _ => None,
        });
        for slot in first.into_iter().chain([spare]) {
            match self.uses[slot] {
                SlotUse::Free => return Ok(slot),
                SlotUse::Open => {}
                SlotUse::Started(ticket) => {
                    // A spare slot is waited for only when the unit is reduced twice in one backward.
                    if self.comm.reduce_wait(ticket, &mut self.means, slot != spare)? {
                        self.free(slot);
                        return Ok(slot);
                    }
                }
            }
        }
        unreachable!("a unit that is being opened has not got its spare slot open")
    }

    /// Frees the slots that every rank has read.
    fn release(&mut self) -> Result<()> {
        let mut at = 0;
        while at < self.in_flight.len() {
            let slot = self.in_flight[at];
            match self.uses[slot] {
                SlotUse::Started(ticket) if self.comm.reduce_done(ticket)? => self.free(slot),
                _ => at += 1,
            }
        }
        Ok(())
    }

    /// The slot is free.
    fn free(&mut self, slot: usize) {
        self.uses[slot] = SlotUse::Free;
        self.in_flight.retain(|s| *s != slot);
        self.used[(slot >= self.regular) as usize] -= 1;
        if slot >= self.regular {
            self.comm.trim_slot(self.memory.id, &self.memory.slots[slot]);
        }
    }
}
