//! What checkpoints look like from outside: whole tensors, boxes, blocks, consolidation, and Hugging Face's layout.

mod common;
#[path = "common/loading.rs"]
mod loading;

use common::{engine, piece, ranks, value, Folder, SHAPES};
use fsdp::checkpoint::{
    consolidate, inspect, load, save, verify, ConsolidateOptions, Contents, ExtraTensor, Kind, Metadata,
};
use fsdp::config::EngineConfig;
use fsdp::dtype::DType;
use fsdp::engine::Engine;
use fsdp::error::Status;
use fsdp::module::{ModuleTree, ROOT};
use loading::{load_at, refused};
use safetensors::{Dtype, SafeTensors};
use serde_json::{json, Value};
use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// A counter and a mask, as modules have them; `seed` is in every value.
struct Buffers {
    count: Vec<i64>,
    mask: Vec<u8>,
}

impl Buffers {
    fn new(seed: u8) -> Buffers {
        Buffers { count: vec![i64::from(seed) << 40], mask: (0..6).map(|i| (i + seed) % 2).collect() }
    }
    fn contents(&mut self) -> Contents {
        let (count, mask) = (self.count.as_mut_ptr().cast(), self.mask.as_mut_ptr());
        let extras = vec![
            ExtraTensor { name: "a.mask".into(), dtype: Dtype::BOOL, shape: vec![2, 3], data: mask },
            ExtraTensor { name: "count".into(), dtype: Dtype::I64, shape: vec![], data: count },
        ];
        Contents { extras, metadata: Metadata::from([("step".into(), "7".into())]), ..Contents::default() }
    }
}

/// Saves the common model at `world`; each rank's buffers have its number, rank 0's are to be kept.
fn save_at(world: usize, dir: &Path) {
    ranks(world, |comm| {
        let rank = comm.rank() as u8;
        let engine = engine(comm, &EngineConfig::default());
        let mut buffers = Buffers::new(rank);
        // SAFETY: the buffers have the sizes that they are said to have.
        unsafe { save(&engine, dir, &buffers.contents()) }.unwrap();
    });
}

#[test]
fn whole_tensors_are_rank_zeros_on_every_rank() {
    let folder = Folder::new("extras");
    let dir = folder.join("c");
    save_at(3, &dir);
    ranks(2, |comm| {
        let engine = engine(comm, &EngineConfig::default());
        let mut buffers = Buffers::new(9);
        // SAFETY: as in `save_at`.
        unsafe { load(&engine, &dir, &buffers.contents()) }.unwrap();
        assert_eq!((buffers.count, buffers.mask), (vec![0], vec![0, 1, 0, 1, 0, 1]));
    });
    // Not asked for: not needed.
    load_at(4, &dir, Contents::default, 1.0).into_iter().for_each(|r| r.unwrap());

    static mut NOTHING: [u64; 8] = [0; 8];
    let one = |name: &str, dtype, shape: &[usize]| {
        let (name, shape) = (name.to_string(), shape.to_vec());
        let data = (&raw mut NOTHING).cast();
        move || Contents {
            extras: vec![ExtraTensor { name: name.clone(), dtype, shape: shape.clone(), data }],
            ..Contents::default()
        }
    };
    // Sync for the threads: the pointer is never written, as every load below fails.
    struct Shared<F>(F);
    // SAFETY: as above.
    unsafe impl<F> Sync for Shared<F> {}
    let check = |f: &dyn Fn() -> Contents, words: &[&str]| {
        let shared = Shared(f);
        let shared = &shared;
        refused(2, &dir, move || (shared.0)(), words);
    };
    check(&one("count", Dtype::I32, &[]), &["\"count\"", "I64 []", "I32 []"]);
    check(&one("a.mask", Dtype::BOOL, &[6]), &["\"a.mask\"", "[2, 3]", "[6]"]);
    check(&one("none", Dtype::F32, &[1]), &["it has no tensor \"none\""]);
}

