//! A pipeline's queues on a GPU: three streams, an event for each of the pipeline's, and a communicator for each kind
//! of collective.
//!
//! A unit buffer is the unit's layout, once in each type that one of its parameters is computed in; this rank's shard
//! is copied or rounded into its place there, and NCCL fills the rest. A slot is the layout in float32, and behind that
//! in the type that it is reduced in if that is another; the mean is written or added to the gradient shard, which is
//! float32.
//!
//! A host communicator of the same ranks is the control plane: each collective is announced there before it is
//! launched, so that ranks that launch different ones get an error that names both. The error of one communicator
//! breaks the others, on every rank that polls.

use super::comm::NcclComm;
use super::types::{Part, Reduction};
use super::watch::What;
use crate::comm::{Check, Communicator, Kind, Tag};
use crate::device::cuda::kernels::{Kernels, Piece};
use crate::device::cuda::{Context, DeviceMemory, Event as GpuEvent, Priority, Source, Stream};
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use crate::pipeline::{compute_dtypes, Event, Limits, Queue, Queues};
use crate::plan::{Plan, UnitId};
use cudarc::driver::sys::CUdeviceptr;
use std::collections::HashMap;
use std::sync::Arc;

/// A unit's shards on this rank, and what messages call its collectives.
struct Unit {
    gather: What,
    reduce: What,
    /// This rank's masters and gradient shard: `shard_len` floats each.
    masters: CUdeviceptr,
    grads: CUdeviceptr,
    shard_len: usize,
    /// Elements of the layout: all ranks' shards.
    len: usize,
    dtypes: Vec<DType>,
    reduce_dtype: DType,
    /// Add the mean to the gradient shard instead of overwriting it.
    accumulate: bool,
}

/// Where this rank's shards of a unit are: addresses of as many floats as a shard has.
#[derive(Clone, Copy, Debug)]
pub struct UnitShards {
    pub masters: CUdeviceptr,
    pub grads: CUdeviceptr,
}

/// See the module's text.
pub struct NcclQueues {
    context: Arc<Context>,
    kernels: Arc<Kernels>,
    gather_comm: Arc<NcclComm>,
    reduce_comm: Arc<NcclComm>,
    streams: [Arc<Stream>; 3],
    events: HashMap<Event, GpuEvent>,
    units: Vec<Unit>,
    buffers: Vec<DeviceMemory>,
    slots: Vec<DeviceMemory>,
    control: Arc<dyn Communicator>,
    /// The control plane's number of unit 0.
    first_unit: u32,
    check: Check,
}

/// The communicators of the same ranks that queues work with.
pub struct Comms {
    /// On the host; no engine's, since its order of collectives is the queues' own.
    pub control: Arc<dyn Communicator>,
    /// The control plane's number of the plan's unit 0, of [`Communicator::name_units`].
    pub first_unit: u32,
    pub gather: Arc<NcclComm>,
    pub reduce: Arc<NcclComm>,
}

