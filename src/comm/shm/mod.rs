//! The shared-memory communicator: ranks that are processes of one user on one host.
//!
//! `rendezvous` brings the processes together (abstract unix socket), `group` is what a rank has afterwards: the control
//! segment (`control`), a socket to every peer, the abort record. `announce` checks the order of collectives, `wait`
//! sleeps and watches, `host` runs control-plane collectives, `segment` holds arenas and gradient slots, `reductions`
//! the reduce-scatters in flight. Nothing has a name in a file system; all of it ends with the processes.

use super::{
    combine, Arena, Check, Communicator, Held, Kind, ReduceOp, ReduceTarget, Slot, Slots, Tag, Ticket, UnitName,
};
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use control::RankArea;
pub(super) use control::{Announcement, Detail};
use group::Group;
use host::Host;
use reductions::Reductions;
use segment::{ArenaSegment, SlotLayout, SlotSegment};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
pub(super) use wait::rank_list;
use wait::Wait;

mod announce;
mod control;
mod group;
mod handover;
mod host;
mod reductions;
mod rendezvous;
mod segment;
mod socket;
mod wait;

/// Most ranks of a job.
pub const MAX_WORLD: usize = 64;
/// Longest job name, in bytes.
pub const MAX_JOB: usize = 1024;
pub const DEFAULT_RENDEZVOUS_TIMEOUT: Duration = Duration::from_secs(120);
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// Which process this is among those of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Processes with the same job name (and user, and network namespace) find each other.
    pub job: String,
    pub rank: usize,
    pub world_size: usize,
    /// How long `init` waits for the other ranks.
    pub rendezvous_timeout: Duration,
    /// How long a collective waits for a rank.
    pub timeout: Duration,
}

impl Config {
    /// With the default timeouts.
    pub fn new(job: impl Into<String>, rank: usize, world_size: usize) -> Config {
        let (rendezvous_timeout, timeout) = (DEFAULT_RENDEZVOUS_TIMEOUT, DEFAULT_TIMEOUT);
        Config { job: job.into(), rank, world_size, rendezvous_timeout, timeout }
    }

    fn check(&self) -> Result<()> {
        if !(1..=MAX_WORLD).contains(&self.world_size) {
            return Err(err!(InvalidArgument, "world size {} is not in 1..={MAX_WORLD}", self.world_size));
        }
        if self.job.is_empty() || self.job.len() > MAX_JOB {
            return Err(err!(InvalidArgument, "the job name has {} bytes, not 1..={MAX_JOB}", self.job.len()));
        }
        if self.timeout.is_zero() || self.rendezvous_timeout.is_zero() {
            return Err(err!(InvalidArgument, "a timeout of 0 ms lets no rank arrive"));
        }
        Ok(())
    }
}

/// Collective: meets the other ranks of `config.job` and returns when all are there, or an error that all of them get.
pub fn init(config: &Config) -> Result<Arc<dyn Communicator>> {
    init_with(config, &|| Ok(()))
}

/// `init` that `hope` can give up.
fn init_with(config: &Config, hope: rendezvous::Hope<'_>) -> Result<Arc<dyn Communicator>> {
    config.check()?;
    let mesh = rendezvous::meet(config, hope)?;
    let group = Group::new(config.rank, config.timeout, mesh)?;
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Ok(Arc::new(Shm { config: config.clone(), group, number, local: Mutex::new(Local::default()) }))
}

struct Shm {
    config: Config,
    group: Group,
    /// Tells this process's communicators apart.
    number: u64,
    local: Mutex<Local>,
}

/// What only this rank counts.
#[derive(Default)]
struct Local {
    issued: u64,
    steps: u64,
    allocations: u64,
    splits: u64,
    reductions: Reductions,
}

