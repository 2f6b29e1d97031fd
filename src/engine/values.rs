//! Where a new engine's parameters get their values: what the host holds or initializers give, on every rank or (with
//! `sync_module_states`) on rank 0, which then broadcasts them.

use super::Engine;
use crate::agree;
use crate::comm::Communicator;
use crate::config::EngineConfig;
use crate::dtype::DType;
use crate::error::Result;
use crate::materialize::materialize;
use crate::module::{ModuleTree, ParamId};
use crate::precision;

/// Floats of a broadcast.
const CHUNK: usize = 1 << 20;
/// In place of a parameter's number: there are no more, or rank 0 has failed.
const END: u64 = u64::MAX;

impl Engine {
    /// Copies this rank's cut of every parameter that has not been sharded before. Returns the most bytes of full
    /// parameters that were in private memory at once. Collective.
    ///
    /// # Safety
    /// Every parameter's `data` must be null or readable for its `numel()` elements, and aligned for them.
    pub(super) unsafe fn take_values(&self, tree: &ModuleTree, config: &EngineConfig) -> Result<u64> {
        let world = self.world().as_ref();
        if !config.sync_module_states {
            let copy = &mut |p, dtype, data, len| {
                // SAFETY: the caller's promise.
                unsafe { self.copy_range(p, 0, dtype, data, len) }
            };
            // SAFETY: the caller's promise.
            let done = unsafe { self.each_value(tree, config, copy) };
            return agree::on_result(done, world);
        }
        let done = match world.rank() {
            0 => {
                // SAFETY: the caller's promise.
                let send = &mut |p, dtype, data, len| unsafe { self.send(p, dtype, data, len) };
                // SAFETY: the caller's promise.
                let done = unsafe { self.each_value(tree, config, send) };
                world.broadcast(&mut END.to_ne_bytes(), DType::I64, 0)?;
                done
            }
            _ => self.receive().map(|()| 0),
        };
        agree::on_result(done, world)
    }

    /// Widens what of `data`, the `len` elements (of `dtype`) of a parameter from `first` on, lies in this rank's shard.
    ///
    /// # Safety
    /// `data` must be readable for `len` elements of `dtype`, and aligned for them.
    unsafe fn copy_range(&self, param: ParamId, first: usize, dtype: DType, data: *const u8, len: usize) -> Result<()> {
        // SAFETY: the caller's promise; no rank reads this one's shard before it opens a READ phase.
        unsafe { self.copy_into_piece(param, first, dtype, data, len, self.shard_data(param as usize)) }
    }

    /// Widens what of `data` in host memory, the `len` elements (of `dtype`) of a parameter from `first` on, lies in this
    /// rank's piece, which is at `to`, where shards have their home.
    ///
    /// # Safety
    /// `data` must be readable for `len` elements of `dtype`, and aligned for them; `to` writable for the piece.
    pub(super) unsafe fn copy_into_piece(
        &self,
        param: ParamId,
        first: usize,
        dtype: DType,
        data: *const u8,
        len: usize,
        to: *mut f32,
    ) -> Result<()> {
        let piece = &self.plan().params[param as usize].piece;
        let start = piece.param_offset.max(first);
        let end = (piece.param_offset + piece.len).min(first + len);
        if start >= end {
            return Ok(());
        }
        // SAFETY: the range lies inside `data` and inside the piece.
        unsafe {
            let from = data.add((start - first) * dtype.size());
            self.settled_at_home()?.put(dtype, from, to.add(start - piece.param_offset), end - start)
        }
    }

