//! Gradient slots on a GPU, and reductions that run on its queues.
//!
//! A unit is reduced as a whole: what has no gradient here is zeroed in its slot. Which gradients there are on any rank is
//! known at the end of the backward, when ranks exchange it on the host, together with which units each has reduced: a rank
//! that has reduced fewer takes part in the rest with zeros. A reduction that comes before that writes means for all of a
//! unit's parameters; they count once some rank has had a gradient.
//!
//! Where shard groups have replicas, each reduction of a backward that averages over them does so at once. The end of it is then
//! agreed on by all ranks: a unit that another group alone has reduced, or that an earlier backward has reduced within the
//! groups only, is reduced once more, with zeros, so that what its gradient shards hold is averaged.

use super::{Change, Place, Reducer};
use crate::comm::nccl::{Mean, NcclQueues};
use crate::comm::Held;
use crate::error::{err, Error, Result, Status};
use crate::mesh::Mesh;
use crate::pipeline::Pipeline;
use crate::plan::{ParamPlan, Plan, UnitId};
use crate::shards::ShardStore;
use crate::timeline::{self, Timeline};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A pipeline and the queues that it is for.
pub struct Queued {
    pub pipeline: Pipeline,
    pub queues: NcclQueues,
    /// Reductions from here on are averaged over the replicas, if there are some.
    pub averaging: bool,
    /// What has broken them.
    failed: Option<Error>,
}

/// What an engine and its gradients share; used under the engine's lock.
#[derive(Clone)]
pub struct SharedQueues(Arc<Mutex<Queued>>);

impl SharedQueues {
    pub fn new(pipeline: Pipeline, queues: NcclQueues) -> SharedQueues {
        SharedQueues(Arc::new(Mutex::new(Queued { pipeline, queues, averaging: true, failed: None })))
    }

    pub fn lock(&self) -> MutexGuard<'_, Queued> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f`, unless something has failed before. A failure of the device, of NCCL or of another rank breaks all
    /// communicators.
    pub fn run<T>(&self, f: impl FnOnce(&mut Pipeline, &mut NcclQueues) -> Result<T>) -> Result<T> {
        let Queued { pipeline, queues, failed, .. } = &mut *self.lock();
        if let Some(e) = failed {
            return Err(e.clone());
        }
        f(pipeline, queues).map_err(|e| match e.status {
            // Refused before anything was launched, alike on every rank.
            Status::InvalidState | Status::InvalidArgument | Status::Unsupported => e,
            _ => failed.insert(queues.comms.broken(e)).clone(),
        })
    }

    /// Whether a reduction that is started now is averaged over replicas.
    fn averages(&self) -> bool {
        let queued = self.lock();
        queued.averaging && queued.queues.comms.replicas.is_some()
    }

    /// Looks for failures without waiting.
    pub fn poll(&self) -> Result<()> {
        self.run(|_, queues| queues.comms.poll().map(drop))
    }
}

/// A reduction of this rank's.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Launched {
    unit: UnitId,
    /// Over the replicas, too.
    averaged: bool,
}

impl Launched {
    fn to_word(self) -> u32 {
        self.unit << 1 | u32::from(self.averaged)
    }

    fn of_word(word: u32) -> Launched {
        Launched { unit: word >> 1, averaged: word & 1 == 1 }
    }
}

/// See the module's text.
pub struct QueuedSlots {
    shared: SharedQueues,
    mesh: Arc<Mesh>,
    stores: Vec<Arc<ShardStore>>,
    /// Gradient shards are in host memory: the end of a backward waits for the GPU.
    on_host: bool,
    /// What this rank has reduced since the last backward ended, in order.
    launched: Vec<Launched>,
    /// Of each unit's parameters: whether this rank has had a gradient in one of those reductions.
    present: Vec<Vec<bool>>,
    /// By parameter: whether a mean counts since [`Reducer::take_reduced`].
    reduced: Vec<bool>,
    timeline: Option<Arc<Timeline>>,
}

