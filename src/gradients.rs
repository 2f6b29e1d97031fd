//! Gradients on their way from a unit's backward to this rank's shards.
//!
//! A unit that gets its first gradient *opens*: it takes a slot and collects its full gradients there. When they are
//! complete its reduce-scatter is *started*; it is *finished* (the mean lands in the gradient shards) inside a later
//! hook, as soon as every rank has started it; the slot is free when every rank has finished it.
//!
//! A unit that finds all slots open collects in private memory; it is copied to the *staging* slot when it is started.
//!
//! Invariants: a reduction is started at the moment the host says so, whatever slot its unit has, so ranks that run the
//! same program start theirs in the same order; reductions are finished in the order they were started; a slot that is
//! neither open nor free becomes free without this rank doing anything but finishing what it started, so waiting for
//! one cannot deadlock.

use crate::comm::{Communicator, Segment, Slot, Tag, Ticket};
use crate::error::Result;
use crate::memory::HostBuffer;
use crate::plan::{Plan, UnitId};
use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;

/// Least bytes of the staging slot, for models whose units are all empty.
const STAGING_MIN: usize = 64;

enum SlotUse {
    Free,
    Open,
    Started(Ticket),
}

/// Where an open unit collects.
enum Target {
    Slot(usize),
    /// Every slot that is large enough belongs to another open unit.
    Private(HostBuffer),
    /// The unit has no elements.
    Nowhere,
}

struct OpenUnit {
    target: Target,
    /// Which parameters have a gradient by now.
    present: Vec<bool>,
}

struct Started {
    unit: UnitId,
    ticket: Ticket,
}

/// Counts that tests and `fsdp_engine_stats` read.
#[derive(Clone, Copy, Debug, Default)]
pub struct GradientCounters {
    pub reduce_scatters: u64,
    /// Bytes of the unit buffers reduced.
    pub reduce_scatter_bytes: u64,
    /// Most slots in use at once.
    pub slots_peak: usize,
    /// Most units collecting in private memory at once.
    pub overflow_peak: usize,
}

/// See the module's text. Used under the engine's lock.
pub struct Gradients {
    comm: Arc<dyn Communicator>,
    /// The last one is the staging slot: units collect in the others only.
    slots: Vec<(Slot, SlotUse)>,
    /// Slots without the staging slot.
    regular: usize,
    _slot_memory: Arc<dyn Any + Send + Sync>,
    open: Vec<Option<OpenUnit>>,
    started: VecDeque<Started>,
    /// This rank's pieces of each unit.
    segments: Vec<Vec<Segment>>,
    /// Whether the gradient shard of a parameter holds a value that the next reduction adds to.
    held: Vec<bool>,
    shards: HostBuffer,
    pub counters: GradientCounters,
}

// SAFETY: the raw pointers in `segments` point into `shards`, which moves along; slots are `Send` for the same reason.
unsafe impl Send for Gradients {}

impl Gradients {
    /// Collective: allocates slots and shards.
    pub fn new(comm: Arc<dyn Communicator>, plan: &Plan, slots: usize) -> Result<Gradients> {
        let flags = plan.units.iter().map(|u| u.params.len()).max().unwrap_or(0);
        let mut sizes = plan.slot_bytes(slots);
        let regular = sizes.len();
        sizes.push(sizes.first().copied().unwrap_or(0).max(STAGING_MIN));
        let (slots, memory) = comm.alloc_slots(&sizes, flags)?;
        let shards = HostBuffer::zeroed(plan.shard_elements, "the gradient shards")?;
        let units = 0..plan.units.len() as UnitId;
        Ok(Gradients {
            slots: slots.into_iter().map(|s| (s, SlotUse::Free)).collect(),
            regular,
            _slot_memory: memory,
            open: units.clone().map(|_| None).collect(),
            started: VecDeque::new(),
            segments: units.map(|u| plan.segments(u, comm.rank(), shards.as_ptr())).collect(),
            held: vec![false; plan.params.len()],
            comm,
            shards,
            counters: GradientCounters::default(),
        })
    }

