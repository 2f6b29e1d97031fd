//! A pipeline's queues on a GPU: three streams, an event for each of the pipeline's, and a communicator for each kind
//! of collective.
//!
//! A unit buffer is the unit's layout, once in each type that one of its parameters is computed in; this rank's shard
//! is copied or rounded into its place there, and NCCL fills the rest. A slot is the layout in float32, and behind that
//! in the type that it is reduced in if that is another; the mean is written or added to the gradient shard, which is
//! float32. Shards are memory of the GPU, or pinned host memory, which kernels read and write over the bus.
//!
//! Where shard groups have replicas, what the group's ranks have reduced is averaged over those right behind it, on the same
//! stream: in float32, in this rank's part of the slot, to which what the gradient shard holds was added, so that sums that
//! came together in one group only are averaged, too.
//!
//! A host communicator of the same ranks is the control plane: each collective is announced there before it is
//! launched, so that ranks that launch different ones get an error that names both. The error of one communicator
//! breaks the others, on every rank that polls. One rank has nothing to move, and needs no NCCL.

use super::comms::{Comms, Plane, Replicas, SmallerGroup};
use super::lent::{Mean, Shards};
use super::register::FixedMemory;
use super::types::{Part, Reduction};
use super::watch::What;
use crate::comm::{Check, Kind};
use crate::device::cuda::kernels::{Kernels, Piece};
use crate::device::cuda::{Compute, ComputeMemory, Context, Event as GpuEvent, Priority, Stream};
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::pipeline::{compute_dtypes, Beyond, Event, Limits, Queue, Queues};
use crate::plan::{Plan, UnitId};
use cudarc::driver::sys::CUdeviceptr;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

/// A unit's shards on this rank, and what messages call its collectives.
struct Unit {
    gather: What,
    reduce: What,
    average: What,
    /// This rank's masters and gradient shard: `shard_len` floats each.
    masters: CUdeviceptr,
    grads: CUdeviceptr,
    shard_len: usize,
    /// Elements of the layout: all ranks' shards.
    len: usize,
    dtypes: Vec<DType>,
    reduce_dtype: DType,
    /// What of the next reduction goes to the gradient shard, and whether it is averaged over the replicas; all of it, and
    /// it is not, unless it was said.
    next: Option<(Vec<Mean>, bool)>,
    gathers: u64,
}

/// A unit buffer's or slot's memory.
enum Place {
    Taken(ComputeMemory),
    /// In [`FixedMemory`].
    Registered(CUdeviceptr),
}

impl Place {
    fn address(&self) -> CUdeviceptr {
        match self {
            Place::Taken(memory) => memory.address(),
            Place::Registered(address) => *address,
        }
    }
}

/// See the module's text.
pub struct NcclQueues {
    context: Arc<Context>,
    kernels: Arc<Kernels>,
    compute: Arc<Compute>,
    pub comms: Comms,
    gather_stream: Arc<Stream>,
    reduce_stream: Arc<Stream>,
    events: HashMap<Event, GpuEvent>,
    units: Vec<Unit>,
    /// By place; those beyond the fixed ones have memory while they are used.
    buffers: Vec<Option<Place>>,
    slots: Vec<Option<Place>>,
    /// What the fixed buffers are in, if that is not the source's memory.
    fixed: Option<FixedMemory>,
    on_host: bool,
    /// By unit: its part that is kept for one of them, in each of its types.
    parts: Vec<Option<Place>>,
    /// All-reduces over the replicas, and their bytes.
    averages: (u64, u64),
    gathering: (Kind, Check),
}

