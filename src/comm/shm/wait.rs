//! Waiting for other ranks: a short spin, then sleep on the awaited rank's doorbell, in slices, so that an abort, a dead
//! process and the deadline are all seen.

use super::control::RankArea;
use super::group::Group;
use crate::error::{err, Error, Result};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest sleep between two looks at the other processes.
pub const SLICE: Duration = Duration::from_millis(50);

/// Sleeps while `*word == expected`, at most `limit`. Returns early on a wake, a signal, or another value.
fn futex_wait(word: &AtomicU32, expected: u32, limit: Duration) {
    let limit = libc::timespec { tv_sec: limit.as_secs() as _, tv_nsec: limit.subsec_nanos() as _ };
    // SAFETY: the word is live, 4-byte aligned memory; the timeout outlives the call. The word is shared between
    // processes, hence no FUTEX_PRIVATE_FLAG.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const limit) };
}

/// Wakes every process that sleeps on `word`.
pub fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word is live, 4-byte aligned memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Counts this process among those that sleep on a doorbell, while it lives.
struct Waiter<'a>(&'a AtomicU32);

impl<'a> Waiter<'a> {
    fn new(count: &'a AtomicU32) -> Waiter<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Waiter(count)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a wait is for. `arrived(rank, area)` must stay true once it is, until this rank goes on.
pub struct Wait<'a> {
    pub what: &'a dyn Fn() -> String,
    pub arrived: &'a dyn Fn(usize, &RankArea) -> bool,
}

impl Group {
    /// Returns when all others have arrived. Breaks the job when one is dead, has left, or does not come in time.
    pub fn wait(&self, wait: &Wait<'_>) -> Result<()> {
        let mut deadline = None;
        for peer in self.others() {
            let area = self.control.rank(peer);
            if (wait.arrived)(peer, area) || self.spin(|| (wait.arrived)(peer, area)) {
                continue;
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + self.timeout);
            self.sleep(wait, peer, deadline, None)?;
        }
        Ok(())
    }

    /// Returns when `peer` has arrived; false when it has not and `patience` is over.
    pub fn wait_for(&self, peer: usize, wait: &Wait<'_>, patience: Option<Duration>) -> Result<bool> {
        if (wait.arrived)(peer, self.control.rank(peer)) || self.spin(|| (wait.arrived)(peer, self.control.rank(peer)))
        {
            return Ok(true);
        }
        let now = Instant::now();
        self.sleep(wait, peer, now + self.timeout, patience.map(|p| now + p))
    }

    /// Whether it is ready before it is better to sleep.
    fn spin(&self, ready: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..16 {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.spin {
                return false;
            }
        }
    }

    fn sleep(&self, wait: &Wait<'_>, peer: usize, deadline: Instant, give_up: Option<Instant>) -> Result<bool> {
        let area = self.control.rank(peer);
        let door = &area.doorbell.0;
        let _waiter = Waiter::new(&door.waiters);
        let mut looked = Instant::now();
        loop {
            // The bell is read before the condition: a change in between makes the sleep return at once.
            let bell = door.bell.load(Ordering::SeqCst);
            let left = self.has_left(peer);
            if (wait.arrived)(peer, area) {
                return Ok(true);
            }
            self.check()?;
            if left {
                return Err(self.fail(self.left(peer, wait)));
            }
            let now = Instant::now();
            if now - looked >= SLICE || now >= deadline {
                looked = now;
                self.check_alive(&|| format!("while rank {} waited for {}", self.rank, self.awaited(peer, wait)))?;
            }
            if now >= deadline {
                return Err(self.fail(self.late(wait)));
            }
            if give_up.is_some_and(|g| now >= g) {
                return Ok(false);
            }
            futex_wait(&door.bell, bell, SLICE.min(deadline - now));
        }
    }

    fn awaited(&self, peer: usize, wait: &Wait<'_>) -> String {
        format!("rank {peer} in {}", (wait.what)())
    }

    /// The error for a rank that destroyed its communicator while it was needed.
    pub fn left(&self, peer: usize, wait: &Wait<'_>) -> Error {
        let (me, what) = (self.rank, (wait.what)());
        err!(Mismatch, "rank {peer} has left (destroyed its communicator) while rank {me} waited for it in {what}")
    }

    fn late(&self, wait: &Wait<'_>) -> Error {
        let missing: Vec<usize> = self.others().filter(|r| !(wait.arrived)(*r, self.control.rank(*r))).collect();
        let (me, ms, what) = (self.rank, self.timeout.as_millis(), (wait.what)());
        err!(Timeout, "{} did not come to {what} within {ms} ms (rank {me} waited)", rank_list(&missing))
    }
}

/// `rank 2`, or `ranks 1, 2`.
pub fn rank_list(ranks: &[usize]) -> String {
    let numbers: Vec<String> = ranks.iter().map(|r| r.to_string()).collect();
    format!("{} {}", if ranks.len() == 1 { "rank" } else { "ranks" }, numbers.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_futex_sleeps_no_longer_than_its_limit_and_not_on_another_value() {
        let word = AtomicU32::new(1);
        futex_wait(&word, 1, Duration::from_millis(5));
        futex_wait(&word, 0, Duration::from_secs(3600));
    }

    #[test]
    fn ranks_are_listed() {
        assert_eq!(rank_list(&[2]), "rank 2");
        assert_eq!(rank_list(&[1, 3]), "ranks 1, 3");
    }
}
