//! The life of a communicator: making it from the environment, using it wrongly, making it again, leaving nothing behind.

use crate::support::*;
use fsdp::comm::{env, shm, Check, Held, Kind, Tag, Ticket};
use fsdp::dtype::DType;
use fsdp::error::Status;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Local misuse is an error of this rank alone and breaks nothing.
pub fn misuse(rank: &Rank) -> String {
    let c = rank.init();
    let unit = c.name_units(&names(&["a"]));
    let arena = c.alloc_arena(64).unwrap();
    let memory = c.alloc_slots(&[64, 64], 1, unit..unit + 1).unwrap();
    let slots = &memory.slots;
    let gather = tag(Kind::AllGather, unit, 64);
    let scatter = |bytes| tag(Kind::ReduceScatter, unit, bytes);
    let mut nothing = Nothing::default();
    let mut seen = Vec::new();
    if rank.rank() == 0 {
        seen.push(c.all_gather(gather, &arena, Check::Announce).unwrap_err().status);
        let none = Ticket { slots: memory.id, number: 0 };
        assert!(!c.reduce_done(none).unwrap());
        seen.push(c.reduce_wait(none, &mut nothing, true).unwrap_err().status);
        assert_eq!(seen, [Status::InvalidState; 2]);
        seen.clear();
        seen.push(c.reduce_start(scatter(128), &slots[0], &[Held::Float32]).unwrap_err().status);
        seen.push(c.reduce_start(scatter(64), &slots[0], &[Held::Float32; 2]).unwrap_err().status);
        let stranger = fsdp::comm::Slot { index: 1, ..slots[0] };
        seen.push(c.reduce_start(scatter(64), &stranger, &[Held::Float32]).unwrap_err().status);
        let other = tag(Kind::ReduceScatter, unit + 1, 64);
        seen.push(c.reduce_start(other, &slots[0], &[Held::Float32]).unwrap_err().status);
        seen.push(c.all_gather_host(&[0; 4], &mut [0; 5], DType::F32).unwrap_err().status);
        seen.push(c.broadcast(&mut [0; 4], DType::F32, 2).unwrap_err().status);
        let single = fsdp::comm::single::init();
        seen.push(c.open_reads(&single.alloc_arena(64).unwrap()).unwrap_err().status);
        seen.push(single.open_reads(&arena).unwrap_err().status);
        seen.push(c.reduce_done(Ticket { slots: 7, number: 0 }).unwrap_err().status);
        seen.push(c.reduce_ready(7, &mut nothing).unwrap_err().status);
        assert_eq!(seen, [Status::InvalidArgument; 10]);
        let integers = Tag { dtype: DType::I32, ..scatter(64) };
        assert_eq!(c.reduce_start(integers, &slots[0], &[Held::Float32]).unwrap_err().status, Status::Unsupported);
    }
    c.open_reads(&arena).unwrap();
    assert_eq!(c.open_reads(&arena).unwrap_err().status, Status::InvalidState);
    assert_eq!(c.wait_writable(&arena).unwrap_err().status, Status::InvalidState);
    c.reduce_start(scatter(64), &slots[0], &[Held::Float32]).unwrap();
    let again = c.reduce_start(scatter(64), &slots[0], &[Held::Float32]).unwrap_err();
    assert_eq!(again.status, Status::InvalidState);
    c.reduce_end(memory.id, &mut nothing).unwrap();
    assert_eq!(nothing.0, 1);
    c.close_reads(&arena);
    c.close_reads(&arena);
    c.wait_writable(&arena).unwrap();
    c.barrier().unwrap();
    "ok".to_string()
}

#[test]
fn misuse_is_an_error_that_breaks_nothing() {
    assert_eq!(Job::new("misuse", "", 2).same_report(), "ok");
}

/// (open descriptors, mappings of memfds) of this process.
fn held() -> (usize, usize) {
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (fds, maps.lines().filter(|l| l.contains("memfd:")).count())
}

