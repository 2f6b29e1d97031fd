//! Training steps of a small model on a GPU's queues, by the engine's own kernels alone, against the same on the CPU.
//!
//! The gradient of a parameter is half of it, as it was computed with; every rank has the same shards, so that the mean
//! is what each has.

use fsdp::comm::nccl::{Comms, NcclComm, NcclPair, NcclQueues, Plane, Shards, UnitShards};
use fsdp::comm::{Check, Communicator, Kind};
use fsdp::config::EngineConfig;
use fsdp::device::cuda::kernels::{Kernels, Piece, Step};
use fsdp::device::cuda::{Compute, DeviceMemory, Priority, Source, Stream};
use fsdp::dtype::DType;
use fsdp::module::{ModuleTree, ROOT};
use fsdp::optim::{AdamWOptions, AdamWStep};
use fsdp::pipeline::{Limits, Pipeline, UnitBytes};
use fsdp::plan::{Plan, UnitId, UnitPlan};
use fsdp::wrap;
use half::bf16;
use std::sync::Arc;

const STEPS: u64 = 4;

fn plan(comm: &NcclComm, dtypes: (DType, DType)) -> Plan {
    let mut tree = ModuleTree::new("Net");
    tree.add_param(ROOT, "scale", &[3], DType::F32, true, std::ptr::null()).unwrap();
    for (name, shape) in [("a", [33, 7]), ("b", [64, 40]), ("c", [1, 5])] {
        let module = tree.add_module(ROOT, name, "Linear").unwrap();
        tree.add_param(module, "weight", &shape, DType::F32, true, std::ptr::null()).unwrap();
        tree.add_param(module, "bias", &shape[..1], DType::F32, true, std::ptr::null()).unwrap();
    }
    wrap::always(&mut tree).unwrap();
    let config = EngineConfig { param_dtype: Some(dtypes.0), reduce_dtype: dtypes.1, ..EngineConfig::default() };
    Plan::new(&tree.with_engine_dtypes(&config), comm.rank(), comm.world_size()).unwrap()
}

fn first_values(unit: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 37 + unit * 11) % 101) as f32 / 50.0 - 1.0 + i as f32 * 1e-5).collect()
}

fn numbers(t: u64) -> AdamWStep {
    AdamWStep::new(&AdamWOptions::default(), 0.01, 0.1, t)
}

/// The shard of a unit after all steps, on the CPU.
fn on_cpu(unit: usize, len: usize, (param, reduce): (DType, DType)) -> Vec<f32> {
    let round = |dtype: DType, x: f32| if dtype == DType::BF16 { bf16::from_f32(x).to_f32() } else { x };
    let (mut w, mut m, mut v) = (first_values(unit, len), vec![0.0; len], vec![0.0; len]);
    for t in 1..=STEPS {
        let grad: Vec<f32> = w.iter().map(|w| round(reduce, round(param, *w) * 0.5)).collect();
        numbers(t).step(&mut w, &grad, &mut m, &mut v);
    }
    w
}

/// A small model on a GPU, and what it is trained with.
pub struct Trainer {
    pub plan: Plan,
    pub pipeline: Pipeline,
    pub queues: NcclQueues,
    compute: Arc<Stream>,
    kernels: Arc<Kernels>,
    /// Of each unit: masters, gradients, and the optimizer's two states.
    shards: Vec<[DeviceMemory; 4]>,
    dtypes: (DType, DType),
}

