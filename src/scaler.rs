//! A gradient scaler for float16: torch.amp.GradScaler's rule, with non-finite gradients found on any rank seen by all.
//!
//! The loss is multiplied by a scale so that small gradients survive in float16. Before a step the gradients are divided by
//! it; if any of any rank is not finite, every rank skips the step and the scale backs off. The scale is a float32, as
//! torch's; the factors are float64.
//!
//!   update   found:     scale = scale * backoff_factor, tracker = 0
//!            not found: tracker += 1; at growth_interval: scale = scale * growth_factor if that is finite, tracker = 0

use crate::comm::ReduceOp;
use crate::device::Floats;
use crate::engine::Engine;
use crate::error::{err, Result};
use crate::norm::all_reduce;
use crate::optim::Optimizer;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

/// What a scaler is made of, and what a checkpoint keeps of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScalerState {
    pub scale: f64,
    pub growth_factor: f64,
    pub backoff_factor: f64,
    pub growth_interval: u64,
    /// Updates since the last that grew or backed off.
    pub growth_tracker: u64,
}

impl Default for ScalerState {
    /// Torch's.
    fn default() -> ScalerState {
        ScalerState {
            scale: 65536.0,
            growth_factor: 2.0,
            backoff_factor: 0.5,
            growth_interval: 2000,
            growth_tracker: 0,
        }
    }
}

impl ScalerState {
    fn check(&self) -> Result<()> {
        let fail = |name: &str, value: f64, needed: &str| {
            Err(err!(InvalidArgument, "the scaler's {name} cannot be {value}: {needed} is needed"))
        };
        let (scale, growth, backoff) = (self.scale, self.growth_factor, self.backoff_factor);
        let inverse = (1.0 / f64::from(scale as f32)) as f32;
        match () {
            _ if !(scale > 0.0 && (scale as f32).is_finite() && inverse.is_finite()) => {
                fail("scale", scale, "a number above 0 that has an inverse in float32")
            }
            _ if !(growth > 1.0 && growth.is_finite()) => fail("growth_factor", growth, "a number above 1"),
            _ if !(backoff > 0.0 && backoff < 1.0) => fail("backoff_factor", backoff, "a number between 0 and 1"),
            _ if self.growth_interval == 0 => fail("growth_interval", 0.0, "at least 1"),
            _ => Ok(()),
        }
    }

    /// The rule above.
    fn update(&mut self, found: bool) {
        let times = |factor: f64| (f64::from(self.scale as f32) * factor) as f32;
        if found {
            let smaller = times(self.backoff_factor);
            // So small that nothing could be divided by it: a hopeless run, which stays there.
            if (1.0 / smaller).is_finite() {
                self.scale = smaller.into();
            }
            self.growth_tracker = 0;
            return;
        }
        self.growth_tracker += 1;
        if self.growth_tracker >= self.growth_interval {
            let grown = times(self.growth_factor);
            if grown.is_finite() {
                self.scale = grown.into();
            }
            self.growth_tracker = 0;
        }
    }
}

/// What has been done with an engine's gradients since the last update.
#[derive(Clone, Copy)]
struct Stage {
    found: bool,
    stepped: bool,
}

struct Inner {
    state: ScalerState,
    /// By engine.
    stages: HashMap<u64, Stage>,
}

/// See the module's text. Every rank has one, with the same state. One that is not enabled does nothing and steps always.
pub struct GradScaler {
    enabled: bool,
    inner: Mutex<Inner>,
}

impl GradScaler {
    /// Local.
    pub fn new(state: ScalerState, enabled: bool) -> Result<GradScaler> {
        state.check()?;
        Ok(GradScaler { enabled, inner: Mutex::new(Inner { state: rounded(state), stages: HashMap::new() }) })
    }

    /// What the loss is to be multiplied by: 1 if not enabled.
    pub fn scale(&self) -> Result<f64> {
        Ok(if self.enabled { self.lock()?.state.scale } else { 1.0 })
    }

    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    pub fn state(&self) -> Result<ScalerState> {
        Ok(self.lock()?.state)
    }

    /// Local; the same on every rank, between an update and the next unscaling.
    pub fn set_state(&self, state: ScalerState) -> Result<()> {
        state.check()?;
        let mut inner = self.lock()?;
        if !inner.stages.is_empty() {
            return Err(err!(InvalidState, "the scaler's state cannot be set between unscaling and update"));
        }
        inner.state = rounded(state);
        Ok(())
    }

    /// Multiplies this rank's `pieces` (by parameter, null where there is none; None: the engine's gradient shards) by the
    /// inverse of the scale. Returns whether any element of any rank was not finite before. Once an update; an error if
    /// ranks have different scales, and then nothing has changed. Collective.
    ///
    /// # Safety
    /// Every piece that is not null is writable for its parameter's piece's length.
    pub unsafe fn unscale(&self, engine: &Engine, pieces: Option<&[*mut f32]>) -> Result<bool> {
        if !self.enabled {
            return Ok(false);
        }
        let mut inner = self.lock()?;
        match inner.stages.get(&engine.number()) {
            Some(Stage { stepped: true, .. }) => Err(err!(InvalidState, "gradients are unscaled after the step")),
            Some(_) => Err(err!(InvalidState, "gradients were unscaled already since the last update")),
            None => {
                // SAFETY: the caller's promise.
                let found = unsafe { unscale(inner.state.scale, engine, pieces) }?;
                inner.stages.insert(engine.number(), Stage { found, stepped: false });
                Ok(found)
            }
        }
    }