    /// Calls `take` with every parameter's values in host memory: those with storage first, then the initialized ones.
    ///
    /// # Safety
    /// Every parameter's `data` must be null or readable for its `numel()` elements, and aligned for them.
    unsafe fn each_value(&self, tree: &ModuleTree, config: &EngineConfig, take: &mut Take<'_>) -> Result<u64> {
        for (p, param) in tree.params().iter().enumerate().filter(|(_, p)| !p.data.is_null()) {
            let Some(_) = param.gpu else {
                take(p as ParamId, param.dtype, param.data, param.numel())?;
                continue;
            };
            // Words, which are aligned for every type.
            let mut words = vec![0f32; (param.numel() * param.dtype.size()).div_ceil(4)];
            let bytes = &mut as_bytes(&mut words)[..param.numel() * param.dtype.size()];
            // SAFETY: the caller's promise; the parameter lies on the engine's GPU.
            unsafe { self.device.get(param.data, bytes) }?;
            take(p as ParamId, param.dtype, bytes.as_ptr(), param.numel())?;
        }
        materialize(tree, self.plan(), config.param_init.as_ref(), &mut |p, data| {
            let param = &tree.params()[p as usize];
            take(p, param.dtype, data, param.numel())
        })
    }

    /// Rank 0's part for one parameter: its number, then its values.
    ///
    /// # Safety
    /// `data` must be readable for `len` elements of `dtype`, and aligned for them.
    unsafe fn send(&self, param: ParamId, dtype: DType, data: *const u8, len: usize) -> Result<()> {
        self.world().broadcast(&mut u64::from(param).to_ne_bytes(), DType::I64, 0)?;
        self.broadcast_values(param, len, &mut |first, chunk| {
            // SAFETY: the caller's promise; the chunk is as long as it says.
            unsafe { precision::widen(dtype, data.add(first * dtype.size()), chunk.as_mut_ptr(), chunk.len()) };
            Ok(())
        })
    }

    /// The part of the other ranks, for all parameters.
    fn receive(&self) -> Result<()> {
        loop {
            let mut param = [0; 8];
            self.world().broadcast(&mut param, DType::I64, 0)?;
            let param = match u64::from_ne_bytes(param) {
                END => return Ok(()),
                param => param as ParamId,
            };
            let p = self.param(param)?;
            let len = self.plan().units[p.unit as usize].layout.numels[p.index];
            self.broadcast_values(param, len, &mut |_, _| Ok(()))?;
        }
    }

    /// Every rank's piece of a parameter of `len` elements gets rank 0's values.
    fn broadcast_values(&self, param: ParamId, len: usize, fill: &mut Fill<'_>) -> Result<()> {
        broadcast_floats(self.world().as_ref(), len, fill, &mut |first, chunk| {
            // SAFETY: as long as it says.
            unsafe { self.copy_range(param, first, DType::F32, chunk.as_ptr().cast(), chunk.len()) }
        })
    }
}

/// Fills floats from the element of this number on.
pub(super) type Fill<'a> = dyn FnMut(usize, &mut [f32]) -> Result<()> + 'a;

/// Rank 0's `len` floats on every rank, in chunks that bound the memory it takes: rank 0 fills each (`fill` gets its first
/// element's number), then every rank takes it. Collective.
pub(super) fn broadcast_floats(
    world: &dyn Communicator,
    len: usize,
    fill: &mut Fill<'_>,
    take: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let mut chunk = Vec::new();
    for first in (0..len).step_by(CHUNK) {
        chunk.resize(CHUNK.min(len - first), 0f32);
        if world.rank() == 0 {
            fill(first, &mut chunk)?;
        }
        world.broadcast(as_bytes(&mut chunk), DType::F32, 0)?;
        take(first, &chunk)?;
    }
    Ok(())
}

/// Takes a parameter's values: their type as registered, where they are, and how many.
type Take<'a> = dyn FnMut(ParamId, DType, *const u8, usize) -> Result<()> + 'a;

/// Floats as what a collective takes.
pub(super) fn as_bytes(floats: &mut [f32]) -> &mut [u8] {
    // SAFETY: floats may be seen, and written, as bytes.
    unsafe { std::slice::from_raw_parts_mut(floats.as_mut_ptr().cast(), size_of_val(floats)) }
}
