//! Engines on a GPU that is this machine's CPU whose ranks are several groups: replicas, and smaller groups that units are
//! resharded to. Training equals that of engines on the CPU bit by bit, what they take and move is the plan's, and ranks that
//! do not do the same are an error of all, in every group.

#[allow(dead_code)]
mod common;
#[path = "cuda/engine.rs"]
#[allow(dead_code)]
mod engine;
#[path = "cuda/fake.rs"]
mod fake;
#[path = "nccl/fake.rs"]
#[allow(dead_code)]
mod nccl;

use common::{ranks, Folder};
use engine::{adamw, same, Case, Place, Trainer};
use fsdp::checkpoint::Contents;
use fsdp::config::{CudaConfig, EngineConfig, Registration, Strategy};
use fsdp::dtype::DType;
use fsdp::engine::ReshardAfterForward;
use fsdp::error::{Error, Status};
use fsdp::forecast::{Forecast, Request};
use fsdp::optim::{Rule, SgdOptions};
use nccl::Fake;
use std::time::Instant;

/// Strategies, ranks of a shard group (0: none is said), and of all.
const NO_SHARD: [(Strategy, u32, usize); 3] =
    [(Strategy::NoShard, 0, 2), (Strategy::NoShard, 0, 3), (Strategy::NoShard, 0, 4)];
const HYBRID: [(Strategy, u32, usize); 4] = [
    (Strategy::HybridShard, 2, 4),
    (Strategy::HybridShardGradOp, 2, 4),
    (Strategy::HybridShard, 1, 3),
    (Strategy::HybridShard, 3, 6),
];

fn case(strategy: Strategy, shard_size: u32) -> Case {
    let param_dtype = Some(DType::BF16);
    Case::new(EngineConfig { strategy, shard_size, param_dtype, ..EngineConfig::default() }, adamw())
}

