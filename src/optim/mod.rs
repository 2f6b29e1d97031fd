//! An optimizer on an engine's shards: SGD or AdamW, element by element, with float32 state where the
//! engine's shards have their home.
//!
//! One allocation per kind of state holds the pieces of all parameters of this rank. It is made at the first step, and its
//! pages take memory once they are written: a parameter that never gets a gradient has none. A parameter without a
//! gradient in a step is left alone and does not count the step.

mod resume;
mod rule;
mod update;

pub use resume::METADATA_KEY;
pub use rule::{AdamWOptions, Rule, SgdOptions};
pub use update::{AdamW as AdamWStep, Sgd as SgdStep};

use crate::agree;
use crate::device::{Buffer, Floats, Update, UpdateRule};
use crate::engine::Engine;
use crate::error::{err, Result};
use crate::module::ParamId;
use std::sync::{Arc, Mutex, MutexGuard};

/// Floats of a cache line, where every parameter's state begins.
const LINE: usize = 16;

/// Takes a parameter's full state of a name.
pub type TakeState<'a> = dyn FnMut(ParamId, &str, &[f32]) -> Result<()> + 'a;

/// See the module's text.
pub struct Optimizer {
    engine: Arc<Engine>,
    /// By parameter: where its piece begins in each kind of state.
    offsets: Vec<usize>,
    /// Elements of each kind of state.
    len: usize,
    state: Mutex<State>,
}

struct State {
    rule: Rule,
    params: Vec<ParamState>,
    /// As [`Rule::states`]; none before they are needed.
    memory: Option<Vec<Buffer>>,
}

struct ParamState {
    lr_factor: f64,
    weight_decay: f64,
    steps: u64,
}

impl Optimizer {
    /// The engine whose shards it updates.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Keeps the engine alive. Collective: every rank passes the same options; the first that differs is named.
    pub fn new(engine: Arc<Engine>, rule: Rule) -> Result<Optimizer> {
        // Before the values are checked, so that a bad one on one rank only does not leave the others waiting.
        agree::on_lines(&rule.agreed(), |_| "optimizer options", engine.world().as_ref())?;
        rule.check()?;
        let mut len = 0;
        let place = |p: &crate::plan::ParamPlan| {
            let at = len;
            len += p.piece.len.next_multiple_of(LINE);
            at
        };
        let offsets = engine.plan().params.iter().map(place).collect();
        let weight_decay = rule.weight_decay();
        let params = engine.plan().params.iter().map(|_| ParamState { lr_factor: 1.0, weight_decay, steps: 0 });
        let state = State { rule, params: params.collect(), memory: None };
        Ok(Optimizer { engine, offsets, len, state: Mutex::new(state) })
    }

    /// Updates this rank's shards from their gradients, which stay. Begins a WRITE phase as [`Engine::begin_write`] does:
    /// at once after a backward.
    pub fn step(&self) -> Result<()> {
        let mut state = self.lock()?;
        self.reserve(&mut state)?;
        self.engine.write(|| self.update(&mut state))?
    }

    pub fn lr(&self) -> Result<f64> {
        Ok(self.lock()?.rule.lr())
    }

    /// The learning rate from the next step on. Local; the same on every rank.
    pub fn set_lr(&self, lr: f64) -> Result<()> {
        self.lock()?.rule.set_lr(lr)
    }

    /// From the next step on a parameter's learning rate is `lr_factor` times the optimizer's, and its weight decay is
    /// `weight_decay`. Local; the same on every rank.
    pub fn set_param_options(&self, param: ParamId, lr_factor: f64, weight_decay: f64) -> Result<()> {
        self.engine.param(param)?;
        rule::check_size("lr_factor", lr_factor)?;
        rule::check_size("weight_decay", weight_decay)?;
        let p = &mut self.lock()?.params[param as usize];
        (p.lr_factor, p.weight_decay) = (lr_factor, weight_decay);
        Ok(())
    }

    /// How many steps a parameter has taken.
    pub fn steps(&self, param: ParamId) -> Result<u64> {
        self.engine.param(param)?;
        Ok(self.lock()?.params[param as usize].steps)
    }

