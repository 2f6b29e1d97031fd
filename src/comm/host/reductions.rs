//! From sums over the ranks to this rank's means, in the order in which reductions were announced.

use super::flight::Flights;
use super::work::{Presence, Reduce, Work};
use crate::comm::shm::{Announcement, Detail};
use crate::comm::{reduce, Kind, ReduceTarget, Slot, Tag, Ticket};
use crate::dtype::DType;
use crate::error::{err, Result};
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Weak};

/// The allocations of slots, by their number.
#[derive(Default)]
pub struct Reductions {
    all: Vec<Allocation>,
}

struct Allocation {
    slots: Vec<Slot>,
    owner: Weak<dyn Any + Send + Sync>,
    units: Range<u32>,
}

impl Reductions {
    /// Slots that reductions may use from now on, and their number.
    pub fn add(&mut self, slots: &[Slot], owner: &Arc<dyn Any + Send + Sync>, units: Range<u32>) -> u64 {
        self.all.push(Allocation { slots: slots.to_vec(), owner: Arc::downgrade(owner), units });
        self.all.len() as u64 - 1
    }

    pub fn start(&mut self, flights: &mut Flights, tag: Tag, slot: &Slot, present: &[bool]) -> Result<Ticket> {
        let has =
            |a: &Allocation| a.slots.get(slot.index).is_some_and(|s| s.data == slot.data && s.bytes == slot.bytes);
        let found = self.all.iter().enumerate().find(|(_, a)| has(a) && a.owner.strong_count() > 0);
        let (id, owner) = found
            .and_then(|(id, a)| Some((id as u64, a.owner.upgrade()?)))
            .ok_or_else(|| err!(InvalidArgument, "the gradient slot is not of this communicator"))?;
        let (bytes, world) = (tag.bytes, flights.world as u64);
        if !reduce::supports(tag.dtype) || bytes % (tag.dtype.size() as u64 * world) != 0 {
            return Err(err!(Unsupported, "a reduce-scatter of {bytes} bytes of {} over {world} ranks", tag.dtype));
        }
        if bytes > slot.bytes as u64 || !self.all[id as usize].units.contains(&tag.unit) {
            let room = slot.bytes;
            return Err(err!(
                InvalidArgument,
                "a reduce-scatter of {bytes} bytes of unit {} does not fit a slot of {room}",
                tag.unit
            ));
        }
        let what = Announcement { tag, detail: Detail::Slots(id as u32, present.len() as u32) };
        let work = Reduce::new(flights.table.as_ref(), flights.world, id, tag, present, slot.data, owner);
        // The others would wait for this rank.
        let work = work.map_err(|e| {
            let place = format!("rank {}: {}", flights.rank, what.describe(&flights.names));
            flights.broken.fail(e.context(place))
        })?;
        let number = flights.launch(what, Presence::of(present) as u64, Work::Reduce(work))?;
        Ok(Ticket { slots: id, number })
    }

    /// Writes the means of what is done, as far as it is done in order.
    pub fn apply(&mut self, flights: &mut Flights, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        let allocation = self.all.get(slots as usize);
        let units =
            &allocation.ok_or_else(|| err!(InvalidArgument, "the gradient slots are not of this communicator"))?.units;
        loop {
            let of_slots = |w: &Work| matches!(w, Work::Reduce(r) if r.slots == slots);
            let Some((&sequence, flight)) = flights.flights.iter().find(|(_, f)| of_slots(&f.work)) else {
                return Ok(());
            };
            if !flight.is_done() {
                return Ok(());
            }
            let Work::Reduce(done) = flights.take(sequence)?.work else { return Ok(()) };
            let tag = done.tag;
            if !units.contains(&tag.unit) {
                return Err(flights.broken.fail(err!(
                    Mismatch,
                    "unit {} was reduced, which has no slots here",
                    tag.unit
                )));
            }
            let unit = (tag.unit - units.start) as usize;
            let (size, per_rank) = (tag.dtype.size(), tag.bytes as usize / tag.dtype.size() / flights.world);
            let first = flights.rank * per_rank;
            let segments = if done.has_sums() { target.segments(unit) } else { &[] };
            for s in segments.iter().filter(|s| done.present[s.param]) {
                assert!(
                    s.offset >= first && s.offset + s.len <= first + per_rank,
                    "a segment outside this rank's range"
                );
                // SAFETY: the segment lies in the sums (asserted), which `done` keeps; `out` is the host's, for `len` floats.
                unsafe {
                    let sums = done.sums().add((s.offset - first) * size);
                    reduce::mean(tag.dtype, &[tag.dtype], &[sums], flights.world, s.out, s.len, s.accumulate);
                }
            }
            target.reduced(unit, &done.present);
        }
    }

    /// This rank starts no more: takes part in what others still start, until all have ended.
    pub fn end(&mut self, flights: &mut Flights, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        let what = Announcement::sized(Kind::EndReductions, DType::U8, 0, Detail::Slots(slots as u32, 0));
        loop {
            let sequence = flights.launch(what, 0, Work::End)?;
            flights.land(sequence)?;
            let joined = matches!(flights.flights.get(&sequence), Some(f) if matches!(f.work, Work::Reduce(_)));
            if !joined {
                flights.take(sequence)?;
                break;
            }
        }
        let of_slots = |w: &Work| matches!(w, Work::Reduce(r) if r.slots == slots);
        let pending: Vec<u64> = flights.flights.iter().filter(|(_, f)| of_slots(&f.work)).map(|(s, _)| *s).collect();
        for sequence in pending {
            flights.land(sequence)?;
        }
        self.apply(flights, slots, target)
    }
}
