//! What a pipeline launches, in which order, and after what.

use super::recorder::{Launch, Recorder};
use super::*;
use crate::config::EngineConfig;
use crate::dtype::DType;
use crate::error::Status;
use crate::module::{ModuleTree, ROOT};
use crate::plan::Plan;
use crate::wrap;
use proptest::prelude::*;

fn unit(label: &str, bytes: usize) -> UnitBytes {
    UnitBytes { label: label.to_string(), depth: 0, buffer: bytes, slot: bytes }
}

fn pipeline(bytes: &[usize], buffers: &[usize], slots: &[usize], ahead: usize) -> Pipeline {
    let unit = |(i, bytes): (usize, &usize)| unit(&format!("u{i}"), *bytes);
    let limits = Limits {
        unit_buffers: buffers.to_vec(),
        in_flight: buffers.len(),
        gradient_slots: slots.to_vec(),
        spare_slots: false,
        ahead,
    };
    Pipeline::new(bytes.iter().enumerate().map(unit).collect(), &limits).unwrap()
}

/// A step of a chain of units, each with the next `ahead` foretold; the host launches compute as a trainer does.
fn step(p: &mut Pipeline, r: &mut Recorder, units: u32, ahead: usize) {
    let order: Vec<UnitId> = (0..units).collect();
    for (i, unit) in order.iter().copied().enumerate() {
        let buffer = p.unshard(r, unit, &order[i + 1..order.len().min(i + 1 + ahead)]).unwrap().unwrap();
        r.launch(Launch::Forward { unit, buffer });
        p.reshard(r, unit).unwrap();
    }
    let order: Vec<UnitId> = order.into_iter().rev().collect();
    for (i, unit) in order.iter().copied().enumerate() {
        let buffer = p.unshard(r, unit, &order[i + 1..order.len().min(i + 1 + ahead)]).unwrap().unwrap();
        let slot = p.collect(r, unit).unwrap().unwrap();
        r.launch(Launch::Backward { unit, buffer, slot });
        p.reduce(r, unit).unwrap();
        p.reshard(r, unit).unwrap();
    }
    p.finish_backward(r).unwrap();
    p.begin_write(r).unwrap();
    r.launch(Launch::Step);
}

fn gather_of(unit: UnitId) -> impl Fn(Launch) -> bool {
    move |l| matches!(l, Launch::AllGather { unit: u, .. } if u == unit)
}

fn forward_of(unit: UnitId) -> impl Fn(Launch) -> bool {
    move |l| matches!(l, Launch::Forward { unit: u, .. } if u == unit)
}

fn backward_of(unit: UnitId) -> impl Fn(Launch) -> bool {
    move |l| matches!(l, Launch::Backward { unit: u, .. } if u == unit)
}

fn reduce_of(unit: UnitId) -> impl Fn(Launch) -> bool {
    move |l| matches!(l, Launch::ReduceScatter { unit: u, .. } if u == unit)
}

