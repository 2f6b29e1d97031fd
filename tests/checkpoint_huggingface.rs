//! Models that others have written in Hugging Face's layout: loaded, or refused by file and tensor.

mod common;
#[path = "common/loading.rs"]
mod loading;

use common::{engine, ranks, value, Folder, SHAPES};
use fsdp::checkpoint::{load, Contents};
use fsdp::config::EngineConfig;
use loading::{load_at, refused};
use safetensors::tensor::TensorView;
use safetensors::Dtype;
use serde_json::json;
use std::fs;
use std::path::Path;

/// A Hugging Face folder of the common model, values times `scale`, in two files with an index.
fn foreign(dir: &Path, dtype: Dtype, scale: f32, skip: &str, wrong: &str) {
    fs::create_dir_all(dir).unwrap();
    let mut weight_map = serde_json::Map::new();
    for (file, params) in
        [("model-00001-of-00002.safetensors", 0..2), ("model-00002-of-00002.safetensors", 2..SHAPES.len())]
    {
        let mut data: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for p in params.filter(|p| SHAPES[*p].0 != skip) {
            let (name, shape) = SHAPES[p];
            let mut shape: Vec<usize> = shape.iter().map(|d| *d as usize).collect();
            let numel = shape.iter().product::<usize>();
            let bytes = (0..numel).flat_map(|i| {
                let x = value(p, i) * scale;
                match dtype {
                    Dtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
                    Dtype::BF16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
                    Dtype::F64 => f64::from(x).to_le_bytes().to_vec(),
                    _ => x.to_le_bytes().to_vec(),
                }
            });
            let bytes = bytes.collect();
            if name == wrong {
                shape.reverse();
            }
            weight_map.insert(name.into(), json!(file));
            data.push((name.to_string(), shape, bytes));
        }
        // A tensor that the model does not have.
        let extra = format!("rope.{}", weight_map.len());
        weight_map.insert(extra.clone(), json!(file));
        data.push((extra, vec![1], vec![0; dtype.bitsize() / 8]));
        let views = data.iter().map(|(n, s, b)| (n.clone(), TensorView::new(dtype, s.clone(), b).unwrap()));
        safetensors::serialize_to_file(views, None, &dir.join(file)).unwrap();
    }
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": weight_map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn models_of_others_load_at_any_world_size() {
    let folder = Folder::new("foreign");
    // Scaled so that 16 bits hold the values exactly.
    for (dtype, scale) in [(Dtype::F32, 0.7), (Dtype::F16, 1.0), (Dtype::BF16, 0.0)] {
        let dir = folder.join(&format!("{dtype:?}"));
        foreign(&dir, dtype, scale, "", "");
        for world in [1, 2, 3] {
            load_at(world, &dir, Contents::default, scale).into_iter().for_each(|r| r.unwrap());
            let index = dir.join("model.safetensors.index.json");
            load_at(world, &index, Contents::default, scale).into_iter().for_each(|r| r.unwrap());
        }
    }
    let dir = folder.join("f64");
    foreign(&dir, Dtype::F64, 1.0, "", "");
    refused(2, &dir, Contents::default, &["parameter \"embed\"", "F64 [13, 7]", "F32 [13, 7]"]);
    let dir = folder.join("lacks");
    foreign(&dir, Dtype::F32, 1.0, "a.bias", "");
    refused(2, &dir, Contents::default, &["it has no parameter \"a.bias\""]);
    let dir = folder.join("wrong");
    foreign(&dir, Dtype::F32, 1.0, "", "a.weight");
    refused(2, &dir, Contents::default, &["parameter \"a.weight\"", "[5, 7]", "[7, 5]"]);
}

#[test]
fn damaged_models_of_others_are_refused() {
    let folder = Folder::new("foreign-damage");
    let made = |name: &str| {
        let dir = folder.join(name);
        foreign(&dir, Dtype::F32, 1.0, "", "");
        dir
    };
    const SECOND: &str = "model-00002-of-00002.safetensors";
    let dir = made("cut");
    let bytes = fs::read(dir.join(SECOND)).unwrap();
    fs::write(dir.join(SECOND), &bytes[..bytes.len() - 4]).unwrap();
    refused(2, &dir, Contents::default, &[SECOND, "but its header says"]);
    let dir = made("gone");
    fs::remove_file(dir.join(SECOND)).unwrap();
    refused(2, &dir, Contents::default, &[SECOND]);
    let dir = made("garbage");
    fs::write(dir.join(SECOND), vec![0xff; 300]).unwrap();
    refused(2, &dir, Contents::default, &[SECOND, "no safetensors file"]);
    let dir = made("index");
    let path = dir.join("model.safetensors.index.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"a.bias\":", "\"a.bios\":")).unwrap();
    refused(2, &dir, Contents::default, &["a.bi"]);
    // States are only in checkpoints of ours.
    let dir = made("states");
    ranks(2, |comm| {
        let engine = engine(comm, &EngineConfig::default());
        let mut data = vec![0.0f32; 91];
        let state = fsdp::checkpoint::StateTensor { param: 0, name: "exp_avg".into(), data: data.as_mut_ptr() };
        // SAFETY: the state has room for the whole parameter.
        let e = unsafe { load(&engine, &dir, &Contents { states: vec![state], ..Contents::default() }) }.unwrap_err();
        assert!(e.message.contains("state \"exp_avg\" of parameter \"embed\" is not (all) in it"), "{e}");
    });
}
