//! Every collective at several world sizes, against sums computed in place.

use crate::support::*;
use fsdp::comm::{Arena, Communicator, Kind, ReduceOp, Segment, Slot, Ticket};
use fsdp::dtype::DType;

const WORLDS: [usize; 5] = [1, 2, 3, 4, 8];

fn everywhere(role: &'static str) {
    for world in WORLDS {
        assert_eq!(Job::new(role, "", world).same_report(), "ok", "{role} at world size {world}");
    }
}

#[test]
fn control_plane_collectives() {
    everywhere("host");
}

#[test]
fn a_writer_waits_for_the_readers() {
    everywhere("phases");
}

#[test]
fn reductions_have_the_bits_of_the_sum_in_rank_order() {
    everywhere("reductions");
}

#[test]
fn the_ring_wraps_around() {
    for world in [1, 2, 4] {
        assert_eq!(Job::new("wrap", "", world).same_report(), "ok");
    }
}

#[test]
fn several_communicators_and_allocations_at_once() {
    for world in [2, 3] {
        assert_eq!(Job::new("several", "", world).same_report(), "ok");
    }
}

/// A range of all ranks' data, combined over ranks 0..W-1 in order.
fn combined(all: &[Vec<f32>], range: std::ops::Range<usize>, op: ReduceOp) -> Vec<f32> {
    let w = all.len();
    let mut acc = all[0][range.clone()].to_vec();
    for other in &all[1..] {
        for (a, &b) in acc.iter_mut().zip(&other[range.clone()]) {
            *a = match op {
                ReduceOp::Sum | ReduceOp::Avg => *a + b,
                ReduceOp::Max => a.max(b),
                ReduceOp::Min => a.min(b),
            };
        }
    }
    if op == ReduceOp::Avg {
        acc.iter_mut().for_each(|a| *a /= w as f32);
    }
    acc
}

pub fn host(rank: &Rank) -> String {
    let (me, w) = (rank.rank(), rank.world());
    let c = rank.init();
    assert_eq!((c.rank(), c.world_size()), (me, w));
    // Lengths around a chunk of the scratch area, and none at all.
    for n in [0, 1, 5, 16 * 1024, 16 * 1024 + 1, 33_003] {
        let all: Vec<Vec<f32>> = (0..w).map(|r| noise(r as u64, n * w)).collect();
        let (mine, input) = (bytes_of(&all[me][..n]), bytes_of(&all[me]));
        for op in [ReduceOp::Sum, ReduceOp::Avg, ReduceOp::Max, ReduceOp::Min] {
            let mut data = mine.clone();
            c.all_reduce(&mut data, DType::F32, op).unwrap();
            assert_eq!(data, bytes_of(&combined(&all, 0..n, op)), "all-reduce {n} {op:?}");

            let mut out = vec![0; n * 4];
            c.reduce_scatter_host(&input, &mut out, DType::F32, op).unwrap();
            assert_eq!(out, bytes_of(&combined(&all, me * n..(me + 1) * n, op)), "reduce-scatter {n} {op:?}");
        }
        for (root, theirs) in all.iter().enumerate() {
            let mut data = mine.clone();
            c.broadcast(&mut data, DType::F32, root).unwrap();
            assert_eq!(data, bytes_of(&theirs[..n]), "broadcast {n} from {root}");
        }
        let mut gathered = vec![0; n * 4 * w];
        c.all_gather_host(&mine, &mut gathered, DType::F32).unwrap();
        let want: Vec<u8> = all.iter().flat_map(|a| bytes_of(&a[..n])).collect();
        assert_eq!(gathered, want, "all-gather {n}");

        let text = |r: usize| vec![r as u8; if r % 2 == 0 { n * 3 } else { r }];
        assert_eq!(c.exchange(&text(me)).unwrap(), (0..w).map(text).collect::<Vec<_>>(), "exchange {n}");
    }
    let mut counts = (me as i64 + 1).to_ne_bytes();
    c.all_reduce(&mut counts, DType::I64, ReduceOp::Sum).unwrap();
    assert_eq!(i64::from_ne_bytes(counts), (w * (w + 1) / 2) as i64);
    for _ in 0..200 {
        c.barrier().unwrap();
    }
    "ok".to_string()
}

