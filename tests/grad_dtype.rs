//! Units that collect gradients in 16 bits leave the bits in the gradient shards that they leave with float32, however often and in
//! whatever type each rank writes.

mod common;

use common::{engine, numel, ranks, SHAPES};
use fsdp::comm::Communicator;
use fsdp::config::{EngineConfig, Strategy};
use fsdp::dtype::DType;
use fsdp::engine::{Engine, FullGradient};
use fsdp::error::Status;
use fsdp::hook::{HookFn, UnitGradients};
use half::{bf16, f16};
use std::sync::Arc;

/// What happens besides backwards that reduce.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Plain,
    /// Two backwards leave their gradients for a third one.
    Accumulated,
    /// A hook changes gradients, from the second backward on.
    Hooked,
    /// Each unit is reduced twice in a backward.
    ReducedTwice,
    /// A backward that was given up is not seen.
    GivenUp,
}

const MODES: [Mode; 5] = [Mode::Plain, Mode::Accumulated, Mode::Hooked, Mode::ReducedTwice, Mode::GivenUp];

/// A gradient's element: in float32, not representable in 16 bits.
fn gradient(seed: usize, i: usize) -> f32 {
    let x = (seed * 7919 + i * 104_729) % 10_007;
    (x as f32 - 5000.0) / 777.0
}

fn bits(dtype: DType, x: f32) -> u16 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_bits(),
        _ => bf16::from_f32(x).to_bits(),
    }
}

fn wide(dtype: DType, bits: u16) -> f32 {
    match dtype {
        DType::F16 => f16::from_bits(bits).to_f32(),
        _ => bf16::from_bits(bits).to_f32(),
    }
}

/// The bytes of a gradient, in 16 bits or in float32.
fn bytes(p: usize, dtype: DType, seed: usize) -> Vec<u32> {
    let grad: Vec<f32> = (0..numel(SHAPES[p].1)).map(|i| gradient(seed, i)).collect();
    let narrow: Vec<u16> = grad.iter().map(|x| bits(dtype, *x)).collect();
    match dtype {
        DType::F32 => grad.iter().map(|x| x.to_bits()).collect(),
        _ => narrow.chunks(2).map(|two| u32::from(two[0]) | u32::from(*two.last().unwrap()) << 16).collect(),
    }
}

/// Gives a parameter a gradient as C's accumulate_grad does.
fn give(engine: &Engine, p: usize, dtype: DType, seed: usize) {
    let data = bytes(p, dtype, seed);
    // SAFETY: as long as the parameter, of this type.
    unsafe { engine.accumulate_grad(p as u32, dtype, data.as_ptr().cast()) }.unwrap();
}

/// Gives several at once.
fn give_together(engine: &Engine, grads: &[(usize, DType, usize)]) {
    let data: Vec<Vec<u32>> = grads.iter().map(|(p, dtype, seed)| bytes(*p, *dtype, *seed)).collect();
    let full = |((p, dtype, _), data): (&(usize, DType, usize), &Vec<u32>)| FullGradient {
        param: *p as u32,
        dtype: *dtype,
        data: data.as_ptr().cast(),
    };
    let full: Vec<FullGradient> = grads.iter().zip(&data).map(full).collect();
    // SAFETY: as above.
    unsafe { engine.accumulate_grads(&full) }.unwrap();
}

/// The same in place, as a host does that is given a region: values of `dtype`, whatever the region's type.
fn write(engine: &Engine, p: usize, dtype: DType, seed: usize) -> DType {
    let region = engine.param_grad(p as u32).unwrap();
    for i in 0..numel(SHAPES[p].1) {
        let narrow = bits(dtype, gradient(seed, i));
        // SAFETY: the region has the parameter's elements, of its type.
        unsafe {
            match region.dtype {
                DType::F32 => {
                    let at = region.data.cast::<f32>().add(i);
                    *at = if region.held { *at + wide(dtype, narrow) } else { wide(dtype, narrow) };
                }
                _ => {
                    assert!(!region.held && region.dtype == dtype, "what is added to is float32");
                    region.data.cast::<u16>().add(i).write(narrow);
                }
            }
        }
    }
    region.dtype
}

