//! `fsdp plan` as a user meets it: descriptions, safetensors files and indices in, a table or JSON out.

use safetensors::tensor::TensorView;
use safetensors::Dtype;
use serde_json::{json, Value};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A folder that is removed again.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("fsdp-plan-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    }

    /// A safetensors file of zeros.
    fn tensors(&self, name: &str, tensors: &[(&str, Dtype, &[usize])]) -> String {
        let data = vec![0; 1 << 16];
        let views = tensors.iter().map(|(name, dtype, shape)| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (*name, TensorView::new(*dtype, shape.to_vec(), &data[..bytes]).unwrap())
        });
        let path = self.0.join(name);
        safetensors::serialize_to_file(views, None, &path).unwrap();
        path.to_str().unwrap().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn plan(args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsdp"));
    let output = command.arg("plan").args(args).stdin(Stdio::null()).output().expect("fsdp starts");
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("ended by itself"), text(output.stdout), text(output.stderr))
}

/// The JSON of a plan that succeeds.
fn planned(args: &[&str]) -> Value {
    let (code, out, err) = plan(&[&["--json"], args].concat());
    assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
    serde_json::from_str(&out).unwrap()
}

/// The message of a plan that fails with `code`.
fn refused(code: i32, text: &str, args: &[&str]) {
    let (got, out, err) = plan(args);
    assert_eq!((got, out.as_str()), (code, ""), "{args:?}: {err}");
    assert!(err.contains(text), "{args:?}: {err}");
}

fn unit_names(plan: &Value) -> Vec<&str> {
    plan["units"].as_array().unwrap().iter().map(|u| u["name"].as_str().unwrap()).collect()
}

/// embed [6, 4], two blocks of up.weight [4, 8] and bias [4] (frozen), head: bias [6] and embed's weight.
const NET: &str = r#"{ "class": "Net", "modules": {
    "embed": { "class": "Embedding", "parameters": { "weight": [6, 4] } },
    "layers": { "repeat": 2, "class": "Block", "parameters": {
        "up.weight": [4, 8], "bias": { "shape": [4], "trained": false } } },
    "head": { "parameters": { "bias": [6] }, "tied": { "weight": "embed.weight" } } } }"#;

#[test]
fn gpus_are_planned_with_their_pools() {
    let folder = Folder::new("gpus");
    let net = folder.write("net.json", NET);
    let on_gpu = |more: &[&str]| planned(&[&["-n", "2", "--wrap", "Block", "--device", "cuda", &net], more].concat());
    let figures = |p: &Value| {
        ["pool_bytes", "gradient_slot_bytes", "device_peak_bytes", "offloaded_bytes"].map(|n| p[n].as_u64().unwrap())
    };
    // The root and a block, 160 bytes each, and one ahead; two nest, so three slots. Shards are 80 bytes, aligned to 64.
    let (pool, slots, shards) = (3 * 160, 3 * 160, 2 * 3 * 128);
    let p = on_gpu(&[]);
    assert_eq!(figures(&p), [pool, slots, pool + slots + shards + 8 * 60, 0]);
    assert_eq!((&p["device"], &p["host_peak_bytes"]), (&json!("cuda"), &json!(0)));
    assert_eq!(figures(&on_gpu(&["--prefetch", "0"]))[0], 2 * 160);
    assert_eq!(figures(&on_gpu(&["--max-units-in-flight", "1", "--gradient-slots", "1"]))[..2], [160, 160]);
    assert_eq!(figures(&on_gpu(&["--param-dtype", "bfloat16"]))[..2], [3 * 80, slots]);
    assert_eq!(figures(&on_gpu(&["--reduce-dtype", "bfloat16"]))[..2], [pool, 3 * 240]);
    let p = on_gpu(&["--cpu-offload"]);
    assert_eq!(figures(&p), [pool, slots, pool + slots, 3 * 128]);
    // Both ranks' shards, and the optimizer's state of 94 trained elements.
    assert_eq!(p["host_peak_bytes"], 2 * shards + 8 * 94);
    let (code, table, _) = plan(&["-n", "2", "--wrap", "Block", "--device", "cuda", &net]);
    assert_eq!(code, 0);
    assert!(table.contains("peak on its GPU") && !table.contains("shm"), "{table}");
    assert_eq!(planned(&["-n", "2", "--cpu-offload", &net])["device_peak_bytes"], 0);
    for option in ["--prefetch", "--max-units-in-flight"] {
        refused(1, "are for --device cuda", &["-n", "2", option, "1", &net]);
    }
    refused(2, "invalid value 'tpu'", &["-n", "2", "--device", "tpu", &net]);
    refused(2, "invalid value '0'", &["-n", "2", "--device", "cuda", "--max-units-in-flight", "0", &net]);
}

