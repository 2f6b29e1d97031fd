//! A heap of huge pages, for large blocks that come and go within an iteration: activations, temporaries of optimizers,
//! gradient shards.
//!
//! These have their turns: gradient shards come while activations go, and are gone before the next ones come. So they share
//! memory, if one allocator has them all and does not fragment; giving memory back to the system in between would cost
//! more than most of what is done with it (bench/NOTES.md). Huge pages cost fewer page faults and misses of the TLB.
//!
//! Blocks are placed best-fit in one reserved range, in whole pages, at the lowest address where several fit as well; free
//! ranges that touch become one. What is freed keeps its memory for the next block there, as long as all memory together is not
//! more than the most that lived at once: beyond that huge pages in which nothing lives are given back, the highest first (what is
//! free in the others comes on top). So only holes that nothing fits in cost page faults. Owners of blocks are counted: who shares one keeps it.

use crate::comm::memory::{give_back, Mapping, PAGE};
use crate::error::{err, Result};
use crate::memory::HUGE_PAGE;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Blocks of fewer bytes are not worth a place here.
pub const LEAST: usize = 64 << 10;

/// Blocks do not all begin at the same place of a page: arrays that do get into each other's way in caches.
const COLOURS: usize = PAGE / 64;

/// See the module's text.
pub struct Heap {
    _mapping: Mapping,
    /// The first huge page of the mapping, and the bytes from there that are used.
    base: usize,
    bytes: usize,
    state: Mutex<State>,
}

struct Block {
    bytes: usize,
    owners: usize,
}

/// Offsets in the mapping and lengths, multiples of a page.
struct State {
    /// Free ranges by their start; no two touch.
    free: BTreeMap<usize, usize>,
    blocks: BTreeMap<usize, Block>,
    /// Of each huge page, how many bytes live.
    live: Vec<u32>,
    /// Huge pages that have memory though nothing in them lives.
    warm: BTreeSet<usize>,
    /// Huge pages that have memory.
    resident: usize,
    /// Bytes that live, and the most that did.
    used: usize,
    most: usize,
    colour: usize,
}

/// What [`Heap::stats`] counts, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeapStats {
    /// Of the blocks that live, in whole pages.
    pub live: usize,
    /// The most that lived at once since [`Heap::trim`].
    pub peak: usize,
    /// Of the huge pages that have memory.
    pub resident: usize,
}

static HEAP: OnceLock<Option<Heap>> = OnceLock::new();

