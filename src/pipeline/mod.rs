//! An iteration on a device whose collectives run on queues of their own: which unit is in which buffer, and what each
//! launch waits for.
//!
//! Pure: what is launched goes to a [`Queues`], which may be streams of a GPU or a recording. Nothing here waits for
//! the device; all order is between queues, by events:
//!
//! ```text
//!   gather   all-gather of a unit      after compute has read what was in the buffer before, and has written the shards
//!   compute  forward, backward, step   after the all-gather of the unit; gradients are written after the slot was reduced
//!   reduce   reduce-scatter of a unit  after compute has written its gradients, and a host's hook has changed them here
//! ```
//!
//! A unit that is resharded over a smaller group keeps a part of its buffer, which compute copies out of it; its next all-gather
//! starts after that, and moves the parts of the group's ranks alone.
//!
//! So the all-gather of the next unit runs beside the compute of this one, and the reduce-scatter of the last one too.
//! Memory does not grow with how far the host runs ahead of the device: there are as many unit buffers and gradient
//! slots as [`Limits`] says. What they have no room for gets memory beyond them, if the limits allow that: taken and given
//! back in compute's order, one place for each unit.

use crate::error::{err, Result};
use crate::plan::UnitId;

mod limits;
mod pool;
#[cfg(test)]
mod recorder;
#[cfg(test)]
mod tests;

pub use limits::{compute_dtypes, Limits, UnitBytes};
use pool::{Pool, Use};

/// Work in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Queue {
    /// The host's: forward, backward, optimizer.
    Compute,
    Gather,
    Reduce,
}

/// A place in a queue's work, recorded again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Compute has written this rank's shards.
    ShardsWritten,
    /// The unit buffer of this number is filled.
    Gathered(usize),
    /// Compute reads it no more.
    Released(usize),
    /// The part of this unit that a smaller group's next all-gather takes is there.
    Kept(UnitId),
    /// The gradients in the slot of this number are complete.
    Filled(usize),
    /// They are in the gradient shards.
    Reduced(usize),
}

/// What a device does. Each call returns at once; an error of one is returned by the pipeline, which can be used no
/// further.
pub trait Queues {
    /// On [`Queue::Gather`]: this rank's shard of `unit` goes to its place in unit buffer `buffer`, and every other
    /// rank's to theirs; with a smaller group, the part that was kept, and those of the group's ranks.
    fn all_gather(&mut self, unit: UnitId, buffer: usize, group: Option<usize>) -> Result<()>;
    /// On [`Queue::Compute`]: this rank's part of `unit` among the ranks of the smaller group of this number goes from unit
    /// buffer `buffer` to [`Beyond::Part`].
    fn keep(&mut self, unit: UnitId, buffer: usize, group: usize) -> Result<()>;
    /// On [`Queue::Reduce`]: the mean of all ranks' gradients of `unit` in slot `slot` goes to this rank's gradient
    /// shard.
    fn reduce_scatter(&mut self, unit: UnitId, slot: usize) -> Result<()>;
    /// `event` is the end of what `queue` has been given so far.
    fn record(&mut self, event: Event, queue: Queue) -> Result<()>;
    /// What `queue` is given from here on starts after the latest record of `event`.
    fn wait(&mut self, queue: Queue, event: Event) -> Result<()>;
    /// Memory of `bytes` for a place beyond the fixed ones, in the order of [`Queue::Compute`].
    fn take(&mut self, place: Beyond, bytes: usize) -> Result<()>;
    /// Gives it back, in that order, too.
    fn give_back(&mut self, place: Beyond) -> Result<()>;
}

/// A place beyond those of [`Limits`], by its number (buffers and slots come after the fixed ones, one for each unit) or its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beyond {
    Buffer(usize),
    Slot(usize),
    /// A unit's part that is kept for a smaller group.
    Part(UnitId),
}

/// What was done, for tests and statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub all_gathers: u64,
    /// Of these, ahead of their use.
    pub prefetches: u64,
    /// Prefetched units that had to make room before they were used.
    pub evictions: u64,
    pub reduce_scatters: u64,
    /// Most units that had a buffer at once.
    pub buffers_peak: usize,
    /// Most fixed slots in use at once, and most beyond them.
    pub slots_peak: [usize; 2],
    /// Buffers and slots that were taken beyond the fixed ones.
    pub overflows: u64,
}

/// See the module's text.
pub struct Pipeline {
    units: Vec<UnitBytes>,
    buffers: Pool,
    slots: Pool,
    ahead: usize,
    in_flight: usize,
    spare_slots: bool,
    /// By unit: the smaller group for which a part of it is kept.
    kept: Vec<Option<usize>>,
    /// The gather queue has yet to wait for compute to write the shards.
    stale: bool,
    /// The buffer that was gathered last, unless compute has waited for that.
    last_gathered: Option<usize>,
    /// The slot whose reduction was launched last since the last end of a backward.
    last_reduced: Option<usize>,
    counts: Counts,
}