impl NcclQueues {
    /// Takes the memory that `limits` says for work on `compute`, but the unit buffers that are `fixed`, which NCCL knows.
    /// Those are of the plan's ranks. Local. Until
    /// [`NcclQueues::set_gathering`] says otherwise every all-gather waits for all ranks to announce it.
    ///
    /// # Safety
    /// The shards' memory is there as long as the result. The host writes masters only between a pipeline's `begin_write`
    /// and its next unshard, and gradient shards never between a reduction and the end of its backward, both in the order
    /// of `compute`, or after it was waited for.
    pub unsafe fn new(
        plan: &Plan,
        limits: &Limits,
        shards: &Shards<'_>,
        kernels: &Arc<Kernels>,
        compute: &Arc<Compute>,
        comms: Comms,
        fixed: Option<FixedMemory>,
    ) -> Result<NcclQueues> {
        if shards.units.len() != plan.units.len() {
            return Err(err!(
                InvalidArgument,
                "shards of {} units were given, there are {}",
                shards.units.len(),
                plan.units.len()
            ));
        }
        let context = compute.context();
        let gather_stream = Stream::new(&context, Priority::Highest)?;
        let reduce_stream = Stream::kept(&context).map_or_else(|| Stream::new(&context, Priority::Highest), Ok)?;
        let take = |sizes: &[usize], what: &str| -> Result<Vec<Place>> {
            sizes.iter().map(|bytes| compute.take(*bytes, what).map(Place::Taken)).collect()
        };
        let buffers = match &fixed {
            Some(fixed) => fixed.buffers.iter().map(|address| Place::Registered(*address)).collect(),
            None => take(&limits.unit_buffers, "a unit buffer")?,
        };
        let slots = take(&limits.gradient_slots, "a gradient slot")?;
        // Then a place for each unit.
        let with_units =
            |fixed: Vec<Place>| fixed.into_iter().map(Some).chain(plan.units.iter().map(|_| None)).collect();
        let units = plan.units.iter().zip(shards.units).enumerate().map(|(u, (unit, shards))| Unit {
            gather: What::of_unit(Kind::AllGather, unit.label()),
            reduce: What::of_unit(Kind::ReduceScatter, unit.label()),
            average: What::of_unit(Kind::AllReduce, unit.label()),
            masters: shards.masters,
            grads: shards.grads,
            shard_len: unit.layout.shard_len,
            len: unit.layout.len,
            dtypes: compute_dtypes(plan, u as UnitId),
            reduce_dtype: unit.reduce_dtype,
            next: None,
            gathers: 0,
        });
        comms.check()?;
        let mut queues = NcclQueues {
            kernels: kernels.clone(),
            compute: compute.clone(),
            comms,
            parts: plan.units.iter().map(|_| None).collect(),
            averages: (0, 0),
            gathering: (Kind::AllGather, Check::Together),
            gather_stream,
            reduce_stream,
            events: HashMap::new(),
            units: units.collect(),
            buffers: with_units(buffers),
            slots: with_units(slots),
            fixed,
            on_host: shards.on_host,
            context,
        };
        compute.count(queues.registered_bytes(), 0);
        // The other queues begin after the memory is there.
        queues.record(Event::ShardsWritten, Queue::Compute)?;
        queues.wait(Queue::Gather, Event::ShardsWritten)?;
        queues.wait(Queue::Reduce, Event::ShardsWritten)?;
        Ok(queues)
    }

    /// Where the layout of `unit` begins in unit buffer `buffer`, in this type; None if no parameter of it is computed
    /// in that.
    pub fn in_buffer(&self, unit: UnitId, buffer: usize, dtype: DType) -> Option<CUdeviceptr> {
        self.parts(unit, buffer, 1).find(|part| part.dtype == dtype).map(|part| part.data)
    }

    /// Where unit buffer `buffer` begins.
    pub fn buffer(&self, buffer: usize) -> CUdeviceptr {
        self.buffers[buffer].as_ref().map_or(0, Place::address)
    }

    /// The layout's floats in gradient slot `slot`.
    pub fn in_slot(&self, slot: usize) -> CUdeviceptr {
        self.slots[slot].as_ref().map_or(0, Place::address)
    }

    /// Zeroes ranges of floats of a slot, on compute.
    pub fn zero(&self, slot: usize, ranges: &[Range<usize>]) -> Result<()> {
        let base = self.in_slot(slot);
        let piece = |r: &Range<usize>| {
            let to = base + (r.start * DType::F32.size()) as u64;
            Piece { from: to, to, len: r.len() as u64, add: 0 }
        };
        let pieces: Vec<Piece> = ranges.iter().map(piece).collect();
        // SAFETY: the slot has room for the layout that the ranges are of, and compute writes it now.
        unsafe { self.kernels.zero(&self.compute.stream(), &pieces) }
    }

