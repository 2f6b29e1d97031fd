//! The engine over several ranks, against the mean of all ranks' gradients computed in plain loops.

mod common;

use common::{engine, numel, piece, ranks, value, SHAPES};
use fsdp::config::{EngineConfig, OrderCheck};
use fsdp::dtype::DType;
use fsdp::engine::Engine;
use fsdp::error::Status;
use fsdp::module::ModuleTree;

const RATE: f32 = 0.125;

/// The gradient that `rank` computes for element `i` of parameter `p` in `step`, from the parameter's value.
fn gradient(rank: usize, step: usize, p: usize, i: usize, value: f32) -> f32 {
    value * 0.01 + ((rank + 1) * (i % 17 + 1)) as f32 / 7.0 - (step * (p + 1)) as f32 / 3.0
}

/// What every rank must have after `steps` steps of SGD on the mean gradient, summed in rank order.
fn reference(world: usize, steps: usize, has: impl Fn(usize, usize, usize) -> bool) -> Vec<Vec<f32>> {
    let mut params: Vec<Vec<f32>> =
        SHAPES.iter().enumerate().map(|(p, (_, s))| (0..numel(s)).map(|i| value(p, i)).collect()).collect();
    for step in 0..steps {
        for (p, values) in params.iter_mut().enumerate() {
            for (i, v) in values.iter_mut().enumerate() {
                let of = |r| gradient(r, step, p, i, *v);
                let sum = (0..world).filter(|r| has(*r, step, p)).map(of).reduce(|a, b| a + b);
                if let Some(sum) = sum {
                    let mean = if world.is_power_of_two() { sum * (1.0 / world as f32) } else { sum / world as f32 };
                    *v -= RATE * mean;
                }
            }
        }
    }
    params
}

/// One rank's forward and backward over all units, root outermost.
fn step(engine: &Engine, rank: usize, step: usize, has: &impl Fn(usize, usize, usize) -> bool) {
    step_below(engine, 0, rank, step, has);
}

/// The same where the model's root is unit `root`.
fn step_below(engine: &Engine, root: u32, rank: usize, step: usize, has: &impl Fn(usize, usize, usize) -> bool) {
    for u in [root, root + 1, root + 2] {
        engine.pre_forward(u).unwrap();
        if u > root {
            engine.post_forward(u).unwrap();
        }
    }
    engine.post_forward(root).unwrap();
    let collect = |u: u32| {
        engine.pre_backward(u).unwrap();
        for p in engine.unit(u).unwrap().params.clone() {
            let p = p as usize;
            let full = engine.param_data(p as u32).unwrap().cast::<f32>();
            // SAFETY: the unit is unsharded; its buffer has the parameter's elements.
            let read = |i| unsafe { *full.add(i) };
            let grad: Vec<f32> = (0..numel(SHAPES[p].1)).map(|i| gradient(rank, step, p, i, read(i))).collect();
            if has(rank, step, p) {
                // SAFETY: as long as the parameter.
                unsafe { engine.accumulate_grad(p as u32, DType::F32, grad.as_ptr().cast()) }.unwrap();
            }
        }
    };
    // The root collects first and is reduced last, as with an output layer that it owns.
    collect(root);
    for u in [root + 2, root + 1] {
        collect(u);
        engine.post_backward(u).unwrap();
    }
    engine.post_backward(root).unwrap();
}

fn descend(engine: &Engine) {
    for p in 0..SHAPES.len() {
        let shard = engine.shard(p as u32).unwrap();
        if shard.grad.is_null() || shard.len == 0 {
            continue;
        }
        // SAFETY: the gradient shard is as long as the piece, and complete after the backward.
        let grad = unsafe { std::slice::from_raw_parts(shard.grad, shard.len) };
        piece(engine, p).iter_mut().zip(grad).for_each(|(v, g)| *v -= RATE * g);
    }
    engine.zero_grad().unwrap();
}

fn check(engine: &Engine, expected: &[Vec<f32>]) {
    for (p, (name, _)) in SHAPES.iter().enumerate() {
        let first = engine.plan().params[p].piece.param_offset;
        for (i, v) in piece(engine, p).iter().enumerate() {
            assert_eq!(v.to_bits(), expected[p][first + i].to_bits(), "{name}[{}]", first + i);
        }
    }
}