impl NcclQueues {
    /// Takes the memory that `limits` says from `source`, for work beside `compute`, the host's stream. `comms` are of
    /// the plan's ranks. Local. Until [`NcclQueues::set_check`] says otherwise every collective waits for all ranks to
    /// announce it.
    ///
    /// # Safety
    /// `shards` are as many as the plan's units, and their memory is there as long as the result. The host writes
    /// masters only between a pipeline's `begin_write` and its next unshard, and gradient shards never between a
    /// reduction and the end of its backward, both in the order of `compute`.
    pub unsafe fn new(
        plan: &Plan,
        limits: &Limits,
        shards: &[UnitShards],
        kernels: &Arc<Kernels>,
        source: &Source,
        compute: &Arc<Stream>,
        comms: Comms,
    ) -> Result<NcclQueues> {
        if shards.len() != plan.units.len() {
            return Err(err!(
                InvalidArgument,
                "shards of {} units were given, there are {}",
                shards.len(),
                plan.units.len()
            ));
        }
        let context = compute.context().clone();
        let stream = || Stream::new(&context, Priority::Highest);
        let streams = [compute.clone(), stream()?, stream()?];
        let memory = |sizes: &[usize], what: &str| -> Result<Vec<DeviceMemory>> {
            // In the order of compute, as what it replaces is given back.
            sizes.iter().map(|bytes| DeviceMemory::new(source, compute, *bytes, what)).collect()
        };
        let units = plan.units.iter().zip(shards).enumerate().map(|(u, (unit, shards))| Unit {
            gather: What::of_unit(Kind::AllGather, unit.label()),
            reduce: What::of_unit(Kind::ReduceScatter, unit.label()),
            masters: shards.masters,
            grads: shards.grads,
            shard_len: unit.layout.shard_len,
            len: unit.layout.len,
            dtypes: compute_dtypes(plan, u as UnitId),
            reduce_dtype: unit.reduce_dtype,
            accumulate: false,
        });
        let world = (comms.control.rank(), comms.control.world_size());
        for comm in [&comms.gather, &comms.reduce] {
            if (comm.rank(), comm.world_size()) != world {
                return Err(err!(
                    InvalidArgument,
                    "{comm:?} is not of the control plane's ranks: rank {} of {}",
                    world.0,
                    world.1
                ));
            }
        }
        let mut queues = NcclQueues {
            kernels: kernels.clone(),
            gather_comm: comms.gather,
            reduce_comm: comms.reduce,
            control: comms.control,
            first_unit: comms.first_unit,
            check: Check::Together,
            streams,
            events: HashMap::new(),
            units: units.collect(),
            buffers: memory(&limits.unit_buffers, "a unit buffer")?,
            slots: memory(&limits.gradient_slots, "a gradient slot")?,
            context,
        };
        // The other queues begin after the memory is there.
        queues.record(Event::ShardsWritten, Queue::Compute)?;
        queues.wait(Queue::Gather, Event::ShardsWritten)?;
        queues.wait(Queue::Reduce, Event::ShardsWritten)?;
        Ok(queues)
    }

    /// Where the layout of `unit` begins in unit buffer `buffer`, in this type; None if no parameter of it is computed
    /// in that.
    pub fn in_buffer(&self, unit: UnitId, buffer: usize, dtype: DType) -> Option<CUdeviceptr> {
        self.parts(unit, buffer).find(|part| part.dtype == dtype).map(|part| part.data)
    }

    /// The layout's floats in gradient slot `slot`.
    pub fn in_slot(&self, slot: usize) -> CUdeviceptr {
        self.slots[slot].address()
    }

    /// Whether the next means of `unit` are added to its gradient shard instead of overwriting it.
    pub fn set_accumulate(&mut self, unit: UnitId, accumulate: bool) {
        self.units[unit as usize].accumulate = accumulate;
    }

    /// How collectives are compared from here on: the same on every rank. Local.
    pub fn set_check(&mut self, check: Check) {
        self.check = check;
    }

    /// Looks for failures of peers and for what hangs, without waiting; whether all collectives are done. An error has
    /// broken all three communicators.
    pub fn poll(&self) -> Result<bool> {
        if let Some(e) = self.control.async_error() {
            return Err(self.broken(e));
        }
        let gathered = self.gather_comm.poll().map_err(|e| self.broken(e))?;
        Ok(gathered & self.reduce_comm.poll().map_err(|e| self.broken(e))?)
    }

    /// Waits until all collectives are done, with NCCL's deadline for each.
    pub fn finish(&self) -> Result<()> {
        while !self.poll()? {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
        Ok(())
    }

    /// Breaks all communicators, so that no rank waits for this one.
    fn broken(&self, error: Error) -> Error {
        // NCCL's kernels first: they would wait on the GPU.
        self.gather_comm.abort(&error.message);
        self.reduce_comm.abort(&error.message);
        if self.control.async_error().is_none() {
            self.control.abort(&error.message);
        }
        error
    }

    /// Says on the control plane what is launched next.
    fn announce(&self, kind: Kind, unit: UnitId, parts: &[Part]) -> Result<()> {
        let bytes = parts.iter().map(|p| (p.shard_len * p.dtype.size()) as u64).sum::<u64>();
        let bytes = bytes * self.control.world_size() as u64;
        let dtype = parts.first().map_or(DType::F32, |p| p.dtype);
        let tag = Tag { kind, unit: self.first_unit + unit, dtype, bytes };
        self.control.announce(tag, self.check).map_err(|e| self.broken(e))
    }

    /// The unit's layout in each of its types, one behind the other.
    fn parts(&self, unit: UnitId, buffer: usize) -> impl Iterator<Item = Part> + '_ {
        let (unit, mut data) = (&self.units[unit as usize], self.buffers[buffer].address());
        unit.dtypes.iter().map(move |dtype| {
            let part = Part { data, shard_len: unit.shard_len, dtype: *dtype };
            data += (unit.len * dtype.size()) as u64;
            part
        })
    }

