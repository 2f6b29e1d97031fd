//! An engine on a GPU: what it is made of, and how its units come together there.
//!
//! The engine's own communicator is on the host: it agrees on models and phases, and carries what is small. Unit buffers and
//! gradients are a [`Pipeline`]'s matter, on the streams and NCCL communicators of [`NcclQueues`]; a second communicator on
//! the host, split off the first, compares what is launched there, and a third one what is launched over replicas. Masters, gradient shards and optimizer state lie on the
//! GPU, or in pinned host memory.

use super::{Engine, Group, ReplicaCounters, State};
use crate::agree;
use crate::comm::nccl::{
    Comms, FixedMemory, Nccl, NcclComm, NcclConfig, NcclPair, NcclQueues, Plane, Replicas, Shards, UniqueId, UnitShards,
};
use crate::comm::{Check, Communicator, Kind, UnitName};
use crate::config::{CudaConfig, EngineConfig};
use crate::device::cuda::kernels::Kernels;
use crate::device::cuda::{Compute, Context, Cuda, Source, Stream};
use crate::device::Home;
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use crate::gradients::queued::{QueuedSlots, SharedQueues};
use crate::mesh::Mesh;
use crate::module::{ModuleTree, ParamId};
use crate::pipeline::{compute_dtypes, Limits, Pipeline, UnitBytes};
use crate::plan::{Plan, UnitId};
use crate::schedule::Schedule;
use crate::shards::ShardStore;
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
    /// Of the pool: what NCCL's communicators know.
    pub registered_bytes: u64,
}

/// The GPU that `config` asks for; None: the CPU. Collective: what one rank lacks is the error of all.
pub(super) fn open(tree: &ModuleTree, config: &EngineConfig, world: &dyn Communicator) -> Result<Option<Opened>> {
    let opened = match &config.cuda {
        None => refuse_device_memory(tree, None).and_then(|()| check_adopted(tree, None, false)).map(|()| None),
        Some(cuda) => open_here(tree, config, cuda, world.world_size()).map(Some),
    };
    agree::on_result(opened.as_ref().map(|_| 0).map_err(Error::clone), world)?;
    opened
}

