//! Ranks as threads of the test process, and a small model to shard.

use fsdp::comm::Communicator;
use fsdp::config::EngineConfig;
use fsdp::dtype::DType;
use fsdp::engine::Engine;
use fsdp::module::{ModuleTree, ROOT};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

mod ranks;

pub use ranks::ranks;

/// Shapes of the model's parameters: odd, tiny, empty.
pub const SHAPES: [(&str, &[i64]); 6] = [
    ("embed", &[13, 7]),
    ("a.weight", &[7, 5]),
    ("a.bias", &[5]),
    ("a.none", &[0, 3]),
    ("b.weight", &[1]),
    ("b.scale", &[]),
];

/// Element `i` of parameter `p` at first.
pub fn value(p: usize, i: usize) -> f32 {
    (p * 1000 + i) as f32 * 0.25 - 3.0
}

pub fn numel(shape: &[i64]) -> usize {
    shape.iter().product::<i64>() as usize
}

/// The model, sharded: modules a and b are units.
pub fn engine(comm: Arc<dyn Communicator>, config: &EngineConfig) -> Engine {
    let data: Vec<Vec<f32>> =
        SHAPES.iter().enumerate().map(|(p, (_, s))| (0..numel(s)).map(|i| value(p, i)).collect()).collect();
    let mut tree = ModuleTree::new("Net");
    let a = tree.add_module(ROOT, "a", "Block").unwrap();
    let b = tree.add_module(ROOT, "b", "Block").unwrap();
    for ((name, shape), data) in SHAPES.iter().zip(&data) {
        let (module, leaf) = match name.split_once('.') {
            None => (ROOT, *name),
            Some(("a", leaf)) => (a, leaf),
            Some((_, leaf)) => (b, leaf),
        };
        tree.add_param(module, leaf, shape, DType::F32, true, data.as_ptr().cast()).unwrap();
    }
    tree.wrap(a).unwrap();
    tree.wrap(b).unwrap();
    // SAFETY: the data outlives the call.
    unsafe { Engine::new(&tree, comm, config) }.unwrap()
}

/// This rank's piece of a parameter, in memory that the engine shares with its host as C does.
#[allow(dead_code, clippy::mut_from_ref)]
pub fn piece(engine: &Engine, param: usize) -> &mut [f32] {
    let shard = engine.shard(param as u32).unwrap();
    if shard.len == 0 {
        return &mut [];
    }
    // SAFETY: the shard lives as long as the engine; tests write it only between backward and forward.
    unsafe { std::slice::from_raw_parts_mut(shard.data, shard.len) }
}

/// A folder of the test, removed when it ends.
#[allow(dead_code)]
pub struct Folder(pub PathBuf);

#[allow(dead_code)]
impl Folder {
    pub fn new(name: &str) -> Folder {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