#[test]
fn names_of_whole_tensors_are_checked() {
    let folder = Folder::new("extra-names");
    let engine = engine(fsdp::comm::single::init(), &EngineConfig::default());
    let mut data = [0u8; 8];
    let mut attempt = |names: &[&str], null: bool| {
        let data = if null { std::ptr::null_mut() } else { data.as_mut_ptr() };
        let extra = |n: &&str| ExtraTensor { name: n.to_string(), dtype: Dtype::U8, shape: vec![8], data };
        let contents = Contents { extras: names.iter().map(extra).collect(), ..Contents::default() };
        // SAFETY: the data has 8 bytes.
        let e = unsafe { save(&engine, &folder.join("c"), &contents) }.unwrap_err();
        assert_eq!(e.status, Status::InvalidArgument, "{e}");
        e.message
    };
    assert!(attempt(&["embed"], false).contains("\"embed\" is given twice, or is a parameter"));
    assert!(attempt(&["x", "x"], false).contains("\"x\" is given twice"));
    assert!(attempt(&["a:b"], false).contains("no name of a tensor"));
    assert!(attempt(&[""], false).contains("no name of a tensor"));
    assert!(attempt(&["x"], true).contains("the data of tensor \"x\" is NULL"));
    assert!(fs::read_dir(&folder.0).unwrap().next().is_none());
}

/// All safetensors files of a folder: name, their texts, and their tensors with offsets and values.
fn files_of(dir: &Path) -> Vec<(String, HashMap<String, String>, Vec<u8>)> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names.retain(|n| n.ends_with(".safetensors"));
    let read = |name: String| {
        let bytes = fs::read(dir.join(&name)).unwrap();
        let about = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone().unwrap_or_default();
        (name, about, bytes)
    };
    names.into_iter().map(read).collect()
}

#[test]
fn every_file_says_where_its_boxes_belong() {
    let folder = Folder::new("boxes");
    for world in [1, 2, 3, 5] {
        let dir = folder.join(&format!("c{world}"));
        save_at(world, &dir);
        let mut seen: HashMap<(String, Vec<usize>), f32> = HashMap::new();
        for (file, about, bytes) in files_of(&dir) {
            let places: Value = serde_json::from_str(&about["DCP_SHARDING_INFO"]).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            for (name, view) in tensors.tensors() {
                let offsets: Vec<usize> = places[&name]["saved_offsets"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|o| o.as_u64().unwrap() as usize)
                    .collect();
                assert_eq!(offsets.len(), view.shape().len(), "{file} {name}");
                if view.dtype() != Dtype::F32 {
                    assert!(offsets.iter().all(|o| *o == 0));
                    continue;
                }
                for (i, four) in view.data().chunks_exact(4).enumerate() {
                    let mut rest = i;
                    let mut index = offsets.clone();
                    for d in (0..index.len()).rev() {
                        index[d] += rest % view.shape()[d];
                        rest /= view.shape()[d];
                    }
                    let old = seen.insert((name.clone(), index), f32::from_le_bytes(four.try_into().unwrap()));
                    assert!(old.is_none(), "{file}: {name} twice");
                }
            }
        }
        // Every element of every parameter is there once, at its indices.
        assert_eq!(seen.len(), SHAPES.iter().map(|(_, s)| s.iter().product::<i64>() as usize).sum::<usize>());
        for ((name, index), found) in seen {
            let p = SHAPES.iter().position(|(n, _)| *n == name).unwrap();
            let flat = index.iter().zip(SHAPES[p].1).fold(0, |f, (i, d)| f * *d as usize + i);
            assert_eq!(found, value(p, flat), "{name} {index:?}");
        }
    }
}

const ROWS: usize = 1400;
const COLUMNS: usize = 3001;

/// One parameter of several blocks.
fn wide_engine(comm: std::sync::Arc<dyn fsdp::comm::Communicator>) -> Engine {
    let data: Vec<f32> = (0..ROWS * COLUMNS).map(|i| i as f32).collect();
    let mut tree = ModuleTree::new("Wide");
    let shape = [ROWS as i64, COLUMNS as i64];
    tree.add_param(ROOT, "w", &shape, DType::F32, true, data.as_ptr().cast()).unwrap();
    // SAFETY: the data outlives the call.
    unsafe { Engine::new(&tree, comm, &EngineConfig::default()) }.unwrap()
}

