//! One unit's state machine: Sharded > Unsharded > Sharded, and how often it was used in forward and backward.
//!
//! Illegal transitions are errors that name the unit; what the transitions cost is the engine's business.

use crate::error::{err, Result};

/// Whether a host may read a unit's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum UnitState {
    Sharded = 0,
    Unsharded = 1,
}

/// What happens to a unit after a forward that a backward follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterForward {
    /// It stays unsharded.
    Keep,
    /// It is resharded over its shard group.
    Reshard,
    /// It is resharded over a smaller group, the engine's of this index: a backward gathers there.
    ReshardTo(usize),
}

/// State of one unit.
#[derive(Debug)]
pub struct Unit {
    name: String,
    pub state: UnitState,
    pub after_forward: AfterForward,
    /// The smaller group that it was resharded to after its forward.
    pub group: Option<usize>,
    /// Its all-gather was issued ahead of time.
    gathered: bool,
    /// All-gathers so far.
    pub all_gathers: u64,
    /// The host calls the hooks around its compute.
    hooked: bool,
    /// Forward passes entered and not left: a unit may contain itself.
    forward_depth: u32,
    /// Forward passes that a backward must follow.
    uses: u32,
    /// Backward passes entered and not left.
    backward_depth: u32,
}

impl Unit {
    pub fn new(name: &str, after_forward: AfterForward) -> Unit {
        Unit {
            name: name.into(),
            state: UnitState::Sharded,
            after_forward,
            group: None,
            gathered: false,
            all_gathers: 0,
            hooked: false,
            forward_depth: 0,
            uses: 0,
            backward_depth: 0,
        }
    }

    pub fn reshard(&mut self) {
        self.state = UnitState::Sharded;
        self.gathered = false;
        self.group = None;
    }

    /// Its forward is over and a backward follows.
    pub fn reshard_after_forward(&mut self) {
        match self.after_forward {
            AfterForward::Keep => {}
            AfterForward::Reshard => self.reshard(),
            AfterForward::ReshardTo(group) => {
                self.reshard();
                self.group = Some(group);
            }
        }
    }

    /// Its all-gather has been issued, before the host asked for it.
    pub fn set_gathered(&mut self) {
        self.gathered = true;
    }

    /// Whether that is so; the host asks for it now.
    pub fn take_gathered(&mut self) -> bool {
        std::mem::take(&mut self.gathered)
    }

    pub fn is_sharded_and_not_gathered(&self) -> bool {
        self.state == UnitState::Sharded && !self.gathered
    }

    /// Between the hooks around its compute; of a host that does not call them: while it is unsharded.
    pub fn is_computing(&self) -> bool {
        let inside = self.forward_depth > 0 || self.backward_depth > 0;
        self.state == UnitState::Unsharded && (inside || !self.hooked)
    }

    pub fn enter_forward(&mut self) {
        self.hooked = true;
        self.forward_depth += 1;
    }

    /// True when the outermost forward of the unit is over.
    pub fn leave_forward(&mut self, grad_enabled: bool) -> Result<bool> {
        if self.forward_depth == 0 {
            return Err(err!(InvalidState, "unit \"{}\": post_forward without pre_forward", self.name));
        }
        self.forward_depth -= 1;
        self.uses += u32::from(grad_enabled);
        Ok(self.forward_depth == 0)
    }

    pub fn enter_backward(&mut self) -> Result<()> {
        if self.backward_depth >= self.uses {
            return Err(err!(
                InvalidState,
                "unit \"{}\": pre_backward number {} after {} forward passes with gradients enabled",
                self.name,
                self.backward_depth + 1,
                self.uses
            ));
        }
        self.backward_depth += 1;
        Ok(())
    }

    /// True when the backward of the unit's last use is over: its gradients are complete.
    pub fn leave_backward(&mut self) -> Result<bool> {
        if self.backward_depth == 0 {
            return Err(err!(InvalidState, "unit \"{}\": post_backward without pre_backward", self.name));
        }
        self.backward_depth -= 1;
        self.uses -= 1;
        Ok(self.uses == 0)
    }

    /// The iteration is over, however far it came.
    pub fn reset(&mut self) {
        self.reshard();
        self.forward_depth = 0;
        self.uses = 0;
        self.backward_depth = 0;
    }

    pub fn require_unsharded(&self) -> Result<()> {
        match self.state {
            UnitState::Unsharded => Ok(()),
            UnitState::Sharded => {
                Err(err!(InvalidState, "unit \"{}\" is sharded: unshard it before reading its parameters", self.name))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_used_twice_is_complete_after_its_second_backward() {
        let mut u = Unit::new("u", AfterForward::Reshard);
        for _ in 0..2 {
            u.enter_forward();
            assert!(u.leave_forward(true).unwrap());
        }
        u.enter_backward().unwrap();
        assert!(!u.leave_backward().unwrap());
        u.enter_backward().unwrap();
        assert!(u.leave_backward().unwrap());
    }

    #[test]
    fn wrong_order_names_the_unit() {
        let mut u = Unit::new("layers.3", AfterForward::Keep);
        for e in [u.leave_forward(true).unwrap_err(), u.enter_backward().unwrap_err(), u.leave_backward().unwrap_err()]
        {
            assert!(e.message.contains("\"layers.3\""), "{e}");
        }
        u.enter_forward();
        u.leave_forward(false).unwrap();
        assert!(u.enter_backward().is_err());
    }
}
