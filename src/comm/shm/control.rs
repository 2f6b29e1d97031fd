//! The layout of the control segment: what every rank publishes for the others. All of it is atomic.
//!
//! One [`Header`] (the abort record), then one [`RankArea`] per rank, written by that rank and read by all. A rank first
//! stores what it publishes, then rings its doorbell; whoever waits for the rank sleeps on that doorbell.

use crate::comm::memory::{Mapping, PAGE};
use crate::comm::{Kind, ReduceOp, Tag, UnitName, NO_UNIT};
use crate::dtype::DType;
use crate::error::Result;
use std::cell::UnsafeCell;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, AtomicU8, Ordering};

/// Collectives of a rank that the others can look up.
pub const RING: usize = 1024;
/// Bytes of one half of a rank's scratch area.
pub const SCRATCH: usize = 64 * 1024;
/// Longest error message in the abort record; longer ones are cut.
pub const MESSAGE: usize = 1024;

/// Stops neighbours from sharing a cache line (two lines: processors fetch pairs).
#[repr(C, align(128))]
pub struct Line<T>(pub T);

/// The first error, for all ranks. `state`: 0 none, 1 being written, 2 readable.
#[repr(C)]
pub struct AbortRecord {
    pub state: AtomicU32,
    pub status: AtomicI32,
    pub len: AtomicU32,
    pub message: [AtomicU8; MESSAGE],
}

#[repr(C, align(4096))]
pub struct Header {
    pub abort: AbortRecord,
}

/// One announced collective: the tag, and what else must agree (`detail`, see [`Announcement`]).
#[repr(C)]
pub struct Entry {
    kind_dtype: AtomicU32,
    unit: AtomicU32,
    bytes: AtomicU64,
    detail: AtomicU64,
}

#[repr(C)]
pub struct Doorbell {
    pub bell: AtomicU32,
    pub waiters: AtomicU32,
}

/// What one rank publishes.
#[repr(C, align(4096))]
pub struct RankArea {
    pub doorbell: Line<Doorbell>,
    /// Collectives announced.
    pub issued: Line<AtomicU64>,
    /// Control-plane steps arrived at.
    pub steps: Line<AtomicU64>,
    /// Nonzero once the rank has destroyed its communicator.
    pub left: Line<AtomicU32>,
    pub ring: [Entry; RING],
    pub scratch: [UnsafeCell<[u8; SCRATCH]>; 2],
}

/// The identity of a collective with all that ranks compare. `detail` holds what the tag has no field for: the op, the
/// root, the arena, the number of parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    pub tag: Tag,
    pub detail: Detail,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    None,
    Op(ReduceOp),
    Root(u32),
    Arena(u32),
    /// Allocation of the slot, and parameters of the unit.
    Slots(u32, u32),
    /// A digest of the slots' sizes.
    Layout(u32),
    Memory(&'static str),
    /// Which registered buffer; 0: another one.
    Registered(u32),
}

/// What [`Detail::Memory`] may be.
pub const HOST_MEMORY: &str = "host memory";
const ARENA: &str = "an arena";

impl Detail {
    pub fn pack(self) -> u64 {
        let two = |class: u64, a: u64, b: u64| class << 60 | (a & 0x3fff_ffff) << 30 | (b & 0x3fff_ffff);
        match self {
            Detail::None => 0,
            Detail::Op(op) => two(1, 0, op as u64),
            Detail::Root(r) => two(2, 0, r as u64),
            Detail::Arena(id) => two(3, 0, id as u64),
            Detail::Slots(id, params) => two(4, id as u64, params as u64),
            Detail::Layout(digest) => two(5, 0, digest as u64),
            Detail::Memory(what) => two(6, 0, (what == ARENA) as u64),
            Detail::Registered(place) => two(7, 0, place as u64),
        }
    }

    pub fn unpack(raw: u64) -> Detail {
        let (a, b) = ((raw >> 30 & 0x3fff_ffff) as u32, (raw & 0x3fff_ffff) as u32);
        match raw >> 60 {
            1 => Detail::Op([ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min][(b & 3) as usize]),
            2 => Detail::Root(b),
            3 => Detail::Arena(b),
            4 => Detail::Slots(a, b),
            5 => Detail::Layout(b),
            6 => Detail::Memory(if b == 1 { ARENA } else { HOST_MEMORY }),
            7 => Detail::Registered(b),
            _ => Detail::None,
        }
    }
}

impl Announcement {
    pub fn plain(kind: Kind) -> Announcement {
        Announcement::sized(kind, DType::U8, 0, Detail::None)
    }

    /// A collective of no unit.
    pub fn sized(kind: Kind, dtype: DType, bytes: usize, detail: Detail) -> Announcement {
        Announcement { tag: Tag { kind, unit: NO_UNIT, dtype, bytes: bytes as u64 }, detail }
    }

    pub fn on_host(kind: Kind, dtype: DType, bytes: usize) -> Announcement {
        Announcement::sized(kind, dtype, bytes, Detail::Memory(HOST_MEMORY))
    }

    pub fn arena_allocation(bytes: usize) -> Announcement {
        Announcement::sized(Kind::Alloc, DType::U8, bytes, Detail::Memory(ARENA))
    }

    /// As [`crate::comm::Communicator::announce`] has it.
    pub fn elsewhere(tag: Tag, place: Option<u32>) -> Announcement {
        Announcement { tag, detail: place.map_or(Detail::None, Detail::Registered) }
    }

    /// A reduce-scatter, for messages.
    pub fn reduce(tag: Tag, params: u32) -> Announcement {
        Announcement { tag, detail: Detail::Slots(0, params) }
    }