/// Bytes that this thread has read through system calls.
fn bytes_read() -> u64 {
    let io = fs::read_to_string("/proc/thread-self/io").expect("Linux says what a thread has read");
    io.lines().find_map(|l| l.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn a_rank_reads_its_part_and_no_more_than_the_blocks_around_it() {
    let folder = Folder::new("blocks");
    let dir = folder.join("c");
    let save_wide = |comm| {
        // SAFETY: there are no states.
        unsafe { save(&wide_engine(comm), &dir, &Contents::default()) }.unwrap()
    };
    ranks(2, save_wide);
    const BLOCK: u64 = 4 << 20;
    for world in [1, 2, 3, 4] {
        ranks(world, |comm| {
            let engine = wide_engine(comm);
            engine.begin_write().unwrap();
            let mine = piece(&engine, 0);
            mine.fill(-1.0);
            let before = bytes_read();
            // SAFETY: there are no states.
            unsafe { load(&engine, &dir, &Contents::default()) }.unwrap();
            let (read, wanted) = (bytes_read() - before, mine.len() as u64 * 4);
            // Twice, to check and to fill; the first time at most the rest of a block at each end of each of the two pieces,
            // headers, and the edges' short files.
            assert!(read >= 2 * wanted && read < 2 * wanted + 4 * BLOCK, "{read} bytes read for {wanted}");
            let first = engine.plan().params[0].piece.param_offset;
            assert!(mine.iter().enumerate().all(|(i, v)| *v == (first + i) as f32));
        });
    }
    assert_eq!(verify(&dir).unwrap(), (ROWS * COLUMNS * 4) as u64);

    // Of a consolidated model a rank reads its bytes, twice, and headers, no more.
    consolidate(&dir, &folder.join("whole"), &ConsolidateOptions::default()).unwrap();
    ranks(3, |comm| {
        let engine = wide_engine(comm);
        engine.begin_write().unwrap();
        let mine = piece(&engine, 0);
        mine.fill(-1.0);
        let before = bytes_read();
        // SAFETY: there are no states.
        unsafe { load(&engine, &folder.join("whole"), &Contents::default()) }.unwrap();
        let (read, wanted) = (bytes_read() - before, mine.len() as u64 * 4);
        assert!(read >= 2 * wanted && read < 2 * wanted + 4096, "{read} bytes read for {wanted}");
        let first = engine.plan().params[0].piece.param_offset;
        assert!(mine.iter().enumerate().all(|(i, v)| *v == (first + i) as f32));
    });

    // A bit in the last block is found by whoever reads it, and stops all.
    let path = dir.join("shard-00002-of-00002.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 4;
    fs::write(&path, bytes).unwrap();
    ranks(3, |comm| {
        let engine = wide_engine(comm);
        engine.begin_write().unwrap();
        piece(&engine, 0).fill(-1.0);
        // SAFETY: there are no states.
        let e = unsafe { load(&engine, &dir, &Contents::default()) }.unwrap_err();
        assert!(e.message.contains("parameter \"w\" is damaged") && e.message.contains("shard-00002"), "{e}");
        assert!(piece(&engine, 0).iter().all(|v| *v == -1.0));
    });
    assert!(verify(&dir).unwrap_err().message.contains("parameter \"w\" is damaged"));
    let e = consolidate(&dir, &folder.join("out"), &ConsolidateOptions::default()).unwrap_err();
    assert!(e.message.contains("parameter \"w\" is damaged"), "{e}");
    assert!(!folder.join("out").exists() && !folder.join(".out.incomplete").exists());
}

#[test]
fn consolidated_tensors_are_whole_and_load_again() {
    let folder = Folder::new("whole");
    let dir = folder.join("c");
    save_at(3, &dir);
    // 13 * 7 floats need 364 bytes; two files at least.
    for (name, max, files) in [("one", 0, 1), ("two", 400, 2), ("many", 1, 7)] {
        let out = folder.join(name);
        consolidate(&dir, &out, &ConsolidateOptions { max_file_bytes: max, dtype: None }).unwrap();
        let found = files_of(&out);
        assert_eq!(found.len(), files, "{name}");
        let index = fs::read_to_string(out.join("model.safetensors.index.json"));
        let mut names = Vec::new();
        for (file, about, bytes) in &found {
            assert_eq!(about["format"], "pt");
            for (tensor, view) in SafeTensors::deserialize(bytes).unwrap().tensors() {
                assert_eq!(view.data().as_ptr() as usize % view.dtype().bitsize().div_ceil(8).min(4), 0, "aligned");
                if let Ok(index) = &index {
                    let index: Value = serde_json::from_str(index).unwrap();
                    assert_eq!(index["weight_map"][&tensor], json!(file));
                    assert_eq!(index["metadata"]["total_size"], json!(4 * (91 + 35 + 5 + 1 + 1) + 8 + 6));
                }
                names.push(tensor);
            }
        }
        assert_eq!(index.is_ok(), files > 1);
        names.sort();
        assert_eq!(names, ["a.bias", "a.mask", "a.none", "a.weight", "b.scale", "b.weight", "count", "embed"]);
        for world in [1, 2, 4] {
            load_at(world, &out, Contents::default, 1.0).into_iter().for_each(|r| r.unwrap());
        }
        ranks(2, |comm| {
            let engine = engine(comm, &EngineConfig::default());
            let mut buffers = Buffers::new(9);
            // SAFETY: as in `save_at`.
            unsafe { load(&engine, &out, &buffers.contents()) }.unwrap();
            assert_eq!((buffers.count, buffers.mask), (vec![0], vec![0, 1, 0, 1, 0, 1]));
        });
        let e = consolidate(&dir, &out, &ConsolidateOptions::default()).unwrap_err();
        assert!(e.message.contains("exists already"), "{e}");
        // Cut anew.
        let again = folder.join(&format!("{name}-again"));
        consolidate(&out, &again, &ConsolidateOptions { max_file_bytes: 500, dtype: None }).unwrap();
        load_at(2, &again, Contents::default, 1.0).into_iter().for_each(|r| r.unwrap());
        assert!(verify(&again).is_ok());
    }
    let summary = inspect(&folder.join("one")).unwrap();
    assert!(summary.world_size.is_none() && summary.tensors.iter().all(|t| t.kind.is_none()));
    let summary = inspect(&dir).unwrap();
    assert_eq!((summary.world_size, summary.metadata["step"].as_str()), (Some(3), "7"));
    let kinds: Vec<_> = summary.tensors.iter().map(|t| (t.name.as_str(), t.kind)).collect();
    assert_eq!(kinds[0], ("embed", Some(Kind::Parameter)));
    assert_eq!(kinds[7], ("count", Some(Kind::Extra)));
}

#[test]
fn parameters_are_rounded_on_demand() {
    let folder = Folder::new("rounded");
    let dir = folder.join("c");
    save_at(2, &dir);
    for dtype in [DType::F16, DType::BF16] {
        let out = folder.join(dtype.name());
        consolidate(&dir, &out, &ConsolidateOptions { max_file_bytes: 0, dtype: Some(dtype) }).unwrap();
        let bytes = fs::read(out.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let embed = tensors.tensor("embed").unwrap();
        assert_eq!((embed.dtype().bitsize(), tensors.tensor("count").unwrap().dtype()), (16, Dtype::I64));
        for (i, two) in embed.data().chunks_exact(2).enumerate() {
            let two = [two[0], two[1]];
            match dtype {
                DType::F16 => assert_eq!(half::f16::from_le_bytes(two), half::f16::from_f32(value(0, i))),
                _ => assert_eq!(half::bf16::from_le_bytes(two), half::bf16::from_f32(value(0, i))),
            }
        }
        // Multiples of 1/4 below 2^11 are exact in float16.
        if dtype == DType::F16 {
            load_at(2, &out, Contents::default, 1.0).into_iter().for_each(|r| r.unwrap());
        }
    }
    let e = consolidate(&dir, &folder.join("x"), &ConsolidateOptions { max_file_bytes: 0, dtype: Some(DType::I32) });
    assert_eq!(e.unwrap_err().status, Status::Unsupported);
    // What float16 cannot hold is no infinity.
    let engine = engine(fsdp::comm::single::init(), &EngineConfig::default());
    engine.begin_write().unwrap();
    piece(&engine, 1)[3] = 1e6;
    let large = folder.join("large");
    // SAFETY: there are no states.
    unsafe { save(&engine, &large, &Contents::default()) }.unwrap();
    let options = ConsolidateOptions { max_file_bytes: 0, dtype: Some(DType::F16) };
    let e = consolidate(&large, &folder.join("y"), &options).unwrap_err();
    assert!(e.message.contains("\"a.weight\" has a number that float16 cannot hold"), "{e}");
    assert!(!folder.join("y").exists());
}