#[test]
fn every_launch_waits_for_what_it_needs_and_for_nothing_else() {
    let (mut p, mut r) = (pipeline(&[8, 8], &[8, 8], &[8], 1), Recorder::default());
    step(&mut p, &mut r, 2, 1);
    let want = [
        // Unit 0 now, unit 1 ahead: launched before the compute of unit 0.
        "Compute: record ShardsWritten",
        "Gather: wait ShardsWritten",
        "Gather: AllGather { unit: 0, buffer: 0 }",
        "Gather: record Gathered(0)",
        "Compute: wait Gathered(0)",
        "Gather: AllGather { unit: 1, buffer: 1 }",
        "Gather: record Gathered(1)",
        "Compute: Forward { unit: 0, buffer: 0 }",
        "Compute: record Released(0)",
        "Compute: wait Gathered(1)",
        "Compute: Forward { unit: 1, buffer: 1 }",
        "Compute: record Released(1)",
        // Backward: the buffer that was released first is used first, after its last reader.
        "Gather: wait Released(0)",
        "Gather: AllGather { unit: 1, buffer: 0 }",
        "Gather: record Gathered(0)",
        "Compute: wait Gathered(0)",
        "Gather: wait Released(1)",
        "Gather: AllGather { unit: 0, buffer: 1 }",
        "Gather: record Gathered(1)",
        "Compute: Backward { unit: 1, buffer: 0, slot: 0 }",
        "Compute: record Filled(0)",
        "Reduce: wait Filled(0)",
        "Reduce: ReduceScatter { unit: 1, slot: 0 }",
        "Reduce: record Reduced(0)",
        "Compute: record Released(0)",
        "Compute: wait Gathered(1)",
        // The only slot: its gradients are reduced before others are written.
        "Compute: wait Reduced(0)",
        "Compute: Backward { unit: 0, buffer: 1, slot: 0 }",
        "Compute: record Filled(0)",
        "Reduce: wait Filled(0)",
        "Reduce: ReduceScatter { unit: 0, slot: 0 }",
        "Reduce: record Reduced(0)",
        "Compute: record Released(1)",
        "Compute: wait Reduced(0)",
        "Compute: Step",
    ];
    assert_eq!(r.lines, want);
    r.check().unwrap();
}

#[test]
fn the_next_unit_is_gathered_beside_the_compute_of_this_one() {
    let (mut p, mut r) = (pipeline(&[8; 6], &[8; 2], &[8; 2], 1), Recorder::default());
    (0..3).for_each(|_| step(&mut p, &mut r, 6, 1));
    r.check().unwrap();
    for s in 0..3 {
        for unit in 0..5 {
            // The forward's gather is the unit's first of the step, and the backward's its second.
            let (gather, compute) = (r.find(2 * s, gather_of(unit + 1)), r.find(s, forward_of(unit)));
            assert!(gather < compute && r.beside(gather, compute), "step {s}, forward of {unit}");
            let (gather, compute) = (r.find(2 * s + 1, gather_of(unit)), r.find(s, backward_of(unit + 1)));
            assert!(gather < compute && r.beside(gather, compute), "step {s}, backward of {}", unit + 1);
        }
        // With two buffers the gather after the next one has to wait.
        assert!(r.ordered(r.find(s, forward_of(1)), r.find(2 * s, gather_of(3))));
    }
    let want = Counts {
        all_gathers: 36,
        prefetches: 30,
        reduce_scatters: 18,
        buffers_peak: 2,
        slots_peak: [1, 0],
        ..Counts::default()
    };
    assert_eq!(p.counts(), want);
}

#[test]
fn gradients_are_reduced_beside_the_backward_of_the_next_unit() {
    let (mut p, mut r) = (pipeline(&[8; 6], &[8; 2], &[8; 2], 1), Recorder::default());
    (0..2).for_each(|_| step(&mut p, &mut r, 6, 1));
    for s in 0..2 {
        for unit in 1..6 {
            let (reduce, next) = (r.find(s, reduce_of(unit)), r.find(s, backward_of(unit - 1)));
            assert!(reduce < next && r.beside(reduce, next), "step {s}, unit {unit}");
        }
        // Gathers and reductions do not wait for each other either.
        assert!(r.beside(r.find(s, reduce_of(4)), r.find(2 * s + 1, gather_of(3))));
    }
    // With one slot they cannot.
    let (mut p, mut r) = (pipeline(&[8; 3], &[8; 2], &[8], 1), Recorder::default());
    step(&mut p, &mut r, 3, 1);
    assert!(r.ordered(r.find(0, reduce_of(2)), r.find(0, backward_of(1))));
}

/// Reduces `unit`, after a hook.
fn reduce_hooked(p: &mut Pipeline, r: &mut Recorder, unit: UnitId) {
    let slot = p.slot(unit);
    let change = |r: &mut Recorder| {
        slot.iter().for_each(|slot| r.launch(Launch::Change { unit, slot: *slot }));
        Ok(())
    };
    p.reduce_changed(r, unit, change).unwrap();
}