pub fn leak(rank: &Rank) -> String {
    let before = held();
    for _ in 0..20 {
        let c = rank.init();
        let arena = c.alloc_arena(100_000).unwrap();
        let slots = c.alloc_slots(&[4096; 3], 2, 0..1).unwrap();
        assert!(held().1 >= 3, "the memory is memfds");
        c.open_reads(&arena).unwrap();
        c.barrier().unwrap();
        drop((c, arena, slots));
    }
    assert_eq!(held(), before);
    "ok".to_string()
}

#[test]
fn nothing_stays_open_or_mapped() {
    for world in [1, 3] {
        assert_eq!(Job::new("leak", "", world).same_report(), "ok");
    }
}

/// Communicators of one job one after the other, while some ranks are slow to leave the last one.
pub fn again(rank: &Rank) -> String {
    for i in 0..30u64 {
        let c = rank.init();
        assert_eq!(c.exchange(&i.to_ne_bytes()).unwrap(), vec![i.to_ne_bytes().to_vec(); rank.world()]);
        c.barrier().unwrap();
        if (i as usize + rank.rank()) % 5 == 0 {
            sleep_ms(5);
        }
    }
    "ok".to_string()
}

#[test]
fn a_job_may_meet_again_and_again() {
    assert_eq!(Job::new("again", "", 4).same_report(), "ok");
}

pub fn from_env(rank: &Rank) -> String {
    let c = env::init().unwrap();
    assert_eq!((c.rank(), c.world_size()), (rank.rank(), rank.world()));
    c.barrier().unwrap();
    "ok".to_string()
}

#[test]
fn the_launchers_variables_make_a_communicator() {
    for world in [1, 3] {
        let job = Job::new("env", "", world);
        let start = |r: usize| {
            let mut c = job.command(r);
            c.env("RANK", r.to_string()).env("WORLD_SIZE", world.to_string()).env("FSDP_JOB", job.name());
            Running::of(vec![c.spawn().unwrap()])
        };
        let running: Vec<Running> = (0..world).map(start).collect();
        for r in running {
            let o = r.finish().remove(0);
            assert_eq!(o.report.as_deref(), Some("ok"), "{}", o.all);
        }
    }
}

pub fn too_much(rank: &Rank) -> String {
    let c = rank.init();
    c.barrier().unwrap();
    error_text(c.alloc_arena(1 << 50))
}

#[test]
fn a_lack_of_memory_is_an_error_on_every_rank() {
    let report = Job::new("too-much", "", 3).same_report();
    assert!(report.starts_with("OutOfMemory | rank 0: allocation (1125899906842624 bytes, an arena)"), "{report}");
}

const NOBODY: u32 = 65534;

/// The abstract address of a job of the superuser, as the rendezvous derives it.
fn root_name(job: &str) -> String {
    let hash = job.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3));
    format!("fsdp-0-{hash:016x}")
}

fn become_nobody() {
    // SAFETY: a rank process of one thread that matters; plain calls.
    unsafe {
        assert_eq!(libc::setgid(NOBODY), 0);
        assert_eq!(libc::setuid(NOBODY), 0);
    }
}

fn raw_socket(name: &str, call: unsafe extern "C" fn(i32, *const libc::sockaddr, u32) -> i32) -> Option<OwnedFd> {
    // SAFETY: plain calls on a new descriptor; the address outlives them.
    unsafe {
        let fd = OwnedFd::from_raw_fd(libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0));
        let mut a: libc::sockaddr_un = std::mem::zeroed();
        a.sun_family = libc::AF_UNIX as u16;
        for (to, from) in a.sun_path[1..].iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let len = 2 + 1 + name.len() as u32;
        (call(fd.as_raw_fd(), (&raw const a).cast(), len) == 0).then_some(fd)
    }
}

/// Returns when somebody has bound this abstract name.
fn wait_for_name(name: &str) {
    while !std::fs::read_to_string("/proc/net/unix").unwrap().lines().any(|l| l.ends_with(&format!("@{name}"))) {
        sleep_ms(2);
    }
}

