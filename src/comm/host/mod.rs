//! The communicator on collectives that a host lends (MPI's, or its own): ranks share no memory, bytes move.
//!
//! `table` is what the host lends. `announce` is the agreement before every collective, `flight` runs collectives that are
//! under way beside each other, `work` and `call` say what each does, `reductions` turns sums into this rank's means.
//! `messages` tells the other ranks of an error and asks who is missing.
//!
//! Reductions are in the same order on every rank, unlike shm's. A rank that has ended its backward takes part without
//! gradients in what others still reduce; anything else that differs is an error on every rank before data moves.

use super::shm::{Announcement, Detail};
use super::{
    combine, memory, Arena, Check, Communicator, Held, Kind, ReduceOp, ReduceTarget, Slot, Slots, Tag, Ticket,
    Transfer, UnitName,
};
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use call::{divide, Call, HostCall};
use flight::Flights;
use messages::{Broken, Message};
use reductions::Reductions;
use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use work::{Gather, Work};

mod announce;
mod call;
mod flight;
mod messages;
mod reductions;
pub mod table;
mod work;

pub use messages::MESSAGE;
use table::Collectives;

/// Reductions of up to so many bytes are gathered and combined in rank order, as on shm.
const GATHERED: usize = 64 * 1024;

/// Most ranks: more would be a mistake, which is not to end in a lack of memory.
const MAX_WORLD: usize = 1 << 20;

/// Which rank this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    pub rank: usize,
    pub world_size: usize,
    /// How long a collective waits without anything moving.
    pub timeout: Duration,
}

/// Collective: a communicator on `table`, once all ranks have made theirs.
pub fn init(config: &Config, table: Arc<dyn Collectives>) -> Result<Arc<dyn Communicator>> {
    if config.world_size > MAX_WORLD {
        return Err(err!(InvalidArgument, "world size {} is larger than {MAX_WORLD}", config.world_size));
    }
    if config.world_size == 0 || config.rank >= config.world_size {
        return Err(err!(InvalidArgument, "rank {} is out of range for world size {}", config.rank, config.world_size));
    }
    if config.timeout.is_zero() {
        return Err(err!(InvalidArgument, "a timeout of 0 ms lets no rank arrive"));
    }
    let Config { rank, world_size, timeout } = *config;
    let broken = Arc::new(Broken::new(table.clone(), rank, world_size));
    let flights = Flights::new(table.clone(), broken.clone(), rank, world_size, timeout);
    let local = Mutex::new(Local { flights, reductions: Reductions::default(), arenas: 0, announced: Vec::new() });
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let comm = Arc::new(Host { config: *config, number, table, broken, local });
    comm.barrier()?;
    Ok(comm)
}

struct Host {
    config: Config,
    /// Tells this process's communicators apart.
    number: u64,
    table: Arc<dyn Collectives>,
    broken: Arc<Broken>,
    local: Mutex<Local>,
}

struct Local {
    flights: Flights,
    reductions: Reductions,
    arenas: u64,
    /// Announcements for others that were not seen to be agreed on yet.
    announced: Vec<u64>,
}

/// This rank's arena.
struct ArenaMemory {
    mapping: memory::Mapping,
    communicator: u64,
    opened: AtomicU64,
    closed: AtomicU64,
}

impl ArenaMemory {
    fn is_open(&self) -> bool {
        self.opened.load(Ordering::Acquire) != self.closed.load(Ordering::Acquire)
    }
}

