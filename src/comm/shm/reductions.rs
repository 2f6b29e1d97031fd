//! Reduce-scatters in flight, matched by unit.
//!
//! Every rank publishes what it starts as a stream of [`Publication`]s in shared memory, and takes in the streams of the
//! others. The n-th publication of a unit within an iteration (the time between two `reduce_end`s) belongs to the n-th
//! of that unit on every rank; a rank whose iteration is over counts as having no gradients for what it did not publish.
//! So ranks may start in any order and skip units. Every allocation of slots has a queue of its own, so that engines
//! which share a communicator do not wait for each other.
//!
//! Why nothing waits for ever: while all ranks start in the same order, the rank that is furthest behind never waits for
//! a slot, because everything it has published can be done by all. Once a stream differs from this rank's own, it waits
//! for slots no more (`reduce_wait` returns false), and `reduce_end` waits for nothing but the others' ends.

use super::control::{Announcement, Detail, RankArea, RING};
use super::group::Group;
use super::segment::{Publication, SlotSegment};
use super::wait::Wait;
use crate::comm::{reduce, Held, Kind, ReduceTarget, Slot, Tag, Ticket};
use crate::dtype::DType;
use crate::error::{err, Result};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How long a wait for a slot lasts where engines share a communicator: the rank that should free it may itself be
/// waiting for this one in another engine.
const PATIENCE: Duration = Duration::from_secs(1);

/// The queues of all slots that are still owned by somebody.
#[derive(Default)]
pub struct Reductions {
    queues: Vec<Queue>,
}

/// A start whose arguments were checked.
pub struct Start {
    queue: usize,
    slot: usize,
    unit: u32,
}

struct Queue {
    segment: Weak<SlotSegment>,
    id: u64,
    /// The communicator's numbers of the units.
    units: Range<u32>,
    /// Times `reduce_end` has returned.
    iteration: u64,
    /// What each rank has started in this iteration, in order, as far as this rank has taken it in.
    streams: Vec<Stream>,
    /// Times each rank has started each unit in this iteration: `[rank * units + unit]`.
    counts: Vec<u32>,
    /// Not done by this rank yet, in the order in which it learnt of them.
    open: Vec<Reduction>,
    /// Some rank has started in another order than this one in this iteration.
    differs: bool,
    // Scratch, to allocate nothing per reduction.
    present: Vec<bool>,
    flags: Vec<*const u8>,
    slots: Vec<(usize, usize)>,
    types: Vec<DType>,
    sources: Vec<*const u8>,
}

// SAFETY: the raw pointers are scratch of one call.
unsafe impl Send for Queue {}

/// A rank's stream of publications.
#[derive(Default)]
struct Stream {
    /// Publications taken in since the beginning.
    taken: u64,
    /// Units of this iteration.
    order: Vec<u32>,
    /// The rank starts no more in this iteration.
    ended: bool,
}

struct Reduction {
    unit: u32,
    /// Which one of this unit in this iteration.
    occurrence: u32,
    tag: Tag,
    params: u32,
    /// The publication of each rank, once it has one.
    from: Vec<Option<u64>>,
}

impl Reductions {
    /// Slots that reductions may use from now on.
    pub fn add(&mut self, segment: &Arc<SlotSegment>, units: Range<u32>, world: usize) {
        self.queues.retain(|q| q.segment.strong_count() > 0);
        self.queues.push(Queue {
            segment: Arc::downgrade(segment),
            id: segment.id as u64,
            iteration: 0,
            streams: (0..world).map(|_| Stream::default()).collect(),
            counts: vec![0; world * units.len()],
            units,
            open: Vec::new(),
            differs: false,
            present: Vec::new(),
            flags: Vec::new(),
            slots: Vec::new(),
            types: Vec::new(),
            sources: Vec::new(),
        });
    }