impl Pipeline {
    /// A pipeline at rest. An error if a unit fits nowhere.
    pub fn new(units: Vec<UnitBytes>, limits: &Limits) -> Result<Pipeline> {
        type Size = fn(&UnitBytes) -> usize;
        let memory: [(&str, &[usize], bool, Size); 2] = [
            ("unit buffer", &limits.unit_buffers, limits.in_flight > limits.unit_buffers.len(), |u| u.buffer),
            ("gradient slot", &limits.gradient_slots, limits.spare_slots, |u| u.slot),
        ];
        for (what, sizes, beyond, of) in memory {
            let largest = if beyond { usize::MAX } else { sizes.iter().copied().max().unwrap_or(0) };
            if let Some(unit) = units.iter().find(|u| of(u) > largest) {
                let (label, bytes) = (&unit.label, of(unit));
                return Err(err!(
                    InvalidArgument,
                    "unit \"{label}\" of {bytes} bytes fits no {what}: the largest has {largest}"
                ));
            }
        }
        Ok(Pipeline {
            buffers: Pool::new(&limits.unit_buffers, units.iter().map(|u| u.buffer)),
            slots: Pool::new(&limits.gradient_slots, units.iter().map(|u| u.slot)),
            ahead: limits.ahead,
            in_flight: limits.in_flight,
            spare_slots: limits.spare_slots,
            kept: vec![None; units.len()],
            units,
            stale: true,
            last_gathered: None,
            last_reduced: None,
            counts: Counts::default(),
        })
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The buffer that compute may read `unit` in, if it is unsharded.
    pub fn buffer(&self, unit: UnitId) -> Option<usize> {
        self.buffers.place(unit).filter(|b| self.buffers.state(*b) == Use::Open(unit))
    }

    /// Before compute that writes shards (an optimizer's step): it starts when nothing gathers them any more, and what
    /// is gathered from here on is gathered after all that compute has been given by then. An error while units are
    /// unsharded.
    pub fn begin_write(&mut self, queues: &mut dyn Queues) -> Result<()> {
        if let Some(unit) = self.buffers.open().next() {
            return Err(err!(
                InvalidState,
                "shards cannot be written while unit \"{}\" is unsharded",
                self.label(unit)
            ));
        }
        // Gathered ahead and not used: it is old from here on.
        self.wait_for_gathers(queues)?;
        self.buffers.drop_ahead();
        (0..self.units.len() as UnitId).try_for_each(|unit| self.forget_part(queues, unit))?;
        self.stale = true;
        Ok(())
    }

    /// Before compute that reads `unit`: returns its buffer; None if it has no elements. Units of `next`, in that
    /// order, are gathered ahead where there is room.
    pub fn unshard(&mut self, queues: &mut dyn Queues, unit: UnitId, next: &[UnitId]) -> Result<Option<usize>> {
        if self.units[unit as usize].buffer > 0 && self.buffer(unit).is_none() {
            let buffer = match self.buffers.place(unit) {
                Some(buffer) => buffer,
                None => self.gather(queues, unit, true)?.expect("it has room or fails"),
            };
            queues.wait(Queue::Compute, Event::Gathered(buffer))?;
            self.buffers.set(buffer, Use::Open(unit));
            self.last_gathered.take_if(|last| *last == buffer);
            if self.kept[unit as usize].take().is_some() {
                queues.give_back(Beyond::Part(unit))?;
            }
        }
        for unit in next.iter().copied() {
            let there = self.buffers.place(unit).is_some() || self.units[unit as usize].buffer == 0;
            if there {
                continue;
            }
            if self.buffers.ahead().count() >= self.ahead || self.gather(queues, unit, false)?.is_none() {
                break;
            }
            self.counts.prefetches += 1;
        }
        Ok(self.buffer(unit))
    }

    /// After compute that reads `unit`: its buffer may be used for another one once that work is done. Nothing happens
    /// if it is sharded.
    pub fn reshard(&mut self, queues: &mut dyn Queues, unit: UnitId) -> Result<()> {
        let Some(buffer) = self.buffer(unit) else { return Ok(()) };
        if self.buffers.is_beyond(buffer) {
            self.buffers.set(buffer, Use::Free);
            return queues.give_back(Beyond::Buffer(buffer));
        }
        queues.record(Event::Released(buffer), Queue::Compute)?;
        self.buffers.set(buffer, Use::Busy);
        Ok(())
    }

    /// The same, and the unit's next all-gather is among the `ranks` of the smaller group of this number, if it comes before
    /// [`Pipeline::forget_part`] and [`Pipeline::begin_write`].
    pub fn reshard_to(&mut self, queues: &mut dyn Queues, unit: UnitId, group: usize, ranks: usize) -> Result<()> {
        let Some(buffer) = self.buffer(unit) else { return Ok(()) };
        self.forget_part(queues, unit)?;
        queues.take(Beyond::Part(unit), self.units[unit as usize].buffer / ranks)?;
        queues.keep(unit, buffer, group)?;
        queues.record(Event::Kept(unit), Queue::Compute)?;
        self.kept[unit as usize] = Some(group);
        self.reshard(queues, unit)
    }

    /// The smaller group among whose ranks the unit's next all-gather is.
    pub fn group(&self, unit: UnitId) -> Option<usize> {
        self.kept[unit as usize]
    }

    /// What is kept of `unit` for a smaller group is not wanted. Nothing happens if there is nothing.
    pub fn forget_part(&mut self, queues: &mut dyn Queues, unit: UnitId) -> Result<()> {
        if self.kept[unit as usize].take().is_none() {
            return Ok(());
        }
        // It may have been gathered ahead.
        self.wait_for_gathers(queues)?;
        queues.give_back(Beyond::Part(unit))
    }

    /// Before compute that writes gradients of `unit`: returns their slot, the same until they are reduced; None if it
    /// has no elements.
    pub fn collect(&mut self, queues: &mut dyn Queues, unit: UnitId) -> Result<Option<usize>> {
        let bytes = self.units[unit as usize].slot;
        let place = self.slots.place(unit);
        if place.is_some() || bytes == 0 {
            return Ok(place);
        }
        let spare = || self.slots.beyond(unit).filter(|_| self.spare_slots);
        let Some(slot) = self.slots.choose(bytes).or_else(spare) else {
            let units = self.labels(self.slots.open());
            let (label, count) = (self.label(unit), self.slots.len());
            return Err(err!(
                InvalidState,
                "unit \"{label}\" has no gradient slot: {units} have those of the {count} that are large enough and \
                 are not reduced yet; more gradient_slots are needed"
            ));
        };
        match self.slots.state(slot) {
            Use::Busy => queues.wait(Queue::Compute, Event::Reduced(slot))?,
            _ if self.slots.is_beyond(slot) => {
                queues.take(Beyond::Slot(slot), bytes)?;
                self.counts.overflows += 1;
            }
            _ => {}
        }
        self.slots.set(slot, Use::Open(unit));
        let [peak, beyond_peak] = &mut self.counts.slots_peak;
        let beyond = self.slots.open_places().filter(|s| self.slots.is_beyond(*s)).count();
        *beyond_peak = beyond.max(*beyond_peak);
        *peak = (self.slots.open_places().count() - beyond).max(*peak);
        Ok(Some(slot))
    }

    /// The gradients that were collected for `unit` are not wanted. Nothing happens if there are none.
    pub fn discard(&mut self, queues: &mut dyn Queues, unit: UnitId) -> Result<()> {
        let Some(slot) = self.slots.place(unit) else { return Ok(()) };
        // Compute alone has touched it.
        self.slots.set(slot, Use::Free);
        match self.slots.is_beyond(slot) {
            true => queues.give_back(Beyond::Slot(slot)),
            false => Ok(()),
        }
    }

    /// Where `unit` collects gradients, if it does.
    pub fn slot(&self, unit: UnitId) -> Option<usize> {
        self.slots.place(unit)
    }

    /// Bytes of the slots that collect gradients.
    pub fn collecting_bytes(&self) -> usize {
        self.slots.open_places().map(|slot| self.slots.bytes(slot)).sum()
    }

    /// The units that are unsharded.
    pub fn unsharded(&self) -> impl Iterator<Item = UnitId> + '_ {
        self.buffers.open()
    }