impl Shm {
    fn lock(&self) -> MutexGuard<'_, Local> {
        self.local.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// This rank's counters, unless the job is broken: that error comes before any other.
    fn working(&self) -> Result<MutexGuard<'_, Local>> {
        let local = self.lock();
        self.group.check()?;
        Ok(local)
    }

    fn announce(&self, local: &mut Local, a: &Announcement) -> Result<()> {
        self.announce_with(local, a, false)
    }

    fn announce_with(&self, local: &mut Local, a: &Announcement, together: bool) -> Result<()> {
        self.group.announce(local.issued, a, together)?;
        local.issued += 1;
        Ok(())
    }

    /// Announces a control-plane collective and runs it.
    fn on_host<T>(&self, what: Announcement, run: impl FnOnce(&mut Host<'_>) -> Result<T>) -> Result<T> {
        let local = &mut *self.working()?;
        self.announce(local, &what)?;
        run(&mut Host { group: &self.group, steps: &mut local.steps, what: &what })
    }

    fn arena<'a>(&self, arena: &'a Arena) -> Result<&'a ArenaSegment> {
        let segment = arena.owner.downcast_ref::<ArenaSegment>();
        segment
            .filter(|s| s.communicator == self.number)
            .ok_or_else(|| err!(InvalidArgument, "arena {} is of another communicator", arena.id))
    }

    /// (opened, closed) READ phases of this rank.
    fn phases(&self, segment: &ArenaSegment) -> (u64, u64) {
        let phase = segment.phase(self.group.rank);
        (phase.opened.load(Ordering::Acquire), phase.closed.load(Ordering::Acquire))
    }

    /// Collective: a segment of `bytes` that every rank maps with `map`.
    fn allocate<T>(
        &self,
        local: &mut Local,
        what: Announcement,
        bytes: usize,
        reserve: bool,
        map: impl FnOnce(&OwnedFd, u64) -> Result<T>,
    ) -> Result<T> {
        self.announce(local, &what)?;
        let id = local.allocations;
        let mapped = handover::segment(&self.group, &what, id, bytes, reserve).and_then(|fd| map(&fd, id));
        let mapped = mapped.map_err(|e| {
            let doing = format!("rank {}: {}", self.group.rank, self.group.describe(&what));
            self.group.fail(e.context(doing))
        })?;
        local.allocations += 1;
        Host { group: &self.group, steps: &mut local.steps, what: &what }.barrier()?;
        Ok(mapped)
    }
}

impl Communicator for Shm {
    fn rank(&self) -> usize {
        self.group.rank
    }

    fn world_size(&self) -> usize {
        self.group.world
    }

    fn name_units(&self, names: &[UnitName]) -> u32 {
        let mut all = self.group.names();
        let first = all.len() as u32;
        all.extend_from_slice(names);
        first
    }