/// Trains both and compares.
fn equal(world: usize, case: &Case, what: &str) {
    let run = |place: fn() -> Place| {
        ranks(world, |comm| {
            let trainer = Trainer::new(comm, place(), case);
            let norms = trainer.train();
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

#[test]
fn training_equals_the_cpus_bit_by_bit() {
    let fake = Fake::meeting();
    let sgd = Rule::Sgd(SgdOptions { lr: 0.05, momentum: 0.9, ..SgdOptions::default() });
    for (strategy, shard_size, world) in NO_SHARD.into_iter().chain(HYBRID) {
        let base = case(strategy, shard_size);
        let what = |what: &str| format!("{}, {shard_size} of {world}, {what}", strategy.name());
        equal(world, &Case { order: true, clip: Some(0.5), ..base.clone() }, &what("clipped"));
        let full = EngineConfig { param_dtype: None, cpu_offload: true, ..base.config.clone() };
        equal(world, &Case { config: full, rule: sgd, micro: 2, ..base.clone() }, &what("offloaded"));
        // A parameter may have gradients on some ranks, in one group only, in one step only, or never.
        let some = |rank: usize, step: usize, param: usize| match param {
            1 => rank == 0,
            2 => rank + 1 == 3,
            5 => step == 0,
            7 => false,
            _ => param != 8,
        };
        equal(world, &Case { has: some, ..base }, &what("gradients on some ranks"));
    }
    assert_eq!(fake.count("alive"), 0);
}

#[test]
fn gradients_accumulate_as_on_the_cpu() {
    let _fake = Fake::meeting();
    for (strategy, shard_size, world) in [NO_SHARD[1], HYBRID[0], HYBRID[3]] {
        let base = Case { micro: 3, steps: 2, ..case(strategy, shard_size) };
        let few = EngineConfig { gradient_slots: 1, ..base.config.clone() };
        for (what, case) in [
            ("in shards", base.clone()),
            ("unsharded", Case { config: few, sync: false, ..base.clone() }),
            ("in an open iteration", Case { last: false, ..base.clone() }),
            ("in groups", Case { average: false, ..base.clone() }),
        ] {
            equal(world, &case, &format!("{}, {shard_size} of {world}, {what}", strategy.name()));
        }
    }
}

#[test]
fn sixteen_bit_sums_are_close() {
    let _fake = Fake::meeting();
    let one = Rule::Sgd(SgdOptions { lr: 1.0, ..SgdOptions::default() });
    for (strategy, shard_size, world) in [NO_SHARD[0], HYBRID[0]] {
        let config = EngineConfig { strategy, shard_size, reduce_dtype: DType::BF16, ..EngineConfig::default() };
        let case = Case { steps: 1, ..Case::new(config, one) };
        let run = |place: fn() -> Place| {
            ranks(world, |comm| {
                let trainer = Trainer::new(comm, place(), &case);
                trainer.train();
                trainer.pieces().concat()
            })
        };
        for (got, want) in run(Place::gpu).iter().flatten().zip(run(|| Place::Cpu).iter().flatten()) {
            // One rounding to 8 bits of gradients below 64.
            assert!((got - want).abs() <= 0.25, "{got}, not {want}");
        }
    }
}

#[test]
fn memory_and_traffic_are_the_plans() {
    let fake = Fake::meeting();
    for ((strategy, shard_size, world), cpu_offload) in
        [(NO_SHARD[1], false), (HYBRID[0], false), (HYBRID[0], true), (HYBRID[1], false)]
    {
        let base = case(strategy, shard_size);
        let config = EngineConfig { cpu_offload, ..base.config.clone() };
        let case = Case { config, ..base };
        let before = fake.device_bytes();
        ranks(world, |comm| {
            let rank = Some(comm.rank());
            let t = Trainer::new(comm, Place::gpu(), &case);
            t.train();
            let config = t.place.config(&case.config);
            let request = Request { world_size: world, rank, config, optimizer_bytes_per_element: 8 };
            let plan = Forecast::new(&engine::tree(&engine::values()), &request).unwrap();
            let (cuda, stats) = (t.engine.cuda_stats().unwrap(), t.engine.stats().unwrap());
            assert_eq!((cuda.pool_bytes, cuda.slot_bytes), (plan.pool_bytes, plan.gradient_slot_bytes));
            assert_eq!((cuda.overflows, cuda.evictions), (0, 0), "{cuda:?}");
            let states = if cpu_offload { 0 } else { 9 * 2 * 64 + 3 * 4 * 64 };
            let most = plan.device_peak_bytes + states + 8 * 255;
            assert!((plan.device_peak_bytes..=most).contains(&cuda.device_bytes), "{cuda:?} {plan:?}");
            assert_eq!(stats.all_gathers, 3 * plan.all_gather.collectives);
            assert_eq!(stats.all_gather_bytes, 3 * plan.all_gather.bytes);
            assert_eq!(stats.gradients.reduce_scatters, 3 * plan.reduce_scatter.collectives);
            assert_eq!(plan.all_reduce.collectives, 4);
            assert_eq!(stats.replicas.all_reduces, 3 * plan.all_reduce.collectives);
            assert_eq!(stats.replicas.all_reduce_bytes, 3 * plan.all_reduce.bytes);
        });
        assert_eq!(fake.device_bytes(), before, "all of it was given back");
    }
}

/// What is registered is what a group gathers into; one rank alone gathers nothing.
#[test]
fn memory_is_registered_with_the_group() {
    let _fake = Fake::meeting();
    for (strategy, shard_size, world, some) in [(Strategy::HybridShard, 2, 4, true), (Strategy::NoShard, 0, 2, false)] {
        let base = case(strategy, shard_size);
        let cuda = Some(CudaConfig { registration: Registration::Always, ..CudaConfig::default() });
        let config = EngineConfig { cuda, ..base.config.clone() };
        let case = Case { config, ..base };
        equal(world, &case, "registered");
        ranks(world, |comm| {
            let t = Trainer::new(comm, Place::gpu(), &case);
            assert_eq!(t.engine.cuda_stats().unwrap().registered_bytes > 0, some);
        });
    }
}

#[test]
fn each_all_reduce_comes_behind_its_reduce_scatter() {
    let fake = Fake::meeting();
    ranks(4, |comm| Trainer::new(comm, Place::gpu(), &Case { steps: 1, ..case(Strategy::HybridShard, 2) }).train());
    // Of each unit, on each rank; of the four ranks a line comes only when all of its group have come to it.
    let log = fake.log();
    let of = |name: &str| log.iter().filter(|line| line.starts_with(name)).count();
    assert_eq!((of("reduce_scatter "), of("all_reduce ")), (16, 16));
    let mut open = 0;
    for line in &log {
        open += i32::from(line.starts_with("reduce_scatter ")) - i32::from(line.starts_with("all_reduce "));
        assert!((0..=4).contains(&open), "{log:?}");
    }
}

#[test]
fn checkpoints_and_devices_are_interchangeable() {
    let _fake = Fake::meeting();
    let folder = Folder::new("engine-cuda-replicas");
    let run = |place: fn() -> Place, name: &str, from: Option<&str>| {
        ranks(4, |comm| {
            let t = Trainer::new(comm, place(), &case(Strategy::HybridShard, 2));
            let contents = Contents::default();
            // SAFETY: there is nothing beside the shards and states.
            match from {
                None => drop(t.train()),
                Some(from) => unsafe { t.optimizer.load(&folder.join(from), &contents) }.unwrap(),
            }
            // SAFETY: as above.
            unsafe { t.optimizer.save(&folder.join(name), &contents) }.unwrap();
            t.step(3);
            t.pieces()
        })
    };
    let want = run(|| Place::Cpu, "cpu", None);
    let got = [run(Place::gpu, "gpu", None), run(Place::gpu, "a", Some("cpu")), run(|| Place::Cpu, "b", Some("gpu"))];
    for got in got {
        (0..4).for_each(|rank| same(&got[rank], &want[rank], &format!("rank {rank}")));
    }
}

#[test]
fn units_resharded_over_fewer_ranks_are_gathered_among_those() {
    let fake = Fake::meeting();
    let full = |ranks| (Strategy::FullShard, 0, 4, ranks);
    for (strategy, shard_size, world, over) in
        [full(2), (Strategy::FullShard, 0, 6, 3), (Strategy::HybridShard, 4, 8, 2), full(1), full(4)]
    {
        let base = Case { after_forward: Some(ReshardAfterForward::Over(over)), ..case(strategy, shard_size) };
        let wide = EngineConfig { param_dtype: None, cpu_offload: true, ..base.config.clone() };
        for case in [
            Case { order: true, clip: Some(0.5), ..base.clone() },
            Case { micro: 2, sync: false, ..base.clone() },
            Case { micro: 2, last: false, config: wide, ..base },
        ] {
            equal(world, &case, &format!("{}, over {over} of {world}", strategy.name()));
        }
    }
    // What moves is as where bytes move between CPUs: all of it in forward, in backward within the groups; and nothing stays.
    let config = EngineConfig { param_dtype: None, ..EngineConfig::default() };
    let over = Some(ReshardAfterForward::Over(2));
    let case = Case { after_forward: over, steps: 1, ..Case::new(config, adamw()) };
    let run = |place: fn() -> Place| {
        ranks(4, |comm| {
            let t = Trainer::new(comm, place(), &case);
            let before = t.engine.cuda_stats().map_or(0, |s| s.device_bytes);
            t.pass(0, 0);
            assert_eq!(t.engine.cuda_stats().map_or(0, |s| s.device_bytes), before);
            // A forward that no backward follows keeps nothing.
            t.engine.set_grad_enabled(false).unwrap();
            for unit in 0..3 {
                t.engine.pre_forward(unit).unwrap();
            }
            (0..3).rev().for_each(|unit| t.engine.post_forward(unit).unwrap());
            assert_eq!(t.engine.cuda_stats().map_or(0, |s| s.device_bytes), before);
            let s = t.engine.stats().unwrap();
            [s.all_gathers, s.all_gather_bytes, s.all_gather_sent_bytes]
        })
    };
    let before = fake.count("outside");
    assert_eq!(run(Place::gpu), run(|| Place::Cpu));
    assert_eq!(
        fake.count("outside") - before,
        4 * 4,
        "the groups gather into what is registered, too: the rest are reductions"
    );
    assert_eq!((fake.count("alive"), fake.count("pieces")), (0, 0));
}

#[test]
fn what_a_smaller_group_cannot_register_is_every_ranks_error() {
    let fake = Fake::meeting();
    let errors = ranks(4, |comm| {
        let t = Trainer::new(comm.clone(), Place::gpu(), &case(Strategy::FullShard, 0));
        comm.barrier().unwrap();
        fake.fail("ncclCommWindowRegister", 3);
        comm.barrier().unwrap();
        t.engine.set_reshard_after_forward(1, ReshardAfterForward::Over(2)).unwrap_err()
    });
    fake.fail("", 0);
    for (rank, e) in errors.iter().enumerate() {
        let words = ["the unit buffers could not be registered", "registered_buffers = FSDP_REGISTERED_BUFFERS_NEVER"];
        words.iter().for_each(|w| assert!(e.message.contains(w), "rank {rank}: {w} is not in: {e}"));
    }
    assert_eq!((fake.count("alive"), fake.count("pieces")), (0, 0));
}

/// Every rank gets an error with these words, whichever group it is in, and soon.
fn all_fail(case: &Case, what: impl Fn(&Trainer, usize) -> Result<(), Error> + Sync, words: &[&str]) {
    let fake = Fake::new();
    fake.tell("meet", 2);
    let errors = ranks(4, |comm| {
        let (rank, start) = (comm.rank(), Instant::now());
        let t = Trainer::new(comm.clone(), Place::gpu(), case);
        t.step(0);
        comm.barrier().unwrap();
        let mut outcome = what(&t, rank);
        while outcome.is_ok() && start.elapsed() < nccl::LONG {
            outcome = t.engine.poll();
        }
        let e = outcome.unwrap_err();
        assert_eq!(t.engine.poll().unwrap_err().status, e.status, "broken");
        e
    });
    for (rank, e) in errors.iter().enumerate() {
        assert!(matches!(e.status, Status::Mismatch | Status::Aborted), "rank {rank}: {e}");
        words.iter().for_each(|w| assert!(e.message.contains(w), "rank {rank}: {w} is not in: {e}"));
    }
    assert_eq!(fake.count("alive"), 0);
}

#[test]
fn an_error_in_one_group_is_every_ranks() {
    let hybrid = case(Strategy::HybridShard, 2);
    // One rank of the second group unshards another unit.
    all_fail(
        &hybrid,
        |t, rank| t.engine.unshard(1 + u32::from(rank == 3)).map(drop),
        &["in the shard group that begins at rank 2", "all-gather of unit \"a\"", "all-gather of unit \"b\""],
    );
    // The groups reduce different units.
    all_fail(
        &hybrid,
        |t, rank| {
            (0..4).try_for_each(|unit| t.engine.unshard(unit).map(drop))?;
            t.engine.reduce(1 + (rank / 2) as u32)
        },
        &["among the replicas of rank ", "all-reduce of unit \"a\"", "all-reduce of unit \"b\""],
    );
    // One rank has resharded the unit before, and so uses another place of what NCCL knows.
    let cuda = Some(CudaConfig { prefetch: 0, ..CudaConfig::default() });
    let few = case(Strategy::FullShard, 0);
    all_fail(
        &Case { config: EngineConfig { cuda, ..few.config.clone() }, ..few },
        |t, rank| {
            t.engine.unshard(1)?;
            t.engine.world().barrier()?;
            if rank == 3 {
                t.engine.reshard(1)?;
            }
            t.engine.unshard(0).map(drop)
        },
        &["all-gather of unit \"(root)\"", "in registered unit buffer 3", "in registered unit buffer 2"],
    );
    // One rank of a smaller group gathers another unit than the others for its backward.
    all_fail(
        &Case { after_forward: Some(ReshardAfterForward::Over(2)), ..case(Strategy::FullShard, 0) },
        |t, rank| {
            for unit in [0, 1, 2, 3] {
                t.engine.pre_forward(unit)?;
            }
            [1, 3, 2, 0].into_iter().try_for_each(|unit| t.engine.post_forward(unit))?;
            t.engine.pre_backward(1 + u32::from(rank == 3))
        },
        &["in the group of 2 ranks that begins at rank 2", "all-gather of unit \"a\"", "all-gather of unit \"b\""],
    );
}

/// A group that reduces fewer units takes part in the rest with zeros.
#[test]
fn a_group_that_reduces_fewer_units_takes_part_in_the_rest() {
    let fake = Fake::new();
    fake.tell("meet", 2);
    ranks(4, |comm| {
        let rank = comm.rank();
        let t = Trainer::new(comm, Place::gpu(), &case(Strategy::HybridShard, 2));
        for unit in 0..3 {
            t.engine.unshard(unit).unwrap();
        }
        if rank < 2 {
            t.engine.reserve_grad(5).unwrap();
            t.engine.param_grad(5).unwrap();
            t.engine.reduce(2).unwrap();
        }
        t.engine.finish_backward().unwrap();
        assert!(!t.engine.shard(5).unwrap().grad.is_null());
        assert!(t.engine.shard(6).unwrap().grad.is_null());
        assert_eq!(t.engine.stats().unwrap().replicas.all_reduces, 1);
    });
    assert_eq!(fake.count("alive"), 0);
}

#[test]
fn an_all_reduce_that_hangs_meets_its_deadline() {
    let fake = Fake::new();
    fake.tell("meet", 2);
    let base = case(Strategy::NoShard, 0);
    let late = CudaConfig { timeout: nccl::SHORT, ..CudaConfig::default() };
    let case = Case { config: EngineConfig { cuda: Some(late), ..base.config.clone() }, ..base };
    let errors = ranks(2, |comm| {
        let t = Trainer::new(comm.clone(), Place::gpu(), &case);
        t.engine.unshard(1).unwrap();
        comm.barrier().unwrap();
        if comm.rank() == 0 {
            fake.hold(true);
        }
        comm.barrier().unwrap();
        t.engine.reduce(1).unwrap();
        t.engine.synchronize().unwrap_err()
    });
    fake.hold(false);
    let late = |e: &Error| e.status == Status::Timeout && e.message.contains("the all-reduce of unit \"a\"");
    assert!(errors.iter().any(late), "{errors:?}");
    assert_eq!(fake.count("alive"), 0);
}
