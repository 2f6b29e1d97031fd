//! Reduce-scatters in flight: started in order, finished in the same order, each from the gradient slots of all ranks.
//!
//! Every allocation of slots has a queue of its own, so that engines which share a communicator do not wait for each
//! other. Reduction t of a queue is the same one on every rank; the segment's [`super::segment::Progress`] says how far
//! each rank is and which slot it used.

use super::control::{Announcement, Detail, RankArea, RING};
use super::group::Group;
use super::segment::SlotSegment;
use super::wait::Wait;
use crate::comm::single::check_segment;
use crate::comm::{reduce, Segment, Slot, Tag, Ticket};
use crate::dtype::DType;
use crate::error::{err, Result};
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

/// The queues of all slots that are still owned by somebody.
#[derive(Default)]
pub struct Reductions {
    queues: Vec<Queue>,
}

struct Queue {
    segment: Weak<SlotSegment>,
    id: u64,
    started: u64,
    finished: u64,
    pending: VecDeque<Pending>,
    /// The last `RING` that were started, for messages.
    recent: VecDeque<Announcement>,
}

/// A reduction this rank has started and not finished.
struct Pending {
    what: Announcement,
    params: usize,
}

/// A start whose arguments were checked.
pub struct Start {
    pub what: Announcement,
    queue: usize,
    slot: usize,
}

impl Reductions {
    /// Slots that reductions may use from now on.
    pub fn add(&mut self, segment: &Arc<SlotSegment>) {
        self.queues.retain(|q| q.segment.strong_count() > 0);
        self.queues.push(Queue {
            segment: Arc::downgrade(segment),
            id: segment.id as u64,
            started: 0,
            finished: 0,
            pending: VecDeque::new(),
            recent: VecDeque::new(),
        });
    }

    /// Checks the arguments of a start.
    pub fn prepare(&self, group: &Group, tag: Tag, slot: &Slot, present: &[bool]) -> Result<Start> {
        let owner = |(i, q): (usize, &Queue)| {
            let segment = q.segment.upgrade()?;
            segment.find(group.rank, slot.data, slot.index).then_some((i, segment))
        };
        let found = self.queues.iter().enumerate().find_map(owner);
        let (index, segment) =
            found.ok_or_else(|| err!(InvalidArgument, "the gradient slot is not of this communicator"))?;
        let (size, flags) = (segment.layout.sizes[slot.index], segment.layout.flags);
        if tag.dtype != DType::F32 || tag.bytes % 4 != 0 {
            return Err(err!(Unsupported, "a reduce-scatter of {} bytes of {}", tag.bytes, tag.dtype));
        }
        if tag.bytes > size as u64 || present.len() > flags {
            let (bytes, n) = (tag.bytes, present.len());
            return Err(err!(
                InvalidArgument,
                "a reduce-scatter of {bytes} bytes, {n} parameters does not fit slot {} of {size} bytes, {flags} parameters",
                slot.index
            ));
        }
        let queue = &self.queues[index];
        let last = segment.last_ticket[slot.index].load(Ordering::Relaxed);
        if last > 0 && !queue.finished(group, &segment, last - 1, false)? {
            let last = last - 1;
            return Err(err!(InvalidState, "gradient slot {} is still read by reduce-scatter {last}", slot.index));
        }
        // The ring entry that this one overwrites must have been read by all.
        let overwritten = queue.started.checked_sub(RING as u64);
        if let Some(number) = overwritten {
            if !queue.finished(group, &segment, number, false)? {
                return Err(err!(InvalidState, "{RING} reduce-scatters are started and not finished"));
            }
        }
        let what = Announcement { tag, detail: Detail::Slots(segment.id, present.len() as u32) };
        Ok(Start { what, queue: index, slot: slot.index })
    }

    /// Publishes the slot.
    pub fn start(&mut self, group: &Group, start: Start, present: &[bool]) -> Result<Ticket> {
        let queue = &mut self.queues[start.queue];
        let segment = queue.segment()?;
        let number = queue.started;
        let flags = segment.flags(group.rank, start.slot);
        for (i, &is) in present.iter().enumerate() {
            // SAFETY: `present` is no longer than the slot's flags (checked in `prepare`); the slot is not being read.
            unsafe { flags.add(i).write(is as u8) };
        }
        segment.note_ticket(start.slot, number);
        let progress = segment.progress(group.rank);
        progress.slots[number as usize % RING].store(start.slot as u64, Ordering::Relaxed);
        queue.started += 1;
        // Releases the gradient, the flags and the slot's number to the ranks that acquire `started`.
        progress.started.0.store(queue.started, Ordering::SeqCst);
        group.ring(group.rank);
        queue.recent.push_back(start.what);
        if queue.recent.len() > RING {
            queue.recent.pop_front();
        }
        queue.pending.push_back(Pending { what: start.what, params: present.len() });
        Ok(Ticket { slots: queue.id, number })
    }

