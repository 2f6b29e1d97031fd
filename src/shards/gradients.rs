//! Where a store's gradient shards are, and which of them hold a value.
//!
//! A unit's gradient shards are a block of the process's heap from their reduction until they are cleared, so that
//! activations have that memory in between. Small ones, those of a GPU, and all where there is no heap have a fixed place.

use crate::device::Buffer;
use crate::dtype::DType;
use crate::heap::{Heap, LEAST};
use crate::plan::Plan;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::Relaxed};

/// See the module's text. Calls that change it are made under the lock of an engine that is in an iteration, or in none.
pub struct GradShards {
    /// Fixed places, at the plan's `grad_offset`s. Takes memory where it is written.
    fixed: Buffer,
    params: Vec<Param>,
    units: Vec<Unit>,
}

struct Param {
    held: AtomicBool,
    unit: usize,
}

struct Unit {
    /// The first float of the fixed place.
    at: usize,
    bytes: usize,
    in_heap: bool,
    /// How many of its parameters are held.
    holding: AtomicUsize,
    /// Null: what is held is at the fixed place.
    block: AtomicPtr<f32>,
}

// SAFETY: the buffer and the blocks are plain memory; the engines' locks and phases say who touches what when.
unsafe impl Send for GradShards {}
// SAFETY: as above.
unsafe impl Sync for GradShards {}

impl GradShards {
    /// For the parameters of the plan's own units. `in_heap`: they are in memory of this process, and may move.
    pub fn new(plan: &Plan, fixed: Buffer, in_heap: bool) -> GradShards {
        let unit = |u: &crate::plan::UnitPlan| {
            let bytes = u.layout.shard_len * DType::F32.size();
            let in_heap = in_heap && bytes >= LEAST;
            Unit { at: u.grad_offset, bytes, in_heap, holding: AtomicUsize::new(0), block: AtomicPtr::default() }
        };
        let param = |p: &crate::plan::ParamPlan| Param { held: AtomicBool::new(false), unit: p.unit as usize };
        GradShards {
            fixed,
            params: plan.params.iter().map(param).collect(),
            units: plan.units.iter().map(unit).collect(),
        }
    }

    /// Whether a parameter's gradient shard holds a value that the next reduction adds to.
    pub fn holds(&self, param: usize) -> bool {
        self.params[param].held.load(Relaxed)
    }

    /// From now on it does. What it holds was written where [`GradShards::open`] said.
    pub fn hold(&self, param: usize) {
        let Param { held, unit } = &self.params[param];
        if !held.swap(true, Relaxed) {
            self.units[*unit].holding.fetch_add(1, Relaxed);
        }
    }

    /// It holds nothing any more. With a unit's last one its block is released.
    pub fn clear(&self, param: usize) {
        let Param { held, unit } = &self.params[param];
        let unit = &self.units[*unit];
        if held.swap(false, Relaxed) {
            unit.holding.fetch_sub(1, Relaxed);
        }
        // A block that was opened and got nothing goes, too.
        if unit.holding.load(Relaxed) == 0 {
            unit.release();
        }
    }

    /// Where the gradient shards of a parameter's unit are to be written; stays until all of them are cleared.
    pub fn open(&self, param: usize) -> *mut f32 {
        let unit = &self.units[self.params[param].unit];
        if unit.in_heap && unit.holding.load(Relaxed) == 0 && unit.block.load(Relaxed).is_null() {
            // Without room in the heap they go to the fixed place.
            if let Some(block) = Heap::get().and_then(|heap| heap.alloc(unit.bytes).ok()) {
                unit.block.store(block.cast(), Relaxed);
            }
        }
        self.base(param)
    }

    /// Where the gradient shards of a parameter's unit are.
    pub fn base(&self, param: usize) -> *mut f32 {
        let unit = &self.units[self.params[param].unit];
        let block = unit.block.load(Relaxed);
        if block.is_null() {
            self.fixed.as_ptr().wrapping_add(unit.at)
        } else {
            block
        }
    }

    /// The fixed places of gradient shards that never move.
    pub fn fixed(&self) -> *mut f32 {
        self.fixed.as_ptr()
    }
}

impl Unit {
    fn release(&self) {
        if self.block.load(Relaxed).is_null() {
            return;
        }
        let block = self.block.swap(std::ptr::null_mut(), Relaxed);
        if let Some(heap) = Heap::made() {
            heap.release(block.cast());
        }
    }
}

impl Drop for GradShards {
    fn drop(&mut self) {
        self.units.iter().for_each(Unit::release);
        // The training that the heap's memory was kept for is over.
        if self.units.iter().any(|u| u.in_heap) {
            Heap::made().iter().for_each(|heap| heap.trim());
        }
    }
}
