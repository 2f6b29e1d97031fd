//! Builds the driver and compiler that are this machine's CPU (fake_driver.cpp), with the engine's kernels in it.

use fsdp::device::cuda::{compile, kernels};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Accesses of 16 bytes at other addresses than the GPU allows end the process, as does everything else that is
/// undefined.
const FLAGS: &str = "-std=c++17 -O1 -ffp-contract=off -fno-strict-aliasing -fsanitize=undefined \
                     -fsanitize-undefined-trap-on-error -Wall -Wextra -Werror -fPIC -shared";

/// The library, made once for every version of its sources.
pub fn library() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda");
    let kernels_cu = compile::SOURCES.concat();
    let names: Vec<String> = kernels::NAMES.iter().map(|n| format!("X({})", n.to_str().unwrap())).collect();
    let mut all = kernels_cu.clone() + &names.concat() + FLAGS;
    for file in ["words.hpp", "fake_driver.cpp"] {
        all += &std::fs::read_to_string(here.join(file)).unwrap();
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(folder).unwrap();
    let library = folder.join(format!("libfake-cuda-{:016x}.so", xxhash_rust::xxh3::xxh3_64(all.as_bytes())));
    if library.exists() {
        return library;
    }
    // Other tests may be doing the same: under a name of this process's own, then renamed.
    let own = |name: &str| folder.join(format!("{}-{name}", std::process::id()));
    let (source, made) = (own("kernels.cu"), own("fake.so"));
    std::fs::write(&source, kernels_cu).unwrap();
    let compiler = std::env::var("CXX").unwrap_or("c++".to_string());
    let done = Command::new(&compiler)
        .args(FLAGS.split(' '))
        .arg(format!("-DKERNELS(X)={}", names.join(" ")))
        .arg(format!("-DKERNEL_SOURCES=\"{}\"", source.display()))
        .args([Path::new("-o"), &made, &here.join("fake_driver.cpp")])
        .output()
        .unwrap_or_else(|e| panic!("{compiler}: {e}"));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    std::fs::remove_file(source).unwrap();
    std::fs::rename(made, &library).unwrap();
    library
}
