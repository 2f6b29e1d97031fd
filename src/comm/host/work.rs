//! What a collective under way does once all ranks have agreed on it, phase by phase.

use super::call::HostCall;
use super::table::{Collectives, Lane, Request};
use crate::comm::shm::{Announcement, Detail};
use crate::comm::{memory, ReduceOp, Tag, Transfer};
use crate::error::{err, Result};
use std::any::Any;
use std::sync::Arc;

/// What comes next.
pub enum Next {
    /// The next phase has begun.
    Moving(Option<Request>),
    Done,
}

/// The data of a collective.
pub enum Work {
    /// None: the agreement is all.
    Agree,
    /// The end of a backward: becomes a reduction when other ranks have not ended theirs.
    End,
    Gather(Gather),
    Reduce(Reduce),
    /// On memory of its own.
    Host(HostCall),
}

/// An all-gather of a unit.
pub struct Gather {
    transfer: Transfer,
    started: bool,
}

// SAFETY: the addresses lie in memory that the transfer's owner keeps; used under the communicator's lock.
unsafe impl Send for Gather {}

impl Gather {
    pub fn new(transfer: Transfer) -> Gather {
        Gather { transfer, started: false }
    }
}

/// Which of a unit's parameters a rank has a gradient for, as its announcement says.
#[derive(Clone, Copy, PartialEq)]
#[repr(u64)]
pub enum Presence {
    None = 0,
    All = 1,
    Some = 2,
}

impl Presence {
    pub fn of(present: &[bool]) -> Presence {
        match present.iter().filter(|p| **p).count() {
            0 => Presence::None,
            n if n == present.len() => Presence::All,
            _ => Presence::Some,
        }
    }
}

/// A reduce-scatter of a unit's gradients.
pub struct Reduce {
    /// The number of its slots.
    pub slots: u64,
    pub tag: Tag,
    /// Of each parameter: whether any rank has a gradient; known when it is done.
    pub present: Vec<bool>,
    input: *const u8,
    world: usize,
    mine: Box<[u8]>,
    all: Box<[u8]>,
    phase: Phase,
    /// The sum over the ranks of this one's range.
    result: *mut u8,
    _owners: [Arc<dyn Any + Send + Sync>; 2],
}

// SAFETY: the addresses lie in memory that the owners keep; used under the communicator's lock.
unsafe impl Send for Reduce {}

#[derive(PartialEq)]
enum Phase {
    /// Known from the announcements: nobody has a gradient, everybody has all, or flags are to be compared.
    Announced,
    Nothing,
    Everything,
    Flags,
    Sum,
}

impl Reduce {
    /// Of `input`, `tag.bytes` that `owner` keeps.
    pub fn new(
        table: &dyn Collectives,
        world: usize,
        slots: u64,
        tag: Tag,
        present: &[bool],
        input: *const u8,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Reduce> {
        let (result, lent) = lend(table, tag.bytes as usize / world)?;
        let mine: Box<[u8]> = present.iter().map(|p| u8::from(*p)).collect();
        Ok(Reduce {
            slots,
            tag,
            present: vec![false; present.len()],
            input,
            world,
            all: vec![0; world * mine.len()].into_boxed_slice(),
            mine,
            phase: Phase::Announced,
            result,
            _owners: [owner, lent],
        })
    }

    /// The sums of this rank's range of the unit, once it is done.
    pub fn sums(&self) -> *const u8 {
        self.result
    }

    /// Whether there are any.
    pub fn has_sums(&self) -> bool {
        self.phase == Phase::Sum
    }

    fn agreed(&mut self, own: impl Iterator<Item = u64> + Clone) {
        let all_are = |presence: Presence| own.clone().all(|o| o == presence as u64);
        self.phase = match () {
            () if all_are(Presence::None) => Phase::Nothing,
            () if all_are(Presence::All) => Phase::Everything,
            () => Phase::Announced,
        };
    }

    fn next(&mut self, table: &dyn Collectives) -> Result<Next> {
        let params = self.mine.len();
        match self.phase {
            Phase::Nothing | Phase::Sum => return Ok(Next::Done),
            Phase::Everything => self.present.fill(true),
            Phase::Announced => {
                self.phase = Phase::Flags;
                // SAFETY: both buffers are this flight's, which stays until the request has ended.
                let started =
                    unsafe { table.all_gather(Lane::Reduce, self.mine.as_ptr(), self.all.as_mut_ptr(), params) };
                return Ok(Next::Moving(started?));
            }
            Phase::Flags => {
                for (param, present) in self.present.iter_mut().enumerate() {
                    *present = (0..self.world).any(|rank| self.all[rank * params + param] != 0);
                }
            }
        }
        self.phase = Phase::Sum;
        let (dtype, op) = (self.tag.dtype, ReduceOp::Sum);
        let count = self.tag.bytes as usize / dtype.size() / self.world;
        // SAFETY: the owners keep input and result; the slot is not written before the reduction is done.
        let started = unsafe { table.reduce_scatter(Lane::Reduce, self.input, self.result, count, dtype, op) };
        Ok(Next::Moving(started?))
    }
}

impl Work {
    /// None: it needs no lane, or its own turn only.
    pub fn lane(&self) -> Option<Lane> {
        match self {
            Work::Agree | Work::End => None,
            Work::Gather(_) => Some(Lane::Gather),
            Work::Reduce(_) => Some(Lane::Reduce),
            Work::Host(_) => Some(Lane::Control),
        }
    }