    /// What of the next reduction of `unit` goes to its gradient shard, and how; ranges of its shard that do not overlap.
    /// `average`: over the replicas, together with what the gradient shard holds where it is added to.
    pub fn set_means(&mut self, unit: UnitId, means: Vec<Mean>, average: bool) {
        self.units[unit as usize].next = Some((means, average));
    }

    /// All-reduces over the replicas so far, and the bytes that this rank gave to them.
    pub fn averages(&self) -> (u64, u64) {
        self.averages
    }

    /// What all-gathers are called from here on, and how they are compared: the same on every rank. Local.
    pub fn set_gathering(&mut self, kind: Kind, check: Check) {
        self.gathering = (kind, check);
    }

    /// Calls `f` with the stream (a CUstream) that reductions go to, and the GPU's context current. The stream is there for ever:
    /// who was told of it may keep memory for work on it, as LibTorch's allocator does.
    pub fn on_reduce_stream(&self, f: &mut dyn FnMut(*mut c_void) -> Result<()>) -> Result<()> {
        let _current = self.context.enter()?;
        self.reduce_stream.keep();
        f(self.reduce_stream.raw().cast())
    }

    /// A smaller group, as [`Comms::add_group`] makes it, which gathers into what is registered, too.
    pub fn add_group(&mut self, color: u32, plane: Plane) -> Result<()> {
        let group = self.comms.add_group(color, plane)?;
        let Some(fixed) = &mut self.fixed else { return Ok(()) };
        let SmallerGroup { plane, nccl } = &self.comms.groups[group];
        fixed.register_with(nccl).map_err(|e| self.comms.failed(plane, e))
    }

    /// Bytes of unit buffers that NCCL's communicators know.
    pub fn registered_bytes(&self) -> usize {
        self.fixed.as_ref().map_or(0, |fixed| fixed.bytes)
    }

    /// All-gathers of a unit so far.
    pub fn gathers(&self, unit: UnitId) -> u64 {
        self.units[unit as usize].gathers
    }

    /// Waits until the GPU has done all that it was given, by the host on its stream, too.
    pub fn synchronize(&self) -> Result<()> {
        self.comms.finish()?;
        self.gather_stream.synchronize()?;
        self.reduce_stream.synchronize()?;
        self.compute.stream().synchronize()
    }

    /// What compute is given from here on, memory that is given back too, comes after the other queues' work. A device that
    /// fails now frees it all the same.
    pub fn lead_to_compute(&mut self) {
        for queue in [Queue::Gather, Queue::Reduce] {
            let _ =
                self.record(Event::ShardsWritten, queue).and_then(|()| self.wait(Queue::Compute, Event::ShardsWritten));
        }
    }

    /// Averages `len` floats at `data`, a shard of `unit`, over the replicas.
    ///
    /// # Safety
    /// Nobody else uses them until the reduce queue has come past it.
    unsafe fn average(&self, replicas: &Replicas, unit: UnitId, data: CUdeviceptr, len: usize) -> Result<()> {
        let Replicas { plane, nccl } = replicas;
        self.comms.announce(plane, Kind::AllReduce, Check::Announce, unit, &[(DType::F32, len)], None)?;
        let (what, stream) = (&self.units[unit as usize].average, &self.reduce_stream);
        // SAFETY: the caller's promise.
        let done = unsafe { nccl.all_reduce(what, data, len, DType::F32, Reduction::Mean, stream) };
        done.map_err(|e| self.comms.failed(plane, e))
    }

    /// The unit's layout in each of its types, one behind the other, for so many ranks.
    fn parts(&self, unit: UnitId, buffer: usize, ranks: usize) -> impl Iterator<Item = Part> + '_ {
        let (unit, mut data) = (&self.units[unit as usize], self.buffer(buffer));
        unit.dtypes.iter().map(move |dtype| {
            let part = Part { data, shard_len: unit.len / ranks, dtype: *dtype };
            data += (unit.len * dtype.size()) as u64;
            part
        })
    }

    /// Where what is kept of `unit` begins.
    fn parts_kept(&self, unit: UnitId) -> CUdeviceptr {
        self.parts[unit as usize].as_ref().map_or(0, Place::address)
    }

    fn stream(&self, queue: Queue) -> Arc<Stream> {
        match queue {
            Queue::Compute => self.compute.stream(),
            Queue::Gather => self.gather_stream.clone(),
            Queue::Reduce => self.reduce_stream.clone(),
        }
    }

    fn place(&mut self, place: Beyond) -> &mut Option<Place> {
        match place {
            Beyond::Buffer(buffer) => &mut self.buffers[buffer],
            Beyond::Slot(slot) => &mut self.slots[slot],
            Beyond::Part(unit) => &mut self.parts[unit as usize],
        }
    }
}

