//! A device that records what it is given, and what that implies: which work may run beside which, and whether anybody
//! may read or write memory that somebody else is writing.

use super::{Beyond, Event, Queue, Queues};
use crate::error::{err, Result};
use crate::plan::UnitId;
use std::collections::HashMap;

/// What was launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launch {
    AllGather {
        unit: UnitId,
        buffer: usize,
    },
    /// Of the parts that a smaller group has kept.
    GatherParts {
        unit: UnitId,
        buffer: usize,
    },
    Keep {
        unit: UnitId,
        buffer: usize,
    },
    ReduceScatter {
        unit: UnitId,
        slot: usize,
    },
    /// A host's hook changes gradients.
    Change {
        unit: UnitId,
        slot: usize,
    },
    Forward {
        unit: UnitId,
        buffer: usize,
    },
    Backward {
        unit: UnitId,
        buffer: usize,
        slot: usize,
    },
    /// The optimizer.
    Step,
    /// Memory beyond the fixed places comes and goes.
    Take(Beyond),
    GiveBack(Beyond),
}

/// Memory that launches share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Buffer(usize),
    Slot(usize),
    Part(UnitId),
    Shards,
    GradientShards,
}

impl Launch {
    fn queue(self) -> Queue {
        match self {
            Launch::AllGather { .. } | Launch::GatherParts { .. } => Queue::Gather,
            Launch::ReduceScatter { .. } | Launch::Change { .. } => Queue::Reduce,
            _ => Queue::Compute,
        }
    }

    /// What it reads and writes (true).
    fn accesses(self) -> Vec<(Memory, bool)> {
        match self {
            Launch::AllGather { buffer, .. } => vec![(Memory::Shards, false), (Memory::Buffer(buffer), true)],
            Launch::GatherParts { unit, buffer } => vec![(Memory::Part(unit), false), (Memory::Buffer(buffer), true)],
            Launch::Keep { unit, buffer } => vec![(Memory::Buffer(buffer), false), (Memory::Part(unit), true)],
            Launch::ReduceScatter { slot, .. } => vec![(Memory::Slot(slot), false), (Memory::GradientShards, true)],
            Launch::Change { slot, .. } => vec![(Memory::Slot(slot), true)],
            Launch::Forward { buffer, .. } => vec![(Memory::Buffer(buffer), false)],
            Launch::Backward { buffer, slot, .. } => vec![(Memory::Buffer(buffer), false), (Memory::Slot(slot), true)],
            Launch::Take(Beyond::Buffer(b)) | Launch::GiveBack(Beyond::Buffer(b)) => vec![(Memory::Buffer(b), true)],
            Launch::Take(Beyond::Slot(s)) | Launch::GiveBack(Beyond::Slot(s)) => vec![(Memory::Slot(s), true)],
            Launch::Take(Beyond::Part(u)) | Launch::GiveBack(Beyond::Part(u)) => vec![(Memory::Part(u), true)],
            Launch::Step => vec![(Memory::GradientShards, false), (Memory::Shards, true)],
        }
    }
}

/// How many launches of each queue have surely ended.
type Clock = [usize; 3];

struct Launched {
    launch: Launch,
    /// Its number in its queue, from 1.
    number: usize,
    /// What has ended when it starts.
    after: Clock,
}

/// See the module's text.
#[derive(Default)]
pub struct Recorder {
    launched: Vec<Launched>,
    clocks: [Clock; 3],
    recorded: HashMap<Event, Clock>,
    /// A line for each call.
    pub lines: Vec<String>,
    /// Waits that a test leaves out.
    pub forget: Option<fn(Event) -> bool>,
    /// The call of this number (from 0) fails.
    pub fail_at: Option<usize>,
}

impl Recorder {
    /// Gives `launch` to its queue.
    pub fn launch(&mut self, launch: Launch) {
        let queue = launch.queue() as usize;
        self.lines.push(format!("{:?}: {launch:?}", launch.queue()));
        let after = self.clocks[queue];
        self.clocks[queue][queue] += 1;
        self.launched.push(Launched { launch, number: self.clocks[queue][queue], after });
    }

