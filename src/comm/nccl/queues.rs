//! A pipeline's queues on a GPU: three streams, an event for each of the pipeline's, and a communicator for each kind of collective.
//!
//! A unit buffer is the unit's layout, once in each type that one of its parameters is computed in; this rank's shard is copied or rounded
//! into its place there, and NCCL fills the rest. A slot is the layout in float32, and behind that in the type that it is reduced in if that
//! is another; the mean is written or added to the gradient shard, which is float32.

use super::comm::{NcclComm, Part, Reduction};
use super::watch::What;
use crate::comm::Kind;
use crate::device::cuda::kernels::{Kernels, Piece};
use crate::device::cuda::{Context, DeviceMemory, Event as GpuEvent, Priority, Source, Stream};
use crate::dtype::DType;
use crate::error::{err, Result};
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
}

impl NcclQueues {
    /// Takes the memory that `limits` says from `source`, for work beside `compute`, the host's stream. `comms` are two communicators of the
    /// plan's ranks: for all-gathers and for reduce-scatters. Local.
    ///
    /// # Safety
    /// `shards` are as many as the plan's units, and their memory is there as long as the result. The host writes masters only between a
    /// pipeline's `begin_write` and its next unshard, and gradient shards never between a reduction and the end of its backward, both in the
    /// order of `compute`.
    pub unsafe fn new(
        plan: &Plan,
        limits: &Limits,
        shards: &[UnitShards],
        kernels: &Arc<Kernels>,
        source: &Source,
        compute: &Arc<Stream>,
        comms: [Arc<NcclComm>; 2],
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
        let [gather_comm, reduce_comm] = comms;
        let mut queues = NcclQueues {
            kernels: kernels.clone(),
            gather_comm,
            reduce_comm,
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

    /// Where the layout of `unit` begins in unit buffer `buffer`, in this type; None if no parameter of it is computed in that.
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

    /// Looks for failures of peers and for what hangs, without waiting; whether all collectives are done.
    pub fn poll(&self) -> Result<bool> {
        Ok(self.gather_comm.poll()? & self.reduce_comm.poll()?)
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
        let rank = self.gather_comm.rank();
        for part in &parts {
            let to = part.data + (rank * u.shard_len * part.dtype.size()) as u64;
            // SAFETY: the pipeline lets nobody else use the buffer meanwhile, and the masters are read only; both have room for a shard.
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
        unsafe { self.gather_comm.all_gather(&u.gather, &parts, stream) }
    }

    fn reduce_scatter(&mut self, unit: UnitId, slot: usize) -> Result<()> {
        let (u, stream) = (&self.units[unit as usize], self.stream(Queue::Reduce));
        let full = self.slots[slot].address();
        let behind = full + (u.len * DType::F32.size()) as u64;
        let data = if u.reduce_dtype == DType::F32 { full } else { behind };
        let part = Part { data, shard_len: u.shard_len, dtype: u.reduce_dtype };
        let own = data + (self.reduce_comm.rank() * u.shard_len * u.reduce_dtype.size()) as u64;
        let mean = Piece { from: own, to: u.grads, len: u.shard_len as u64, add: u.accumulate.into() };
        // SAFETY: the pipeline lets nobody else use the slot meanwhile, and nobody else writes gradient shards; both have room.
        unsafe {
            if u.reduce_dtype != DType::F32 {
                let piece = Piece { from: full, to: behind, len: u.len as u64, add: 0 };
                self.kernels.cast(stream, DType::F32, u.reduce_dtype, &[piece])?;
            }
            self.reduce_comm.reduce_scatter(&u.reduce, part, Reduction::Mean, stream)?;
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
    /// The memory goes back in the order of compute, so that comes after the other queues' work. A device that fails now frees it all the same.
    fn drop(&mut self) {
        for queue in [Queue::Gather, Queue::Reduce] {
            let _ =
                self.record(Event::ShardsWritten, queue).and_then(|()| self.wait(Queue::Compute, Event::ShardsWritten));
        }
    }
}
