//! What a sharded model will take and move, before anything is allocated: bytes on a rank and on a host, and collectives
//! of a training step, for any world size.
//!
//! Pure arithmetic on the same [`Plan`] that an engine is made of, so it takes no communicator, and parameters need no
//! storage. Time and memory grow with the number of parameters and units, not with their elements or the world size. All
//! shards are equally long; ranks differ only in how much of theirs is padding, and so in optimizer state.
//!
//! A *step* is one forward and one backward in which each unit is used once through the engine's hooks. A unit that is used
//! k times is gathered k times as often, and reduced once all the same.

use crate::config::EngineConfig;
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::module::{ModuleTree, ROOT};
use crate::pipeline::{Limits, UnitBytes};
use crate::plan::{Plan, UnitId, UnitPlan};
use std::collections::{BTreeMap, BTreeSet};

/// Limits that keep every sum below 2^64.
const MAX_WORLD: usize = 1 << 24;
const MAX_NUMEL: u64 = 1 << 48;
const MAX_OPTIMIZER_BYTES: u32 = 4096;

/// What to forecast.
#[derive(Clone, Default)]
pub struct Request {
    /// 1 to 2^24.
    pub world_size: usize,
    /// None: the one with the most bytes (the lowest of several).
    pub rank: Option<usize>,
    /// Strategy, shard_size, param_dtype, reduce_dtype, grads_in_param_dtype, cpu_offload and gradient_slots count; the rest changes no size.
    pub config: EngineConfig,
    /// Bytes of optimizer state per element of a trained parameter: 0 for plain SGD, 8 for Adam in float32; at most 4096.
    pub optimizer_bytes_per_element: u32,
}

/// Collectives of one kind in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How many; units without elements have none.
    pub collectives: u64,
    /// Their full size: the unit buffers gathered, or the gradients that a rank gives to reductions.
    pub bytes: u64,
    /// What each rank sends where bytes move: (W-1)/W of each one's bytes, rounded up, twice that for an all-reduce. On shm
    /// nothing is sent: an all-gather moves no bytes,
    /// and in a reduction each rank reads its own range of every rank's slot, `bytes` in all.
    pub sent_bytes: u64,
    /// In how many messages each rank sends them, around a ring: W-1 per collective, twice that for an all-reduce.
    pub sent_messages: u64,
}

impl Traffic {
    /// `count` collectives of `bytes` each over `world` ranks.
    fn of(count: u64, bytes: u64, world: u64) -> Traffic {
        match bytes {
            0 => Traffic::default(),
            _ => Traffic {
                collectives: count,
                bytes: count * bytes,
                sent_bytes: count * (bytes - bytes / world),
                sent_messages: count * (world - 1),
            },
        }
    }

    /// An all-reduce of `bytes` over `replicas` ranks: around a ring, a reduce-scatter and an all-gather.
    fn of_all_reduce(bytes: u64, replicas: u64) -> Traffic {
        match bytes.min(replicas - 1) {
            0 => Traffic::default(),
            _ => Traffic {
                collectives: 1,
                bytes,
                sent_bytes: 2 * bytes.div_ceil(replicas) * (replicas - 1),
                sent_messages: 2 * (replicas - 1),
            },
        }
    }

    fn add(&mut self, other: Traffic) {
        self.collectives += other.collectives;
        self.bytes += other.bytes;
        self.sent_bytes += other.sent_bytes;
        self.sent_messages += other.sent_messages;
    }
}

/// One unit; the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitForecast {
    /// Fully qualified name of its module.
    pub name: String,
    pub module: u32,
    /// Parameters that it owns.
    pub params: usize,
    /// Their elements.
    pub numel: u64,
    /// The unit buffer: world size times `shard_bytes`.
    pub bytes: u64,
    pub shard_bytes: u64,
    /// Bytes of the unit buffer that belong to no parameter.
    pub padding_bytes: u64,
    /// Once, or once for forward and once for backward where units are resharded between (not the root). Within a shard
    /// group.
    pub all_gather: Traffic,
    /// Once, if any of its parameters is trained; in elements of the reduce dtype. Within a shard group.
    pub reduce_scatter: Traffic,
    /// Of this rank's pieces of its trained parameters, over the replicas: once, in float32, after the reduce-scatter. On a
    /// GPU of its whole shard, if any is trained.
    pub all_reduce: Traffic,
}

