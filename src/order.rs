//! Execution-order validation: the order in which forwards unshard units, compared with that of the first iteration.
//!
//! Pure bookkeeping of one rank; the comparison between ranks is the communicator's. The behaviour is that of PyTorch's
//! FSDP at debug level DETAIL: the first iteration must be the same on every rank, later ones are compared with it.

use crate::comm::Check;
use crate::config::OrderCheck;
use crate::plan::UnitId;

/// What a forward did at one place, and what the first one did there; None: nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deviation {
    pub unit: Option<UnitId>,
    pub first: Option<UnitId>,
}

/// See the module's text.
#[derive(Debug)]
pub struct Order {
    mode: OrderCheck,
    /// Units in the order of the first training forward.
    first: Vec<UnitId>,
    /// The first training iteration has ended.
    complete: bool,
    /// A training forward or its backward is under way.
    training: bool,
    /// Units are being unsharded by a forward, not by a backward.
    in_forward: bool,
    /// Unshards of this forward.
    position: usize,
    warned: bool,
}

impl Order {
    pub fn new(mode: OrderCheck) -> Order {
        Order {
            mode,
            first: Vec::new(),
            complete: false,
            training: false,
            in_forward: false,
            position: 0,
            warned: false,
        }
    }

    /// A forward of the whole model begins. Only training ones are compared.
    pub fn begin_forward(&mut self, training: bool) {
        (self.training, self.in_forward, self.position) = (training, true, 0);
    }

    /// What is unsharded from here on is for a backward.
    pub fn end_forward(&mut self) {
        self.in_forward = false;
    }

    pub fn in_forward(&self) -> bool {
        self.in_forward
    }

    /// How the next all-gather is compared with the other ranks'.
    pub fn check(&self) -> Check {
        match self.mode {
            OrderCheck::Off => Check::Off,
            OrderCheck::Warn if self.complete => Check::Off,
            _ if self.in_forward && self.training && !self.complete => Check::Together,
            _ => Check::Announce,
        }
    }

    /// `unit` is unsharded. Some when that is to be warned about: it is not what the first iteration did here.
    pub fn record(&mut self, unit: UnitId) -> Option<Deviation> {
        if !self.in_forward || !self.training {
            return None;
        }
        let first = self.first.get(self.position).copied();
        self.position += 1;
        if !self.complete && first.is_none() {
            self.first.push(unit);
            return None;
        }
        self.warn_once(Deviation { unit: Some(unit), first })
    }

    /// The iteration is over, with a backward or without. Some when that is to be warned about: the forward stopped short
    /// of what the first iteration did.
    pub fn end_iteration(&mut self, backward: bool) -> Option<Deviation> {
        let (trained, position) = (backward && self.training, self.position);
        (self.training, self.in_forward, self.position) = (false, false, 0);
        if trained && !self.complete {
            self.complete = !self.first.is_empty();
            return None;
        }
        let first = self.first.get(position).copied();
        if trained {
            self.warn_once(Deviation { unit: None, first })
        } else {
            None
        }
    }

    /// The deviation, if it is one and the first to be warned about.
    fn warn_once(&mut self, deviation: Deviation) -> Option<Deviation> {
        let warns = self.mode == OrderCheck::Warn && deviation.unit != deviation.first;
        (warns && !std::mem::replace(&mut self.warned, true)).then_some(deviation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iteration(order: &mut Order, units: &[UnitId]) -> usize {
        order.begin_forward(true);
        let during = units.iter().filter_map(|u| order.record(*u)).count();
        order.end_forward();
        assert_eq!(order.record(99), None, "a backward's order is its own");
        during + usize::from(order.end_iteration(true).is_some())
    }

    #[test]
    fn one_warning_for_all_deviations() {
        let mut order = Order::new(OrderCheck::Warn);
        assert_eq!(iteration(&mut order, &[0, 1, 2]), 0);
        assert_eq!(iteration(&mut order, &[0, 1, 2]), 0);
        assert_eq!(iteration(&mut order, &[0, 3, 1]), 1);
        assert_eq!(iteration(&mut order, &[0, 3, 1]), 0);
    }

    #[test]
    fn a_deviation_says_what_and_instead_of_what() {
        let mut order = Order::new(OrderCheck::Warn);
        iteration(&mut order, &[0, 1, 2]);
        order.begin_forward(true);
        assert_eq!(order.record(0), None);
        assert_eq!(order.record(2), Some(Deviation { unit: Some(2), first: Some(1) }));
    }

    #[test]
    fn stopping_short_and_going_on_are_deviations() {
        for units in [&[0, 1][..], &[0, 1, 2, 2], &[]] {
            let mut order = Order::new(OrderCheck::Warn);
            iteration(&mut order, &[0, 1, 2]);
            assert_eq!(iteration(&mut order, units), 1, "{units:?}");
        }
    }

    #[test]
    fn evaluation_is_not_compared() {
        let mut order = Order::new(OrderCheck::Warn);
        iteration(&mut order, &[0, 1]);
        order.begin_forward(false);
        assert_eq!((order.record(1), order.end_iteration(false)), (None, None));
        assert_eq!(iteration(&mut order, &[0, 1]), 0);
    }

    #[test]
    fn ranks_are_compared_together_at_first() {
        for (mode, first, later) in [
            (OrderCheck::Error, Check::Together, Check::Announce),
            (OrderCheck::Warn, Check::Together, Check::Off),
            (OrderCheck::Off, Check::Off, Check::Off),
        ] {
            let mut order = Order::new(mode);
            order.begin_forward(true);
            assert_eq!(order.check(), first);
            iteration(&mut order, &[0]);
            order.begin_forward(true);
            assert_eq!(order.check(), later);
        }
    }
}
