//! Engines on a GPU that is this machine's CPU: what they refuse, what errors say, and ranks that do not do the same.

#[allow(dead_code)]
mod common;
#[path = "cuda/engine.rs"]
#[allow(dead_code)]
mod engine;
#[path = "cuda/fake.rs"]
mod fake;
#[path = "cuda/lent.rs"]
mod lent;
#[path = "nccl/fake.rs"]
#[allow(dead_code)]
mod nccl;

use common::ranks;
use engine::{adamw, same, Case, Place, Trainer};
use fsdp::comm::{single, Check, Communicator, Kind, Tag, UnitName};
use fsdp::config::{CudaConfig, EngineConfig};
use fsdp::device::cuda::{DeviceMemory, Source, Stream};
use fsdp::dtype::DType;
use fsdp::engine::{Engine, ReshardAfterForward};
use fsdp::error::{Error, Status};
use fsdp::module::{ModuleTree, ROOT};
use lent::lent;
use nccl::Fake;
use std::sync::Arc;
use std::time::Instant;

#[test]
fn what_a_gpu_cannot_do_is_refused_by_name() {
    let fake = Fake::meeting();
    let place = Place::gpu();
    let make = |comm: Arc<dyn Communicator>, config: EngineConfig| {
        let data = engine::values();
        // SAFETY: the data outlives the call.
        unsafe { Engine::new(&engine::tree(&data), comm, &place.config(&config)) }
    };
    let refused = |result: Result<(), Error>, words: &str| {
        let e = result.unwrap_err();
        assert_eq!(e.status, Status::Unsupported, "{e}");
        assert!(e.message.contains(words), "{words} is not in: {e}");
    };

    let absent =
        EngineConfig { cuda: Some(CudaConfig { device: 7, ..CudaConfig::default() }), ..EngineConfig::default() };
    refused(make(single::init(), absent.clone()).map(drop), "there is no GPU 7: this process sees 1");
    let engine = make(single::init(), EngineConfig::default()).unwrap();
    let cpu = Trainer::new(single::init(), Place::Cpu, &Case::new(EngineConfig::default(), adamw()));
    // SAFETY: it is not used.
    refused(unsafe { cpu.engine.set_compute_stream(std::ptr::null_mut()) }, "computes on the CPU");
    refused(cpu.engine.cuda_stats().map(drop), "computes on the CPU");
    cpu.engine.synchronize().unwrap();
    // Parts of one model are on one device.
    let add = |part: &Engine, config: EngineConfig| {
        let mut whole = ModuleTree::new("Whole");
        whole.adopt(ROOT, "part", part.model().clone()).unwrap();
        // SAFETY: it has no parameters of its own.
        unsafe { Engine::new(&whole, part.world().clone(), &config) }.map(drop)
    };
    let on_gpu = place.config(&EngineConfig::default());
    refused(add(&engine, EngineConfig::default()), "was added computes on GPU 0, and the engine on the CPU");
    refused(add(&cpu.engine, on_gpu.clone()), "was added computes on the CPU, and the engine on GPU 0");
    refused(add(&engine, EngineConfig { cpu_offload: true, ..on_gpu }), "differ in cpu_offload");
    // One rank's lack is the error of all.
    let errors = ranks(2, |comm| {
        let config = if comm.rank() == 1 { absent.clone() } else { EngineConfig::default() };
        make(comm, config).err().unwrap()
    });
    errors.iter().for_each(|e| assert!(e.message.contains("rank 1: there is no GPU 7"), "{e}"));
    let capped = CudaConfig { max_units_in_flight: 1, ..CudaConfig::default() };
    let engine = make(single::init(), EngineConfig { cuda: Some(capped), ..EngineConfig::default() }).unwrap();
    engine.unshard(0).unwrap();
    let e = engine.unshard(1).unwrap_err();
    assert_eq!(e.status, Status::InvalidState);
    assert!(e.message.contains("\"a\" has no unit buffer: units \"(root)\" are unsharded"), "{e}");
    // Nothing is broken by that.
    engine.reshard(0).unwrap();
    engine.unshard(1).unwrap();
    drop((engine, cpu, fake));
}

