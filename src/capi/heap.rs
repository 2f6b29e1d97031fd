//! Large blocks of memory that come and go within an iteration.

use super::status::{boundary, fsdp_status_t, out, write_sized, Sized_};
use crate::error::err;
use crate::heap::Heap;
use std::ffi::c_void;

/// This process's heap of large blocks. Set struct_size before the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_heap_stats_t {
    /// sizeof(fsdp_heap_stats_t).
    pub struct_size: usize,
    /// Bytes of the blocks that live, in whole pages.
    pub live_bytes: u64,
    /// The most of them at once since the last fsdp_heap_trim.
    pub peak_bytes: u64,
    /// Bytes of the huge pages that have memory: what lives, what is kept for the next blocks, and what lies between.
    pub resident_bytes: u64,
}

// SAFETY: plain numbers, struct_size first.
unsafe impl Sized_ for fsdp_heap_stats_t {
    const NAME: &'static str = "fsdp_heap_stats_t";
}

/// A block of at least `bytes` in this process's heap of huge pages, which has gradient shards as well: a host that has its
/// activations there needs less memory in all, since they go while gradients come. Aligned to 64 bytes, contents undefined, of one
/// owner, who gives it back with fsdp_heap_release. Meant for blocks of 64 KiB and more: each takes whole pages. What was
/// released stays with the process for the next blocks, as much as lived at once, until fsdp_heap_trim or until an engine is
/// destroyed. Local; any thread. FSDP_ERR_OUT_OF_MEMORY where addresses for the heap could not be reserved (`ulimit -v`) or are used up:
/// twice the machine's memory. Since 0.1.
///
/// # Safety
/// `out_block` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_heap_alloc(bytes: usize, out_block: *mut *mut c_void) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let block = unsafe { out(out_block, "out_block") }?;
        let heap = Heap::get().ok_or_else(|| err!(OutOfMemory, "no addresses could be reserved for the heap"))?;
        block.write(heap.alloc(bytes)?.cast());
        Ok(())
    })
}

/// Makes the caller an owner of the block that `address` lies in: 1, or 0 if it lies in none. On the CPU a unit's
/// gradient shards of 64 KiB and more are in one from when fsdp_engine_shard says where they are until all of them are cleared; an owner
/// keeps their memory beyond that. Smaller ones have a fixed place and are in none. Local; any thread. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_heap_retain(address: *const c_void) -> i32 {
    Heap::made().is_some_and(|heap| heap.retain(address.cast())) as i32
}

/// Gives up a share in the block that `address` lies in: 1, or 0 if it lies in none. The last owner frees it. Local; any thread.
/// Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_heap_release(address: *const c_void) -> i32 {
    Heap::made().is_some_and(|heap| heap.release(address.cast())) as i32
}

/// Gives what is free in the heap back to the system. Destroying an engine does, too. Local; any thread. Since 0.1.
#[no_mangle]
pub extern "C" fn fsdp_heap_trim() {
    if let Some(heap) = Heap::made() {
        heap.trim();
    }
}

/// What the heap has now. Zero before its first block. Local; any thread. Since 0.1.
///
/// # Safety
/// `out_stats` is NULL or writable for its struct_size.
#[no_mangle]
pub unsafe extern "C" fn fsdp_heap_stats(out_stats: *mut fsdp_heap_stats_t) -> fsdp_status_t {
    boundary(|| {
        let stats = Heap::made().map(Heap::stats).unwrap_or_default();
        let stats = fsdp_heap_stats_t {
            struct_size: 0,
            live_bytes: stats.live as u64,
            peak_bytes: stats.peak as u64,
            resident_bytes: stats.resident as u64,
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(out_stats, stats) }
    })
}
