//! Full parameters outside of an iteration: a scope that holds them in memory of its own (PyTorch's summon_full_params), and
//! a stream of them, one unit at a time (a full state dict).
//!
//! Both run an iteration of their own without a backward. Values are the float32 masters, whatever the parameters are
//! computed in.

use super::values::broadcast_floats;
use super::Engine;
use crate::agree;
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use crate::memory::HostBuffer;
use crate::module::ParamId;
use crate::plan::{UnitId, UnitPlan};
use std::slice::{from_raw_parts, from_raw_parts_mut};
use std::sync::Arc;

/// What a scope holds and what becomes of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FullOptions {
    /// What was changed in the scope goes to the shards when it is closed.
    pub writeback: bool,
    /// Only rank 0 holds the full parameters; its changes are written back.
    pub rank0_only: bool,
    /// Gradients too.
    pub with_grads: bool,
}

/// The full parameters of some units in private memory of this rank. No iteration can begin while it is open.
pub struct FullParams {
    engine: Arc<Engine>,
    options: FullOptions,
    /// By unit of the engine; None for a unit that is not in the scope.
    units: Vec<Option<FullUnit>>,
    open: bool,
}

/// Unit buffers of this rank; without elements where another rank holds them.
struct FullUnit {
    values: HostBuffer,
    grads: Option<HostBuffer>,
}

impl FullParams {
    /// Gathers the parameters of `units` (all, if None). Collective: every rank passes the same.
    pub fn open(engine: Arc<Engine>, units: Option<&[UnitId]>, options: FullOptions) -> Result<FullParams> {
        let count = engine.plan().units.len() as UnitId;
        let units: Vec<UnitId> = units.map_or_else(|| (0..count).collect(), <[UnitId]>::to_vec);
        agree::on_lines(&[format!("{options:?}, units {units:?}")], |_| "full parameters", engine.world().as_ref())?;
        units.iter().try_for_each(|u| engine.unit(*u).map(drop))?;
        let begun = engine.set_summoned(true);
        let mine = begun.is_ok();
        if let Err(e) = agree::on_result(begun.map(|()| 0), engine.world().as_ref()) {
            if mine {
                engine.set_summoned(false)?;
            }
            return Err(e);
        }
        // From here on a failure ends the scope.
        let mut full = FullParams { options, units: (0..count).map(|_| None).collect(), open: true, engine };
        let gathered = units.iter().try_for_each(|unit| full.gather(*unit));
        let ended = full.engine.finish_forward();
        agree::on_result(gathered.and(ended).map(|()| 0), full.engine.world().as_ref())?;
        Ok(full)
    }

    fn holds(&self) -> bool {
        !self.options.rank0_only || self.engine.world().rank() == 0
    }

    fn gather(&mut self, unit: UnitId) -> Result<()> {
        let engine = &self.engine;
        let u = engine.unit(unit)?;
        let held = if self.holds() { u.layout.len } else { 0 };
        let buffer = |what: &str| HostBuffer::zeroed(held, &format!("the full {what} of unit \"{}\"", u.label()));
        let values = buffer("parameters")?;
        engine.with_masters(unit, |masters| {
            if held > 0 {
                // SAFETY: the masters can be read; the buffer is as long and nobody else's.
                unsafe { std::ptr::copy_nonoverlapping(masters, values.as_ptr(), held) };
            }
            Ok(())
        })?;
        let mut grads = None;
        if self.options.with_grads {
            let buffer = buffer("gradients")?;
            for p in u.params.iter().filter(|p| engine.has_grad(**p)) {
                let full = engine.gather_flat(*p, engine.shard(*p)?.grad)?;
                if held > 0 {
                    let at = u.layout.offsets[engine.param(*p)?.index];
                    // SAFETY: the parameter's place in the buffer, which is as long as the unit.
                    unsafe { from_raw_parts_mut(buffer.as_ptr().add(at), full.len()) }.copy_from_slice(&full);
                }
            }
            grads = Some(buffer);
        }
        self.units[unit as usize] = Some(FullUnit { values, grads });
        Ok(())
    }

    /// The engine whose parameters these are.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The full value of a parameter: its elements in row-major order, readable and writable until the scope is closed.
    /// None where only rank 0 holds it.
    pub fn data(&self, param: ParamId) -> Result<Option<*mut f32>> {
        self.at(param, |unit| Some(&unit.values))
    }