    /// The place of the `nth` launch (from 0) that `is` describes, in the order of the calls.
    pub fn find(&self, nth: usize, is: impl Fn(Launch) -> bool) -> usize {
        let mut found = (0..self.launched.len()).filter(|i| is(self.launched[*i].launch));
        found.nth(nth).expect("it was launched")
    }

    /// Whether launch `b` starts only after launch `a` has ended.
    pub fn ordered(&self, a: usize, b: usize) -> bool {
        let (a, b) = (&self.launched[a], &self.launched[b]);
        b.after[a.launch.queue() as usize] >= a.number
    }

    /// Whether the two may run at the same time.
    pub fn beside(&self, a: usize, b: usize) -> bool {
        !self.ordered(a, b) && !self.ordered(b, a)
    }

    /// The first two launches that may touch the same memory at the same time, one of them writing, and the first that
    /// reads a buffer or slot of another unit's.
    pub fn check(&self) -> Result<()> {
        let mut holds: HashMap<usize, UnitId> = HashMap::new();
        for (j, b) in self.launched.iter().enumerate() {
            for (i, a) in self.launched[..j].iter().enumerate() {
                let accesses = b.launch.accesses();
                let conflict = a.launch.accesses().into_iter().find(|(memory, writes)| {
                    accesses.iter().any(|(other, also)| memory == other && (*writes || *also))
                });
                if let Some((memory, _)) = conflict.filter(|_| !self.ordered(i, j)) {
                    return Err(err!(InvalidState, "{:?} and {:?} share {memory:?}", a.launch, b.launch));
                }
            }
            match b.launch {
                Launch::AllGather { unit, buffer } | Launch::GatherParts { unit, buffer } => {
                    holds.insert(buffer, unit);
                }
                Launch::Forward { unit, buffer }
                | Launch::Keep { unit, buffer }
                | Launch::Backward { unit, buffer, .. }
                    if holds.get(&buffer) != Some(&unit) =>
                {
                    return Err(err!(InvalidState, "{:?} reads {:?}", b.launch, holds.get(&buffer)));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn call(&mut self, line: String) -> Result<()> {
        if self.fail_at == Some(self.lines.len()) {
            return Err(err!(Device, "{line} failed"));
        }
        self.lines.push(line);
        Ok(())
    }
}

impl Queues for Recorder {
    fn all_gather(&mut self, unit: UnitId, buffer: usize, group: Option<usize>) -> Result<()> {
        if self.fail_at == Some(self.lines.len()) {
            return Err(err!(Device, "the all-gather of unit {unit} failed"));
        }
        self.launch(match group {
            None => Launch::AllGather { unit, buffer },
            Some(_) => Launch::GatherParts { unit, buffer },
        });
        Ok(())
    }

    fn keep(&mut self, unit: UnitId, buffer: usize, _group: usize) -> Result<()> {
        self.launch(Launch::Keep { unit, buffer });
        Ok(())
    }

    fn reduce_scatter(&mut self, unit: UnitId, slot: usize) -> Result<()> {
        if self.fail_at == Some(self.lines.len()) {
            return Err(err!(Device, "the reduce-scatter of unit {unit} failed"));
        }
        self.launch(Launch::ReduceScatter { unit, slot });
        Ok(())
    }

    fn record(&mut self, event: Event, queue: Queue) -> Result<()> {
        self.call(format!("{queue:?}: record {event:?}"))?;
        self.recorded.insert(event, self.clocks[queue as usize]);
        Ok(())
    }

    fn wait(&mut self, queue: Queue, event: Event) -> Result<()> {
        self.call(format!("{queue:?}: wait {event:?}"))?;
        if self.forget.is_some_and(|forget| forget(event)) {
            return Ok(());
        }
        let recorded = *self.recorded.get(&event).ok_or_else(|| err!(InvalidState, "{event:?} was never recorded"))?;
        for (clock, ended) in self.clocks[queue as usize].iter_mut().zip(recorded) {
            *clock = (*clock).max(ended);
        }
        Ok(())
    }

    fn take(&mut self, place: Beyond, _bytes: usize) -> Result<()> {
        self.launch(Launch::Take(place));
        Ok(())
    }

    fn give_back(&mut self, place: Beyond) -> Result<()> {
        self.launch(Launch::GiveBack(place));
        Ok(())
    }
}