impl QueuedSlots {
    /// Local. `stores` are the plan's, of which `shared` knows the shards.
    pub fn new(
        plan: &Plan,
        shared: SharedQueues,
        mesh: Arc<Mesh>,
        stores: &[Arc<ShardStore>],
        on_host: bool,
    ) -> QueuedSlots {
        QueuedSlots {
            shared,
            mesh,
            stores: plan.units.iter().map(|u| stores[u.store].clone()).collect(),
            on_host,
            launched: Vec::new(),
            present: plan.units.iter().map(|u| vec![false; u.params.len()]).collect(),
            reduced: vec![false; plan.params.len()],
            timeline: None,
        }
    }

    /// What of a unit's means goes to the gradient shards, and how: added where they hold something.
    fn means(&self, plan: &Plan, unit: UnitId) -> Vec<Mean> {
        let u = &plan.units[unit as usize];
        let again = self.launched.iter().any(|l| l.unit == unit);
        let start = u.layout.shard(self.mesh.shard.rank()).start;
        let mean = |p: &ParamPlan| Mean {
            at: p.piece.unit_offset - start,
            len: p.piece.len,
            add: again || self.stores[unit as usize].grads.holds(p.store_param),
        };
        let here = u.params.iter().map(|p| &plan.params[*p as usize]).filter(|p| p.piece.len > 0);
        let means: Vec<Mean> = here.map(mean).collect();
        match means.first() {
            // The gaps belong to nobody.
            Some(first) if means.iter().all(|m| m.add == first.add) => {
                vec![Mean { at: 0, len: u.layout.shard_len, add: first.add }]
            }
            _ => means,
        }
    }

    fn launch(
        &mut self,
        plan: &Plan,
        what: Launched,
        slot: usize,
        present: &[bool],
        change: Option<Change<'_>>,
    ) -> Result<()> {
        let Launched { unit, averaged } = what;
        let began = self.timeline.as_ref().map_or(0, |_| timeline::now());
        let layout = &plan.units[unit as usize].layout;
        let absent = present.iter().enumerate().filter(|(_, present)| !**present);
        let absent: Vec<_> = absent.map(|(i, _)| layout.offsets[i]..layout.offsets[i] + layout.numels[i]).collect();
        let means = self.means(plan, unit);
        let mut refused = false;
        let launched = self.shared.run(|pipeline, queues| {
            queues.zero(slot, &absent)?;
            queues.set_means(unit, means, averaged);
            pipeline.reduce_changed(queues, unit, |queues| {
                let changed = change.map_or(Ok(()), |change| queues.on_reduce_stream(change));
                changed.inspect_err(|e| refused = e.status == Status::Callback)
            })
        });
        if refused {
            // The hook's error is this call's; later ones get what it has broken the communicators with.
            let Queued { failed, .. } = &mut *self.shared.lock();
            *failed = self.mesh.world.async_error().or(failed.take());
        }
        launched?;
        self.present[unit as usize].iter_mut().zip(present).for_each(|(all, here)| *all |= here);
        self.launched.push(what);
        self.timeline.iter().for_each(|t| t.unit_span("reduce", unit, began));
        Ok(())
    }

    /// Takes part in a reduction with zeros.
    fn launch_zeros(&mut self, plan: &Plan, what: Launched) -> Result<()> {
        let place = self.acquire(plan, what.unit)?;
        let none = vec![false; plan.units[what.unit as usize].params.len()];
        self.launch(plan, what, place.slot, &none, None)
    }

