//! Collectives under way. Each is announced first; when all ranks have announced the same, its data moves on a lane of its
//! kind, in the order of the announcements. Announcements and lanes run beside each other, so that nothing is waited for
//! before it is needed.
//!
//! Why no lane waits for another for ever: announcements are made in program order and need nothing else, and every wait
//! moves all lanes on.

use super::announce::{self, Agreed, Header, HEADER};
use super::messages::{Broken, Message, Peers};
use super::table::{Collectives, Lane, Request, LANES};
use super::work::{Next, Work};
use crate::comm::shm::{rank_list, Announcement};
use crate::comm::UnitName;
use crate::error::{err, Error, Result};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a wait yields before it sleeps, and the longest sleep.
const YIELDING: Duration = Duration::from_micros(500);
const SLEEP: Duration = Duration::from_micros(100);
/// The same of a wait that ends with a request.
const WAIT: Duration = Duration::from_millis(1);
/// How long ranks have to say that they are there when a deadline has passed.
const ROLL_CALL: Duration = Duration::from_secs(2);

/// A collective under way.
pub struct Flight {
    pub what: Announcement,
    stage: Stage,
    pub work: Work,
    /// Kept while the request may read it.
    _mine: Box<[u8; HEADER]>,
    headers: Box<[u8]>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Announced(Option<Request>),
    /// All ranks run it.
    Agreed,
    /// Its lane has moved on to it.
    Moving(Option<Request>),
    Done,
}

impl Flight {
    pub fn is_done(&self) -> bool {
        self.stage == Stage::Done
    }
}

/// What one communicator has under way. Used under its lock.
pub struct Flights {
    pub rank: usize,
    pub world: usize,
    timeout: Duration,
    pub table: Arc<dyn Collectives>,
    pub broken: Arc<Broken>,
    pub names: Vec<UnitName>,
    /// Collectives announced.
    pub issued: u64,
    pub flights: BTreeMap<u64, Flight>,
    peers: Peers,
}

impl Flights {
    pub fn new(
        table: Arc<dyn Collectives>,
        broken: Arc<Broken>,
        rank: usize,
        world: usize,
        timeout: Duration,
    ) -> Flights {
        let (names, flights, peers) = (Vec::new(), BTreeMap::new(), Peers::new(world));
        Flights { rank, world, timeout, table, broken, names, issued: 0, flights, peers }
    }

    /// Announces a collective and lets it begin, without waiting where the host can; returns its number.
    pub fn launch(&mut self, what: Announcement, own: u64, work: Work) -> Result<u64> {
        self.broken.check()?;
        let sequence = self.issued;
        let mine = Box::new(Header { sequence, what, own }.encode());
        let mut headers = vec![0; self.world * HEADER].into_boxed_slice();
        // SAFETY: both buffers belong to the flight, which stays until the request has ended.
        let started = unsafe { self.table.all_gather(Lane::Control, mine.as_ptr(), headers.as_mut_ptr(), HEADER) };
        self.issued += 1;
        let flight = Flight { what, stage: Stage::Agreed, work, _mine: mine, headers };
        self.flights.insert(sequence, flight);
        let request = started.map_err(|e| self.failed(sequence, e))?;
        self.flight(sequence).stage = Stage::Announced(request);
        self.advance()?;
        Ok(sequence)
    }

    /// Returns when the flight is done.
    pub fn land(&mut self, sequence: u64) -> Result<()> {
        let mut deadline = Instant::now() + self.timeout;
        let began = Instant::now();
        loop {
            if self.advance()? {
                deadline = Instant::now() + self.timeout;
            }
            if self.flights.get(&sequence).is_none_or(Flight::is_done) {
                return Ok(());
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(self.late());
            }
            match now - began < YIELDING {
                true => std::thread::yield_now(),
                false => {
                    self.require_present()?;
                    self.sleep()?;
                }
            }
        }
    }

    /// Removes a flight that is done.
    pub fn take(&mut self, sequence: u64) -> Result<Flight> {
        let done = self.flights.get(&sequence).is_some_and(Flight::is_done);
        let flight = if done { self.flights.remove(&sequence) } else { None };
        flight.ok_or_else(|| err!(InvalidState, "collective {sequence} is not one that has ended"))
    }

    /// Moves everything on as far as it goes without waiting. Whether anything has moved.
    pub fn advance(&mut self) -> Result<bool> {
        self.peers.hear(&self.broken, self.issued)?;
        self.broken.check()?;
        let mut taken = [false; LANES];
        let mut moved = false;
        let sequences: Vec<u64> = self.flights.iter().filter(|(_, f)| !f.is_done()).map(|(s, _)| *s).collect();
        for sequence in sequences {
            while self.step(sequence, &taken).map_err(|e| self.failed(sequence, e))? {
                moved = true;
            }
            let flight = self.flight(sequence);
            if matches!(flight.stage, Stage::Announced(_) | Stage::Agreed) || flight.work.is_between() {
                if let Some(lane) = flight.work.lane() {
                    taken[lane as usize] = true;
                }
            }
        }
        Ok(moved)
    }

    /// One step of a flight, if it can be taken now.
    fn step(&mut self, sequence: u64, taken: &[bool; LANES]) -> Result<bool> {
        let (table, names) = (&self.table, &self.names);
        let flight = self.flights.get_mut(&sequence).expect("a flight under way");
        let ended = |request: Option<Request>| request.map_or(Ok(true), |r| table.test(r));
        let next = match flight.stage {
            Stage::Announced(request) => {
                if !ended(request)? {
                    return Ok(false);
                }
                match announce::compare(&flight.headers, names)? {
                    Agreed::Same(own) => flight.work.agreed(own),
                    Agreed::Joined(what, own) => flight.work.joined(table.as_ref(), self.world, what, own)?,
                }
                Stage::Agreed
            }
            Stage::Agreed if flight.work.lane().is_some_and(|lane| taken[lane as usize]) => return Ok(false),
            Stage::Agreed => stage_of(flight.work.next(table.as_ref())?),
            Stage::Moving(request) => {
                if !ended(request)? {
                    return Ok(false);
                }
                stage_of(flight.work.next(table.as_ref())?)
            }
            Stage::Done => return Ok(false),
        };
        flight.stage = next;
        Ok(true)
    }

