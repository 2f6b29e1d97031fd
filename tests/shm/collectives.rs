//! Every collective at several world sizes, against sums computed in place.

use crate::support::*;
use fsdp::comm::{Arena, Check, Communicator, Held, Kind, ReduceOp, ReduceTarget, Segment, Slot, Ticket};
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
fn reductions_are_matched_by_unit() {
    everywhere("unordered");
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
    let unit = c.name_units(&names(&["layers.0"]));
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
        c.all_gather(tag(Kind::AllGather, unit, n * w * 4), &arena, Check::Announce).unwrap();
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
        let held: Vec<Held> = (0..4).map(|p| if has(me, p, t) { Held::Float32 } else { Held::Nothing }).collect();
        self.c.reduce_start(tag(Kind::ReduceScatter, self.unit, self.total() * 4), slot, &held).unwrap()
    }

    fn checker(&self) -> Checker {
        Checker { me: self.c.rank(), w: self.c.world_size(), n: self.n, t: 0, out: Vec::new(), segments: Vec::new() }
    }
}

/// Takes the means of the rounds of one unit, in order, and checks each bit by bit.
struct Checker {
    me: usize,
    w: usize,
    n: usize,
    t: usize,
    out: Vec<f32>,
    segments: Vec<Segment>,
}

impl Checker {
    fn before(&self) -> Vec<f32> {
        noise(5, 4 * self.n)
    }

    /// This rank's shard is one contiguous range: here parameter p's part of it is `n` floats of p's quarter.
    fn at(&self, p: usize) -> usize {
        p * self.n * self.w + self.me * self.n
    }
}

impl ReduceTarget for Checker {
    fn segments(&mut self, unit: usize) -> &[Segment] {
        assert_eq!(unit, 0);
        self.out = self.before();
        let start = self.out.as_mut_ptr();
        let segment = |p: usize| Segment {
            param: p,
            offset: self.at(p),
            len: self.n,
            narrow: DType::F32,
            // SAFETY: parameter p's piece of `out`.
            out: unsafe { start.add(p * self.n) },
            accumulate: (p + self.t) % 2 == 0,
        };
        self.segments = (0..4).map(segment).collect();
        &self.segments
    }

    fn reduced(&mut self, _: usize, any: &[bool]) {
        let (t, w, n) = (self.t, self.w, self.n);
        assert_eq!(any, (0..4).map(|p| (0..w).any(|r| has(r, p, t))).collect::<Vec<_>>());
        let all: Vec<Vec<f32>> = (0..w).map(|r| noise((t * 64 + r) as u64, 4 * n * w)).collect();
        let before = self.before();
        for p in 0..4 {
            for i in 0..n {
                let at = self.at(p) + i;
                let sum = (0..w).filter(|r| has(*r, p, t)).map(|r| all[r][at]).reduce(|a, b| a + b);
                let old = before[p * n + i];
                let want = match sum {
                    None => old,
                    Some(s) if self.segments[p].accumulate => old + s / w as f32,
                    Some(s) => s / w as f32,
                };
                assert_eq!(self.out[p * n + i].to_bits(), want.to_bits(), "round {t} parameter {p} element {i}");
            }
        }
        self.t += 1;
    }
}

pub fn reductions(rank: &Rank) -> String {
    let c = rank.init();
    let unit = c.name_units(&names(&["layers.0"]));
    let round = Round { c: &*c, unit, n: 1037 };
    let bytes = round.total() * 4;
    let memory = c.alloc_slots(&[bytes, bytes + 64, bytes], 4, unit..unit + 1).unwrap();
    let slots = &memory.slots;
    assert!(slots.iter().all(|s| s.data as usize % 64 == 0 && s.bytes >= bytes));
    // Up to three in flight; ranks use the slots in different orders.
    let slot_of = |t: usize| &slots[(t + rank.rank()) % 3];
    let rounds = 24;
    let mut means = round.checker();
    let mut tickets: Vec<Ticket> = Vec::new();
    for t in 0..rounds {
        if t >= 3 {
            assert!(c.reduce_wait(tickets[t - 3], &mut means, true).unwrap());
        }
        tickets.push(round.start(t, slot_of(t)));
        if t % 4 == 0 {
            c.reduce_ready(memory.id, &mut means).unwrap();
        }
    }
    c.reduce_end(memory.id, &mut means).unwrap();
    assert_eq!(means.t, rounds);
    c.barrier().unwrap();
    assert!(tickets.iter().all(|t| c.reduce_done(*t).unwrap()));
    "ok".to_string()
}

