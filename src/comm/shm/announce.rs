//! The order check: every collective is announced in the rank's ring and compared with what the others announced at the
//! same place. Whoever comes later sees both, so a difference is found without waiting.

use super::control::{Announcement, RankArea, RING};
use super::group::Group;
use super::wait::Wait;
use crate::comm::Kind;
use crate::error::{err, Result};
use std::sync::atomic::Ordering;

impl Group {
    /// Announces this rank's next collective, number `sequence`. Waits for a rank that is a whole ring behind, and with
    /// `together` until all have announced theirs, so that a difference is an error of this very call on every rank.
    pub fn announce(&self, sequence: u64, mine: &Announcement, together: bool) -> Result<()> {
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
        self.ring(self.rank);
        self.compare(sequence, mine)?;
        if together {
            let arrived = |_: usize, area: &RankArea| area.issued.0.load(Ordering::SeqCst) > sequence;
            self.wait(&Wait { what: &|| self.describe(mine), arrived: &arrived })?;
            self.compare(sequence, mine)?;
        }
        Ok(())
    }

    /// Compares with the ranks that have announced number `sequence` by now.
    fn compare(&self, sequence: u64, mine: &Announcement) -> Result<()> {
        for peer in self.others() {
            let area = self.control.rank(peer);
            if area.issued.0.load(Ordering::SeqCst) <= sequence {
                continue;
            }
            let theirs = area.ring[sequence as usize % RING].load();
            if theirs.as_ref() != Some(mine) {
                return Err(self.disagree(sequence, mine, peer, theirs));
            }
        }
        Ok(())
    }

    fn disagree(
        &self,
        seq: u64,
        mine: &Announcement,
        peer: usize,
        theirs: Option<Announcement>,
    ) -> crate::error::Error {
        let forward = [Some(*mine), theirs].iter().flatten().any(|a| a.tag.kind == Kind::ForwardAllGather);
        let theirs = theirs.map_or("something unreadable".to_string(), |a| self.describe_fully(&a));
        let mut sides = [(self.rank, self.describe_fully(mine)), (peer, theirs)];
        sides.sort();
        let [(a, does_a), (b, does_b)] = sides;
        let what = if forward { "Forward order differs across ranks" } else { "ranks disagree" };
        self.fail(err!(Mismatch, "{what}: at collective {seq} rank {a} runs {does_a} but rank {b} runs {does_b}"))
    }

    /// What an announcement means, with the unit's name.
    pub fn describe(&self, a: &Announcement) -> String {
        a.describe(&self.names())
    }

    /// The same with the names of the unit's parameters.
    fn describe_fully(&self, a: &Announcement) -> String {
        let names = self.names();
        let params = names.get(a.tag.unit as usize).map(|n| n.params.as_str()).filter(|p| !p.is_empty());
        a.describe(&names) + &params.map_or(String::new(), |p| format!(" with parameters {p}"))
    }
}
