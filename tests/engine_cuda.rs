//! Engines on a GPU that is this machine's CPU, with ranks as threads that meet in an NCCL of this process: training equals
//! that of engines on the CPU bit by bit.

#[allow(dead_code)]
mod common;
#[path = "cuda/engine.rs"]
mod engine;
#[path = "cuda/fake.rs"]
mod fake;
#[path = "nccl/fake.rs"]
#[allow(dead_code)]
mod nccl;

use common::{ranks, Folder};
use engine::{adamw, same, Case, Place, Trainer};
use fsdp::checkpoint::Contents;
use fsdp::comm::{single, Communicator};
use fsdp::config::{CudaConfig, EngineConfig, Registration, Strategy};
use fsdp::device::cuda::{Context, DeviceAllocator, DeviceMemory, Source, Stream};
use fsdp::dtype::DType;
use fsdp::engine::{Engine, FullOptions, FullParams, ReshardAfterForward};
use fsdp::forecast::{Forecast, Request};
use fsdp::module::{ModuleTree, ROOT};
use fsdp::optim::{Rule, SgdOptions};
use fsdp::scaler::{GradScaler, ScalerState};
use nccl::Fake;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

fn sgd() -> Rule {
    Rule::Sgd(SgdOptions { lr: 0.05, momentum: 0.9, weight_decay: 0.01, ..SgdOptions::default() })
}

/// Trains both and compares; returns the GPU's trainers' last words.
fn equal<T: Send>(worlds: &[usize], case: &Case, what: &str, then: impl Fn(&Trainer) -> T + Sync) {
    for world in worlds {
        let run = |place: fn() -> Place| {
            ranks(*world, |comm: Arc<dyn Communicator>| {
                let trainer = Trainer::new(comm, place(), case);
                let norms = trainer.train();
                then(&trainer);
                (trainer.pieces(), norms)
            })
        };
        let (cpu, gpu) = (run(|| Place::Cpu), run(Place::gpu));
        for (rank, ((got, norms), (want, expected))) in gpu.iter().zip(&cpu).enumerate() {
            same(got, want, &format!("{what}, rank {rank} of {world}"));
            for (got, want) in norms.iter().zip(expected) {
                assert!((got - want).abs() <= 1e-12 * want, "{what}: norm {got}, not {want}");
            }
        }
    }
}

const ALL: &[usize] = &[1, 2, 3];

#[test]
fn training_equals_the_cpus_bit_by_bit() {
    let _fake = Fake::meeting();
    for (param, what) in [(None, "float32"), (Some(DType::BF16), "bfloat16"), (Some(DType::F16), "float16")] {
        let config = EngineConfig { param_dtype: param, ..EngineConfig::default() };
        for rule in [adamw(), sgd()] {
            equal(ALL, &Case::new(config.clone(), rule), what, |_| ());
        }
    }
}

#[test]
fn every_option_gives_the_cpus_bits() {
    let _fake = Fake::meeting();
    let base = |config: EngineConfig| Case { steps: 2, ..Case::new(config, adamw()) };
    let config = EngineConfig { param_dtype: Some(DType::BF16), ..EngineConfig::default() };
    equal(&[1, 2], &Case { clip: Some(0.5), ..base(config.clone()) }, "clipped", |_| ());
    equal(&[1, 3], &Case { micro: 3, ..base(config.clone()) }, "accumulated in shards", |_| ());
    let together = Case { together: true, micro: 2, sync: false, ..base(config.clone()) };
    equal(ALL, &together, "gradients given at once", |_| ());
    let few = EngineConfig { gradient_slots: 1, ..config.clone() };
    equal(&[1, 3], &Case { micro: 3, sync: false, ..base(few) }, "accumulated unsharded", |t| {
        assert!(t.engine.cuda_stats().is_err() || t.engine.stats().unwrap().gradients.overflow_peak > 0);
    });
    equal(&[2], &Case { micro: 3, last: false, ..base(config.clone()) }, "micro-batches", |_| ());
    let some = |rank: usize, step: usize, param: usize| match param {
        1 => rank == 0,
        2 => rank == 1,
        5 => step == 0,
        7 => false,
        _ => param != 8,
    };
    equal(&[1, 2, 3], &Case { has: some, steps: 3, ..base(config.clone()) }, "gradients on some ranks", |t| {
        assert!(t.engine.shard(7).unwrap().grad.is_null());
        let steps = |p| t.optimizer.steps(p).unwrap();
        assert_eq!([steps(0), steps(7), steps(8), steps(4)], [3, 0, 0, 0]);
    });
    let offload = EngineConfig { cpu_offload: true, ..config.clone() };
    equal(ALL, &Case { clip: Some(1.0), micro: 2, ..base(offload) }, "offloaded", |_| ());
    equal(&[2], &base(EngineConfig { cpu_offload: true, ..EngineConfig::default() }), "offloaded float32", |_| ());
    for strategy in [Strategy::ShardGradOp, Strategy::FullShard] {
        let config = EngineConfig { strategy, gradient_slots: 1, ..config.clone() };
        equal(&[1, 2], &Case { order: true, ..base(config) }, strategy.name(), |t| {
            let stats = t.engine.stats().unwrap();
            assert!(t.engine.cuda_stats().is_err() || stats.prefetches > 0, "{stats:?}");
        });
    }
    // 16-bit reductions of one rank are rounded alike; of several NCCL's sums are its own.
    equal(&[1], &base(EngineConfig { reduce_dtype: DType::BF16, ..config.clone() }), "reduced in bfloat16", |_| ());
    let deep = CudaConfig { prefetch: 3, max_units_in_flight: 4, ..CudaConfig::default() };
    equal(&[2], &Case { order: true, ..base(EngineConfig { cuda: Some(deep), ..config }) }, "prefetched far", |_| ());
}

