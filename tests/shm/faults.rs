//! What goes wrong at run time: killed ranks, ranks that disagree, leave, abort or do not come.

use crate::support::*;
use fsdp::comm::{Check, Communicator, Held, Kind, ReduceOp};
use fsdp::dtype::DType;
use fsdp::error::{Error, Result, Status};
use std::sync::Arc;

const WAITS: [&str; 9] =
    ["barrier", "exchange", "all-reduce", "all-gather", "writable", "end", "finished", "arena", "slots"];

/// Ranks 0..W-1 wait in the named way; the last rank dies instead of coming. Reports the error and when it was seen.
pub fn kill(rank: &Rank) -> String {
    let c = rank.init();
    let victim = rank.rank() == rank.world() - 1;
    let unit = c.name_units(&names(&["x"]));
    let arena = c.alloc_arena(4096).unwrap();
    let memory = c.alloc_slots(&[256], 1, unit..unit + 1).unwrap();
    let reduce = |c: &Arc<dyn Communicator>| {
        c.reduce_start(tag(Kind::ReduceScatter, unit, 256), &memory.slots[0], &[Held::Float32]).unwrap()
    };
    let mut nothing = Nothing::default();
    let dies = || -> ! {
        sleep_ms(150);
        println!("\nDIES {}", clock_ms());
        die()
    };
    let case = rank.case.as_str();
    let gather = tag(Kind::AllGather, unit, 4096);
    let outcome: Result<()> = match case {
        "writable" => {
            c.open_reads(&arena).unwrap();
            c.all_gather(gather, &arena, Check::Announce).unwrap();
            if victim {
                dies()
            }
            c.close_reads(&arena);
            c.wait_writable(&arena)
        }
        "finished" => {
            let ticket = reduce(&c);
            if victim {
                dies()
            }
            // Rank 0 alone has done its part when all have started.
            c.reduce_wait(ticket, &mut nothing, true).map(drop)
        }
        _ if victim => dies(),
        "barrier" => c.barrier(),
        "exchange" => c.exchange(b"hello").map(drop),
        "all-reduce" => c.all_reduce(&mut [0; 300_000], DType::F32, ReduceOp::Sum),
        "all-gather" => {
            c.open_reads(&arena).unwrap();
            c.all_gather(gather, &arena, Check::Announce)
        }
        "end" => {
            reduce(&c);
            c.reduce_end(memory.id, &mut nothing)
        }
        "arena" => c.alloc_arena(100_000).map(drop),
        "slots" => c.alloc_slots(&[100], 1, unit..unit + 1).map(drop),
        _ => panic!("no case {case}"),
    };
    let seen = clock_ms();
    let e = outcome.expect_err("the death of a rank");
    // Broken for good, in every call.
    assert_eq!(c.barrier().unwrap_err(), e);
    assert_eq!(c.open_reads(&arena).unwrap_err(), e);
    assert_eq!(c.async_error(), Some(e.clone()));
    format!("{seen} {}", text(&e))
}

#[test]
fn every_wait_sees_a_killed_rank_within_a_second() {
    for case in WAITS {
        for world in [2, 4] {
            let running = Job::new("kill", case, world).start();
            let pid = running.pid(world - 1);
            let outcomes = running.finish();
            let dies =
                outcomes[world - 1].all.lines().find_map(|l| l.strip_prefix("DIES ")).expect("the time of death");
            let dies: u64 = dies.parse().unwrap();
            for o in &outcomes[..world - 1] {
                let report = o.report.as_ref().unwrap_or_else(|| panic!("{case}: {}", o.all));
                let (seen, error) = report.split_once(' ').unwrap();
                let want = format!("PeerDied | rank {} (pid {pid}) died while rank ", world - 1);
                assert!(error.starts_with(&want), "{case}: {error}");
                let late = seen.parse::<u64>().unwrap() - dies;
                assert!(late < 1000, "{case}: seen after {late} ms");
            }
        }
    }
}