/// The backward of a chain of units, with hooks.
fn hooked_backward(p: &mut Pipeline, r: &mut Recorder, units: u32) {
    for unit in (0..units).rev() {
        let buffer = p.unshard(r, unit, &[]).unwrap().unwrap();
        let slot = p.collect(r, unit).unwrap().unwrap();
        r.launch(Launch::Backward { unit, buffer, slot });
        reduce_hooked(p, r, unit);
        p.reshard(r, unit).unwrap();
    }
    p.finish_backward(r).unwrap();
}

#[test]
fn a_hook_changes_gradients_between_their_backward_and_their_reduction_and_holds_nothing_else_up() {
    let (mut p, mut r) = (pipeline(&[8; 4], &[8; 2], &[8; 2], 0), Recorder::default());
    hooked_backward(&mut p, &mut r, 4);
    let line = r.lines.iter().position(|l| l.contains("Backward")).unwrap();
    let want = [
        "Compute: Backward { unit: 3, buffer: 0, slot: 0 }",
        "Compute: record Filled(0)",
        "Reduce: wait Filled(0)",
        "Reduce: Change { unit: 3, slot: 0 }",
        "Reduce: ReduceScatter { unit: 3, slot: 0 }",
        "Reduce: record Reduced(0)",
        "Compute: record Released(0)",
    ];
    assert_eq!(r.lines[line..line + want.len()], want);
    r.check().unwrap();
    let change_of = |unit| move |l| matches!(l, Launch::Change { unit: u, .. } if u == unit);
    for unit in 0..4 {
        let (change, reduce) = (r.find(0, change_of(unit)), r.find(0, reduce_of(unit)));
        assert!(r.ordered(r.find(0, backward_of(unit)), change) && r.ordered(change, reduce), "unit {unit}");
        if unit > 0 {
            assert!(r.beside(change, r.find(0, backward_of(unit - 1))), "unit {unit}");
            assert!(r.beside(change, r.find(0, gather_of(unit - 1))), "unit {unit}");
        }
    }
    // The slot's next gradients are written after the hook has changed its last.
    assert!(r.ordered(r.find(0, change_of(3)), r.find(0, backward_of(1))));
    // Each wait is needed with hooks, too; one that comes before the gradients are complete is found.
    for forget in [|e| matches!(e, Event::Filled(_)), |e| matches!(e, Event::Reduced(_))] as [fn(Event) -> bool; 2] {
        let (mut p, mut r) = (pipeline(&[8; 4], &[8; 2], &[8; 2], 0), Recorder::default());
        r.forget = Some(forget);
        hooked_backward(&mut p, &mut r, 4);
        assert!(r.check().is_err());
    }
    let (mut p, mut r) = (pipeline(&[8], &[8], &[8], 0), Recorder::default());
    let buffer = p.unshard(&mut r, 0, &[]).unwrap().unwrap();
    let slot = p.collect(&mut r, 0).unwrap().unwrap();
    r.launch(Launch::Backward { unit: 0, buffer, slot });
    r.launch(Launch::Change { unit: 0, slot });
    p.reduce(&mut r, 0).unwrap();
    assert!(r.check().unwrap_err().message.contains("Slot(0)"));
    // One that fails: nothing is reduced. One of a unit that has no gradients is not called.
    let (mut p, mut r) = (pipeline(&[8], &[8], &[8], 0), Recorder::default());
    p.reduce_changed(&mut r, 0, |_| panic!("there are no gradients")).unwrap();
    p.collect(&mut r, 0).unwrap();
    let e = p.reduce_changed(&mut r, 0, |_| Err(err!(Callback, "no"))).unwrap_err();
    assert_eq!((e.status, count_of(&r, "ReduceScatter"), p.counts().reduce_scatters), (Status::Callback, 0, 0));
}

