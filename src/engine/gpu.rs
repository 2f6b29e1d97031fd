//! An engine on a GPU: what it is made of, and how its units come together there.
//!
//! The engine's own communicator is on the host: it agrees on models and phases, and carries what is small. Unit buffers and
//! gradients are a [`Pipeline`]'s matter, on the streams and NCCL communicators of [`NcclQueues`]; a second communicator on
//! the host, split off the first, compares what is launched there. Masters, gradient shards and optimizer state lie on the
//! GPU, or in pinned host memory.

use super::{Engine, State};
use crate::agree;
use crate::comm::nccl::{
    Comms, FixedMemory, Nccl, NcclComm, NcclConfig, NcclPair, NcclQueues, Shards, UniqueId, UnitShards,
};
use crate::comm::{Check, Communicator, Kind};
use crate::config::{CudaConfig, EngineConfig, Strategy};
use crate::device::cuda::kernels::Kernels;
use crate::device::cuda::{Compute, Context, Cuda, Source, Stream};
use crate::device::Home;
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use crate::gradients::queued::{QueuedSlots, SharedQueues};
use crate::module::{ModuleTree, ParamId};
use crate::pipeline::{compute_dtypes, Limits, Pipeline, UnitBytes};
use crate::plan::{Plan, UnitId};
use crate::schedule::Schedule;
use crate::shards::{ShardStore, ShardedModel};
use crate::unit::{Unit, UnitState};
use std::ffi::c_void;
use std::sync::Arc;

/// What an engine has of its GPU.
pub(super) struct Gpu {
    /// The GPU's number.
    pub ordinal: usize,
    compute: Arc<Compute>,
    queues: SharedQueues,
    prefetch: usize,
    units: Vec<UnitBytes>,
    limits: Limits,
}

/// A GPU before the engine's memory is there.
pub(super) struct Opened {
    pub device: Arc<Cuda>,
    ordinal: usize,
    compute: Arc<Compute>,
    kernels: Arc<Kernels>,
    nccl: Option<&'static Nccl>,
}

/// What an engine has taken on its GPU and done there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaStats {
    pub pool_bytes: u64,
    pub pool_buffers: usize,
    /// Most unit buffers that held a unit at once.
    pub buffers_peak: usize,
    pub slot_bytes: u64,
    /// Device memory of the engine and its optimizers, now and at most.
    pub device_bytes: u64,
    pub device_bytes_peak: u64,
    pub evictions: u64,
    pub overflows: u64,
    /// Of the pool and the slots: those that NCCL's communicators know.
    pub registered_bytes: u64,
}

/// The GPU that `config` asks for; None: the CPU. Collective: what one rank lacks is the error of all.
pub(super) fn open(tree: &ModuleTree, config: &EngineConfig, world: &dyn Communicator) -> Result<Option<Opened>> {
    let opened = match &config.cuda {
        None => refuse_device_memory(tree, None)
            .and_then(|()| refuse_adopted(tree, |model| model.stores.iter().any(|s| !s.in_arena())))
            .map(|()| None),
        Some(cuda) => open_here(tree, config, cuda, world.world_size()).map(Some),
    };
    agree::on_result(opened.as_ref().map(|_| 0).map_err(Error::clone), world)?;
    opened
}

fn open_here(tree: &ModuleTree, config: &EngineConfig, cuda: &CudaConfig, world: usize) -> Result<Opened> {
    let replicas = match config.strategy {
        Strategy::HybridShard | Strategy::HybridShardGradOp => true,
        Strategy::NoShard => world > 1,
        Strategy::FullShard | Strategy::ShardGradOp => false,
    };
    if replicas {
        let name = config.strategy.name();
        return Err(err!(Unsupported, "strategy {name} has replicas, which engines on a GPU cannot have yet"));
    }
    refuse_adopted(tree, |_| true)?;
    refuse_device_memory(tree, Some(cuda.device))?;
    let context = Context::new(cuda.device)?;
    // SAFETY: the host's promise for the stream that it gives.
    let stream = unsafe { Stream::borrowed(&context, cuda.compute_stream as *mut c_void) }?;
    let source = match &cuda.allocator {
        Some(allocator) => Source::Host(allocator.clone()),
        None => Source::pool(&context)?,
    };
    let nccl = if world > 1 { Some(Nccl::get()?) } else { None };
    let kernels = Kernels::load(&context)?;
    let compute = Compute::new(&stream, source)?;
    let device = Arc::new(Cuda::new(&compute, &kernels));
    Ok(Opened { device, ordinal: cuda.device, compute, kernels, nccl })
}

