//! Training steps of a small model on a GPU's queues, by the engine's own kernels alone, against the same on the CPU.
//!
//! The gradient of a parameter is half of it, as it was computed with; every rank has the same shards, so that the mean is what each has.

use fsdp::comm::nccl::{NcclComm, NcclQueues, UnitShards};
use fsdp::config::EngineConfig;
use fsdp::device::cuda::kernels::{Kernels, Piece, Step};
use fsdp::device::cuda::{DeviceMemory, Priority, Source, Stream};
use fsdp::dtype::DType;
use fsdp::module::{ModuleTree, ROOT};
use fsdp::optim::{AdamWOptions, AdamWStep};
use fsdp::pipeline::{Limits, Pipeline, UnitBytes};
use fsdp::plan::{Plan, UnitId};
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

/// Trains with two communicators of the same ranks, which all run this; computes and reduces in these types.
pub fn train(comms: [Arc<NcclComm>; 2], dtypes: (DType, DType)) {
    let context = comms[0].context().clone();
    let compute = Stream::new(&context, Priority::Usual).unwrap();
    let (kernels, source) = (Kernels::load(&context).unwrap(), Source::pool(&context).unwrap());
    let plan = plan(&comms[0], dtypes);
    let units: Vec<UnitId> = (0..plan.units.len() as UnitId).collect();
    let floats = |len: usize, values: &[f32]| {
        let memory = DeviceMemory::new(&source, &compute, len * 4, "a test").unwrap();
        // SAFETY: as many bytes; waited for.
        unsafe { compute.upload(values.as_ptr().cast(), memory.address(), values.len() * 4) }.unwrap();
        compute.synchronize().unwrap();
        memory
    };
    // Of each unit: masters, gradients, and the optimizer's two states.
    let shards: Vec<[DeviceMemory; 4]> = plan
        .units
        .iter()
        .enumerate()
        .map(|(u, unit)| {
            let len = unit.layout.shard_len;
            let [a, b, c] = [floats(len, &vec![7.0; len]), floats(len, &vec![0.0; len]), floats(len, &vec![0.0; len])];
            [floats(len, &first_values(u, len)), a, b, c]
        })
        .collect();
    let places: Vec<UnitShards> =
        shards.iter().map(|s| UnitShards { masters: s[0].address(), grads: s[1].address() }).collect();
    let bytes = UnitBytes::of(&plan);
    let limits = Limits::of(&bytes, 1);
    let mut pipeline = Pipeline::new(bytes, &limits).unwrap();
    // SAFETY: the shards outlive the queues, and are written below as they ask for.
    let queues = unsafe { NcclQueues::new(&plan, &limits, &places, &kernels, &source, &compute, comms) };
    let mut queues = queues.unwrap();

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
        let step = |(unit, s): (&fsdp::plan::UnitPlan, &[DeviceMemory; 4])| Step {
            param: s[0].address(),
            grad: s[1].address(),
            states: [s[2].address(), s[3].address()],
            len: unit.layout.shard_len as u64,
        };
        let steps: Vec<Step> = plan.units.iter().zip(&shards).map(step).collect();
        // SAFETY: the shards' memory, which the pipeline has given to compute.
        unsafe { kernels.adamw(&compute, &numbers(t), &steps) }.unwrap();
        queues.poll().unwrap();
    }
    compute.synchronize().unwrap();
    assert!(queues.poll().unwrap());
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