/// See the module's text. "This rank" is `rank`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forecast {
    pub world_size: usize,
    pub rank: usize,
    /// Elements of all parameters, and of those that are trained.
    pub numel: u64,
    pub trained_numel: u64,
    /// This rank's shards of all units, padding included.
    pub param_shard_bytes: u64,
    /// This rank's gradient shards: each unit's shard, rounded up to 64 bytes.
    pub grad_shard_bytes: u64,
    /// Optimizer state of this rank: bytes per element times the elements of trained parameters in its shards. What
    /// aligns it comes on top: in the engine's own optimizers less than 64 bytes per parameter and state.
    pub optimizer_bytes: u64,
    /// The gradient slots of each rank, used to the full: the largest units, one more than units nest, and as many of the next as fit
    /// in 1 MiB, unless gradient_slots says how many. (float32 whatever the reduce dtype, but 16 bits where grads_in_param_dtype
    /// says so. There the float32 places of gradients that are added to come on top, while they are used; and where bytes move,
    /// a unit that is reduced in another type collects in float32.)
    pub gradient_slot_bytes: u64,
    /// The part of this rank's shards that belongs to no parameter.
    pub shard_padding_bytes: u64,
    /// Padding in all unit buffers: of all ranks of a shard group together.
    pub padding_bytes: u64,
    /// All unit buffers, each rounded up to 64 bytes. On shm they are all ranks' shards, once per host.
    pub unit_buffer_bytes: u64,
    /// The copies of parameters that are computed in 16 bits, of all units; on shm once per host. None on a GPU.
    pub compute_buffer_bytes: u64,
    /// On a GPU the fixed pool of unit buffers; else 0, as the next.
    pub pool_bytes: u64,
    /// Device memory of this rank, if nothing is taken beyond the pool and the fixed slots: those, and without CPU offload
    /// shards, gradient shards and optimizer state.
    pub device_peak_bytes: u64,
    /// What this rank writes there, and uploads, in a step that follows a write of its shards.
    pub cast_bytes: u64,
    /// This rank's shards in host memory, besides their place in the unit buffers (CPU offload).
    pub offloaded_bytes: u64,
    /// Most bytes of unit buffers unsharded at once, 16-bit parameters counted in 16 bits. Where units are resharded after
    /// their forward: the largest sum along a path of nested units, the root included; else all. A unit gathered ahead comes
    /// on top. Takes no memory on shm; where bytes move, each rank
    /// needs it besides its shards.
    pub unsharded_peak_bytes: u64,
    /// What this rank brings at its peak: shards, gradient shards, slots, optimizer state. With fewer gradient_slots than
    /// units nest, the units that then collect in memory of their own come on top.
    pub rank_peak_bytes: u64,
    /// All ranks together, as on shm, where they are on one host: each shard group's unit buffers and copies in 16 bits, and
    /// every rank's gradient shards, slots and optimizer state.
    pub host_peak_bytes: u64,
    pub all_gather: Traffic,
    pub reduce_scatter: Traffic,
    /// Over the replicas, where the strategy has some.
    pub all_reduce: Traffic,
    /// In the order of the engine's units: 0 is the root, the others follow in depth-first order.
    pub units: Vec<UnitForecast>,
}