/// Rank `r`'s `n` numbers, while a READ phase is open or nobody writes.
fn shard(arena: &Arena, r: usize, n: usize) -> &[u32] {
    // SAFETY: the arena has `n` numbers a rank; see above.
    unsafe { std::slice::from_raw_parts(arena.base.cast::<u32>().add(r * n), n) }
}

fn fill_shard(arena: &Arena, r: usize, n: usize, value: u32) {
    for i in 0..n {
        // SAFETY: the arena has `n` numbers a rank; tests fill their own rank's, outside READ phases.
        unsafe { arena.base.cast::<u32>().add(r * n + i).write(value) };
    }
}

pub fn phases(rank: &Rank) -> String {
    let (me, w, n) = (rank.rank(), rank.world(), 5000);
    let c = rank.init();
    let unit = c.name_units(&["layers.0".to_string()]);
    let arena = c.alloc_arena(n * w * 4).unwrap();
    assert_eq!(arena.base as usize % 64, 0);
    assert!((0..w).all(|r| shard(&arena, r, n).iter().all(|x| *x == 0)));
    c.barrier().unwrap();
    let check = |e: u32| {
        for r in 0..w {
            let wrong = shard(&arena, r, n).iter().find(|x| **x != e * 100 + r as u32);
            assert_eq!(wrong, None, "rank {me} reads rank {r} in phase {e}");
        }
    };
    for e in 1..150u32 {
        if (e as usize + me) % (w + 3) == 0 {
            sleep_ms(2);
        }
        fill_shard(&arena, me, n, e * 100 + me as u32);
        c.open_reads(&arena).unwrap();
        c.all_gather(tag(Kind::AllGather, unit, n * w * 4), &arena).unwrap();
        check(e);
        // A reader that takes its time: the writers must wait for it.
        if e as usize % w == me {
            sleep_ms(3);
        }
        check(e);
        c.close_reads(&arena);
        c.wait_writable(&arena).unwrap();
    }
    "ok".to_string()
}

/// Whether rank `r` has a gradient for parameter `p` in round `t`.
fn has(r: usize, p: usize, t: usize) -> bool {
    p != 2 && (r + p + t) % 3 != 0
}

/// One reduce-scatter of a unit of four parameters of `n` floats a rank each, checked bit by bit.
struct Round<'a> {
    c: &'a dyn Communicator,
    unit: u32,
    n: usize,
}

impl Round<'_> {
    fn total(&self) -> usize {
        4 * self.n * self.c.world_size()
    }

    fn start(&self, t: usize, slot: &Slot) -> Ticket {
        let me = self.c.rank();
        let g = noise((t * 64 + me) as u64, self.total());
        for p in 0..4 {
            let part = p * self.total() / 4..(p + 1) * self.total() / 4;
            for i in part {
                // What is absent is never read: it may hold anything.
                let x = if has(me, p, t) { g[i] } else { f32::NAN };
                // SAFETY: the slot has `total` floats, and is this rank's.
                unsafe { slot.data.cast::<f32>().add(i).write(x) };
            }
        }
        let present: Vec<bool> = (0..4).map(|p| has(me, p, t)).collect();
        self.c.reduce_scatter_start(tag(Kind::ReduceScatter, self.unit, self.total() * 4), slot, &present).unwrap()
    }

    fn finish(&self, t: usize, ticket: Ticket) {
        let (me, w, n) = (self.c.rank(), self.c.world_size(), self.n);
        // This rank's shard is one contiguous range: here parameter p's part of it is `n` floats of p's quarter.
        let at = |p: usize| p * self.total() / 4 + me * n;
        let mut out = noise(5, 4 * n);
        let before = out.clone();
        let start = out.as_mut_ptr();
        let segment = |p: usize| Segment {
            param: p,
            offset: at(p),
            len: n,
            // SAFETY: parameter p's piece of `out`.
            out: unsafe { start.add(p * n) },
            accumulate: (p + t) % 2 == 0,
        };
        let segments: Vec<Segment> = (0..4).map(segment).collect();
        let any = loop {
            // Sometimes poll before waiting.
            match self.c.reduce_scatter_finish(ticket, &segments, t % 3 != 0).unwrap() {
                Some(any) => break any,
                None => std::thread::yield_now(),
            }
        };
        assert_eq!(any, (0..4).map(|p| (0..w).any(|r| has(r, p, t))).collect::<Vec<_>>());
        let all: Vec<Vec<f32>> = (0..w).map(|r| noise((t * 64 + r) as u64, self.total())).collect();
        for p in 0..4 {
            for i in 0..n {
                let sum = (0..w).filter(|r| has(*r, p, t)).map(|r| all[r][at(p) + i]).reduce(|a, b| a + b);
                let old = before[p * n + i];
                let want = match sum {
                    None => old,
                    Some(s) if segments[p].accumulate => old + s / w as f32,
                    Some(s) => s / w as f32,
                };
                assert_eq!(out[p * n + i].to_bits(), want.to_bits(), "round {t} parameter {p} element {i}");
            }
        }
    }
}

