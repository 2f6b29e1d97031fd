//! The same training on an engine of the CPU and one of a GPU (or what stands in for it), by a host that computes gradients
//! from the parameters it reads and gives them to the engine where that wants them.

use fsdp::comm::Communicator;
use fsdp::config::{CudaConfig, EngineConfig};
use fsdp::device::cuda::{Context, DeviceMemory, Priority, Source, Stream};
use fsdp::dtype::DType;
use fsdp::engine::{Engine, FullGradient, ReshardAfterForward};
use fsdp::module::{ModuleTree, ParamId, ROOT};
use fsdp::optim::{AdamWOptions, Optimizer, Rule};
use fsdp::plan::UnitId;
use fsdp::trace::Trace;
use half::{bf16, f16};
use std::sync::Arc;

/// Parameters: their module, name, shape, whether they are trained.
const PARAMS: [(&str, &str, &[i64], bool); 9] = [
    ("", "embed", &[13, 7], true),
    ("a", "weight", &[7, 5], true),
    ("a", "bias", &[5], true),
    ("a", "none", &[0, 3], true),
    ("a", "frozen", &[11], false),
    ("b", "weight", &[33, 9], true),
    ("b", "scale", &[], true),
    ("b.c", "weight", &[64, 3], true),
    ("b.c", "unused", &[6], true),
];
/// In the order of a forward: root, a, b, and c inside b.
const UNITS: UnitId = 4;

pub fn adamw() -> Rule {
    Rule::AdamW(AdamWOptions { lr: 0.01, weight_decay: 0.1, ..AdamWOptions::default() })
}

pub fn numel(param: usize) -> usize {
    PARAMS[param].2.iter().product::<i64>() as usize
}

fn value(param: usize, i: usize) -> f32 {
    ((i * 37 + param * 11) % 101) as f32 / 50.0 - 1.0 + i as f32 * 1e-5
}

/// Where an engine's memory is.
pub enum Place {
    Cpu,
    Gpu { stream: Arc<Stream>, other: Arc<Stream>, source: Source },
}

impl Place {
    pub fn gpu() -> Place {
        let context = Context::new(0).unwrap();
        let stream = || Stream::new(&context, Priority::Usual).unwrap();
        Place::Gpu { stream: stream(), other: stream(), source: Source::pool(&context).unwrap() }
    }

    pub fn config(&self, config: &EngineConfig) -> EngineConfig {
        let cuda = config.cuda.clone().unwrap_or_default();
        let stream = |s: &Stream| CudaConfig { compute_stream: s.raw() as usize, ..cuda.clone() };
        let cuda = match self {
            Place::Cpu => None,
            Place::Gpu { stream: s, .. } => Some(stream(s)),
        };
        EngineConfig { cuda, ..config.clone() }
    }

    /// What lies at an address of the engine's, as the host sees it in order.
    pub fn read(&self, at: *const u8, bytes: usize) -> Vec<u8> {
        let mut data = vec![0u8; bytes];
        // SAFETY: the engine's memory of so many bytes; waited for.
        unsafe {
            match self {
                Place::Cpu => std::ptr::copy_nonoverlapping(at, data.as_mut_ptr(), bytes),
                Place::Gpu { stream, .. } => {
                    stream.download(at as u64, data.as_mut_ptr(), bytes).unwrap();
                    stream.synchronize().unwrap();
                }
            }
        }
        data
    }

    pub fn floats(&self, at: *const f32, len: usize) -> Vec<f32> {
        let bytes = if len == 0 { Vec::new() } else { self.read(at.cast(), 4 * len) };
        bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect()
    }

    /// Gives the engine gradients: one, or several at once.
    fn accumulate(&self, engine: &Engine, grads: &[(ParamId, DType, Vec<u8>)]) {
        let mut memory = Vec::new();
        let mut data = |grad: &[u8]| match self {
            Place::Cpu => grad.as_ptr(),
            Place::Gpu { stream, source, .. } => {
                memory.push(DeviceMemory::new(source, stream, grad.len().max(1), "a gradient").unwrap());
                let at = memory.last().unwrap().address();
                // SAFETY: as many bytes.
                unsafe { stream.upload(grad.as_ptr(), at, grad.len()) }.unwrap();
                at as *const u8
            }
        };
        let full = grads.iter().map(|(param, dtype, g)| FullGradient { param: *param, dtype: *dtype, data: data(g) });
        let full: Vec<FullGradient> = full.collect();
        // SAFETY: as long as the parameters, and there until the call has used them.
        unsafe {
            match full[..] {
                [FullGradient { param, dtype, data }] => engine.accumulate_grad(param, dtype, data),
                _ => engine.accumulate_grads(&full),
            }
        }
        .unwrap();
        if let Place::Gpu { stream, .. } = self {
            stream.synchronize().unwrap();
        }
    }
}

