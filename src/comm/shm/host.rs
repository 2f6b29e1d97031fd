//! Control-plane collectives on the caller's memory, in chunks through the ranks' scratch areas.
//!
//! A chunk is one *step*: every rank writes its half of the scratch, arrives, and reads the others'. Halves alternate: a
//! rank writes a half again two steps later, after all have arrived at the step between, hence have read it.

use super::control::{Announcement, RankArea, SCRATCH};
use super::group::Group;
use super::wait::Wait;
use crate::comm::{combine, ReduceOp};
use crate::dtype::DType;
use crate::error::Result;
use std::sync::atomic::Ordering;

/// One control-plane collective in progress: counts this rank's steps.
pub struct Host<'a> {
    pub group: &'a Group,
    pub steps: &'a mut u64,
    pub what: &'a Announcement,
}

impl Host<'_> {
    /// This rank's half for the coming step.
    fn mine(&mut self) -> &mut [u8; SCRATCH] {
        let half = (*self.steps % 2) as usize;
        // SAFETY: only this rank writes its scratch, one thread at a time; the others have read this half (see above).
        unsafe { &mut *self.group.me().scratch[half].get() }
    }

    /// Rank `rank`'s half of the step that `arrive` completed last.
    fn of(&self, rank: usize) -> &[u8; SCRATCH] {
        let half = ((*self.steps + 1) % 2) as usize;
        // SAFETY: every rank has written this half before it arrived, and writes it next after this rank's next step.
        unsafe { &*self.group.control.rank(rank).scratch[half].get() }
    }

    /// Ends the writing of a step: returns when all ranks have arrived at it.
    fn arrive(&mut self) -> Result<()> {
        *self.steps += 1;
        let step = *self.steps;
        self.group.me().steps.0.store(step, Ordering::SeqCst);
        self.group.ring(self.group.rank);
        let arrived = |_: usize, area: &RankArea| area.steps.0.load(Ordering::Acquire) >= step;
        self.group.wait(&Wait { what: &|| self.group.describe(self.what), arrived: &arrived })
    }

    pub fn barrier(&mut self) -> Result<()> {
        self.arrive()
    }

    pub fn exchange(&mut self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.mine()[..8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.arrive()?;
        let length = |r: usize| u64::from_le_bytes(self.of(r)[..8].try_into().expect("eight bytes")) as usize;
        let lengths: Vec<usize> = (0..self.group.world).map(length).collect();
        let mut all: Vec<Vec<u8>> = vec![Vec::new(); self.group.world];
        let longest = lengths.iter().copied().max().unwrap_or(0);
        for start in (0..longest).step_by(SCRATCH) {
            let part = |len: usize| start.min(len)..(start + SCRATCH).min(len);
            let own = &bytes[part(bytes.len())];
            self.mine()[..own.len()].copy_from_slice(own);
            self.arrive()?;
            for (r, out) in all.iter_mut().enumerate() {
                out.extend_from_slice(&self.of(r)[..part(lengths[r]).len()]);
            }
        }
        Ok(all)
    }

    pub fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<()> {
        let sends = self.group.rank == root;
        for part in data.chunks_mut(SCRATCH) {
            if sends {
                self.mine()[..part.len()].copy_from_slice(part);
            }
            self.arrive()?;
            if !sends {
                part.copy_from_slice(&self.of(root)[..part.len()]);
            }
        }
        Ok(())
    }

    pub fn all_reduce(&mut self, data: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()> {
        for part in data.chunks_mut(SCRATCH) {
            self.mine()[..part.len()].copy_from_slice(part);
            self.arrive()?;
            let sources: Vec<&[u8]> = (0..self.group.world).map(|r| &self.of(r)[..part.len()]).collect();
            combine::combine(part, &sources, dtype, op);
        }
        Ok(())
    }

    pub fn all_gather(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        let n = input.len();
        for (i, part) in input.chunks(SCRATCH).enumerate() {
            self.mine()[..part.len()].copy_from_slice(part);
            self.arrive()?;
            for r in 0..self.group.world {
                let at = r * n + i * SCRATCH;
                output[at..at + part.len()].copy_from_slice(&self.of(r)[..part.len()]);
            }
        }
        Ok(())
    }

    pub fn reduce_scatter(&mut self, input: &[u8], output: &mut [u8], dtype: DType, op: ReduceOp) -> Result<()> {
        let (n, world, me) = (output.len(), self.group.world, self.group.rank);
        // A step carries the same piece of every rank's range; pieces are whole elements of any type.
        let piece = (SCRATCH / world) & !7;
        for (i, part) in output.chunks_mut(piece).enumerate() {
            let len = part.len();
            for r in 0..world {
                let from = r * n + i * piece;
                self.mine()[r * piece..r * piece + len].copy_from_slice(&input[from..from + len]);
            }
            self.arrive()?;
            let mine = me * piece..me * piece + len;
            let sources: Vec<&[u8]> = (0..world).map(|r| &self.of(r)[mine.clone()]).collect();
            combine::combine(part, &sources, dtype, op);
        }
        Ok(())
    }
}