impl Heap {
    /// The process's heap; None where its range cannot be reserved (`ulimit -v`).
    pub fn get() -> Option<&'static Heap> {
        // Addresses for whatever fits in memory, and as many for holes.
        let range = || {
            // SAFETY: asks the system for two numbers.
            let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
            2 * (pages.max(1) as usize) * (size.max(1) as usize)
        };
        HEAP.get_or_init(|| Heap::new(range()).ok()).as_ref()
    }

    /// The process's heap, if there is one by now.
    pub fn made() -> Option<&'static Heap> {
        HEAP.get()?.as_ref()
    }

    /// `bytes`: a multiple of a page.
    fn new(bytes: usize) -> Result<Heap> {
        let mapping = Mapping::reserved(bytes + HUGE_PAGE)?;
        mapping.advise_huge();
        let base = (mapping.base() as usize).next_multiple_of(HUGE_PAGE);
        let state = State {
            free: BTreeMap::from([(0, bytes)]),
            blocks: BTreeMap::new(),
            live: vec![0; bytes.div_ceil(HUGE_PAGE)],
            warm: BTreeSet::new(),
            resident: 0,
            used: 0,
            most: 0,
            colour: 0,
        };
        Ok(Heap { _mapping: mapping, base, bytes, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of one owner, aligned to 64 bytes. Its contents are undefined.
    pub fn alloc(&self, bytes: usize) -> Result<*mut u8> {
        let none = || err!(OutOfMemory, "a block of {bytes} bytes: the heap's {} are used up", self.bytes);
        let mut state = self.state();
        let colour = 64 * state.colour;
        let len = bytes.checked_add(colour).and_then(|b| b.max(1).checked_next_multiple_of(PAGE)).ok_or_else(none)?;
        let fits = state.free.iter().filter(|(_, room)| **room >= len);
        let (at, room) = fits.min_by_key(|(_, room)| **room).map(|(a, r)| (*a, *r)).ok_or_else(none)?;
        state.free.remove(&at);
        if room > len {
            state.free.insert(at + len, room - len);
        }
        state.blocks.insert(at, Block { bytes: len, owners: 1 });
        state.live(at, len);
        self.limit(&mut state);
        // A step that has no factor in common with their number: all have their turn.
        state.colour = (state.colour + 5) % COLOURS;
        Ok((self.base + at + colour) as *mut u8)
    }

    /// One owner more of the block that `address` lies in; false if there is none.
    pub fn retain(&self, address: *const u8) -> bool {
        let Some(at) = self.offset(address) else { return false };
        let mut state = self.state();
        let block = state.block(at);
        block.map(|(_, block)| block.owners += 1).is_some()
    }

    /// One owner less of the block that `address` lies in; false if there is none. The last one frees it.
    pub fn release(&self, address: *const u8) -> bool {
        let Some(at) = self.offset(address) else { return false };
        let mut state = self.state();
        let Some((start, block)) = state.block(at) else { return false };
        block.owners -= 1;
        if block.owners == 0 {
            let bytes = block.bytes;
            state.free(start, bytes);
        }
        true
    }

    /// Gives back all that is free; what lives now is the most that did.
    pub fn trim(&self) {
        let mut state = self.state();
        state.most = state.used;
        self.limit(&mut state);
    }

    pub fn stats(&self) -> HeapStats {
        let state = self.state();
        HeapStats { live: state.used, peak: state.most, resident: state.resident * HUGE_PAGE }
    }

    /// Gives back what is more than the heap may have.
    fn limit(&self, state: &mut State) {
        let most = state.most;
        while state.resident * HUGE_PAGE > most.next_multiple_of(HUGE_PAGE) {
            let Some(page) = state.warm.pop_last() else { break };
            state.resident -= 1;
            let at = page * HUGE_PAGE;
            // SAFETY: inside of the mapping; no block lives there.
            unsafe { give_back((self.base + at) as *mut u8, HUGE_PAGE.min(self.bytes - at)) };
        }
    }

    fn offset(&self, address: *const u8) -> Option<usize> {
        Some((address as usize).wrapping_sub(self.base)).filter(|at| *at < self.bytes)
    }
}

impl State {
    /// The block that has this byte, and its start.
    fn block(&mut self, at: usize) -> Option<(usize, &mut Block)> {
        let (start, block) = self.blocks.range_mut(..=at).next_back()?;
        (at - start < block.bytes).then_some((*start, block))
    }

    /// These bytes live.
    fn live(&mut self, at: usize, len: usize) {
        self.used += len;
        self.most = self.most.max(self.used);
        for (page, bytes) in parts(at, len) {
            if self.live[page] == 0 && !self.warm.remove(&page) {
                self.resident += 1;
            }
            self.live[page] += bytes;
        }
    }

    fn free(&mut self, mut start: usize, bytes: usize) {
        self.blocks.remove(&start);
        self.used -= bytes;
        for (page, bytes) in parts(start, bytes) {
            self.live[page] -= bytes;
            if self.live[page] == 0 {
                self.warm.insert(page);
            }
        }
        let mut end = start + bytes;
        if let Some((before, room)) = self.free.range(..start).next_back().map(|(a, r)| (*a, *r)) {
            if before + room == start {
                self.free.remove(&before);
                start = before;
            }
        }
        if let Some(room) = self.free.remove(&end) {
            end += room;
        }
        self.free.insert(start, end - start);
    }
}

/// The huge pages that a range has bytes in, and how many.
fn parts(at: usize, len: usize) -> impl Iterator<Item = (usize, u32)> {
    (at / HUGE_PAGE..=(at + len - 1) / HUGE_PAGE).map(move |page| {
        let (start, end) = (page * HUGE_PAGE, (page + 1) * HUGE_PAGE);
        (page, (end.min(at + len) - start.max(at)) as u32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free_of(heap: &Heap) -> Vec<(usize, usize)> {
        heap.state().free.iter().map(|(a, r)| (*a, *r)).collect()
    }

    /// Those that have memory, and those of them in which nothing lives.
    fn pages_of(heap: &Heap) -> (usize, usize) {
        let state = heap.state();
        (state.resident, state.warm.len())
    }

    #[test]
    fn blocks_never_overlap_and_leave_one_free_range() {
        let heap = Heap::new(64 << 20).unwrap();
        let mut alive: Vec<(usize, usize)> = Vec::new();
        let mut random = 7u64;
        for step in 0..4000 {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let number = (random >> 33) as usize;
            if number % 5 < 3 && alive.len() < 60 {
                let bytes = number % 900_000;
                let block = heap.alloc(bytes).unwrap();
                assert_eq!(block as usize % 64, 0);
                // SAFETY: the block has as many.
                unsafe { block.write_bytes(step as u8, bytes) };
                let mine = (block as usize, block as usize + bytes.max(1));
                assert!(alive.iter().all(|other| mine.1 <= other.0 || other.1 <= mine.0), "step {step}");
                alive.push(mine);
            } else if !alive.is_empty() {
                let (start, _) = alive.swap_remove(number % alive.len());
                assert!(heap.release(start as *const u8));
            }
        }
        alive.drain(..).for_each(|(start, _)| assert!(heap.release(start as *const u8)));
        assert_eq!(free_of(&heap), [(0, 64 << 20)]);
    }

    #[test]
    fn what_is_freed_is_used_again_from_the_lowest_address() {
        let heap = Heap::new(16 << 20).unwrap();
        let blocks: Vec<*mut u8> = (0..4).map(|_| heap.alloc(1 << 20).unwrap()).collect();
        heap.release(blocks[1]);
        let smaller = heap.alloc(1 << 19).unwrap();
        assert!(blocks[0] < smaller && smaller < blocks[2]);
    }

    #[test]
    fn a_block_lives_until_its_last_owner_has_let_go_by_any_address_in_it() {
        let heap = Heap::new(16 << 20).unwrap();
        let block = heap.alloc(1 << 20).unwrap();
        assert!(heap.retain(block.wrapping_add((1 << 20) - 1)));
        assert!(heap.release(block.wrapping_add(5000)));
        // SAFETY: one owner is left.
        unsafe { block.write(3) };
        assert_eq!(free_of(&heap).len(), 1);
        assert!(heap.release(block));
        assert!(!heap.release(block) && !heap.retain(block));
        assert_eq!(free_of(&heap), [(0, 16 << 20)]);
    }

    #[test]
    fn no_more_memory_is_kept_than_the_most_that_lived() {
        let heap = Heap::new(1 << 30).unwrap();
        // Two blocks of 10 huge pages and, between them, what keeps the hole from being larger.
        let [first, _wall] = [0; 2].map(|_| heap.alloc(10 * HUGE_PAGE).unwrap());
        // SAFETY: the block has as many.
        unsafe { first.write_bytes(7, 10 * HUGE_PAGE) };
        heap.release(first);
        assert_eq!(pages_of(&heap), (21, 10));
        // Fits in no hole: the hole's memory goes, but for a page that is a part of both blocks.
        heap.alloc(11 * HUGE_PAGE).unwrap();
        assert_eq!(pages_of(&heap), (22, 0));
        // SAFETY: a byte of the mapping; pages that went back read as zero.
        assert_eq!(unsafe { first.wrapping_add(HUGE_PAGE).read() }, 0);
    }

    #[test]
    fn memory_goes_back_when_it_is_trimmed() {
        let heap = Heap::new(16 << 20).unwrap();
        let block = heap.alloc(4 << 20).unwrap();
        // SAFETY: the block has as many.
        unsafe { block.write_bytes(7, 4 << 20) };
        let next = heap.alloc(64).unwrap();
        heap.release(block);
        // SAFETY: bytes of the mapping; pages that went back read as zero.
        let read = || unsafe { block.wrapping_add(1 << 20).read() };
        assert_eq!(read(), 7);
        heap.trim();
        assert_eq!((read(), pages_of(&heap)), (0, (1, 0)));
        heap.release(next);
        heap.trim();
        assert_eq!(pages_of(&heap), (0, 0));
    }

    #[test]
    fn other_memory_is_none_of_its_blocks_and_a_full_heap_says_so() {
        let heap = Heap::new(1 << 20).unwrap();
        let other = 7u8;
        assert!(!heap.retain(&other) && !heap.release(&other) && !heap.release(std::ptr::null()));
        assert!(heap.alloc(1 << 19).is_ok());
        let e = heap.alloc(1 << 20).unwrap_err();
        assert_eq!(e.status, crate::error::Status::OutOfMemory);
        assert!(heap.alloc(usize::MAX).is_err());
    }
}