#[test]
fn a_description_is_planned_as_it_is_wrapped() {
    let folder = Folder::new("description");
    let net = folder.write("net.json", NET);
    let p = planned(&["--world-size", "2", "--wrap", "Block", &net]);
    assert_eq!(unit_names(&p), ["", "layers.0", "layers.1"]);
    assert_eq!((&p["numel"], &p["trained_numel"]), (&json!(102), &json!(94)));
    // The root has 24 at 0 and 6 at 32: 38 elements, in shards of 20; a block 32 and 4: 36, in shards of 20.
    assert_eq!(p["param_shard_bytes"], 4 * 60);
    assert_eq!(p["padding_bytes"], 4 * (10 + 4 + 4));
    // Rank 0 has 20 of the root and 20 of each block, all trained.
    assert_eq!((&p["rank"], &p["optimizer_bytes"]), (&json!(0), &json!(8 * 60)));
    let traffic = |count: u64, bytes: u64| json!({"collectives": count, "bytes": bytes, "sent_bytes": bytes / 2, "sent_messages": count});
    // The root's 160 bytes once, the blocks' for forward and for backward.
    assert_eq!((&p["all_gather"], &p["reduce_scatter"]), (&traffic(5, 160 + 4 * 160), &traffic(3, 480)));

    let p = planned(&[
        "-n",
        "2",
        "--wrap",
        "Block",
        "--rank",
        "1",
        "--strategy",
        "shard-grad-op",
        "--optimizer",
        "4",
        "--reduce-dtype",
        "bfloat16",
        "--gradient-slots",
        "1",
        &net,
    ]);
    // Rank 1 has 4 + 6 of the root, 12 of each block's weight.
    assert_eq!((&p["rank"], &p["optimizer_bytes"]), (&json!(1), &json!(4 * 34)));
    assert_eq!((&p["all_gather"], &p["reduce_scatter"]), (&traffic(3, 480), &traffic(3, 240)));
    assert_eq!((&p["gradient_slot_bytes"], &p["unsharded_peak_bytes"]), (&json!(160), &json!(480)));

    let p = planned(&[
        "-n",
        "2",
        "--wrap",
        "Block",
        "--param-dtype",
        "bfloat16",
        "--grads-in-param-dtype",
        "--gradient-slots",
        "1",
        &net,
    ]);
    assert_eq!((&p["gradient_slot_bytes"], &p["grads_in_param_dtype"]), (&json!(80), &json!(true)));

    let p = planned(&["-n", "1", "--unit", "layers.*", "--unit", "layers.1.up", "--optimizer", "sgd", &net]);
    assert_eq!(unit_names(&p), ["", "layers.0", "layers.1", "layers.1.up"]);
    assert_eq!(p["optimizer_bytes"], 0);
    let p = planned(&["-n", "1", "--min-numel", "32", &net]);
    assert_eq!(unit_names(&p), ["", "layers.0.up", "layers.1.up"]);
    // The tied weight belongs to the innermost unit around both of its users: the root.
    let p = planned(&["-n", "1", "--unit", "embed", "--unit", "head", "--ignore", "layers.**", &net]);
    assert_eq!((unit_names(&p), &p["numel"]), (vec!["", "embed", "head"], &json!(30)));
    assert_eq!((&p["units"][0]["numel"], &p["units"][1]["numel"]), (&json!(24), &json!(0)));
}

