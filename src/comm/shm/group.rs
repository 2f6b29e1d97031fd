//! A rank's view of the job after the rendezvous: the control segment, a socket to every peer, and the one error that
//! may break all of it.

use super::control::{Control, RankArea, MESSAGE};
use super::rendezvous::Mesh;
use super::socket;
use crate::comm::UnitName;
use crate::error::{err, Error, Result, Status};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

const NONE: u32 = 0;
const WRITING: u32 = 1;
const READABLE: u32 = 2;

pub struct Group {
    pub rank: usize,
    pub world: usize,
    pub timeout: Duration,
    pub control: Control,
    /// A socket and the process id of every other rank; the socket's end is the process's end.
    peers: Vec<Option<(OwnedFd, u32)>>,
    names: Mutex<Vec<UnitName>>,
    /// How long waits spin before they sleep: about as long as a sleep and its wake take, unless the awaited rank may need
    /// this one's core.
    pub spin: Duration,
}

impl Group {
    pub fn new(rank: usize, timeout: Duration, mesh: Mesh) -> Result<Group> {
        let world = mesh.peers.len();
        let control = Control::map(mesh.control.as_fd(), world)?;
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let spin = if world <= cores { Duration::from_micros(50) } else { Duration::from_nanos(500) };
        let names = Mutex::new(Vec::new());
        Ok(Group { rank, world, timeout, control, peers: mesh.peers, names, spin })
    }

    pub fn me(&self) -> &RankArea {
        self.control.rank(self.rank)
    }

    /// All ranks but this one.
    pub fn others(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.world).filter(|r| *r != self.rank)
    }

    pub fn pid(&self, rank: usize) -> u32 {
        self.peers[rank].as_ref().map_or_else(std::process::id, |p| p.1)
    }

    pub fn socket(&self, rank: usize) -> Option<BorrowedFd<'_>> {
        self.peers[rank].as_ref().map(|p| p.0.as_fd())
    }

    /// The names of the units, for messages.
    pub fn names(&self) -> MutexGuard<'_, Vec<UnitName>> {
        self.names.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Whether `rank` has destroyed its communicator.
    pub fn has_left(&self, rank: usize) -> bool {
        self.control.rank(rank).left.0.load(Ordering::SeqCst) != 0
    }

    /// Marks this rank as gone, of its own will.
    pub fn leave(&self) {
        self.me().left.0.store(1, Ordering::SeqCst);
        self.ring(self.rank);
    }

    /// Wakes whoever waits for `rank`. Called after what they wait for was stored.
    pub fn ring(&self, rank: usize) {
        let door = &self.control.rank(rank).doorbell.0;
        door.bell.fetch_add(1, Ordering::SeqCst);
        if door.waiters.load(Ordering::SeqCst) > 0 {
            super::wait::futex_wake(&door.bell);
        }
    }

    /// The error that broke the job, if there is one.
    pub fn broken(&self) -> Option<Error> {
        let record = &self.control.header().abort;
        if record.state.load(Ordering::Acquire) == NONE {
            return None;
        }
        // The writer needs microseconds; only its death makes this long.
        let patience = Instant::now() + Duration::from_millis(200);
        while record.state.load(Ordering::Acquire) == WRITING {
            if Instant::now() > patience {
                return Some(err!(PeerDied, "a rank died while it reported an error"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let len = (record.len.load(Ordering::Relaxed) as usize).min(MESSAGE);
        let bytes: Vec<u8> = record.message[..len].iter().map(|b| b.load(Ordering::Relaxed)).collect();
        let status = Status::from_code(record.status.load(Ordering::Relaxed)).unwrap_or(Status::Aborted);
        Some(Error::new(status, String::from_utf8_lossy(&bytes)))
    }

    /// An error if the job is broken.
    pub fn check(&self) -> Result<()> {
        match self.broken() {
            None => Ok(()),
            Some(e) => Err(e),
        }
    }

    /// Breaks the job on every rank with `error`, unless it is broken already; returns the error that counts.
    pub fn fail(&self, error: Error) -> Error {
        let record = &self.control.header().abort;
        if record.state.compare_exchange(NONE, WRITING, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            let mut len = error.message.len().min(MESSAGE);
            while !error.message.is_char_boundary(len) {
                len -= 1;
            }
            for (to, from) in record.message.iter().zip(&error.message.as_bytes()[..len]) {
                to.store(*from, Ordering::Relaxed);
            }
            record.len.store(len as u32, Ordering::Relaxed);
            record.status.store(error.status as i32, Ordering::Relaxed);
            record.state.store(READABLE, Ordering::SeqCst);
            (0..self.world).for_each(|r| self.ring(r));
        }
        self.broken().unwrap_or(error)
    }

    /// Asks the kernel whether every peer that has not left is alive; `doing` ends the sentence about one that died.
    pub fn check_alive(&self, doing: &dyn Fn() -> String) -> Result<()> {
        let mut polls: Vec<_> = (0..self.world).map(|r| socket::pollfd(self.socket(r), libc::POLLRDHUP)).collect();
        socket::poll(&mut polls, Duration::ZERO).map_err(|e| self.fail(Error::os("watching the other ranks", e)))?;
        self.judge(&polls, doing)
    }

    /// The same from the result of a poll over all ranks' sockets.
    pub fn judge(&self, polls: &[libc::pollfd], doing: &dyn Fn() -> String) -> Result<()> {
        // A rank marks that it leaves before its socket closes, so the mark is looked at afterwards.
        match (0..self.world).find(|r| socket::hung_up(&polls[*r]) && !self.has_left(*r)) {
            None => Ok(()),
            Some(dead) => Err(self.fail(err!(PeerDied, "rank {dead} (pid {}) died {}", self.pid(dead), doing()))),
        }
    }
}
