//! Checkpoints with an optimizer: its states beside the parameters, and every parameter's count of steps as a text.
//!
//! Options (learning rate, betas, ...) are not stored: they are what the host gives the optimizer that loads.

use super::Optimizer;
use crate::agree;
use crate::checkpoint::{self, Contents, Job, StateTensor};
use crate::dtype::DType;
use crate::error::{err, Error, Result};
use crate::module::ParamId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The metadata that holds [`Saved`].
pub const METADATA_KEY: &str = "fsdp.optimizer";

#[derive(Deserialize, Serialize)]
struct Saved {
    optimizer: String,
    /// By parameter, of those that have taken any.
    steps: BTreeMap<String, u64>,
}

impl Optimizer {
    /// Saves the engine's shards, the states of this optimizer and `more` into the new folder `dir`, as
    /// [`checkpoint::save`] does. Collective.
    ///
    /// # Safety
    /// As [`checkpoint::save`], for `more`.
    pub unsafe fn save(&self, dir: &Path, more: &Contents) -> Result<()> {
        // SAFETY: the contents' memory is this optimizer's, locked meanwhile, and the caller's.
        self.with_contents(more, |contents| unsafe { checkpoint::save(&self.engine, dir, contents) })
    }

    /// The same in the background, as [`Job::start`] does. Collective.
    ///
    /// # Safety
    /// As [`Job::start`], for `more`.
    pub unsafe fn save_async(&self, dir: &Path, more: &Contents) -> Result<Job> {
        // SAFETY: as in `save`.
        self.with_contents(more, |contents| unsafe { Job::start(&self.engine, dir, contents) })
    }

    /// Runs `save` with `more` and with what a checkpoint has of this optimizer. Collective.
    fn with_contents<T>(&self, more: &Contents, save: impl FnOnce(&Contents) -> Result<T>) -> Result<T> {
        let state = self.lock()?;
        let comm = self.engine.world().as_ref();
        let params = self.engine.plan().params.iter().zip(&state.params);
        let steps: BTreeMap<String, u64> =
            params.filter(|(_, p)| p.steps > 0).map(|(plan, p)| (plan.fqn.clone(), p.steps)).collect();
        let text = match more.metadata.contains_key(METADATA_KEY) {
            true => Err(err!(InvalidArgument, "the metadata's key \"{METADATA_KEY}\" is kept for the optimizer")),
            false => serde_json::to_string(&Saved { optimizer: state.rule.name().into(), steps: steps.clone() })
                .map_err(|e| err!(Checkpoint, "the optimizer's counts cannot be written as JSON: {e}")),
        };
        agree::on_result(text.as_ref().map(|_| 0).map_err(Error::clone), comm)?;
        let counts: Vec<String> = steps.iter().map(|(name, n)| format!("{n} steps of parameter \"{name}\"")).collect();
        agree::on_lines(&counts, |_| "optimizer states", comm)?;

        let mut contents = more.clone();
        contents.metadata.insert(METADATA_KEY.into(), text?);
        if state.memory.is_some() {
            contents.states.extend(self.tensors(&state, |p| state.params[p].steps > 0));
        }
        save(&contents)
    }

    /// Loads what `save` has saved, at any world size: shards, states, counts of steps, and the data of `more`, as
    /// [`checkpoint::load`] does. Collective; on an error nothing has changed.
    ///
    /// # Safety
    /// As [`checkpoint::load`], for `more`.
    pub unsafe fn load(&self, dir: &Path, more: &Contents) -> Result<()> {
        let mut state = self.lock()?;
        let steps = self.reserve(&mut state).and_then(|()| self.read_steps(state.rule.name(), dir));
        agree::on_result(steps.as_ref().map(|_| 0).map_err(Error::clone), self.engine.world().as_ref())?;
        let steps = steps?;
        let mut contents = more.clone();
        contents.states.extend(self.tensors(&state, |p| steps[p] > 0));
        // SAFETY: as in `save`.
        unsafe { checkpoint::load(&self.engine, dir, &contents) }?;
        // A parameter that has not begun there begins anew.
        for old in self.tensors(&state, |p| steps[p] == 0 && state.params[p].steps > 0) {
            let zeros = vec![0f32; self.engine.param(old.param)?.piece.len];
            // SAFETY: the state has the piece's length and is locked.
            unsafe { self.engine.settled_at_home()?.put(DType::F32, zeros.as_ptr().cast(), old.data, zeros.len()) }?;
        }
        state.params.iter_mut().zip(steps).for_each(|(p, steps)| p.steps = steps);
        Ok(())
    }

    /// The states of the parameters that `of` picks, in memory that `reserve` has made.
    fn tensors(&self, state: &super::State, of: impl Fn(usize) -> bool) -> Vec<StateTensor> {
        let names = state.rule.states();
        let kinds = || names.iter().zip(state.memory.iter().flatten());
        let params = (0..self.offsets.len()).filter(|p| of(*p)).map(|p| p as ParamId);
        params
            .flat_map(|param| {
                kinds().map(move |(name, memory)| StateTensor {
                    param,
                    name: name.to_string(),
                    data: self.address(memory, param),
                })
            })
            .collect()
    }

    /// Every parameter's count in the checkpoint in `dir`, which must be one of the optimizer `name`.
    fn read_steps(&self, name: &str, dir: &Path) -> Result<Vec<u64>> {
        let fail = |why: String| err!(Checkpoint, "\"{}\": {why}", dir.display());
        let metadata = checkpoint::metadata(dir)?;
        let text = metadata.get(METADATA_KEY).ok_or_else(|| fail("was saved without an optimizer".into()))?;
        let saved: Saved =
            serde_json::from_str(text).map_err(|e| fail(format!("the optimizer's counts cannot be read: {e}")))?;
        if saved.optimizer != name {
            return Err(fail(format!("was saved with the optimizer {}, this one is {name}", saved.optimizer)));
        }
        let params = self.engine.plan().params.iter();
        Ok(params.map(|p| saved.steps.get(&p.fqn).copied().unwrap_or(0)).collect())
    }
}
