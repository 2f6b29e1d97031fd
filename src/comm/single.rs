//! The communicator of world size 1: plain memory of this process, under the same contract as with several ranks.

use super::memory::Mapping;
use super::{
    combine, memory, reduce, Arena, Check, Communicator, Held, ReduceOp, ReduceTarget, Slot, Slots, Tag, Ticket,
    UnitName,
};
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// A communicator of one rank.
pub fn init() -> Arc<dyn Communicator> {
    Arc::new(Single { state: Mutex::new(State::default()) })
}

struct Single {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    broken: Option<Error>,
    units: u32,
    arenas: u64,
    /// By their number.
    slots: Vec<Range<u32>>,
    started: u64,
    pending: Vec<Pending>,
}

/// A reduction that was started and not done.
struct Pending {
    ticket: Ticket,
    slot: Slot,
    tag: Tag,
    held: Vec<Held>,
}

/// The memory of one arena and its count of READ phases.
struct ArenaMemory {
    mapping: Mapping,
    opened: AtomicU64,
    closed: AtomicU64,
}

impl ArenaMemory {
    fn of(arena: &Arena) -> Result<&ArenaMemory> {
        arena.owner.downcast_ref().ok_or_else(|| err!(InvalidArgument, "the arena is of another communicator"))
    }

    fn is_open(&self) -> bool {
        self.opened.load(Ordering::Acquire) != self.closed.load(Ordering::Acquire)
    }
}

impl Single {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|p| p.into_inner())
    }

    fn working(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock();
        match &state.broken {
            Some(e) => Err(e.clone()),
            None => Ok(state),
        }
    }
}

impl Communicator for Single {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn name_units(&self, names: &[UnitName]) -> u32 {
        let mut state = self.lock();
        let first = state.units;
        state.units += names.len() as u32;
        first
    }

    fn barrier(&self) -> Result<()> {
        self.working().map(drop)
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        drop(self.working()?);
        Ok(vec![bytes.to_vec()])
    }