    /// After compute that completes the gradients of `unit`: launches their reduction. Nothing happens if none were
    /// collected.
    pub fn reduce(&mut self, queues: &mut dyn Queues, unit: UnitId) -> Result<()> {
        self.reduce_changed(queues, unit, |_| Ok(()))
    }

    /// The same, and `change` gives [`Queue::Reduce`] what is done before with the gradients, which are complete there. If it
    /// fails nothing is reduced, as after a launch that fails.
    pub fn reduce_changed<Q: Queues + ?Sized>(
        &mut self,
        queues: &mut Q,
        unit: UnitId,
        change: impl FnOnce(&mut Q) -> Result<()>,
    ) -> Result<()> {
        let Some(slot) = self.slots.place(unit) else { return Ok(()) };
        queues.record(Event::Filled(slot), Queue::Compute)?;
        queues.wait(Queue::Reduce, Event::Filled(slot))?;
        change(queues)?;
        queues.reduce_scatter(unit, slot)?;
        queues.record(Event::Reduced(slot), Queue::Reduce)?;
        self.slots.set(slot, Use::Busy);
        self.last_reduced = Some(slot);
        self.counts.reduce_scatters += 1;
        Ok(())
    }

    /// Ends a backward: reduces what was collected, reshards all units, and lets what compute is given from here on see
    /// the gradient shards.
    pub fn finish_backward(&mut self, queues: &mut dyn Queues) -> Result<()> {
        let mut collected: Vec<UnitId> = self.slots.open().collect();
        // The same order on every rank.
        collected.sort_unstable();
        collected.into_iter().try_for_each(|unit| self.reduce(queues, unit))?;
        // The queue runs in order: after the last one, all are done.
        if let Some(slot) = self.last_reduced.take() {
            queues.wait(Queue::Compute, Event::Reduced(slot))?;
        }
        let reduced: Vec<usize> = self.slots.busy_beyond().collect();
        for slot in reduced {
            self.slots.set(slot, Use::Free);
            queues.give_back(Beyond::Slot(slot))?;
        }
        self.finish_forward(queues)
    }

