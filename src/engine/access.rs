//! Parameters and gradients as a host reaches them: full ones in an iteration, this rank's pieces at any time.

use super::{Engine, Locked, State};
use crate::device::Given;
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::gradients::Region;
use crate::module::ParamId;
use crate::plan::{ParamPlan, UnitId};
use crate::shards::ShardStore;

/// A parameter's piece on this rank.
#[derive(Clone, Copy, Debug)]
pub struct Shard {
    pub data: *mut f32,
    /// Null while there is no gradient.
    pub grad: *mut f32,
    /// Elements of each.
    pub len: usize,
}

/// A full gradient that a host has: the parameter's elements, of `dtype`, in its shape's order.
#[derive(Clone, Copy, Debug)]
pub struct FullGradient {
    pub param: ParamId,
    pub dtype: DType,
    /// On the device.
    pub data: *const u8,
}

impl Engine {
    /// The address of a full parameter in its compute dtype: in the unit buffer, or among the compute copies. An error
    /// while its unit is sharded.
    pub fn param_data(&self, param: ParamId) -> Result<*mut u8> {
        let p = self.param(param)?;
        self.lock()?.units[p.unit as usize].require_unsharded()?;
        if self.gpu.is_some() {
            return Ok(self.unit_buffer(p.unit).wrapping_add(self.offset_in_buffer(param)));
        }
        if p.compute != DType::F32 {
            return Ok(self
                .store(p.unit)
                .copy_at(self.plan().units[p.unit as usize].compute_offset + p.compute_offset));
        }
        let offset = self.plan().units[p.unit as usize].layout.offsets[p.index] * DType::F32.size();
        Ok(self.unit_buffer(p.unit).wrapping_add(offset))
    }

    /// The region for a parameter's full gradient. Counts as written. May wait for a slot.
    pub fn param_grad(&self, param: ParamId) -> Result<Region> {
        let (p, mut state) = self.may_get_gradient(param)?;
        state.gradients.region(self.plan(), p.unit, p.index, p.compute)
    }

    /// The same region, for an operator that is about to compute the gradient there: it does not count as written until
    /// `param_grad`. May wait for a slot.
    pub fn reserve_grad(&self, param: ParamId) -> Result<Region> {
        let (p, mut state) = self.may_get_gradient(param)?;
        state.gradients.reserve(self.plan(), p.unit, p.index, p.compute)
    }

    /// An error if a parameter can get no gradient now.
    fn may_get_gradient(&self, param: ParamId) -> Result<(&ParamPlan, Locked<'_>)> {
        let p = self.param(param)?;
        let state = self.lock()?;
        self.check_gets_gradient(&state, param)?;
        Ok((p, state))
    }

    fn check_gets_gradient(&self, state: &State, param: ParamId) -> Result<()> {
        let p = self.param(param)?;
        if !state.requires_grad[param as usize] {
            return Err(err!(InvalidState, "parameter \"{}\" does not require a gradient", p.fqn));
        }
        if !state.reading {
            return Err(err!(
                InvalidState,
                "parameter \"{}\" gets a gradient outside an iteration: no unit was unsharded since the last one ended",
                p.fqn
            ));
        }
        Ok(())
    }

    /// An error if a parameter's gradient cannot be of this type.
    fn check_gradient_dtype(&self, param: ParamId, dtype: DType) -> Result<()> {
        let p = self.param(param)?;
        if dtype != DType::F32 && dtype != p.compute {
            let (f32, compute) = (DType::F32, p.compute);
            let or = if compute == f32 { String::new() } else { format!(" or {compute}, which it is computed in") };
            return Err(err!(InvalidArgument, "the gradient of \"{}\" is {dtype}: it can be {f32}{or}", p.fqn));
        }
        Ok(())
    }

    /// Adds `grad` (the parameter's `numel` elements of `dtype`, in its shape's order) in float32 to what this backward has
    /// collected for it. `dtype` is float32 or the one that the parameter is computed in.
    ///
    /// # Safety
    /// `grad` must be readable for the parameter's elements, and aligned for them; on a GPU: its memory, on compute.
    pub unsafe fn accumulate_grad(&self, param: ParamId, dtype: DType, grad: *const u8) -> Result<()> {
        self.check_gradient_dtype(param, dtype)?;
        let (p, region) = {
            let (p, mut state) = self.may_get_gradient(param)?;
            (p, state.gradients.region(self.plan(), p.unit, p.index, dtype)?)
        };
        // SAFETY: the caller's promise.
        match unsafe { self.given(p, dtype, grad, region) } {
            // SAFETY: the region has room for the parameter, and no peer reads it before its unit is reduced.
            Some(given) => unsafe { self.device.accumulate(dtype, &[given]) },
            None => Ok(()),
        }
    }