#[test]
fn a_table_has_human_numbers_and_units() {
    let folder = Folder::new("table");
    let net = folder.write("net.json", r#"{ "parameters": { "a.weight": [1024, 1024], "b.weight": [512, 1024] } }"#);
    let (code, out, err) = plan(&["-n", "4", "--unit", "*", "--units", &net]);
    assert_eq!((code, err.as_str()), (0, ""));
    let has = |words: &[&str]| out.lines().any(|l| words.iter().all(|w| l.contains(w)));
    assert!(has(&["model", "1.57 million", "3 units"]), "{out}");
    assert!(has(&["parameter shards", "1.50 MiB"]) && has(&["optimizer state", "3.00 MiB"]), "{out}");
    assert!(has(&["unit buffers", "6.00 MiB"]) && has(&["all-gathers", " 4 ", "12.00 MiB"]), "{out}");
    assert!(has(&["b ", "524.29 thousand", "512.00 KiB", "0 B"]) && has(&["planned in"]), "{out}");
    // No host holds so many ranks: nothing is said about one.
    let (_, out, _) = plan(&["-n", "1000", &net]);
    assert!(!out.contains("one host") && out.contains("(root)") != out.contains("reduce-scatters"), "{out}");
}

#[test]
fn safetensors_headers_and_indices_are_models() {
    let folder = Folder::new("safetensors");
    let first: [(&str, Dtype, &[usize]); 2] =
        [("model.layers.0.w", Dtype::F32, &[8, 8]), ("model.embed.weight", Dtype::BF16, &[10, 4])];
    let second: [(&str, Dtype, &[usize]); 2] = [("model.layers.1.w", Dtype::F32, &[8, 8]), ("steps", Dtype::I64, &[])];
    let a = folder.tensors("a.safetensors", &first);
    let b = folder.tensors("b.safetensors", &second);
    refused(1, "\"steps\" is I64", &["-n", "2", &a, &b]);
    refused(1, "--ignore 'step': no parameter", &["-n", "2", "--ignore", "step", &a]);
    let wrapped = ["-n", "2", "--unit", "model.layers.*", "--ignore", "steps"];
    let p = planned(&[&wrapped[..], &[&a, &b]].concat());
    assert_eq!((unit_names(&p), &p["numel"]), (vec!["", "model.layers.0", "model.layers.1"], &json!(168)));
    assert!(p["notes"][0].as_str().unwrap().starts_with("bfloat16 tensors (1) have float32 shards"));
    // The BF16 tensor is a copy of 40 elements in the root, and the root's buffer counts it so where bytes move.
    assert_eq!((&p["compute_buffer_bytes"], &p["unsharded_peak_bytes"]), (&json!(128), &json!(2 * 40 + 4 * 64)));
    let wide = planned(&[&wrapped[..], &["--param-dtype", "float32", &a, &b]].concat());
    assert_eq!((&wide["compute_buffer_bytes"], &wide["all_gather_bytes_moved"]), (&json!(0), &json!(0)));
    let narrow = planned(&[&wrapped[..], &["--param-dtype", "float16", &a, &b]].concat());
    assert_eq!(narrow["compute_buffer_bytes"], 128 + 2 * 128);
    assert_eq!(
        (&narrow["all_gather_bytes_moved"], &narrow["unit_buffer_bytes"]),
        (&json!(168), &p["unit_buffer_bytes"])
    );
    let described =
        folder.write("types.json", r#"{ "parameters": { "w": { "shape": [64], "dtype": "bfloat16" }, "v": [64] } }"#);
    let types = planned(&["-n", "2", &described]);
    assert_eq!(
        (&types["compute_buffer_bytes"], &types["unsharded_peak_bytes"]),
        (&json!(128), &json!(2 * 64 + 4 * 64))
    );
    let described = folder.write("double.json", r#"{ "parameters": { "w": { "shape": [4], "dtype": "float64" } } }"#);
    refused(1, "parameter \"w\" cannot be float64", &["-n", "2", &described]);

    let map = |w: &str, file: &str| {
        json!({"metadata": {"total_size": 1}, "weight_map": {"model.layers.0.w": "a.safetensors",
        "model.embed.weight": "a.safetensors", "steps": "b.safetensors", w: file}})
    };
    let index = folder.write("model.safetensors.index.json", &map("model.layers.1.w", "b.safetensors").to_string());
    assert_eq!(planned(&[&wrapped[..], &[&index]].concat()), p);
    let index = folder.write("wrong.json", &map("model.layers.2.w", "b.safetensors").to_string());
    refused(1, "\"model.layers.2.w\" is said to be in b.safetensors", &["-n", "2", &index]);
    let index = folder.write("less.json", &map("steps", "b.safetensors").to_string());
    refused(1, "\"model.layers.1.w\" is in b.safetensors, which the index does not say", &["-n", "2", &index]);
    let index = folder.write("lost.json", r#"{"weight_map": {"w": "c.safetensors"}}"#);
    refused(1, "c.safetensors: No such file", &["-n", "2", &index]);
    refused(1, "\"model.layers.0.w\" is registered already", &["-n", "2", &a, &a]);
    refused(1, "give it alone", &["-n", "2", &a, &index]);

    let bytes = std::fs::read(&a).unwrap();
    std::fs::write(folder.0.join("cut"), &bytes[..bytes.len() - 1]).unwrap();
    refused(1, "cut: is no safetensors file", &["-n", "2", folder.0.join("cut").to_str().unwrap()]);
    refused(1, "empty: is no safetensors file", &["-n", "2", &folder.write("empty", "")]);
    refused(1, "is no file", &["-n", "2", folder.0.to_str().unwrap()]);
}

#[test]
fn mistakes_are_named() {
    let folder = Folder::new("mistakes");
    let net = folder.write("net.json", NET);
    refused(2, "--world-size", &[&net]);
    refused(2, "0", &["-n", "0", &net]);
    refused(2, "adamw, sgd or a number", &["-n", "2", "--optimizer", "adam?", &net]);
    refused(2, "full-shard", &["-n", "2", "--strategy", "none", &net]);
    refused(1, "rank 2 does not exist in a world of 2", &["-n", "2", "--rank", "2", &net]);
    refused(1, "5000 bytes of optimizer state", &["-n", "2", "--optimizer", "5000", &net]);
    refused(
        1,
        "no module has the class \"Blok\"; the model has Block, Embedding",
        &["-n", "2", "--wrap", "Blok", &net],
    );
    refused(
        1,
        "--unit 'layer.*': no module has such a name; the model has embed",
        &["-n", "2", "--unit", "layer.*", &net],
    );
    refused(1, "none.json: No such file", &["-n", "2", "none.json"]);
    for (text, message) in [
        ("{", "EOF"),
        ("[]", "an object is expected"),
        (r#"{"parameter": {}}"#, "unknown field `parameter`"),
        (r#"{"parameters": {"w": "big"}}"#, "a shape, or"),
        (r#"{"parameters": {"w": {"shape": [1], "frozen": true}}}"#, "a shape, or"),
        (r#"{"parameters": {"w": [-1]}}"#, "\"w\" has the negative dimension -1"),
        (r#"{"parameters": {"w": [1], "w": [2]}}"#, "\"w\" is registered already"),
        (r#"{"parameters": {"w": [1], "w.x": [2]}}"#, "\"w\" is registered already"),
        (r#"{"parameters": {"a..b": [1]}}"#, "is no name"),
        (r#"{"parameters": {"w": [4611686018427387904, 4]}}"#, "\"w\" has more bytes"),
        (r#"{"parameters": {"w": [1]}, "tied": {"v": "u"}}"#, "tied to \"u\", which the model has not"),
        (r#"{"modules": {"l": {"repeat": 1000000, "parameters": {"w": [1]}}}}"#, "at most 100000"),
        (r#"{"repeat": 2, "parameters": {"w": [1]}}"#, "the root module cannot be repeated"),
        ("{}", "no parameters"),
        (r#"{"weight_map": 3}"#, "invalid type"),
    ] {
        let file = folder.write("bad.json", text);
        refused(1, message, &["-n", "2", &file]);
        refused(1, "bad.json: ", &["-n", "2", &file]);
    }
}

#[test]
fn the_example_of_405_billion_parameters_pads_little_on_16384_ranks() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/plan/llama_405b.json");
    let p = planned(&["-n", "16384", "--wrap", "LlamaDecoderLayer", file.to_str().unwrap()]);
    assert_eq!((&p["numel"], unit_names(&p).len()), (&json!(405_853_388_800u64), 127));
    let (padding, all) = (p["padding_bytes"].as_u64().unwrap(), 4 * p["numel"].as_u64().unwrap());
    assert!(padding * 100 < all, "{padding} of {all} bytes");
}
