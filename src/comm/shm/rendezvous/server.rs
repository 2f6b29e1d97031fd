//! Rank 0's side of the rendezvous: take greetings until every rank is there, then hand out the mesh.

use super::wire::{Answer, Hello, Report, VERSION};
use super::{checked_peer, client, control_segment, me, ms, socket_name, Hope, Mesh, SLICE};
use crate::comm::shm::socket::{self, Received};
use crate::comm::shm::wait::rank_list;
use crate::comm::shm::Config;
use crate::error::{err, Error, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long a failed rendezvous tells late ranks why it failed.
const LINGER: Duration = Duration::from_secs(2);
/// Connections that have not greeted yet; the oldest makes room.
const MAX_PENDING: usize = 128;
/// Time for the exchange of descriptors once all ranks are there.
const HANDOUT: Duration = Duration::from_secs(30);

struct Joined {
    fd: OwnedFd,
    pid: u32,
}

pub(super) struct Server<'a> {
    config: &'a Config,
    started: Instant,
    deadline: Instant,
    listener: OwnedFd,
    /// By rank; rank 0 is this process.
    joined: Vec<Option<Joined>>,
    /// Connected, not yet greeted, with the process at the other end.
    pending: Vec<(OwnedFd, u32)>,
    /// Ranks that were told of a failure.
    told: Vec<bool>,
}

pub fn serve(config: &Config, deadline: Instant, hope: Hope<'_>) -> Result<Mesh> {
    let name = socket_name(me(), &config.job);
    let listener = loop {
        match socket::listen(&name) {
            Ok(l) => break l,
            Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) => {}
            Err(e) => return Err(Error::os(format_args!("serving job {:?}", config.job), e)),
        }
        // Tells the process that serves the name, which answers why this one cannot; or it is just closing.
        let soon = deadline.min(Instant::now() + Duration::from_secs(2));
        client::attempt(config, soon)?;
        hope()?;
        std::thread::sleep(Duration::from_millis(5));
        if Instant::now() >= deadline {
            let (job, ms) = (&config.job, ms(config));
            return Err(err!(Rendezvous, "another process already serves as rank 0 of job {job:?}, for {ms} ms"));
        }
    };
    let mut server = Server::new(config, deadline, listener);
    let met = server.gather(hope).and_then(|()| server.hand_out());
    if let Err(e) = &met {
        server.tell(e);
    }
    met
}