#[test]
fn training_equals_the_mean_over_ranks_bit_by_bit() {
    for world in [1, 2, 3, 4, 8] {
        for slots in [0, 1] {
            let config = EngineConfig { gradient_slots: slots, ..EngineConfig::default() };
            let expected = reference(world, 3, |_, _, _| true);
            ranks(world, |comm| {
                let rank = comm.rank();
                let engine = engine(comm, &config);
                for s in 0..3 {
                    step(&engine, rank, s, &|_, _, _| true);
                    descend(&engine);
                }
                check(&engine, &expected);
                let stats = engine.stats().unwrap();
                assert_eq!(stats.gradients.reduce_scatters, 9);
                assert_eq!(stats.all_gather_bytes_moved, 0);
                // The root is open throughout: with one slot the others collect in their spare ones.
                assert!((1..=2).contains(&stats.gradients.overflow_peak) == (slots == 1), "{:?}", stats.gradients);
                assert!(stats.gradients.slots_peak <= if slots == 1 { 1 } else { 3 });
            });
        }
    }
}

#[test]
fn gradients_absent_on_some_ranks_count_as_zero_and_absent_on_all_stay_absent() {
    let has = |rank: usize, _step: usize, p: usize| match p {
        1 => rank == 1,
        2 => false,
        // All of unit b: rank 0 takes part in its reduction with nothing.
        4 | 5 => rank != 0,
        _ => true,
    };
    for world in [2, 3] {
        let expected = reference(world, 2, has);
        ranks(world, |comm| {
            let rank = comm.rank();
            let engine = engine(comm, &EngineConfig::default());
            for s in 0..2 {
                step(&engine, rank, s, &has);
                assert!(engine.shard(2).unwrap().grad.is_null());
                assert!(!engine.shard(1).unwrap().grad.is_null());
                descend(&engine);
            }
            check(&engine, &expected);
        });
    }
}

/// Ranks that reduce units in different orders, and skip some, with one slot: a rank that waited for a slot would wait for
/// a rank that waits for it.
#[test]
fn reductions_in_different_orders_neither_hang_nor_mix() {
    let has = |rank: usize, step: usize, p: usize| !(p == 1 && (rank + step) % 3 == 0);
    for (world, slots, order_check) in
        [(2, 1, OrderCheck::Error), (3, 1, OrderCheck::Warn), (4, 2, OrderCheck::Off), (4, 0, OrderCheck::Error)]
    {
        let config = EngineConfig { gradient_slots: slots, order_check, ..EngineConfig::default() };
        let expected = reference(world, 6, has);
        ranks(world, |comm| {
            let rank = comm.rank();
            let engine = engine(comm, &config);
            for s in 0..6 {
                for u in [0, 1, 2] {
                    engine.unshard(u).unwrap();
                }
                let mut units = [0u32, 1, 2];
                units.rotate_left((rank + s) % 3);
                for u in units {
                    let params = engine.unit(u).unwrap().params.clone();
                    for p in params.into_iter().map(|p| p as usize).filter(|p| has(rank, s, *p)) {
                        let full = engine.param_data(p as u32).unwrap().cast::<f32>();
                        // SAFETY: the unit is unsharded; its buffer has the parameter's elements.
                        let read = |i| unsafe { *full.add(i) };
                        let grad: Vec<f32> =
                            (0..numel(SHAPES[p].1)).map(|i| gradient(rank, s, p, i, read(i))).collect();
                        // SAFETY: as long as the parameter.
                        unsafe { engine.accumulate_grad(p as u32, DType::F32, grad.as_ptr().cast()) }.unwrap();
                    }
                    // Some are left to the end of the backward.
                    if (rank + u as usize + s) % 4 != 0 {
                        engine.reduce(u).unwrap();
                    }
                }
                engine.finish_backward().unwrap();
                descend(&engine);
            }
            check(&engine, &expected);
        });
    }
}

/// A sharded model becomes the lower part of a bigger one, which trains on with the same shards.
#[test]
fn an_adopted_model_shares_its_shards() {
    for (world, keep) in [(1, true), (2, false), (3, true)] {
        let expected = reference(world, 4, |_, _, _| true);
        ranks(world, |comm| {
            let rank = comm.rank();
            let first = engine(comm.clone(), &EngineConfig::default());
            for s in 0..2 {
                step(&first, rank, s, &|_, _, _| true);
                descend(&first);
            }
            let mut tree = ModuleTree::new("Outer");
            let inner = first.model().clone();
            let (module, param) = tree.adopt(0, "", inner.clone()).unwrap();
            assert_eq!((module, param), (1, 0));
            let e = tree.adopt(0, "again", inner).unwrap_err();
            assert!(e.message.contains("one unit only"), "{e}");
            let e = tree.wrap(2).unwrap_err();
            assert!(e.message.contains("\"a\" is wrapped already"), "{e}");
            // SAFETY: no parameter of the tree has host memory.
            let second = unsafe { Engine::new(&tree, comm, &EngineConfig::default()) }.unwrap();
            assert_eq!(second.plan().units.len(), 4);
            assert_eq!(second.plan().arena_bytes, 0);
            first.pre_forward(0).unwrap();
            let e = second.pre_forward(0).unwrap_err();
            assert!(e.status == Status::InvalidState && e.message.contains("another engine"), "{e}");
            assert!(second.begin_write().is_err());
            first.post_forward(0).unwrap();
            first.finish_forward().unwrap();
            let first = keep.then_some(first);
            for s in 2..4 {
                // The inner root is unit 1 here, and so on.
                second.pre_forward(0).unwrap();
                step_below(&second, 1, rank, s, &|_, _, _| true);
                second.post_forward(0).unwrap();
                second.finish_backward().unwrap();
                descend(&second);
            }
            check(&second, &expected);
            if let Some(first) = first {
                check(&first, &expected);
            }
        });
    }
}