    /// Checks the arguments of a start.
    pub fn prepare(&self, group: &Group, tag: Tag, slot: &Slot, held: &[Held]) -> Result<Start> {
        let owner = |(i, q): (usize, &Queue)| {
            let segment = q.segment.upgrade()?;
            segment.find(group.rank, slot.data, slot.index).then_some((i, segment))
        };
        let found = self.queues.iter().enumerate().find_map(owner);
        let (index, segment) =
            found.ok_or_else(|| err!(InvalidArgument, "the gradient slot is not of this communicator"))?;
        let queue = &self.queues[index];
        let (size, flags) = (segment.layout.sizes[slot.index], segment.layout.flags);
        if !reduce::supports(tag.dtype) || tag.bytes % tag.dtype.size() as u64 != 0 {
            return Err(err!(Unsupported, "a reduce-scatter of {} bytes of {}", tag.bytes, tag.dtype));
        }
        if !reduce::fits(tag, size) || held.len() > flags {
            let (bytes, n) = (tag.bytes, held.len());
            return Err(err!(
                InvalidArgument,
                "a reduce-scatter of {bytes} bytes, {n} parameters does not fit slot {} of {size} bytes, {flags} parameters",
                slot.index
            ));
        }
        if !queue.units.contains(&tag.unit) {
            return Err(err!(InvalidArgument, "unit {} has no gradient slots here", tag.unit));
        }
        let last = segment.last_ticket[slot.index].load(Ordering::Relaxed);
        if last > 0 && !queue.done(group, &segment, last - 1) {
            let last = last - 1;
            return Err(err!(InvalidState, "gradient slot {} is still read by reduce-scatter {last}", slot.index));
        }
        // The ring entry that this one overwrites must have been read by all.
        let overwritten = queue.streams[group.rank].taken.checked_sub(RING as u64);
        if overwritten.is_some_and(|number| !queue.done(group, &segment, number)) {
            return Err(err!(InvalidState, "{RING} reduce-scatters are started and not done"));
        }
        Ok(Start { queue: index, slot: slot.index, unit: tag.unit - queue.units.start })
    }

    /// Publishes the slot.
    pub fn start(&mut self, group: &Group, start: Start, tag: Tag, held: &[Held]) -> Result<Ticket> {
        let queue = &mut self.queues[start.queue];
        let segment = queue.segment()?;
        let number = queue.streams[group.rank].taken;
        let flags = segment.flags(group.rank, start.slot);
        for (i, &is) in held.iter().enumerate() {
            // SAFETY: `held` is no longer than the slot's flags (checked in `prepare`); the slot is not being read.
            unsafe { flags.add(i).write(is as u8) };
        }
        segment.note_ticket(start.slot, number);
        let progress = segment.progress(group.rank);
        progress.entry(number).write(queue.iteration, start.unit, start.slot, tag, held.len());
        // Releases the gradient, the flags and the entry to the ranks that acquire `started`.
        progress.started.0.store(number + 1, Ordering::SeqCst);
        group.ring(group.rank);
        queue.take(group, group.rank, number, &segment)?;
        Ok(Ticket { slots: queue.id, number })
    }

    pub fn ready(&mut self, group: &Group, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        let queue = self.queue(slots)?;
        let segment = queue.segment()?;
        queue.progress(group, &segment, target)
    }

    pub fn done(&self, group: &Group, ticket: Ticket) -> Result<bool> {
        let queue = self.queues.iter().find(|q| q.id == ticket.slots);
        let queue = queue.ok_or_else(|| err!(InvalidArgument, "the reduce-scatter is not of this communicator"))?;
        Ok(queue.done(group, &*queue.segment()?, ticket.number))
    }