impl Forecast {
    /// Forecasts an engine on `tree`, whose units are those wrapped so far. Local.
    pub fn new(tree: &ModuleTree, request: &Request) -> Result<Forecast> {
        check(tree, request)?;
        let (world, config) = (request.world_size, &request.config);
        let group = config.shard_group_size(world)?;
        let tree = &tree.clone().with_engine_dtypes(config);
        let plan = Plan::new(tree, request.rank.unwrap_or(0) % group, group)?;
        let rank = request.rank.unwrap_or_else(|| fullest_rank(&plan));
        let replicas = world / group;
        let units: Vec<UnitForecast> =
            (0..plan.units.len() as UnitId).map(|u| unit_forecast(&plan, u, rank % group, replicas, config)).collect();
        let numel_of = |only_trained: bool| -> u64 {
            let counts = |p: &&crate::module::Param| p.requires_grad || !only_trained;
            tree.params().iter().filter(counts).map(|p| p.numel() as u64).sum()
        };
        let on_rank = |only_trained: bool| -> u64 {
            let counts = |p: &&crate::plan::ParamPlan| p.requires_grad || !only_trained;
            let piece =
                |p: &crate::plan::ParamPlan| plan.units[p.unit as usize].layout.piece(p.index, rank % group).len as u64;
            plan.params.iter().filter(counts).map(piece).sum()
        };
        let cast = |p: &&crate::plan::ParamPlan| p.compute != DType::F32;
        let piece = |p: &crate::plan::ParamPlan| plan.units[p.unit as usize].layout.piece(p.index, rank % group).len;
        let cast_bytes: u64 = plan.params.iter().filter(cast).map(|p| (piece(p) * p.compute.size()) as u64).sum();
        let sum = |of: fn(&UnitPlan) -> usize| plan.units.iter().map(|u| of(u) as u64).sum::<u64>();
        let gpu = config.cuda.as_ref().map(|_| Limits::of_engine(&UnitBytes::of(&plan), config));
        let slots = || plan.slot_bytes(config.gradient_slots as usize).iter().sum();
        let mut f = Forecast {
            world_size: world,
            rank,
            numel: numel_of(false),
            trained_numel: numel_of(true),
            param_shard_bytes: sum(UnitPlan::shard_bytes),
            grad_shard_bytes: sum(UnitPlan::grad_shard_bytes),
            optimizer_bytes: u64::from(request.optimizer_bytes_per_element) * on_rank(true),
            gradient_slot_bytes: gpu.as_ref().map_or_else(slots, Limits::slot_bytes) as u64,
            shard_padding_bytes: sum(UnitPlan::shard_bytes) - on_rank(false) * DType::F32.size() as u64,
            padding_bytes: plan.padding_bytes() as u64,
            unit_buffer_bytes: gpu.as_ref().map_or_else(|| sum(UnitPlan::arena_bytes), |l| l.pool_bytes() as u64),
            compute_buffer_bytes: if gpu.is_some() { 0 } else { sum(|u| u.compute_bytes) },
            pool_bytes: gpu.as_ref().map_or(0, |l| l.pool_bytes() as u64),
            device_peak_bytes: 0,
            cast_bytes: if gpu.is_some() { 0 } else { cast_bytes }
                + if config.cpu_offload && gpu.is_none() { sum(UnitPlan::shard_bytes) } else { 0 },
            offloaded_bytes: if config.cpu_offload { sum(UnitPlan::grad_shard_bytes) } else { 0 },
            unsharded_peak_bytes: match config.strategy {
                s if s.reshards_after_forward() => deepest_path_bytes(tree, &plan),
                _ => plan.units.iter().map(|u| u.gathered_bytes(&plan.params) as u64).sum(),
            },
            rank_peak_bytes: 0,
            host_peak_bytes: 0,
            all_gather: Traffic::default(),
            reduce_scatter: Traffic::default(),
            all_reduce: Traffic::default(),
            units,
        };
        for u in &f.units {
            f.all_gather.add(u.all_gather);
            f.reduce_scatter.add(u.reduce_scatter);
            f.all_reduce.add(u.all_reduce);
        }
        let gradients = f.grad_shard_bytes + f.gradient_slot_bytes + f.offloaded_bytes;
        let all_optimizer_bytes =
            replicas as u128 * u128::from(u64::from(request.optimizer_bytes_per_element) * f.trained_numel);
        f.rank_peak_bytes = f.param_shard_bytes + gradients + f.optimizer_bytes;
        let buffers = f.unit_buffer_bytes + f.compute_buffer_bytes;
        let host = replicas as u128 * u128::from(buffers) + world as u128 * u128::from(gradients);
        f.host_peak_bytes = u64::try_from(host + all_optimizer_bytes).unwrap_or(u64::MAX);
        if gpu.is_some() {
            f.count_on_gpu(config.cpu_offload, all_optimizer_bytes);
        }
        Ok(f)
    }

    /// On a GPU shards are laid out as gradient shards are, and unit buffers are each rank's own; the host has what is
    /// offloaded.
    fn count_on_gpu(&mut self, cpu_offload: bool, all_optimizer_bytes: u128) {
        let shards = 2 * self.grad_shard_bytes;
        let at_home = |home: bool, bytes: u64| if home { bytes } else { 0 };
        self.rank_peak_bytes = self.pool_bytes + self.gradient_slot_bytes + shards + self.optimizer_bytes;
        self.device_peak_bytes = self.rank_peak_bytes - at_home(cpu_offload, shards + self.optimizer_bytes);
        let host = self.world_size as u128 * u128::from(shards) + all_optimizer_bytes;
        self.host_peak_bytes = at_home(cpu_offload, u64::try_from(host).unwrap_or(u64::MAX));
    }

    /// The unit of this number.
    pub fn unit(&self, unit: UnitId) -> Result<&UnitForecast> {
        let count = self.units.len();
        self.units
            .get(unit as usize)
            .ok_or_else(|| err!(InvalidArgument, "unit {unit} does not exist: the model has {count} units"))
    }
}

