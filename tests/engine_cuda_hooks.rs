//! Communication hooks of engines on a GPU that is this machine's CPU: what they see and change is what the same hooks see and
//! change on the CPU, bit by bit; what fails in one ends every rank's backward.

#[allow(dead_code)]
mod common;
#[path = "cuda/engine.rs"]
#[allow(dead_code)]
mod engine;
#[path = "cuda/fake.rs"]
mod fake;
#[path = "cuda/hooks.rs"]
mod hooks;
#[path = "nccl/fake.rs"]
#[allow(dead_code)]
mod nccl;

use common::ranks;
use engine::{adamw, same, Case, Place, Trainer};
use fsdp::comm::single;
use fsdp::config::{EngineConfig, Strategy};
use fsdp::device::cuda::{DeviceMemory, Source};
use fsdp::dtype::DType;
use fsdp::error::{Error, Status};
use fsdp::hook::UnitGradients;
use fsdp::optim::{Rule, SgdOptions};
use hooks::{Change, Seen};
use nccl::Fake;
use std::sync::Arc;
use std::time::Instant;

/// Trains on the CPU and on the GPU, with the same hook, and compares; returns what the hooks of rank 0 have seen on the GPU.
fn equal(worlds: &[usize], case: &Case, change: Change, what: &str) -> Vec<Seen> {
    let one = |world: &usize| {
        let run = |place: fn() -> Place| {
            ranks(*world, |comm| {
                let t = Trainer::new(comm, place(), case);
                let seen = hooks::set(&t, change);
                t.train();
                let kept = std::mem::take(&mut *seen.lock().unwrap());
                (t.pieces(), kept)
            })
        };
        let (cpu, mut gpu) = (run(|| Place::Cpu), run(Place::gpu));
        for (rank, ((got, seen), (want, expected))) in gpu.iter().zip(&cpu).enumerate() {
            let what = format!("{what}, {change:?}, rank {rank} of {world}");
            same(got, want, &what);
            assert_eq!(seen.calls, expected.calls, "{what}");
            assert!(!seen.calls.is_empty(), "{what}");
            assert_eq!((expected.streams.as_slice(), seen.streams.len()), (&[0][..], 1), "{what}");
            assert_ne!(seen.streams[0], 0, "{what}");
        }
        gpu.swap_remove(0).1
    };
    worlds.iter().map(one).collect()
}

#[test]
fn hooks_change_the_same_bits_as_on_the_cpu() {
    let _fake = Fake::meeting();
    let base = |config: EngineConfig| Case { steps: 2, ..Case::new(config, adamw()) };
    let bf16 = EngineConfig { param_dtype: Some(DType::BF16), ..EngineConfig::default() };
    for change in [Change::Scale(0.3), Change::Round] {
        let seen = equal(&[1, 2, 4], &base(EngineConfig::default()), change, "float32");
        // Four units in a backward, in its order; of the last one's parameters one never has a gradient.
        let units: Vec<u32> = seen[0].calls.iter().map(|(unit, ..)| *unit).collect();
        assert_eq!(units, [3, 2, 1, 0, 3, 2, 1, 0]);
        assert_eq!(seen[0].calls[0], (3, "b.c".to_string(), vec![(7, 64 * 3)]));
        equal(&[1, 2, 4], &base(bf16.clone()), change, "bfloat16");
    }
    let all = |case: &Case, worlds: &[usize], what: &str| {
        equal(worlds, case, Change::Round, what);
        equal(worlds, case, Change::Scale(-1.7), what);
    };
    let some = |rank: usize, step: usize, param: usize| match param {
        1 | 2 => rank == param - 1,
        // A whole unit.
        5 | 6 => rank == 1 && step == 0,
        _ => param != 8,
    };
    all(&Case { has: some, ..base(bf16.clone()) }, &[1, 2, 3], "gradients on some ranks");
    all(&Case { micro: 3, ..base(bf16.clone()) }, &[2], "accumulated in shards");
    let few = EngineConfig { gradient_slots: 1, ..bf16.clone() };
    all(&Case { micro: 3, sync: false, ..base(few) }, &[1, 2], "accumulated unsharded");
    all(&base(EngineConfig { cpu_offload: true, ..bf16.clone() }), &[1, 3], "offloaded");
    // Several ranks' 16-bit sums are NCCL's.
    all(&base(EngineConfig { reduce_dtype: DType::BF16, ..bf16.clone() }), &[1], "reduced in bfloat16");
    let strategy = |strategy, shard_size| EngineConfig { strategy, shard_size, ..bf16.clone() };
    all(&base(strategy(Strategy::NoShard, 0)), &[2, 4], "unsharded");
    let hybrid = base(strategy(Strategy::HybridShard, 2));
    all(&Case { micro: 2, average: false, ..hybrid }, &[4], "in groups");
}

/// A hook that rounds does what reducing in that type does; without it gradients are as ever.
#[test]
fn what_a_hook_leaves_is_what_is_reduced() {
    let _fake = Fake::meeting();
    let rule = Rule::Sgd(SgdOptions { lr: 1.0, ..SgdOptions::default() });
    let case =
        |reduce_dtype| Case { steps: 1, ..Case::new(EngineConfig { reduce_dtype, ..EngineConfig::default() }, rule) };
    let run = |dtype: DType, change: Option<Change>| {
        let t = Trainer::new(single::init(), Place::gpu(), &case(dtype));
        let seen = hooks::set(&t, change.unwrap_or(Change::Scale(7.0)));
        if change.is_none() {
            t.engine.set_comm_hook(None).unwrap();
        }
        t.train();
        assert_eq!(seen.lock().unwrap().calls.is_empty(), change.is_none());
        t.pieces()
    };
    let plain = run(DType::F32, None);
    same(&run(DType::F32, Some(Change::Round)), &run(DType::BF16, None), "rounded");
    same(&run(DType::F32, Some(Change::Scale(1.0))), &plain, "times one");
    assert_ne!(run(DType::F32, Some(Change::Round)), plain);
    assert_ne!(run(DType::F32, Some(Change::Scale(2.0))), plain);
}