    pub fn wait(
        &mut self,
        group: &Group,
        ticket: Ticket,
        target: &mut dyn ReduceTarget,
        may_give_up: bool,
    ) -> Result<bool> {
        let patience = (may_give_up && self.queues.len() > 1).then_some(PATIENCE);
        let queue = self.queue(ticket.slots)?;
        let segment = queue.segment()?;
        if ticket.number >= queue.streams[group.rank].taken {
            return Err(err!(InvalidState, "waiting for reduce-scatter {}, which was not started", ticket.number));
        }
        loop {
            queue.progress(group, &segment, target)?;
            if queue.done(group, &segment, ticket.number) {
                return Ok(true);
            }
            if (may_give_up && queue.differs) || !queue.wait_for_a_reader(group, &segment, ticket.number, patience)? {
                return Ok(false);
            }
        }
    }

    /// The part of `reduce_end` that follows its announcement.
    pub fn end(&mut self, group: &Group, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        let queue = self.queue(slots)?;
        let segment = queue.segment()?;
        let ended = queue.iteration + 1;
        queue.streams[group.rank].ended = true;
        segment.progress(group.rank).ended.0.store(ended, Ordering::SeqCst);
        group.ring(group.rank);
        loop {
            queue.progress(group, &segment, target)?;
            let behind = group.others().find(|r| !queue.streams[*r].ended);
            let Some(rank) = behind else { break };
            let arrived = |r: usize, _: &RankArea| {
                segment.progress(r).ended.0.load(Ordering::Acquire) >= ended || queue.moved(group, &segment)
            };
            let what = || Announcement::plain(Kind::EndReductions).describe(&[]);
            group.wait_for(rank, &Wait { what: &what, arrived: &arrived }, None)?;
        }
        queue.iteration = ended;
        queue.counts.fill(0);
        queue.differs = false;
        for stream in &mut queue.streams {
            stream.order.clear();
            stream.ended = false;
        }
        Ok(())
    }

    /// The end of an iteration as it is announced.
    pub fn end_announcement(&self, slots: u64) -> Announcement {
        Announcement::sized(Kind::EndReductions, DType::U8, 0, Detail::Slots(slots as u32, 0))
    }

    pub fn trim(&mut self, group: &Group, slots: u64, slot: &Slot) {
        if let Ok(segment) = self.queue(slots).and_then(|q| q.segment()) {
            if segment.find(group.rank, slot.data, slot.index) {
                segment.trim(group.rank, slot.index);
            }
        }
    }

    fn queue(&mut self, slots: u64) -> Result<&mut Queue> {
        let found = self.queues.iter_mut().find(|q| q.id == slots);
        found.ok_or_else(|| err!(InvalidArgument, "the gradient slots are not of this communicator"))
    }
}

impl Queue {
    fn segment(&self) -> Result<Arc<SlotSegment>> {
        self.segment.upgrade().ok_or_else(|| err!(InvalidState, "the gradient slots were freed"))
    }

    /// Whether every rank has done its part of this rank's publication.
    fn done(&self, group: &Group, segment: &SlotSegment, number: u64) -> bool {
        let started = self.streams[group.rank].taken;
        let overwritten = number + RING as u64 <= started;
        let ranks = segment.progress(group.rank).entry(number).done.load(Ordering::Acquire);
        number < started && (overwritten || ranks == all(group.world))
    }

    /// Whether another rank has published or ended since this one looked.
    fn moved(&self, group: &Group, segment: &SlotSegment) -> bool {
        group.others().any(|r| {
            let (progress, stream) = (segment.progress(r), &self.streams[r]);
            !stream.ended
                && (progress.started.0.load(Ordering::Acquire) > stream.taken
                    || progress.ended.0.load(Ordering::Acquire) > self.iteration)
        })
    }