    /// The same for several parameters, each once: nothing has changed if one of them cannot get its gradient. On a GPU one
    /// launch for each type that they have.
    ///
    /// # Safety
    /// Of each as [`Engine::accumulate_grad`].
    pub unsafe fn accumulate_grads(&self, grads: &[FullGradient]) -> Result<()> {
        grads.iter().try_for_each(|g| self.check_gradient_dtype(g.param, g.dtype))?;
        let mut params: Vec<ParamId> = grads.iter().map(|g| g.param).collect();
        params.sort_unstable();
        if let Some(twice) = params.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(err!(
                InvalidArgument,
                "two gradients of \"{}\" were given at once: give one after the other",
                self.param(twice[0])?.fqn
            ));
        }
        let mut state = self.lock()?;
        grads.iter().try_for_each(|g| self.check_gets_gradient(&state, g.param))?;
        let mut all: [(DType, Vec<Given>); 3] = [DType::F32, DType::BF16, DType::F16].map(|dtype| (dtype, Vec::new()));
        for g in grads {
            let p = self.param(g.param)?;
            let region = state.gradients.reserve(self.plan(), p.unit, p.index, g.dtype)?;
            // SAFETY: the caller's promise.
            let given = unsafe { self.given(p, g.dtype, g.data, region) };
            all.iter_mut().filter(|(dtype, _)| *dtype == g.dtype).for_each(|(_, of_dtype)| of_dtype.extend(given));
        }
        for (dtype, given) in all.iter().filter(|(_, given)| !given.is_empty()) {
            // SAFETY: as in `accumulate_grad`; regions do not overlap.
            unsafe { self.device.accumulate(*dtype, given) }?;
        }
        for g in grads {
            let p = self.param(g.param)?;
            // Counts from here on.
            state.gradients.region(self.plan(), p.unit, p.index, g.dtype)?;
        }
        Ok(())
    }

    /// What is left to do for a gradient that goes to `region`.
    ///
    /// # Safety
    /// As [`Engine::accumulate_grad`].
    unsafe fn given(&self, p: &ParamPlan, dtype: DType, grad: *const u8, region: Region) -> Option<Given> {
        let len = self.plan().units[p.unit as usize].layout.numels[p.index];
        match region.dtype {
            _ if len == 0 => None,
            DType::F32 => Some(Given { from: grad, to: region.data.cast(), len, add: region.held }),
            // As it is, and the first: on the CPU only.
            _ => {
                // SAFETY: the region has room for the parameter; `grad` is the caller's promise.
                unsafe { std::ptr::copy_nonoverlapping(grad, region.data, len * dtype.size()) };
                None
            }
        }
    }

    /// This rank's piece of a parameter and of its gradient.
    pub fn shard(&self, param: ParamId) -> Result<Shard> {
        let p = self.param(param)?;
        let holds = self.store(p.unit).grads.holds(p.store_param);
        let grad = if holds { self.shard_grad(p) } else { std::ptr::null_mut() };
        Ok(Shard { data: self.shard_data(param as usize), grad, len: p.piece.len })
    }

    /// Forgets a parameter's gradient shard; the next reduction overwrites it. Local.
    pub fn clear_grad(&self, param: ParamId) -> Result<()> {
        let p = self.param(param)?;
        let _one_at_a_time = self.lock()?;
        self.store(p.unit).grads.clear(p.store_param);
        Ok(())
    }

    /// Forgets all gradients, also those that backwards without reduction have left. Local.
    pub fn zero_grad(&self) -> Result<()> {
        let mut state = self.lock()?;
        state.gradients.discard_kept();
        state.gradients.take_reduced(self.plan());
        self.plan().params.iter().for_each(|p| self.store(p.unit).grads.clear(p.store_param));
        Ok(())
    }

    pub(super) fn store(&self, unit: UnitId) -> &ShardStore {
        &self.model.stores[self.plan().units[unit as usize].store]
    }

    pub(super) fn unit_buffer(&self, unit: UnitId) -> *mut u8 {
        if let Some(gpu) = &self.gpu {
            return gpu.unit_buffer(unit);
        }
        match &self.plan().units[unit as usize] {
            u if u.bytes() == 0 => std::ptr::null_mut(),
            u => self.store(unit).arena.base.wrapping_add(u.arena_offset),
        }
    }

    pub(super) fn shard_data(&self, param: usize) -> *mut f32 {
        let p = &self.plan().params[param];
        let offset = self.plan().units[p.unit as usize].arena_offset + p.piece.unit_offset * DType::F32.size();
        self.store(p.unit).master_at(self.place_in_shards(p), offset)
    }

    /// The first float of a parameter's piece among this rank's shards.
    fn place_in_shards(&self, p: &ParamPlan) -> usize {
        self.plan().units[p.unit as usize].grad_offset + self.place_in_shard(p)
    }

    /// Where a parameter's gradient shard is.
    pub(super) fn shard_grad(&self, p: &ParamPlan) -> *mut f32 {
        self.store(p.unit).grads.base(p.store_param).wrapping_add(self.place_in_shard(p))
    }

    /// The first float of a parameter's piece in this rank's shard of its unit.
    fn place_in_shard(&self, p: &ParamPlan) -> usize {
        p.piece.unit_offset - self.plan().units[p.unit as usize].layout.shard(self.comm().rank()).start
    }
}
