//! The communicator: what the engine asks of whatever connects the ranks.
//!
//! The communicator owns the memory its collectives run on, so zero-copy is a property of the backend. Two kinds of
//! memory exist: an *arena* ([`Communicator::alloc_arena`]: the parameters, seen by all ranks, or a rank's own where bytes
//! move) and *gradient slots* ([`Communicator::alloc_slots`]: written by one rank, read by all during a reduction).
//!
//! Every collective carries a [`Tag`]. Ranks must issue the same tags in the same order; a difference is an error on
//! every rank that names both units and both ranks. Every wait has a deadline and sees the death of a peer.
//!
//! A communicator is used by one thread at a time (the engine's lock); `abort` and `async_error` by any thread.

use crate::dtype::DType;
use crate::error::{err, Result};
use std::sync::Arc;

mod combine;
pub mod env;
pub mod host;
pub(crate) mod memory;
pub mod nccl;
pub(crate) mod reduce;
pub mod shm;
pub mod single;

pub use reduce::supports as can_reduce;

/// What a collective does. The discriminant is what ranks compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    AllGather = 1,
    ReduceScatter = 2,
    AllReduce = 3,
    Broadcast = 4,
    Barrier = 5,
    Exchange = 6,
    Alloc = 7,
    /// `open_reads`: announced like a collective, so that a rank that skipped one is found out.
    OpenReads = 8,
    /// `wait_writable`, announced for the same reason.
    WaitWritable = 9,
    /// An all-gather that a forward needs, so that a message can say so.
    ForwardAllGather = 10,
    /// `reduce_end`.
    EndReductions = 11,
}

impl Kind {
    /// The field's name for it, e.g. `reduce-scatter`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::AllGather => "all-gather",
            Kind::ReduceScatter => "reduce-scatter",
            Kind::AllReduce => "all-reduce",
            Kind::Broadcast => "broadcast",
            Kind::Barrier => "barrier",
            Kind::Exchange => "exchange",
            Kind::Alloc => "allocation",
            Kind::OpenReads => "opening of a READ phase",
            Kind::WaitWritable => "wait for writable shards",
            Kind::ForwardAllGather => "all-gather in forward",
            Kind::EndReductions => "end of a backward",
        }
    }

    /// The kind with this number, if there is one.
    pub(crate) fn from_code(code: u8) -> Option<Kind> {
        const ALL: [Kind; 11] = [
            Kind::AllGather,
            Kind::ReduceScatter,
            Kind::AllReduce,
            Kind::Broadcast,
            Kind::Barrier,
            Kind::Exchange,
            Kind::Alloc,
            Kind::OpenReads,
            Kind::WaitWritable,
            Kind::ForwardAllGather,
            Kind::EndReductions,
        ];
        ALL.into_iter().find(|k| *k as u8 == code)
    }
}

/// How elements of different ranks are combined, in rank order 0..W-1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ReduceOp {
    Sum = 0,
    Avg = 1,
    Max = 2,
    Min = 3,
}

/// `Tag::unit` of a collective that belongs to no unit.
pub const NO_UNIT: u32 = u32::MAX;

/// What messages say about a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitName {
    /// Its module's fully qualified name.
    pub label: String,
    /// Its parameters' names, perhaps shortened.
    pub params: String,
}

impl std::fmt::Display for UnitName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "unit \"{}\"", self.label)?;
        match self.params.as_str() {
            "" => Ok(()),
            params => write!(f, " with parameters {params}"),
        }
    }
}

/// How much an all-gather is compared with what the other ranks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Not at all: ranks may gather different units.
    Off,
    /// By whoever comes later.
    Announce,
    /// By everybody, before anybody goes on: the same call fails on every rank.
    Together,
}

/// The identity of a collective. Ranks compare all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    pub kind: Kind,
    /// A number from [`Communicator::name_units`], or [`NO_UNIT`].
    pub unit: u32,
    pub dtype: DType,
    pub bytes: u64,
}