pub fn reductions(rank: &Rank) -> String {
    let c = rank.init();
    let unit = c.name_units(&["layers.0".to_string()]);
    let round = Round { c: &*c, unit, n: 1037 };
    let bytes = round.total() * 4;
    let (slots, _owner) = c.alloc_slots(&[bytes, bytes + 64, bytes], 4).unwrap();
    assert!(slots.iter().all(|s| s.data as usize % 64 == 0 && s.bytes >= bytes));
    // Up to three in flight; ranks use the slots in different orders.
    let slot_of = |t: usize| &slots[(t + rank.rank()) % 3];
    let rounds = 24;
    let mut tickets: Vec<Ticket> = Vec::new();
    for t in 0..rounds + 2 {
        if t < rounds {
            if t >= 3 {
                assert!(c.finished(tickets[t - 3], true).unwrap());
            }
            tickets.push(round.start(t, slot_of(t)));
        }
        if t >= 2 {
            round.finish(t - 2, tickets[t - 2]);
        }
    }
    assert!(c.finished(tickets[rounds - 1], true).unwrap());
    "ok".to_string()
}

pub fn wrap(rank: &Rank) -> String {
    let (me, w) = (rank.rank(), rank.world());
    let c = rank.init();
    let unit = c.name_units(&["a".to_string()]);
    let arena = c.alloc_arena(64 * w).unwrap();
    let round = Round { c: &*c, unit, n: 3 };
    let (slots, _owner) = c.alloc_slots(&[round.total() * 4; 2], 4).unwrap();
    c.open_reads(&arena).unwrap();
    // Announcements only: a fast rank runs ahead until it is a whole ring ahead of a slow one.
    for i in 0..5000 {
        if me == 0 && i % 1000 == 0 {
            sleep_ms(20);
        }
        c.all_gather(tag(Kind::AllGather, unit, 64 * w), &arena).unwrap();
    }
    let mut last: Option<Ticket> = None;
    for t in 0..2500 {
        let ticket = round.start(t, &slots[t % 2]);
        round.finish(t, ticket);
        if let Some(last) = last {
            assert!(c.finished(last, true).unwrap());
        }
        last = Some(ticket);
    }
    c.barrier().unwrap();
    "ok".to_string()
}

pub fn several(rank: &Rank) -> String {
    let (me, w) = (rank.rank(), rank.world());
    let first = rank.init();
    let second = rank.init();
    let arenas: Vec<Arena> = (0..5).map(|i| first.alloc_arena(i * 1000 * w).unwrap()).collect();
    let other = second.alloc_arena(64).unwrap();
    assert!(first.open_reads(&other).is_err(), "an arena of another communicator");
    for (i, a) in arenas.iter().enumerate().skip(1) {
        // SAFETY: this rank's part of its own arena.
        unsafe { a.base.add(me * i * 1000).write_bytes(i as u8 + me as u8, i * 1000) };
        first.open_reads(a).unwrap();
    }
    for (i, a) in arenas.iter().enumerate().skip(1) {
        first.all_gather(no_unit(Kind::AllGather, i * 1000 * w), a).unwrap();
        for r in 0..w {
            // SAFETY: the READ phase is open on every rank.
            let got = unsafe { std::slice::from_raw_parts(a.base.add(r * i * 1000), i * 1000) };
            assert!(got.iter().all(|b| *b == i as u8 + r as u8));
        }
    }
    // Memory outlives its communicator.
    let kept = arenas[1].clone();
    first.barrier().unwrap();
    drop((first, arenas));
    // SAFETY: the clone keeps the mapping.
    assert_eq!(unsafe { kept.base.read() }, 1);
    second.barrier().unwrap();
    "ok".to_string()
}