#[test]
fn sixteen_bit_sums_are_close() {
    let _fake = Fake::meeting();
    let config = EngineConfig { reduce_dtype: DType::BF16, ..EngineConfig::default() };
    let case = Case { steps: 1, ..Case::new(config, Rule::Sgd(SgdOptions { lr: 1.0, ..SgdOptions::default() })) };
    let run = |place: fn() -> Place| {
        ranks(2, |comm| {
            let trainer = Trainer::new(comm, place(), &case);
            trainer.train();
            trainer.pieces()
        })
    };
    for (got, want) in run(Place::gpu).iter().flatten().flatten().zip(run(|| Place::Cpu).iter().flatten().flatten()) {
        // One rounding to 8 bits of gradients below 64.
        assert!((got - want).abs() <= 0.25, "{got}, not {want}");
    }
}

#[test]
fn memory_is_the_plans() {
    let fake = Fake::meeting();
    for (world, cpu_offload) in [(1, false), (2, false), (2, true)] {
        let config = EngineConfig { param_dtype: Some(DType::BF16), cpu_offload, ..EngineConfig::default() };
        let case = Case { order: true, ..Case::new(config, adamw()) };
        let before = fake.device_bytes();
        ranks(world, |comm| {
            let rank = comm.rank();
            let t = Trainer::new(comm, Place::gpu(), &case);
            t.train();
            let request = Request {
                world_size: world,
                rank: Some(rank),
                config: t.place.config(&case.config),
                optimizer_bytes_per_element: 8,
            };
            let plan = Forecast::new(&engine::tree(&engine::values()), &request).unwrap();
            let (cuda, stats) = (t.engine.cuda_stats().unwrap(), t.engine.stats().unwrap());
            assert_eq!((cuda.pool_bytes, cuda.slot_bytes), (plan.pool_bytes, plan.gradient_slot_bytes));
            assert_eq!(stats.unit_buffer_bytes, plan.unit_buffer_bytes);
            assert_eq!((cuda.overflows, cuda.evictions), (0, 0), "{cuda:?}");
            assert_eq!(cuda.pool_buffers, 4, "three nested units and one ahead");
            // What aligns the optimizer's states comes on top: at most 64 bytes each.
            let states = if cpu_offload { 0 } else { 9 * 2 * 64 + 3 * 4 * 64 };
            // So do places of what is registered.
            let most = plan.device_peak_bytes + states + if world > 1 { 8 * 255 } else { 0 };
            assert!((plan.device_peak_bytes..=most).contains(&cuda.device_bytes), "{cuda:?} {plan:?}");
            assert!(cuda.device_bytes_peak >= cuda.device_bytes);
            assert_eq!(stats.offloaded_bytes, plan.offloaded_bytes);
            let steps = 3;
            assert_eq!(stats.all_gathers, steps * plan.all_gather.collectives);
            assert_eq!(stats.all_gather_bytes, steps * plan.all_gather.bytes);
        });
        assert_eq!(fake.device_bytes(), before, "all of it was given back");
    }
}