/// One rank's gradients of a backward: all ways to give them, different ones on different ranks. Returns how many regions
/// were in 16 bits. `together`: what is given by itself is given at once.
fn backward(engine: &Engine, rank: usize, step: usize, compute: DType, together: bool) -> usize {
    let mut narrow = 0;
    for u in [2u32, 1, 0] {
        engine.unshard(u).unwrap();
        let mut later = Vec::new();
        for p in engine.unit(u).unwrap().params.clone() {
            let p = p as usize;
            let seed = 1 + rank * 31 + step * 7 + p * 3;
            match (rank * 5 + step * 3 + p) % 8 {
                0 => {}
                1 => later.push((p, compute, seed)),
                2 => [seed, seed + 1].iter().for_each(|s| give(engine, p, compute, *s)),
                3 => later.push((p, DType::F32, seed)),
                4 => [compute, DType::F32].iter().for_each(|d| give(engine, p, *d, seed)),
                5 => {
                    for s in seed..seed + 3 {
                        narrow += usize::from(write(engine, p, compute, s) == compute);
                    }
                }
                6 => {
                    // What is reserved and not used counts for nothing.
                    engine.reserve_grad(p as u32).unwrap();
                    [DType::F32, compute].iter().for_each(|d| give(engine, p, *d, seed));
                }
                _ => narrow += usize::from(write(engine, p, compute, seed) == compute),
            }
        }
        match together {
            true => give_together(engine, &later),
            false => later.into_iter().for_each(|(p, dtype, seed)| give(engine, p, dtype, seed)),
        }
    }
    narrow
}

/// The bits of all gradient shards after each of a few backwards, and how many regions were in 16 bits.
fn run(comm: &Arc<dyn Communicator>, config: &EngineConfig, mode: Mode) -> (Vec<u32>, usize) {
    let engine = engine(comm.clone(), config);
    let compute = config.param_dtype.unwrap();
    let (rank, mut all, mut narrow) = (comm.rank(), Vec::new(), 0);
    for step in 0..4 {
        if mode == Mode::Hooked && step == 1 {
            let scale = |unit: &UnitGradients| {
                for g in unit.gradients {
                    // SAFETY: as a hook may.
                    (0..g.numel).for_each(|i| unsafe { *g.data.add(i) *= 0.3 });
                }
                Ok(())
            };
            engine.set_comm_hook(Some(Arc::new(scale) as HookFn)).unwrap();
        }
        if mode == Mode::Accumulated {
            engine.set_requires_gradient_sync(step % 3 == 2).unwrap();
        }
        narrow += backward(&engine, rank, step, compute, config.grads_in_param_dtype);
        if mode == Mode::ReducedTwice {
            [2, 1, 0].iter().for_each(|u| engine.reduce(*u).unwrap());
            narrow += backward(&engine, rank, step + 100, compute, config.grads_in_param_dtype);
        }
        if mode == Mode::GivenUp && step == 1 {
            engine.finish_forward().unwrap();
            continue;
        }
        engine.finish_backward().unwrap();
        for p in 0..SHAPES.len() {
            let shard = engine.shard(p as u32).unwrap();
            all.push(u32::from(shard.grad.is_null()));
            if !shard.grad.is_null() && shard.len > 0 {
                // SAFETY: the gradient shard is as long as the piece, and complete after the backward.
                let grad = unsafe { std::slice::from_raw_parts(shard.grad, shard.len) };
                all.extend(grad.iter().map(|x| x.to_bits()));
            }
        }
        // Every other backward is added to the one before.
        if step % 2 == 1 {
            engine.zero_grad().unwrap();
        }
    }
    (all, narrow)
}

#[test]
fn shards_get_the_same_bits() {
    for world in [1, 2, 3, 4] {
        ranks(world, |comm| {
            for compute in [DType::BF16, DType::F16] {
                for reduce_dtype in [DType::F32, compute, if compute == DType::F16 { DType::BF16 } else { DType::F16 }]
                {
                    for mode in MODES {
                        for (gradient_slots, strategy) in [(0, Strategy::FullShard), (1, Strategy::HybridShard)] {
                            let hybrid = world == 4 && strategy == Strategy::HybridShard;
                            let config = EngineConfig {
                                gradient_slots,
                                strategy: if hybrid { strategy } else { Strategy::FullShard },
                                shard_size: if hybrid { 2 } else { 0 },
                                param_dtype: Some(compute),
                                reduce_dtype,
                                ..EngineConfig::default()
                            };
                            let narrow = EngineConfig { grads_in_param_dtype: true, ..config.clone() };
                            let ((want, none), (got, some)) = (run(&comm, &config, mode), run(&comm, &narrow, mode));
                            assert_eq!(want, got, "{world} {compute} {reduce_dtype} {mode:?} {gradient_slots}");
                            assert!(none == 0 && some > 0, "{none} and {some} regions in 16 bits");
                        }
                    }
                }
            }
        });
    }
}

