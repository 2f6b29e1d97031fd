//! Gradient slots in the communicator's memory, which the host writes, and reductions there.
//!
//! There are a few *regular* slots, sized as the largest units (more where units are small), and one *spare* slot for each unit. A unit collects in a
//! spare one when other open units have the regular ones, or when waiting for one could be for ever because ranks reduce
//! in different orders. Slots take memory only where they are written; a spare one gives it back. A slot is free when every
//! rank has done its part of the reduction, which happens inside hooks, as soon as every rank has started it or has ended its
//! backward.
//!
//! A slot for units that collect in 16 bits has addresses behind its own bytes for the same gradients in float32, and
//! gives its memory back when it is free if it took some there.

use super::{Change, Place, Reducer};
use crate::comm::{reduce, Communicator, Held, Kind, ReduceTarget, Segment, Slots, Tag, Ticket};
use crate::dtype::DType;
use crate::error::Result;
use crate::plan::{Plan, UnitId, UnitPlan};
use crate::shards::ShardStore;
use crate::timeline::{self, Timeline};
use std::sync::Arc;

#[derive(Clone, Copy)]
enum SlotUse {
    Free,
    Open,
    Started(Ticket),
}

/// See the module's text.
pub struct HostSlots {
    comm: Arc<dyn Communicator>,
    memory: Slots,
    /// Bytes of each slot as it is counted: without the float32 places of units that collect in 16 bits.
    sizes: Vec<usize>,
    uses: Vec<SlotUse>,
    /// How far the unit in each slot reaches beyond them.
    beyond: Vec<usize>,
    /// The slots whose reduce-scatters were started and not yet seen done.
    in_flight: Vec<usize>,
    /// How many regular and spare slots are in use, and were at most.
    used: [usize; 2],
    peaks: [usize; 2],
    /// Regular slots come first.
    regular: usize,
    /// The spare slot of each unit that has elements.
    spare: Vec<Option<usize>>,
    /// The communicator's number of unit 0.
    first_unit: u32,
    means: Means,
}

/// Where means go: the pieces of each unit, and the stores that say whether they are added to.
struct Means {
    /// Of each unit's parameters: whether a mean was written since [`Gradients::take_reduced`].
    reduced: Vec<Vec<bool>>,
    segments: Vec<Vec<Segment>>,
    /// The first element of this rank's shard of each unit.
    starts: Vec<usize>,
    /// Of each unit's parameters: their number in the store.
    params: Vec<Vec<usize>>,
    stores: Vec<Arc<ShardStore>>,
    timeline: Option<Arc<Timeline>>,
    /// When the part that is being done began.
    began: u64,
}

// SAFETY: the raw pointers in the segments point into the stores, which are kept; slots are `Send` for the same reason.
unsafe impl Send for HostSlots {}

impl ReduceTarget for Means {
    fn segments(&mut self, unit: usize) -> &[Segment] {
        self.began = self.timeline.as_ref().map_or(0, |_| timeline::now());
        let (segments, params, grads) = (&mut self.segments[unit], &self.params[unit], &self.stores[unit].grads);
        if let Some(first) = segments.first() {
            let shard = grads.open(params[first.param]);
            for s in segments.iter_mut() {
                s.out = shard.wrapping_add(s.offset - self.starts[unit]);
                s.accumulate = grads.holds(params[s.param]);
            }
        }
        segments
    }

    fn reduced(&mut self, unit: usize, present: &[bool]) {
        for (param, _) in self.params[unit].iter().zip(present).filter(|(_, present)| **present) {
            self.stores[unit].grads.hold(*param);
        }
        for (reduced, present) in self.reduced[unit].iter_mut().zip(present) {
            *reduced |= present;
        }
        if let Some(timeline) = self.timeline.as_ref().filter(|_| self.began > 0) {
            timeline.unit_span("reduce", unit as UnitId, std::mem::take(&mut self.began));
        }
    }
}

impl HostSlots {
    /// Collective: allocates the slots. `first_unit` is the communicator's number of unit 0, `stores` the plan's.
    pub fn new(
        comm: Arc<dyn Communicator>,
        plan: &Plan,
        first_unit: u32,
        stores: &[Arc<ShardStore>],
        slots: usize,
    ) -> Result<HostSlots> {
        let flags = plan.units.iter().map(|u| u.params.len()).max().unwrap_or(0);
        let mut sizes = plan.slot_bytes(slots);
        let regular = sizes.len();
        let mut spare = Vec::new();
        let room = |size: &usize| {
            let fits = plan.units.iter().filter(|u| u.grad_bytes() <= *size);
            fits.map(UnitPlan::slot_room).max().unwrap_or(0)
        };
        let mut rooms: Vec<usize> = sizes.iter().map(room).collect();
        for unit in &plan.units {
            spare.push((unit.bytes() > 0).then_some(sizes.len()));
            if unit.bytes() > 0 {
                sizes.push(unit.grad_bytes());
                rooms.push(unit.slot_room());
            }
        }
        let units = plan.units.len() as UnitId;
        let memory = comm.alloc_slots(&rooms, flags, first_unit..first_unit + units)?;
        let of_unit = |u: &UnitPlan| stores[u.store].clone();
        let numbers = |p: &u32| plan.params[*p as usize].store_param;
        Ok(HostSlots {
            uses: vec![SlotUse::Free; sizes.len()],
            beyond: vec![0; sizes.len()],
            in_flight: Vec::new(),
            used: [0; 2],
            peaks: [0; 2],
            regular,
            spare,
            first_unit,
            means: Means {
                reduced: plan.units.iter().map(|u| vec![false; u.params.len()]).collect(),
                segments: (0..units).map(|u| plan.segments(u)).collect(),
                starts: plan.units.iter().map(|u| u.layout.shard(comm.rank()).start).collect(),
                params: plan.units.iter().map(|u| u.params.iter().map(numbers).collect()).collect(),
                stores: plan.units.iter().map(of_unit).collect(),
                timeline: None,
                began: 0,
            },
            memory,
            sizes,
            comm,
        })
    }