    /// Start of this rank's gradient shards; the plan's `grad_offset` counts from here.
    pub fn shards(&self) -> *mut f32 {
        self.shards.as_ptr()
    }

    /// Whether the gradient shard of a parameter holds a value.
    pub fn holds(&self, param: usize) -> bool {
        self.held[param]
    }

    /// Forgets the gradient of a parameter: the next reduction overwrites it.
    pub fn clear(&mut self, param: usize) {
        self.held[param] = false;
    }

    /// A unit that has gradients which have not reached the shards.
    pub fn unfinished(&self) -> Option<UnitId> {
        let open = self.open.iter().position(Option::is_some).map(|u| u as UnitId);
        open.or(self.started.front().map(|s| s.unit))
    }

    /// The full gradient region of parameter `index` of `unit`, and whether it already holds a gradient of this
    /// backward (add to it) or not (overwrite it). It counts as present from here on. Opens the unit, which may wait
    /// for a slot.
    pub fn region(&mut self, plan: &Plan, unit: UnitId, index: usize) -> Result<(*mut f32, bool)> {
        if self.open[unit as usize].is_none() {
            self.open_unit(plan, unit)?;
        }
        let open = self.open[unit as usize].as_mut().expect("opened above");
        let base = match &open.target {
            Target::Slot(s) => self.slots[*s].0.data.cast::<f32>(),
            Target::Private(buffer) => buffer.as_ptr(),
            Target::Nowhere => std::ptr::null_mut(),
        };
        let held = std::mem::replace(&mut open.present[index], true);
        Ok((base.wrapping_add(plan.units[unit as usize].layout.offsets[index]), held))
    }

    /// The gradients of `unit` are complete: starts its reduce-scatter. A unit without gradients has nothing to reduce.
    pub fn start(&mut self, plan: &Plan, unit: UnitId, tag: Tag) -> Result<()> {
        let Some(open) = self.open[unit as usize].take() else { return Ok(()) };
        let slot = match open.target {
            Target::Nowhere => {
                // Nothing to send: its parameters have a gradient if they have one here.
                for (p, present) in plan.units[unit as usize].params.iter().zip(open.present) {
                    self.held[*p as usize] |= present;
                }
                return Ok(());
            }
            Target::Slot(s) => s,
            // Staged and started at once, not when a slot becomes free: the order of reductions must be the host's on
            // every rank, and which units found a slot is not the same on every rank.
            Target::Private(buffer) => {
                let s = self.stage(plan)?;
                let bytes = plan.units[unit as usize].bytes();
                // SAFETY: both are at least as large as the unit buffer, and different allocations.
                unsafe { std::ptr::copy_nonoverlapping(buffer.as_ptr().cast(), self.slots[s].0.data, bytes) };
                s
            }
        };
        let ticket = self.comm.reduce_scatter_start(tag, &self.slots[slot].0, &open.present)?;
        self.slots[slot].1 = SlotUse::Started(ticket);
        self.started.push_back(Started { unit, ticket });
        self.counters.reduce_scatters += 1;
        self.counters.reduce_scatter_bytes += tag.bytes;
        self.progress(plan, false)
    }

    /// Makes `unit` take part in its next reduction even if it has no gradient on this rank.
    pub fn join(&mut self, plan: &Plan, unit: UnitId) -> Result<()> {
        let u = &plan.units[unit as usize];
        let trained = u.params.iter().any(|p| plan.params[*p as usize].requires_grad);
        if self.open[unit as usize].is_none() && trained && u.bytes() > 0 {
            self.open_unit(plan, unit)?;
        }
        Ok(())
    }

    /// Starts every open unit, in order.
    pub fn start_all(&mut self, plan: &Plan, tag: impl Fn(UnitId) -> Tag) -> Result<()> {
        for unit in 0..self.open.len() as UnitId {
            self.start(plan, unit, tag(unit))?;
        }
        Ok(())
    }