impl Queues for NcclQueues {
    fn all_gather(&mut self, unit: UnitId, buffer: usize, group: Option<usize>) -> Result<()> {
        self.units[unit as usize].gathers += 1;
        let (u, stream) = (&self.units[unit as usize], &self.gather_stream);
        let group = group.map(|g| &self.comms.groups[g]);
        let plane = group.map_or(&self.comms.plane, |g| &g.plane);
        let nccl = group.map(|g| &g.nccl).or(self.comms.nccl.as_ref().map(|nccl| &nccl.gather));
        let (rank, ranks) = (plane.control.rank(), plane.control.world_size());
        let (kind, check) = self.gathering;
        let parts: Vec<Part> = self.parts(unit, buffer, ranks).collect();
        let moved: Vec<(DType, usize)> = parts.iter().map(|p| (p.dtype, u.len)).collect();
        let place = self.fixed.as_ref().map(|fixed| fixed.place(buffer));
        self.comms.announce(plane, kind, check, unit, &moved, place)?;
        let mut kept = self.parts_kept(unit);
        for part in &parts {
            let to = part.data + (rank * part.shard_len * part.dtype.size()) as u64;
            let piece = Piece { from: u.masters, to, len: part.shard_len as u64, add: 0 };
            let bytes = part.shard_len * part.dtype.size();
            // SAFETY: the pipeline lets nobody else use the buffer meanwhile, and the masters and what was kept are read only;
            // all have room for a rank's part.
            unsafe {
                match part.dtype {
                    _ if group.is_some() => stream.copy_on_device(kept, to, bytes)?,
                    DType::F32 if self.on_host => self.kernels.copy_in(stream, DType::F32, &[piece])?,
                    DType::F32 => stream.copy_on_device(u.masters, to, bytes)?,
                    dtype => self.kernels.cast(stream, DType::F32, dtype, &[piece])?,
                }
            }
            kept += bytes as u64;
        }
        match nccl {
            Some(nccl) => {
                // SAFETY: as above.
                let gathered = unsafe { nccl.all_gather(&u.gather, &parts, stream) };
                gathered.map_err(|e| self.comms.failed(plane, e))
            }
            None => Ok(()),
        }
    }

    fn keep(&mut self, unit: UnitId, buffer: usize, group: usize) -> Result<()> {
        let control = &self.comms.groups[group].plane.control;
        let (rank, ranks) = (control.rank(), control.world_size());
        let mut to = self.parts_kept(unit);
        for part in self.parts(unit, buffer, ranks) {
            let bytes = part.shard_len * part.dtype.size();
            let from = part.data + (rank * bytes) as u64;
            // SAFETY: compute reads the buffer, and the pipeline has taken memory for the parts.
            unsafe { self.compute.stream().copy_on_device(from, to, bytes) }?;
            to += bytes as u64;
        }
        Ok(())
    }