/// A host's allocator; it has what is lent.
#[derive(Default)]
struct Lender(Mutex<HashMap<u64, DeviceMemory>>);

impl DeviceAllocator for Lender {
    fn alloc(&self, bytes: usize, stream: *mut c_void) -> Option<u64> {
        // SAFETY: a stream of the engine's.
        let stream = unsafe { Stream::borrowed(&Context::new(0).unwrap(), stream) }.unwrap();
        let memory = DeviceMemory::new(&Source::Pool, &stream, bytes, "a lender").ok()?;
        let address = memory.address();
        self.0.lock().unwrap().insert(address, memory);
        Some(address)
    }

    fn free(&self, address: u64, _: usize, _: *mut c_void) {
        self.0.lock().unwrap().remove(&address).unwrap();
    }
}

#[test]
fn collectives_use_what_is_registered() {
    let fake = Fake::meeting();
    let own = |registration| CudaConfig { registration, ..CudaConfig::default() };
    for (registration, lends, registered) in [
        (Registration::Auto, false, true),
        (Registration::Never, false, false),
        (Registration::Auto, true, false),
        (Registration::Always, true, true),
    ] {
        let lender = Arc::new(Lender::default());
        let allocator = lends.then(|| lender.clone() as Arc<dyn DeviceAllocator>);
        let cuda = Some(CudaConfig { allocator, ..own(registration) });
        let config = EngineConfig { param_dtype: Some(DType::BF16), cuda, ..EngineConfig::default() };
        let case = Case { order: true, ..Case::new(config, adamw()) };
        let before = (fake.count("inside"), fake.count("outside"));
        let (world, steps) = (3, 3);
        equal(&[world], &case, "registered", |t| {
            let Ok(cuda) = t.engine.cuda_stats() else { return };
            // Every place is aligned to 256 bytes.
            let (fixed, places) = (cuda.pool_bytes, 255 * cuda.pool_buffers as u64);
            let expected = if registered { fixed..=fixed + places } else { 0..=0 };
            assert!(expected.contains(&cuda.registered_bytes), "{cuda:?}");
            assert!(cuda.device_bytes > cuda.registered_bytes, "{cuda:?}");
            assert_eq!(t.engine.stats().unwrap().gradients.reduce_scatters, 4 * steps, "{cuda:?}");
            assert_eq!(cuda.overflows, 0);
        });
        // Four units: gathered once or twice, in two types one of them, and reduced once, on each rank.
        let (inside, outside) = (fake.count("inside") - before.0, fake.count("outside") - before.1);
        let (gathers, reductions) = (world as i32 * steps as i32 * 7, world as i32 * steps as i32 * 4);
        match registered {
            true => assert!(inside >= gathers && outside == reductions, "{inside} inside, {outside} outside"),
            false => assert!(inside == 0 && outside >= gathers + reductions, "{inside} inside, {outside} outside"),
        }
        assert_eq!(lender.0.lock().unwrap().len(), 0, "{registration:?}");
    }
    // Beyond the pool nothing is registered.
    let before = fake.count("outside");
    let three = CudaConfig { prefetch: 0, ..own(Registration::Auto) };
    let config = EngineConfig { cuda: Some(three), ..EngineConfig::default() };
    let never = Some(ReshardAfterForward::Never);
    equal(&[2], &Case { after_forward: never, ..Case::new(config, adamw()) }, "four units in three buffers", |_| ());
    assert!(fake.count("outside") > before + 2 * 3 * 4);
    let strict = ["destroy, with registrations", "free of what is registered, or is not NCCL's"];
    assert!(!fake.log().iter().any(|line| strict.contains(&line.as_str())));
    assert_eq!((fake.count("alive"), fake.count("pieces")), (0, 0));
}

/// Which gradients a rank has decides when it takes a slot, and so which one: NCCL, which wants the same place of registered memory
/// on every rank, does not know them.
#[test]
fn places_of_what_is_registered_do_not_depend_on_a_ranks_gradients() {
    let fake = Fake::meeting();
    // The root's come first where there are some, and take its slot before the others'; without them it takes one at the end.
    let root_on_one = |rank: usize, _: usize, param: usize| param != 8 && (param != 0 || rank == 0);
    let one_has_none = |rank: usize, step: usize, param: usize| param != 8 && (rank != 1 || step == 1);
    for has in [root_on_one, one_has_none] {
        for gradient_slots in [1, 2, 3, 0] {
            let config = EngineConfig { gradient_slots, ..EngineConfig::default() };
            let base = Case { has, ..Case::new(config, adamw()) };
            for case in [base.clone(), Case { micro: 2, sync: false, ..base.clone() }, Case { micro: 2, ..base }] {
                equal(&[2, 3], &case, &format!("{gradient_slots} slots"), |t| {
                    assert!(t.engine.cuda_stats().map_or(true, |s| s.registered_bytes > 0));
                });
            }
        }
    }
    assert_eq!((fake.count("alive"), fake.count("pieces")), (0, 0));
}