impl Place {
    /// The stream that a GPU's host computes on.
    pub fn stream(&self) -> Arc<Stream> {
        match self {
            Place::Cpu => panic!("the CPU has no streams"),
            Place::Gpu { stream, .. } => stream.clone(),
        }
    }
}

/// What is trained and how.
#[derive(Clone)]
pub struct Case {
    pub config: EngineConfig,
    pub rule: Rule,
    pub steps: usize,
    /// Backwards of a step, and whether the first ones reduce, and end the iteration.
    pub micro: usize,
    pub sync: bool,
    pub last: bool,
    /// Whether the first ones average over replicas.
    pub average: bool,
    pub clip: Option<f64>,
    /// Whether a unit's gradients are given at once.
    pub together: bool,
    /// Whether an order of prefetching is given.
    pub order: bool,
    /// What units other than the root are resharded to after their forward; None: as the strategy says.
    pub after_forward: Option<ReshardAfterForward>,
    /// Whether a rank has a gradient of a parameter in a step.
    pub has: fn(rank: usize, step: usize, param: usize) -> bool,
}

impl Case {
    pub fn new(config: EngineConfig, rule: Rule) -> Case {
        // The last parameter never gets a gradient.
        let has = |_, _, param| param != 8;
        Case {
            config,
            rule,
            steps: 3,
            micro: 1,
            sync: true,
            last: true,
            average: true,
            clip: None,
            together: false,
            order: false,
            after_forward: None,
            has,
        }
    }
}

pub fn tree(data: &[Vec<f32>]) -> ModuleTree {
    let mut tree = ModuleTree::new("Net");
    let a = tree.add_module(ROOT, "a", "Block").unwrap();
    let b = tree.add_module(ROOT, "b", "Block").unwrap();
    let c = tree.add_module(b, "c", "Block").unwrap();
    for ((module, name, shape, trained), data) in PARAMS.iter().zip(data) {
        let module = match *module {
            "" => ROOT,
            "a" => a,
            "b" => b,
            _ => c,
        };
        tree.add_param(module, name, shape, DType::F32, *trained, data.as_ptr().cast()).unwrap();
    }
    // Tied: the root owns it, whoever uses it.
    tree.tie_param(a, "head", 0).unwrap();
    [a, b, c].into_iter().for_each(|m| tree.wrap(m).unwrap());
    tree
}

/// The model with its values in memory of a GPU, which goes with the result.
pub fn tree_on_gpu(place: &Place) -> (ModuleTree, Vec<DeviceMemory>) {
    let mut tree = tree(&values());
    let mut all = Vec::new();
    let stream = place.stream();
    for (p, data) in values().iter().enumerate() {
        let memory = DeviceMemory::new(&Source::Pool, &stream, (data.len() * 4).max(4), "values").unwrap();
        // SAFETY: as many bytes; waited for.
        unsafe { stream.upload(data.as_ptr().cast(), memory.address(), data.len() * 4) }.unwrap();
        stream.synchronize().unwrap();
        tree.set_param_gpu(p as ParamId, memory.address() as *const u8, 0).unwrap();
        all.push(memory);
    }
    (tree, all)
}

pub fn values() -> Vec<Vec<f32>> {
    (0..PARAMS.len()).map(|p| (0..numel(p)).map(|i| value(p, i)).collect()).collect()
}

/// A sharded model and its optimizer.
pub struct Trainer {
    pub engine: Arc<Engine>,
    pub optimizer: Optimizer,
    pub place: Place,
    case: Case,
    /// The number of the model's first unit.
    first: UnitId,
}

