//! The order check: every collective is announced in the rank's ring and compared with what the others announced at the
//! same place. Whoever comes later sees both, so a difference is found without waiting.

use super::control::{Announcement, RankArea, RING};
use super::group::Group;
use super::wait::Wait;
use crate::error::{err, Result};
use std::sync::atomic::Ordering;

impl Group {
    /// Announces this rank's next collective, number `sequence`. Waits only for a rank that is a whole ring behind.
    pub fn announce(&self, sequence: u64, mine: &Announcement) -> Result<()> {
        self.check()?;
        if sequence >= RING as u64 {
            // The entry to be overwritten belongs to `sequence - RING`. A rank has compared it for sure once it has
            // announced the one after it.
            let needed = sequence - RING as u64 + 2;
            let arrived = |_: usize, area: &RankArea| area.issued.0.load(Ordering::SeqCst) >= needed;
            self.wait(&Wait { what: &|| self.describe(mine), arrived: &arrived })?;
        }
        let slot = sequence as usize % RING;
        self.me().ring[slot].store(mine);
        // SeqCst on both sides: of two ranks that announce at once, at least one sees the other.
        self.me().issued.0.store(sequence + 1, Ordering::SeqCst);
        for peer in self.others() {
            let area = self.control.rank(peer);
            if area.issued.0.load(Ordering::SeqCst) <= sequence {
                continue;
            }
            let theirs = area.ring[slot].load();
            if theirs.as_ref() != Some(mine) {
                return Err(self.disagree(sequence, mine, peer, theirs));
            }
        }
        self.ring(self.rank);
        Ok(())
    }

    fn disagree(
        &self,
        seq: u64,
        mine: &Announcement,
        peer: usize,
        theirs: Option<Announcement>,
    ) -> crate::error::Error {
        let theirs = theirs.map_or("something unreadable".to_string(), |a| self.describe(&a));
        let mut sides = [(self.rank, self.describe(mine)), (peer, theirs)];
        sides.sort();
        let [(a, does_a), (b, does_b)] = sides;
        self.fail(err!(
            Mismatch,
            "ranks disagree at collective {seq}: rank {a} runs {does_a} but rank {b} runs {does_b}"
        ))
    }

    /// What an announcement means, with the unit's name.
    pub fn describe(&self, a: &Announcement) -> String {
        a.describe(&self.names())
    }
}