/// An error that names a model that the tree has adopted and that is so.
fn refuse_adopted(tree: &ModuleTree, is: impl Fn(&ShardedModel) -> bool) -> Result<()> {
    match tree.adopted().iter().find(|model| is(model)) {
        None => Ok(()),
        Some(model) => Err(err!(
            Unsupported,
            "the {model:?} that was added is sharded already: models cannot be put together on a GPU yet"
        )),
    }
}

/// An error if a parameter's values lie on another device than `gpu` or the host.
fn refuse_device_memory(tree: &ModuleTree, gpu: Option<usize>) -> Result<()> {
    let elsewhere = tree.params().iter().find(|p| p.gpu.is_some() && p.gpu != gpu);
    match (elsewhere, gpu) {
        (None, _) => Ok(()),
        (Some(p), None) => Err(err!(
            InvalidArgument,
            "parameter \"{}\" lies on GPU {}, but the engine computes on the CPU",
            p.fqn,
            p.gpu.unwrap_or_default()
        )),
        (Some(p), Some(gpu)) => Err(err!(
            InvalidArgument,
            "parameter \"{}\" lies on GPU {}, but the engine computes on GPU {gpu}",
            p.fqn,
            p.gpu.unwrap_or_default()
        )),
    }
}

impl Opened {
    /// Makes communicators and memory. Collective over `comm`, the engine's; `stores` are the plan's.
    pub fn start(
        self,
        plan: &Plan,
        config: &EngineConfig,
        comm: &Arc<dyn Communicator>,
        stores: &[Arc<ShardStore>],
    ) -> Result<(Gpu, QueuedSlots)> {
        let cuda = config.cuda.clone().unwrap_or_default();
        let (rank, world) = (comm.rank(), comm.world_size());
        let control = if world > 1 { comm.split(0, rank as i32)? } else { comm.clone() };
        let names: Vec<_> = (0..plan.units.len() as UnitId).map(|u| plan.unit_name(u)).collect();
        let first_unit = control.name_units(&names);
        let units = UnitBytes::of(plan);
        let limits = Limits::of_engine(&units, config);
        let (nccl, fixed) = match self.nccl {
            None => (None, None),
            Some(nccl) => {
                let joined = self.join(nccl, &cuda, comm.as_ref());
                agree::on_result(joined.as_ref().map(|_| 0).map_err(Error::clone), comm.as_ref())?;
                let (pair, lent) = (joined?, cuda.allocator.is_some());
                let fixed = FixedMemory::new(nccl, cuda.registration, lent, &pair, &limits, comm.as_ref())?;
                (Some(pair), fixed)
            }
        };
        let made = Pipeline::new(units.clone(), &limits).and_then(|pipeline| {
            let of_unit = |u: &crate::plan::UnitPlan| UnitShards {
                masters: stores[u.store].master_at(u.grad_offset, 0) as u64,
                grads: stores[u.store].grads.as_ptr().wrapping_add(u.grad_offset) as u64,
            };
            let places: Vec<UnitShards> = plan.units.iter().map(of_unit).collect();
            let shards = Shards { units: &places, on_host: config.cpu_offload };
            let comms = Comms { control, first_unit, host: comm.clone(), nccl, fixed };
            // SAFETY: the engine keeps the stores as long as the queues; it writes masters and gradient shards as they ask.
            let queues = unsafe { NcclQueues::new(plan, &limits, &shards, &self.kernels, &self.compute, comms) }?;
            Ok(SharedQueues::new(pipeline, queues))
        });
        agree::on_result(made.as_ref().map(|_| 0).map_err(Error::clone), comm.as_ref())?;
        let queues = made?;
        let slots = QueuedSlots::new(plan, queues.clone(), comm.clone(), stores, config.cpu_offload);
        let (ordinal, compute, prefetch) = (self.ordinal, self.compute, cuda.prefetch);
        Ok((Gpu { ordinal, compute, queues, prefetch, units, limits }, slots))
    }