    fn reduce_scatter(&mut self, unit: UnitId, slot: usize) -> Result<()> {
        let next = self.units[unit as usize].next.take();
        let (u, stream) = (&self.units[unit as usize], &self.reduce_stream);
        let (means, average) = next.unwrap_or_else(|| (vec![Mean { at: 0, len: u.shard_len, add: false }], false));
        let full = self.in_slot(slot);
        let behind = full + (u.len * DType::F32.size()) as u64;
        let data = if u.reduce_dtype == DType::F32 { full } else { behind };
        let part = Part { data, shard_len: u.shard_len, dtype: u.reduce_dtype };
        // Ranks may come to the end of a backward, and then take part, while others wait here: nobody waits.
        let moved = [(part.dtype, u.len)];
        self.comms.announce(&self.comms.plane, Kind::ReduceScatter, Check::Announce, unit, &moved, None)?;
        let first = (self.comms.plane.control.rank() * u.shard_len) as u64;
        let (own, own_full) = (data + first * part.dtype.size() as u64, full + first * DType::F32.size() as u64);
        let at = |base: CUdeviceptr, m: &Mean, dtype: DType| base + (m.at * dtype.size()) as u64;
        // SAFETY: the pipeline lets nobody else use the slot meanwhile, and nobody else touches gradient shards; both
        // have room.
        unsafe {
            if u.reduce_dtype != DType::F32 {
                let piece = Piece { from: full, to: behind, len: u.len as u64, add: 0 };
                self.kernels.cast(stream, DType::F32, u.reduce_dtype, &[piece])?;
            }
            if let Some(nccl) = &self.comms.nccl {
                let reduced = nccl.reduce.reduce_scatter(&u.reduce, part, Reduction::Mean, stream);
                reduced.map_err(|e| self.comms.failed(&self.comms.plane, e))?;
            }
            let Some(replicas) = self.comms.replicas.as_ref().filter(|_| average) else {
                let mean = |m: &Mean| {
                    let (from, to) = (at(own, m, u.reduce_dtype), at(u.grads, m, DType::F32));
                    Piece { from, to, len: m.len as u64, add: m.add.into() }
                };
                let means: Vec<Piece> = means.iter().map(mean).collect();
                return self.kernels.copy_in(stream, u.reduce_dtype, &means);
            };
            if u.reduce_dtype != DType::F32 {
                let piece = Piece { from: own, to: own_full, len: u.shard_len as u64, add: 0 };
                self.kernels.cast(stream, u.reduce_dtype, DType::F32, &[piece])?;
            }
            let held = |m: &Mean| {
                let (from, to) = (at(u.grads, m, DType::F32), at(own_full, m, DType::F32));
                Piece { from, to, len: m.len as u64, add: 1 }
            };
            let held: Vec<Piece> = means.iter().filter(|m| m.add).map(held).collect();
            self.kernels.copy_in(stream, DType::F32, &held)?;
            self.average(replicas, unit, own_full, u.shard_len)?;
            let mean = |m: &Mean| {
                let (from, to) = (at(own_full, m, DType::F32), at(u.grads, m, DType::F32));
                Piece { from, to, len: m.len as u64, add: 0 }
            };
            let means: Vec<Piece> = means.iter().map(mean).collect();
            self.kernels.copy_in(stream, DType::F32, &means)?;
            let bytes = (u.shard_len * DType::F32.size()) as u64;
            self.averages = (self.averages.0 + 1, self.averages.1 + bytes);
            Ok(())
        }
    }

    fn record(&mut self, event: Event, queue: Queue) -> Result<()> {
        if !self.events.contains_key(&event) {
            self.events.insert(event, GpuEvent::new(&self.context)?);
        }
        self.events[&event].record(&self.stream(queue))
    }

    fn wait(&mut self, queue: Queue, event: Event) -> Result<()> {
        match self.events.get(&event) {
            Some(event) => self.stream(queue).wait(event),
            None => Err(err!(InvalidState, "{event:?} is waited for and was never recorded")),
        }
    }

    fn take(&mut self, place: Beyond, bytes: usize) -> Result<()> {
        let what = match place {
            Beyond::Buffer(_) => "a unit buffer beyond the pool",
            Beyond::Slot(_) => "a gradient slot beyond the fixed ones",
            Beyond::Part(_) => "a unit's part of a smaller group",
        };
        *self.place(place) = Some(Place::Taken(self.compute.take(bytes, what)?));
        Ok(())
    }

    fn give_back(&mut self, place: Beyond) -> Result<()> {
        *self.place(place) = None;
        Ok(())
    }
}

impl Drop for NcclQueues {
    fn drop(&mut self) {
        self.lead_to_compute();
        if self.fixed.is_none() {
            return;
        }
        self.compute.count(0, self.registered_bytes());
        // NCCL's memory is freed at once, not in the order of a stream. What NCCL does not finish it aborts.
        let _ = self.comms.finish();
        for stream in [&self.gather_stream, &self.reduce_stream, &self.compute.stream()] {
            let _ = stream.synchronize();
        }
    }
}