impl Host {
    fn lock(&self) -> MutexGuard<'_, Local> {
        self.local.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// This rank's state, unless the communicator is broken.
    fn working(&self) -> Result<MutexGuard<'_, Local>> {
        let local = self.lock();
        self.broken.check()?;
        Ok(local)
    }

    fn arena<'a>(&self, arena: &'a Arena) -> Result<&'a ArenaMemory> {
        let memory = arena.owner.downcast_ref::<ArenaMemory>().filter(|m| m.communicator == self.number);
        memory.ok_or_else(|| err!(InvalidArgument, "arena {} is of another communicator", arena.id))
    }

    /// Runs a collective on copies of the caller's memory.
    fn call(&self, what: Announcement, own: u64, call: HostCall) -> Result<HostCall> {
        let flights = &mut self.working()?.flights;
        let sequence = flights.launch(what, own, Work::Host(call))?;
        flights.land(sequence)?;
        match flights.take(sequence)?.work {
            Work::Host(call) => Ok(call),
            _ => Err(err!(Panic, "a collective on host memory became another")),
        }
    }

    /// Collective: all ranks run this.
    fn agree(&self, what: Announcement) -> Result<MutexGuard<'_, Local>> {
        let mut local = self.working()?;
        let sequence = local.flights.launch(what, 0, Work::Agree)?;
        local.flights.land(sequence)?;
        local.flights.take(sequence)?;
        Ok(local)
    }
}

impl Communicator for Host {
    fn rank(&self) -> usize {
        self.config.rank
    }

    fn world_size(&self) -> usize {
        self.config.world_size
    }

    fn name_units(&self, names: &[UnitName]) -> u32 {
        let all = &mut self.lock().flights.names;
        let first = all.len() as u32;
        all.extend_from_slice(names);
        first
    }

    fn barrier(&self) -> Result<()> {
        self.call(Announcement::plain(Kind::Barrier), 0, HostCall::new(Call::Barrier, &[], 0)).map(drop)
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let call = HostCall::new(Call::Exchange, bytes, 0);
        Ok(self.call(Announcement::plain(Kind::Exchange), bytes.len() as u64, call)?.parts())
    }

