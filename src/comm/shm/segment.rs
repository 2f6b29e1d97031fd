//! Shared memory of a job: memfds, and the layout of arenas and gradient slots in them. Nothing has a name in any file
//! system; the kernel frees a segment when the last process that maps it is gone.

use super::control::{Line, RING};
use crate::comm::memory::{round_up, Mapping, PAGE};
use crate::error::{err, Error, Result};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Creates a zeroed segment of `bytes` whose size is sealed. `reserve`: its memory is taken now, so that a lack of it is
/// an error here; otherwise pages take memory when they are touched, as private memory does.
pub fn create(name: &std::ffi::CStr, bytes: usize, reserve: bool) -> Result<OwnedFd> {
    let what = || format!("shared memory segment of {bytes} bytes");
    if let Some(available) = available_bytes().filter(|a| reserve && bytes as u64 > *a) {
        return Err(err!(OutOfMemory, "{}: only {available} bytes of memory are available", what()));
    }
    // SAFETY: the name is a C string; the call makes a new descriptor.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(Error::os(what(), io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let length = libc::off_t::try_from(bytes).map_err(|_| err!(OutOfMemory, "{}: too large", what()))?;
    let failed = |e: io::Error| match e.raw_os_error() {
        Some(libc::EFBIG) => err!(OutOfMemory, "{}: {e}", what()),
        _ => Error::os(what(), e),
    };
    // SAFETY: a call on a descriptor we own.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), length) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: as above.
    while reserve && length > 0 && unsafe { libc::fallocate(fd.as_raw_fd(), 0, 0, length) } != 0 {
        let e = io::Error::last_os_error();
        if e.raw_os_error() != Some(libc::EINTR) {
            return Err(failed(e));
        }
    }
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: as above.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(fd)
}

/// Refuses a received descriptor that is not a segment of exactly `bytes` whose size is sealed.
pub fn check_size(fd: BorrowedFd<'_>, bytes: usize) -> Result<()> {
    // SAFETY: `stat` is plain data that the call fills; the descriptor is open.
    let (size, seals) = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        if libc::fstat(fd.as_raw_fd(), &mut stat) != 0 {
            return Err(Error::os("looking at a shared memory segment", io::Error::last_os_error()));
        }
        (stat.st_size as u64, libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS))
    };
    if size != bytes as u64 || seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err(err!(Io, "a received shared memory segment has {size} bytes (seals {seals}), expected {bytes}"));
    }
    Ok(())
}

/// Memory the machine (and this process's control group) can still give, if the kernel says: past it, reserving would
/// wake the out-of-memory killer instead of failing.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    let machine = field("MemAvailable:")? + field("SwapFree:").unwrap_or(0);
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    let group = limits.iter().find_map(|p| std::fs::read_to_string(p).ok()?.trim().parse::<u64>().ok());
    Some(group.map_or(machine, |limit| limit.min(machine)))
}

/// READ phases of one rank on one arena.
#[repr(C, align(64))]
pub struct Phase {
    pub opened: AtomicU64,
    pub closed: AtomicU64,
}

/// An arena: a header page with every rank's [`Phase`], then the bytes.
pub struct ArenaSegment {
    mapping: Mapping,
    /// The communicator it belongs to, and its number there.
    pub communicator: u64,
    pub id: u64,
}

impl ArenaSegment {
    /// Bytes of the segment for an arena of `bytes`.
    pub fn segment_bytes(bytes: usize) -> Result<usize> {
        round_up(bytes, PAGE)
            .and_then(|b| b.checked_add(PAGE))
            .filter(|b| isize::try_from(*b).is_ok())
            .ok_or_else(|| err!(OutOfMemory, "an arena of {bytes} bytes exceeds the address space"))
    }