    /// In a phase that another one on the lane follows.
    pub fn is_between(&self) -> bool {
        matches!(self, Work::Reduce(r) if r.phase == Phase::Flags)
    }

    /// All ranks run the same; `own` is what each said of itself.
    pub fn agreed(&mut self, own: Vec<u64>) {
        match self {
            Work::Reduce(reduce) => reduce.agreed(own.into_iter()),
            Work::Host(call) => call.agreed(&own),
            Work::Agree | Work::End | Work::Gather(_) => {}
        }
    }

    /// Some ranks reduce `what`, the others have ended.
    pub fn joined(
        &mut self,
        table: &dyn Collectives,
        world: usize,
        what: Announcement,
        own: Vec<Option<u64>>,
    ) -> Result<()> {
        let Detail::Slots(slots, params) = what.detail else {
            return Err(err!(Mismatch, "a reduce-scatter of no slots was announced"));
        };
        if let Work::End = self {
            let zeros = memory::Mapping::anonymous(what.tag.bytes as usize)?;
            let (input, absent) = (zeros.base(), vec![false; params as usize]);
            *self = Work::Reduce(Reduce::new(table, world, slots.into(), what.tag, &absent, input, Arc::new(zeros))?);
        }
        match self {
            Work::Reduce(reduce) => reduce.agreed(own.into_iter().map(|o| o.unwrap_or(Presence::None as u64))),
            _ => return Err(err!(Mismatch, "ranks reduce while this one runs something else")),
        }
        Ok(())
    }

    /// Begins the next phase.
    pub fn next(&mut self, table: &dyn Collectives) -> Result<Next> {
        match self {
            Work::Agree | Work::End => Ok(Next::Done),
            Work::Gather(gather) => {
                if std::mem::replace(&mut gather.started, true) {
                    return Ok(Next::Done);
                }
                let Transfer { input, output, bytes, .. } = gather.transfer;
                // SAFETY: the promise of `gather_start`; the transfer has the owner, and stays with the flight.
                Ok(Next::Moving(unsafe { table.all_gather(Lane::Gather, input, output, bytes) }?))
            }
            Work::Reduce(reduce) => reduce.next(table),
            Work::Host(call) => call.next(table),
        }
    }
}

/// Zeroed memory for a collective: the host's, if it lends some.
pub fn lend(table: &dyn Collectives, bytes: usize) -> Result<(*mut u8, Arc<dyn Any + Send + Sync>)> {
    if let Some((data, owner)) = table.alloc(bytes)? {
        // SAFETY: the host lends `bytes` at `data`.
        unsafe { data.write_bytes(0, bytes) };
        return Ok((data, owner));
    }
    let mapping = memory::Mapping::anonymous(bytes)?;
    Ok((mapping.base(), Arc::new(mapping)))
}
