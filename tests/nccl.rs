//! NCCL's part of the engine on a library that stands in for it (tests/nccl/fake_nccl.c), and on a driver that is this
//! machine's CPU: what is asked of it, that nothing waits for ever, and what errors say.

#[path = "cuda/fake.rs"]
mod fake;
#[path = "nccl/fake.rs"]
#[allow(dead_code)]
mod nccl;
#[path = "common/ranks.rs"]
mod ranks;
#[path = "nccl/step.rs"]
mod step;

use fsdp::comm::nccl::{FixedMemory, Nccl, NcclComm, NcclQueues, Part, Reduction, UniqueId, What};
use fsdp::comm::{single, Check, Communicator, Kind};
use fsdp::config::Registration;
use fsdp::device::cuda::{Context, Priority, Source, Stream};
use fsdp::dtype::DType;
use fsdp::error::{Error, Status};
use fsdp::log;
use fsdp::pipeline::Limits;
use libloading::Library;
use nccl::{build, config, Fake, Rank, LONG, SHORT};
use ranks::ranks;
use std::ffi::{c_char, c_int, CStr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn contains(e: &Error, words: &[&str]) {
    words.iter().for_each(|w| assert!(e.message.contains(w), "{w} is not in: {e}"));
}

#[test]
fn collectives_are_in_place() {
    let fake = Fake::new();
    let rank = Rank::new(1, 2);
    let memory = rank.put(&[1., 2., 3., 4.]);
    rank.gather(&memory, 2).unwrap();
    assert_eq!(rank.get(&memory), [3., 4., 3., 4.]);
    let what = What::of_unit(Kind::ReduceScatter, "layers.3");
    let reduce = |reduction, dtype| {
        let memory = rank.put(&[1., 2., 3., 4.]);
        let part = Part { data: memory.address(), shard_len: 2, dtype };
        // SAFETY: the memory is large enough.
        let done = unsafe { rank.comm.reduce_scatter(&what, part, reduction, &rank.stream) };
        done.map(|()| rank.get(&memory))
    };
    assert_eq!(reduce(Reduction::Sum, DType::F32).unwrap(), [1., 2., 6., 8.]);
    assert_eq!(reduce(Reduction::Mean, DType::F32).unwrap(), [1., 2., 3., 4.]);
    assert_eq!(reduce(Reduction::Scaled(0.25), DType::F32).unwrap(), [1., 2., 1.5, 2.]);
    reduce(Reduction::Mean, DType::BF16).unwrap();
    reduce(Reduction::Scaled(0.5), DType::F16).unwrap();
    contains(&reduce(Reduction::Mean, DType::I32).unwrap_err(), &["int32 has no averages"]);
    contains(&reduce(Reduction::Scaled(0.5), DType::I64).unwrap_err(), &["int64 cannot be scaled"]);
    // SAFETY: the memory is large enough.
    unsafe {
        let what = What::named("the norm of the gradients");
        rank.comm.all_reduce(&what, memory.address(), 4, DType::F32, Reduction::Max, &rank.stream).unwrap();
        rank.comm.broadcast(&what, memory.address(), 2, DType::F64, 1, &rank.stream).unwrap();
        let e = rank.comm.broadcast(&what, memory.address(), 2, DType::F64, 2, &rank.stream).unwrap_err();
        contains(&e, &["no rank 2 of 2"]);
    }
    assert!(rank.comm.poll().unwrap());
    drop(rank);
    let want = [
        "init rank 1 of 2 by i",
        "all_gather 2 of type 7",
        "reduce_scatter 2 of type 7 by 0",
        "reduce_scatter 2 of type 7 by 4",
        "scaled sum of type 7",
        "reduce_scatter 2 of type 7 by 5",
        "reduce_scatter 2 of type 9 by 4",
        "scaled sum of type 6",
        "reduce_scatter 2 of type 6 by 5",
        "all_reduce 4 of type 7 by 2",
        "broadcast 2 of type 8 from 1",
        "finalize",
        "destroy",
    ];
    assert_eq!(fake.log(), want);
    assert_eq!(fake.count("alive"), 0);
}

#[test]
fn several_types_of_a_unit_are_one_launch() {
    let fake = Fake::new();
    let rank = Rank::new(0, 2);
    let memory = rank.put(&[0.; 8]);
    let part = |at: u64, dtype| Part { data: memory.address() + at, shard_len: 2, dtype };
    let parts = [part(0, DType::F32), part(16, DType::BF16)];
    let what = What::of_unit(Kind::AllGather, "head");
    // SAFETY: the memory is large enough.
    let gather = || unsafe { rank.comm.all_gather(&what, &parts, &rank.stream) };
    gather().unwrap();
    assert_eq!(fake.log()[1..], ["group start", "all_gather 2 of type 7", "all_gather 2 of type 9", "group end"]);
    fake.fail("ncclAllGather", 4);
    contains(&gather().unwrap_err(), &["\"head\"", "invalid argument"]);
    // A group that was begun is ended, whatever happens in between.
    assert_eq!(fake.log()[5..], ["group start", "group end", "abort"]);
}

#[test]
fn the_mean_of_one_rank_is_what_it_has() {
    let fake = Fake::new();
    let rank = Rank::new(0, 1);
    let memory = rank.put(&[1., 2.]);
    let part = Part { data: memory.address(), shard_len: 2, dtype: DType::F32 };
    // SAFETY: the memory is large enough.
    unsafe { rank.comm.reduce_scatter(&What::named("a test"), part, Reduction::Mean, &rank.stream) }.unwrap();
    assert_eq!(rank.get(&memory), [1., 2.]);
    assert_eq!(fake.log()[1], "reduce_scatter 2 of type 7 by 0");
}

#[test]
fn slow_calls_are_polled_until_they_are_done() {
    let fake = Fake::new();
    fake.tell("slow", 3);
    let rank = Rank::new(0, 2);
    let memory = rank.put(&[1., 2., 3., 4.]);
    (0..3).for_each(|_| rank.gather(&memory, 2).unwrap());
    // A communicator that is split off is there when the call is done, not when it returns.
    let part = rank.comm.split(0, 5, 0, 1).unwrap();
    assert_eq!((part.rank(), part.world_size()), (0, 1));
    let parts = [0, 8].map(|at| Part { data: memory.address() + at, shard_len: 1, dtype: DType::F32 });
    // SAFETY: the memory is large enough.
    let both = || unsafe { rank.comm.all_gather(&What::of_unit(Kind::AllGather, "head"), &parts, &rank.stream) };
    (0..2).for_each(|_| both().unwrap());
    drop((part, rank));
    let log = fake.log();
    assert_eq!(log[4], "split color 0 key 5");
    assert_eq!(log.iter().filter(|line| *line == "group end").count(), 2);
    assert_eq!(log[log.len() - 4..], ["finalize", "destroy", "finalize", "destroy"]);
    assert_eq!(fake.count("alive"), 0);
}

#[test]
fn a_peer_that_does_not_come_is_a_timeout_that_names_the_collective() {
    let fake = Fake::new();
    let rank = Rank::with_timeout(1, 4, SHORT);
    let memory = rank.put(&[0.; 8]);
    fake.tell("slow", -1);
    let e = rank.gather(&memory, 2).unwrap_err();
    assert_eq!(e.status, Status::Timeout);
    contains(&e, &["rank 1 of 4", "the all-gather of unit \"layers.3\"", "200 ms"]);
    assert_eq!(fake.log().last().unwrap(), "abort");
    // Broken: the same error, and nothing more is asked of NCCL.
    let asked = fake.log();
    for again in
        [rank.gather(&memory, 2).unwrap_err(), rank.comm.poll().unwrap_err(), rank.comm.split(0, 0, 0, 1).unwrap_err()]
    {
        assert_eq!(again, e);
    }
    assert_eq!(rank.comm.async_error(), Some(e));
    drop(rank);
    assert_eq!((fake.log(), fake.count("alive")), (asked, 0));
}

#[test]
fn a_peer_that_does_not_join_is_a_timeout_too() {
    let fake = Fake::new();
    fake.tell("slow", -1);
    let context = Context::new(0).unwrap();
    let id = UniqueId::new(Nccl::get().unwrap()).unwrap();
    let e = NcclComm::new(Nccl::get().unwrap(), &context, &id, config(0, 2, SHORT)).unwrap_err();
    assert_eq!(e.status, Status::Timeout);
    contains(&e, &["rank 0 of 2", "joining NCCL's ranks"]);
    assert_eq!(fake.count("alive"), 0);
    let e = NcclComm::new(Nccl::get().unwrap(), &context, &id, config(2, 2, SHORT)).unwrap_err();
    contains(&e, &["no rank 2 of 2"]);
}

#[test]
fn work_that_hangs_on_the_gpu_is_found_by_its_deadline() {
    let fake = Fake::new();
    let rank = Rank::with_timeout(0, 2, SHORT);
    let memory = rank.put(&[0.; 4]);
    fake.hold(true);
    rank.gather(&memory, 2).unwrap();
    let e = rank.comm.wait().unwrap_err();
    assert_eq!(e.status, Status::Timeout);
    contains(&e, &["rank 0 of 2", "all-gather of unit \"layers.3\""]);
    assert_eq!(fake.log().last().unwrap(), "abort");
}

#[test]
fn a_failed_call_aborts_and_says_what_nccl_says() {
    let fake = Fake::new();
    for (code, status, words) in [
        (3, Status::Device, "internal error: socket 7 was reset"),
        (6, Status::PeerDied, "remote process exited"),
        (5, Status::InvalidArgument, "invalid usage"),
    ] {
        let rank = Rank::new(0, 2);
        let memory = rank.put(&[0.; 4]);
        fake.fail("ncclAllGather", code);
        let e = rank.gather(&memory, 2).unwrap_err();
        fake.fail("", 0);
        assert_eq!(e.status, status, "{e}");
        contains(&e, &["rank 0 of 2", "the all-gather of unit \"layers.3\"", words]);
        assert_eq!(fake.log().last().unwrap(), "abort");
    }
    assert_eq!(fake.count("alive"), 0);
    fake.fail("ncclCommInitRankConfig", 3);
    let context = Context::new(0).unwrap();
    let id = UniqueId::new(Nccl::get().unwrap()).unwrap();
    let e = NcclComm::new(Nccl::get().unwrap(), &context, &id, config(1, 2, LONG)).unwrap_err();
    contains(&e, &["rank 1 of 2", "joining NCCL's ranks", "internal error"]);
}

#[test]
fn an_error_that_comes_later_is_found_by_a_poll() {
    let fake = Fake::new();
    let rank = Rank::new(0, 2);
    let memory = rank.put(&[0.; 4]);
    fake.hold(true);
    rank.gather(&memory, 2).unwrap();
    fake.tell("async", 6);
    let e = rank.comm.poll().unwrap_err();
    assert_eq!(e.status, Status::PeerDied);
    contains(&e, &["rank 0 of 2", "the all-gather of unit \"layers.3\"", "peer 1 has gone"]);
    assert_eq!(fake.log().last().unwrap(), "abort");
}

#[test]
fn an_abort_ends_a_wait_of_another_thread() {
    let fake = Fake::new();
    let context = Context::new(0).unwrap();
    let id = UniqueId::new(Nccl::get().unwrap()).unwrap();
    let comm = NcclComm::new(Nccl::get().unwrap(), &context, &id, config(0, 2, LONG)).unwrap();
    let rank = Rank { stream: Stream::new(&context, Priority::Usual).unwrap(), source: Source::Pool, comm };
    let memory = rank.put(&[0.; 4]);
    fake.tell("slow", -1);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| rank.gather(&memory, 2).unwrap_err());
        std::thread::sleep(Duration::from_millis(20));
        rank.comm.abort("the host has had enough");
        let e = waits.join().unwrap();
        assert_eq!(e.status, Status::Aborted);
        contains(&e, &["rank 0 of 2 has aborted: the host has had enough"]);
    });
    assert_eq!(fake.count("alive"), 0);
}