/// A step of two units, the second one resharded to a smaller group between its forward and its backward.
fn step_in_a_group(p: &mut Pipeline, r: &mut Recorder) {
    for unit in 0..2 {
        let buffer = p.unshard(r, unit, &[]).unwrap().unwrap();
        r.launch(Launch::Forward { unit, buffer });
    }
    p.reshard_to(r, 1, 0, 2).unwrap();
    assert_eq!((p.group(1), p.group(0)), (Some(0), None));
    p.reshard(r, 0).unwrap();
    for unit in [1, 0] {
        let buffer = p.unshard(r, unit, &[]).unwrap().unwrap();
        let slot = p.collect(r, unit).unwrap().unwrap();
        r.launch(Launch::Backward { unit, buffer, slot });
        p.reduce(r, unit).unwrap();
        p.reshard(r, unit).unwrap();
    }
    assert_eq!(p.group(1), None);
    p.finish_backward(r).unwrap();
    p.begin_write(r).unwrap();
    r.launch(Launch::Step);
}

#[test]
fn a_part_is_kept_for_a_smaller_group_and_gathered_from_there() {
    let (mut p, mut r) = (pipeline(&[8, 8], &[8, 8], &[8, 8], 0), Recorder::default());
    step_in_a_group(&mut p, &mut r);
    let at = |line: &str| r.lines.iter().position(|l| l == line).unwrap_or_else(|| panic!("no {line}: {:?}", r.lines));
    let (forward, part) = (at("Compute: Forward { unit: 1, buffer: 1 }"), at("Compute: Take(Part(1))"));
    let want = [
        "Compute: Take(Part(1))",
        "Compute: Keep { unit: 1, buffer: 1 }",
        "Compute: record Kept(1)",
        "Compute: record Released(1)",
        "Compute: record Released(0)",
        // Into the buffer that has been free for longer.
        "Gather: wait Released(1)",
        "Gather: wait Kept(1)",
        "Gather: GatherParts { unit: 1, buffer: 1 }",
        "Gather: record Gathered(1)",
        "Compute: wait Gathered(1)",
        "Compute: GiveBack(Part(1))",
    ];
    assert_eq!(part, forward + 1);
    assert_eq!(r.lines[part..part + want.len()], want);
    // The masters are gathered from again in the next step.
    step_in_a_group(&mut p, &mut r);
    r.check().unwrap();
    assert_eq!((count_of(&r, ": AllGather"), count_of(&r, ": GatherParts")), (6, 2));
    // Leaving out its wait is found.
    let (mut p, mut r) = (pipeline(&[8, 8], &[8, 8, 8], &[8, 8], 0), Recorder::default());
    r.forget = Some(|event| matches!(event, Event::Kept(_) | Event::Released(_)));
    step_in_a_group(&mut p, &mut r);
    assert!(r.check().is_err());
    // What is not gathered again goes, after an all-gather ahead that has read it, too.
    let (mut p, mut r) = (pipeline(&[8, 8], &[8, 8], &[8, 8], 1), Recorder::default());
    for ahead in [&[][..], &[1]] {
        p.unshard(&mut r, 1, &[]).unwrap();
        p.reshard_to(&mut r, 1, 0, 4).unwrap();
        p.unshard(&mut r, 0, ahead).unwrap();
        p.finish_forward(&mut r).unwrap();
        p.begin_write(&mut r).unwrap();
        assert_eq!(p.group(1), None);
        r.launch(Launch::Step);
    }
    assert_eq!((count_of(&r, "GiveBack(Part(1))"), count_of(&r, ": GatherParts")), (2, 1));
    r.check().unwrap();
    p.forget_part(&mut r, 1).unwrap();
    assert_eq!(count_of(&r, "GiveBack(Part(1))"), 2, "there was nothing");
}

#[test]
fn without_a_foretold_order_a_gather_waits_for_nothing_but_its_buffer() {
    let (mut p, mut r) = (pipeline(&[8; 4], &[8; 2], &[8; 2], 1), Recorder::default());
    step(&mut p, &mut r, 4, 0);
    r.check().unwrap();
    assert_eq!(p.counts().prefetches, 0);
    // Launched late, but beside the compute before it all the same.
    assert!(r.beside(r.find(0, gather_of(1)), r.find(0, forward_of(0))));
}