    pub fn map(fd: &OwnedFd, bytes: usize, communicator: u64, id: u64) -> Result<ArenaSegment> {
        const { assert!(super::MAX_WORLD * std::mem::size_of::<Phase>() <= PAGE) };
        let mapping = Mapping::shared(fd.as_fd(), ArenaSegment::segment_bytes(bytes)?)?;
        mapping.advise_huge();
        Ok(ArenaSegment { mapping, communicator, id })
    }

    pub fn base(&self) -> *mut u8 {
        // SAFETY: the mapping has at least the header page.
        unsafe { self.mapping.base().add(PAGE) }
    }

    pub fn phase(&self, rank: usize) -> &Phase {
        assert!(rank < super::MAX_WORLD);
        // SAFETY: the header page holds MAX_WORLD phases (asserted in `map`), zeroed at first, all atomic.
        unsafe { &*self.mapping.base().cast::<Phase>().add(rank) }
    }
}

/// One reduce-scatter that a rank has started.
#[repr(C)]
pub struct Publication {
    /// Times the rank had ended an iteration before.
    pub iteration: AtomicU64,
    /// Ranks that have done their part, a bit each.
    pub done: AtomicU64,
    pub bytes: AtomicU64,
    /// Counted from the first unit of the slots.
    pub unit: AtomicU32,
    pub slot: AtomicU32,
    pub params: AtomicU32,
    pub dtype: AtomicU32,
}

/// How far one rank is with the reductions on its slots.
#[repr(C)]
pub struct Progress {
    /// Reduce-scatters started.
    pub started: Line<AtomicU64>,
    /// Iterations ended.
    pub ended: Line<AtomicU64>,
    /// Reduce-scatter t is at t % RING.
    entries: [Publication; RING],
}

impl Progress {
    pub fn entry(&self, number: u64) -> &Publication {
        &self.entries[number as usize % RING]
    }
}

/// Gradient slots of all ranks: per rank, page-aligned, its [`Progress`], then for each slot its data (64-byte aligned)
/// and its presence bytes.
pub struct SlotSegment {
    mapping: Mapping,
    pub id: u32,
    pub layout: SlotLayout,
    /// 1 + the ticket of the last reduction of each of this rank's slots.
    pub last_ticket: Vec<AtomicU64>,
}

#[derive(Clone)]
pub struct SlotLayout {
    pub sizes: Vec<usize>,
    pub flags: usize,
    offsets: Vec<usize>,
    rank_bytes: usize,
    pub total: usize,
}

impl SlotLayout {
    pub fn new(sizes: &[usize], flags: usize, world: usize) -> Result<SlotLayout> {
        let plan = || {
            let (mut offsets, mut at) = (Vec::with_capacity(sizes.len()), std::mem::size_of::<Progress>());
            for &bytes in sizes {
                offsets.push(at);
                at = at.checked_add(round_up(bytes, 64)?)?.checked_add(round_up(flags, 64)?)?;
            }
            let rank_bytes = round_up(at.max(1), PAGE)?;
            let total = rank_bytes.checked_mul(world).filter(|t| isize::try_from(*t).is_ok())?;
            Some(SlotLayout { sizes: sizes.to_vec(), flags, offsets, rank_bytes, total })
        };
        plan().ok_or_else(|| err!(OutOfMemory, "gradient slots of {sizes:?} bytes exceed the address space"))
    }

    /// A number that differs when the sizes or the flags do (FNV-1a, 30 bits).
    pub fn digest(&self) -> u32 {
        let words = self.sizes.iter().chain([&self.flags]).flat_map(|s| s.to_le_bytes());
        let hash = words.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3));
        ((hash >> 30 ^ hash) & 0x3fff_ffff) as u32
    }
}

impl SlotSegment {
    pub fn map(fd: &OwnedFd, layout: SlotLayout, id: u32) -> Result<SlotSegment> {
        let mapping = Mapping::shared(fd.as_fd(), layout.total)?;
        let last_ticket = layout.sizes.iter().map(|_| AtomicU64::new(0)).collect();
        Ok(SlotSegment { mapping, id, layout, last_ticket })
    }