impl Server<'_> {
    fn new(config: &Config, deadline: Instant, listener: OwnedFd) -> Server<'_> {
        let joined = (0..config.world_size).map(|_| None).collect();
        let mut told = vec![false; config.world_size];
        told[0] = true;
        Server { config, started: Instant::now(), deadline, listener, joined, pending: Vec::new(), told }
    }

    fn missing(&self) -> Vec<usize> {
        (1..self.joined.len()).filter(|r| self.joined[*r].is_none()).collect()
    }

    /// Returns when every rank has joined.
    fn gather(&mut self, hope: Hope<'_>) -> Result<()> {
        loop {
            let missing = self.missing();
            if missing.is_empty() {
                return Ok(());
            }
            let now = Instant::now();
            if now >= self.deadline {
                let (list, job, ms) = (rank_list(&missing), &self.config.job, self.started.elapsed().as_millis());
                return Err(err!(Rendezvous, "{list} of job {job:?} did not appear within {ms} ms"));
            }
            self.poll(SLICE.min(self.deadline - now))?;
            hope()?;
            self.accept()?;
            for (hello, fd, pid) in self.greetings() {
                self.judge(hello, fd, pid)?;
            }
            self.check_joined()?;
        }
    }

    /// Sleeps until something can be read.
    fn poll(&self, limit: Duration) -> Result<()> {
        let sockets = [&self.listener].into_iter().chain(self.pending.iter().map(|p| &p.0));
        let sockets = sockets.chain(self.joined.iter().flatten().map(|j| &j.fd));
        let mut polls: Vec<_> = sockets.map(|s| socket::pollfd(Some(s.as_fd()), libc::POLLIN)).collect();
        socket::poll(&mut polls, limit).map_err(|e| Error::os("waiting for the other ranks", e))
    }

    /// Takes waiting connections. Those of another user are told so and dropped.
    fn accept(&mut self) -> Result<()> {
        let failed = |e| Error::os(format_args!("accepting ranks of job {:?}", self.config.job), e);
        while let Some(fd) = socket::accept(self.listener.as_fd()).map_err(failed)? {
            match checked_peer(fd.as_fd(), &self.config.job) {
                Ok(pid) => self.pending.push((fd, pid)),
                Err(e) => answer(&fd, &Answer::Failed(e), Instant::now()),
            }
            if self.pending.len() > MAX_PENDING {
                self.pending.remove(0);
            }
        }
        Ok(())
    }

    /// The greetings that have come; connections that sent anything else are dropped.
    fn greetings(&mut self) -> Vec<(Hello, OwnedFd, u32)> {
        let mut greetings = Vec::new();
        for (fd, pid) in std::mem::take(&mut self.pending) {
            match socket::receive(fd.as_fd()) {
                Ok(Received::Nothing) => self.pending.push((fd, pid)),
                Ok(Received::Message(bytes, _)) => {
                    if let Some(hello) = Hello::decode(&bytes) {
                        // Zero: a process that this one's namespace does not show.
                        let pid = if pid == 0 { hello.pid } else { pid };
                        greetings.push((hello, fd, pid));
                    }
                }
                Ok(Received::Closed) | Err(_) => {}
            }
        }
        greetings
    }

    /// Lets a rank join, refuses a stranger, or fails because the ranks do not fit together.
    fn judge(&mut self, hello: Hello, fd: OwnedFd, pid: u32) -> Result<()> {
        let Config { job, world_size: world, .. } = self.config;
        if hello.version != VERSION || hello.job != *job {
            let (v, theirs) = (hello.version, hello.job);
            let e = err!(
                Rendezvous,
                "job {job:?} (protocol {VERSION}) refused a process (pid {pid}) of job {theirs:?} (protocol {v})"
            );
            answer(&fd, &Answer::Failed(e), Instant::now());
            return Ok(());
        }
        let rank = hello.rank as usize;
        let wrong = if hello.world as usize != *world {
            let theirs = hello.world;
            Some(err!(
                Rendezvous,
                "job {job:?}: rank 0 has world size {world} but rank {rank} (pid {pid}) has world size {theirs}"
            ))
        } else if rank >= *world {
            Some(err!(Rendezvous, "job {job:?}: rank {rank} (pid {pid}) is out of range for world size {world}"))
        } else {
            let first = if rank == 0 { Some(std::process::id()) } else { self.joined[rank].as_ref().map(|j| j.pid) };
            first.map(|first| {
                err!(Rendezvous, "job {job:?}: two processes say they are rank {rank}: pid {first} and pid {pid}")
            })
        };
        if let Some(e) = wrong {
            answer(&fd, &Answer::Failed(e.clone()), Instant::now());
            return Err(e);
        }
        answer(&fd, &Answer::Joined, Instant::now());
        // All give up together: when the least patient rank does.
        if let Some(theirs) = Instant::now().checked_add(Duration::from_millis(hello.remaining_ms)) {
            self.deadline = self.deadline.min(theirs);
        }
        self.joined[rank] = Some(Joined { fd, pid });
        Ok(())
    }

    /// Ranks that have joined say nothing until they are given something: what can be read is their end.
    fn check_joined(&self) -> Result<()> {
        for (rank, j) in self.joined.iter().enumerate().filter_map(|(r, j)| Some((r, j.as_ref()?))) {
            if !matches!(socket::receive(j.fd.as_fd()), Ok(Received::Nothing)) {
                let (job, pid) = (&self.config.job, j.pid);
                return Err(err!(Rendezvous, "job {job:?}: rank {rank} (pid {pid}) died before all ranks were there"));
            }
        }
        Ok(())
    }

    /// Gives every rank the control segment and a socket to every other rank.
    fn hand_out(&mut self) -> Result<Mesh> {
        let world = self.config.world_size;
        let limit = Instant::now() + HANDOUT;
        let control = control_segment(world)?;
        let mut peers = vec![None];
        for rank in 1..world {
            self.give(rank, &Answer::Control, &control, limit)?;
        }
        let pid = |r: usize| self.joined[r].as_ref().map_or_else(std::process::id, |j| j.pid);
        for high in 1..world {
            for low in 0..high {
                let (a, b) = socket::pair().map_err(|e| {
                    Error::os(format_args!("making the socket between ranks {low} and {high} (see ulimit -n)"), e)
                })?;
                self.give(high, &Answer::Peer { rank: low as u32, pid: pid(low) }, &b, limit)?;
                if low == 0 {
                    peers.push(Some((a, pid(high))));
                } else {
                    self.give(low, &Answer::Peer { rank: high as u32, pid: pid(high) }, &a, limit)?;
                }
            }
        }
        for rank in 1..world {
            self.await_report(rank, limit)?;
        }
        for j in self.joined.iter().flatten() {
            answer(&j.fd, &Answer::Go, limit);
        }
        Ok(Mesh { control, peers })
    }

    fn give(&self, rank: usize, what: &Answer, fd: &OwnedFd, limit: Instant) -> Result<()> {
        let Some(j) = &self.joined[rank] else { return Ok(()) };
        socket::send(j.fd.as_fd(), &what.encode(), Some(fd.as_fd()), limit).map_err(|e| {
            let (job, pid) = (&self.config.job, j.pid);
            err!(Rendezvous, "job {job:?}: rank {rank} (pid {pid}) did not take its sockets: {e}")
        })
    }

    fn await_report(&self, rank: usize, limit: Instant) -> Result<()> {
        let Some(j) = &self.joined[rank] else { return Ok(()) };
        let (job, pid) = (&self.config.job, j.pid);
        loop {
            match socket::receive(j.fd.as_fd()) {
                Ok(Received::Message(bytes, _)) => {
                    return match Report::decode(&bytes) {
                        Some(Report::Ready) => Ok(()),
                        Some(Report::Failed(e)) => Err(e),
                        None => Err(err!(Rendezvous, "job {job:?}: rank {rank} (pid {pid}) sent nonsense")),
                    }
                }
                Ok(Received::Nothing) if Instant::now() < limit => {
                    let mut p = [socket::pollfd(Some(j.fd.as_fd()), libc::POLLIN)];
                    let left = limit.saturating_duration_since(Instant::now());
                    socket::poll(&mut p, left).map_err(|e| Error::os("waiting for the other ranks", e))?;
                }
                _ => return Err(err!(Rendezvous, "job {job:?}: rank {rank} (pid {pid}) died during the rendezvous")),
            }
        }
    }

    /// Tells every rank why the rendezvous failed: those that are here, and for a moment those that still come.
    fn tell(&mut self, e: &Error) {
        let failure = Answer::Failed(e.clone());
        for (rank, j) in self.joined.iter().enumerate().filter_map(|(r, j)| Some((r, j.as_ref()?))) {
            answer(&j.fd, &failure, Instant::now());
            self.told[rank] = true;
        }
        self.joined.iter_mut().for_each(|j| *j = None);
        let end = self.deadline.min(Instant::now() + LINGER);
        while self.told.contains(&false) && Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            if self.poll(left).and_then(|()| self.accept()).is_err() {
                return;
            }
            for (hello, fd, _) in self.greetings() {
                if hello.job == self.config.job {
                    answer(&fd, &failure, Instant::now());
                    if let Some(told) = self.told.get_mut(hello.rank as usize) {
                        *told = true;
                    }
                }
            }
        }
    }
}

/// Sends an answer to somebody who may be gone; then there is nothing to do about it.
fn answer(fd: &OwnedFd, what: &Answer, deadline: Instant) {
    let _ = socket::send(fd.as_fd(), &what.encode(), None, deadline);
}