#[test]
fn what_is_left_out_is_found() {
    // The check itself: each wait is needed.
    let forgotten: [fn(Event) -> bool; 5] = [
        |e| e == Event::ShardsWritten,
        |e| matches!(e, Event::Gathered(_)),
        |e| matches!(e, Event::Released(_)),
        |e| matches!(e, Event::Filled(_)),
        |e| matches!(e, Event::Reduced(_)),
    ];
    for (i, forget) in forgotten.into_iter().enumerate() {
        let mut r = Recorder::default();
        r.forget = Some(forget);
        let mut p = pipeline(&[8; 4], &[8; 2], &[8; 2], 1);
        (0..2).for_each(|_| step(&mut p, &mut r, 4, 1));
        assert!(r.check().is_err(), "wait {i}");
    }
}

#[test]
fn units_in_flight_are_capped_and_prefetches_make_room() {
    let (mut p, mut r) = (pipeline(&[8; 6], &[8; 3], &[8; 2], 5), Recorder::default());
    // Two of the five foretold have room.
    p.unshard(&mut r, 0, &[1, 2, 3, 4, 5]).unwrap();
    assert_eq!((p.counts().all_gathers, p.counts().prefetches), (3, 2));
    // Another one is needed: unit 2 makes room, which was gathered last.
    p.unshard(&mut r, 5, &[]).unwrap();
    assert_eq!((p.counts().all_gathers, p.counts().evictions), (4, 1));
    p.unshard(&mut r, 1, &[]).unwrap();
    assert_eq!(p.counts().all_gathers, 4, "unit 1 was still there");
    let e = p.unshard(&mut r, 3, &[]).unwrap_err();
    assert_eq!(e.status, Status::InvalidState);
    for words in ["\"u3\"", "\"u0\"", "\"u1\"", "\"u5\"", "of the 3"] {
        assert!(e.message.contains(words), "{words} is not in: {e}");
    }
    p.reshard(&mut r, 5).unwrap();
    assert!(p.unshard(&mut r, 3, &[]).unwrap().is_some());
    assert_eq!((p.buffer(5), p.buffer(2)), (None, None));
    // A limit of its own on what is ahead.
    let (mut p, mut r) = (pipeline(&[8; 6], &[8; 6], &[8; 2], 2), Recorder::default());
    p.unshard(&mut r, 0, &[1, 2, 3, 4]).unwrap();
    assert_eq!(p.counts().prefetches, 2);
}

#[test]
fn slots_are_kept_until_they_are_reduced() {
    let (mut p, mut r) = (pipeline(&[8; 3], &[8; 3], &[8; 2], 0), Recorder::default());
    let first = p.collect(&mut r, 0).unwrap();
    assert_eq!(p.collect(&mut r, 0).unwrap(), first, "the same until it is reduced");
    assert_ne!(p.collect(&mut r, 1).unwrap(), first);
    let e = p.collect(&mut r, 2).unwrap_err();
    for words in ["\"u2\"", "\"u0\", \"u1\"", "gradient_slots"] {
        assert!(e.message.contains(words), "{words} is not in: {e}");
    }
    p.reduce(&mut r, 0).unwrap();
    p.reduce(&mut r, 0).unwrap();
    assert_eq!(p.counts().reduce_scatters, 1, "nothing was collected for the second");
    assert_eq!(p.collect(&mut r, 2).unwrap(), first);
    // What was not reduced is reduced at the end, in the order of the units.
    p.finish_backward(&mut r).unwrap();
    assert!(r.find(0, reduce_of(1)) < r.find(0, reduce_of(2)));
    assert_eq!(r.lines.last().unwrap(), &format!("Compute: wait Reduced({})", first.unwrap()));
}