    pub fn finish(
        &mut self,
        group: &Group,
        ticket: Ticket,
        segments: &[Segment],
        wait: bool,
    ) -> Result<Option<Vec<bool>>> {
        let index = self.queue(ticket)?;
        let queue = &mut self.queues[index];
        let slots = queue.segment()?;
        let Some(pending) = queue.pending.front().filter(|_| ticket.number == queue.finished) else {
            let (is, oldest) = (ticket.number, queue.finished);
            return Err(err!(InvalidState, "reduce-scatter {is} is not the oldest unfinished one ({oldest})"));
        };
        let floats = (pending.what.tag.bytes / 4) as usize;
        for s in segments {
            check_segment(s, pending.params, floats)?;
        }
        let arrived = |r: usize, _: &RankArea| slots.progress(r).started.0.load(Ordering::Acquire) > ticket.number;
        if wait {
            group.wait(&Wait { what: &|| group.describe(&pending.what), arrived: &arrived })?;
        } else if !group.all_arrived(&arrived) {
            return Ok(None);
        }
        // Not before now: a mismatch is reported by whoever announced last, before it starts.
        group.check()?;
        let any = pending.reduce(group, &slots, ticket.number, segments)?;
        queue.pending.pop_front();
        queue.finished += 1;
        slots.progress(group.rank).finished.0.store(queue.finished, Ordering::SeqCst);
        group.ring(group.rank);
        Ok(Some(any))
    }

    pub fn finished(&self, group: &Group, ticket: Ticket, wait: bool) -> Result<bool> {
        let queue = &self.queues[self.queue(ticket)?];
        let slots = queue.segment()?;
        queue.finished(group, &slots, ticket.number, wait)
    }

    fn queue(&self, ticket: Ticket) -> Result<usize> {
        let found = self.queues.iter().position(|q| q.id == ticket.slots);
        found.ok_or_else(|| err!(InvalidArgument, "the reduce-scatter is not of this communicator"))
    }
}

impl Queue {
    fn segment(&self) -> Result<Arc<SlotSegment>> {
        self.segment.upgrade().ok_or_else(|| err!(InvalidState, "the gradient slots were freed"))
    }

    fn finished(&self, group: &Group, slots: &SlotSegment, number: u64, wait: bool) -> Result<bool> {
        if number >= self.finished {
            return match wait {
                false => Ok(false),
                true => {
                    Err(err!(InvalidState, "waiting for reduce-scatter {number}, which this rank has not finished"))
                }
            };
        }
        let arrived = |r: usize, _: &RankArea| slots.progress(r).finished.0.load(Ordering::Acquire) > number;
        if group.all_arrived(&arrived) {
            return Ok(true);
        }
        if wait {
            let what = || {
                let age = (self.started - number) as usize;
                let known = self.recent.len().checked_sub(age).and_then(|i| self.recent.get(i));
                let name = known.map_or_else(|| format!("reduce-scatter {number}"), |a| group.describe(a));
                format!("the end of {name}")
            };
            group.wait(&Wait { what: &what, arrived: &arrived })?;
        }
        Ok(wait)
    }
}

impl Pending {
    /// This rank's part: the mean of every segment over the ranks that have its parameter.
    fn reduce(&self, group: &Group, from: &SlotSegment, number: u64, segments: &[Segment]) -> Result<Vec<bool>> {
        let mut slots = Vec::with_capacity(group.world);
        for r in 0..group.world {
            let index = from.progress(r).slots[number as usize % RING].load(Ordering::Relaxed) as usize;
            if from.layout.sizes.get(index).is_none_or(|size| (*size as u64) < self.what.tag.bytes) {
                return Err(group.fail(err!(
                    Mismatch,
                    "rank {r} published gradient slot {index} for {}, which does not fit",
                    group.describe(&self.what)
                )));
            }
            slots.push((from.data(r, index).cast::<f32>(), from.flags(r, index)));
        }
        // SAFETY: every rank wrote `params` flags before it published (the announcements agree on the number), and
        // writes them again only after this rank has finished.
        let has = |r: usize, param: usize| unsafe { slots[r].1.add(param).read() } != 0;
        let mut sources = Vec::with_capacity(group.world);
        for s in segments {
            sources.clear();
            // SAFETY: `finish` checked that the segment lies inside the reduction, which fits every rank's slot.
            let source = |r: usize| unsafe { slots[r].0.add(s.offset).cast_const() };
            sources.extend((0..group.world).filter(|r| has(*r, s.param)).map(source));
            // SAFETY: the sources are published and stay unwritten until this rank has finished; `out` is the host's
            // private memory for `len` floats.
            unsafe { reduce::mean_f32(&sources, group.world, s.out, s.len, s.accumulate) };
        }
        Ok((0..self.params).map(|p| (0..group.world).any(|r| has(r, p))).collect())
    }
}