    fn all_reduce(&self, data: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()> {
        combine::check(data.len(), dtype, op)?;
        self.working().map(drop)
    }

    fn broadcast(&self, data: &mut [u8], dtype: DType, root: usize) -> Result<()> {
        combine::check(data.len(), dtype, ReduceOp::Sum)?;
        if root != 0 {
            return Err(err!(InvalidArgument, "root {root} is out of range for world size 1"));
        }
        self.working().map(drop)
    }

    fn all_gather_host(&self, input: &[u8], output: &mut [u8], dtype: DType) -> Result<()> {
        combine::check(input.len(), dtype, ReduceOp::Sum)?;
        same_length(input.len(), output.len())?;
        drop(self.working()?);
        output.copy_from_slice(input);
        Ok(())
    }

    fn reduce_scatter_host(&self, input: &[u8], output: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()> {
        combine::check(input.len(), dtype, op)?;
        same_length(input.len(), output.len())?;
        drop(self.working()?);
        output.copy_from_slice(input);
        Ok(())
    }

    fn announce(&self, _tag: Tag, _check: Check, _place: Option<u32>) -> Result<()> {
        self.working().map(drop)
    }

    fn alloc_arena(&self, bytes: usize) -> Result<Arena> {
        let mut state = self.working()?;
        let mapping = Mapping::anonymous(bytes)?;
        mapping.advise_huge();
        let base = mapping.base();
        let memory = ArenaMemory { mapping, opened: AtomicU64::new(0), closed: AtomicU64::new(0) };
        debug_assert!(memory.mapping.bytes() >= bytes);
        state.arenas += 1;
        Ok(Arena { base, bytes, id: state.arenas - 1, owner: Arc::new(memory) })
    }

    fn alloc_slots(&self, sizes: &[usize], _flags: usize, units: Range<u32>) -> Result<Slots> {
        let mut state = self.working()?;
        let (mapping, slots) = memory::slots(sizes)?;
        state.slots.push(units);
        Ok(Slots { slots, id: state.slots.len() as u64 - 1, owner: Arc::new(mapping) })
    }

    fn open_reads(&self, arena: &Arena) -> Result<()> {
        drop(self.working()?);
        let memory = ArenaMemory::of(arena)?;
        if memory.is_open() {
            return Err(err!(InvalidState, "the READ phase of this arena is open already"));
        }
        memory.opened.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    fn all_gather(&self, _tag: Tag, arena: &Arena, _check: Check) -> Result<()> {
        drop(self.working()?);
        match ArenaMemory::of(arena)?.is_open() {
            true => Ok(()),
            false => Err(err!(InvalidState, "all-gather outside a READ phase")),
        }
    }

    fn close_reads(&self, arena: &Arena) {
        if let Ok(memory) = ArenaMemory::of(arena) {
            memory.closed.store(memory.opened.load(Ordering::Acquire), Ordering::Release);
        }
    }

    fn wait_writable(&self, arena: &Arena) -> Result<()> {
        drop(self.working()?);
        match ArenaMemory::of(arena)?.is_open() {
            false => Ok(()),
            true => Err(err!(InvalidState, "this rank's own READ phase is still open")),
        }
    }

    fn reduce_start(&self, tag: Tag, slot: &Slot, held: &[Held]) -> Result<Ticket> {
        let mut state = self.working()?;
        if !reduce::supports(tag.dtype) || !reduce::fits(tag, slot.bytes) {
            let (bytes, room) = (tag.bytes, slot.bytes);
            return Err(err!(
                InvalidArgument,
                "a reduce-scatter of {bytes} bytes of {} does not fit a slot of {room}",
                tag.dtype
            ));
        }
        let slots = state.slots.iter().position(|units| units.contains(&tag.unit));
        let slots = slots.ok_or_else(|| err!(InvalidArgument, "unit {} has no gradient slots", tag.unit))? as u64;
        let ticket = Ticket { slots, number: state.started };
        state.started += 1;
        state.pending.push(Pending { ticket, slot: *slot, tag, held: held.to_vec() });
        Ok(ticket)
    }

    fn reduce_ready(&self, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        let mut state = self.working()?;
        let first = state.slots.get(slots as usize).map(|units| units.start);
        let first = first.ok_or_else(|| err!(InvalidArgument, "the gradient slots are not of this communicator"))?;
        while let Some(next) = state.pending.iter().position(|p| p.ticket.slots == slots) {
            let pending = state.pending.remove(next);
            let unit = (pending.tag.unit - first) as usize;
            let dtype = pending.tag.dtype;
            let elements = pending.tag.bytes as usize / dtype.size();
            for s in target.segments(unit).iter().filter(|s| pending.held[s.param].is_there()) {
                let (of, at) = s.place(pending.held[s.param], elements);
                let end = at + s.len * of.size();
                assert!(s.offset + s.len <= elements && end <= pending.slot.bytes, "a segment outside its unit");
                // SAFETY: the segment lies in the slot (asserted), whose owner is alive and which the host does not
                // write before this returns; `out` is the host's, for `len` floats.
                unsafe {
                    let source = pending.slot.data.add(at).cast_const();
                    reduce::mean(dtype, &[of], &[source], 1, s.out, s.len, s.accumulate);
                }
            }
            // In the same memory.
            let present: Vec<bool> = pending.held.into_iter().map(Held::is_there).collect();
            target.reduced(unit, &present);
        }
        Ok(())
    }

    fn reduce_done(&self, ticket: Ticket) -> Result<bool> {
        let state = self.working()?;
        Ok(ticket.number < state.started && !state.pending.iter().any(|p| p.ticket == ticket))
    }

    fn reduce_wait(&self, ticket: Ticket, target: &mut dyn ReduceTarget, _may_give_up: bool) -> Result<bool> {
        self.reduce_ready(ticket.slots, target)?;
        match self.reduce_done(ticket)? {
            true => Ok(true),
            false => Err(err!(InvalidState, "waiting for reduce-scatter {}, which was not started", ticket.number)),
        }
    }

    fn reduce_end(&self, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        self.reduce_ready(slots, target)
    }

    fn trim_slot(&self, _slots: u64, slot: &Slot) {
        // SAFETY: the range is the slot's, which is free.
        unsafe { memory::give_back(slot.data, slot.bytes) };
    }

    fn split(&self, _color: u32, _key: i32) -> Result<Arc<dyn Communicator>> {
        drop(self.working()?);
        Ok(init())
    }

    fn abort(&self, reason: &str) {
        self.lock().broken.get_or_insert_with(|| err!(Aborted, "rank 0 aborted: {reason}"));
    }

    fn async_error(&self) -> Option<Error> {
        self.lock().broken.clone()
    }
}

fn same_length(input: usize, output: usize) -> Result<()> {
    match input == output {
        true => Ok(()),
        false => Err(err!(InvalidArgument, "input of {input} bytes and output of {output} differ at world size 1")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Kind, NO_UNIT};
    use crate::error::Status;

    fn tag(kind: Kind, bytes: u64) -> Tag {
        Tag { kind, unit: NO_UNIT, dtype: DType::F32, bytes }
    }

    #[test]
    fn phases_are_checked() {
        let c = init();
        let arena = c.alloc_arena(100).unwrap();
        assert_eq!(arena.base as usize % 64, 0);
        let gather = tag(Kind::AllGather, 100);
        assert_eq!(c.all_gather(gather, &arena, Check::Announce).unwrap_err().status, Status::InvalidState);
        c.open_reads(&arena).unwrap();
        assert_eq!(c.open_reads(&arena).unwrap_err().status, Status::InvalidState);
        c.all_gather(gather, &arena, Check::Announce).unwrap();
        assert_eq!(c.wait_writable(&arena).unwrap_err().status, Status::InvalidState);
        c.close_reads(&arena);
        c.wait_writable(&arena).unwrap();
    }

    struct Means {
        segments: Vec<crate::comm::Segment>,
        present: Vec<bool>,
    }

    impl ReduceTarget for Means {
        fn segments(&mut self, unit: usize) -> &[crate::comm::Segment] {
            assert_eq!(unit, 0);
            &self.segments
        }
        fn reduced(&mut self, _: usize, present: &[bool]) {
            self.present = present.to_vec();
        }
    }

    #[test]
    fn mean_of_one_and_presence() {
        let c = init();
        let first = c.name_units(&[UnitName { label: "u".into(), params: String::new() }]);
        let slots = c.alloc_slots(&[32, 64], 2, first..first + 1).unwrap();
        let slot = slots.slots[1];
        for i in 0..16 {
            // SAFETY: the slot has 16 floats.
            unsafe { slot.data.cast::<f32>().add(i).write(i as f32) };
        }
        let what = Tag { kind: Kind::ReduceScatter, unit: first, dtype: DType::F32, bytes: 64 };
        let ticket = c.reduce_start(what, &slot, &[Held::Float32, Held::Nothing]).unwrap();
        let mut out = [100f32; 6];
        let at = out.as_mut_ptr();
        let segment = |param, offset, len, o: usize, accumulate| {
            // SAFETY: `o` lies in `out`.
            crate::comm::Segment { param, offset, len, narrow: DType::F32, out: unsafe { at.add(o) }, accumulate }
        };
        let segments = vec![segment(0, 2, 2, 0, false), segment(0, 4, 2, 2, true), segment(1, 8, 2, 4, false)];
        let mut means = Means { segments, present: Vec::new() };
        assert!(!c.reduce_done(ticket).unwrap());
        assert!(c.reduce_wait(ticket, &mut means, true).unwrap());
        assert_eq!(means.present, [true, false]);
        assert_eq!(out, [2.0, 3.0, 104.0, 105.0, 100.0, 100.0]);
        assert!(c.reduce_done(ticket).unwrap());
        let none = Ticket { number: 1, ..ticket };
        assert_eq!(c.reduce_wait(none, &mut means, true).unwrap_err().status, Status::InvalidState);
        assert!(c.reduce_start(what, &slots.slots[0], &[Held::Float32]).is_err(), "64 bytes do not fit 32");
    }

    #[test]
    fn abort_breaks_every_later_call() {
        let c = init();
        assert!(c.async_error().is_none());
        c.abort("disk full");
        c.abort("second");
        let e = c.barrier().unwrap_err();
        assert_eq!((e.status, e.message.as_str()), (Status::Aborted, "rank 0 aborted: disk full"));
        assert_eq!(c.async_error(), Some(e));
    }

    #[test]
    fn host_collectives_are_copies() {
        let c = init();
        let mut out = [0u8; 4];
        c.all_gather_host(&[1, 2, 3, 4], &mut out, DType::U8).unwrap();
        assert_eq!(out, [1, 2, 3, 4]);
        c.reduce_scatter_host(&2f32.to_ne_bytes(), &mut out, DType::F32, ReduceOp::Avg).unwrap();
        assert_eq!(f32::from_ne_bytes(out), 2.0);
        assert_eq!(c.exchange(b"x").unwrap(), vec![b"x".to_vec()]);
        assert!(c.broadcast(&mut out, DType::F32, 1).is_err());
        assert!(c.all_gather_host(&[1], &mut out, DType::U8).is_err());
    }
}