/// Whether rank `r` starts a reduction of unit `u` in iteration `k`, and how often.
fn starts(r: usize, u: usize, k: usize) -> usize {
    match (r + 2 * u + k) % 5 {
        0 => 0,
        1 => 2,
        _ => 1,
    }
}

/// One parameter of one float a unit: unit u, occurrence n, iteration k of rank r.
fn gradient(r: usize, u: usize, n: usize, k: usize) -> f32 {
    (1 + r * 7 + u * 31 + n * 5 + k) as f32
}

struct Sums {
    values: Vec<f32>,
    segments: Vec<Segment>,
}

impl ReduceTarget for Sums {
    fn segments(&mut self, unit: usize) -> &[Segment] {
        // SAFETY: the vector has an element a unit.
        let out = unsafe { self.values.as_mut_ptr().add(unit) };
        self.segments = vec![Segment { param: 0, offset: 0, len: 1, narrow: DType::F32, out, accumulate: true }];
        &self.segments
    }
    fn reduced(&mut self, _: usize, present: &[bool]) {
        assert_eq!(present, [true]);
    }
}

/// Every rank starts the units in an order of its own, some twice, some not at all.
pub fn unordered(rank: &Rank) -> String {
    let (me, w, units) = (rank.rank(), rank.world(), 7);
    let c = rank.init();
    let first = c.name_units(&names(&["u"; 7]));
    let memory = c.alloc_slots(&[4; 14], 1, first..first + units as u32).unwrap();
    for k in 0..40 {
        let mut sums = Sums { values: vec![0.0; units], segments: Vec::new() };
        for i in 0..units {
            let u = (i * (1 + me % 6) + k) % units;
            for n in 0..starts(me, u, k) {
                let slot = &memory.slots[2 * u + n];
                // SAFETY: the slot holds one float, and was read by all before the last iteration ended.
                unsafe { slot.data.cast::<f32>().write(gradient(me, u, n, k)) };
                c.reduce_start(tag(Kind::ReduceScatter, first + u as u32, 4), slot, &[Held::Float32]).unwrap();
                c.reduce_ready(memory.id, &mut sums).unwrap();
            }
        }
        c.reduce_end(memory.id, &mut sums).unwrap();
        for (u, got) in sums.values.iter().enumerate() {
            let mean = |n: usize| {
                let of = |r: usize| gradient(r, u, n, k);
                (0..w).filter(|r| starts(*r, u, k) > n).map(of).reduce(|a, b| a + b).map_or(0.0, |s| s / w as f32)
            };
            let want: f32 = mean(0) + mean(1);
            assert_eq!(*got, want, "unit {u} of iteration {k}");
        }
        // Slots are free once every rank has read them.
        c.barrier().unwrap();
    }
    "ok".to_string()
}

pub fn wrap(rank: &Rank) -> String {
    let (me, w) = (rank.rank(), rank.world());
    let c = rank.init();
    let unit = c.name_units(&names(&["a"]));
    let arena = c.alloc_arena(64 * w).unwrap();
    let round = Round { c: &*c, unit, n: 3 };
    let memory = c.alloc_slots(&[round.total() * 4; 2], 4, unit..unit + 1).unwrap();
    c.open_reads(&arena).unwrap();
    // Announcements only: a fast rank runs ahead until it is a whole ring ahead of a slow one.
    for i in 0..5000 {
        if me == 0 && i % 1000 == 0 {
            sleep_ms(20);
        }
        let check = if i % 100 == 0 { Check::Together } else { Check::Announce };
        c.all_gather(tag(Kind::AllGather, unit, 64 * w), &arena, check).unwrap();
    }
    let mut means = round.checker();
    let mut tickets: Vec<Ticket> = Vec::new();
    for t in 0..2500 {
        if t >= 2 {
            assert!(c.reduce_wait(tickets[t - 2], &mut means, true).unwrap());
        }
        tickets.push(round.start(t, &memory.slots[t % 2]));
    }
    c.reduce_end(memory.id, &mut means).unwrap();
    assert_eq!(means.t, 2500);
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
        first.all_gather(no_unit(Kind::AllGather, i * 1000 * w), a, Check::Announce).unwrap();
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