    /// Takes in what the others have published, and does this rank's part of what is complete.
    fn progress(&mut self, group: &Group, segment: &SlotSegment, target: &mut dyn ReduceTarget) -> Result<()> {
        for rank in group.others() {
            if self.streams[rank].ended {
                continue;
            }
            let progress = segment.progress(rank);
            // Read first: whoever has ended this iteration has published all of it.
            let ended = progress.ended.0.load(Ordering::Acquire) > self.iteration;
            let started = progress.started.0.load(Ordering::Acquire);
            while self.streams[rank].taken < started {
                let number = self.streams[rank].taken;
                if progress.entry(number).iteration.load(Ordering::Relaxed) != self.iteration {
                    break;
                }
                self.take(group, rank, number, segment)?;
            }
            self.streams[rank].ended = ended;
        }
        let mut at = 0;
        while at < self.open.len() {
            if !(0..group.world).all(|r| self.open[at].from[r].is_some() || self.streams[r].ended) {
                at += 1;
                continue;
            }
            // Not before now: whatever broke the job is the better message.
            group.check()?;
            let reduction = self.open.remove(at);
            self.reduce(group, segment, &reduction, target)?;
        }
        Ok(())
    }

    /// Takes in publication `number` of `rank`.
    fn take(&mut self, group: &Group, rank: usize, number: u64, segment: &SlotSegment) -> Result<()> {
        let entry = segment.progress(rank).entry(number);
        let (unit, params) = (entry.unit.load(Ordering::Relaxed), entry.params.load(Ordering::Relaxed));
        let kind = Kind::ReduceScatter;
        let (dtype, bytes) = (entry.dtype(), entry.bytes.load(Ordering::Relaxed));
        let slot = entry.slot.load(Ordering::Relaxed) as usize;
        let size = segment.layout.sizes.get(slot);
        let tag = dtype.map(|dtype| Tag { kind, unit: self.units.start + unit, dtype, bytes });
        let fits = |tag: &Tag| (unit as usize) < self.units.len() && size.is_some_and(|size| reduce::fits(*tag, *size));
        let Some(tag) = tag.filter(fits) else {
            return Err(
                group.fail(err!(Mismatch, "rank {rank} published a reduce-scatter of unit {unit} that is none"))
            );
        };
        let occurrence = &mut self.counts[rank * self.units.len() + unit as usize];
        *occurrence += 1;
        let occurrence = *occurrence;
        let at = match self.open.iter().position(|r| r.unit == unit && r.occurrence == occurrence) {
            Some(at) => at,
            None => {
                let from = vec![None; group.world];
                self.open.push(Reduction { unit, occurrence, tag, params, from });
                self.open.len() - 1
            }
        };
        let known = &mut self.open[at];
        if known.tag != tag || known.params != params {
            let (theirs, mine) = (Announcement::reduce(tag, params), Announcement::reduce(known.tag, known.params));
            let (theirs, mine) = (group.describe(&theirs), group.describe(&mine));
            return Err(group.fail(err!(Mismatch, "ranks disagree: rank {rank} runs {theirs}, but others run {mine}")));
        }
        known.from[rank] = Some(number);
        let stream = &mut self.streams[rank];
        stream.taken = number + 1;
        stream.order.push(unit);
        let place = stream.order.len() - 1;
        let same = |r: usize| self.streams[r].order.get(place).is_none_or(|u| *u == unit);
        self.differs |= match rank == group.rank {
            true => !group.others().all(same),
            false => !same(group.rank),
        };
        Ok(())
    }

    /// Sleeps until another rank may have moved towards doing its part of this rank's publication `number`; false when
    /// patience is over.
    fn wait_for_a_reader(
        &self,
        group: &Group,
        segment: &SlotSegment,
        number: u64,
        patience: Option<Duration>,
    ) -> Result<bool> {
        let me = group.rank;
        // The oldest that this rank has published and some rank has not: everything before it is done here.
        let oldest = self.open.iter().find(|r| r.from[me].is_some());
        let missing = oldest.and_then(|r| group.others().find(|p| r.from[*p].is_none() && !self.streams[*p].ended));
        let entry = segment.progress(me).entry(number);
        let has_read = |rank: usize| entry.done.load(Ordering::Acquire) & 1 << rank != 0;
        let rank = missing.or_else(|| group.others().find(|r| !has_read(*r)));
        let Some(rank) = rank else { return Ok(true) };
        let arrived = |r: usize, _: &RankArea| (missing.is_none() && has_read(r)) || self.moved(group, segment);
        let unit = self.units.start + entry.unit.load(Ordering::Relaxed);
        let tag = oldest.map_or(Tag { kind: Kind::ReduceScatter, unit, dtype: DType::F32, bytes: 0 }, |r| r.tag);
        let what = || group.describe(&Announcement { tag, detail: Detail::None });
        group.wait_for(rank, &Wait { what: &what, arrived: &arrived }, patience)
    }