#[test]
fn shards_are_written_between_iterations_only() {
    let (mut p, mut r) = (pipeline(&[8; 3], &[8; 2], &[8; 2], 1), Recorder::default());
    p.unshard(&mut r, 0, &[1]).unwrap();
    let e = p.begin_write(&mut r).unwrap_err();
    assert!(e.message.contains("\"u0\""), "{e}");
    p.finish_forward(&mut r).unwrap();
    p.begin_write(&mut r).unwrap();
    // What had been gathered ahead is old: the step starts after it, and it is gathered again, after the new values.
    r.launch(Launch::Step);
    assert!(r.ordered(r.find(0, gather_of(1)), r.find(0, |l| l == Launch::Step)));
    let buffer = p.unshard(&mut r, 1, &[]).unwrap().unwrap();
    r.launch(Launch::Forward { unit: 1, buffer });
    assert!(r.ordered(r.find(0, |l| l == Launch::Step), r.find(1, gather_of(1))));
    r.check().unwrap();
}

#[test]
fn units_without_elements_take_no_memory_and_launch_nothing() {
    let (mut p, mut r) = (pipeline(&[0, 8], &[8], &[8], 1), Recorder::default());
    assert_eq!(p.unshard(&mut r, 0, &[]).unwrap(), None);
    assert_eq!(p.collect(&mut r, 0).unwrap(), None);
    p.reduce(&mut r, 0).unwrap();
    p.finish_backward(&mut r).unwrap();
    assert_eq!((r.lines.len(), p.counts()), (0, Counts::default()));
}

#[test]
fn a_unit_that_fits_nowhere_is_an_error() {
    let units = vec![unit("big", 9)];
    let limits = |buffers: usize, slots: usize| Limits {
        unit_buffers: vec![buffers],
        in_flight: 1,
        gradient_slots: vec![slots],
        spare_slots: false,
        ahead: 0,
    };
    let error = |limits| Pipeline::new(units.clone(), &limits).err().unwrap().message;
    assert!(error(limits(8, 9)).contains("\"big\" of 9 bytes fits no unit buffer: the largest has 8"));
    assert!(error(limits(9, 8)).contains("fits no gradient slot"));
}

#[test]
fn a_failed_launch_is_returned_and_the_unit_stays_sharded() {
    let (mut p, mut r) = (pipeline(&[8; 2], &[8; 2], &[8; 2], 1), Recorder::default());
    r.fail_at = Some(2);
    let e = p.unshard(&mut r, 0, &[1]).unwrap_err();
    assert_eq!((e.status, e.message.as_str()), (Status::Device, "the all-gather of unit 0 failed"));
    assert_eq!(p.buffer(0), None);
}