#[test]
fn checkpoints_go_from_gpus_to_cpus_and_back() {
    let _fake = Fake::meeting();
    let folder = Folder::new("engine-cuda");
    let config = |cpu_offload| EngineConfig { cpu_offload, ..EngineConfig::default() };
    let case = |offload| Case::new(config(offload), adamw());
    // What two more steps give after a load, whoever saved and whoever loads.
    let go_on = |world: usize, place: fn() -> Place, offload: bool, from: Option<&str>, save: &str| {
        ranks(world, |comm| {
            let t = Trainer::new(comm, place(), &case(offload));
            let contents = Contents::default();
            // SAFETY: there is nothing beside the shards and states.
            match from {
                Some(from) => unsafe { t.optimizer.load(&folder.join(from), &contents) }.unwrap(),
                None => drop(t.train()),
            }
            [3, 4].into_iter().for_each(|step| assert!(t.step(step).is_none()));
            // SAFETY: as above.
            unsafe {
                t.optimizer.save(&folder.join(save), &contents).unwrap();
                t.optimizer.save_async(&folder.join(&format!("{save}-async")), &contents).unwrap().wait().unwrap();
            }
            let mut full = Vec::new();
            t.engine
                .each_full_param(false, &mut |_, data, len| {
                    full.push(if len == 0 {
                        Vec::new()
                    } else {
                        // SAFETY: so many floats in host memory.
                        unsafe { std::slice::from_raw_parts(data, len) }.to_vec()
                    });
                    Ok(())
                })
                .unwrap();
            t.optimizer
                .each_full_state(false, &mut |_, _, data| {
                    full.push(data.to_vec());
                    Ok(())
                })
                .unwrap();
            full
        })
    };
    let saved = |place: fn() -> Place, name: &str| {
        ranks(2, |comm| {
            let t = Trainer::new(comm, place(), &case(false));
            t.train();
            // SAFETY: as above.
            unsafe { t.optimizer.save(&folder.join(name), &Contents::default()) }.unwrap();
        })
    };
    saved(Place::gpu, "gpu");
    saved(|| Place::Cpu, "cpu");
    let want = go_on(2, || Place::Cpu, false, None, "want");
    for (k, (world, place, offload, from)) in [
        (2, Place::gpu as fn() -> Place, false, "cpu"),
        (2, || Place::Cpu, false, "gpu"),
        (1, Place::gpu, false, "gpu"),
        (2, Place::gpu, true, "gpu"),
    ]
    .into_iter()
    .enumerate()
    {
        let got = go_on(world, place, offload, Some(from), &format!("got{k}"));
        // With one rank gradients are another's: only what is there at first is compared.
        if world == 2 {
            (0..2).for_each(|rank| same(&got[rank], &want[rank], &format!("load {k}, rank {rank}")));
        }
    }
}

#[test]
fn full_parameters_are_read_and_written_on_the_host() {
    let _fake = Fake::meeting();
    for world in [1, 2] {
        ranks(world, |comm| {
            let case = Case::new(EngineConfig::default(), sgd());
            let t = Trainer::new(comm, Place::gpu(), &case);
            for rank0_only in [false, true] {
                let options = FullOptions { writeback: true, rank0_only, with_grads: false };
                let mut full = FullParams::open(t.engine.clone(), None, options).unwrap();
                if let Some(data) = full.data(5).unwrap() {
                    // SAFETY: the parameter's floats, in this scope's memory.
                    let floats = unsafe { std::slice::from_raw_parts_mut(data, engine::numel(5)) };
                    floats.iter_mut().for_each(|x| *x += 1.0);
                }
                full.close().unwrap();
            }
            let piece = &t.engine.param(5).unwrap().piece;
            let want: Vec<f32> = engine::values()[5].iter().map(|x| x + 1.0 + 1.0).collect();
            let shard = t.engine.shard(5).unwrap();
            assert_eq!(t.at_home(shard.data, shard.len), want[piece.param_offset..piece.param_offset + piece.len]);
            t.train();
        });
    }
}