    /// Finishes what every rank has started; with `wait`, everything that this rank has started.
    pub fn progress(&mut self, plan: &Plan, wait: bool) -> Result<()> {
        while let Some(Started { unit, ticket }) = self.started.front() {
            let params = &plan.units[*unit as usize].params;
            let segments = &mut self.segments[*unit as usize];
            for s in segments.iter_mut() {
                s.accumulate = self.held[params[s.param] as usize];
            }
            let Some(present) = self.comm.reduce_scatter_finish(*ticket, segments, wait)? else { break };
            for (p, present) in params.iter().zip(present) {
                self.held[*p as usize] |= present;
            }
            self.started.pop_front();
        }
        Ok(())
    }

    /// Drops gradients that were being collected (a backward that failed or was given up). Started reductions go on.
    pub fn discard_open(&mut self) {
        for open in self.open.iter_mut().filter_map(Option::take) {
            if let Target::Slot(s) = open.target {
                self.slots[s].1 = SlotUse::Free;
            }
        }
    }

    fn open_unit(&mut self, plan: &Plan, unit: UnitId) -> Result<()> {
        let u = &plan.units[unit as usize];
        let target = match u.bytes() {
            0 => Target::Nowhere,
            _ => self.acquire(plan, unit)?,
        };
        self.open[unit as usize] = Some(OpenUnit { target, present: vec![false; u.params.len()] });
        self.count_open();
        Ok(())
    }

    /// A slot for `unit`: the smallest kind that fits among those no open unit has; a free one of that kind, else the
    /// one started first, waited for. Private memory when open units have them all.
    fn acquire(&mut self, plan: &Plan, unit: UnitId) -> Result<Target> {
        let bytes = plan.units[unit as usize].bytes();
        self.release()?;
        let fits = |(slot, used): &(Slot, SlotUse)| slot.bytes >= bytes && !matches!(used, SlotUse::Open);
        let kind = self.slots[..self.regular].iter().filter(|s| fits(s)).map(|(slot, _)| slot.bytes).min();
        let Some(kind) = kind else {
            return Ok(Target::Private(HostBuffer::zeroed(bytes / size_of::<f32>(), "a unit's gradients")?));
        };
        let (index, ticket) = self.slots[..self.regular]
            .iter()
            .enumerate()
            .filter(|(_, s)| s.0.bytes == kind)
            .filter_map(|(i, (_, used))| match used {
                SlotUse::Free => Some((i, None)),
                SlotUse::Started(t) => Some((i, Some(*t))),
                SlotUse::Open => None,
            })
            .min_by_key(|(_, ticket)| *ticket)
            .expect("a slot of this kind is not open");
        if let Some(ticket) = ticket {
            self.progress(plan, true)?;
            self.comm.finished(ticket, true)?;
        }
        self.slots[index].1 = SlotUse::Open;
        Ok(Target::Slot(index))
    }

    /// The staging slot, when every rank has read what was in it.
    fn stage(&mut self, plan: &Plan) -> Result<usize> {
        if let SlotUse::Started(ticket) = self.slots[self.regular].1 {
            self.progress(plan, true)?;
            self.comm.finished(ticket, true)?;
            self.slots[self.regular].1 = SlotUse::Free;
        }
        Ok(self.regular)
    }

    /// Frees the slots that every rank has read.
    fn release(&mut self) -> Result<()> {
        for (_, used) in &mut self.slots {
            if let SlotUse::Started(ticket) = used {
                if self.comm.finished(*ticket, false)? {
                    *used = SlotUse::Free;
                }
            }
        }
        Ok(())
    }

    fn count_open(&mut self) {
        let used = self.slots[..self.regular].iter().filter(|(_, u)| !matches!(u, SlotUse::Free)).count();
        let private = self.open.iter().flatten().filter(|o| matches!(o.target, Target::Private(_))).count();
        self.counters.slots_peak = self.counters.slots_peak.max(used);
        self.counters.overflow_peak = self.counters.overflow_peak.max(private);
    }
}
