//! Large blocks of memory that come and go within an iteration.

use super::status::{boundary, fsdp_status_t, out};
use crate::error::err;
use crate::heap::Heap;
use std::ffi::c_void;

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
