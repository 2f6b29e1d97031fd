//! All-gathers where ranks share no memory, so that bytes move.
//!
//! A rank's arena is its own then: a unit buffer has room for the whole unit, but only this rank's shard is always there.
//! An all-gather fills the rest, which goes back to the system, page by page, when the unit is resharded: addresses stay,
//! memory does not. A unit without 16-bit parameters is gathered in place; of one with some, each rank sends its float32
//! pieces and its compute copies packed together, and takes the others' apart.
//!
//! All-gathers are started here and waited for when the unit is wanted, so that one that is issued ahead runs meanwhile.

use super::{Engine, State};
use crate::comm::memory::give_back;
use crate::comm::{Communicator, Tag, Transfer};
use crate::dtype::DType;
use crate::error::Result;
use crate::plan::{UnitId, UnitPlan};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// Parts begin at a multiple of this in a packed transfer.
const PACK_ALIGN: usize = 64;

/// What an engine has of other ranks' shards.
#[derive(Default)]
pub(super) struct Gathers {
    /// Float32 masters are gathered, whatever parameters are computed in.
    pub masters: bool,
    here: Vec<Gathered>,
}

/// A unit that other ranks' bytes are here of, or on their way.
struct Gathered {
    unit: UnitId,
    under_way: Option<UnderWay>,
    /// It was resharded to this group: that one's part is here.
    group: Option<usize>,
}

struct UnderWay {
    comm: Arc<dyn Communicator>,
    gather: u64,
    packed: Option<Packed>,
}

struct Packed {
    memory: *mut u8,
    part_bytes: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: an address in memory that the owner beside it keeps; used under the engine's lock.
unsafe impl Send for Packed {}

/// Bytes of a unit: in its unit buffer, or among its compute copies.
struct Run {
    copies: bool,
    /// First byte in the store's arena.
    at: usize,
    bytes: usize,
}

impl Engine {
    /// Brings a unit together, so that it can be read, and begins to gather what comes next if an order was given.
    pub(super) fn bring(&self, state: &mut State, unit: UnitId) -> Result<()> {
        if let Some(gpu) = &self.gpu {
            return self.bring_on_gpu(gpu, state, unit);
        }
        if !state.units[unit as usize].take_gathered() {
            self.all_gather(state, unit)?;
        }
        self.prefetch(state, unit)?;
        self.finish_gather(state, unit)
    }

    /// Starts the all-gather that `tag` names, of a unit that is sharded and not gathered.
    pub(super) fn start_gather(&self, state: &mut State, unit: UnitId, tag: Tag) -> Result<()> {
        let u = &self.plan().units[unit as usize];
        let comm = match state.units[unit as usize].group {
            Some(group) => state.groups[group].comm.clone(),
            None => self.comm().clone(),
        };
        let (rank, ranks) = (comm.rank(), comm.world_size());
        let store = self.store(unit);
        let narrow = u.compute_bytes > 0 && !state.gathers.masters;
        let (what, packed) = if narrow {
            let length = |part| self.runs(u, part, ranks).iter().map(|r| r.bytes).sum::<usize>();
            let part_bytes = (0..ranks).map(length).max().unwrap_or(0).next_multiple_of(PACK_ALIGN);
            let (memory, owner) = comm.staging(part_bytes * ranks)?;
            let input = memory.wrapping_add(rank * part_bytes);
            self.each_run(unit, rank, ranks, |run, at, bytes| {
                // SAFETY: the staging memory has room for the part; this rank's own pieces are always there.
                unsafe { std::ptr::copy_nonoverlapping(run.cast_const(), input.add(at), bytes) };
            });
            let packed = Packed { memory, part_bytes, _owner: owner.clone() };
            (Transfer { input, output: memory, bytes: part_bytes, owner }, Some(packed))
        } else {
            let output = store.arena.base.wrapping_add(u.arena_offset);
            let bytes = u.bytes() / ranks;
            let input = output.wrapping_add(rank * bytes).cast_const();
            (Transfer { input, output, bytes, owner: store.arena.owner.clone() }, None)
        };
        // SAFETY: the unit buffer and the staging memory are kept by their owners; the unit is sharded, so that nobody reads
        // or writes it, and shards are not written before the iteration has ended, which waits for this.
        let gather = unsafe { comm.gather_start(tag, what) }?;
        let under_way = Some(UnderWay { comm, gather, packed });
        match state.gathers.here.iter_mut().find(|g| g.unit == unit) {
            Some(known) => known.under_way = under_way,
            None => state.gathers.here.push(Gathered { unit, under_way, group: None }),
        }
        Ok(())
    }

    /// Returns when what was started for the unit is there.
    pub(super) fn finish_gather(&self, state: &mut State, unit: UnitId) -> Result<()> {
        let Some(gathered) = state.gathers.here.iter_mut().find(|g| g.unit == unit) else { return Ok(()) };
        self.finish(gathered)
    }

