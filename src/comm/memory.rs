//! One mapping of memory, unmapped when dropped: of a file descriptor (shared) or anonymous (private).

use super::Slot;
use crate::error::{err, Error, Result};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes of a page; what shared layouts are aligned to.
pub(crate) const PAGE: usize = 4096;

/// `bytes` rounded up to a multiple of `to` (a power of two), if that fits.
pub(crate) fn round_up(bytes: usize, to: usize) -> Option<usize> {
    Some(bytes.checked_add(to - 1)? & !(to - 1))
}

/// A readable and writable mapping.
pub(crate) struct Mapping {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: a mapping is an address range; who touches which bytes when is decided by its users.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Zeroed memory of this process.
    pub fn anonymous(bytes: usize) -> Result<Mapping> {
        Mapping::map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// The same, of which the system promises nothing: more than its memory may be mapped.
    pub fn reserved(bytes: usize) -> Result<Mapping> {
        Mapping::map(bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    /// The first `bytes` of `fd`, shared with every process that maps it.
    pub fn shared(fd: BorrowedFd<'_>, bytes: usize) -> Result<Mapping> {
        Mapping::map(bytes, libc::MAP_SHARED, fd.as_raw_fd())
    }

    fn map(bytes: usize, flags: libc::c_int, fd: libc::c_int) -> Result<Mapping> {
        let bytes = bytes.max(1);
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(Error::os(format_args!("mapping {bytes} bytes of memory"), std::io::Error::last_os_error()));
        }
        Ok(Mapping { base: base.cast(), bytes })
    }

    /// Asks for huge pages; a hint, whose refusal changes nothing.
    pub fn advise_huge(&self) {
        // SAFETY: the range is this mapping's; the advice changes no contents.
        unsafe { libc::madvise(self.base.cast(), self.bytes, libc::MADV_HUGEPAGE) };
    }

    pub fn base(&self) -> *mut u8 {
        self.base
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map` and is unmapped once; its users hold this object while they use it.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

/// Gives the whole pages of a range back to the system; they are zero when they are touched next. Nothing happens to the
/// pages that the range shares with others.
///
/// # Safety
/// The range lies in an anonymous private mapping, and nobody needs what it holds.
pub(crate) unsafe fn give_back(start: *mut u8, bytes: usize) {
    let first = (start as usize).next_multiple_of(PAGE);
    let end = (start as usize + bytes) & !(PAGE - 1);
    if first < end {
        // SAFETY: whole pages of the caller's range.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_DONTNEED) };
    }
}

/// Gradient slots of these sizes in memory of this process, each on a line of its own, and what owns them.
pub(crate) fn slots(sizes: &[usize]) -> Result<(Mapping, Vec<Slot>)> {
    let mut offsets = Vec::with_capacity(sizes.len());
    let mut total = 0usize;
    for &bytes in sizes {
        offsets.push(total);
        total = round_up(bytes, 64)
            .and_then(|b| total.checked_add(b))
            .ok_or_else(|| err!(OutOfMemory, "gradient slots of {sizes:?} bytes exceed the address space"))?;
    }
    let mapping = Mapping::reserved(total)?;
    let slot = |(index, (&bytes, offset)): (usize, (&usize, usize))| {
        // SAFETY: the offset lies in the mapping, or just past it for a slot of no bytes.
        let data = unsafe { mapping.base().add(offset) };
        Slot { index, data, bytes }
    };
    let slots = sizes.iter().zip(offsets).enumerate().map(slot).collect();
    Ok((mapping, slots))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anonymous_memory_is_zeroed_and_writable() {
        let m = Mapping::anonymous(10_000).unwrap();
        // SAFETY: the range is mapped and only this test uses it.
        let bytes = unsafe { std::slice::from_raw_parts_mut(m.base(), m.bytes()) };
        assert!(bytes.iter().all(|b| *b == 0));
        bytes.fill(7);
        assert_eq!(bytes[9_999], 7);
    }

    #[test]
    fn more_than_the_address_space_is_an_out_of_memory_error() {
        let e = Mapping::anonymous(usize::MAX - PAGE).err().unwrap();
        assert_eq!(e.status, crate::error::Status::OutOfMemory);
    }

    #[test]
    fn rounding_up_stops_at_overflow() {
        assert_eq!(round_up(0, 64), Some(0));
        assert_eq!(round_up(65, 64), Some(128));
        assert_eq!(round_up(usize::MAX, 64), None);
    }
}