impl Trainer {
    pub fn new(comm: Arc<dyn Communicator>, place: Place, case: &Case) -> Trainer {
        let data = values();
        let tree = tree(&data);
        // SAFETY: the data outlives the call.
        let engine = unsafe { Engine::new(&tree, comm, &place.config(&case.config)) };
        let engine = Arc::new(engine.unwrap());
        if case.order {
            let mut trace = Trace::new(&tree);
            for (module, leave) in [(0, false), (1, true), (2, false), (3, true)] {
                trace.enter(module).unwrap();
                if leave {
                    trace.leave(module).unwrap();
                }
            }
            [2, 0].into_iter().for_each(|m| trace.leave(m).unwrap());
            engine.set_prefetch_order(&trace).unwrap();
        }
        for (unit, choice) in (1..UNITS).zip(std::iter::repeat(case.after_forward)) {
            choice.iter().for_each(|choice| engine.set_reshard_after_forward(unit, *choice).unwrap());
        }
        let optimizer = Optimizer::new(engine.clone(), case.rule).unwrap();
        Trainer { engine, optimizer, place, case: case.clone(), first: 0 }
    }

    /// The same for a bigger model, to which that of this one was added: its root has nothing of its own.
    pub fn above(&self, whole: &ModuleTree, comm: Arc<dyn Communicator>) -> Trainer {
        let place = match &self.place {
            Place::Cpu => Place::Cpu,
            Place::Gpu { stream, other, source } => {
                Place::Gpu { stream: stream.clone(), other: other.clone(), source: source.clone() }
            }
        };
        // SAFETY: its values are where they were sharded.
        let engine = Arc::new(unsafe { Engine::new(whole, comm, &place.config(&self.case.config)) }.unwrap());
        let optimizer = Optimizer::new(engine.clone(), self.case.rule).unwrap();
        Trainer { engine, optimizer, place, case: self.case.clone(), first: 1 }
    }

    /// A forward of the first units that nothing follows.
    pub fn forward(&self, units: UnitId) {
        self.engine.set_grad_enabled(false).unwrap();
        (0..units).for_each(|unit| self.engine.pre_forward(unit).unwrap());
        (0..units).rev().for_each(|unit| self.engine.post_forward(unit).unwrap());
        self.engine.set_grad_enabled(true).unwrap();
    }

    /// Some host's backward of a unit: each gradient follows from the parameter as it is computed with.
    fn backward(&self, unit: UnitId, step: usize, micro: usize) {
        let rank = self.engine.world().rank();
        let mut grads = Vec::new();
        for p in self.engine.unit(unit).unwrap().params.clone() {
            let param = p as usize;
            if !PARAMS[param].3 || !(self.case.has)(rank, step, param) {
                continue;
            }
            let dtype = self.engine.param(p).unwrap().compute;
            let data = match numel(param) {
                0 => Vec::new(),
                len => self.place.read(self.engine.param_data(p).unwrap(), len * dtype.size()),
            };
            let word = |b: &[u8]| u16::from_ne_bytes(b.try_into().unwrap());
            let full: Vec<f32> = match dtype {
                DType::BF16 => data.chunks_exact(2).map(|b| bf16::from_bits(word(b)).to_f32()).collect(),
                DType::F16 => data.chunks_exact(2).map(|b| f16::from_bits(word(b)).to_f32()).collect(),
                _ => data.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect(),
            };
            let of = |(i, v): (usize, &f32)| {
                v * 0.5 + ((rank + 1) * (i % 17 + 1)) as f32 / 64.0 - ((step + micro) * (param + 1)) as f32 / 32.0
            };
            let grad = full.iter().enumerate().map(of);
            let grad: Vec<u8> = match dtype {
                DType::BF16 => grad.flat_map(|g| bf16::from_f32(g).to_bits().to_ne_bytes()).collect(),
                DType::F16 => grad.flat_map(|g| f16::from_f32(g).to_bits().to_ne_bytes()).collect(),
                _ => grad.flat_map(f32::to_ne_bytes).collect(),
            };
            grads.push((p, dtype, grad));
        }
        let chunk = if self.case.together { grads.len().max(1) } else { 1 };
        grads.chunks(chunk).for_each(|some| self.place.accumulate(&self.engine, some));
        // As of a tied parameter, which several uses add to.
        grads.iter().filter(|g| g.0 == 0).for_each(|g| self.place.accumulate(&self.engine, std::slice::from_ref(g)));
    }

