//! Checkpoints of the engine: round trips between world sizes, and every kind of damage.

mod common;

use common::{engine, numel, piece, ranks, value, Folder, SHAPES};
use fsdp::checkpoint::{load, metadata, save, Contents, Metadata, StateTensor};
use fsdp::comm::Communicator;
use fsdp::config::{EngineConfig, Strategy};
use fsdp::engine::Engine;
use fsdp::error::{Error, Status};
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// A state "exp_avg" per parameter whose values are those of the parameter plus a half.
fn states(engine: &Engine) -> (Vec<Vec<f32>>, Vec<StateTensor>) {
    let mut data: Vec<Vec<f32>> =
        (0..SHAPES.len()).map(|p| piece(engine, p).iter().map(|v| v + 0.5).collect()).collect();
    let tensors = data
        .iter_mut()
        .enumerate()
        .map(|(p, d)| StateTensor { param: p as u32, name: "exp_avg".into(), data: d.as_mut_ptr() })
        .collect();
    (data, tensors)
}

fn steps() -> Metadata {
    Metadata::from([("step".to_string(), "seven \"7\"".to_string())])
}

fn save_at(world: usize, dir: &Path) -> Vec<Result<(), Error>> {
    ranks(world, |comm| {
        let engine = engine(comm, &EngineConfig::default());
        let (_data, tensors) = states(&engine);
        // SAFETY: the states have the pieces' lengths.
        unsafe { save(&engine, dir, &Contents { states: tensors, metadata: steps(), ..Contents::default() }) }
    })
}

/// Loads into an engine whose shards were overwritten with a marker; returns whether the marker is still everywhere.
fn load_into(comm: Arc<dyn Communicator>, dir: &Path) -> (Result<(), Error>, bool) {
    const MARK: f32 = -12345.0;
    let engine = engine(comm, &EngineConfig::default());
    engine.begin_write().unwrap();
    (0..SHAPES.len()).for_each(|p| piece(&engine, p).fill(MARK));
    let (mut data, tensors) = states(&engine);
    data.iter_mut().for_each(|d| d.fill(MARK));
    // SAFETY: the states have the pieces' lengths.
    let result = unsafe { load(&engine, dir, &Contents { states: tensors, ..Contents::default() }) };
    let untouched = (0..SHAPES.len()).all(|p| piece(&engine, p).iter().chain(&data[p]).all(|v| *v == MARK));
    if result.is_ok() {
        for (p, (name, shape)) in SHAPES.iter().enumerate() {
            let first = engine.plan().params[p].piece.param_offset;
            assert!(engine.plan().params[p].piece.len <= numel(shape));
            for (i, (v, s)) in piece(&engine, p).iter().zip(&data[p]).enumerate() {
                assert_eq!(*v, value(p, first + i), "{name}");
                assert_eq!(*s, value(p, first + i) + 0.5, "state of {name}");
            }
        }
    }
    (result, untouched)
}

#[test]
fn loads_at_any_world_size() {
    let folder = Folder::new("any-world-size");
    for saved in [1, 2, 4] {
        let dir = folder.join(&format!("step-{saved}"));
        save_at(saved, &dir).into_iter().for_each(|r| r.unwrap());
        assert_eq!(metadata(&dir).unwrap(), steps());
        for loaded in [1, 2, 3, 4] {
            ranks(loaded, |comm| load_into(comm, &dir).0.unwrap());
        }
    }
    let left: Vec<_> = fs::read_dir(&folder.0).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "nothing but the checkpoints: {left:?}");
}

