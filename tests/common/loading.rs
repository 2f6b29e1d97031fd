//! Loading into the common model on several ranks: all values are right, or none has changed.

use crate::common::{engine, piece, ranks, value, SHAPES};
use fsdp::checkpoint::{load, Contents};
use fsdp::config::EngineConfig;
use fsdp::error::{Error, Status};
use std::path::Path;

/// Loads into an engine whose values are all wrong, with `contents`; checks all parameters if that succeeds.
pub fn load_at(world: usize, dir: &Path, contents: impl Fn() -> Contents + Sync, scale: f32) -> Vec<Result<(), Error>> {
    ranks(world, |comm| {
        let engine = engine(comm, &EngineConfig::default());
        engine.begin_write().unwrap();
        (0..SHAPES.len()).for_each(|p| piece(&engine, p).fill(-1.5));
        // SAFETY: the contents' data are as large as said.
        let result = unsafe { load(&engine, dir, &contents()) };
        for (p, (name, _)) in SHAPES.iter().enumerate() {
            let first = engine.plan().params[p].piece.param_offset;
            for (i, v) in piece(&engine, p).iter().enumerate() {
                let want = if result.is_ok() { value(p, first + i) * scale } else { -1.5 };
                assert_eq!(*v, want, "{name} [{}]", first + i);
            }
        }
        result
    })
}

pub fn refused(world: usize, dir: &Path, contents: impl Fn() -> Contents + Sync, words: &[&str]) {
    for result in load_at(world, dir, contents, 1.0) {
        let e = result.unwrap_err();
        assert_eq!(e.status, Status::Checkpoint, "{e}");
        words.iter().for_each(|w| assert!(e.message.contains(w), "{w} is not in: {e}"));
    }
}