    /// NCCL's communicators, by an id that the host gave or rank 0 makes. Collective over `comm`.
    fn join(&self, nccl: &'static Nccl, cuda: &CudaConfig, comm: &dyn Communicator) -> Result<NcclPair> {
        let (rank, world_size) = (comm.rank(), comm.world_size());
        let id = match cuda.unique_id {
            Some(id) => UniqueId::from_bytes(&id)?,
            None => {
                let made = if rank == 0 { UniqueId::new(nccl).map(|id| id.to_bytes()) } else { Ok([0; 128]) };
                agree::on_result(made.as_ref().map(|_| 0).map_err(Error::clone), comm)?;
                let mut id = made?;
                comm.broadcast(&mut id, DType::U8, 0)?;
                UniqueId::from_bytes(&id)?
            }
        };
        let config = NcclConfig { rank, world_size, timeout: cuda.timeout };
        let gather = NcclComm::new(nccl, &self.compute.context(), &id, config)?;
        let reduce = gather.split(0, rank as i32, rank, world_size)?;
        Ok(NcclPair { gather, reduce })
    }
}

impl Gpu {
    /// Bytes of the fixed unit buffers.
    pub fn pool_bytes(&self) -> u64 {
        self.limits.pool_bytes() as u64
    }

    /// Bytes of the fixed gradient slots.
    pub fn slot_bytes(&self) -> u64 {
        self.limits.slot_bytes() as u64
    }

    /// Where the unit buffer of an unsharded unit begins; null for a unit without elements.
    pub fn unit_buffer(&self, unit: UnitId) -> *mut u8 {
        let plane = self.queues.lock();
        plane.pipeline.buffer(unit).map_or(std::ptr::null_mut(), |b| plane.queues.buffer(b) as *mut u8)
    }

    /// Lets the buffers of resharded units go.
    pub fn release(&self, units: &[Unit]) -> Result<()> {
        self.queues.run(|pipeline, queues| {
            let sharded = |u: &UnitId| units[*u as usize].state == UnitState::Sharded;
            let resharded: Vec<UnitId> = pipeline.unsharded().filter(sharded).collect();
            resharded.into_iter().try_for_each(|unit| pipeline.reshard(queues, unit))
        })
    }

    /// Masters may be written: by what compute is given from here on or, in host memory, by the host.
    pub fn begin_write(&self, units: &[Unit], on_host: bool) -> Result<()> {
        self.release(units)?;
        self.queues.run(|pipeline, queues| {
            pipeline.begin_write(queues)?;
            match on_host {
                true => queues.synchronize(),
                false => Ok(()),
            }
        })
    }

    /// The engine goes: what compute is given from here on comes after all of its work.
    pub fn leave(&self) {
        self.queues.lock().queues.lead_to_compute();
    }

    /// Waits until NCCL is done with what it was given, with its deadline: what waits for the GPU then waits for no rank.
    pub fn settle(&self) -> Result<()> {
        self.queues.run(|_, queues| queues.finish())
    }
}

impl Engine {
    /// Brings `unit` together, and gathers ahead what comes next if an order was given.
    pub(super) fn bring_on_gpu(&self, gpu: &Gpu, state: &mut State, unit: UnitId) -> Result<()> {
        let forward = state.order.in_forward();
        let next = state.schedule.as_mut().map_or(&[][..], |s| Schedule::upcoming(s, unit, forward, gpu.prefetch));
        let kind = if forward { Kind::ForwardAllGather } else { Kind::AllGather };
        // What moves is the same on every rank, whatever order_check says.
        let check = match state.order.check() {
            Check::Off => Check::Announce,
            check => check,
        };
        let gathers = |queues: &NcclQueues| -> Vec<u64> {
            std::iter::once(&unit).chain(next).map(|u| queues.gathers(*u)).collect()
        };
        let (before, after) = gpu.queues.run(|pipeline, queues| {
            let before = gathers(queues);
            queues.set_gathering(kind, check);
            pipeline.unshard(queues, unit, next)?;
            Ok((before, gathers(queues)))
        })?;
        let ranks = self.comm().world_size();
        for (i, gathered) in std::iter::once(unit).chain(next.iter().copied()).enumerate() {
            // A unit may be foretold twice.
            let first = i == 0 || gathered != unit && !next[..i - 1].contains(&gathered);
            let count = if first { after[i] - before[i] } else { 0 };
            let bytes = gpu.units[gathered as usize].buffer * count as usize;
            state.all_gathers += count;
            state.prefetches += if i > 0 { count } else { 0 };
            state.units[gathered as usize].all_gathers += count;
            state.all_gather_bytes += bytes as u64;
            state.all_gather_sent_bytes += (bytes * (ranks - 1)).div_ceil(ranks) as u64;
        }
        Ok(())
    }