#[test]
fn of_ranks_with_the_same_shards_the_first_ones_save() {
    let folder = Folder::new("replicas");
    for (strategy, shard_size, files) in [(Strategy::HybridShard, 2, 2), (Strategy::NoShard, 0, 1)] {
        let dir = folder.join(strategy.name());
        let config = EngineConfig { strategy, shard_size, ..EngineConfig::default() };
        ranks(4, |comm| {
            let engine = engine(comm, &config);
            let (_data, tensors) = states(&engine);
            let contents = Contents { states: tensors, metadata: steps(), ..Contents::default() };
            // SAFETY: the states have the pieces' lengths.
            unsafe { save(&engine, &dir, &contents) }.unwrap();
        });
        let whole =
            |e: &fs::DirEntry| e.file_name().to_string_lossy().ends_with(&format!("-of-{files:05}.safetensors"));
        assert_eq!(fs::read_dir(&dir).unwrap().filter(|e| whole(e.as_ref().unwrap())).count(), files);
        ranks(3, |comm| load_into(comm, &dir).0.unwrap());
        ranks(4, |comm| {
            let engine = engine(comm, &config);
            engine.begin_write().unwrap();
            (0..SHAPES.len()).for_each(|p| piece(&engine, p).fill(-1.0));
            // SAFETY: there are no states.
            unsafe { load(&engine, &dir, &Contents::default()) }.unwrap();
            for p in 0..SHAPES.len() {
                let first = engine.plan().params[p].piece.param_offset;
                assert!(piece(&engine, p).iter().enumerate().all(|(i, v)| *v == value(p, first + i)));
            }
        });
    }
}

#[test]
fn an_existing_checkpoint_is_not_overwritten() {
    let folder = Folder::new("existing");
    let dir = folder.join("c");
    save_at(2, &dir).into_iter().for_each(|r| r.unwrap());
    let before = fs::read(dir.join("manifest.json")).unwrap();
    for r in save_at(2, &dir) {
        let e = r.unwrap_err();
        assert!(e.status == Status::Checkpoint && e.message.contains("exists already"), "{e}");
    }
    assert_eq!(fs::read(dir.join("manifest.json")).unwrap(), before);
}

#[test]
fn what_an_interrupted_save_left_is_no_checkpoint_and_does_not_disturb() {
    let folder = Folder::new("interrupted");
    let dir = folder.join("c");
    fs::create_dir_all(folder.join(".c.incomplete")).unwrap();
    fs::write(folder.join(".c.incomplete/shard-00001-of-00002.safetensors"), b"half").unwrap();
    let e = metadata(&dir).unwrap_err();
    assert!(e.message.contains("no such checkpoint"), "{e}");
    save_at(2, &dir).into_iter().for_each(|r| r.unwrap());
    assert!(!folder.join(".c.incomplete").exists());
}

#[test]
fn a_failing_rank_fails_all_and_leaves_nothing() {
    let folder = Folder::new("failing");
    let dir = folder.join("c");
    let results = ranks(2, |comm| {
        let rank = comm.rank();
        let engine = engine(comm, &EngineConfig::default());
        let (_data, mut tensors) = states(&engine);
        if rank == 1 {
            tensors[1].name = String::new();
        }
        // SAFETY: the states have the pieces' lengths.
        unsafe { save(&engine, &dir, &Contents { states: tensors, metadata: steps(), ..Contents::default() }) }
    });
    for r in results {
        let e = r.unwrap_err();
        assert!(e.message.contains("rank 1") && e.message.contains("no name of a state"), "{e}");
    }
    // A parent that is a file.
    fs::write(folder.join("file"), b"").unwrap();
    for r in save_at(2, &folder.join("file/c")) {
        let e = r.unwrap_err();
        assert!(e.status == Status::Io && e.message.contains("file"), "{e}");
    }
    assert!(!dir.exists() && !folder.join(".c.incomplete").exists());
}

/// `damage` changes a good checkpoint; loading must fail on both ranks with all of `words`, and change nothing.
fn refuses(name: &str, damage: impl Fn(&Path), words: &[&str]) {
    let folder = Folder::new(name);
    let dir = folder.join("c");
    save_at(2, &dir).into_iter().for_each(|r| r.unwrap());
    damage(&dir);
    for (result, untouched) in ranks(2, |comm| load_into(comm, &dir)) {
        let e = result.unwrap_err();
        assert_eq!(e.status, Status::Checkpoint, "{e}");
        words.iter().for_each(|w| assert!(e.message.contains(w), "{w} is not in: {e}"));
        assert!(untouched, "{name}: something was loaded");
    }
}

const SHARD: &str = "shard-00002-of-00002.safetensors";