    fn finish(&self, gathered: &mut Gathered) -> Result<()> {
        let Some(under_way) = &gathered.under_way else { return Ok(()) };
        let label = self.plan().units[gathered.unit as usize].label();
        self.waiting(label, || under_way.comm.gather_wait(under_way.gather))?;
        let Some(UnderWay { comm, packed, .. }) = gathered.under_way.take() else { return Ok(()) };
        let Some(packed) = packed else { return Ok(()) };
        let ranks = comm.world_size();
        for part in (0..ranks).filter(|part| *part != comm.rank()) {
            let from = packed.memory.wrapping_add(part * packed.part_bytes);
            self.each_run(gathered.unit, part, ranks, |run, at, bytes| {
                // SAFETY: the part is as long as its runs together; those lie in the unit, which nobody reads yet.
                unsafe { std::ptr::copy_nonoverlapping(from.add(at), run, bytes) };
            });
        }
        Ok(())
    }

    /// Gives back what is here of units that were resharded. After an error of a collective it stays.
    #[inline]
    pub(super) fn release_resharded(&self, state: &mut State) {
        if let Some(gpu) = &self.gpu {
            // What fails here has broken the queues: the next call says so.
            let _ = gpu.release(&state.units, &state.groups);
        } else if !state.gathers.here.is_empty() {
            self.release_gathered(state);
        }
    }

    fn release_gathered(&self, state: &mut State) {
        let State { gathers, units, groups, .. } = state;
        gathers.here.retain_mut(|gathered| {
            let unit = &units[gathered.unit as usize];
            if !unit.is_sharded_and_not_gathered() || self.finish(gathered).is_err() {
                return true;
            }
            if unit.group.is_some() && unit.group == gathered.group {
                return true;
            }
            gathered.group = unit.group;
            let comm = self.comm();
            let own = (comm.rank(), comm.world_size());
            let in_group = unit.group.map(|g| (groups[g].comm.rank(), groups[g].comm.world_size()));
            self.keep_only(gathered.unit, own, in_group);
            gathered.group.is_some()
        });
    }

    /// Gives back all of a unit but these parts (a number, and of how many).
    fn keep_only(&self, unit: UnitId, own: (usize, usize), in_group: Option<(usize, usize)>) {
        let u = &self.plan().units[unit as usize];
        let parts = || std::iter::once(own).chain(in_group);
        let buffer = |(part, parts): (usize, usize)| {
            let (start, bytes) = (u.arena_offset + part * (u.bytes() / parts), u.bytes() / parts);
            start..start + bytes
        };
        let store = self.store(unit);
        // SAFETY: the unit is sharded: nobody needs what other ranks have of it.
        unsafe {
            give_back_but(store.arena.base, u.arena_offset..u.arena_offset + u.bytes(), parts().map(buffer).collect())
        };
        if u.compute_bytes > 0 {
            let runs = parts().flat_map(|(part, parts)| self.runs(u, part, parts));
            let copies = runs.filter(|run| run.copies).map(|run| run.at..run.at + run.bytes).collect();
            let all = u.compute_offset..u.compute_offset + u.compute_bytes;
            // SAFETY: as above.
            unsafe { give_back_but(store.copy_at(0), all, copies) };
        }
    }

    /// Calls `take` with the address of each run of a part, its place in the packed part, and its bytes.
    fn each_run(&self, unit: UnitId, part: usize, parts: usize, mut take: impl FnMut(*mut u8, usize, usize)) {
        let store = self.store(unit);
        let mut at = 0;
        for run in self.runs(&self.plan().units[unit as usize], part, parts) {
            let base = if run.copies { store.copy_at(0) } else { store.arena.base };
            take(base.wrapping_add(run.at), at, run.bytes);
            at += run.bytes;
        }
    }

    /// What of each parameter lies in one of the unit's equal parts, in the type that it is computed in.
    fn runs(&self, u: &UnitPlan, part: usize, parts: usize) -> Vec<Run> {
        let len = u.layout.len / parts;
        let (start, end) = (part * len, (part + 1) * len);
        let mut runs = Vec::new();
        for p in u.params.iter().map(|p| &self.plan().params[*p as usize]) {
            let offset = u.layout.offsets[p.index];
            let (from, to) = (offset.max(start), (offset + u.layout.numels[p.index]).min(end));
            if from >= to {
                continue;
            }
            let (copies, first) = match p.compute {
                DType::F32 => (false, u.arena_offset + from * DType::F32.size()),
                narrow => (true, u.compute_offset + p.compute_offset + (from - offset) * narrow.size()),
            };
            runs.push(Run { copies, at: first, bytes: (to - from) * p.compute.size() });
        }
        runs
    }
}

/// Gives back the pages of `all`, a range of bytes from `base`, that hold nothing of `kept`.
///
/// # Safety
/// As of [`give_back`], for what is not kept.
unsafe fn give_back_but(base: *mut u8, all: Range<usize>, mut kept: Vec<Range<usize>>) {
    kept.sort_by_key(|range| range.start);
    let mut at = all.start;
    for range in kept.into_iter().chain(std::iter::once(all.end..all.end)) {
        if range.start > at {
            // SAFETY: the caller's promise.
            unsafe { give_back(base.add(at), range.start - at) };
        }
        at = at.max(range.end);
    }
}
