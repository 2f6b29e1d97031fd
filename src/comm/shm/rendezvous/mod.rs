//! How the processes of a job find each other. Rank 0 serves an abstract unix socket whose name follows from the user
//! and the job; the others connect, say who they are, and get the control segment and a socket to every other rank.
//!
//! Whatever goes wrong is told to every rank that is connected (and for a moment to those that come late), so that all
//! fail with the same message. The kernel vouches for the user at both ends; another user is refused.

use super::{segment, Config};
use crate::error::{err, Error, Result};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

mod client;
mod server;
#[cfg(test)]
mod tests;
mod wire;

/// What the rendezvous gives a rank.
pub struct Mesh {
    /// The control segment.
    pub control: OwnedFd,
    /// The socket to every other rank, with its process id; `None` for this rank.
    pub peers: Vec<Option<(OwnedFd, u32)>>,
}

/// Asked now and then whether waiting for ranks that have not come yet still makes sense.
pub type Hope<'a> = &'a dyn Fn() -> Result<()>;
/// How often.
const SLICE: Duration = Duration::from_millis(50);

/// Meets the other ranks. The config has been checked, except for the rank. An error of `hope` ends the waiting.
pub fn meet(config: &Config, hope: Hope<'_>) -> Result<Mesh> {
    let deadline = Instant::now() + config.rendezvous_timeout;
    let (rank, world) = (config.rank, config.world_size);
    if rank >= world {
        // Tells a waiting rank 0, so that the job fails at once and not at its deadline.
        let soon = deadline.min(Instant::now() + Duration::from_millis(300));
        let _ = client::join(config, soon, hope);
        return Err(err!(InvalidArgument, "rank {rank} is out of range for world size {world}"));
    }
    if world == 1 {
        let control = control_segment(1)?;
        return Ok(Mesh { control, peers: vec![None] });
    }
    match rank {
        0 => server::serve(config, deadline, hope),
        _ => client::join(config, deadline, hope),
    }
}

fn me() -> u32 {
    // SAFETY: takes no argument, cannot fail.
    unsafe { libc::geteuid() }
}

/// The abstract name of a job of user `uid`. Job names are hashed (FNV-1a); a collision is found by the greeting, which
/// carries the whole name.
fn socket_name(uid: u32, job: &str) -> String {
    let hash = job.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3));
    format!("fsdp-{uid}-{hash:016x}")
}

/// The process at the other end, which must be of this process's user.
fn checked_peer(fd: BorrowedFd<'_>, job: &str) -> Result<u32> {
    let (pid, uid) = super::socket::peer(fd).map_err(|e| Error::os("asking who is at a socket's other end", e))?;
    if uid != me() {
        return Err(err!(
            Rendezvous,
            "job {job:?}: refused a process of user {uid} (pid {pid}); this one is of user {}",
            me()
        ));
    }
    Ok(pid)
}

/// Milliseconds of a rendezvous timeout, for messages.
fn ms(config: &Config) -> u128 {
    config.rendezvous_timeout.as_millis()
}

fn control_segment(world: usize) -> Result<OwnedFd> {
    segment::create(c"fsdp-control", super::control::Control::bytes(world), true)
}

fn check_control(fd: &OwnedFd, world: usize) -> Result<()> {
    segment::check_size(fd.as_fd(), super::control::Control::bytes(world))
}