/// Rank 0 serves; "rank 1" is a process of another user that connects all the same, then the real one comes.
pub fn stranger(rank: &Rank) -> String {
    let done = format!("{}-done", rank.config.job);
    if rank.rank() == 2 {
        become_nobody();
        let connection = loop {
            match raw_socket(&root_name(&rank.config.job), libc::connect) {
                Some(c) => break c,
                None => sleep_ms(2),
            }
        };
        let mut buffer = [0u8; 4096];
        // SAFETY: the buffer has that many bytes.
        let n = unsafe { libc::recv(connection.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        let _done = raw_socket(&done, libc::bind).unwrap();
        sleep_ms(2000);
        return String::from_utf8_lossy(&buffer[5..n.max(5) as usize]).into_owned();
    }
    if rank.rank() == 1 {
        wait_for_name(&done);
    }
    let config = shm::Config { world_size: 2, ..rank.config.clone() };
    shm::init(&config).unwrap().barrier().unwrap();
    "ok".to_string()
}

/// Rank 0 is a process of another user that took the name first.
pub fn squatter(rank: &Rank) -> String {
    if rank.rank() == 0 {
        become_nobody();
        let fd = raw_socket(&root_name(&rank.config.job), libc::bind).unwrap();
        // SAFETY: calls on our own descriptor; the accepted ones end with the process.
        unsafe {
            assert_eq!(libc::listen(fd.as_raw_fd(), 8), 0);
            for _ in 0..2 {
                assert!(libc::accept(fd.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) >= 0);
            }
        }
        return "served".to_string();
    }
    wait_for_name(&root_name(&rank.config.job));
    let config = shm::Config { rank: rank.rank() - 1, world_size: 2, ..rank.config.clone() };
    error_text(shm::init(&config).map(drop))
}

#[test]
fn another_user_is_refused_at_both_ends() {
    // SAFETY: takes no argument, cannot fail.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: needs the superuser, to become somebody else");
        return;
    }
    let reports = Job::new("stranger", "", 3).reports();
    assert_eq!(reports[..2], ["ok", "ok"]);
    assert!(reports[2].contains("refused a process of user 65534 (pid "), "{reports:?}");
    // Rank 0 that finds its name taken, and rank 1 that looks for rank 0.
    let reports = Job::new("squatter", "", 3).reports();
    for r in &reports[1..] {
        assert!(r.starts_with("Rendezvous | ") && r.contains("refused a process of user 65534"), "{r}");
    }
}

#[test]
fn bad_configs_are_refused() {
    let bad = |change: &dyn Fn(&mut shm::Config)| {
        let mut c = shm::Config::new(format!("bad-{}", std::process::id()), 0, 1);
        change(&mut c);
        let e = shm::init(&c).err().expect("an error");
        assert_eq!(e.status, Status::InvalidArgument, "{e}");
        e.message
    };
    assert!(bad(&|c| c.world_size = 0).contains("world size 0"));
    assert!(bad(&|c| c.world_size = 65).contains("world size 65"));
    assert!(bad(&|c| c.rank = 1).contains("rank 1 is out of range for world size 1"));
    assert!(bad(&|c| c.job = String::new()).contains("job name"));
    assert!(bad(&|c| c.job = "x".repeat(2000)).contains("job name"));
    assert!(bad(&|c| c.timeout = std::time::Duration::ZERO).contains("timeout"));
}

/// A large job: 64 ranks, by threads, because only the meeting is of interest.
#[test]
fn the_largest_world_meets() {
    let job = format!("largest-{}", std::process::id());
    let start = |rank: usize| {
        let config = shm::Config::new(job.clone(), rank, shm::MAX_WORLD);
        std::thread::spawn(move || {
            let c = shm::init(&config)?;
            c.barrier()
        })
    };
    // 64 x 63 sockets in one process need more descriptors than some limits allow.
    // SAFETY: plain calls on a local struct.
    let enough = unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max.min(10_000);
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        limit.rlim_cur >= 10_000
    };
    if !enough {
        eprintln!("skipped: needs 10000 file descriptors");
        return;
    }
    let threads: Vec<_> = (0..shm::MAX_WORLD).map(start).collect();
    for t in threads {
        t.join().unwrap().unwrap();
    }
}