fn open_here(tree: &ModuleTree, config: &EngineConfig, cuda: &CudaConfig, world: usize) -> Result<Opened> {
    check_adopted(tree, Some(cuda.device), config.cpu_offload)?;
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

/// An error that names a model that the tree has adopted and whose shards lie elsewhere than the engine's.
fn check_adopted(tree: &ModuleTree, gpu: Option<usize>, offload: bool) -> Result<()> {
    let place = |gpu: Option<usize>| gpu.map_or("the CPU".to_string(), |gpu| format!("GPU {gpu}"));
    for model in tree.adopted() {
        for store in &model.stores {
            if store.gpu() != gpu {
                let (there, here) = (place(store.gpu()), place(gpu));
                return Err(err!(
                    Unsupported,
                    "the {model:?} that was added computes on {there}, and the engine on {here}: both must be the same"
                ));
            }
            if gpu.is_some() && store.offloads() != offload {
                return Err(err!(
                    Unsupported,
                    "the {model:?} that was added and the engine on GPU {} differ in cpu_offload: shards of one engine lie \
                     on the GPU, or all in host memory",
                    gpu.unwrap_or_default()
                ));
            }
        }
    }
    Ok(())
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
    /// Makes communicators and memory. Collective over the mesh; `stores` are the plan's.
    pub fn start(
        self,
        plan: &Plan,
        config: &EngineConfig,
        mesh: &Arc<Mesh>,
        stores: &[Arc<ShardStore>],
    ) -> Result<(Gpu, QueuedSlots)> {
        let cuda = config.cuda.clone().unwrap_or_default();
        let world = mesh.world.as_ref();
        let names: Vec<_> = (0..plan.units.len() as UnitId).map(|u| plan.unit_name(u)).collect();
        let plane = |host: &Arc<dyn Communicator>, place| -> Result<Plane> {
            let several = host.world_size() > 1;
            let control = if several { host.split(0, host.rank() as i32)? } else { host.clone() };
            Ok(Plane { first_unit: control.name_units(&names), control, host: host.clone(), place })
        };
        let group = plane(&mesh.shard, mesh.shard_place())?;
        let replicas = mesh.replicate.as_ref().map(|r| plane(r, mesh.replicas_place())).transpose()?;
        let units = UnitBytes::of(plan);
        let limits = Limits::of_engine(&units, config);
        let (pair, replicas, fixed) = match self.nccl {
            None => (None, None, None),
            Some(nccl) => {
                let joined = self.join(nccl, &cuda, mesh);
                agree::on_result(joined.as_ref().map(|_| 0).map_err(Error::clone), world)?;
                let ((pair, over), lent) = (joined?, cuda.allocator.is_some());
                let fixed = match &pair {
                    Some(pair) => FixedMemory::new(nccl, cuda.registration, lent, &pair.gather, &limits, world)?,
                    None => None,
                };
                (pair, replicas.zip(over).map(|(plane, nccl)| Replicas { plane, nccl }), fixed)
            }
        };
        let made = Pipeline::new(units.clone(), &limits).and_then(|pipeline| {
            let of_unit = |u: &crate::plan::UnitPlan| UnitShards {
                masters: stores[u.store].master_at(u.grad_offset, 0) as u64,
                grads: stores[u.store].grads.fixed().wrapping_add(u.grad_offset) as u64,
            };
            let places: Vec<UnitShards> = plan.units.iter().map(of_unit).collect();
            let shards = Shards { units: &places, on_host: config.cpu_offload };
            let comms = Comms { plane: group, nccl: pair, replicas, groups: Vec::new() };
            // SAFETY: the engine keeps the stores as long as the queues; it writes masters and gradient shards as they ask.
            let queues =
                unsafe { NcclQueues::new(plan, &limits, &shards, &self.kernels, &self.compute, comms, fixed) }?;
            Ok(SharedQueues::new(pipeline, queues))
        });
        agree::on_result(made.as_ref().map(|_| 0).map_err(Error::clone), world)?;
        let queues = made?;
        let slots = QueuedSlots::new(plan, queues.clone(), mesh.clone(), stores, config.cpu_offload);
        let (ordinal, compute, prefetch) = (self.ordinal, self.compute, cuda.prefetch);
        Ok((Gpu { ordinal, compute, queues, prefetch, units, limits }, slots))
    }

    /// NCCL's communicators, of the shard group and of the replicas, by an id that the host gave or rank 0 makes. Collective
    /// over the mesh.
    fn join(
        &self,
        nccl: &'static Nccl,
        cuda: &CudaConfig,
        mesh: &Mesh,
    ) -> Result<(Option<NcclPair>, Option<Arc<NcclComm>>)> {
        let world = mesh.world.as_ref();
        let id = match cuda.unique_id {
            Some(id) => UniqueId::from_bytes(&id)?,
            None => {
                let made = if world.rank() == 0 { UniqueId::new(nccl).map(|id| id.to_bytes()) } else { Ok([0; 128]) };
                agree::on_result(made.as_ref().map(|_| 0).map_err(Error::clone), world)?;
                let mut id = made?;
                world.broadcast(&mut id, DType::U8, 0)?;
                UniqueId::from_bytes(&id)?
            }
        };
        let config = NcclConfig { rank: world.rank(), world_size: world.world_size(), timeout: cuda.timeout };
        let all = NcclComm::new(nccl, &self.compute.context(), &id, config)?;
        // As the mesh has made the host's: the ranks of a color, in their order.
        let part =
            |color: usize, of: &dyn Communicator| all.split(color as u32, of.rank() as i32, of.rank(), of.world_size());
        let (shard, row) = (mesh.shard.as_ref(), mesh.replica());
        let Some(replicate) = &mesh.replicate else {
            let reduce = part(0, shard)?;
            return Ok((Some(NcclPair { gather: all, reduce }), None));
        };
        if shard.world_size() == 1 {
            return Ok((None, Some(all)));
        }
        let pair = NcclPair { gather: part(row, shard)?, reduce: part(row, shard)? };
        Ok((Some(pair), Some(part(shard.rank(), replicate.as_ref())?)))
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

    /// Whether reductions from here on are averaged over the replicas.
    pub fn set_averaging(&self, averaging: bool) {
        self.queues.lock().averaging = averaging;
    }

    /// All-reduces over the replicas so far.
    pub fn averages(&self) -> ReplicaCounters {
        let (all_reduces, all_reduce_bytes) = self.queues.lock().queues.averages();
        ReplicaCounters { all_reduces, all_reduce_bytes }
    }

    /// Makes a smaller group of the ranks of `host`, which are all that give this color. Collective over the shard group.
    pub fn add_group(&self, color: u32, host: &Arc<dyn Communicator>, names: &[UnitName], place: String) -> Result<()> {
        let control = host.split(0, host.rank() as i32)?;
        let first_unit = control.name_units(names);
        let plane = Plane { control, first_unit, host: host.clone(), place: Some(place) };
        self.queues.run(|_, queues| queues.add_group(color, plane))
    }

    /// Lets the buffers of resharded units go, and what was kept of them for `groups` and is not needed any more.
    pub fn release(&self, units: &[Unit], groups: &[Group]) -> Result<()> {
        self.queues.run(|pipeline, queues| {
            let sharded = |u: &UnitId| units[*u as usize].state == UnitState::Sharded;
            let resharded: Vec<UnitId> = pipeline.unsharded().filter(sharded).collect();
            for unit in resharded {
                match units[unit as usize].group {
                    Some(group) => pipeline.reshard_to(queues, unit, group, groups[group].comm.world_size())?,
                    None => pipeline.reshard(queues, unit)?,
                }
            }
            // Without groups nothing is kept.
            let units = units.iter().filter(|_| !groups.is_empty()).enumerate();
            let mut left = units.filter(|(_, unit)| unit.group.is_none());
            left.try_for_each(|(unit, _)| pipeline.forget_part(queues, unit as UnitId))
        })
    }

    /// Masters may be written: by what compute is given from here on or, in host memory, by the host.
    pub fn begin_write(&self, units: &[Unit], groups: &[Group], on_host: bool) -> Result<()> {
        self.release(units, groups)?;
        self.queues.run(|pipeline, queues| {
            pipeline.begin_write(queues)?;
            match on_host {
                true => queues.synchronize(),
                false => Ok(()),
            }
        })
    }

    /// An iteration begins: another engine that shares the stores may have written them since the last one.
    pub fn begin_read(&self, units: &[Unit], groups: &[Group]) -> Result<()> {
        self.begin_write(units, groups, false)
    }

    /// It ends: what is computed from here on may write the shards, of another engine that shares them, too.
    pub fn end_read(&self) {
        // What fails here has broken the queues: the next call says so.
        let _ = self.queues.run(|pipeline, queues| pipeline.wait_for_gathers(queues));
    }

    /// The engine goes: what compute is given from here on comes after all of its work.
    pub fn leave(&self) {
        self.queues.lock().queues.lead_to_compute();
    }

    /// Waits until NCCL is done with what it was given, with its deadline: what waits for the GPU then waits for no rank.
    pub fn settle(&self) -> Result<()> {
        self.queues.run(|_, queues| queues.comms.finish())
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
        let (before, among, after) = gpu.queues.run(|pipeline, queues| {
            let before = gathers(queues);
            let among: Vec<_> = std::iter::once(&unit).chain(next).map(|u| pipeline.group(*u)).collect();
            queues.set_gathering(kind, check);
            pipeline.unshard(queues, unit, next)?;
            Ok((before, among, gathers(queues)))
        })?;
        for (i, gathered) in std::iter::once(unit).chain(next.iter().copied()).enumerate() {
            // A unit may be foretold twice.
            let first = i == 0 || gathered != unit && !next[..i - 1].contains(&gathered);
            let count = if first { after[i] - before[i] } else { 0 };
            let bytes = gpu.units[gathered as usize].buffer * count as usize;
            let ranks = among[i].map_or(self.comm(), |group| &state.groups[group].comm).world_size();
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