    fn stream(&self, queue: Queue) -> &Arc<Stream> {
        &self.streams[queue as usize]
    }
}

impl Queues for NcclQueues {
    fn all_gather(&mut self, unit: UnitId, buffer: usize) -> Result<()> {
        let (u, stream) = (&self.units[unit as usize], self.stream(Queue::Gather));
        let parts: Vec<Part> = self.parts(unit, buffer).collect();
        self.announce(Kind::AllGather, unit, &parts)?;
        let rank = self.gather_comm.rank();
        for part in &parts {
            let to = part.data + (rank * u.shard_len * part.dtype.size()) as u64;
            // SAFETY: the pipeline lets nobody else use the buffer meanwhile, and the masters are read only; both have
            // room for a shard.
            unsafe {
                match part.dtype {
                    DType::F32 => stream.copy_on_device(u.masters, to, u.shard_len * DType::F32.size())?,
                    dtype => {
                        let piece = Piece { from: u.masters, to, len: u.shard_len as u64, add: 0 };
                        self.kernels.cast(stream, DType::F32, dtype, &[piece])?;
                    }
                }
            }
        }
        // SAFETY: as above.
        unsafe { self.gather_comm.all_gather(&u.gather, &parts, stream) }.map_err(|e| self.broken(e))
    }

    fn reduce_scatter(&mut self, unit: UnitId, slot: usize) -> Result<()> {
        let (u, stream) = (&self.units[unit as usize], self.stream(Queue::Reduce));
        let full = self.slots[slot].address();
        let behind = full + (u.len * DType::F32.size()) as u64;
        let data = if u.reduce_dtype == DType::F32 { full } else { behind };
        let part = Part { data, shard_len: u.shard_len, dtype: u.reduce_dtype };
        self.announce(Kind::ReduceScatter, unit, &[part])?;
        let own = data + (self.reduce_comm.rank() * u.shard_len * u.reduce_dtype.size()) as u64;
        let mean = Piece { from: own, to: u.grads, len: u.shard_len as u64, add: u.accumulate.into() };
        // SAFETY: the pipeline lets nobody else use the slot meanwhile, and nobody else writes gradient shards; both
        // have room.
        unsafe {
            if u.reduce_dtype != DType::F32 {
                let piece = Piece { from: full, to: behind, len: u.len as u64, add: 0 };
                self.kernels.cast(stream, DType::F32, u.reduce_dtype, &[piece])?;
            }
            let reduced = self.reduce_comm.reduce_scatter(&u.reduce, part, Reduction::Mean, stream);
            reduced.map_err(|e| self.broken(e))?;
            self.kernels.copy_in(stream, u.reduce_dtype, &[mean])
        }
    }

    fn record(&mut self, event: Event, queue: Queue) -> Result<()> {
        if !self.events.contains_key(&event) {
            self.events.insert(event, GpuEvent::new(&self.context)?);
        }
        self.events[&event].record(self.stream(queue))
    }

    fn wait(&mut self, queue: Queue, event: Event) -> Result<()> {
        match self.events.get(&event) {
            Some(event) => self.stream(queue).wait(event),
            None => Err(err!(InvalidState, "{event:?} is waited for and was never recorded")),
        }
    }
}

impl Drop for NcclQueues {
    /// The memory goes back in the order of compute, so that comes after the other queues' work. A device that fails
    /// now frees it all the same.
    fn drop(&mut self) {
        for queue in [Queue::Gather, Queue::Reduce] {
            let _ =
                self.record(Event::ShardsWritten, queue).and_then(|()| self.wait(Queue::Compute, Event::ShardsWritten));
        }
    }
}