    /// For a person: `all-gather of unit "layers.1" (float32, 4096 bytes)`.
    pub fn describe(&self, names: &[UnitName]) -> String {
        let Tag { kind, unit, dtype, bytes } = self.tag;
        let mut text = kind.name().to_string();
        if let Some(name) = names.get(unit as usize) {
            text += &format!(" of unit \"{}\"", name.label);
        } else if unit != NO_UNIT {
            text += &format!(" of unit {unit}");
        }
        let detail = match self.detail {
            Detail::None => String::new(),
            Detail::Op(op) => format!(", op {}", format!("{op:?}").to_lowercase()),
            Detail::Root(root) => format!(", root {root}"),
            Detail::Arena(id) => format!(", arena {id}"),
            Detail::Slots(_, params) => format!(", {params} parameters"),
            Detail::Layout(digest) => format!(", gradient slots of layout {digest:08x}"),
            Detail::Memory(what) => format!(", {what}"),
            Detail::Registered(0) => ", in no registered unit buffer".to_string(),
            Detail::Registered(place) => format!(", in registered unit buffer {place}"),
        };
        match kind {
            Kind::Barrier | Kind::Exchange | Kind::EndReductions => {}
            _ if self.detail == Detail::None && bytes == 0 => {}
            Kind::OpenReads | Kind::WaitWritable => text += &format!(" ({})", detail.trim_start_matches(", ")),
            Kind::Alloc => text += &format!(" ({bytes} bytes{detail})"),
            _ => text += &format!(" ({dtype}, {bytes} bytes{detail})"),
        }
        text
    }
}

impl Entry {
    pub fn store(&self, a: &Announcement) {
        self.kind_dtype.store((a.tag.kind as u32) << 8 | a.tag.dtype as u32, Ordering::Relaxed);
        self.unit.store(a.tag.unit, Ordering::Relaxed);
        self.bytes.store(a.tag.bytes, Ordering::Relaxed);
        self.detail.store(a.detail.pack(), Ordering::Relaxed);
    }

    /// `None` if the entry holds no collective (only memory that was tampered with does).
    pub fn load(&self) -> Option<Announcement> {
        let kind_dtype = self.kind_dtype.load(Ordering::Relaxed);
        let tag = Tag {
            kind: Kind::from_code((kind_dtype >> 8) as u8)?,
            unit: self.unit.load(Ordering::Relaxed),
            dtype: DType::ALL.into_iter().find(|d| *d as u32 == kind_dtype & 0xff)?,
            bytes: self.bytes.load(Ordering::Relaxed),
        };
        Some(Announcement { tag, detail: Detail::unpack(self.detail.load(Ordering::Relaxed)) })
    }
}

/// This process's mapping of the control segment.
pub struct Control {
    mapping: Mapping,
    world: usize,
}

impl Control {
    /// Bytes of the segment for `world` ranks.
    pub fn bytes(world: usize) -> usize {
        std::mem::size_of::<Header>() + world * std::mem::size_of::<RankArea>()
    }

    /// Maps a segment of `Control::bytes(world)` bytes, which starts zeroed.
    pub fn map(fd: BorrowedFd<'_>, world: usize) -> Result<Control> {
        const { assert!(std::mem::size_of::<Header>() % PAGE == 0) };
        Ok(Control { mapping: Mapping::shared(fd, Control::bytes(world))?, world })
    }

    pub fn header(&self) -> &Header {
        // SAFETY: the mapping starts with a header, page-aligned; all zero is a valid one, and every field is atomic.
        unsafe { &*self.mapping.base().cast::<Header>() }
    }

    pub fn rank(&self, rank: usize) -> &RankArea {
        assert!(rank < self.world);
        // SAFETY: `rank` areas follow the header and `rank < world`, so the area lies in the mapping; every field is
        // atomic or an UnsafeCell.
        unsafe { &*self.mapping.base().add(std::mem::size_of::<Header>()).cast::<RankArea>().add(rank) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_survive_the_ring() {
        let details = [
            Detail::None,
            Detail::Op(ReduceOp::Min),
            Detail::Root(63),
            Detail::Arena(7),
            Detail::Slots(3, 1_000_000),
            Detail::Layout(0x3fff_ffff),
            Detail::Memory(ARENA),
            Detail::Memory(HOST_MEMORY),
            Detail::Registered(17),
        ];
        let entry = Entry {
            kind_dtype: AtomicU32::new(0),
            unit: AtomicU32::new(0),
            bytes: AtomicU64::new(0),
            detail: AtomicU64::new(0),
        };
        assert_eq!(entry.load(), None);
        for code in 1..=11 {
            for dtype in DType::ALL {
                for detail in details {
                    let tag = Tag { kind: Kind::from_code(code).unwrap(), unit: 5, dtype, bytes: 1 << 40 };
                    let a = Announcement { tag, detail };
                    entry.store(&a);
                    assert_eq!(entry.load(), Some(a));
                }
            }
        }
    }

    #[test]
    fn descriptions_name_the_unit() {
        let tag = Tag { kind: Kind::AllGather, unit: 1, dtype: DType::F32, bytes: 4096 };
        let names = ["a", "layers.1"].map(|n| UnitName { label: n.into(), params: String::new() });
        let a = Announcement { tag, detail: Detail::None };
        assert_eq!(a.describe(&names), "all-gather of unit \"layers.1\" (float32, 4096 bytes)");
        assert_eq!(a.describe(&[]), "all-gather of unit 1 (float32, 4096 bytes)");
        assert_eq!(Announcement::plain(Kind::Barrier).describe(&names), "barrier");
    }
}
