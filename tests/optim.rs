//! The optimizer on an engine: ranks that differ, and checkpoints that go on where they stopped.

mod common;

use common::{engine, numel, piece, ranks, value, SHAPES};
use fsdp::checkpoint::{load, metadata, save, Contents, Metadata, StateTensor};
use fsdp::comm::Communicator;
use fsdp::config::EngineConfig;
use fsdp::engine::Engine;
use fsdp::error::Status;
use fsdp::optim::{AdamWOptions, Optimizer, Rule, SgdOptions, METADATA_KEY};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A folder of the test, removed when it ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("optim-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The model's one that gets gradients in even steps only.
const SOMETIMES: usize = 1;
/// The one that never does.
const NEVER: usize = 5;

fn gets_gradient(p: usize, step: usize) -> bool {
    p != NEVER && (p != SOMETIMES || step % 2 == 0)
}

/// Element `i` of the gradient of parameter `p` in a step: the same on every rank, and a mean of at most four of them is
/// exact, so that it is the same at every world size but three.
fn gradient(p: usize, i: usize, step: usize) -> f32 {
    ((p * 31 + i * 7 + step * 13) % 17) as f32 / 8.0 - 1.0
}

fn train(engine: &Engine, optimizer: &Optimizer, steps: std::ops::RangeInclusive<usize>) {
    for step in steps {
        engine.zero_grad().unwrap();
        for unit in 0..engine.plan().units.len() {
            engine.unshard(unit as u32).unwrap();
        }
        for (p, (_, shape)) in SHAPES.iter().enumerate().filter(|(p, _)| gets_gradient(*p, step)) {
            let grad: Vec<f32> = (0..numel(shape)).map(|i| gradient(p, i, step)).collect();
            // SAFETY: as many floats as the parameter has.
            unsafe { engine.accumulate_grad(p as u32, fsdp::dtype::DType::F32, grad.as_ptr().cast()) }.unwrap();
        }
        engine.finish_backward().unwrap();
        optimizer.step().unwrap();
    }
}

const SGD: Rule = Rule::Sgd(SgdOptions {
    lr: 0.1,
    momentum: 0.9,
    dampening: 0.5,
    weight_decay: 0.01,
    nesterov: false,
    maximize: false,
});
const ADAMW: Rule =
    Rule::AdamW(AdamWOptions { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, maximize: false });

fn make(comm: Arc<dyn Communicator>, rule: Rule) -> (Arc<Engine>, Optimizer) {
    let engine = Arc::new(engine(comm, &EngineConfig::default()));
    let optimizer = Optimizer::new(engine.clone(), rule).unwrap();
    (engine, optimizer)
}

/// Every parameter whole, put together from the ranks' pieces: (first element, values) of each.
type Pieces = Vec<(usize, Vec<u32>)>;

fn pieces(engine: &Engine) -> Pieces {
    let bits = |p: usize| piece(engine, p).iter().map(|v| v.to_bits()).collect();
    (0..SHAPES.len()).map(|p| (engine.plan().params[p].piece.param_offset, bits(p))).collect()
}

fn whole(ranks: Vec<Pieces>) -> Vec<Vec<u32>> {
    let mut all: Vec<Vec<u32>> = SHAPES.iter().map(|(_, s)| vec![0; numel(s)]).collect();
    for rank in ranks {
        for (p, (first, bits)) in rank.into_iter().enumerate() {
            all[p][first..first + bits.len()].copy_from_slice(&bits);
        }
    }
    all
}

fn uninterrupted(world: usize, rule: Rule, steps: usize) -> Vec<Vec<u32>> {
    whole(ranks(world, |comm| {
        let (engine, optimizer) = make(comm, rule);
        train(&engine, &optimizer, 1..=steps);
        pieces(&engine)
    }))
}

#[test]
fn every_world_size_gives_the_same_bits() {
    for rule in [SGD, ADAMW] {
        let alone = uninterrupted(1, rule, 5);
        assert!(
            (0..SHAPES.len()).all(|p| alone[p].is_empty() || (alone[p][0] == value(p, 0).to_bits()) == (p == NEVER))
        );
        for world in [2, 4] {
            assert_eq!(uninterrupted(world, rule, 5), alone, "{} at {world}", rule.name());
        }
    }
}

#[test]
fn training_goes_on_where_it_stopped_at_any_world_size() {
    let folder = Folder::new("resume");
    for rule in [SGD, ADAMW] {
        let want = uninterrupted(1, rule, 6);
        for saved in [1, 2, 4] {
            let dir = folder.join(&format!("{}-{saved}", rule.name()));
            ranks(saved, |comm| {
                let (engine, optimizer) = make(comm, rule);
                train(&engine, &optimizer, 1..=3);
                // SAFETY: no further states.
                unsafe {
                    optimizer.save(
                        &dir,
                        &Contents { metadata: Metadata::from([("step".into(), "3".into())]), ..Contents::default() },
                    )
                }
                .unwrap();
            });
            assert_eq!(metadata(&dir).unwrap()["step"], "3");
            for loaded in [1, 2, 4] {
                let got = whole(ranks(loaded, |comm| {
                    let (engine, optimizer) = make(comm, rule);
                    // It has been used before: all of that is replaced, also the counts of what is at 0 there.
                    train(&engine, &optimizer, 2..=2);
                    // SAFETY: no further states.
                    unsafe { optimizer.load(&dir, &Contents::default()) }.unwrap();
                    assert_eq!(optimizer.steps(0).unwrap(), 3);
                    assert_eq!(optimizer.steps(SOMETIMES as u32).unwrap(), 1);
                    assert_eq!(optimizer.steps(NEVER as u32).unwrap(), 0);
                    train(&engine, &optimizer, 4..=6);
                    pieces(&engine)
                }));
                assert_eq!(got, want, "{} saved at {saved}, loaded at {loaded}", rule.name());
            }
        }
    }
}

#[test]
fn a_checkpoint_from_before_the_first_step_begins_anew() {
    let folder = Folder::new("first");
    for rule in [SGD, ADAMW] {
        let dir = folder.join(rule.name());
        let want = uninterrupted(2, rule, 2);
        let got = whole(ranks(2, |comm| {
            let (engine, optimizer) = make(comm, rule);
            // SAFETY: no further states.
            unsafe { optimizer.save(&dir, &Contents::default()) }.unwrap();
            train(&engine, &optimizer, 1..=4);
            // SAFETY: as above.
            unsafe { optimizer.load(&dir, &Contents::default()) }.unwrap();
            assert!(optimizer.state(0, rule.states()[0]).unwrap().is_null());
            train(&engine, &optimizer, 1..=2);
            pieces(&engine)
        }));
        assert_eq!(got, want, "{}", rule.name());
    }
}

#[test]
fn further_states_are_kept_and_the_parameters_can_be_read_alone() {
    let folder = Folder::new("more");
    let dir = folder.join("c");
    ranks(2, |comm| {
        let (engine, optimizer) = make(comm, SGD);
        train(&engine, &optimizer, 1..=2);
        let mut average = vec![2.5f32; engine.plan().params[0].piece.len];
        let state = StateTensor { param: 0, name: "average".into(), data: average.as_mut_ptr() };
        let more = Contents { states: vec![state], ..Contents::default() };
        let saved = pieces(&engine);
        // SAFETY: the state has the piece's length.
        unsafe { optimizer.save(&dir, &more) }.unwrap();
        train(&engine, &optimizer, 3..=3);
        assert_ne!(pieces(&engine), saved);
        average.fill(0.0);
        // SAFETY: as above.
        unsafe { optimizer.load(&dir, &more) }.unwrap();
        assert!(average.iter().all(|v| *v == 2.5));
        train(&engine, &optimizer, 3..=3);
        // SAFETY: no states.
        unsafe { load(&engine, &dir, &Contents::default()) }.unwrap();
        assert_eq!(pieces(&engine), saved);
    });
}

#[test]
fn other_checkpoints_are_refused_and_change_nothing() {
    let folder = Folder::new("other");
    let (bare, plain, adamw) = (folder.join("bare"), folder.join("plain"), folder.join("adamw"));
    let results = ranks(2, |comm| {
        let (engine, optimizer) = make(comm.clone(), ADAMW);
        train(&engine, &optimizer, 1..=2);
        // SAFETY: no further states, here and below.
        unsafe { optimizer.save(&adamw, &Contents::default()) }.unwrap();
        // SAFETY: as above.
        unsafe { save(&engine, &bare, &Contents::default()) }.unwrap();
        let (engine, optimizer) = make(comm.clone(), Rule::Sgd(SgdOptions::default()));
        train(&engine, &optimizer, 1..=2);
        // SAFETY: as above.
        unsafe { optimizer.save(&plain, &Contents::default()) }.unwrap();

        let (engine, optimizer) = make(comm, SGD);
        train(&engine, &optimizer, 1..=1);
        let before = pieces(&engine);
        let errors = [&bare, &plain, &adamw, &folder.join("none")].map(|dir| {
            // SAFETY: as above.
            unsafe { optimizer.load(dir, &Contents::default()) }.unwrap_err()
        });
        assert_eq!(pieces(&engine), before);
        assert_eq!(optimizer.steps(0).unwrap(), 1);
        train(&engine, &optimizer, 2..=2);
        (errors, pieces(&engine))
    });
    let (errors, pieces): (Vec<_>, Vec<_>) = results.into_iter().unzip();
    for errors in errors {
        let words = ["without an optimizer", "momentum_buffer", "with the optimizer adamw, this one is sgd", "no such"];
        for (e, word) in errors.iter().zip(words) {
            assert!(e.status == Status::Checkpoint && e.message.contains(word), "{e}");
        }
    }
    assert_eq!(whole(pieces), uninterrupted(2, SGD, 2));
}

#[test]
fn a_rank_that_differs_is_an_error_on_every_rank() {
    let folder = Folder::new("differs");
    let dir = folder.join("c");
    let results = ranks(3, |comm| {
        let rank = comm.rank();
        let (engine, optimizer) = make(comm.clone(), ADAMW);
        // Not even a number on one rank: none waits for it.
        let lr = if rank == 1 { f64::NAN } else { 0.5 };
        let other = Rule::Sgd(SgdOptions { lr, ..SgdOptions::default() });
        let options = Optimizer::new(engine.clone(), other).err().unwrap();

        let texts = if rank == 2 { Metadata::from([(METADATA_KEY.into(), "".into())]) } else { Metadata::new() };
        // SAFETY: no further states, here and below.
        let key = unsafe { optimizer.save(&dir, &Contents { metadata: texts, ..Contents::default() }) }.unwrap_err();

        train(&engine, &optimizer, 1..=1);
        train_only_rank(&engine, &optimizer, rank == 0);
        // SAFETY: as above.
        let steps = unsafe { optimizer.save(&dir, &Contents::default()) }.unwrap_err();
        [options, key, steps]
    });
    for errors in results {
        let wanted = [
            (Status::Mismatch, "optimizer options: rank 0 has lr = 0.5, but rank 1 has lr = NaN"),
            (Status::InvalidArgument, METADATA_KEY),
            (Status::Mismatch, "rank 0 has 2 steps of parameter \"a.bias\", but rank 1 has 1 steps"),
        ];
        for (e, (status, word)) in errors.iter().zip(wanted) {
            assert!(e.status == status && e.message.contains(word), "{e}");
        }
    }
    assert!(!dir.exists());
}

/// A step in which the other ranks forget their gradients, as no host should.
fn train_only_rank(engine: &Engine, optimizer: &Optimizer, steps: bool) {
    if !steps {
        engine.zero_grad().unwrap();
    }
    optimizer.step().unwrap();
}

#[test]
fn a_parameter_without_elements_counts_no_steps_and_frozen_ones_stay() {
    ranks(2, |comm| {
        let (engine, optimizer) = make(comm, SGD);
        engine.set_requires_grad(0, false).unwrap();
        engine.unshard(0).unwrap();
        engine.unshard(1).unwrap();
        let grad = [1.0f32; 35];
        for p in [1, 3] {
            // SAFETY: parameter 1 has 35 elements, 3 none.
            unsafe { engine.accumulate_grad(p, fsdp::dtype::DType::F32, grad.as_ptr().cast()) }.unwrap();
        }
        engine.finish_backward().unwrap();
        let before = piece(&engine, 0).to_vec();
        optimizer.step().unwrap();
        assert_eq!(piece(&engine, 0), before);
        assert_eq!((0..6).map(|p| optimizer.steps(p).unwrap()).collect::<Vec<_>>(), [0, 1, 0, 0, 0, 0]);
        assert!(optimizer.state(0, "momentum_buffer").unwrap().is_null());
        assert!(!optimizer.state(1, "momentum_buffer").unwrap().is_null());
    });
}