    /// Ends a forward that no backward follows: reshards all units.
    pub fn finish_forward(&mut self, queues: &mut dyn Queues) -> Result<()> {
        let open: Vec<UnitId> = self.buffers.open().collect();
        open.into_iter().try_for_each(|unit| self.reshard(queues, unit))
    }

    /// What compute is given from here on comes after all all-gathers, those ahead, too.
    pub fn wait_for_gathers(&mut self, queues: &mut dyn Queues) -> Result<()> {
        match self.last_gathered.take() {
            Some(buffer) => queues.wait(Queue::Compute, Event::Gathered(buffer)),
            None => Ok(()),
        }
    }

    /// Launches an all-gather. None: there is no room, which is an error for a unit that is `needed` now.
    fn gather(&mut self, queues: &mut dyn Queues, unit: UnitId, needed: bool) -> Result<Option<usize>> {
        let bytes = self.units[unit as usize].buffer;
        let in_use = self.buffers.in_use();
        let mut found = self.buffers.choose(bytes).filter(|_| in_use < self.in_flight);
        if found.is_none() && needed && in_use < self.in_flight {
            if let Some(beyond) = self.buffers.beyond(unit) {
                queues.take(Beyond::Buffer(beyond), bytes)?;
                queues.record(Event::Released(beyond), Queue::Compute)?;
                self.buffers.set(beyond, Use::Busy);
                self.counts.overflows += 1;
                found = Some(beyond);
            }
        }
        if found.is_none() && needed {
            // The one that was gathered last: it is needed last. The gather queue runs in order, and nothing has read
            // it.
            found = self.buffers.ahead().filter(|b| self.buffers.bytes(*b) >= bytes).last();
            self.counts.evictions += u64::from(found.is_some());
        }
        let Some(buffer) = found else {
            if !needed {
                return Ok(None);
            }
            let (units, label, count) = (self.labels(self.buffers.open()), self.label(unit), self.buffers.len());
            return Err(err!(
                InvalidState,
                "unit \"{label}\" has no unit buffer: {units} are unsharded in those of the {count} that are large \
                 enough; reshard one of them, or more unit buffers are needed"
            ));
        };
        if std::mem::take(&mut self.stale) {
            queues.record(Event::ShardsWritten, Queue::Compute)?;
            queues.wait(Queue::Gather, Event::ShardsWritten)?;
        }
        if self.buffers.state(buffer) == Use::Busy {
            queues.wait(Queue::Gather, Event::Released(buffer))?;
        }
        let group = self.kept[unit as usize];
        if group.is_some() {
            queues.wait(Queue::Gather, Event::Kept(unit))?;
        }
        queues.all_gather(unit, buffer, group)?;
        queues.record(Event::Gathered(buffer), Queue::Gather)?;
        self.buffers.set(buffer, Use::Ahead(unit));
        self.last_gathered = Some(buffer);
        self.counts.all_gathers += 1;
        self.counts.buffers_peak = self.counts.buffers_peak.max(self.buffers.in_use());
        Ok(Some(buffer))
    }

    fn label(&self, unit: UnitId) -> &str {
        &self.units[unit as usize].label
    }

    fn labels(&self, units: impl Iterator<Item = UnitId>) -> String {
        let labels: Vec<String> = units.map(|u| format!("\"{}\"", self.label(u))).collect();
        if labels.is_empty() {
            "no units".to_string()
        } else {
            format!("units {}", labels.join(", "))
        }
    }
}