    /// What the host launches from here on, it launches on `stream` (a CUstream): see include/fsdp.h. Local.
    ///
    /// # Safety
    /// It is a stream of the engine's GPU as long as the engine and its optimizers live.
    pub unsafe fn set_compute_stream(&self, stream: *mut c_void) -> Result<()> {
        let gpu =
            self.gpu.as_ref().ok_or_else(|| err!(Unsupported, "the engine computes on the CPU: it has no streams"))?;
        let _one_at_a_time = self.lock()?;
        // SAFETY: the caller's promise.
        unsafe { gpu.compute.switch(stream) }
    }

    /// The error that has broken the engine's communicators, seen without waiting. Local.
    pub fn poll(&self) -> Result<()> {
        let _one_at_a_time = self.lock()?;
        match &self.gpu {
            Some(gpu) => gpu.queues.poll(),
            None => self.world().async_error().map_or(Ok(()), Err),
        }
    }

    /// Waits until the GPU has done what it was given, with the deadline of its collectives. Local.
    pub fn synchronize(&self) -> Result<()> {
        let _one_at_a_time = self.lock()?;
        match &self.gpu {
            Some(gpu) => gpu.queues.run(|_, queues| queues.synchronize()),
            None => Ok(()),
        }
    }

    /// `Unsupported` for an engine on the CPU. Local.
    pub fn cuda_stats(&self) -> Result<CudaStats> {
        let gpu = self.gpu.as_ref().ok_or_else(|| err!(Unsupported, "the engine computes on the CPU"))?;
        let _one_at_a_time = self.lock()?;
        let (plane, usage) = (gpu.queues.lock(), gpu.compute.usage());
        let counts = plane.pipeline.counts();
        Ok(CudaStats {
            pool_bytes: gpu.pool_bytes(),
            pool_buffers: gpu.limits.unit_buffers.len(),
            buffers_peak: counts.buffers_peak,
            slot_bytes: gpu.slot_bytes(),
            device_bytes: usage.now,
            device_bytes_peak: usage.peak,
            evictions: counts.evictions,
            overflows: counts.overflows,
            registered_bytes: plane.queues.registered_bytes() as u64,
        })
    }

    /// The number of the GPU that the engine computes on; None: the CPU.
    pub fn gpu(&self) -> Option<usize> {
        self.gpu.as_ref().map(|gpu| gpu.ordinal)
    }

    /// Whether shards, gradient shards and optimizer state are memory of a GPU.
    pub(crate) fn shards_on_gpu(&self) -> bool {
        self.gpu.is_some() && self.home == Home::Device
    }

    /// Bytes at the address that `unshard` gives.
    pub fn buffer_bytes(&self, unit: UnitId) -> usize {
        match &self.gpu {
            Some(gpu) => gpu.units[unit as usize].buffer,
            None => self.plan().units[unit as usize].bytes(),
        }
    }

    /// Where a parameter's compute copy begins: on the CPU among those of its unit (0 without one); on a GPU the parameter
    /// itself, in bytes from the start of the unit buffer.
    pub fn offset_in_buffer(&self, param: ParamId) -> usize {
        let p = &self.plan().params[param as usize];
        if self.gpu.is_none() {
            return p.compute_offset;
        }
        let layout = &self.plan().units[p.unit as usize].layout;
        let before = compute_dtypes(self.plan(), p.unit).into_iter().take_while(|d| *d != p.compute);
        before.map(|d| layout.len * d.size()).sum::<usize>() + layout.offsets[p.index] * p.compute.size()
    }
}