/// Gradients are rounded to 16 bits on each rank, and summed in float32.
#[test]
fn gradients_can_be_reduced_in_sixteen_bits() {
    let world = 3;
    ranks(world, |comm| {
        let rank = comm.rank();
        for (dtype, exact) in [(DType::F16, 1.0f32 / 1024.0), (DType::BF16, 1.0 / 128.0)] {
            let config = EngineConfig { reduce_dtype: dtype, ..EngineConfig::default() };
            let engine = engine(comm.clone(), &config);
            for u in [0, 1, 2] {
                engine.unshard(u).unwrap();
            }
            // 1 + the last bit of the type, and half as much, which is rounded to even.
            let values = [1.0 + exact, 1.0 + exact / 2.0, 3.0 * (rank as f32 + 1.0), 1e-3];
            for (p, (_, shape)) in SHAPES.iter().enumerate() {
                let grad: Vec<f32> = (0..numel(shape)).map(|i| values[i % 4]).collect();
                // SAFETY: as long as the parameter.
                unsafe { engine.accumulate_grad(p as u32, DType::F32, grad.as_ptr().cast()) }.unwrap();
            }
            engine.finish_backward().unwrap();
            let small = match dtype {
                DType::F16 => half::f16::from_f32(1e-3).to_f32(),
                _ => half::bf16::from_f32(1e-3).to_f32(),
            };
            let mean = |v: f32| (v + v + v) / world as f32;
            let want = [mean(1.0 + exact), 1.0, 18.0 / 3.0, mean(small)];
            for p in 0..SHAPES.len() {
                let shard = engine.shard(p as u32).unwrap();
                let first = engine.plan().params[p].piece.param_offset;
                for i in 0..shard.len {
                    // SAFETY: the gradient shard is as long as the piece.
                    let got = unsafe { shard.grad.add(i).read() };
                    assert_eq!(got, want[(first + i) % 4], "{dtype} parameter {p} element {}", first + i);
                }
            }
            let full = engine.plan().units.iter().map(|u| u.layout.len as u64 * 2).sum::<u64>();
            assert_eq!(engine.stats().unwrap().gradients.reduce_scatter_bytes, full);
        }
    });
}

#[test]
fn a_different_order_is_an_error_on_every_rank_that_names_units_and_ranks() {
    let messages = ranks(3, |comm| {
        let rank = comm.rank();
        let engine = engine(comm, &EngineConfig::default());
        let mut order = [1, 2];
        if rank == 2 {
            order.reverse();
        }
        // Any of these may be the call that sees it, on a rank that is late.
        let run = || -> fsdp::error::Result<()> {
            engine.pre_forward(0)?;
            for u in order {
                engine.unshard(u)?;
            }
            engine.comm().barrier()
        };
        run().unwrap_err()
    });
    for e in messages {
        assert_eq!(e.status, Status::Mismatch, "{e}");
        assert!(e.message.contains("\"a\"") && e.message.contains("\"b\"") && e.message.contains("rank 2"), "{e}");
    }
}

#[test]
fn nobody_waits_for_an_engine_that_was_destroyed() {
    ranks(2, |comm| {
        let rank = comm.rank();
        let engine = engine(comm.clone(), &EngineConfig::default());
        engine.pre_forward(0).unwrap();
        comm.barrier().unwrap();
        if rank == 0 {
            engine.finish_forward().unwrap();
            engine.begin_write().unwrap();
        }
        // Rank 1 is still reading when its engine ends.
    });
}

#[test]
fn writing_in_the_middle_of_a_backward_is_refused() {
    ranks(2, |comm| {
        let engine = engine(comm, &EngineConfig::default());
        engine.pre_forward(0).unwrap();
        engine.param_grad(0).unwrap();
        let e = engine.begin_write().unwrap_err();
        assert!(e.status == Status::InvalidState && e.message.contains("(root)"), "{e}");
        engine.finish_backward().unwrap();
        engine.begin_write().unwrap();
        let e = engine.param_grad(0).unwrap_err();
        assert!(e.message.contains("\"embed\""), "{e}");
        assert!(engine.param_data(0).is_err());
    });
}