/// Units that are all unsharded and all collect gradients, in a pool of one buffer and one slot.
#[test]
fn what_has_no_place_gets_memory_beyond_the_pool_and_gives_it_back() {
    let units: Vec<UnitBytes> = (0..3).map(|i| unit(&format!("u{i}"), 8 + i)).collect();
    let limits =
        |in_flight| Limits { unit_buffers: vec![10], in_flight, gradient_slots: vec![10], spare_slots: true, ahead: 0 };
    let (mut p, mut r) = (Pipeline::new(units.clone(), &limits(usize::MAX)).unwrap(), Recorder::default());
    for _ in 0..2 {
        let buffers: Vec<usize> = (0..3).map(|u| p.unshard(&mut r, u, &[]).unwrap().unwrap()).collect();
        assert_eq!(buffers, [0, 2, 3], "the pool's, then the units' own");
        for (unit, buffer) in (0..3).zip(buffers) {
            r.launch(Launch::Forward { unit, buffer });
            let slot = p.collect(&mut r, unit).unwrap().unwrap();
            r.launch(Launch::Backward { unit, buffer, slot });
        }
        p.reshard(&mut r, 1).unwrap();
        (0..3).for_each(|unit| p.reduce(&mut r, unit).unwrap());
        p.finish_backward(&mut r).unwrap();
        p.begin_write(&mut r).unwrap();
        r.launch(Launch::Step);
    }
    r.check().unwrap();
    let count = |is: fn(&str) -> bool| r.lines.iter().filter(|l| is(l)).count();
    assert_eq!((count(|l| l.contains("Take(")), count(|l| l.contains("GiveBack("))), (8, 8));
    let counts = p.counts();
    assert_eq!((counts.buffers_peak, counts.slots_peak, counts.overflows), (3, [1, 2], 8));
    // Gradients that nobody wants go at once.
    p.unshard(&mut r, 0, &[]).unwrap();
    (0..2).for_each(|unit| assert!(p.collect(&mut r, unit).unwrap().is_some()));
    (0..2).for_each(|unit| p.discard(&mut r, unit).unwrap());
    assert_eq!(count_of(&r, "GiveBack(Slot"), 5);
    r.check().unwrap();
    // Forgetting that the gather waits for the memory is found.
    let mut r = Recorder::default();
    r.forget = Some(|event| matches!(event, Event::Released(2)));
    let mut p = Pipeline::new(units.clone(), &limits(usize::MAX)).unwrap();
    (0..2).for_each(|u| assert!(p.unshard(&mut r, u, &[]).unwrap().is_some()));
    assert!(r.check().is_err());
    // With a limit it is an error, which changes nothing.
    let (mut p, mut r) = (Pipeline::new(units, &limits(2)).unwrap(), Recorder::default());
    (0..2).for_each(|u| assert!(p.unshard(&mut r, u, &[]).unwrap().is_some()));
    let e = p.unshard(&mut r, 2, &[]).unwrap_err();
    assert!(e.message.contains("\"u2\" has no unit buffer"), "{e}");
    p.reshard(&mut r, 1).unwrap();
    p.unshard(&mut r, 2, &[]).unwrap();
    r.check().unwrap();
}

fn count_of(r: &Recorder, what: &str) -> usize {
    r.lines.iter().filter(|l| l.contains(what)).count()
}

#[test]
fn limits_come_from_the_plan_and_their_bytes_are_those_of_the_forecast() {
    static DATA: [f32; 4096] = [0.0; 4096];
    let mut tree = ModuleTree::new("Net");
    for (name, numel) in [("a", 1000), ("b", 3000), ("c", 2000)] {
        let block = tree.add_module(ROOT, name, "Block").unwrap();
        tree.add_param(block, "w", &[numel], DType::F32, true, DATA.as_ptr().cast()).unwrap();
        tree.wrap(block).unwrap();
    }
    tree.add_param(ROOT, "r", &[500], DType::F32, true, DATA.as_ptr().cast()).unwrap();
    wrap::always(&mut tree).unwrap();
    let plan = Plan::new(&tree, 0, 2).unwrap();
    let limits = Limits::of(&UnitBytes::of(&plan), 1);
    // The root and a block in use, and the next block ahead; the largest ones.
    assert_eq!(limits.unit_buffers, [plan.units[2].bytes(), plan.units[3].bytes(), plan.units[1].bytes()]);
    // As many slots on the CPU, without the small ones that it has besides.
    let config = EngineConfig { gradient_slots: 3, ..Default::default() };
    let request = crate::forecast::Request { world_size: 2, config, ..Default::default() };
    let forecast = crate::forecast::Forecast::new(&tree, &request).unwrap();
    assert_eq!(limits.gradient_slots.iter().sum::<usize>() as u64, forecast.gradient_slot_bytes);
    assert_eq!(limits.slot_bytes() as u64, forecast.gradient_slot_bytes);
    assert!(limits.unit_buffers.iter().sum::<usize>() as u64 >= forecast.unsharded_peak_bytes);
    // One parameter of a unit in 16 bits, all units reduced in 16 bits.
    let config = EngineConfig { param_dtype: Some(DType::BF16), reduce_dtype: DType::BF16, ..Default::default() };
    let plan = Plan::new(&tree.clone().with_engine_dtypes(&config), 0, 2).unwrap();
    let units = UnitBytes::of(&plan);
    assert_eq!((units[1].buffer, units[1].slot), (plan.units[1].bytes() / 2, plan.units[1].bytes() * 3 / 2));
    tree.set_param_dtype(0, Some(DType::F16)).unwrap();
    let plan = Plan::new(&tree.with_engine_dtypes(&EngineConfig::default()), 0, 2).unwrap();
    assert_eq!(compute_dtypes(&plan, plan.params[0].unit), [DType::F16]);
}