/// Where a backward must keep float32, and where it need not.
#[test]
fn regions_are_in_sixteen_bits_where_that_loses_nothing() {
    ranks(2, |comm| {
        let config = EngineConfig {
            param_dtype: Some(DType::BF16),
            reduce_dtype: DType::BF16,
            grads_in_param_dtype: true,
            ..EngineConfig::default()
        };
        let narrow = engine(comm.clone(), &config);
        let wide = engine(comm.clone(), &EngineConfig { grads_in_param_dtype: false, ..config.clone() });
        let bytes = |e: &Engine| e.stats().unwrap().gradient_slot_bytes;
        assert_eq!(2 * bytes(&narrow), bytes(&wide));

        let region = |p: u32| narrow.param_grad(p).unwrap();
        narrow.unshard(0).unwrap();
        narrow.unshard(1).unwrap();
        let (w, b) = (region(1), region(2));
        assert_eq!((w.dtype, w.held, b.dtype, b.held), (DType::BF16, false, DType::BF16, false));
        // SAFETY: the region of 5 elements.
        (0..5).for_each(|i| unsafe { b.data.cast::<u16>().add(i).write(bf16::from_f32(i as f32).to_bits()) });
        let again = region(2);
        assert_eq!((again.dtype, again.held), (DType::F32, true));
        // SAFETY: the region of 5 elements.
        (0..5).for_each(|i| unsafe { assert_eq!(again.data.cast::<f32>().add(i).read(), i as f32) });
        assert_eq!(narrow.reserve_grad(2).unwrap().data, again.data);
        let reserved = narrow.reserve_grad(1).unwrap();
        assert_eq!((reserved.dtype, reserved.held), (DType::F32, true), "a reserved region holds what was written");
        narrow.finish_forward().unwrap();

        narrow.unshard(0).unwrap();
        narrow.set_requires_gradient_sync(false).unwrap();
        assert_eq!(region(0).dtype, DType::F32, "to be added to later");
        narrow.set_requires_gradient_sync(true).unwrap();
        narrow.finish_forward().unwrap();
        narrow.unshard(0).unwrap();
        assert_eq!(region(0).dtype, DType::BF16);
        narrow.set_comm_hook(Some(Arc::new(|_: &UnitGradients| Ok(())) as HookFn)).unwrap();
        narrow.unshard(1).unwrap();
        assert_eq!(region(1).dtype, DType::F32, "to be seen by a hook");
        narrow.finish_forward().unwrap();
        assert_eq!(wide.stats().unwrap().gradients.overflow_peak, 0);
    });
}

/// A unit of parameters of two types collects in float32; ranks and devices that cannot are told.
#[test]
fn what_cannot_be_is_refused_by_name() {
    let seen = ranks(2, |comm| {
        let other = comm.rank() == 1;
        let config = EngineConfig { grads_in_param_dtype: other, ..EngineConfig::default() };
        let tree = fsdp::module::ModuleTree::new("Net");
        // SAFETY: there is no parameter.
        let e = unsafe { Engine::new(&tree, comm, &config) }.err().unwrap();
        (e.status, e.message)
    });
    assert!(seen.iter().all(|(s, m)| *s == Status::Mismatch && m.contains("grads_in_param_dtype")), "{seen:?}");
    let config = EngineConfig { grads_in_param_dtype: true, cuda: Some(Default::default()), ..EngineConfig::default() };
    let e = config.check().unwrap_err();
    assert!(e.status == Status::Unsupported && e.message.contains("grads_in_param_dtype"), "{e}");

    let mut tree = fsdp::module::ModuleTree::new("Net");
    for (name, dtype) in [("w", DType::BF16), ("norm", DType::F32)] {
        tree.add_param(0, name, &[4], dtype, true, [0f32; 4].as_ptr().cast()).unwrap();
    }
    let config = EngineConfig { grads_in_param_dtype: true, ..EngineConfig::default() };
    let plan = fsdp::plan::Plan::new(&tree.with_engine_dtypes(&config), 0, 1).unwrap();
    assert_eq!(plan.units[0].grad_dtype, DType::F32);
}
