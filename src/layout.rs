//! The planner: where each parameter of a unit lies in the unit buffer, and how the buffer is cut over the ranks.
//!
//! Pure arithmetic, in elements. Parameters lie in order of registration, each at a multiple of [`PARAM_ALIGN`] bytes;
//! the buffer is padded so that it cuts into equal shards of a multiple of [`CUT_ALIGN`] bytes. A parameter's piece on
//! a rank is the (maybe empty) range of it that falls into that rank's shard, so shards may cut through parameters:
//! the flat layout of ZeRO-3 (Rajbhandari et al., arXiv 1910.02054) and of FSDP1's flat parameter.

use std::ops::Range;

/// Parameters start on a cache line, as in memory that LibTorch allocates: kernels that pick code by alignment then
/// give the same bits as for an unsharded parameter.
pub const PARAM_ALIGN: usize = 64;

/// A rank's piece that is not a multiple of 16 bytes loses vector access and is slow in NCCL (nccl#413).
pub const CUT_ALIGN: usize = 16;

/// The layout of one unit; the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitLayout {
    /// First element of each parameter in the unit buffer.
    pub offsets: Vec<usize>,
    /// Elements of each parameter.
    pub numels: Vec<usize>,
    /// Elements of a rank's shard.
    pub shard_len: usize,
    /// Elements of the unit buffer: `world_size * shard_len`.
    pub len: usize,
}

/// A parameter's piece on one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First element of the piece in the unit buffer.
    pub unit_offset: usize,
    /// First element of the piece in the flattened parameter (0 when empty).
    pub param_offset: usize,
    /// Elements; 0 when nothing of the parameter is on this rank.
    pub len: usize,
}

impl UnitLayout {
    /// Plans a unit of parameters of `numels` elements of `size` bytes over `world_size` ranks.
    pub fn plan(numels: &[usize], size: usize, world_size: usize) -> UnitLayout {
        let align = (PARAM_ALIGN / size).max(1);
        let mut offsets = Vec::with_capacity(numels.len());
        let mut end = 0usize;
        for n in numels {
            let start = end.next_multiple_of(align);
            offsets.push(start);
            if *n > 0 {
                end = start + n;
            }
        }
        let shard_len = end.div_ceil(world_size).next_multiple_of((CUT_ALIGN / size).max(1));
        UnitLayout { offsets, numels: numels.to_vec(), shard_len, len: shard_len * world_size }
    }

    /// The unit buffer's range that is `rank`'s shard.
    pub fn shard(&self, rank: usize) -> Range<usize> {
        rank * self.shard_len..(rank + 1) * self.shard_len
    }

    /// The piece of parameter `index` in `rank`'s shard.
    pub fn piece(&self, index: usize, rank: usize) -> Piece {
        let shard = self.shard(rank);
        let start = self.offsets[index];
        let from = start.max(shard.start);
        let to = (start + self.numels[index]).min(shard.end);
        if from >= to {
            return Piece { unit_offset: shard.start, param_offset: 0, len: 0 };
        }
        Piece { unit_offset: from, param_offset: from - start, len: to - from }
    }

    /// Elements of the unit buffer that belong to no parameter.
    pub fn padding(&self) -> usize {
        self.len - self.numels.iter().sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_unit_without_elements_has_an_empty_buffer() {
        for numels in [&[][..], &[0, 0][..]] {
            let l = UnitLayout::plan(numels, 4, 3);
            assert_eq!((l.len, l.shard_len, l.padding()), (0, 0, 0));
        }
    }

    #[test]
    fn a_parameter_smaller_than_the_world_leaves_empty_shards() {
        let l = UnitLayout::plan(&[3], 4, 4);
        assert_eq!(l.shard_len, 4);
        assert_eq!(l.piece(0, 0).len, 3);
        assert!((1..4).all(|r| l.piece(0, r).len == 0));
    }

    proptest! {
        /// Every element of every parameter is on exactly one rank, in order; cuts and starts are aligned; parameters
        /// do not overlap; padding is bounded.
        #[test]
        fn pieces_partition_every_parameter(
            numels in prop::collection::vec(0usize..700, 0..12),
            world_size in 1usize..9,
            size in prop::sample::select(vec![1usize, 2, 4, 8]),
        ) {
            let l = UnitLayout::plan(&numels, size, world_size);
            prop_assert_eq!(l.len, l.shard_len * world_size);
            prop_assert_eq!(l.shard_len * size % CUT_ALIGN, 0);
            let mut end = 0;
            for (i, n) in numels.iter().enumerate() {
                let mut next = 0;
                for r in 0..world_size {
                    let p = l.piece(i, r);
                    if p.len > 0 {
                        prop_assert_eq!(p.param_offset, next);
                        prop_assert_eq!(p.unit_offset, l.offsets[i] + next);
                        prop_assert!(l.shard(r).contains(&p.unit_offset));
                        prop_assert!(p.unit_offset + p.len <= l.shard(r).end);
                        next += p.len;
                    }
                }
                prop_assert_eq!(next, *n);
                if *n > 0 {
                    prop_assert_eq!(l.offsets[i] * size % PARAM_ALIGN, 0);
                    prop_assert!(l.offsets[i] >= end);
                    end = l.offsets[i] + n;
                }
            }
            let bound = numels.len() * (PARAM_ALIGN - 1) + world_size * (CUT_ALIGN + size);
            prop_assert!(l.padding() * size <= bound);
        }
    }
}