    fn all_reduce(&self, data: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()> {
        combine::check(data.len(), dtype, op)?;
        let what = Announcement::sized(Kind::AllReduce, dtype, data.len(), Detail::Op(op));
        if data.len() <= GATHERED {
            let world = self.world_size();
            let done = self.call(what, 0, HostCall::new(Call::AllGather, data, data.len() * world))?;
            let all: Vec<&[u8]> = match data.len() {
                0 => return Ok(()),
                len => done.output().chunks_exact(len).collect(),
            };
            combine::combine(data, &all, dtype, op);
            return Ok(());
        }
        let summed = if op == ReduceOp::Avg { ReduceOp::Sum } else { op };
        let done = self.call(what, 0, HostCall::new(Call::AllReduce(dtype, summed), data, 0))?;
        data.copy_from_slice(done.output());
        if op == ReduceOp::Avg {
            divide(data, dtype, self.world_size());
        }
        Ok(())
    }

    fn broadcast(&self, data: &mut [u8], dtype: DType, root: usize) -> Result<()> {
        combine::check(data.len(), dtype, ReduceOp::Sum)?;
        if root >= self.world_size() {
            return Err(err!(InvalidArgument, "root {root} is out of range for world size {}", self.world_size()));
        }
        let what = Announcement::sized(Kind::Broadcast, dtype, data.len(), Detail::Root(root as u32));
        let done = self.call(what, 0, HostCall::new(Call::Broadcast(root), data, 0))?;
        data.copy_from_slice(done.output());
        Ok(())
    }

    fn all_gather_host(&self, input: &[u8], output: &mut [u8], dtype: DType) -> Result<()> {
        combine::check(input.len(), dtype, ReduceOp::Sum)?;
        check_ranges("output", output.len(), "input", input.len(), self.world_size())?;
        let what = Announcement::on_host(Kind::AllGather, dtype, input.len());
        let done = self.call(what, 0, HostCall::new(Call::AllGather, input, output.len()))?;
        output.copy_from_slice(done.output());
        Ok(())
    }

    fn reduce_scatter_host(&self, input: &[u8], output: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()> {
        combine::check(output.len(), dtype, op)?;
        check_ranges("input", input.len(), "output", output.len(), self.world_size())?;
        let what = Announcement::sized(Kind::ReduceScatter, dtype, input.len(), Detail::Op(op));
        let summed = if op == ReduceOp::Avg { ReduceOp::Sum } else { op };
        let done = self.call(what, 0, HostCall::new(Call::ReduceScatter(dtype, summed), input, output.len()))?;
        output.copy_from_slice(done.output());
        if op == ReduceOp::Avg {
            divide(output, dtype, self.world_size());
        }
        Ok(())
    }

    /// Whoever comes later does not wait; a difference is found when all have announced, by the next call that looks.
    fn announce(&self, tag: Tag, check: Check, place: Option<u32>) -> Result<()> {
        let Local { flights, announced, .. } = &mut *self.working()?;
        let sequence = flights.launch(Announcement::elsewhere(tag, place), 0, Work::Agree)?;
        announced.push(sequence);
        if check == Check::Together {
            flights.land(sequence)?;
        }
        let done = |s: &u64| flights.flights.get(s).is_some_and(|f| f.is_done());
        let agreed: Vec<u64> = announced.iter().copied().filter(done).collect();
        announced.retain(|s| !agreed.contains(s));
        agreed.into_iter().try_for_each(|s| flights.take(s).map(drop))
    }

    fn alloc_arena(&self, bytes: usize) -> Result<Arena> {
        let mut local = self.agree(Announcement::arena_allocation(bytes))?;
        // Most of it is never there at once: the system need not promise it.
        let mapping = memory::Mapping::reserved(bytes).map_err(|e| self.broken.fail(e))?;
        let base = mapping.base();
        let (opened, closed) = (AtomicU64::new(0), AtomicU64::new(0));
        let owner = Arc::new(ArenaMemory { mapping, communicator: self.number, opened, closed });
        debug_assert!(owner.mapping.bytes() >= bytes);
        local.arenas += 1;
        Ok(Arena { base, bytes, id: local.arenas - 1, owner })
    }

    fn alloc_slots(&self, sizes: &[usize], flags: usize, units: Range<u32>) -> Result<Slots> {
        let total = sizes.iter().sum();
        let layout = sizes.iter().fold(flags as u64, |hash, size| (hash ^ *size as u64).wrapping_mul(0x100000001b3));
        let detail = Detail::Layout((layout ^ layout >> 32) as u32);
        let mut local = self.agree(Announcement::sized(Kind::Alloc, DType::U8, total, detail))?;
        let (mapping, slots) = memory::slots(sizes).map_err(|e| self.broken.fail(e))?;
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(mapping);
        let id = local.reductions.add(&slots, &owner, units);
        Ok(Slots { slots, id, owner })
    }

    fn moves_bytes(&self) -> bool {
        true
    }

    unsafe fn gather_start(&self, tag: Tag, what: Transfer) -> Result<u64> {
        // What moves, not what the unit buffer holds: 16-bit parameters move as such.
        let tag = Tag { bytes: (what.bytes * self.world_size()) as u64, ..tag };
        let announcement = Announcement { tag, detail: Detail::None };
        self.working()?.flights.launch(announcement, 0, Work::Gather(Gather::new(what)))
    }

    fn gather_wait(&self, gather: u64) -> Result<()> {
        let flights = &mut self.working()?.flights;
        flights.land(gather)?;
        flights.take(gather).map(drop)
    }

    fn staging(&self, bytes: usize) -> Result<(*mut u8, Arc<dyn Any + Send + Sync>)> {
        // The others would wait for this rank.
        let failed = |e: Error| self.broken.fail(e.context(format!("rank {}: memory for an all-gather", self.rank())));
        work::lend(self.table.as_ref(), bytes).map_err(failed)
    }

    fn open_reads(&self, arena: &Arena) -> Result<()> {
        drop(self.working()?);
        let memory = self.arena(arena)?;
        if memory.is_open() {
            return Err(err!(InvalidState, "the READ phase of arena {} is open already", arena.id));
        }
        memory.opened.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    fn all_gather(&self, tag: Tag, _arena: &Arena, _check: Check) -> Result<()> {
        Err(err!(InvalidState, "{} in place: this communicator moves bytes", tag.kind.name()))
    }

    fn close_reads(&self, arena: &Arena) {
        if let Ok(memory) = self.arena(arena) {
            memory.closed.store(memory.opened.load(Ordering::Acquire), Ordering::Release);
        }
    }

    fn wait_writable(&self, arena: &Arena) -> Result<()> {
        drop(self.working()?);
        match self.arena(arena)?.is_open() {
            false => Ok(()),
            true => Err(err!(InvalidState, "this rank's own READ phase of arena {} is still open", arena.id)),
        }
    }

    fn reduce_start(&self, tag: Tag, slot: &Slot, held: &[Held]) -> Result<Ticket> {
        let Local { flights, reductions, .. } = &mut *self.working()?;
        let present: Vec<bool> = held.iter().map(|h| h.is_there()).collect();
        reductions.start(flights, tag, slot, &present)
    }

    fn reduce_ready(&self, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        let Local { flights, reductions, .. } = &mut *self.working()?;
        flights.advance()?;
        reductions.apply(flights, slots, target)
    }

    fn reduce_done(&self, ticket: Ticket) -> Result<bool> {
        let flights = &mut self.working()?.flights;
        if ticket.number >= flights.issued {
            return Err(err!(InvalidArgument, "reduce-scatter {} was not started", ticket.number));
        }
        Ok(flights.flights.get(&ticket.number).is_none_or(|f| f.is_done()))
    }

    fn reduce_wait(&self, ticket: Ticket, target: &mut dyn ReduceTarget, _may_give_up: bool) -> Result<bool> {
        let Local { flights, reductions, .. } = &mut *self.working()?;
        if ticket.number >= flights.issued {
            return Err(err!(InvalidState, "waiting for reduce-scatter {}, which was not started", ticket.number));
        }
        flights.land(ticket.number)?;
        reductions.apply(flights, ticket.slots, target)?;
        Ok(true)
    }

    fn reduce_end(&self, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        let Local { flights, reductions, .. } = &mut *self.working()?;
        reductions.end(flights, slots, target)
    }

    fn trim_slot(&self, _slots: u64, slot: &Slot) {
        // A callback that never ended may still read it, after an error.
        if self.broken.error().is_none() {
            // SAFETY: the range is the slot's, which is free.
            unsafe { memory::give_back(slot.data, slot.bytes) };
        }
    }

    fn split(&self, color: u32, key: i32) -> Result<Arc<dyn Communicator>> {
        if !self.table.can_split() {
            return Err(err!(
                Unsupported,
                "the host's collectives have no split: strategies with several groups, reshard_after_forward over fewer \
                 ranks, and saves in the background need it"
            ));
        }
        let mine = [color.to_ne_bytes(), key.to_ne_bytes()].concat();
        let all = self.exchange(&mine)?;
        let word = |rank: usize, at: usize| <[u8; 4]>::try_from(&all[rank][at..at + 4]).expect("two words each");
        let mut members: Vec<usize> =
            (0..self.world_size()).filter(|r| u32::from_ne_bytes(word(*r, 0)) == color).collect();
        members.sort_by_key(|r| (i32::from_ne_bytes(word(*r, 4)), *r));
        let rank = members.iter().position(|r| *r == self.rank()).expect("this rank has its own color");
        let table = {
            let _one_at_a_time = self.working()?;
            self.table
                .split(color, key, &members)
                .map_err(|e| self.broken.fail(e.context(format!("rank {}: splitting a communicator", self.rank()))))?
        };
        init(&Config { rank, world_size: members.len(), ..self.config }, table)
    }

    fn abort(&self, reason: &str) {
        self.broken.fail(err!(Aborted, "rank {} aborted: {reason}", self.rank()));
    }

    fn async_error(&self) -> Option<Error> {
        // Somebody else who holds the lock hears what comes.
        if let Ok(mut local) = self.local.try_lock() {
            let _ = local.flights.advance();
        }
        self.broken.error()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.broken.error().is_none() {
            self.broken.tell(&Message::Left(self.lock().flights.issued));
        }
    }
}

fn check_ranges(whole: &str, total: usize, part: &str, bytes: usize, world: usize) -> Result<()> {
    if bytes.checked_mul(world) != Some(total) {
        return Err(err!(InvalidArgument, "{whole} of {total} bytes is not {world} times the {part} of {bytes}"));
    }
    Ok(())
}
