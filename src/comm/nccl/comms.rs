//! The communicators that queues work with: of the shard group, of its replicas, and of smaller groups that units are resharded
//! to; NCCL's, and beside each of those one on the host, where its ranks compare what they launch. An error of one breaks all
//! of them, so that no rank waits for another that has failed elsewhere.

use super::comm::NcclComm;
use crate::comm::{Check, Communicator, Kind, Tag};
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use crate::plan::UnitId;
use std::sync::Arc;

/// NCCL's communicators of a shard group.
pub struct NcclPair {
    pub gather: Arc<NcclComm>,
    pub reduce: Arc<NcclComm>,
}

/// Where ranks compare on the host what they launch.
pub struct Plane {
    /// Nobody else's, since its order of collectives is the queues' own.
    pub control: Arc<dyn Communicator>,
    /// The control communicator's number of the plan's unit 0, of [`Communicator::name_units`].
    pub first_unit: u32,
    /// Another communicator of the same ranks, the engine's own: an error breaks it, and it breaks the others.
    pub host: Arc<dyn Communicator>,
    /// Which ranks these are, where there are several such groups: errors begin with it.
    pub place: Option<String>,
}

/// The ranks that hold the same shards in different shard groups.
pub struct Replicas {
    pub plane: Plane,
    pub nccl: Arc<NcclComm>,
}

/// A smaller group that units are resharded to, of consecutive ranks of the shard group.
pub struct SmallerGroup {
    pub plane: Plane,
    pub nccl: Arc<NcclComm>,
}

/// See the module's text.
pub struct Comms {
    /// Of the shard group, as the next two.
    pub plane: Plane,
    /// None for one rank.
    pub nccl: Option<NcclPair>,
    /// None where there is one shard group.
    pub replicas: Option<Replicas>,
    /// See [`Comms::add_group`].
    pub groups: Vec<SmallerGroup>,
}

impl Comms {
    /// An error if a communicator of NCCL's has other ranks than the one on the host that it is used with.
    pub(super) fn check(&self) -> Result<()> {
        for (comm, plane) in self.all() {
            let (rank, world) = (plane.control.rank(), plane.control.world_size());
            if (comm.rank(), comm.world_size()) != (rank, world) {
                return Err(err!(
                    InvalidArgument,
                    "{comm:?} is not of the control plane's ranks: rank {rank} of {world}"
                ));
            }
        }
        let world = self.plane.control.world_size();
        match &self.nccl {
            None if world > 1 => Err(err!(InvalidArgument, "{world} ranks need NCCL")),
            _ => Ok(()),
        }
    }

    /// A smaller group, of the ranks of `host`, which gives this `color` to no other ranks of the shard group; returns its
    /// number. Waits for what runs on the GPU. Collective over the shard group, between iterations.
    pub fn add_group(&mut self, color: u32, plane: Plane) -> Result<usize> {
        self.finish()?;
        let nccl = self.nccl.as_ref().ok_or_else(|| err!(InvalidArgument, "one rank has no smaller groups"))?;
        let (rank, ranks) = (plane.control.rank(), plane.control.world_size());
        let made = nccl.gather.split(color, rank as i32, rank, ranks);
        let nccl = made.map_err(|e| self.failed(&self.plane, e))?;
        self.groups.push(SmallerGroup { plane, nccl });
        Ok(self.groups.len() - 1)
    }

    /// Looks for failures of peers and for what hangs, without waiting; whether all collectives are done. An error has
    /// broken all communicators.
    pub fn poll(&self) -> Result<bool> {
        let mut done = true;
        for plane in self.planes() {
            if let Some(e) = plane.control.async_error().or_else(|| plane.host.async_error()) {
                return Err(self.failed(plane, e));
            }
        }
        for (comm, plane) in self.all() {
            done &= comm.poll().map_err(|e| self.failed(plane, e))?;
        }
        Ok(done)
    }

    /// Waits until all collectives are done, with NCCL's deadline for each.
    pub fn finish(&self) -> Result<()> {
        while !self.poll()? {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
        Ok(())
    }

    /// Breaks all communicators, so that no rank waits for this one.
    pub fn broken(&self, error: Error) -> Error {
        // NCCL's kernels first: they would wait on the GPU.
        for (comm, _) in self.all() {
            comm.abort(&error.message);
        }
        let hosts = self.planes().flat_map(|plane| [&plane.control, &plane.host]);
        for comm in hosts.filter(|comm| comm.async_error().is_none()) {
            comm.abort(&error.message);
        }
        error
    }

    /// The same for an error among the ranks of `plane`, which it then names.
    pub(super) fn failed(&self, plane: &Plane, error: Error) -> Error {
        self.broken(match &plane.place {
            Some(place) => error.context(place),
            None => error,
        })
    }

    fn planes(&self) -> impl Iterator<Item = &Plane> {
        // Of one rank nobody can differ.
        let group = Some(&self.plane).filter(|_| self.nccl.is_some());
        let others = self.replicas.iter().map(|r| &r.plane).chain(self.groups.iter().map(|g| &g.plane));
        group.into_iter().chain(others)
    }

    /// NCCL's communicators, and where their ranks compare what they launch.
    fn all(&self) -> impl Iterator<Item = (&NcclComm, &Plane)> {
        let group = self.nccl.iter().flat_map(|nccl| [&nccl.gather, &nccl.reduce]).map(|comm| (&**comm, &self.plane));
        let replicas = self.replicas.iter().map(|r| (&*r.nccl, &r.plane));
        group.chain(replicas).chain(self.groups.iter().map(|g| (&*g.nccl, &g.plane)))
    }

    /// Says on the control plane what is launched next: a collective of so many elements, in this place of what is registered.
    pub(super) fn announce(
        &self,
        plane: &Plane,
        kind: Kind,
        check: Check,
        unit: UnitId,
        parts: &[(DType, usize)],
        place: Option<u32>,
    ) -> Result<()> {
        let bytes = parts.iter().map(|(dtype, len)| (len * dtype.size()) as u64).sum::<u64>();
        let dtype = parts.first().map_or(DType::F32, |(dtype, _)| *dtype);
        let tag = Tag { kind, unit: plane.first_unit + unit, dtype, bytes };
        plane.control.announce(tag, check, place).map_err(|e| self.failed(plane, e))
    }
}
