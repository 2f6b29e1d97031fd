//! Build script: names the shared library's soname and generates the C header.
//!
//! The header goes to `$OUT_DIR/fsdp.h`; with `FSDP_UPDATE_HEADER=1` in the environment also to
//! `include/fsdp.h`. A header that differs from the committed one is no build error: the drift check of
//! `make test` (scripts/check_abi.sh) reports it.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let root = PathBuf::from(var("CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(var("OUT_DIR")).join("fsdp.h");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libfsdp.so.{}", var("CARGO_PKG_VERSION_MAJOR"));
    for path in ["build.rs", "cbindgen.toml", "Cargo.toml", "src/capi"] {
        println!("cargo:rerun-if-changed={path}");
    }
    println!("cargo:rerun-if-env-changed=FSDP_UPDATE_HEADER");

    // A header that cannot be generated means Rust that cannot be parsed: rustc says so better than we could.
    if let Err(error) = generate(&root, &out) {
        println!("cargo:warning=include/fsdp.h was not generated: {error}");
        let _ = fs::remove_file(&out);
        return;
    }
    if env::var_os("FSDP_UPDATE_HEADER").is_some_and(|value| value == "1") {
        update(&out, &root.join("include/fsdp.h"));
        println!("cargo:rerun-if-changed=include/fsdp.h");
    }
}

fn var(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo did not set {name}"))
}

/// Writes the header of `src/capi/mod.rs` and the modules it declares, in that order; the rest of the crate is
/// not read, so nothing else of it can become part of the C interface.
fn generate(root: &Path, out: &Path) -> Result<(), String> {
    let mut config = cbindgen::Config::from_file(root.join("cbindgen.toml"))?;
    let mut macros = String::new();
    for part in ["MAJOR", "MINOR", "PATCH"] {
        let number = var(&format!("CARGO_PKG_VERSION_{part}"));
        macros.push_str(&format!("\n#define FSDP_VERSION_{part} {number}"));
    }
    config.after_includes = Some(format!("{macros}\n{}", config.after_includes.unwrap_or_default()));
    let builder = cbindgen::Builder::new().with_config(config).with_src(root.join("src/capi/mod.rs"));
    builder.generate().map_err(|error| error.to_string())?.write_to_file(out);
    Ok(())
}

/// Copies the header over the committed one, leaving an equal file (and its time stamp) alone.
fn update(from: &Path, to: &Path) {
    let new = fs::read(from).expect("the header was just written");
    if fs::read(to).ok().as_deref() != Some(&new) {
        fs::create_dir_all(to.parent().expect("include/fsdp.h has a parent")).expect("create include/");
        fs::write(to, new).expect("write include/fsdp.h");
    }
}