    /// Whether the step is to be made now; it counts as made then. Unscales first if that has not been done. Collective.
    ///
    /// # Safety
    /// As [`GradScaler::unscale`].
    pub unsafe fn may_step(&self, engine: &Engine, pieces: Option<&[*mut f32]>) -> Result<bool> {
        if !self.enabled {
            return Ok(true);
        }
        let stage = self.lock()?.stages.get(&engine.number()).copied();
        let found = match stage {
            Some(Stage { stepped: true, .. }) => {
                return Err(err!(InvalidState, "the step was made already since the last update"))
            }
            Some(stage) => stage.found,
            // SAFETY: the caller's promise.
            None => unsafe { self.unscale(engine, pieces) }?,
        };
        self.lock()?.stages.insert(engine.number(), Stage { found, stepped: true });
        Ok(!found)
    }

    /// Steps `optimizer` unless that is to be skipped; whether it has. Collective.
    pub fn step(&self, optimizer: &Optimizer) -> Result<bool> {
        // SAFETY: no pieces are given.
        let may = unsafe { self.may_step(optimizer.engine(), None) }?;
        match may {
            true => optimizer.step().map(|()| true),
            false => Ok(false),
        }
    }

    /// Ends an iteration: the scale grows or backs off. Something must have been unscaled. Local.
    pub fn update(&self) -> Result<()> {
        if !self.enabled {
            return Ok(());
        }
        let mut inner = self.lock()?;
        if inner.stages.is_empty() {
            return Err(err!(
                InvalidState,
                "the scaler is updated, but no gradients were unscaled since the last update"
            ));
        }
        let found = inner.stages.values().any(|s| s.found);
        inner.state.update(found);
        inner.stages.clear();
        Ok(())
    }

    fn lock(&self) -> Result<MutexGuard<'_, Inner>> {
        self.inner.lock().map_err(|_| err!(Panic, "the scaler is unusable: an earlier call on it failed inside"))
    }
}

/// With the scale that float32 has.
fn rounded(state: ScalerState) -> ScalerState {
    ScalerState { scale: f64::from(state.scale as f32), ..state }
}

/// # Safety
/// As [`GradScaler::unscale`].
unsafe fn unscale(scale: f64, engine: &Engine, pieces: Option<&[*mut f32]>) -> Result<bool> {
    engine.between_iterations("gradients can be unscaled", || {
        let params = &engine.plan().params;
        let pieces = match pieces {
            Some(pieces) => pieces.to_vec(),
            None => engine.grad_pieces()?.into_iter().map(<*const f32>::cast_mut).collect(),
        };
        if pieces.len() != params.len() {
            let (given, there) = (pieces.len(), params.len());
            return Err(err!(InvalidArgument, "{given} pieces were given, there are {there} parameters"));
        }
        let there = params.iter().zip(&pieces).filter(|(p, data)| !data.is_null() && p.piece.len > 0);
        let there: Vec<Floats> = there.map(|(p, data)| Floats { data: *data, len: p.piece.len }).collect();
        let home = engine.settled_at_home()?;
        // SAFETY: the caller's promise; gradient shards have the pieces' lengths, and the engine is locked.
        let found = !unsafe { home.all_finite(&there) }?;
        let mut agreed = [f64::from(u8::from(found)), scale, -scale];
        all_reduce(engine.world().as_ref(), &mut agreed, ReduceOp::Max)?;
        if agreed[1] != -agreed[2] {
            return Err(err!(Mismatch, "ranks have different gradient scales: from {} to {}", -agreed[2], agreed[1]));
        }
        let inverse = (1.0 / scale) as f32;
        // SAFETY: as above.
        unsafe { home.scale(&there, inverse) }?;
        Ok(agreed[0] > 0.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backs_off_and_grows_as_documented() {
        let mut s = ScalerState { scale: 8.0, growth_interval: 3, ..ScalerState::default() };
        let mut seen = Vec::new();
        for found in [false, false, true, false, false, false, false, false, false, true, true] {
            s.update(found);
            seen.push((s.scale, s.growth_tracker));
        }
        let want = [(8., 1), (8., 2), (4., 0), (4., 1), (4., 2), (8., 0), (8., 1), (8., 2), (16., 0), (8., 0), (4., 0)];
        assert_eq!(seen, want);
    }

    #[test]
    fn never_grows_to_infinity() {
        let mut s = ScalerState { scale: 2f64.powi(127), growth_interval: 1, ..ScalerState::default() };
        s.update(false);
        assert_eq!((s.scale, s.growth_tracker), (2f64.powi(127), 0));
    }

    #[test]
    fn values_that_cannot_be() {
        let good = ScalerState::default();
        assert!(good.check().is_ok());
        for (bad, name) in [
            (ScalerState { scale: 0.0, ..good }, "scale"),
            (ScalerState { scale: f64::INFINITY, ..good }, "scale"),
            (ScalerState { scale: f64::NAN, ..good }, "scale"),
            (ScalerState { scale: 1e-45, ..good }, "scale"),
            (ScalerState { growth_factor: 1.0, ..good }, "growth_factor"),
            (ScalerState { backoff_factor: 1.0, ..good }, "backoff_factor"),
            (ScalerState { backoff_factor: f64::NAN, ..good }, "backoff_factor"),
            (ScalerState { growth_interval: 0, ..good }, "growth_interval"),
        ] {
            assert!(bad.check().unwrap_err().message.contains(name), "{bad:?}");
        }
    }
}