/// Memory that all ranks see. `base` is this rank's address of byte 0 (64-byte aligned); the mapping lives as long as
/// `owner`. READ phases are counted per arena, so that several engines may share a communicator.
#[derive(Clone)]
pub struct Arena {
    pub base: *mut u8,
    pub bytes: usize,
    /// The backend's own number for it.
    pub id: u64,
    pub owner: Arc<dyn std::any::Any + Send + Sync>,
}

// SAFETY: the mapping is kept by `owner`; who may write which bytes when is the engine's READ/WRITE protocol.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

/// One gradient slot of this rank: `bytes` of data for a unit's full gradient, 64-byte aligned.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub index: usize,
    pub data: *mut u8,
    pub bytes: usize,
}

// SAFETY: a slot is a plain address inside a mapping that the communicator keeps; the engine's lock guards its use.
unsafe impl Send for Slot {}

/// What a slot holds of a parameter's gradient, as ranks tell each other: ranks may hold the same gradient differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Held {
    #[default]
    Nothing = 0,
    /// Elements of the unit's 16-bit gradient type ([`Segment::narrow`]), at the unit's layout from the slot's start on.
    Narrow = 1,
    /// Floats, at the unit's layout: from the slot's start on or, in a unit that has a 16-bit type, behind all of those.
    Float32 = 2,
}

impl Held {
    /// Whether there is a gradient.
    pub fn is_there(self) -> bool {
        self != Held::Nothing
    }

    /// What a flag that a rank has published means; anything unknown is nothing.
    pub(crate) fn from_code(code: u8) -> Held {
        [Held::Narrow, Held::Float32].into_iter().find(|h| *h as u8 == code).unwrap_or_default()
    }
}

/// First byte in a slot of what is [`Held::Float32`] of a unit of so many elements: behind those in its 16-bit type, if it has
/// one.
pub(crate) fn wide_offset(narrow: DType, elements: usize) -> usize {
    match narrow {
        DType::F32 => 0,
        _ => (elements * narrow.size()).next_multiple_of(64),
    }
}

/// A part of this rank's shard of a unit: one parameter's piece.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// The parameter's place in the unit (its presence byte).
    pub param: usize,
    /// First element in the unit buffer.
    pub offset: usize,
    /// Elements.
    pub len: usize,
    /// The type of what is [`Held::Narrow`]; float32 in a unit that has none.
    pub narrow: DType,
    /// Where the mean goes: `len` floats of this rank's gradient shard.
    pub out: *mut f32,
    /// Add to `out` instead of overwriting it.
    pub accumulate: bool,
}

impl Segment {
    /// The type of what a slot holds of this piece, and its first byte there; the unit has `elements`.
    pub(crate) fn place(&self, held: Held, elements: usize) -> (DType, usize) {
        match held {
            Held::Narrow => (self.narrow, self.offset * self.narrow.size()),
            _ => (DType::F32, wide_offset(self.narrow, elements) + self.offset * DType::F32.size()),
        }
    }
}

/// Gradient slots of this rank, as [`Communicator::alloc_slots`] made them: they live as long as `owner`.
pub struct Slots {
    pub slots: Vec<Slot>,
    /// The backend's number of the allocation, so that several engines may share a communicator.
    pub id: u64,
    pub owner: Arc<dyn std::any::Any + Send + Sync>,
}

/// An all-gather of a backend that moves bytes: `output` is the ranks' parts in rank order, `bytes` each. `input` is this
/// rank's part, perhaps in its place in `output`. Both lie in memory that `owner` keeps.
pub struct Transfer {
    pub input: *const u8,
    pub output: *mut u8,
    pub bytes: usize,
    pub owner: Arc<dyn std::any::Any + Send + Sync>,
}

/// A reduce-scatter that this rank has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket {
    /// [`Slots::id`].
    pub slots: u64,
    /// How many this rank had started on them before.
    pub number: u64,
}

/// Where the means of reduce-scatters go. Units are counted from the first one of the slots.
pub trait ReduceTarget {
    /// This rank's pieces of `unit`, whose mean is about to be written.
    fn segments(&mut self, unit: usize) -> &[Segment];
    /// The mean of `unit` was written; `present[i]` says whether any rank had a gradient for its parameter i. Pieces of
    /// absent parameters were left alone.
    fn reduced(&mut self, unit: usize, present: &[bool]);
}

