//! Which unit is needed next, by a recorded order, so that it can be fetched one unit ahead.
//!
//! Pure. A forward follows the order, a backward the reverse of it. What really happens may deviate: the schedule goes
//! on from wherever the unit comes next.

use crate::plan::UnitId;

/// A recorded order of units, and the place in it.
#[derive(Clone, Debug)]
pub struct Schedule {
    forward: Line,
    backward: Line,
}

#[derive(Clone, Debug)]
struct Line {
    /// Without the same unit twice in a row.
    order: Vec<UnitId>,
    /// The place after the unit that came last.
    cursor: usize,
}

impl Schedule {
    /// A schedule at the start of `order`, the one of a forward, in which a unit may be several times.
    pub fn new(mut order: Vec<UnitId>) -> Schedule {
        order.dedup();
        let reversed = order.iter().rev().copied().collect();
        Schedule { forward: Line { order, cursor: 0 }, backward: Line { order: reversed, cursor: 0 } }
    }

    /// Back to the start: the next iteration begins, however far the last one came.
    pub fn restart(&mut self) {
        self.forward.cursor = 0;
        self.backward.cursor = 0;
    }

    /// `unit` is being unsharded, in forward or in backward: the unit that will be next. A unit that was not expected
    /// here is looked for from here on, and then from the start. None after the last one, and for a unit that is not in
    /// the order (which leaves the place as it was).
    pub fn next_after(&mut self, unit: UnitId, forward: bool) -> Option<UnitId> {
        match forward {
            true => self.forward.next_after(unit),
            false => self.backward.next_after(unit),
        }
    }
}

impl Schedule {
    /// As [`Schedule::next_after`], the next `count` units at most.
    pub fn upcoming(&mut self, unit: UnitId, forward: bool, count: usize) -> &[UnitId] {
        let line = if forward { &mut self.forward } else { &mut self.backward };
        match line.next_after(unit) {
            Some(_) => &line.order[line.cursor..line.order.len().min(line.cursor + count)],
            None => &[],
        }
    }
}

impl Line {
    fn next_after(&mut self, unit: UnitId) -> Option<UnitId> {
        let (before, after) = self.order.split_at(self.cursor);
        let later = after.iter().position(|u| *u == unit).map(|i| before.len() + i);
        let at = later.or_else(|| before.iter().position(|u| *u == unit))?;
        self.cursor = at + 1;
        self.order.get(self.cursor).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn follow(s: &mut Schedule, units: &[UnitId]) -> Vec<Option<UnitId>> {
        units.iter().map(|u| s.next_after(*u, true)).collect()
    }

    #[test]
    fn a_unit_that_is_there_twice_is_followed_by_what_came_then() {
        let mut s = Schedule::new(vec![0, 1, 2, 1, 1, 3]);
        for _ in 0..2 {
            assert_eq!(follow(&mut s, &[0, 1, 2, 1, 3]), [Some(1), Some(2), Some(1), Some(3), None]);
        }
        // A forward in between does not move the backward.
        let back: Vec<_> = [3, 1, 2, 1, 0].map(|u| (s.next_after(u, false), s.next_after(0, true))).into();
        assert_eq!(back, [Some(1), Some(2), Some(1), Some(0), None].map(|u| (u, Some(1))));
    }

    #[test]
    fn goes_on_from_where_a_unit_comes_next() {
        let mut s = Schedule::new(vec![0, 1, 2, 1, 3, 4]);
        // 2 is skipped: the second 1 is meant; then 2 again, which is only before.
        assert_eq!(follow(&mut s, &[0, 1, 1, 2, 1]), [Some(1), Some(2), Some(3), Some(1), Some(3)]);
        // An unknown unit changes nothing.
        assert_eq!(follow(&mut s, &[9, 3]), [None, Some(4)]);
        // An iteration that was given up in the middle.
        assert_eq!(s.next_after(1, false), Some(2));
        s.restart();
        assert_eq!((s.next_after(1, true), s.next_after(1, false)), (Some(2), Some(2)));
        assert_eq!(Schedule::new(Vec::new()).next_after(0, true), None);
    }

    proptest! {
        /// Following the order itself foretells each unit, in each of several iterations.
        #[test]
        fn the_order_itself_is_foretold(order in prop::collection::vec(0u32..5, 1..20)) {
            let mut s = Schedule::new(order.clone());
            let mut order = order;
            order.dedup();
            for _ in 0..3 {
                for (i, unit) in order.iter().enumerate() {
                    prop_assert_eq!(s.next_after(*unit, true), order.get(i + 1).copied());
                }
                for (i, unit) in order.iter().enumerate().rev() {
                    prop_assert_eq!(s.next_after(*unit, false), i.checked_sub(1).map(|i| order[i]));
                }
            }
        }

        /// Whatever is asked, the answer is a unit that follows the one asked for somewhere in the order.
        #[test]
        fn an_answer_is_a_follower(
            order in prop::collection::vec(0u32..5, 0..20),
            asked in prop::collection::vec(0u32..7, 0..40),
        ) {
            let mut s = Schedule::new(order).forward;
            for unit in asked {
                let followers: Vec<UnitId> =
                    s.order.windows(2).filter(|w| w[0] == unit).map(|w| w[1]).collect();
                match s.next_after(unit) {
                    Some(next) => prop_assert!(followers.contains(&next)),
                    None => prop_assert!(!s.order.contains(&unit) || s.order.last() == Some(&unit)),
                }
            }
        }
    }
}
