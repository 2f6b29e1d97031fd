//! Collective allocation: rank 0 makes a segment and hands its descriptor to the others over their sockets.

use super::control::{Announcement, RankArea};
use super::group::Group;
use super::wait::{Wait, SLICE};
use super::{segment, socket};
use crate::error::{err, Error, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

/// Allocation number `id` of `bytes`. An error here is this rank's; the caller makes it everybody's.
pub fn segment(group: &Group, what: &Announcement, id: u64, bytes: usize, reserve: bool) -> Result<OwnedFd> {
    match group.rank {
        0 => give(group, id, bytes, reserve),
        _ => take(group, what, id, bytes),
    }
}

fn give(group: &Group, id: u64, bytes: usize, reserve: bool) -> Result<OwnedFd> {
    let fd = segment::create(c"fsdp", bytes, reserve)?;
    let deadline = Instant::now() + group.timeout;
    for peer in group.others() {
        let Some(to) = group.socket(peer) else { continue };
        if let Err(e) = socket::send(to, &id.to_le_bytes(), Some(fd.as_fd()), deadline) {
            // A dead process is the better explanation, where there is one.
            group.check_alive(&|| format!("while rank 0 sent rank {peer} shared memory"))?;
            return Err(Error::os(format_args!("sending shared memory to rank {peer}"), e));
        }
    }
    Ok(fd)
}

fn take(group: &Group, what: &Announcement, id: u64, bytes: usize) -> Result<OwnedFd> {
    let from = group.socket(0).ok_or_else(|| err!(InvalidState, "no socket to rank 0"))?;
    let describe = || group.describe(what);
    let wait = Wait { what: &describe, arrived: &|_: usize, _: &RankArea| false };
    let deadline = Instant::now() + group.timeout;
    loop {
        group.check()?;
        let left = group.has_left(0);
        let failed = |e| Error::os("receiving shared memory from rank 0", e);
        match socket::receive(from).map_err(failed)? {
            socket::Received::Message(message, Some(fd)) if message == id.to_le_bytes() => {
                segment::check_size(fd.as_fd(), bytes)?;
                return Ok(fd);
            }
            socket::Received::Message(..) => return Err(err!(Io, "rank 0 sent something else than allocation {id}")),
            socket::Received::Closed | socket::Received::Nothing => {}
        }
        if left {
            return Err(group.left(0, &wait));
        }
        if Instant::now() >= deadline {
            let ms = group.timeout.as_millis();
            return Err(err!(Timeout, "rank 0 did not come to {} within {ms} ms", describe()));
        }
        // Ranks that have left have a readable end for ever; they are not looked at.
        let watched = |r: &usize| !group.has_left(*r);
        let entry = |r: usize| {
            let events = libc::POLLRDHUP | if r == 0 { libc::POLLIN } else { 0 };
            socket::pollfd(Some(r).filter(watched).and_then(|r| group.socket(r)), events)
        };
        let mut polls: Vec<_> = (0..group.world).map(entry).collect();
        socket::poll(&mut polls, SLICE).map_err(|e| Error::os("waiting for rank 0", e))?;
        if polls[0].revents & libc::POLLIN == 0 || polls[0].revents & libc::POLLHUP != 0 {
            group.judge(&polls, &|| format!("while rank {} waited for rank 0 in {}", group.rank, describe()))?;
        }
    }
}
