//! CUDA as it is on this machine. Each test says so and passes where there is no driver, no GPU or no compiler.
//!
//! Libraries that the system does not find by name: FSDP_CUDA_LIBRARY, FSDP_NVRTC_LIBRARY.

mod cuda;

use cuda::gpu::Gpu;
use cuda::{elements, reductions};
use fsdp::device::cuda::{compile, devices, kernels, Compiler};

/// Runs `f` on the first GPU, if there is one.
fn on_gpu(f: impl FnOnce(&Gpu)) {
    match devices() {
        Ok(found) if !found.is_empty() => f(&Gpu::new()),
        Ok(_) => eprintln!("skipped: the driver sees no GPU"),
        Err(e) => eprintln!("skipped: {e}"),
    }
}

#[test]
fn the_compiler_takes_every_kernel() {
    let compiler = match Compiler::get() {
        Ok(compiler) => compiler,
        Err(e) => return eprintln!("skipped: {e}"),
    };
    let known = compiler.architectures().unwrap();
    for arch in [80, 90] {
        assert!(known.contains(&arch), "{known:?}");
        let code = compile::compile_for(compiler, &format!("sm_{arch}")).unwrap();
        assert_eq!(code[..4], *b"\x7fELF", "sm_{arch}");
        let text = String::from_utf8(compile::compile_for(compiler, &format!("compute_{arch}")).unwrap()).unwrap();
        for name in kernels::NAMES {
            assert!(text.contains(&format!(".entry {}(", name.to_str().unwrap())), "{name:?} for compute_{arch}");
        }
        assert!(text.contains("ld.global.v4") && text.contains("st.global.v4"), "16 bytes at a time");
        assert!(!text.contains("fma.rn.f32") && !text.contains(".local"), "no contraction, nothing spilled");
    }
    let e = compile::compile_for(compiler, "sm_1").unwrap_err();
    assert!(e.message.contains("sm_1"), "{e}");
}

#[test]
fn casts_on_a_gpu() {
    on_gpu(elements::casts);
}

#[test]
fn scaling_on_a_gpu() {
    on_gpu(elements::scaling);
}

#[test]
fn gradients_on_a_gpu() {
    on_gpu(elements::gradients);
}

#[test]
fn unscaling_on_a_gpu() {
    on_gpu(elements::unscaling);
}

#[test]
fn adamw_on_a_gpu() {
    on_gpu(reductions::adamw);
}

#[test]
fn sgd_on_a_gpu() {
    on_gpu(reductions::sgd);
}

#[test]
fn norms_on_a_gpu() {
    on_gpu(reductions::norms);
}