    pub fn progress(&self, rank: usize) -> &Progress {
        const { assert!(std::mem::size_of::<Progress>() % 64 == 0) };
        let offset = rank * self.layout.rank_bytes;
        assert!(offset + std::mem::size_of::<Progress>() <= self.mapping.bytes());
        // SAFETY: every rank's part begins with it, page-aligned, zeroed at first, all atomic.
        unsafe { &*self.mapping.base().add(offset).cast::<Progress>() }
    }

    /// Rank `rank`'s slot `index`: its `sizes[index]` bytes.
    pub fn data(&self, rank: usize, index: usize) -> *mut u8 {
        let offset = rank * self.layout.rank_bytes + self.layout.offsets[index];
        assert!(offset + self.layout.sizes[index] <= self.mapping.bytes());
        // SAFETY: the offset lies in the mapping (asserted).
        unsafe { self.mapping.base().add(offset) }
    }

    /// The slot's `layout.flags` presence bytes.
    pub fn flags(&self, rank: usize, index: usize) -> *mut u8 {
        let data = self.layout.sizes[index].next_multiple_of(64);
        // SAFETY: the layout keeps the flags behind the data, inside the mapping.
        unsafe { self.data(rank, index).add(data) }
    }

    /// Gives the whole pages of a slot back; it reads as zero afterwards.
    pub fn trim(&self, rank: usize, index: usize) {
        let start = (self.data(rank, index) as usize).next_multiple_of(PAGE);
        let end = (self.data(rank, index) as usize + self.layout.sizes[index]) & !(PAGE - 1);
        if start < end {
            // SAFETY: the range lies in the slot (rounded inwards), which its rank says nobody reads. A refusal keeps
            // the memory, no more.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_REMOVE) };
        }
    }

    /// Which of this rank's slots starts at this address.
    pub fn find(&self, rank: usize, data: *const u8, index: usize) -> bool {
        index < self.layout.sizes.len() && std::ptr::eq(self.data(rank, index), data)
    }

    pub fn note_ticket(&self, index: usize, ticket: u64) {
        self.last_ticket[index].store(ticket + 1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn a_segment_is_zeroed_sealed_and_of_its_size() {
        let fd = create(c"fsdp-test", 10_000, true).unwrap();
        check_size(fd.as_fd(), 10_000).unwrap();
        assert!(check_size(fd.as_fd(), 9_999).is_err());
        // SAFETY: a call on our own descriptor.
        assert_ne!(unsafe { libc::ftruncate(fd.as_raw_fd(), 0) }, 0, "shrinking is sealed");
    }

    #[test]
    fn more_memory_than_there_is_is_an_error() {
        let e = create(c"fsdp-test", 1 << 50, true).unwrap_err();
        assert_eq!(e.status, Status::OutOfMemory, "{e}");
        assert!(ArenaSegment::segment_bytes(usize::MAX - 5).is_err());
        assert!(SlotLayout::new(&[usize::MAX - 70], 1, 2).is_err());
        assert!(SlotLayout::new(&[usize::MAX / 4], 1, 8).is_err());
    }

    #[test]
    fn slots_are_aligned_and_apart() {
        let layout = SlotLayout::new(&[100, 0, 5000], 3, 4).unwrap();
        let fd = create(c"fsdp-test", layout.total, false).unwrap();
        let slots = SlotSegment::map(&fd, layout.clone(), 0).unwrap();
        let mut ranges = Vec::new();
        for rank in 0..4 {
            for (i, &size) in layout.sizes.iter().enumerate() {
                let (data, flags) = (slots.data(rank, i) as usize, slots.flags(rank, i) as usize);
                assert_eq!((data % 64, flags % 64), (0, 0));
                ranges.extend([(data, data + size), (flags, flags + 3)]);
            }
        }
        ranges.sort();
        assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0), "{ranges:?}");
        assert_ne!(layout.digest(), SlotLayout::new(&[100, 5000, 0], 3, 4).unwrap().digest());
    }
}