    fn flight(&mut self, sequence: u64) -> &mut Flight {
        self.flights.get_mut(&sequence).expect("a flight under way")
    }

    /// The error of a flight breaks the communicator.
    fn failed(&mut self, sequence: u64, e: Error) -> Error {
        // Another rank's error, if it has told of one, is the better explanation.
        let _ = self.peers.hear(&self.broken, self.issued);
        if let Some(broken) = self.broken.error() {
            return broken;
        }
        let what = self.flights.get(&sequence).map(|f| f.what.describe(&self.names)).unwrap_or_default();
        let found_by_all = e.status == crate::error::Status::Mismatch;
        let context = format!("rank {}: {what}", self.rank);
        self.broken.fail(if found_by_all { e } else { e.context(context) })
    }

    /// Sleeps a while, or until the oldest request has ended where the host can tell.
    fn sleep(&mut self) -> Result<()> {
        if self.table.can_wait() {
            let under_way = self.flights.iter_mut().find_map(|(sequence, f)| match &mut f.stage {
                Stage::Announced(request) | Stage::Moving(request) if request.is_some() => Some((*sequence, request)),
                _ => None,
            });
            if let Some((sequence, request)) = under_way {
                match request.map_or(Ok(true), |r| self.table.wait(r, WAIT)) {
                    Ok(true) => *request = None,
                    Ok(false) => {}
                    Err(e) => return Err(self.failed(sequence, e)),
                }
                return Ok(());
            }
        }
        std::thread::sleep(SLEEP);
        Ok(())
    }

    /// A rank that has left before it came to a collective under way.
    fn require_present(&self) -> Result<()> {
        let mut announced = self.flights.iter().filter(|(_, f)| matches!(f.stage, Stage::Announced(_)));
        let Some((sequence, flight)) = announced.next() else { return Ok(()) };
        match self.peers.left.iter().position(|left| left.is_some_and(|issued| issued <= *sequence)) {
            None => Ok(()),
            Some(rank) => {
                let (me, what) = (self.rank, flight.what.describe(&self.names));
                Err(self.broken.fail(err!(
                    Mismatch,
                    "rank {rank} has left (destroyed its communicator) while rank {me} waited for it in {what}"
                )))
            }
        }
    }

    /// The error for a deadline that has passed: who did not come, or what did not end.
    fn late(&mut self) -> Error {
        let Some((sequence, flight)) = self.flights.iter().find(|(_, f)| !f.is_done()) else {
            return err!(Timeout, "nothing is under way");
        };
        let (sequence, announced) = (*sequence, matches!(flight.stage, Stage::Announced(_)));
        let (me, ms, what) = (self.rank, self.timeout.as_millis(), flight.what.describe(&self.names));
        let others: Vec<usize> = (0..self.world).filter(|r| *r != me).collect();
        if self.table.has_messages() {
            self.call_the_roll();
            if let Some(broken) = self.broken.error() {
                return broken;
            }
        }
        let silent = |r: &usize| self.peers.answered[*r].is_none();
        let behind = |r: &usize| self.peers.answered[*r].is_none_or(|issued| issued <= sequence);
        let missing: Vec<usize> = match announced {
            true => others.into_iter().filter(behind).collect(),
            false => others.into_iter().filter(silent).collect(),
        };
        self.broken.fail(if !self.table.has_messages() {
            err!(Timeout, "{what} did not end within {ms} ms (rank {me} waited; the host lends no messages that would say for whom)")
        } else if missing.is_empty() {
            err!(Timeout, "{what} did not end within {ms} ms, though all ranks came (rank {me} waited)")
        } else if announced {
            err!(Timeout, "{} did not come to {what} within {ms} ms (rank {me} waited)", rank_list(&missing))
        } else {
            err!(Timeout, "{what} did not end within {ms} ms: {} no longer there (rank {me} waited)", rank_list(&missing))
        })
    }

    /// Asks the others whether they are there, and hears them for a while.
    fn call_the_roll(&mut self) {
        self.peers.answered.fill(None);
        self.broken.tell(&Message::Ask);
        let until = Instant::now() + ROLL_CALL.min(self.timeout);
        while Instant::now() < until && self.broken.error().is_none() {
            if self.peers.hear(&self.broken, self.issued).is_err() {
                return;
            }
            if (0..self.world).all(|r| r == self.rank || self.peers.answered[r].is_some()) {
                return;
            }
            std::thread::sleep(SLEEP);
        }
    }
}

/// What callbacks may still use, for as long as the process lives.
static KEPT: Mutex<Vec<(Flight, Arc<dyn Collectives>)>> = Mutex::new(Vec::new());

impl Drop for Flights {
    /// Memory that callbacks may still use, after an error, is never freed, nor is what they are called with.
    fn drop(&mut self) {
        for (_, flight) in std::mem::take(&mut self.flights) {
            if matches!(flight.stage, Stage::Announced(Some(_)) | Stage::Moving(Some(_))) {
                KEPT.lock().unwrap_or_else(PoisonError::into_inner).push((flight, self.table.clone()));
            }
        }
    }
}

fn stage_of(next: Next) -> Stage {
    match next {
        Next::Moving(request) => Stage::Moving(request),
        Next::Done => Stage::Done,
    }
}