#[test]
fn failures_name_unit_rank_and_collective() {
    let fake = Fake::meeting();
    fake.tell("meet", 0);
    let errors = ranks(2, |comm| {
        let t = Trainer::new(comm.clone(), Place::gpu(), &Case::new(EngineConfig::default(), adamw()));
        t.train();
        comm.barrier().unwrap();
        // Rank 1 unshards another unit.
        let start = Instant::now();
        let mut outcome = t.engine.unshard(1 + comm.rank() as u32).map(drop);
        while outcome.is_ok() && start.elapsed() < nccl::LONG {
            outcome = t.engine.poll();
        }
        let e = outcome.unwrap_err();
        assert_eq!(t.engine.unshard(3).unwrap_err().status, e.status, "broken");
        e
    });
    for e in errors {
        assert_eq!(e.status, Status::Mismatch, "{e}");
        for part in ["rank 0 runs all-gather of unit \"a\"", "rank 1 runs all-gather of unit \"b\""] {
            assert!(e.message.contains(part), "{part} is not in: {e}");
        }
    }
    assert_eq!(fake.count("alive"), 0);
    // What hangs on the GPU is found by its deadline, in a hook and by who waits.
    let late = CudaConfig { timeout: nccl::SHORT, ..CudaConfig::default() };
    let case = Case::new(EngineConfig { cuda: Some(late), ..EngineConfig::default() }, adamw());
    let errors = ranks(2, |comm| {
        let t = Trainer::new(comm.clone(), Place::gpu(), &case);
        t.engine.unshard(0).unwrap();
        comm.barrier().unwrap();
        if comm.rank() == 0 {
            fake.hold(true);
        }
        comm.barrier().unwrap();
        t.engine.unshard(1).unwrap();
        t.engine.synchronize().unwrap_err()
    });
    fake.hold(false);
    assert!(errors.iter().any(|e| e.status == Status::Timeout && e.message.contains("the all-gather of unit \"a\"")));
}

#[test]
fn the_control_plane_may_be_collectives_that_a_host_lends() {
    let _fake = Fake::meeting();
    let case = Case { clip: Some(1.0), order: true, ..Case::new(EngineConfig::default(), adamw()) };
    for world in [2, 3] {
        let want = ranks(world, |comm| {
            let t = Trainer::new(comm, Place::Cpu, &case);
            t.train();
            t.pieces()
        });
        let got = ranks(world, |comm| {
            let t = Trainer::new(lent(comm), Place::gpu(), &case);
            t.train();
            t.pieces()
        });
        (0..world).for_each(|rank| same(&got[rank], &want[rank], &format!("rank {rank} of {world}")));
    }
    // Announced alone: agreed on by all or an error of all, whether it waits or not.
    for check in [Check::Together, Check::Announce] {
        let errors = ranks(2, |comm| {
            let (rank, comm) = (comm.rank(), lent(comm));
            let unit = comm.name_units(&["a", "b"].map(|u| UnitName { label: u.into(), params: format!("{u}.w") }));
            let tag = |unit| Tag { kind: Kind::AllGather, unit, dtype: DType::F32, bytes: 64 };
            (0..3).for_each(|_| comm.announce(tag(unit), check, None).unwrap());
            comm.barrier().unwrap();
            let e = comm.announce(tag(unit + rank as u32), check, None).and_then(|()| comm.barrier()).unwrap_err();
            assert_eq!(comm.async_error(), Some(e.clone()));
            e
        });
        for e in errors {
            assert_eq!(e.status, Status::Mismatch, "{e}");
            for part in ["rank 0 runs all-gather of unit \"a\"", "rank 1 runs all-gather of unit \"b\""] {
                assert!(e.message.contains(part), "{part} is not in: {e}");
            }
        }
    }
}

/// All that a rank does with its engine, as far as it goes.
fn use_all(engine: &Engine, stream: &Arc<Stream>) -> Result<(), Error> {
    engine.set_reshard_after_forward(1, ReshardAfterForward::Over(2))?;
    (0..3).try_for_each(|unit| engine.unshard(unit).map(drop))?;
    let gradient = DeviceMemory::new(&Source::Pool, stream, 4 * 33 * 9, "gradients")?;
    // SAFETY: as long as the parameter, and there until it was used.
    unsafe { engine.accumulate_grad(5, DType::F32, gradient.address() as *const u8) }?;
    stream.synchronize()?;
    engine.reduce(2)?;
    engine.finish_backward()?;
    engine.synchronize()
}

