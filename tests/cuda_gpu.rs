//! CUDA as it is on this machine. Each test says so and passes where there is no driver, GPU, compiler or NCCL.
//!
//! Libraries that the system does not find by name: FSDP_CUDA_LIBRARY, FSDP_NVRTC_LIBRARY, FSDP_NCCL_LIBRARY.

mod cuda;
#[path = "nccl/step.rs"]
mod step;

use cuda::gpu::Gpu;
use cuda::{elements, reductions};
use fsdp::comm::nccl::{Nccl, NcclComm, NcclConfig, UniqueId};
use fsdp::comm::single;
use fsdp::device::cuda::{compile, devices, kernels, Compiler, Context};
use fsdp::dtype::DType;
use std::io::Write;
use std::sync::Mutex;
use std::time::Duration;

/// Says why tests do nothing, each reason once, past the test runner, which keeps what passing tests print.
fn skip(why: impl std::fmt::Display) {
    static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let (why, mut said) = (format!("\nskipped: {why}\n"), SAID.lock().unwrap());
    if !said.contains(&why) {
        let _ = std::io::stderr().write_all(why.as_bytes());
        said.push(why);
    }
}

/// Runs `f` on the first GPU, if there is one.
fn on_gpu(f: impl FnOnce(&Gpu)) {
    match devices() {
        Ok(found) if !found.is_empty() => f(&Gpu::new()),
        Ok(_) => skip("the driver sees no GPU"),
        Err(e) => skip(e),
    }
}

#[test]
fn the_compiler_takes_every_kernel() {
    let compiler = match Compiler::get() {
        Ok(compiler) => compiler,
        Err(e) => return skip(e),
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
fn homes_on_a_gpu() {
    on_gpu(elements::homes);
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

#[test]
fn nccl_has_what_is_needed() {
    match Nccl::get() {
        Ok(nccl) => {
            assert!(nccl.version() >= (2, 18, 0), "{:?}", nccl.version());
            assert_eq!(nccl.fns.ncclCommRegister.is_some(), nccl.version() >= (2, 19, 0));
            assert_eq!(nccl.fns.ncclCommWindowRegister.is_some(), nccl.version() >= (2, 27, 0));
        }
        Err(e) => skip(e),
    }
}

#[test]
fn steps_on_a_gpu_equal_the_cpus() {
    on_gpu(|gpu| {
        let nccl = match Nccl::get() {
            Ok(nccl) => nccl,
            Err(e) => return skip(e),
        };
        let context: &std::sync::Arc<Context> = gpu.stream.context();
        for dtypes in [(DType::F32, DType::F32), (DType::BF16, DType::F32), (DType::BF16, DType::BF16)] {
            let config = NcclConfig { rank: 0, world_size: 1, timeout: Duration::from_secs(60) };
            let gather = NcclComm::new(nccl, context, &UniqueId::new(nccl).unwrap(), config).unwrap();
            let reduce = gather.split(0, 0, 0, 1).unwrap();
            step::train(single::init(), [gather, reduce], dtypes);
        }
    });
}
