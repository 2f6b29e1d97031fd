//! `fsdp devices` on a machine that has none of CUDA's libraries, or other ones under their names.

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