/// Unit buffers of 1000 and 512 bytes, with a communicator of this library.
fn fixed(
    nccl: &'static Nccl,
    wanted: Registration,
    lent: bool,
    control: &dyn Communicator,
) -> Result<Option<FixedMemory>, Error> {
    let (context, rank, world) = (Context::new(0).unwrap(), control.rank(), control.world_size());
    let id = UniqueId::new(nccl).unwrap();
    let gather = NcclComm::new(nccl, &context, &id, config(rank, world, LONG)).unwrap();
    let (unit_buffers, gradient_slots) = (vec![1000, 512], vec![100]);
    let limits = Limits { unit_buffers, gradient_slots, in_flight: usize::MAX, spare_slots: true, ahead: 1 };
    FixedMemory::new(nccl, wanted, lent, &gather, &limits, control)
}

/// An NCCL without some of its functions, and what it was asked for.
fn lacking(name: &str, option: &str) -> (&'static Nccl, Library) {
    let file = build(name, &[option]);
    // SAFETY: no initializers beyond the languages'.
    let library = unsafe { Library::new(&file) }.unwrap();
    let nccl = Nccl::open(Nccl::SEARCH.load_from(Some(file.into())).unwrap()).unwrap();
    (Box::leak(Box::new(nccl)), library)
}