    /// A forward and a backward through the hooks.
    pub fn pass(&self, step: usize, micro: usize) {
        let (e, at) = (&self.engine, |unit: UnitId| self.first + unit);
        // What is above the model's root.
        let above = || (self.first > 0).then_some(0).into_iter();
        above().for_each(|unit| e.pre_forward(unit).unwrap());
        for unit in 0..UNITS {
            e.pre_forward(at(unit)).unwrap();
            if unit == 1 || unit == 3 {
                e.post_forward(at(unit)).unwrap();
            }
        }
        [2, 0].into_iter().map(at).chain(above()).for_each(|unit| e.post_forward(unit).unwrap());
        if let (1, Place::Gpu { stream, other, .. }) = (step, &self.place) {
            // Backward runs on another stream for a while.
            // SAFETY: both outlive the engine's use of them.
            unsafe {
                e.set_compute_stream(other.raw().cast()).unwrap();
                e.set_compute_stream(stream.raw().cast()).unwrap();
            }
        }
        above().for_each(|unit| e.pre_backward(unit).unwrap());
        for unit in [0, 2, 3] {
            e.pre_backward(at(unit)).unwrap();
            self.backward(at(unit), step, micro);
        }
        [3, 2].into_iter().for_each(|unit| e.post_backward(at(unit)).unwrap());
        e.pre_backward(at(1)).unwrap();
        self.backward(at(1), step, micro);
        [1, 0].into_iter().map(at).chain(above()).for_each(|unit| e.post_backward(unit).unwrap());
    }

    /// Returns the norms from before clipping.
    pub fn train(&self) -> Vec<f64> {
        (0..self.case.steps).flat_map(|step| self.step(step)).collect()
    }

    pub fn step(&self, step: usize) -> Option<f64> {
        let case = &self.case;
        for micro in 0..case.micro {
            let is_last = micro + 1 == case.micro;
            self.engine.set_requires_gradient_sync(case.sync || is_last).unwrap();
            self.engine.set_is_last_backward(case.last || is_last).unwrap();
            self.engine.set_requires_all_reduce(case.average || is_last).unwrap();
            self.pass(step, micro);
        }
        let norm = case.clip.map(|max| self.engine.clip_grad_norm(max, 2.0, true).unwrap());
        self.optimizer.step().unwrap();
        self.engine.zero_grad().unwrap();
        norm
    }

    /// This rank's pieces of parameters and of the optimizer's states, in their order.
    pub fn pieces(&self) -> Vec<Vec<f32>> {
        let mut all = Vec::new();
        for p in 0..PARAMS.len() as ParamId {
            let shard = self.engine.shard(p).unwrap();
            all.push(self.at_home(shard.data, shard.len));
            for name in self.case.rule.states() {
                let state = self.optimizer.state(p, name).unwrap();
                all.push(if state.is_null() { Vec::new() } else { self.at_home(state, shard.len) });
            }
        }
        all
    }

    /// Writes floats where shards have their home.
    pub fn put(&self, at: *mut f32, floats: &[f32]) {
        // SAFETY: as many floats of the engine's; waited for.
        unsafe {
            match (&self.place, self.case.config.cpu_offload) {
                (Place::Gpu { stream, .. }, false) => {
                    stream.upload(floats.as_ptr().cast(), at as u64, size_of_val(floats)).unwrap();
                    stream.synchronize().unwrap();
                }
                _ => std::ptr::copy_nonoverlapping(floats.as_ptr(), at, floats.len()),
            }
        }
    }

    pub fn at_home(&self, at: *const f32, len: usize) -> Vec<f32> {
        match (&self.place, self.case.config.cpu_offload) {
            (Place::Gpu { .. }, false) => self.place.floats(at, len),
            // Pinned memory is the host's.
            _ => Place::Cpu.floats(at, len),
        }
    }
}

pub fn same(got: &[Vec<f32>], want: &[Vec<f32>], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (k, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.len(), want.len(), "{what}, piece {k}");
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert_eq!(g.to_bits(), w.to_bits(), "{what}, piece {k}, element {i}: {g}, not {w}");
        }
    }
}
