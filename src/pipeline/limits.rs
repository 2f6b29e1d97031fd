//! How much memory a pipeline has: unit buffers and gradient slots, from the units of a plan.

use crate::config::EngineConfig;
use crate::dtype::DType;
use crate::plan::{Plan, UnitId};

/// What a unit is to the pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitBytes {
    pub label: String,
    /// Units that enclose it, as [`crate::plan::UnitPlan::depth`] counts them.
    pub depth: usize,
    /// Of its unit buffer: its layout in each type that one of its parameters is computed in.
    pub buffer: usize,
    /// Of its gradient slot: its layout in float32, and in the type that it is reduced in if that is another.
    pub slot: usize,
}

impl UnitBytes {
    /// The units of a plan.
    pub fn of(plan: &Plan) -> Vec<UnitBytes> {
        (0..plan.units.len() as UnitId).map(|unit| UnitBytes::of_unit(plan, unit)).collect()
    }

    /// One of them.
    pub fn of_unit(plan: &Plan, unit: UnitId) -> UnitBytes {
        let u = &plan.units[unit as usize];
        let slot_types = [Some(DType::F32), Some(u.reduce_dtype).filter(|d| *d != DType::F32)];
        UnitBytes {
            label: u.label().to_string(),
            depth: u.depth,
            buffer: compute_dtypes(plan, unit).iter().map(|d| u.layout.len * d.size()).sum(),
            slot: slot_types.iter().flatten().map(|d| u.layout.len * d.size()).sum(),
        }
    }
}

/// The types that the parameters of `unit` are computed in, each once.
pub fn compute_dtypes(plan: &Plan, unit: UnitId) -> Vec<DType> {
    let there = |d: &DType| plan.units[unit as usize].params.iter().any(|p| plan.params[*p as usize].compute == *d);
    [DType::F32, DType::BF16, DType::F16].into_iter().filter(there).collect()
}

/// How much memory there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of each unit buffer.
    pub unit_buffers: Vec<usize>,
    /// Most units that are gathered at once; more than unit buffers: the others' are taken when they are needed.
    pub in_flight: usize,
    /// Bytes of each gradient slot.
    pub gradient_slots: Vec<usize>,
    /// A unit that finds all slots taken gets one beyond them.
    pub spare_slots: bool,
    /// Units gathered ahead of their use at most.
    pub ahead: usize,
}

impl Limits {
    /// What a model needs whose units are resharded after their forward: the units on a path of nested ones, and
    /// `ahead` more; a slot more than units nest, whose reduction runs. They are the largest units, so that any as many
    /// fit. What is needed besides is taken beyond them.
    pub fn of(units: &[UnitBytes], ahead: usize) -> Limits {
        let nested = units.iter().map(|u| u.depth).max().unwrap_or(0) + 1;
        Limits::with(units, nested + ahead, nested + 1, ahead)
    }

    /// What an engine of `config` needs on a GPU.
    pub fn of_engine(units: &[UnitBytes], config: &EngineConfig) -> Limits {
        let cuda = config.cuda.clone().unwrap_or_default();
        let nested = units.iter().map(|u| u.depth).max().unwrap_or(0) + 1;
        let buffers = if config.strategy.reshards_after_forward() { nested + cuda.prefetch } else { units.len() };
        let in_flight = if cuda.max_units_in_flight == 0 { usize::MAX } else { cuda.max_units_in_flight };
        let slots = if config.gradient_slots == 0 { nested + 1 } else { config.gradient_slots as usize };
        Limits { in_flight, ..Limits::with(units, buffers.min(in_flight), slots, cuda.prefetch) }
    }

    /// The largest units' buffers and slots, so many of each.
    fn with(units: &[UnitBytes], buffers: usize, slots: usize, ahead: usize) -> Limits {
        let largest = |of: fn(&UnitBytes) -> usize, count: usize| {
            let mut sizes: Vec<usize> = units.iter().map(of).filter(|bytes| *bytes > 0).collect();
            sizes.sort_unstable_by(|a, b| b.cmp(a));
            sizes.truncate(count);
            sizes
        };
        Limits {
            unit_buffers: largest(|u| u.buffer, buffers),
            in_flight: usize::MAX,
            gradient_slots: largest(|u| u.slot, slots),
            spare_slots: true,
            ahead,
        }
    }

    /// Bytes of the fixed unit buffers.
    pub fn pool_bytes(&self) -> usize {
        self.unit_buffers.iter().sum()
    }

    /// Bytes of the fixed slots.
    pub fn slot_bytes(&self) -> usize {
        self.gradient_slots.iter().sum()
    }
}