/// What avoids registration.
const WITHOUT: &str = "registered_buffers = FSDP_REGISTERED_BUFFERS_NEVER";

#[test]
fn fixed_memory_is_registered_and_forgotten_before_it_goes() {
    let fake = Fake::new();
    let single = single::init();
    fake.tell("slow", 2);
    drop(fixed(Nccl::get().unwrap(), Registration::Auto, false, &*single).unwrap().unwrap());
    // The communicators go when nothing of them is left.
    let end = ["close window", "finalize", "destroy", "free"];
    assert_eq!(fake.log()[1..], [&["memory 1536", "window 1536"][..], &end].concat());
    assert_eq!((fake.count("alive"), fake.count("pieces")), (0, 0));
    // Memory is somebody else's, or nothing is wanted.
    for (wanted, lent) in [(Registration::Auto, true), (Registration::Never, false), (Registration::Never, true)] {
        assert!(fixed(Nccl::get().unwrap(), wanted, lent, &*single).unwrap().is_none());
    }
    assert_eq!(fake.log().iter().filter(|line| line.starts_with("memory")).count(), 1);
    assert!(fixed(Nccl::get().unwrap(), Registration::Always, true, &*single).unwrap().is_some());
    assert_eq!((fake.count("alive"), fake.count("pieces")), (0, 0));
}