/// Whatever fails in NCCL, whenever, on all ranks or one: an error that says where, or nothing at all where it is only given
/// back; nobody waits, nothing is left, and the next engine works.
#[test]
fn each_function_of_nccl_may_fail() {
    let fake = Fake::new();
    let made = ["ncclGetUniqueId", "ncclCommInitRankConfig", "ncclCommSplit", "ncclMemAlloc", "ncclCommWindowRegister"];
    let used = ["ncclAllGather", "ncclReduceScatter"];
    let given_back = ["ncclMemFree", "ncclCommWindowDeregister", "ncclCommFinalize"];
    let all = [&made[..], &used, &given_back].concat();
    for (function, late) in all.iter().flat_map(|f| [(f, false), (f, true)]) {
        // What ranks do together they fail together here: those of this NCCL wait for each other.
        for one in [false, true].into_iter().filter(|one| !one || used.contains(function)) {
            let start = Instant::now();
            fake.tell("meet", 2);
            let outcomes = ranks(4, |comm| {
                let place = Place::gpu();
                let fail = || {
                    comm.barrier().unwrap();
                    fake.tell("fail_rank", if one { 1 } else { -1 });
                    fake.fail(function, 3);
                    comm.barrier().unwrap();
                };
                let data = engine::values();
                let config = EngineConfig { param_dtype: Some(DType::BF16), ..EngineConfig::default() };
                if !late {
                    fail();
                }
                // SAFETY: the data outlives the call.
                let engine = unsafe { Engine::new(&engine::tree(&data), comm.clone(), &place.config(&config)) };
                if late && engine.is_ok() {
                    fail();
                }
                let outcome = engine.and_then(|engine| {
                    let mut outcome = use_all(&engine, &place.stream());
                    // Who was done before another failed learns of it.
                    while one && outcome.is_ok() && start.elapsed() < nccl::LONG {
                        outcome = engine.poll();
                    }
                    outcome
                });
                outcome.map_err(|e| e.message)
            });
            fake.fail("", 0);
            let is_used =
                made.contains(function) && (!late || ["ncclCommSplit", "ncclCommWindowRegister"].contains(function));
            for (rank, outcome) in outcomes.iter().enumerate() {
                let what = format!("{function}, late: {late}, one: {one}, rank {rank}: {outcome:?}");
                match outcome {
                    Ok(()) => assert!(!is_used && !used.contains(function), "{what}"),
                    Err(text) => assert!(!given_back.contains(function) && text.contains("internal error"), "{what}"),
                }
            }
            assert!(start.elapsed() < nccl::LONG, "{function}");
            assert_eq!(fake.count("alive"), 0, "{function}, late: {late}");
        }
    }
    fake.tell("meet", 1);
    ranks(2, |comm| Trainer::new(comm, Place::gpu(), &Case::new(EngineConfig::default(), adamw())).train());
}

/// A rank that has ended its backward takes part with zeros in what others reduce.
#[test]
fn a_rank_that_reduces_fewer_units_takes_part_in_the_rest() {
    let fake = Fake::meeting();
    fake.tell("meet", 0);
    ranks(2, |comm| {
        let rank = comm.rank();
        let t = Trainer::new(comm, Place::gpu(), &Case::new(EngineConfig::default(), adamw()));
        for unit in 0..3 {
            t.engine.unshard(unit).unwrap();
        }
        let one = DeviceMemory::new(&Source::Pool, &t.place.stream(), 4 * 33 * 9, "gradients").unwrap();
        if rank == 0 {
            // SAFETY: as long as the parameter.
            unsafe { t.engine.accumulate_grad(5, DType::F32, one.address() as *const u8) }.unwrap();
            t.engine.reduce(2).unwrap();
        }
        t.engine.finish_backward().unwrap();
        assert!(!t.engine.shard(5).unwrap().grad.is_null());
        assert!(t.engine.shard(6).unwrap().grad.is_null());
        // This NCCL gives every rank twice its own: zeros here.
        if rank == 1 {
            let shard = t.engine.shard(5).unwrap();
            assert!(t.at_home(shard.grad, shard.len).iter().all(|g| *g == 0.0));
        }
    });
    assert_eq!(fake.count("alive"), 0);
}