fn check(tree: &ModuleTree, request: &Request) -> Result<()> {
    let world = request.world_size;
    if !(1..=MAX_WORLD).contains(&world) {
        return Err(err!(InvalidArgument, "world size {world} is not in 1..={MAX_WORLD}"));
    }
    if let Some(rank) = request.rank.filter(|r| *r >= world) {
        return Err(err!(InvalidArgument, "rank {rank} does not exist in a world of {world}"));
    }
    let bytes = request.optimizer_bytes_per_element;
    if bytes > MAX_OPTIMIZER_BYTES {
        return Err(err!(
            InvalidArgument,
            "{bytes} bytes of optimizer state per element: at most {MAX_OPTIMIZER_BYTES}"
        ));
    }
    if !crate::comm::can_reduce(request.config.reduce_dtype) {
        return Err(err!(Unsupported, "gradients cannot be reduced as {}", request.config.reduce_dtype));
    }
    request.config.check()?;
    let numel = tree.params().iter().try_fold(0u64, |n, p| n.checked_add(p.numel() as u64));
    if numel.is_none_or(|n| n > MAX_NUMEL) {
        return Err(err!(InvalidArgument, "the model has more than {MAX_NUMEL} elements"));
    }
    if let Some(other) = tree.adopted().iter().find(|m| m.mesh.world.world_size() != world) {
        let there = other.mesh.world.world_size();
        return Err(err!(
            InvalidArgument,
            "a part of the model is sharded over {there} ranks already: it cannot be planned for {world}"
        ));
    }
    Ok(())
}

fn unit_forecast(plan: &Plan, unit: UnitId, rank: usize, replicas: usize, config: &EngineConfig) -> UnitForecast {
    let u = &plan.units[unit as usize];
    let world = (u.layout.len / u.layout.shard_len.max(1)) as u64;
    let trained = |p: &&u32| plan.params[**p as usize].requires_grad;
    let pieces = u.params.iter().filter(trained).map(|p| u.layout.piece(plan.params[*p as usize].index, rank).len);
    let averaged = (pieces.sum::<usize>() * DType::F32.size()) as u64;
    let gathers = 1 + u64::from(unit != Plan::ROOT_UNIT && config.strategy.reshards_after_forward());
    let reductions = u64::from(u.params.iter().any(|p| plan.params[*p as usize].requires_grad));
    let reduced = (u.layout.len * u.reduce_dtype.size()) as u64;
    let (gathered, averaged) = match &config.cuda {
        Some(_) => (UnitBytes::of_unit(plan, unit).buffer, reductions * u.shard_bytes() as u64),
        None => (u.gathered_bytes(&plan.params), averaged),
    };
    UnitForecast {
        name: u.name.clone(),
        module: u.module,
        params: u.params.len(),
        numel: u.layout.numels.iter().map(|n| *n as u64).sum(),
        bytes: u.bytes() as u64,
        shard_bytes: u.shard_bytes() as u64,
        padding_bytes: (u.layout.padding() * DType::F32.size()) as u64,
        all_gather: Traffic::of(gathers, gathered as u64, world),
        reduce_scatter: Traffic::of(reductions, reduced, world),
        all_reduce: Traffic::of_all_reduce(averaged, replicas as u64),
    }
}

/// The lowest rank that has the most elements of trained parameters in its shards. By sweeping over the few ranks where
/// that number changes: a parameter lies on consecutive ranks, and fills the shard of all but the first and the last.
fn fullest_rank(plan: &Plan) -> usize {
    let mut changes: BTreeMap<usize, i128> = BTreeMap::new();
    for p in plan.params.iter().filter(|p| p.requires_grad) {
        let layout = &plan.units[p.unit as usize].layout;
        let (start, len) = (layout.offsets[p.index], layout.numels[p.index]);
        if len == 0 {
            continue;
        }
        let (first, last) = (start / layout.shard_len, (start + len - 1) / layout.shard_len);
        let mut before = 0;
        for rank in BTreeSet::from([first, first + 1, last, last + 1]) {
            let here = if rank <= last { layout.piece(p.index, rank).len as i128 } else { 0 };
            *changes.entry(rank).or_default() += here - before;
            before = here;
        }
    }
    let (mut fullest, mut most, mut sum) = (0, 0, 0);
    for (rank, change) in changes {
        sum += change;
        if sum > most {
            (fullest, most) = (rank, sum);
        }
    }
    fullest
}

/// The largest sum of unit buffers from the root down to a unit.
fn deepest_path_bytes(tree: &ModuleTree, plan: &Plan) -> u64 {
    let mut sums = vec![0u64; plan.units.len()];
    for (i, u) in plan.units.iter().enumerate() {
        let above = match tree.modules()[u.module as usize].parent {
            Some(parent) => sums[plan.unit_of_module[parent as usize] as usize],
            None => 0,
        };
        sums[i] = above + u.gathered_bytes(&plan.params) as u64;
    }
    debug_assert!(plan.units.first().is_some_and(|u| u.module == ROOT));
    sums.into_iter().max().unwrap_or(0)
}

#[cfg(test)]
mod tests;