/// What a training loop does, without end.
pub fn train_loop(rank: &Rank) -> String {
    let (me, w, n) = (rank.rank(), rank.world(), 1000);
    let c = rank.init();
    let unit = c.name_units(&names(&["a", "b"]));
    let arena = c.alloc_arena(n * w * 4).unwrap();
    let memory = c.alloc_slots(&[n * w * 4; 2], 1, unit..unit + 2).unwrap();
    let slots = &memory.slots;
    let step = || -> Result<()> {
        // SAFETY: this rank's shard, outside a READ phase.
        unsafe { arena.base.add(me * n * 4).write_bytes(me as u8, n * 4) };
        c.open_reads(&arena)?;
        for u in 0..2 {
            c.all_gather(tag(Kind::AllGather, unit + u, n * w * 4), &arena, Check::Announce)?;
        }
        let mut nothing = Nothing::default();
        for u in [1, 0] {
            let what = tag(Kind::ReduceScatter, unit + u, n * w * 4);
            let ticket = c.reduce_start(what, &slots[u as usize], &[Held::Float32])?;
            c.reduce_wait(ticket, &mut nothing, true)?;
        }
        c.reduce_end(memory.id, &mut nothing)?;
        c.close_reads(&arena);
        c.all_reduce(&mut [0; 8], DType::F64, ReduceOp::Sum)?;
        c.wait_writable(&arena)
    };
    println!("\nRUNS");
    let e: Error = loop {
        if let Err(e) = step() {
            break e;
        }
    };
    format!("{} {}", clock_ms(), text(&e))
}

#[test]
fn ranks_killed_at_random_moments_are_named() {
    let shm_files = || std::fs::read_dir("/dev/shm").map_or(0, |d| d.filter(is_ours).count());
    let world = 4;
    for round in 0..20u64 {
        let mut running = Job::new("loop", "", world).start();
        running.wait_for("RUNS");
        sleep_ms(round * 37 % 100);
        let victim = (round % world as u64) as usize;
        let pid = running.pid(victim);
        let killed = clock_ms();
        running.kill(victim);
        for (r, o) in running.finish().into_iter().enumerate() {
            if r == victim {
                assert_eq!(o.signal, Some(libc::SIGKILL));
                continue;
            }
            let report = o.report.unwrap_or_else(|| panic!("round {round} rank {r}: {}", o.all));
            let (seen, error) = report.split_once(' ').unwrap();
            assert!(error.starts_with(&format!("PeerDied | rank {victim} (pid {pid}) died ")), "{error}");
            let late = seen.parse::<u64>().unwrap() - killed;
            assert!(late < 1000, "round {round}: seen after {late} ms");
        }
    }
    assert_eq!(shm_files(), 0);
}

fn is_ours(file: &std::io::Result<std::fs::DirEntry>) -> bool {
    file.as_ref().is_ok_and(|f| f.file_name().to_string_lossy().contains("fsdp"))
}