/// What a host may do; units that are out of range of memory are refused.
#[derive(Clone, Debug)]
enum Act {
    Forward(u32, Vec<u32>),
    Backward(u32, Vec<u32>),
    Reduce(u32),
    ReduceHooked(u32),
    Reshard(u32),
    ReshardTo(u32),
    Forget(u32),
    Discard(u32),
    Finish,
    Step,
}

fn act(units: u32) -> impl Strategy<Value = Act> {
    let next = || prop::collection::vec(0..units, 0..3);
    prop_oneof![
        4 => (0..units, next()).prop_map(|(u, n)| Act::Forward(u, n)),
        4 => (0..units, next()).prop_map(|(u, n)| Act::Backward(u, n)),
        2 => (0..units).prop_map(Act::Reduce),
        2 => (0..units).prop_map(Act::ReduceHooked),
        3 => (0..units).prop_map(Act::Reshard),
        2 => (0..units).prop_map(Act::ReshardTo),
        1 => (0..units).prop_map(Act::Forget),
        1 => (0..units).prop_map(Act::Discard),
        1 => Just(Act::Finish),
        1 => Just(Act::Step),
    ]
}

proptest! {
    /// Whatever a host does, and in whatever order: no memory is read while it is written, every unit is read where it
    /// is, and no more units are gathered than there are buffers.
    #[test]
    fn any_order_is_safe(
        acts in prop::collection::vec(act(5), 1..60),
        buffers in 1usize..4,
        slots in 1usize..4,
        ahead in 0usize..4,
        beyond: bool,
    ) {
        // The largest buffer and slot take every unit; others are smaller.
        let sizes = |count: usize| [40, 24, 16][..count].to_vec();
        let bytes = [8, 40, 16, 24, 0].iter().enumerate();
        let limits = Limits {
            unit_buffers: sizes(buffers),
            in_flight: if beyond { usize::MAX } else { buffers },
            gradient_slots: sizes(slots),
            spare_slots: beyond,
            ahead,
        };
        let units = bytes.map(|(i, bytes)| unit(&format!("u{i}"), *bytes)).collect();
        let (mut p, mut r) = (Pipeline::new(units, &limits).unwrap(), Recorder::default());
        for act in acts {
            match act {
                Act::Forward(unit, next) => {
                    if let Ok(Some(buffer)) = p.unshard(&mut r, unit, &next) {
                        r.launch(Launch::Forward { unit, buffer });
                    }
                }
                Act::Backward(unit, next) => {
                    if let (Ok(Some(buffer)), Ok(Some(slot))) = (p.unshard(&mut r, unit, &next), p.collect(&mut r, unit)) {
                        r.launch(Launch::Backward { unit, buffer, slot });
                    }
                }
                Act::Reduce(unit) => p.reduce(&mut r, unit).unwrap(),
                Act::ReduceHooked(unit) => reduce_hooked(&mut p, &mut r, unit),
                Act::Reshard(unit) => p.reshard(&mut r, unit).unwrap(),
                Act::ReshardTo(unit) => p.reshard_to(&mut r, unit, 0, 2).unwrap(),
                Act::Forget(unit) => p.forget_part(&mut r, unit).unwrap(),
                Act::Discard(unit) => p.discard(&mut r, unit).unwrap(),
                Act::Finish => p.finish_backward(&mut r).unwrap(),
                Act::Step => {
                    p.finish_backward(&mut r).unwrap();
                    p.begin_write(&mut r).unwrap();
                    r.launch(Launch::Step);
                }
            }
            let held = (0..5).filter(|u| p.buffer(*u).is_some()).count();
            prop_assert!(beyond || held <= buffers);
        }
        prop_assert!(r.check().is_ok(), "{}", r.check().unwrap_err());
    }
}
