//! `fsdp devices` on a machine that has none of CUDA's libraries, or other ones under their names.

#[path = "cuda/fake.rs"]
mod fake;

use serde_json::Value;
use std::process::{Command, Stdio};

const VARIABLES: [(&str, &str); 3] =
    [("driver", "FSDP_CUDA_LIBRARY"), ("nvrtc", "FSDP_NVRTC_LIBRARY"), ("nccl", "FSDP_NCCL_LIBRARY")];

/// `fsdp devices ARGS` with all libraries at `file`: exit status and standard output.
fn devices(args: &[&str], file: &str) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fsdp"));
    command.arg("devices").args(args).stdin(Stdio::null()).envs(VARIABLES.map(|(_, variable)| (variable, file)));
    let output = command.output().expect("fsdp starts");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    (output.status.code().expect("no signal"), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_machine_without_them_says_what_was_looked_for() {
    let (code, text) = devices(&[], "/nonexistent/lib.so");
    assert_eq!(code, 0, "{text}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[0].starts_with("CPU ") && lines[0].contains(" core"), "{text}");
    for (line, words) in
        lines[1..].iter().zip([["driver", "CUDA's driver"], ["NVRTC", "compiler"], ["NCCL", "NCCL was"]])
    {
        assert!(line.starts_with(words[0]) && line.contains(words[1]), "{text}");
        assert!(line.contains("was not found") && line.contains("/nonexistent/lib.so"), "{text}");
    }
}

#[test]
fn json_has_the_same() {
    let (code, text) = devices(&["--json"], "/nonexistent/lib.so");
    assert_eq!(code, 0, "{text}");
    let found: Value = serde_json::from_str(&text).unwrap();
    assert!(found["cpu_cores"].as_u64().unwrap() > 0);
    assert_eq!(found["gpus"].as_array().unwrap().len(), 0);
    for (name, variable) in VARIABLES {
        let e = found[name]["error"].as_str().unwrap();
        assert!(e.starts_with("unsupported: ") && e.contains(variable), "{e}");
    }
}

#[test]
fn another_library_under_that_name_is_an_error_that_names_the_function() {
    let (code, text) = devices(&[], "libc.so.6");
    assert_eq!(code, 0, "{text}");
    for function in ["cuInit", "nvrtcCompileProgram", "ncclGetVersion"] {
        assert!(text.contains(&format!("has no function {function}")), "{text}");
    }
}

#[test]
fn gpus_are_described() {
    let library = fake::library();
    let library = library.to_str().unwrap();
    let (code, text) = devices(&[], library);
    assert_eq!(code, 0, "{text}");
    for words in
        ["GPU 0   Fake GPU, compute capability 9.0, 4 multiprocessors, 1.00 GiB\n", "driver  CUDA 13.2, ", library]
    {
        assert!(text.contains(words), "{words} is not in: {text}");
    }
    assert!(text.contains("NCCL    NCCL has no function ncclGetVersion"), "{text}");
    let found: Value = serde_json::from_str(&devices(&["--json"], library).1).unwrap();
    assert_eq!(found["gpus"][0]["compute_capability"], serde_json::json!([9, 0]));
    assert_eq!(found["driver"]["version"], "CUDA 13.2");
    assert_eq!(found["nvrtc"]["path"], library);
}