/// Rank 1 runs another collective than the others.
pub fn mismatch(rank: &Rank) -> String {
    let c = rank.init();
    let odd = rank.rank() == 1;
    let unit = c.name_units(&names(&["layers.1", "layers.2"]));
    let arena = c.alloc_arena(4096).unwrap();
    let memory = c.alloc_slots(&[4096], 4, unit..unit + 2).unwrap();
    c.open_reads(&arena).unwrap();
    c.barrier().unwrap();
    let gather_of = |kind, u, bytes, check| c.all_gather(tag(kind, u, bytes), &arena, check);
    let gather = |u, bytes| gather_of(Kind::AllGather, u, bytes, Check::Announce);
    let reduce = |bytes, params: usize| {
        let what = tag(Kind::ReduceScatter, unit, bytes);
        c.reduce_start(what, &memory.slots[0], &vec![Held::Float32; params])?;
        c.reduce_end(memory.id, &mut Nothing::default())
    };
    let first = match (rank.case.as_str(), odd) {
        ("kind", false) => gather(unit, 4096),
        ("kind", true) => c.reduce_end(memory.id, &mut Nothing::default()),
        ("forward", _) => gather_of(Kind::ForwardAllGather, unit + odd as u32, 4096, Check::Together),
        ("unit", _) => gather(unit + odd as u32, 4096),
        ("bytes", _) => gather(unit, 4096 - 64 * odd as usize),
        ("params", _) => reduce(4096, 2 + odd as usize),
        ("gradients", _) => reduce(4096 - 64 * odd as usize, 2),
        ("op", _) => c.all_reduce(&mut [0; 8], DType::F32, if odd { ReduceOp::Max } else { ReduceOp::Sum }),
        ("root", _) => c.broadcast(&mut [0; 8], DType::F32, odd as usize),
        ("length", _) => c.all_reduce(&mut vec![0; 8 + 8 * odd as usize], DType::F32, ReduceOp::Sum),
        ("alloc", false) => c.alloc_arena(64).map(drop),
        ("alloc", true) => c.alloc_slots(&[64], 1, unit..unit + 1).map(drop),
        (case, _) => panic!("no case {case}"),
    };
    // Collectives that wait for nobody may return before the others come: the next one that waits fails.
    error_text(first.and_then(|()| c.barrier()))
}

#[test]
fn a_mismatch_is_one_error_on_every_rank() {
    let (l1, l2) = ("unit \"layers.1\"", "unit \"layers.2\"");
    let cases = [
        ("kind", format!("all-gather of {l1} (float32, 4096 bytes"), "end of a backward".to_string()),
        (
            "forward",
            format!("all-gather in forward of {l1} (float32, 4096 bytes, arena 0) with parameters layers.1.weight"),
            format!("all-gather in forward of {l2} (float32, 4096 bytes, arena 0) with parameters layers.2.weight"),
        ),
        ("unit", format!("all-gather of {l1}"), format!("all-gather of {l2}")),
        (
            "bytes",
            format!("all-gather of {l1} (float32, 4096 bytes"),
            format!("all-gather of {l1} (float32, 4032 bytes"),
        ),
        ("op", "op sum".to_string(), "op max".to_string()),
        ("root", "root 0".to_string(), "root 1".to_string()),
        ("length", "8 bytes".to_string(), "16 bytes".to_string()),
        ("alloc", "allocation (64 bytes, an arena)".to_string(), "gradient slots of layout".to_string()),
    ];
    for (case, others, odd) in cases {
        for world in [2, 4] {
            let report = Job::new("mismatch", case, world).same_report();
            let start = match case {
                "forward" => "Mismatch | Forward order differs across ranks: at collective 4 rank ",
                _ => "Mismatch | ranks disagree: at collective 4 rank ",
            };
            assert!(report.starts_with(start), "{case}: {report}");
            let (a, b) = report.split_once(" but rank ").unwrap();
            // The odd rank is 1: first of the two only against a higher one.
            let (others_text, odd_text) = if a.contains("rank 1 runs") { (b, a) } else { (a, b) };
            assert!(others_text.contains(&others) && odd_text.contains(&odd), "{case}: {report}");
            assert!(odd_text.contains("1 runs"), "{case}: {report}");
        }
    }
}

#[test]
fn gradients_of_different_shapes_are_an_error_on_every_rank() {
    for (case, a, b) in [("params", "2 parameters", "3 parameters"), ("gradients", "4096 bytes", "4032 bytes")] {
        let report = Job::new("mismatch", case, 3).same_report();
        assert!(report.starts_with("Mismatch | ranks disagree: rank "), "{case}: {report}");
        assert!(report.contains(a) && report.contains(b) && report.contains("\"layers.1\""), "{case}: {report}");
    }
}