    /// A slot for a unit of `bytes`: of the smallest regular kind that fits among those no open unit has, a free one,
    /// else the one that was started first, waited for; else the unit's spare one.
    fn choose(&mut self, bytes: usize, spare: usize) -> Result<usize> {
        self.release()?;
        let mut first: Option<(Ticket, usize)> = None;
        // From the smallest.
        for slot in (0..self.regular).rev() {
            let size = self.sizes[slot];
            if first.is_some_and(|(_, other)| size > self.sizes[other]) {
                break;
            }
            match self.uses[slot] {
                _ if size < bytes => {}
                SlotUse::Free => return Ok(slot),
                SlotUse::Open => {}
                SlotUse::Started(ticket) => first = first.into_iter().chain([(ticket, slot)]).min(),
            }
        }
        for slot in first.map(|(_, slot)| slot).into_iter().chain([spare]) {
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
        if std::mem::take(&mut self.beyond[slot]) > 0 || slot >= self.regular {
            self.comm.trim_slot(self.memory.id, &self.memory.slots[slot]);
        }
    }
}

impl Reducer for HostSlots {
    fn acquire(&mut self, plan: &Plan, unit: UnitId) -> Result<Place> {
        let spare = self.spare[unit as usize].expect("a unit with elements has one");
        let slot = self.choose(plan.units[unit as usize].grad_bytes(), spare)?;
        self.uses[slot] = SlotUse::Open;
        let kind = (slot >= self.regular) as usize;
        self.used[kind] += 1;
        self.peaks[kind] = self.peaks[kind].max(self.used[kind]);
        Ok(Place { slot, data: self.memory.slots[slot].data.cast() })
    }

    fn discard(&mut self, _unit: UnitId, place: Place) {
        self.free(place.slot);
    }

    fn widened(&mut self, plan: &Plan, unit: UnitId, Place { slot, .. }: Place) {
        self.beyond[slot] = plan.units[unit as usize].slot_room().saturating_sub(self.sizes[slot]);
    }

    fn start(
        &mut self,
        plan: &Plan,
        unit: UnitId,
        Place { slot, .. }: Place,
        held: &[Held],
        change: Option<Change<'_>>,
    ) -> Result<()> {
        if let Some(Err(e)) = change.map(|change| change(std::ptr::null_mut())) {
            self.free(slot);
            return Err(e);
        }
        let u = &plan.units[unit as usize];
        let (layout, dtype) = (&u.layout, u.reduce_dtype);
        let bytes = (layout.len * dtype.size()) as u64;
        // Where no bytes move, gradients are rounded as they are summed. What is in 16 bits is in those that are sent.
        if dtype != DType::F32 && self.comm.moves_bytes() {
            let data = self.memory.slots[slot].data;
            for (index, _) in held.iter().enumerate().filter(|(_, held)| **held == Held::Float32) {
                let (at, len) = (layout.offsets[index], layout.numels[index]);
                // SAFETY: the slot holds the unit's floats. Parameters lie in ascending order, and a narrower one never
                // reaches the floats of those that follow.
                unsafe {
                    let from = data.add(u.wide_offset()).cast::<f32>().add(at);
                    reduce::narrow(dtype, from, data.add(at * dtype.size()), len);
                }
            }
        }
        if self.comm.moves_bytes() {
            // What another rank has a gradient for is summed as a whole.
            for (index, _) in held.iter().enumerate().filter(|(_, held)| !held.is_there()) {
                let (at, bytes) = (layout.offsets[index] * dtype.size(), layout.numels[index] * dtype.size());
                // SAFETY: the parameter's place in the slot, in elements of the reduce dtype.
                unsafe { self.memory.slots[slot].data.add(at).write_bytes(0, bytes) };
            }
        }
        let tag = Tag { kind: Kind::ReduceScatter, unit: self.first_unit + unit, dtype, bytes };
        let ticket = self.comm.reduce_start(tag, &self.memory.slots[slot], held)?;
        self.uses[slot] = SlotUse::Started(ticket);
        self.in_flight.push(slot);
        Ok(())
    }

    fn reduced(&mut self, unit: UnitId, present: &[bool]) {
        ReduceTarget::reduced(&mut self.means, unit as usize, present);
    }

    fn progress(&mut self) -> Result<()> {
        self.comm.reduce_ready(self.memory.id, &mut self.means)
    }

    fn end(&mut self, _plan: &Plan) -> Result<()> {
        self.comm.reduce_end(self.memory.id, &mut self.means)?;
        self.release()
    }

    fn take_reduced(&mut self, plan: &Plan) -> Vec<bool> {
        let take = |p: &crate::plan::ParamPlan| std::mem::take(&mut self.means.reduced[p.unit as usize][p.index]);
        plan.params.iter().map(take).collect()
    }

    fn used_bytes(&self) -> u64 {
        let used = (0..self.uses.len()).filter(|slot| !matches!(self.uses[*slot], SlotUse::Free));
        used.map(|slot| (self.sizes[slot] + self.beyond[slot]) as u64).sum()
    }

    fn peaks(&self) -> [usize; 2] {
        self.peaks
    }

    fn set_timeline(&mut self, timeline: Option<Arc<Timeline>>) {
        self.means.timeline = timeline;
    }
}
