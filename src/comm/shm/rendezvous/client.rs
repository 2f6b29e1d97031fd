//! A rank's side of the rendezvous: connect to rank 0, greet, collect what it sends.

use super::wire::{Answer, Hello, Report, VERSION};
use super::{check_control, checked_peer, me, ms, socket_name, Hope, Mesh};
use crate::comm::shm::socket::{self, Received};
use crate::comm::shm::Config;
use crate::error::{err, Error, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// What rank 0 gets beyond this rank's own deadline to say why it failed.
const GRACE: Duration = Duration::from_secs(3);

/// Meets rank 0 and, through it, everybody.
pub fn join(config: &Config, deadline: Instant, hope: Hope<'_>) -> Result<Mesh> {
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(mesh) = attempt(config, deadline)? {
            return Ok(mesh);
        }
        hope()?;
        if Instant::now() >= deadline {
            return Err(err!(Rendezvous, "rank 0 of job {:?} did not appear within {} ms", config.job, ms(config)));
        }
        std::thread::sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// One try; `None` when nobody serves the job (yet, or any more).
pub fn attempt(config: &Config, deadline: Instant) -> Result<Option<Mesh>> {
    match dial(config, &socket_name(me(), &config.job), deadline)? {
        Some(connection) => attend(config, &connection, deadline),
        None => Ok(None),
    }
}

/// Connects and greets; `None` when nobody serves the name (yet, or any more).
fn dial(config: &Config, name: &str, deadline: Instant) -> Result<Option<OwnedFd>> {
    let connection = match socket::connect(name) {
        Ok(c) => c,
        Err(e) => match e.raw_os_error() {
            Some(libc::ECONNREFUSED | libc::EAGAIN | libc::EINTR) => return Ok(None),
            _ => return Err(Error::os(format_args!("connecting to rank 0 of job {:?}", config.job), e)),
        },
    };
    checked_peer(connection.as_fd(), &config.job)?;
    let hello = Hello {
        version: VERSION,
        rank: config.rank as u32,
        world: config.world_size as u32,
        pid: std::process::id(),
        remaining_ms: deadline.saturating_duration_since(Instant::now()).as_millis() as u64,
        job: config.job.clone(),
    };
    // A failed send is a server that just went away.
    Ok(socket::send(connection.as_fd(), &hello.encode(), None, deadline).ok().map(|_| connection))
}

/// Follows rank 0 to the end; `None` when it closed the connection before it took the greeting.
fn attend(config: &Config, connection: &OwnedFd, deadline: Instant) -> Result<Option<Mesh>> {
    let mut joined = false;
    let mut control = None;
    let mut peers: Vec<Option<(OwnedFd, u32)>> = (0..config.world_size).map(|_| None).collect();
    let mut reported = false;
    loop {
        let answer = match next(connection, deadline + GRACE)? {
            Received::Message(bytes, fd) => (Answer::decode(&bytes), fd),
            Received::Closed if !joined => return Ok(None),
            Received::Closed => {
                return Err(err!(Rendezvous, "rank 0 of job {:?} died during the rendezvous", config.job))
            }
            Received::Nothing if !joined => {
                let (job, ms) = (&config.job, ms(config));
                return Err(err!(Rendezvous, "rank 0 of job {job:?} did not answer within {ms} ms"));
            }
            Received::Nothing => {
                let (job, ms) = (&config.job, ms(config));
                return Err(err!(Rendezvous, "rank 0 of job {job:?} did not finish the rendezvous within {ms} ms"));
            }
        };
        match answer {
            (Some(Answer::Joined), _) => joined = true,
            (Some(Answer::Failed(e)), _) => return Err(e),
            (Some(Answer::Control), Some(fd)) => control = Some(fd),
            (Some(Answer::Peer { rank, pid }), Some(fd)) if (rank as usize) < peers.len() => {
                peers[rank as usize] = Some((fd, pid));
            }
            (Some(Answer::Go), _) if reported => {
                let control = control.ok_or_else(|| err!(Rendezvous, "rank 0 sent no control segment"))?;
                return Ok(Some(Mesh { control, peers }));
            }
            // A descriptor can be missing when this process may not open more.
            _ => return Err(refuse(connection, config, deadline)),
        }
        let complete = control.is_some() && peers.iter().flatten().count() == config.world_size - 1;
        if complete && !reported {
            if let Some(fd) = &control {
                check_control(fd, config.world_size)?;
            }
            reported = true;
            // If rank 0 is gone, the next receive says so.
            let _ = socket::send(connection.as_fd(), &Report::Ready.encode(), None, deadline + GRACE);
        }
    }
}

fn refuse(connection: &OwnedFd, config: &Config, deadline: Instant) -> Error {
    let e = err!(
        Rendezvous,
        "rank {} could not take what rank 0 of job {:?} sent (too few file descriptors: see ulimit -n; or another version)",
        config.rank,
        config.job
    );
    let _ = socket::send(connection.as_fd(), &Report::Failed(e.clone()).encode(), None, deadline + GRACE);
    e
}

/// The next message; `Nothing` when there is none until `deadline`.
fn next(connection: &OwnedFd, deadline: Instant) -> Result<Received> {
    let failed = |e| Error::os("hearing from rank 0", e);
    loop {
        match socket::receive(connection.as_fd()).map_err(failed)? {
            Received::Nothing if Instant::now() < deadline => {
                let mut p = [socket::pollfd(Some(connection.as_fd()), libc::POLLIN)];
                socket::poll(&mut p, deadline.saturating_duration_since(Instant::now())).map_err(failed)?;
            }
            other => return Ok(other),
        }
    }
}