#[test]
fn scaled_gradients_are_unscaled_and_bad_steps_skipped() {
    let _fake = Fake::meeting();
    for cpu_offload in [false, true] {
        let config = EngineConfig { param_dtype: Some(DType::F16), cpu_offload, ..EngineConfig::default() };
        let case = Case::new(config, adamw());
        let run = |place: fn() -> Place| {
            ranks(2, |comm| {
                let rank = comm.rank();
                let t = Trainer::new(comm, place(), &case);
                let state = ScalerState { scale: 4.0, ..ScalerState::default() };
                let scaler = GradScaler::new(state, true).unwrap();
                let mut made = Vec::new();
                for step in 0..3 {
                    t.pass(step, 0);
                    if (step, rank) == (1, 1) {
                        // One element of one rank, wherever it lies.
                        let shard = t.engine.shard(5).unwrap();
                        t.put(shard.grad, &[f32::INFINITY]);
                    }
                    made.push(scaler.step(&t.optimizer).unwrap());
                    scaler.update().unwrap();
                    t.engine.zero_grad().unwrap();
                }
                assert_eq!(made, [true, false, true]);
                assert_eq!(scaler.scale().unwrap(), 2.0);
                t.pieces()
            })
        };
        let (cpu, gpu) = (run(|| Place::Cpu), run(Place::gpu));
        (0..2).for_each(|rank| same(&gpu[rank], &cpu[rank], &format!("rank {rank}, offload {cpu_offload}")));
    }
}

#[test]
fn rank_0s_values_and_values_on_the_gpu() {
    let _fake = Fake::meeting();
    let config = EngineConfig { sync_module_states: true, ..EngineConfig::default() };
    equal(&[2], &Case::new(config, adamw()), "synchronized", |_| ());
    let place = Place::gpu();
    let config = place.config(&EngineConfig::default());
    let (tree, _memory) = engine::tree_on_gpu(&place);
    // SAFETY: the values are there until the engine is made.
    let engine = Arc::new(unsafe { Engine::new(&tree, single::init(), &config) }.unwrap());
    for (p, want) in engine::values().iter().enumerate() {
        let shard = engine.shard(p as u32).unwrap();
        assert_eq!(&place.floats(shard.data, shard.len), want);
    }
    // SAFETY: as above.
    let e = unsafe { Engine::new(&tree, single::init(), &EngineConfig::default()) }.err().unwrap();
    assert!(e.message.contains("\"embed\" lies on GPU 0, but the engine computes on the CPU"), "{e}");
}

/// A sharded model becomes the lower part of a bigger one, which trains on with the same shards, and then the first one again.
#[test]
fn engines_share_shards() {
    let _fake = Fake::meeting();
    for (world, cpu_offload, strategy) in [
        (1, false, Strategy::FullShard),
        (2, false, Strategy::FullShard),
        (3, true, Strategy::ShardGradOp),
        (2, false, Strategy::NoShard),
    ] {
        let config = EngineConfig { param_dtype: Some(DType::BF16), cpu_offload, strategy, ..EngineConfig::default() };
        let case = Case { order: true, ..Case::new(config, sgd()) };
        let run = |place: fn() -> Place| {
            ranks(world, |comm| {
                let first = Trainer::new(comm.clone(), place(), &case);
                first.step(0);
                // What it gathers ahead is old when the other one has stepped.
                first.forward(3);
                let mut whole = ModuleTree::new("Whole");
                whole.adopt(ROOT, "", first.engine.model().clone()).unwrap();
                let second = first.above(&whole, comm);
                first.engine.unshard(0).unwrap();
                let e = second.engine.unshard(1).unwrap_err();
                assert!(e.message.contains("another engine that shares them"), "{e}");
                first.engine.finish_forward().unwrap();
                for step in 1..3 {
                    second.step(step);
                }
                first.step(3);
                let seen = first.pieces();
                drop(first);
                second.step(4);
                (seen, second.pieces())
            })
        };
        for (rank, (got, want)) in run(Place::gpu).into_iter().zip(run(|| Place::Cpu)).enumerate() {
            same(&got.0, &want.0, &format!("rank {rank} of {world}, the first"));
            same(&got.1, &want.1, &format!("rank {rank} of {world}, the second"));
        }
    }
}