#[test]
fn versions_register_what_they_can() {
    let _fake = Fake::new();
    let single = single::init();
    let (no_windows, library) = lacking("libfake-nccl-no-windows", "-DWITHOUT_WINDOWS");
    drop(fixed(no_windows, Registration::Auto, false, &*single).unwrap().unwrap());
    // SAFETY: as fake_nccl.c declares it.
    let log = unsafe { library.get::<extern "C" fn() -> *const c_char>(b"fake_nccl_log\0").unwrap()() };
    // SAFETY: a text that ends with NUL.
    let log: Vec<&str> = unsafe { CStr::from_ptr(log) }.to_str().unwrap().lines().collect();
    let end = ["deregister", "finalize", "destroy", "free"];
    assert_eq!(log[1..], [&["memory 1536", "register 1536"][..], &end].concat());

    let (old, _library) = lacking("libfake-nccl-old", "-DWITHOUT_REGISTRATION");
    assert!(fixed(old, Registration::Auto, false, &*single).unwrap().is_none());
    let e = fixed(old, Registration::Always, false, &*single).err().unwrap();
    assert_eq!(e.status, Status::Unsupported);
    contains(&e, &["unit buffers cannot be registered", "NCCL 2.27.3", old.path(), "ncclMemAlloc", WITHOUT]);

    let errors = ranks(2, |control| {
        let nccl = if control.rank() == 0 { Nccl::get().unwrap() } else { no_windows };
        fixed(nccl, Registration::Auto, false, &*control).err().unwrap()
    });
    let words = ["different versions of NCCL", "rank 0 has one with windows", "rank 1 has one that registers buffers"];
    errors.iter().for_each(|e| contains(e, &words));
}

#[test]
fn a_registration_that_fails_is_an_error_of_all_ranks() {
    let fake = Fake::new();
    for (function, words) in [
        ("ncclMemAlloc", "1536 bytes of NCCL's memory for the unit buffers"),
        ("ncclCommWindowRegister", "rank 0 of 2: the registration of 1536 bytes with NCCL: internal error"),
    ] {
        fake.fail(function, 3);
        let errors =
            ranks(2, |control| fixed(Nccl::get().unwrap(), Registration::Auto, false, &*control).err().unwrap());
        for e in errors {
            contains(&e, &["rank 0: ", words, WITHOUT]);
        }
        assert_eq!((fake.count("alive"), fake.count("pieces")), (0, 0), "{function}");
        fake.fail("", 0);
    }
    // What NCCL does not forget is freed with its communicator all the same.
    let warnings = Arc::new(Mutex::new(Vec::new()));
    let heard = warnings.clone();
    log::set_callback(Some(Arc::new(move |_, text: &str| heard.lock().unwrap().push(text.to_string()))));
    let fixed = fixed(Nccl::get().unwrap(), Registration::Auto, false, &*single::init()).unwrap();
    fake.fail("ncclCommWindowDeregister", 3);
    drop(fixed);
    log::set_callback(None);
    assert_eq!((fake.count("alive"), fake.count("pieces")), (0, 0));
    let warnings = warnings.lock().unwrap();
    assert!(warnings[0].contains("forgetting 1536 registered bytes: internal error"), "{warnings:?}");
}