    /// Ranks tell each other what they have reduced and which gradients they had; then all have reduced the same. `average`:
    /// all ranks do, and all that was reduced since the last time is averaged over the replicas.
    fn agree(&mut self, plan: &Plan, average: bool) -> Result<()> {
        let comm = if average { self.mesh.world.clone() } else { self.mesh.shard.clone() };
        let mut message = (self.launched.len() as u32).to_le_bytes().to_vec();
        self.launched.iter().for_each(|l| message.extend(l.to_word().to_le_bytes()));
        if average {
            for (reduced, p) in self.reduced.iter().zip(&plan.params) {
                self.present[p.unit as usize][p.index] |= reduced;
            }
        }
        message.extend(self.present.iter().flatten().map(|p| u8::from(*p)));
        let all = comm.exchange(&message)?;
        let words = |m: &[u8]| -> Vec<u32> {
            m.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
        };
        let mut longest = self.launched.clone();
        for (rank, message) in all.iter().enumerate() {
            let (count, rest) = message.split_at_checked(4).unwrap_or((&[0; 4], &[]));
            let (launched, present) = rest.split_at_checked(4 * words(count)[0] as usize).unwrap_or_default();
            let launched: Vec<Launched> = words(launched).into_iter().map(Launched::of_word).collect();
            let shorter = launched.len().min(longest.len());
            if launched[..shorter] != longest[..shorter] || present.len() != plan.params.len() {
                return Err(err!(
                    Mismatch,
                    "rank {} and rank {rank} have reduced different units in a backward, or in another order",
                    comm.rank()
                ));
            }
            if launched.len() > longest.len() {
                longest = launched;
            }
            self.present.iter_mut().flatten().zip(present).for_each(|(all, there)| *all |= *there != 0);
        }
        for what in longest.split_off(self.launched.len()) {
            if what.unit as usize >= plan.units.len() {
                return Err(err!(Mismatch, "another rank has reduced unit {}, which does not exist here", what.unit));
            }
            self.launch_zeros(plan, what)?;
        }
        for unit in (0..plan.units.len() as UnitId).filter(|_| average) {
            let last = self.launched.iter().rfind(|l| l.unit == unit);
            let holds = self.present[unit as usize].contains(&true) && plan.units[unit as usize].bytes() > 0;
            if holds && !last.is_some_and(|l| l.averaged) {
                self.launch_zeros(plan, Launched { unit, averaged: true })?;
            }
        }
        Ok(())
    }
}

impl Reducer for QueuedSlots {
    fn acquire(&mut self, _plan: &Plan, unit: UnitId) -> Result<Place> {
        self.shared.run(|pipeline, queues| {
            let slot = pipeline.collect(queues, unit)?;
            let slot = slot.ok_or_else(|| err!(Panic, "unit {unit} has elements and no gradient slot"))?;
            Ok(Place { slot, data: queues.in_slot(slot) as *mut f32 })
        })
    }

    fn discard(&mut self, unit: UnitId, _place: Place) {
        // What fails here has broken the queues: the next call says so.
        let _ = self.shared.run(|pipeline, queues| pipeline.discard(queues, unit));
    }

    fn start(
        &mut self,
        plan: &Plan,
        unit: UnitId,
        place: Place,
        held: &[Held],
        change: Option<Change<'_>>,
    ) -> Result<()> {
        let present: Vec<bool> = held.iter().map(|h| h.is_there()).collect();
        let averaged = self.shared.averages();
        self.launch(plan, Launched { unit, averaged }, place.slot, &present, change)
    }

    fn reduced(&mut self, unit: UnitId, present: &[bool]) {
        self.present[unit as usize].iter_mut().zip(present).for_each(|(all, here)| *all |= here);
    }

    fn progress(&mut self) -> Result<()> {
        self.shared.poll()
    }

    fn end(&mut self, plan: &Plan) -> Result<()> {
        let average = self.shared.averages();
        if average || self.mesh.shard.world_size() > 1 {
            // A rank that fails here leaves others waiting on the GPU.
            self.agree(plan, average).map_err(|e| self.shared.lock().queues.comms.broken(e))?;
        }
        self.shared.run(|pipeline, queues| {
            pipeline.finish_backward(queues)?;
            queues.comms.poll()?;
            if self.on_host {
                queues.synchronize()?;
            }
            Ok(())
        })?;
        for (p, param) in plan.params.iter().enumerate() {
            if std::mem::take(&mut self.present[param.unit as usize][param.index]) {
                self.stores[param.unit as usize].grads.hold(param.store_param);
                self.reduced[p] = true;
            }
        }
        self.launched.clear();
        Ok(())
    }

    fn take_reduced(&mut self, plan: &Plan) -> Vec<bool> {
        std::mem::replace(&mut self.reduced, vec![false; plan.params.len()])
    }

    fn used_bytes(&self) -> u64 {
        self.shared.lock().pipeline.collecting_bytes() as u64
    }

    fn peaks(&self) -> [usize; 2] {
        self.shared.lock().pipeline.counts().slots_peak
    }

    fn set_timeline(&mut self, timeline: Option<Arc<Timeline>>) {
        self.timeline = timeline;
    }
}