/// Engines one after the other have the same stream, which is destroyed with none of them; engines at once have their own.
#[test]
fn the_stream_of_hooks_is_there_for_ever() {
    let _fake = Fake::meeting();
    let case = Case { steps: 1, ..Case::new(EngineConfig::default(), adamw()) };
    let stream = |t: &Trainer| {
        let seen = hooks::set(t, Change::Scale(1.0));
        t.train();
        let streams = seen.lock().unwrap().streams.clone();
        assert_ne!(streams, [t.place.stream().raw() as usize]);
        streams
    };
    let new = || Trainer::new(single::init(), Place::gpu(), &case);
    let (one, other) = (new(), new());
    let both = [stream(&one), stream(&other)];
    assert_ne!(both[0], both[1]);
    drop((one, other));
    assert!(both.contains(&stream(&new())));
}

#[test]
fn a_hook_that_fails_ends_every_ranks_backward() {
    let fake = Fake::meeting();
    for (world, strategy, shard_size) in [
        (1, Strategy::FullShard, 0),
        (2, Strategy::FullShard, 0),
        (4, Strategy::FullShard, 0),
        (2, Strategy::NoShard, 0),
        (4, Strategy::HybridShard, 2),
    ] {
        // Ranks meet where communicators are made; launches wait for nobody, as NCCL's do not.
        fake.tell("meet", 2);
        let config = EngineConfig { strategy, shard_size, ..EngineConfig::default() };
        let run = |place: fn() -> Place| {
            ranks(world, |comm| {
                let t = Trainer::new(comm.clone(), place(), &Case::new(config.clone(), adamw()));
                t.train();
                let fails = comm.rank() == comm.world_size() - 1;
                if fails {
                    let hook = |unit: &UnitGradients| match unit.unit {
                        2 => Err(Error::new(Status::InvalidArgument, "it is full")),
                        _ => Ok(()),
                    };
                    t.engine.set_comm_hook(Some(Arc::new(hook))).unwrap();
                }
                comm.barrier().unwrap();
                broken_by_hook(&t, fails)
            })
        };
        for errors in [run(|| Place::Cpu), run(Place::gpu)] {
            let failing = world - 1;
            for (rank, [first, later]) in errors.iter().enumerate() {
                let what = format!("rank {rank} of {world}, {strategy:?}: {first}; {later}");
                let want = if rank == failing { Status::Callback } else { Status::Aborted };
                assert_eq!((first.status, later.status), (want, Status::Aborted), "{what}");
                for e in [first, later] {
                    assert!(e.message.contains("the communication hook of unit \"b\" failed: it is full"), "{what}");
                }
                // Within groups ranks have other numbers.
                let named = strategy != Strategy::FullShard || later.message.contains(&format!("rank {failing} "));
                assert!(named, "{what}");
            }
        }
        assert_eq!(fake.count("alive"), 0);
    }
}

/// A backward unit by unit until it fails; the error, and that of the next call.
fn broken_by_hook(t: &Trainer, fails: bool) -> [Error; 2] {
    let e = &t.engine;
    let grad = vec![1f32; 64 * 9];
    let memory = match &t.place {
        Place::Cpu => None,
        Place::Gpu { stream, .. } => {
            let memory = DeviceMemory::new(&Source::Pool, stream, 4 * grad.len(), "gradients").unwrap();
            // SAFETY: as many bytes; waited for.
            unsafe { stream.upload(grad.as_ptr().cast(), memory.address(), 4 * grad.len()) }.unwrap();
            stream.synchronize().unwrap();
            Some(memory)
        }
    };
    let data = memory.as_ref().map_or(grad.as_ptr().cast(), |m| m.address() as *const u8);
    let backward = || {
        (0..4).try_for_each(|unit| e.unshard(unit).map(drop))?;
        for (unit, param) in [(3, 7), (2, 5), (1, 1), (0, 0)] {
            // SAFETY: no parameter of these has more elements.
            unsafe { e.accumulate_grad(param, DType::F32, data) }?;
            e.reduce(unit)?;
        }
        e.finish_backward()
    };
    let mut outcome = backward();
    let start = Instant::now();
    while outcome.is_ok() && !fails && start.elapsed() < nccl::LONG {
        outcome = e.poll();
    }
    [outcome.unwrap_err(), e.finish_backward().unwrap_err()]
}

/// The engine is locked inside of a hook: refused, not waited for.
#[test]
fn a_hook_that_calls_its_engine_is_refused() {
    let fake = Fake::meeting();
    let t = Arc::new(Trainer::new(single::init(), Place::gpu(), &Case::new(EngineConfig::default(), adamw())));
    let engine = Arc::downgrade(&t.engine);
    let hook = move |_: &UnitGradients| {
        let engine = engine.upgrade().unwrap();
        let gathered = engine.gather_flat(0, engine.shard(0).unwrap().data).map(drop);
        for e in [gathered, engine.synchronize(), engine.poll(), engine.zero_grad(), engine.set_comm_hook(None)] {
            let e = e.unwrap_err();
            assert_eq!(e.status, Status::InvalidState);
            assert!(e.message.contains("a communication hook cannot call the engine"), "{e}");
        }
        Ok(())
    };
    t.engine.set_comm_hook(Some(Arc::new(hook))).unwrap();
    t.train();
    t.engine.set_comm_hook(None).unwrap();
    drop((t, fake));
}