impl Trainer {
    /// Computes and reduces in these types.
    pub fn new(
        control: Arc<dyn Communicator>,
        [gather, reduce]: [Arc<NcclComm>; 2],
        dtypes: (DType, DType),
    ) -> Trainer {
        let context = gather.context().clone();
        let compute = Stream::new(&context, Priority::Usual).unwrap();
        let (kernels, source) = (Kernels::load(&context).unwrap(), Source::pool(&context).unwrap());
        let plan = plan(&gather, dtypes);
        let floats = |values: &[f32]| {
            let memory = DeviceMemory::new(&source, &compute, size_of_val(values), "a test").unwrap();
            // SAFETY: as many bytes; waited for.
            unsafe { compute.upload(values.as_ptr().cast(), memory.address(), size_of_val(values)) }.unwrap();
            compute.synchronize().unwrap();
            memory
        };
        let of_unit = |(u, unit): (usize, &UnitPlan)| {
            let len = unit.layout.shard_len;
            [first_values(u, len), vec![7.0; len], vec![0.0; len], vec![0.0; len]].map(|values| floats(&values))
        };
        let shards: Vec<[DeviceMemory; 4]> = plan.units.iter().enumerate().map(of_unit).collect();
        let places: Vec<UnitShards> =
            shards.iter().map(|s| UnitShards { masters: s[0].address(), grads: s[1].address() }).collect();
        let bytes = UnitBytes::of(&plan);
        let limits = Limits::of(&bytes, 1);
        let pipeline = Pipeline::new(bytes, &limits).unwrap();
        let names: Vec<_> = (0..plan.units.len() as UnitId).map(|u| plan.unit_name(u)).collect();
        let first_unit = control.name_units(&names);
        let host = control.clone();
        let plane = Plane { control, first_unit, host, place: None };
        let comms = Comms { plane, nccl: Some(NcclPair { gather, reduce }), replicas: None, groups: Vec::new() };
        let memory = Compute::new(&compute, source).unwrap();
        let places = Shards { units: &places, on_host: false };
        // SAFETY: the shards are kept with the queues, and written as they ask for.
        let queues = unsafe { NcclQueues::new(&plan, &limits, &places, &kernels, &memory, comms, None) };
        Trainer { plan, pipeline, queues: queues.unwrap(), compute, kernels, shards, dtypes }
    }
}

/// Trains with communicators of the same ranks, which all run this, and compares with the CPU.
pub fn train(control: Arc<dyn Communicator>, comms: [Arc<NcclComm>; 2], dtypes: (DType, DType)) {
    let trainer = Trainer::new(control, comms, dtypes);
    let Trainer { plan, mut pipeline, mut queues, compute, kernels, shards, dtypes } = trainer;
    let units: Vec<UnitId> = (0..plan.units.len() as UnitId).collect();
    for t in 1..=STEPS {
        for (i, unit) in units.iter().copied().enumerate() {
            pipeline.unshard(&mut queues, unit, &units[i + 1..(i + 2).min(units.len())]).unwrap();
            pipeline.reshard(&mut queues, unit).unwrap();
        }
        for unit in units.iter().copied().rev() {
            let next: Vec<UnitId> = unit.checked_sub(1).into_iter().collect();
            let buffer = pipeline.unshard(&mut queues, unit, &next).unwrap().unwrap();
            let slot = pipeline.collect(&mut queues, unit).unwrap().unwrap();
            let from = queues.in_buffer(unit, buffer, dtypes.0).unwrap();
            let piece =
                Piece { from, to: queues.in_slot(slot), len: plan.units[unit as usize].layout.len as u64, add: 0 };
            // SAFETY: the pipeline says where the unit and its slot are, for work on compute.
            unsafe {
                kernels.copy_in(&compute, dtypes.0, &[piece]).unwrap();
                kernels.scale(&compute, DType::F32, &[piece], 0.5).unwrap();
            }
            pipeline.reduce(&mut queues, unit).unwrap();
            pipeline.reshard(&mut queues, unit).unwrap();
        }
        pipeline.finish_backward(&mut queues).unwrap();
        pipeline.begin_write(&mut queues).unwrap();
        let step = |(unit, s): (&UnitPlan, &[DeviceMemory; 4])| Step {
            param: s[0].address(),
            grad: s[1].address(),
            states: [s[2].address(), s[3].address()],
            len: unit.layout.shard_len as u64,
        };
        let steps: Vec<Step> = plan.units.iter().zip(&shards).map(step).collect();
        // SAFETY: the shards' memory, which the pipeline has given to compute.
        unsafe { kernels.adamw(&compute, &numbers(t), &steps) }.unwrap();
        queues.comms.poll().unwrap();
        // As an engine does once the first iteration was the same on all ranks.
        queues.set_gathering(Kind::AllGather, Check::Announce);
    }
    queues.comms.finish().unwrap();
    compute.synchronize().unwrap();
    assert_eq!(pipeline.counts().all_gathers, 2 * STEPS * units.len() as u64);

    for (u, (unit, s)) in plan.units.iter().zip(&shards).enumerate() {
        let len = unit.layout.shard_len;
        let mut got = vec![0f32; len];
        // SAFETY: as many bytes; waited for.
        unsafe { compute.download(s[0].address(), got.as_mut_ptr().cast(), len * 4) }.unwrap();
        compute.synchronize().unwrap();
        let want = on_cpu(u, len, dtypes);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.to_bits(), want.to_bits(), "{dtypes:?}, unit {u}, element {i}: {got}, not {want}");
        }
    }
}