#[test]
fn a_copy_that_the_process_has_is_shared() {
    let _fake = Fake::new();
    // As LibTorch's would be, in a folder that the system does not look in.
    let file = build("libfake-nccl-shared", &["-Wl,-soname,libnccl.so.2"]);
    // SAFETY: no initializers beyond the languages'.
    let there = unsafe { Library::new(&file) }.unwrap();
    let found = Nccl::SEARCH.load_from(None).unwrap();
    assert_eq!(found.path(), file.to_str().unwrap());
    // SAFETY: as fake_nccl.c declares it.
    let alive = |of: &Library| unsafe { *of.get::<extern "C" fn() -> c_int>(b"fake_nccl_alive\0").unwrap() as usize };
    // SAFETY: as above.
    let shared = unsafe { found.function::<extern "C" fn() -> c_int>("fake_nccl_alive") }.unwrap();
    assert_eq!(alive(&there), shared as usize, "one copy");
}

#[test]
fn an_id_comes_from_the_host_or_the_launcher() {
    let _fake = Fake::new();
    let nccl = Nccl::get().unwrap();
    let made = UniqueId::new(nccl).unwrap().to_bytes();
    assert_eq!(UniqueId::from_bytes(&made).unwrap().to_bytes(), made);
    std::env::set_var("MASTER_ADDR", "node7");
    std::env::set_var("MASTER_PORT", "29500");
    let id = UniqueId::from_environment(nccl).unwrap().to_bytes();
    assert!(id.starts_with(b"node7:29501\0"), "{id:?}");
    std::env::remove_var("NCCL_COMM_ID");
}

/// Two communicators of NCCL's for rank `rank` of `world`.
fn two_comms(rank: usize, world: usize) -> [Arc<NcclComm>; 2] {
    let context = Context::new(0).unwrap();
    let (nccl, id) = (Nccl::get().unwrap(), UniqueId::new(Nccl::get().unwrap()).unwrap());
    let gather = NcclComm::new(nccl, &context, &id, config(rank, world, LONG)).unwrap();
    let reduce = gather.split(0, rank as i32, rank, world).unwrap();
    [gather, reduce]
}

#[test]
fn steps_on_the_queues_equal_the_cpus() {
    let fake = Fake::new();
    for world in [1, 2, 3] {
        for dtypes in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::BF16, DType::BF16)] {
            ranks(world, |control| {
                let comms = two_comms(control.rank(), world);
                step::train(control, comms, dtypes);
            });
        }
    }
    assert_eq!(fake.count("alive"), 0);
}

/// What a rank finds that polls.
fn polled_error(queues: &NcclQueues) -> Error {
    let start = Instant::now();
    while start.elapsed() < LONG {
        if let Err(e) = queues.comms.poll() {
            return e;
        }
    }
    panic!("no error came");
}

#[test]
fn ranks_that_launch_different_collectives_get_an_error_that_names_both() {
    let fake = Fake::new();
    for check in [Check::Together, Check::Announce] {
        let errors = ranks(2, |control| {
            let rank = control.rank();
            let comms = two_comms(rank, 2);
            let mut t = step::Trainer::new(control, comms, (DType::F32, DType::F32));
            t.queues.set_gathering(Kind::AllGather, check);
            // Units 1 and 2 are "a" and "b".
            let launched = t.pipeline.unshard(&mut t.queues, 1 + rank as u32, &[]);
            let e = match launched {
                Err(e) => e,
                // This rank came first, and NCCL would wait for ever: found while it waits.
                Ok(_) => polled_error(&t.queues),
            };
            assert!(t.pipeline.unshard(&mut t.queues, 0, &[]).is_err(), "broken");
            e
        });
        for e in errors {
            assert_eq!(e.status, Status::Mismatch, "{check:?}: {e}");
            contains(
                &e,
                &[
                    "rank 0 runs all-gather of unit \"a\"",
                    "rank 1 runs all-gather of unit \"b\"",
                    "a.weight",
                    "b.weight",
                ],
            );
        }
        assert_eq!(fake.count("alive"), 0, "{check:?}");
    }
    assert!(!fake.log().iter().any(|line| line == "finalize"), "aborted, all of them");
}

#[test]
fn a_rank_that_fails_breaks_the_others() {
    let fake = Fake::new();
    let errors = ranks(2, |control| {
        let comms = two_comms(control.rank(), 2);
        let mut t = step::Trainer::new(control.clone(), comms, (DType::F32, DType::F32));
        t.pipeline.unshard(&mut t.queues, 0, &[]).unwrap();
        t.queues.comms.finish().unwrap();
        control.barrier().unwrap();
        if control.rank() == 1 {
            control.abort("out of patience");
        }
        polled_error(&t.queues)
    });
    for e in errors {
        assert_eq!(e.status, Status::Aborted);
        contains(&e, &["rank 1 aborted: out of patience"]);
    }
    assert_eq!(fake.count("alive"), 0);
}