    /// The same of its gradient. None, too, if it has none or the scope is without gradients.
    pub fn grad(&self, param: ParamId) -> Result<Option<*mut f32>> {
        match self.engine.has_grad(param) {
            true => self.at(param, |unit| unit.grads.as_ref()),
            false => Ok(None),
        }
    }

    fn at(&self, param: ParamId, buffer: impl Fn(&FullUnit) -> Option<&HostBuffer>) -> Result<Option<*mut f32>> {
        let p = self.engine.param(param)?;
        let u = self.engine.unit(p.unit)?;
        if !self.open {
            return Err(err!(InvalidState, "parameter \"{}\": these full parameters were closed", p.fqn));
        }
        let unit = self.units[p.unit as usize].as_ref().ok_or_else(|| {
            err!(
                InvalidArgument,
                "parameter \"{}\" of unit \"{}\" is not among these full parameters",
                p.fqn,
                u.label()
            )
        })?;
        Ok(buffer(unit).filter(|_| self.holds()).map(|b| b.as_ptr().wrapping_add(u.layout.offsets[p.index])))
    }

    /// Ends the scope; with `writeback` each rank's shards take its values (rank 0's, if only that holds them), and gradient
    /// shards likewise. Collective with `writeback`, else local. Nothing happens the second time.
    pub fn close(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        self.engine.set_summoned(false)?;
        let written = match self.options.writeback {
            true => self.engine.begin_write().and_then(|()| self.write_back()),
            false => Ok(()),
        };
        self.units.iter_mut().for_each(|u| *u = None);
        written
    }

    fn write_back(&self) -> Result<()> {
        for (unit, full) in self.units.iter().enumerate().filter_map(|(u, full)| Some((u, full.as_ref()?))) {
            for p in &self.engine.plan().units[unit].params {
                let shard = self.engine.shard(*p)?;
                self.write_piece(*p, &full.values, shard.data)?;
                if let Some(grads) = full.grads.as_ref().filter(|_| self.engine.has_grad(*p)) {
                    self.write_piece(*p, grads, shard.grad)?;
                }
            }
        }
        Ok(())
    }

    /// Writes this rank's piece of a parameter to `to`, from its own buffer or rank 0's.
    fn write_piece(&self, param: ParamId, buffer: &HostBuffer, to: *mut f32) -> Result<()> {
        let p = self.engine.param(param)?;
        let u = self.engine.unit(p.unit)?;
        let numel = u.layout.numels[p.index];
        let from = buffer.as_ptr().wrapping_add(u.layout.offsets[p.index]);
        if !self.options.rank0_only {
            let from = from.wrapping_add(p.piece.param_offset).cast();
            // SAFETY: the piece lies in the parameter; `to` is this rank's shard of it, which may be written.
            return unsafe { self.engine.settled_at_home()?.put(DType::F32, from, to, p.piece.len) };
        }
        let fill = &mut |first: usize, chunk: &mut [f32]| {
            // SAFETY: rank 0 holds the whole parameter.
            chunk.copy_from_slice(unsafe { from_raw_parts(from.wrapping_add(first), chunk.len()) });
            Ok(())
        };
        broadcast_floats(self.engine.world().as_ref(), numel, fill, &mut |first, chunk| {
            // SAFETY: the chunk is as long as it says, `to` is this rank's shard, which may be written.
            unsafe { self.engine.copy_into_piece(param, first, DType::F32, chunk.as_ptr().cast(), chunk.len(), to) }
        })
    }
}

impl Drop for FullParams {
    /// Without writing back: other ranks may not be there.
    fn drop(&mut self) {
        if self.open {
            // The lock of an engine that failed inside; nothing is left to undo.
            let _ = self.engine.set_summoned(false);
        }
    }
}

impl Engine {
    /// Calls `take` with every parameter's full value, unit by unit, in the order of units and of registration within them;
    /// the values can be read during the call. With `rank0_only` on rank 0 only. Collective. An error of `take` on one rank is
    /// an error on every rank, after all have gone through.
    pub fn each_full_param(
        &self,
        rank0_only: bool,
        take: &mut dyn FnMut(ParamId, *const f32, usize) -> Result<()>,
    ) -> Result<()> {
        self.end_forward_for("full parameters cannot be gathered")?;
        let takes = !rank0_only || self.world().rank() == 0;
        let mut taken = Ok(());
        for unit in 0..self.plan().units.len() as UnitId {
            let u = &self.plan().units[unit as usize];
            self.with_masters(unit, |masters| {
                for p in u.params.iter().filter(|_| takes) {
                    let index = self.plan().params[*p as usize].index;
                    let data = masters.wrapping_add(u.layout.offsets[index]);
                    taken = taken.clone().and_then(|()| take(*p, data, u.layout.numels[index]));
                }
                Ok(())
            })?;
        }
        self.finish_forward()?;
        agree::on_result(taken.map(|()| 0), self.world().as_ref()).map(drop)
    }

