//! What a communicator has given to the GPU and is not done yet, and since when nothing of it has moved.

use crate::comm::Kind;
use crate::device::cuda::{Context, Event, Stream};
use crate::error::Result;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a call does, for messages: cheap to clone, so that a unit's are made once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct What(Arc<str>);

impl What {
    /// A collective of a unit.
    pub fn of_unit(kind: Kind, unit: &str) -> What {
        What(format!("the {} of unit \"{unit}\"", kind.name()).into())
    }

    /// Something else, e.g. `the norm of the gradients`.
    pub fn named(name: &str) -> What {
        What(name.into())
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// See the module's text.
#[derive(Default)]
pub struct Watch {
    running: VecDeque<(What, Event)>,
    /// Events to be recorded again.
    spare: Vec<Event>,
    /// When something was last given to an idle GPU, or found done.
    moved: Option<Instant>,
}

impl Watch {
    /// `what` was given to `stream`.
    pub fn add(&mut self, context: &Arc<Context>, stream: &Stream, what: &What) -> Result<()> {
        let event = match self.spare.pop() {
            Some(event) => event,
            None => Event::new(context)?,
        };
        event.record(stream)?;
        // So that a host that never looks keeps few events.
        self.look()?;
        if self.running.is_empty() {
            self.moved = Some(Instant::now());
        }
        self.running.push_back((what.clone(), event));
        Ok(())
    }

    /// Forgets what is done; whether that is all.
    pub fn look(&mut self) -> Result<bool> {
        while let Some((_, event)) = self.running.front() {
            if !event.is_done()? {
                return Ok(false);
            }
            self.spare.extend(self.running.pop_front().map(|(_, event)| event));
            self.moved = Some(Instant::now());
        }
        Ok(true)
    }

    /// What has been at work for longer than `timeout` since the one before it was done.
    pub fn stuck(&self, timeout: Duration) -> Option<&What> {
        let moved = self.moved?;
        self.running.front().map(|(what, _)| what).filter(|_| moved.elapsed() > timeout)
    }

    /// The one that runs.
    pub fn oldest(&self) -> Option<&What> {
        self.running.front().map(|(what, _)| what)
    }
}