    /// The state `name` of this rank's piece of a parameter; null before its first step.
    pub fn state(&self, param: ParamId, name: &str) -> Result<*mut f32> {
        self.engine.param(param)?;
        let state = self.lock()?;
        let names = state.rule.states();
        let kind = names.iter().position(|n| *n == name).ok_or_else(|| {
            let known = if names.is_empty() { "none".to_string() } else { names.join(", ") };
            err!(InvalidArgument, "{} has no state \"{name}\": there is {known}", state.rule.name())
        })?;
        Ok(match &state.memory {
            Some(memory) if state.params[param as usize].steps > 0 => self.address(&memory[kind], param),
            _ => std::ptr::null_mut(),
        })
    }

    /// Calls `take` with every state of every parameter that has taken a step, gathered to the parameter's full size. With
    /// `rank0_only` on rank 0 only. Collective. An error of `take` on one rank is an error on every rank, at the end.
    pub fn each_full_state(&self, rank0_only: bool, take: &mut TakeState<'_>) -> Result<()> {
        let takes = !rank0_only || self.engine.world().rank() == 0;
        let names = self.lock()?.rule.states();
        let mut taken = Ok(());
        for param in 0..self.engine.plan().params.len() as ParamId {
            for name in names.iter().filter(|_| self.steps(param).is_ok_and(|s| s > 0)) {
                let full = self.engine.gather_flat(param, self.state(param, name)?)?;
                if takes && taken.is_ok() {
                    taken = take(param, name, &full);
                }
            }
        }
        agree::on_result(taken.map(|()| 0), self.engine.world().as_ref()).map(drop)
    }

    fn lock(&self) -> Result<MutexGuard<'_, State>> {
        self.state.lock().map_err(|_| err!(Panic, "the optimizer is unusable: an earlier call on it failed inside"))
    }

    /// Allocates the states, if that has not been done.
    fn reserve(&self, state: &mut State) -> Result<()> {
        if state.memory.is_none() {
            let names = state.rule.states().iter();
            let memory = names.map(|n| self.engine.alloc_home(self.len, &format!("the optimizer's state \"{n}\"")));
            state.memory = Some(memory.collect::<Result<_>>()?);
        }
        Ok(())
    }

    fn address(&self, memory: &Buffer, param: ParamId) -> *mut f32 {
        memory.as_ptr().wrapping_add(self.offsets[param as usize])
    }

    /// Steps every parameter that has a gradient. Called in a WRITE phase, after `reserve`.
    fn update(&self, state: &mut State) -> Result<()> {
        let State { rule, params, memory } = state;
        let memory = memory.as_deref().unwrap_or_default();
        let mut updates = Vec::with_capacity(params.len());
        for (id, p) in params.iter_mut().enumerate() {
            let shard = self.engine.shard(id as ParamId)?;
            if shard.grad.is_null() || self.has_no_elements(id) {
                continue;
            }
            p.steps += 1;
            // Also on ranks whose piece is empty: all ranks count alike.
            if shard.len == 0 {
                continue;
            }
            let mut states = [std::ptr::null_mut(); 2];
            states.iter_mut().zip(memory).for_each(|(to, m)| *to = self.address(m, id as ParamId));
            let lr = rule.lr() * p.lr_factor;
            let rule = match rule {
                Rule::Sgd(o) => UpdateRule::Sgd { numbers: SgdStep::new(o, lr, p.weight_decay), first: p.steps == 1 },
                Rule::AdamW(o) => UpdateRule::AdamW { numbers: AdamWStep::new(o, lr, p.weight_decay, p.steps) },
            };
            let param = Floats { data: shard.data, len: shard.len };
            updates.push(Update { rule, param, grad: shard.grad, states });
        }
        // SAFETY: the WRITE phase and the engine's lock, which the caller holds; pieces have their own places in shards,
        // gradient shards and states, which nothing but this optimizer, locked, touches.
        unsafe { self.engine.at_home().update(&updates) }
    }

    /// Such a parameter may have a "gradient" on some ranks only.
    fn has_no_elements(&self, param: usize) -> bool {
        self.engine.plan().params[param].shape.contains(&0)
    }
}
