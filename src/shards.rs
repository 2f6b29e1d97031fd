//! The memory that outlives an engine: parameter shards and compute copies (in arenas of the communicator), and gradient
//! shards.
//!
//! An engine makes one [`ShardStore`] for the parameters that it shards; an engine that adopts another one's units shares
//! that one's stores. READ and WRITE phases belong to the store, because they are about its arena: only one engine may
//! be inside an iteration on a store at a time.

use crate::comm::{Arena, Communicator};
use crate::device::{Buffer, Device, Home};
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::mesh::Mesh;
use crate::module::ModuleTree;
use crate::plan::{Plan, UnitId, UnitPlan};
use crate::precision::Cast;
use std::sync::{Arc, Mutex, MutexGuard};

mod gradients;

use gradients::GradShards;

/// What this rank may do with a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Own shards may be written.
    Writable,
    /// The engine of this number is in an iteration: units are or may be unsharded.
    Reading(u64),
    /// This rank reads no more, others may.
    Closed,
}

/// See the module's text.
pub struct ShardStore {
    comm: Arc<dyn Communicator>,
    pub arena: Arena,
    /// Every parameter that is computed in 16 bits, as all ranks have rounded it when they opened the READ phase; None if
    /// there is none. The phases of `arena` say when it may be read and written.
    copies: Option<Arena>,
    /// This rank's part of it.
    casts: Vec<Cast>,
    device: Arc<dyn Device>,
    /// With CPU offload, and on a GPU, this rank's masters, at the plan's `grad_offset`s.
    apart: Option<Apart>,
    home: Home,
    /// This rank's gradient shards, by parameter of the engine that made the store.
    pub grads: GradShards,
    phase: Mutex<Phase>,
}

// SAFETY: the gradient shards are plain private memory; the engines' locks and phases say who touches what when.
unsafe impl Send for ShardStore {}
// SAFETY: as above.
unsafe impl Sync for ShardStore {}

/// Masters in memory of their own.
struct Apart {
    masters: Buffer,
    /// What goes to `arena` when a READ phase opens, of each unit: its first float there, its first byte in the arena, and
    /// its floats. Nothing on a GPU, whose queues bring units together.
    shards: Vec<(usize, usize, usize)>,
}

/// A model that an engine has sharded: what another engine needs in order to adopt it.
pub struct ShardedModel {
    pub tree: ModuleTree,
    pub plan: Plan,
    /// The plan's stores; the engine's own is the first.
    pub stores: Vec<Arc<ShardStore>>,
    pub mesh: Arc<Mesh>,
}

impl std::fmt::Debug for ShardedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ShardedModel of {} units", self.plan.units.len())
    }
}

impl ShardStore {
    /// Collective: allocates for the plan's own units. `in_arena`: unit buffers are memory of the communicator; else this
    /// rank's shards alone are kept here, and its arena has READ phases and no bytes.
    pub fn new(
        comm: Arc<dyn Communicator>,
        plan: &Plan,
        device: Arc<dyn Device>,
        cpu_offload: bool,
        in_arena: bool,
    ) -> Result<ShardStore> {
        let home = if cpu_offload { Home::Host } else { Home::Device };
        let of_unit = |u: &UnitPlan| {
            let start = u.layout.shard(comm.rank()).start * DType::F32.size();
            (u.grad_offset, u.arena_offset + start, u.layout.shard_len)
        };
        let apart = || -> Result<Apart> {
            let what = if cpu_offload { "the offloaded shards" } else { "the shards" };
            let own = plan.units.iter().filter(|u| in_arena && u.store == 0);
            Ok(Apart { masters: device.alloc(home, plan.shard_elements, what)?, shards: own.map(of_unit).collect() })
        };
        let bytes = |of: usize| if in_arena { of } else { 0 };
        let casts = (0..plan.units.len() as UnitId).filter(|u| in_arena && plan.units[*u as usize].store == 0);
        Ok(ShardStore {
            apart: (cpu_offload || !in_arena).then(apart).transpose()?,
            arena: comm.alloc_arena(bytes(plan.arena_bytes))?,
            copies: (bytes(plan.compute_bytes) > 0).then(|| comm.alloc_arena(plan.compute_bytes)).transpose()?,
            casts: casts.flat_map(|u| plan.casts(u)).collect(),
            grads: GradShards::new(plan, device.alloc(home, plan.shard_elements, "the gradient shards")?, in_arena),
            device,
            home,
            phase: Mutex::new(Phase::Writable),
            comm,
        })
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// An error if another engine than `engine` is in an iteration.
    pub fn require_free(&self, engine: u64) -> Result<()> {
        match *self.phase() {
            Phase::Reading(other) if other != engine => Err(err!(
                InvalidState,
                "these parameters are in use: another engine that shares them has not ended its iteration"
            )),
            _ => Ok(()),
        }
    }

    /// Where this rank's masters are, float `at` of its gradient shards' layout, byte `byte` of the arena's.
    pub fn master_at(&self, at: usize, byte: usize) -> *mut f32 {
        match &self.apart {
            Some(apart) => apart.masters.as_ptr().wrapping_add(at),
            None => self.arena.base.wrapping_add(byte).cast(),
        }
    }

    /// The GPU that these are a unit's shards of; None: units are computed on the CPU, in memory of the communicator.
    pub fn gpu(&self) -> Option<usize> {
        self.device.gpu()
    }

    /// Whether this rank's masters lie in host memory.
    pub fn offloads(&self) -> bool {
        self.home == Home::Host
    }

    /// Byte `offset` of the compute copies; null if there are none.
    pub fn copy_at(&self, offset: usize) -> *mut u8 {
        self.copies.as_ref().map_or(std::ptr::null_mut(), |a| a.base.wrapping_add(offset))
    }

    /// Opens `engine`'s READ phase. If this rank's shards may have been written since the last one, they are uploaded and
    /// their compute copies made first; returns the bytes of both.
    pub fn open(&self, engine: u64) -> Result<u64> {
        self.require_free(engine)?;
        let mut cast = 0;
        if *self.phase() == Phase::Writable {
            for (from, to, len) in self.apart.iter().flat_map(|a| &a.shards) {
                let from = self.master_at(*from, 0);
                // SAFETY: the plan gave this rank these ranges; else as below.
                unsafe { self.device.put(DType::F32, from.cast(), self.arena.base.add(*to).cast(), *len) }?;
                cast += (len * DType::F32.size()) as u64;
            }
            for c in &self.casts {
                // SAFETY: the plan gave this rank these ranges; in a WRITE phase no other rank reads its part of either
                // arena, and the engine's lock keeps this rank's own from being written meanwhile.
                unsafe { c.run(self.arena.base, self.copy_at(0)) };
                cast += c.bytes() as u64;
            }
        }
        self.comm.open_reads(&self.arena)?;
        *self.phase() = Phase::Reading(engine);
        Ok(cast)
    }

    /// Ends `engine`'s READ phase; nothing happens if it has none.
    pub fn close(&self, engine: u64) {
        let mut phase = self.phase();
        if *phase == Phase::Reading(engine) {
            self.comm.close_reads(&self.arena);
            *phase = Phase::Closed;
        }
    }

    /// Waits until every rank has closed what this one has: own shards may be written.
    pub fn wait_writable(&self) -> Result<()> {
        let closed = *self.phase() == Phase::Closed;
        if closed {
            self.comm.wait_writable(&self.arena)?;
            *self.phase() = Phase::Writable;
        }
        Ok(())
    }
}