/// Rank 1 ends its step without ending its backward.
pub fn skip(rank: &Rank) -> String {
    let c = rank.init();
    let unit = c.name_units(&names(&["a", "b"]));
    let arena = c.alloc_arena(64).unwrap();
    let memory = c.alloc_slots(&[64, 64], 1, unit..unit + 2).unwrap();
    c.open_reads(&arena).unwrap();
    c.barrier().unwrap();
    let step = || -> Result<()> {
        for u in 0..2 {
            c.reduce_start(tag(Kind::ReduceScatter, unit + u, 64), &memory.slots[u as usize], &[Held::Float32])?;
        }
        if rank.rank() != 1 {
            c.reduce_end(memory.id, &mut Nothing::default())?;
        }
        c.close_reads(&arena);
        c.wait_writable(&arena)?;
        c.barrier()
    };
    error_text(step())
}

#[test]
fn a_backward_that_one_rank_does_not_end_is_an_error_and_no_hang() {
    let report = Job::new("skip", "", 3).same_report();
    assert!(report.starts_with("Mismatch | ranks disagree"), "{report}");
    assert!(report.contains("end of a backward") && report.contains("wait for writable shards"), "{report}");
}

/// Rank 2 does not come in time.
pub fn late(rank: &Rank) -> String {
    let c = rank.init();
    if rank.rank() == 2 {
        sleep_ms(3000);
    }
    error_text(c.barrier())
}

#[test]
fn a_rank_that_does_not_come_is_named_in_a_timeout() {
    let report = Job::new("late", "", 3).timeout_ms(1000).same_report();
    assert!(report.starts_with("Timeout | rank 2 did not come to barrier within 1000 ms (rank "), "{report}");
}

/// Rank 1 gives up while the others wait.
pub fn abort(rank: &Rank) -> String {
    let c = rank.init();
    if rank.rank() == 1 {
        sleep_ms(100);
        c.abort(&format!("disk full {}", "é".repeat(2000)));
    }
    let e = c.barrier().unwrap_err();
    assert_eq!(c.async_error(), Some(e.clone()));
    text(&e)
}

#[test]
fn an_abort_reaches_every_rank() {
    let report = Job::new("abort", "", 4).same_report();
    assert!(report.starts_with("Aborted | rank 1 aborted: disk full éé"), "{report}");
}

/// Rank 1 destroys its communicator while it is needed.
pub fn leave(rank: &Rank) -> String {
    let c = rank.init();
    c.barrier().unwrap();
    if rank.rank() == 1 {
        drop(c);
        sleep_ms(500);
        return "left".to_string();
    }
    let e = c.barrier().unwrap_err();
    assert_eq!(e.status, Status::Mismatch);
    text(&e)
}

#[test]
fn a_rank_that_leaves_early_is_not_called_dead() {
    let reports = Job::new("leave", "", 3).reports();
    for r in [&reports[0], &reports[2]] {
        assert!(r.contains("rank 1 has left (destroyed its communicator) while rank "), "{r}");
        assert!(r.ends_with("waited for it in barrier"), "{r}");
    }
}

/// Rank 1 has done all that the others need and leaves; rank 2 is slow.
pub fn leave_late(rank: &Rank) -> String {
    let c = rank.init();
    let unit = c.name_units(&names(&["a"]));
    let memory = c.alloc_slots(&[64], 1, unit..unit + 1).unwrap();
    c.reduce_start(tag(Kind::ReduceScatter, unit, 64), &memory.slots[0], &[Held::Float32]).unwrap();
    if rank.rank() == 2 {
        sleep_ms(400);
    }
    let mut nothing = Nothing::default();
    c.reduce_end(memory.id, &mut nothing).unwrap();
    assert_eq!((nothing.0, c.async_error()), (1, None));
    "ok".to_string()
}

#[test]
fn a_rank_that_is_done_may_leave() {
    assert_eq!(Job::new("leave-late", "", 4).same_report(), "ok");
}