    /// This rank's part: the mean of every segment over the ranks that have its parameter.
    fn reduce(
        &mut self,
        group: &Group,
        segment: &SlotSegment,
        what: &Reduction,
        target: &mut dyn ReduceTarget,
    ) -> Result<()> {
        let (flags, slots) = (&mut self.flags, &mut self.slots);
        flags.clear();
        slots.clear();
        for (rank, number) in what.from.iter().enumerate() {
            let Some(number) = number else { continue };
            let slot = segment.progress(rank).entry(*number).slot.load(Ordering::Relaxed) as usize;
            flags.push(segment.flags(rank, slot).cast_const());
            slots.push((rank, slot));
        }
        // SAFETY: every rank wrote `params` flags before it published (`take` compared the numbers), and writes them
        // again only after this rank has marked the publication as done.
        let held = |at: usize, param: usize| Held::from_code(unsafe { flags[at].add(param).read() });
        let elements = what.tag.bytes as usize / what.tag.dtype.size();
        for s in target.segments(what.unit as usize) {
            assert!(s.param < what.params as usize && s.offset + s.len <= elements, "a segment outside its unit");
            self.types.clear();
            self.sources.clear();
            for (at, &(rank, slot)) in slots.iter().enumerate() {
                let held = held(at, s.param);
                if !held.is_there() {
                    continue;
                }
                let (dtype, first) = s.place(held, elements);
                assert!(first + s.len * dtype.size() <= segment.layout.sizes[slot], "a segment outside its slot");
                self.types.push(dtype);
                // SAFETY: the segment lies in the rank's slot (asserted).
                self.sources.push(unsafe { segment.data(rank, slot).add(first) });
            }
            // SAFETY: the sources are published and stay unwritten until this rank is done; `out` is the host's private
            // memory for `len` floats.
            unsafe {
                let (dtype, types, sources) = (what.tag.dtype, &self.types, &self.sources);
                reduce::mean(dtype, types, sources, group.world, s.out, s.len, s.accumulate)
            };
        }
        self.present.clear();
        self.present.extend((0..what.params as usize).map(|p| (0..flags.len()).any(|at| held(at, p).is_there())));
        target.reduced(what.unit as usize, &self.present);
        for (rank, number) in what.from.iter().enumerate() {
            if let Some(number) = number {
                segment.progress(rank).entry(*number).done.fetch_or(1 << group.rank, Ordering::SeqCst);
            }
        }
        group.ring(group.rank);
        Ok(())
    }
}

/// A bit for every rank.
fn all(world: usize) -> u64 {
    u64::MAX >> (64 - world)
}

impl Publication {
    fn write(&self, iteration: u64, unit: u32, slot: usize, tag: Tag, params: usize) {
        self.iteration.store(iteration, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
        self.bytes.store(tag.bytes, Ordering::Relaxed);
        self.unit.store(unit, Ordering::Relaxed);
        self.slot.store(slot as u32, Ordering::Relaxed);
        self.params.store(params as u32, Ordering::Relaxed);
        self.dtype.store(tag.dtype as u32, Ordering::Relaxed);
    }

    fn dtype(&self) -> Option<DType> {
        let code = self.dtype.load(Ordering::Relaxed);
        DType::ALL.into_iter().find(|d| *d as u32 == code)
    }
}

const _: () = assert!(super::MAX_WORLD <= 64, "Publication::done has a bit for every rank");
