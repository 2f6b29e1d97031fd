//! Saves in the background: what the copy has, one at a time, and what outlives what.

mod common;

use common::{engine, piece, ranks, value, Folder, SHAPES};
use fsdp::checkpoint::{load, metadata, save, Contents, ExtraTensor, Job, Metadata, StateTensor};
use fsdp::config::EngineConfig;
use fsdp::engine::Engine;
use fsdp::error::Status;
use std::path::Path;

fn start(engine: &Engine, dir: &Path) -> fsdp::error::Result<Job> {
    let mut average: Vec<f32> = piece(engine, 0).iter().map(|v| v + 0.5).collect();
    let state = StateTensor { param: 0, name: "average".into(), data: average.as_mut_ptr() };
    let mut count = [5u8; 3];
    let extra =
        ExtraTensor { name: "count".into(), dtype: safetensors::Dtype::U8, shape: vec![3], data: count.as_mut_ptr() };
    let metadata = Metadata::from([("step".into(), "3".into())]);
    let contents = Contents { states: vec![state], extras: vec![extra], metadata };
    // SAFETY: all data is valid now, and gone when this function returns.
    unsafe { Job::start(engine, dir, &contents) }
}

/// What `start` saves, whatever happened afterwards.
fn check(world: usize, dir: &Path) {
    assert_eq!(metadata(dir).unwrap()["step"], "3");
    ranks(world, |comm| {
        let engine = engine(comm, &EngineConfig::default());
        engine.begin_write().unwrap();
        (0..SHAPES.len()).for_each(|p| piece(&engine, p).fill(-1.0));
        let mut average = vec![0.0; piece(&engine, 0).len()];
        let state = StateTensor { param: 0, name: "average".into(), data: average.as_mut_ptr() };
        // SAFETY: the state has the piece's length.
        unsafe { load(&engine, dir, &Contents { states: vec![state], ..Contents::default() }) }.unwrap();
        for p in 0..SHAPES.len() {
            let first = engine.plan().params[p].piece.param_offset;
            assert!(piece(&engine, p).iter().enumerate().all(|(i, v)| *v == value(p, first + i)), "{p}");
        }
        assert!(piece(&engine, 0).iter().zip(&average).all(|(v, a)| *a == v + 0.5));
    });
}

#[test]
fn the_copy_is_saved_while_values_change() {
    let folder = Folder::new("async");
    for world in [1, 2, 3] {
        let dir = folder.join(&format!("c{world}"));
        ranks(world, |comm| {
            let engine = engine(comm, &EngineConfig::default());
            let job = start(&engine, &dir).unwrap();
            engine.begin_write().unwrap();
            (0..SHAPES.len()).for_each(|p| piece(&engine, p).fill(99.0));
            // The engine's own collectives go on beside those of the save.
            for _ in 0..20 {
                engine.unshard(0).unwrap();
                engine.finish_backward().unwrap();
            }
            job.wait().unwrap();
            assert!(job.done());
            job.wait().unwrap();
        });
        check(2, &dir);
    }
}

#[test]
fn an_engine_may_go_before_its_save() {
    let folder = Folder::new("async-engine");
    let dir = folder.join("c");
    ranks(2, |comm| {
        let engine = engine(comm, &EngineConfig::default());
        let job = start(&engine, &dir).unwrap();
        drop(engine);
        // Destroying the job waits, too.
        drop(job);
        assert!(rank_sees(&dir));
    });
    check(3, &dir);
}

/// Rank 0 publishes before any rank is told so.
fn rank_sees(dir: &Path) -> bool {
    dir.join("manifest.json").exists()
}

#[test]
fn what_is_wrong_at_once_is_said_at_once() {
    let folder = Folder::new("async-wrong");
    let dir = folder.join("c");
    ranks(2, |comm| {
        let engine = engine(comm, &EngineConfig::default());
        start(&engine, &dir).unwrap().wait().unwrap();
        let e = start(&engine, &dir).err().expect("it exists");
        assert!(e.status == Status::Checkpoint && e.message.contains("exists already"), "{e}");
        // What shows later is the outcome of the save: the parent is a file.
        let job = start(&engine, &dir.join("manifest.json/x")).unwrap();
        let e = job.wait().unwrap_err();
        assert!(e.status == Status::Io && e.message.contains("in the background"), "{e}");
        assert_eq!(job.wait().unwrap_err(), e);
        drop(job);
        // Nothing is broken.
        // SAFETY: there are no states.
        unsafe { save(&engine, &folder.join("d"), &Contents::default()) }.unwrap();
        start(&engine, &folder.join("e")).unwrap().wait().unwrap();
    });
    check(1, &folder.join("e"));
}
