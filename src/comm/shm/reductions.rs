//! Reduce-scatters in flight: started in order, finished in the same order, each from the gradient slots of all ranks.
//!
//! Ticket t is the t-th reduction of the communicator on every rank. `started` and `finished` counters in the control
//! segment say how far each rank is; which slot a rank used is in its ring of reductions.

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

#[derive(Default)]
pub struct Reductions {
    segments: Vec<Weak<SlotSegment>>,
    started: u64,
    finished: u64,
    pending: VecDeque<Pending>,
    /// The last `RING` that were started, for messages.
    recent: VecDeque<Announcement>,
}

/// A reduction this rank has started and not finished. Holds the slots of all ranks.
pub struct Pending {
    pub what: Announcement,
    segment: Arc<SlotSegment>,
    index: usize,
    params: usize,
}

impl Reductions {
    /// Slots that reductions may use from now on.
    pub fn add(&mut self, segment: &Arc<SlotSegment>) {
        self.segments.retain(|s| s.strong_count() > 0);
        self.segments.push(Arc::downgrade(segment));
    }

    /// Checks the arguments of a start.
    pub fn prepare(&self, group: &Group, tag: Tag, slot: &Slot, present: &[bool]) -> Result<Pending> {
        let owns = |s: &Arc<SlotSegment>| s.find(group.rank, slot.data, slot.index);
        let segment = self.segments.iter().filter_map(Weak::upgrade).find(owns);
        let segment = segment.ok_or_else(|| err!(InvalidArgument, "the gradient slot is not of this communicator"))?;
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
        let last = segment.last_ticket[slot.index].load(Ordering::Relaxed);
        if last > 0 && !self.finished(group, Ticket(last - 1), false)? {
            return Err(err!(
                InvalidState,
                "gradient slot {} is still read by reduce-scatter {}",
                slot.index,
                last - 1
            ));
        }
        // The ring entry that this one overwrites must have been read by all.
        if self.started >= RING as u64 && !self.finished(group, Ticket(self.started - RING as u64), false)? {
            return Err(err!(InvalidState, "{RING} reduce-scatters are started and not finished"));
        }
        let what = Announcement { tag, detail: Detail::Slots(segment.id, present.len() as u32) };
        Ok(Pending { what, segment, index: slot.index, params: present.len() })
    }

    /// Publishes the slot.
    pub fn start(&mut self, group: &Group, next: Pending, present: &[bool]) -> Ticket {
        let ticket = self.started;
        let flags = next.segment.flags(group.rank, next.index);
        for (i, &is) in present.iter().enumerate() {
            // SAFETY: `present` is no longer than the slot's flags (checked in `prepare`); the slot is not being read.
            unsafe { flags.add(i).write(is as u8) };
        }
        next.segment.note_ticket(next.index, ticket);
        group.me().reductions[ticket as usize % RING].slot.store(next.index as u64, Ordering::Relaxed);
        self.started += 1;
        // Releases the gradient, the flags and the slot's number to the ranks that acquire `started`.
        group.me().started.0.store(self.started, Ordering::SeqCst);
        group.ring(group.rank);
        self.recent.push_back(next.what);
        if self.recent.len() > RING {
            self.recent.pop_front();
        }
        self.pending.push_back(next);
        Ticket(ticket)
    }

    pub fn finish(
        &mut self,
        group: &Group,
        ticket: Ticket,
        segments: &[Segment],
        wait: bool,
    ) -> Result<Option<Vec<bool>>> {
        let Some(pending) = self.pending.front().filter(|_| ticket.0 == self.finished) else {
            let (is, oldest) = (ticket.0, self.finished);
            return Err(err!(InvalidState, "reduce-scatter {is} is not the oldest unfinished one ({oldest})"));
        };
        let floats = (pending.what.tag.bytes / 4) as usize;
        for s in segments {
            check_segment(s, pending.params, floats)?;
        }
        let arrived = |_: usize, area: &RankArea| area.started.0.load(Ordering::Acquire) > ticket.0;
        if wait {
            group.wait(&Wait { what: &|| group.describe(&pending.what), arrived: &arrived })?;
        } else if !group.all_arrived(&arrived) {
            return Ok(None);
        }
        // Not before now: a mismatch is reported by whoever announced last, before it starts.
        group.check()?;
        let any = pending.reduce(group, ticket, segments)?;
        self.pending.pop_front();
        self.finished += 1;
        group.me().finished.0.store(self.finished, Ordering::SeqCst);
        group.ring(group.rank);
        Ok(Some(any))
    }

    pub fn finished(&self, group: &Group, ticket: Ticket, wait: bool) -> Result<bool> {
        if ticket.0 >= self.finished {
            return match wait {
                false => Ok(false),
                true => {
                    Err(err!(InvalidState, "waiting for reduce-scatter {}, which this rank has not finished", ticket.0))
                }
            };
        }
        let arrived = |_: usize, area: &RankArea| area.finished.0.load(Ordering::Acquire) > ticket.0;
        if group.all_arrived(&arrived) {
            return Ok(true);
        }
        if wait {
            let what = || {
                let age = (self.started - ticket.0) as usize;
                let known = self.recent.len().checked_sub(age).and_then(|i| self.recent.get(i));
                let name = known.map_or_else(|| format!("reduce-scatter {}", ticket.0), |a| group.describe(a));
                format!("the end of {name}")
            };
            group.wait(&Wait { what: &what, arrived: &arrived })?;
        }
        Ok(wait)
    }
}

impl Pending {
    /// This rank's part: the mean of every segment over the ranks that have its parameter.
    fn reduce(&self, group: &Group, ticket: Ticket, segments: &[Segment]) -> Result<Vec<bool>> {
        let mut slots = Vec::with_capacity(group.world);
        for r in 0..group.world {
            let index =
                group.control.rank(r).reductions[ticket.0 as usize % RING].slot.load(Ordering::Relaxed) as usize;
            if self.segment.layout.sizes.get(index).is_none_or(|size| (*size as u64) < self.what.tag.bytes) {
                return Err(group.fail(err!(
                    Mismatch,
                    "rank {r} published gradient slot {index} for {}, which does not fit",
                    group.describe(&self.what)
                )));
            }
            slots.push((self.segment.data(r, index).cast::<f32>(), self.segment.flags(r, index)));
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