    /// The full, flattened tensor that is sharded like parameter `param` and of which `piece` is this rank's piece (null: this
    /// rank's part is missing, which is an error on every rank). Collective over the shard group.
    pub fn gather_flat(&self, param: ParamId, piece: *const f32) -> Result<Vec<f32>> {
        let p = self.param(param)?;
        if piece.is_null() && p.piece.len > 0 {
            // Found out by the others: what this rank gives is too short.
            self.comm().exchange(&[])?;
            return Err(missing(&p.fqn));
        }
        let mut mine = vec![0; p.piece.len * size_of::<f32>()];
        if !mine.is_empty() {
            // SAFETY: the caller's piece is as long as the parameter's.
            unsafe { self.settled_at_home()?.get(piece.cast(), &mut mine) }?;
        }
        // Pieces of consecutive ranks are consecutive.
        let all = self.comm().exchange(&mine)?.concat();
        let numel = self.unit(p.unit)?.layout.numels[p.index];
        if all.len() != numel * size_of::<f32>() {
            return Err(missing(&p.fqn));
        }
        Ok(all.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().expect("four bytes"))).collect())
    }

    /// Calls `f` with a unit's float32 masters, of all ranks, in host memory. Collective over the shard group.
    fn with_masters(&self, unit: UnitId, f: impl FnOnce(*const f32) -> Result<()>) -> Result<()> {
        let u = &self.plan().units[unit as usize];
        if self.gpu.is_some() {
            return self.gathered_on_host(u).and_then(|masters| f(masters.as_ptr()));
        }
        let mut state = self.lock()?;
        let summoned = std::mem::take(&mut state.summoned);
        state.gathers.masters = true;
        let done = self.unshard_locked(&mut state, unit);
        state.gathers.masters = false;
        state.summoned = summoned;
        drop(state);
        done?;
        f(self.store(unit).arena.base.wrapping_add(u.arena_offset).cast())?;
        self.reshard(unit)
    }

    /// The masters of a unit that lie on GPUs, over the host's communicator.
    fn gathered_on_host(&self, u: &UnitPlan) -> Result<HostBuffer> {
        let all = HostBuffer::zeroed(u.layout.len, &format!("the full parameters of unit \"{}\"", u.label()))?;
        if u.layout.len == 0 {
            return Ok(all);
        }
        let mut own = vec![0; u.shard_bytes()];
        let masters = self.model.stores[u.store].master_at(u.grad_offset, 0);
        // SAFETY: this rank's shard has as many bytes, and the buffer is the unit's size and nobody else's.
        unsafe {
            self.settled_at_home()?.get(masters.cast(), &mut own)?;
            let all = std::slice::from_raw_parts_mut(all.as_ptr().cast::<u8>(), u.bytes());
            self.comm().all_gather_host(&own, all, DType::F32)?;
        }
        Ok(all)
    }

    pub(crate) fn has_grad(&self, param: ParamId) -> bool {
        let held = |p: &crate::plan::ParamPlan| self.store(p.unit).grads.holds(p.store_param);
        self.plan().params.get(param as usize).is_some_and(held)
    }

    /// Ends a forward that no backward followed; an error that begins with `doing` in a backward.
    fn end_forward_for(&self, doing: &str) -> Result<()> {
        self.end_forward_locked(&mut *self.lock()?, doing)
    }

    /// Opens or closes a scope of full parameters; an error if one is open already, or an iteration.
    fn set_summoned(&self, summoned: bool) -> Result<()> {
        let mut state = self.lock()?;
        if summoned {
            if state.summoned {
                return Err(err!(InvalidState, "full parameters are open already: close them first"));
            }
            self.end_forward_locked(&mut state, "full parameters cannot be opened")?;
        }
        state.summoned = summoned;
        Ok(())
    }
}

fn missing(fqn: &str) -> Error {
    err!(InvalidState, "a rank has no piece of what belongs to parameter \"{fqn}\", others have")
}