/// See the module's text. All methods but `rank`, `world_size`, `name_units`, `moves_bytes`, `staging`, `close_reads`, the `reduce_*` ones other than
/// `reduce_end`, `abort` and `async_error` are collective. After an error of a collective the communicator is broken: every later call on any
/// rank returns the same first error. A wrong argument or a call out of place (`InvalidArgument`, `InvalidState`) is refused
/// before anything is announced and breaks nothing. `open_reads` and `wait_writable` are announced like the others: every
/// rank must make as many of them, at the same place in its order of calls.
pub trait Communicator: Send + Sync {
    fn rank(&self) -> usize;
    fn world_size(&self) -> usize;

    /// Gives names to the next `names.len()` unit numbers, for error messages; returns the first number. Must be called
    /// in the same order on every rank (local otherwise).
    fn name_units(&self, names: &[UnitName]) -> u32;

    // ---- control plane: small, blocking, on the caller's memory ----

    /// Returns when every rank has called it.
    fn barrier(&self) -> Result<()>;
    /// Every rank's `bytes` (lengths may differ), in rank order.
    fn exchange(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;
    /// In place over `data` (a multiple of `dtype.size()`): combined in rank order, so every rank gets the same bits.
    /// `Avg` divides the sum by the world size and needs a floating dtype.
    fn all_reduce(&self, data: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()>;
    /// `root`'s bytes on every rank.
    fn broadcast(&self, data: &mut [u8], dtype: DType, root: usize) -> Result<()>;
    /// `output` = the ranks' `input`s in rank order; `output.len() == W * input.len()`. They must not
    /// overlap: a caller that gathers in place copies its input first.
    fn all_gather_host(&self, input: &[u8], output: &mut [u8], dtype: DType) -> Result<()>;
    /// `output` = range `rank` of the combined `input`s; `input.len() == W * output.len()`.
    fn reduce_scatter_host(&self, input: &[u8], output: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()>;

    /// Announces a collective that the caller runs elsewhere (on GPUs), so that a difference between ranks is an error
    /// instead of a hang there: compared as this communicator's own are, and as `check` says. Moves nothing, waits with
    /// [`Check::Together`] only. `place`: where in memory that must be used alike on every rank, from 1 on, 0 for elsewhere; None
    /// where that does not matter. `Unsupported` where a backend cannot do that.
    fn announce(&self, tag: Tag, check: Check, place: Option<u32>) -> Result<()> {
        let _ = (tag, check, place);
        Err(err!(Unsupported, "this communicator cannot compare collectives that run elsewhere"))
    }

    // ---- data plane: on memory of the communicator ----

    /// Zeroed memory that every rank sees: one copy a host. Taken at once, so that a lack of it is an error; freed when
    /// the last clone on every rank is dropped.
    fn alloc_arena(&self, bytes: usize) -> Result<Arena>;
    /// `sizes.len()` gradient slots on each rank, slot i of `sizes[i]` bytes, for reduce-scatters of the units
    /// `units` (numbers of `name_units`) of at most `flags` parameters. Pages take memory only when they are written.
    fn alloc_slots(&self, sizes: &[usize], flags: usize, units: std::ops::Range<u32>) -> Result<Slots>;

    /// READ phase begins: this rank's shards hold their new values and are not written until `wait_writable`.
    fn open_reads(&self, arena: &Arena) -> Result<()>;
    /// Unshard in place: returns when every rank's shards of the arena may be read (every rank has opened as many READ
    /// phases as this one). Moves no bytes.
    fn all_gather(&self, tag: Tag, arena: &Arena, check: Check) -> Result<()>;
    /// Whether ranks share no memory, so that an all-gather moves bytes. An arena is then this rank's own: its shards stay,
    /// and what `gather_start` brings of the others' is given back to the system when a unit is resharded. `all_gather` is
    /// not used, and `open_reads` and `wait_writable` concern this rank only.
    fn moves_bytes(&self) -> bool {
        false
    }
    /// Unshard where bytes move: starts an all-gather, which `gather_wait` ends; without waiting, if the host can. Nobody
    /// touches the output, or writes the input, until then. Every rank starts the same ones in the same order, whatever
    /// `order_check` is. The result is for `gather_wait`, once.
    ///
    /// # Safety
    /// The transfer's memory is readable and writable as it says, until `gather_wait` has returned without an error; if it
    /// never does, as long as `owner` lives.
    unsafe fn gather_start(&self, tag: Tag, what: Transfer) -> Result<u64> {
        let _ = what;
        Err(crate::error::err!(InvalidState, "this communicator moves no {}", tag.kind.name()))
    }
    /// Returns when the output of the all-gather is there.
    fn gather_wait(&self, gather: u64) -> Result<()> {
        Err(crate::error::err!(InvalidState, "all-gather {gather} was not started"))
    }
    /// Zeroed memory that a transfer may run on, 64-byte aligned, and its owner.
    fn staging(&self, bytes: usize) -> Result<(*mut u8, Arc<dyn std::any::Any + Send + Sync>)> {
        let mapping = memory::Mapping::anonymous(bytes)?;
        Ok((mapping.base(), Arc::new(mapping)))
    }

    /// READ phase ends: this rank reads no peer's shard any more. Local, does not wait.
    fn close_reads(&self, arena: &Arena);
    /// Returns when every rank has closed as many READ phases as this one: own shards may be written.
    fn wait_writable(&self, arena: &Arena) -> Result<()>;

    // Reduce-scatters are matched by unit: between two calls of `reduce_end`, the n-th one of a unit on one rank belongs to
    // the n-th of that unit on the others, whatever each rank starts in between, and a rank that starts fewer of a unit
    // takes part in the rest with no gradients. Every rank does its part of all of them: for each segment the fp32 sum
    // over the ranks that have the parameter, in rank order 0..W-1, divided by W, written or added to `out`.

    /// Publishes the full gradient in `slot`, `tag.bytes` of `tag.dtype` (float32, or a 16-bit type that is summed in
    /// float32). A communicator that moves no bytes finds it there as `held` says instead, and rounds what is of another type
    /// than `tag.dtype` as it sums it. `held[i]` is of parameter i of the unit. Does not wait. The slot must not be
    /// written until `reduce_done(ticket)`.
    fn reduce_start(&self, tag: Tag, slot: &Slot, held: &[Held]) -> Result<Ticket>;
    /// Does this rank's part of what every rank has started or skipped by now. Does not wait.
    fn reduce_ready(&self, slots: u64, target: &mut dyn ReduceTarget) -> Result<()>;
    /// Whether every rank has done its part of the reduce-scatter, so that its slot is free.
    fn reduce_done(&self, ticket: Ticket) -> Result<bool>;
    /// Waits for that, doing this rank's parts meanwhile. False, with `may_give_up` only: ranks start reduce-scatters in
    /// different orders now, and one of them may wait for this rank; the caller takes another slot and goes on.
    fn reduce_wait(&self, ticket: Ticket, target: &mut dyn ReduceTarget, may_give_up: bool) -> Result<bool>;
    /// This rank starts no more until every rank has said so. Returns when this rank's part of everything is done.
    fn reduce_end(&self, slots: u64, target: &mut dyn ReduceTarget) -> Result<()>;
    /// Gives the pages of a slot that is free back to the system; it stays usable.
    fn trim_slot(&self, slots: u64, slot: &Slot);

    /// Makes communicators of parts of this one's ranks: those that give the same `color` are one, in the order of
    /// (`key`, rank). Like MPI_Comm_split. The result is independent of this one: it has its own order of collectives,
    /// breaks alone, and may be used by another thread.
    fn split(&self, color: u32, key: i32) -> Result<Arc<dyn Communicator>>;

    /// Breaks the communicator on every rank with a message that names this rank and `reason`.
    fn abort(&self, reason: &str);
    /// The error that broke the communicator (a dead peer, a mismatch, an abort), seen without waiting.
    fn async_error(&self) -> Option<crate::error::Error>;
}