#[test]
fn a_flipped_bit_is_found_in_file_and_parameter() {
    let flip = |dir: &Path| {
        let mut bytes = fs::read(dir.join(SHARD)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(dir.join(SHARD), bytes).unwrap();
    };
    refuses("flipped", flip, &[SHARD, "parameter \"", "damaged"]);
}

#[test]
fn a_flipped_bit_in_a_header_is_found() {
    let flip = |dir: &Path| {
        let mut bytes = fs::read(dir.join(SHARD)).unwrap();
        let at = bytes.windows(7).position(|w| w == b"a.weigh").expect("the header names it");
        bytes[at] ^= 1;
        fs::write(dir.join(SHARD), bytes).unwrap();
    };
    refuses("flipped-header", flip, &[SHARD, "parameter \"", "checksum of its header"]);
}

#[test]
fn a_truncated_a_missing_and_an_alien_file_are_named() {
    let cut = |dir: &Path| {
        let bytes = fs::read(dir.join(SHARD)).unwrap();
        fs::write(dir.join(SHARD), &bytes[..bytes.len() / 2]).unwrap();
    };
    refuses("truncated", cut, &[SHARD, "parameter \"", "bytes, but was saved with"]);
    refuses("missing", |dir| fs::remove_file(dir.join(SHARD)).unwrap(), &[SHARD, "parameter \"", "No such file"]);
    let garbage = |dir: &Path| {
        let len = fs::read(dir.join(SHARD)).unwrap().len();
        fs::write(dir.join(SHARD), vec![0xff; len]).unwrap();
    };
    refuses("garbage", garbage, &[SHARD]);
}

#[test]
fn a_damaged_manifest_is_refused() {
    let change = |from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let text = fs::read_to_string(dir.join("manifest.json")).unwrap();
            assert!(text.contains(from));
            fs::write(dir.join("manifest.json"), text.replacen(from, to, 1)).unwrap();
        }
    };
    refuses("manifest-content", change("seven", "eight"), &["manifest.json", "checksum"]);
    refuses("manifest-version", change("\"version\":1", "\"version\":2"), &["manifest.json", "version 2"]);
    refuses("manifest-gone", |dir| fs::remove_file(dir.join("manifest.json")).unwrap(), &["no complete checkpoint"]);
    refuses("manifest-cut", |dir| fs::write(dir.join("manifest.json"), "{\"format\"").unwrap(), &["no manifest"]);
}

#[test]
fn states_that_were_not_saved_are_named() {
    let folder = Folder::new("states");
    let dir = folder.join("c");
    save_at(2, &dir).into_iter().for_each(|r| r.unwrap());
    let results = ranks(2, |comm| {
        let engine = engine(comm, &EngineConfig::default());
        let (_data, mut tensors) = states(&engine);
        tensors.iter_mut().for_each(|t| t.name = "momentum".into());
        // SAFETY: the states have the pieces' lengths.
        unsafe { load(&engine, &dir, &Contents { states: tensors, ..Contents::default() }) }
    });
    for r in results {
        let e = r.unwrap_err();
        assert!(e.message.contains("state \"momentum\" of parameter \"embed\""), "{e}");
    }
}

#[test]
fn a_checkpoint_of_another_model_is_refused_by_parameter() {
    use fsdp::dtype::DType;
    use fsdp::module::{ModuleTree, ROOT};
    let folder = Folder::new("model");
    let dir = folder.join("c");
    save_at(1, &dir).into_iter().for_each(|r| r.unwrap());
    let data = [0f32; 100];
    let try_load = |params: &[(&str, &[i64])]| {
        let mut tree = ModuleTree::new("Net");
        for (name, shape) in params {
            tree.add_param(ROOT, name, shape, DType::F32, true, data.as_ptr().cast()).unwrap();
        }
        // SAFETY: the data is large enough; no states.
        unsafe {
            let engine = Engine::new(&tree, fsdp::comm::single::init(), &EngineConfig::default()).unwrap();
            load(&engine, &dir, &Contents::default()).unwrap_err().message
        }
    };
    let e = try_load(&[("embed", &[13, 8])]);
    assert!(e.contains("\"embed\"") && e.contains("[13, 7]") && e.contains("[13, 8]"), "{e}");
    assert!(try_load(&[("other", &[3])]).contains("no parameter \"other\""));
    assert!(try_load(&[("embed", &[13, 7])]).contains("the model has no parameter \"a.weight\""));
}