    fn barrier(&self) -> Result<()> {
        self.on_host(Announcement::plain(Kind::Barrier), |h| h.barrier())
    }

    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.on_host(Announcement::plain(Kind::Exchange), |h| h.exchange(bytes))
    }

    fn all_reduce(&self, data: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()> {
        combine::check(data.len(), dtype, op)?;
        let what = Announcement::sized(Kind::AllReduce, dtype, data.len(), Detail::Op(op));
        self.on_host(what, |h| h.all_reduce(data, dtype, op))
    }

    fn broadcast(&self, data: &mut [u8], dtype: DType, root: usize) -> Result<()> {
        combine::check(data.len(), dtype, ReduceOp::Sum)?;
        if root >= self.group.world {
            return Err(err!(InvalidArgument, "root {root} is out of range for world size {}", self.group.world));
        }
        let what = Announcement::sized(Kind::Broadcast, dtype, data.len(), Detail::Root(root as u32));
        self.on_host(what, |h| h.broadcast(data, root))
    }

    fn all_gather_host(&self, input: &[u8], output: &mut [u8], dtype: DType) -> Result<()> {
        combine::check(input.len(), dtype, ReduceOp::Sum)?;
        check_ranges("output", output.len(), "input", input.len(), self.group.world)?;
        let what = Announcement::on_host(Kind::AllGather, dtype, input.len());
        self.on_host(what, |h| h.all_gather(input, output))
    }

    fn reduce_scatter_host(&self, input: &[u8], output: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()> {
        combine::check(output.len(), dtype, op)?;
        check_ranges("input", input.len(), "output", output.len(), self.group.world)?;
        let what = Announcement::sized(Kind::ReduceScatter, dtype, input.len(), Detail::Op(op));
        self.on_host(what, |h| h.reduce_scatter(input, output, dtype, op))
    }

    fn announce(&self, tag: Tag, check: Check, place: Option<u32>) -> Result<()> {
        let local = &mut *self.working()?;
        match check {
            Check::Off => Ok(()),
            _ => self.announce_with(local, &Announcement::elsewhere(tag, place), check == Check::Together),
        }
    }

    fn alloc_arena(&self, bytes: usize) -> Result<Arena> {
        let total = ArenaSegment::segment_bytes(bytes)?;
        let (what, number) = (Announcement::arena_allocation(bytes), self.number);
        let map = |fd: &OwnedFd, id| ArenaSegment::map(fd, bytes, number, id);
        let segment = self.allocate(&mut *self.working()?, what, total, true, map)?;
        Ok(Arena { base: segment.base(), bytes, id: segment.id, owner: Arc::new(segment) })
    }

    fn alloc_slots(&self, sizes: &[usize], flags: usize, units: Range<u32>) -> Result<Slots> {
        let layout = SlotLayout::new(sizes, flags, self.group.world)?;
        let total = layout.total;
        let what = Announcement::sized(Kind::Alloc, DType::U8, total, Detail::Layout(layout.digest()));
        let local = &mut *self.working()?;
        let map = |fd: &OwnedFd, id| SlotSegment::map(fd, layout, id as u32);
        let segment = Arc::new(self.allocate(local, what, total, false, map)?);
        local.reductions.add(&segment, units, self.group.world);
        let rank = self.group.rank;
        let slot = |(index, &bytes)| Slot { index, data: segment.data(rank, index), bytes };
        let slots = sizes.iter().enumerate().map(slot).collect();
        Ok(Slots { slots, id: segment.id as u64, owner: segment })
    }

    fn open_reads(&self, arena: &Arena) -> Result<()> {
        let local = &mut *self.working()?;
        let segment = self.arena(arena)?;
        let (opened, closed) = self.phases(segment);
        if opened != closed {
            return Err(err!(InvalidState, "the READ phase of arena {} is open already", arena.id));
        }
        let detail = Detail::Arena(segment.id as u32);
        self.announce(local, &Announcement::sized(Kind::OpenReads, DType::U8, 0, detail))?;
        segment.phase(self.group.rank).opened.store(opened + 1, Ordering::SeqCst);
        self.group.ring(self.group.rank);
        Ok(())
    }

    fn all_gather(&self, tag: Tag, arena: &Arena, check: Check) -> Result<()> {
        let local = &mut *self.working()?;
        let segment = self.arena(arena)?;
        let (opened, closed) = self.phases(segment);
        if opened == closed {
            return Err(err!(InvalidState, "all-gather outside a READ phase of arena {}", arena.id));
        }
        let what = Announcement { tag, detail: Detail::Arena(segment.id as u32) };
        if check != Check::Off {
            self.announce_with(local, &what, check == Check::Together)?;
        }
        let arrived = |r: usize, _: &RankArea| segment.phase(r).opened.load(Ordering::Acquire) >= opened;
        self.group.wait(&Wait { what: &|| self.group.describe(&what), arrived: &arrived })
    }

    fn close_reads(&self, arena: &Arena) {
        // Waits for no lock: a closed phase is one counter, and another thread may be in a wait.
        if let Ok(segment) = self.arena(arena) {
            let phase = segment.phase(self.group.rank);
            phase.closed.store(phase.opened.load(Ordering::Acquire), Ordering::SeqCst);
            self.group.ring(self.group.rank);
        }
    }

    fn wait_writable(&self, arena: &Arena) -> Result<()> {
        let local = &mut *self.working()?;
        let segment = self.arena(arena)?;
        let (opened, closed) = self.phases(segment);
        if opened != closed {
            return Err(err!(InvalidState, "this rank's own READ phase of arena {} is still open", arena.id));
        }
        let what = Announcement::sized(Kind::WaitWritable, DType::U8, 0, Detail::Arena(segment.id as u32));
        self.announce(local, &what)?;
        let arrived = |r: usize, _: &RankArea| segment.phase(r).closed.load(Ordering::Acquire) >= closed;
        self.group.wait(&Wait { what: &|| self.group.describe(&what), arrived: &arrived })
    }

    fn reduce_start(&self, tag: Tag, slot: &Slot, held: &[Held]) -> Result<Ticket> {
        let local = &mut *self.working()?;
        let start = local.reductions.prepare(&self.group, tag, slot, held)?;
        local.reductions.start(&self.group, start, tag, held)
    }

    fn reduce_ready(&self, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        self.working()?.reductions.ready(&self.group, slots, target)
    }

    fn reduce_done(&self, ticket: Ticket) -> Result<bool> {
        self.working()?.reductions.done(&self.group, ticket)
    }

    fn reduce_wait(&self, ticket: Ticket, target: &mut dyn ReduceTarget, may_give_up: bool) -> Result<bool> {
        self.working()?.reductions.wait(&self.group, ticket, target, may_give_up)
    }

    fn reduce_end(&self, slots: u64, target: &mut dyn ReduceTarget) -> Result<()> {
        let local = &mut *self.working()?;
        let what = local.reductions.end_announcement(slots);
        self.announce(local, &what)?;
        local.reductions.end(&self.group, slots, target)
    }

    fn trim_slot(&self, slots: u64, slot: &Slot) {
        self.lock().reductions.trim(&self.group, slots, slot);
    }

    fn split(&self, color: u32, key: i32) -> Result<Arc<dyn Communicator>> {
        let mine = [color.to_ne_bytes(), key.to_ne_bytes()].concat();
        let word = |bytes: &[u8], at: usize| <[u8; 4]>::try_from(&bytes[at..at + 4]).expect("two words each");
        let all = self.exchange(&mine)?;
        let same = |r: &usize| u32::from_ne_bytes(word(&all[*r], 0)) == color;
        let mut ranks: Vec<usize> = (0..self.group.world).filter(same).collect();
        ranks.sort_by_key(|r| (i32::from_ne_bytes(word(&all[*r], 4)), *r));
        let number = {
            let mut local = self.lock();
            local.splits += 1;
            local.splits
        };
        let config = Config {
            job: format!("{}/{number}.{color}", self.config.job),
            rank: ranks.iter().position(|r| *r == self.group.rank).expect("this rank has its own color"),
            world_size: ranks.len(),
            // Everybody is here already.
            rendezvous_timeout: self.config.timeout.min(DEFAULT_RENDEZVOUS_TIMEOUT),
            ..self.config
        };
        // A rank that dies now is seen at the sockets of this communicator only.
        let alive = || self.group.check_alive(&|| "while the communicator was split".into());
        let hope = || self.group.check().and_then(|_| alive());
        init_with(&config, &hope).map_err(|e| hope().err().unwrap_or(e))
    }

    fn abort(&self, reason: &str) {
        self.group.fail(err!(Aborted, "rank {} aborted: {reason}", self.group.rank));
    }

    fn async_error(&self) -> Option<Error> {
        let alive = || self.group.check_alive(&|| format!("(seen by rank {})", self.group.rank));
        self.group.check().and_then(|_| alive()).err()
    }
}

impl Drop for Shm {
    fn drop(&mut self) {
        self.group.leave();
    }
}

fn check_ranges(whole: &str, total: usize, part: &str, bytes: usize, world: usize) -> Result<()> {
    if bytes.checked_mul(world) != Some(total) {
        return Err(err!(InvalidArgument, "{whole} of {total} bytes is not {world} times the {part} of {bytes}"));
    }
    Ok(())
}
