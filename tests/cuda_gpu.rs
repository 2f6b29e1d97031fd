//! CUDA as it is on this machine. Each test says so and passes where there is no driver, GPU, compiler or NCCL.
//!
//! Libraries that the system does not find by name: FSDP_CUDA_LIBRARY, FSDP_NVRTC_LIBRARY, FSDP_NCCL_LIBRARY.

mod cuda;
#[path = "cuda/engine.rs"]
#[allow(dead_code)]
mod engine;
#[path = "cuda/hooks.rs"]
mod hooks;
#[path = "nccl/step.rs"]
mod step;

use cuda::gpu::Gpu;
use cuda::{elements, reductions};
use engine::{same, Case, Place, Trainer};
use fsdp::comm::nccl::{Nccl, NcclComm, NcclConfig, UniqueId};
use fsdp::comm::{shm, single};
use fsdp::config::{EngineConfig, Strategy};
use fsdp::device::cuda::{compile, devices, kernels, Compiler, Context};
use fsdp::dtype::DType;
use fsdp::engine::ReshardAfterForward;
use fsdp::optim::{AdamWOptions, Rule, SgdOptions};
use hooks::Change;
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
    assert!([80, 90].iter().all(|arch| known.contains(arch)), "{known:?}");
    std::thread::scope(|scope| known.iter().for_each(|arch| drop(scope.spawn(|| assembles(compiler, *arch)))));
    for arch in [known[0], 90, known[known.len() - 1]] {
        let made = compile::compile_for(compiler, &format!("compute_{arch}"), &[]).unwrap();
        assert_eq!(made.log, "", "compute_{arch}");
        let text = String::from_utf8(made.code).unwrap();
        for name in kernels::NAMES {
            let name = name.to_str().unwrap();
            let (_, after) = text.split_once(&format!(".entry {name}(")).unwrap_or_else(|| panic!("{name}: {text}"));
            let body = after.split(".entry").next().unwrap();
            let sixteen = ["ld.global.v4", "st.global.v4"].map(|access| body.matches(access).count());
            let want = sixteen_bytes_at_a_time(name);
            assert!(sixteen[0] >= want[0] && sixteen[1] >= want[1], "{name} for compute_{arch}: {sixteen:?}");
        }
        // What is not rounded to nearest by name may be contracted later.
        for word in [".local", "fma.rn.f32", "mul.f32", "add.f32", "sub.f32", "approx.f32", "ftz.f32"] {
            assert!(!text.contains(word), "{word} for compute_{arch}");
        }
    }
    let e = compile::compile_for(compiler, "sm_1", &[]).err().unwrap();
    assert!(e.message.contains("sm_1"), "{e}");
}

/// Machine code, since the assembler finds what PTX alone does not; and what it says about registers.
fn assembles(compiler: &Compiler, arch: i32) {
    let verbose = [c"--ptxas-options=-v"];
    let made = compile::compile_for(compiler, &format!("sm_{arch}"), &verbose).unwrap();
    assert_eq!(made.code[..4], *b"\x7fELF", "sm_{arch}");
    assert!(!made.log.contains("warning"), "{}", made.log);
    for name in kernels::NAMES {
        let name = name.to_str().unwrap();
        let says = format!("Compiling entry function '{name}'");
        let (_, after) = made.log.split_once(&says).unwrap_or_else(|| panic!("{name} is not in: {}", made.log));
        let said = after.split("Compiling entry function").next().unwrap();
        let nothing = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
        assert!(said.contains(nothing), "{name} for sm_{arch}: {said}");
        let registers = said.split_once("Used ").unwrap().1.split(' ').next().unwrap().parse::<u32>().unwrap();
        assert!(registers <= 64, "four blocks of a multiprocessor: {name} for sm_{arch}: {said}");
    }
}

/// Loads and stores of 16 bytes for eight elements, as the kernel's source has them.
fn sixteen_bytes_at_a_time(kernel: &str) -> [usize; 2] {
    match kernel {
        "fsdp_cast_f32_bf16" | "fsdp_cast_f32_f16" => [2, 1],
        "fsdp_cast_bf16_f32" | "fsdp_cast_f16_f32" => [1, 2],
        "fsdp_scale_f32" | "fsdp_unscale" => [2, 2],
        "fsdp_scale_bf16" | "fsdp_scale_f16" => [1, 1],
        "fsdp_copy_in_f32" => [4, 2],
        "fsdp_copy_in_bf16" | "fsdp_copy_in_f16" => [3, 2],
        "fsdp_zero" => [0, 2],
        "fsdp_sgd" => [4, 2],
        "fsdp_sgd_momentum" => [6, 4],
        "fsdp_adamw" => [8, 6],
        "fsdp_norm_parts" => [2, 0],
        "fsdp_norm_join" => [0, 0],
        _ => panic!("{kernel}: what is to be expected?"),
    }
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

/// Cases that an engine on a GPU and one on the CPU train alike.
fn cases(worlds: usize) -> Vec<(&'static str, Case)> {
    let adamw = Rule::AdamW(AdamWOptions { lr: 0.01, weight_decay: 0.1, ..AdamWOptions::default() });
    let sgd = Rule::Sgd(SgdOptions { lr: 0.05, momentum: 0.9, ..SgdOptions::default() });
    let bf16 = EngineConfig { param_dtype: Some(DType::BF16), ..EngineConfig::default() };
    let offload = EngineConfig { cpu_offload: true, ..bf16.clone() };
    let mut all = vec![
        ("float32", Case { order: true, ..Case::new(EngineConfig::default(), adamw) }),
        ("bfloat16", Case { order: true, clip: Some(1.0), ..Case::new(bf16.clone(), sgd) }),
        ("accumulated", Case { micro: 2, sync: false, ..Case::new(bf16.clone(), adamw) }),
        ("offloaded", Case { micro: 2, ..Case::new(offload, adamw) }),
    ];
    if worlds == 1 {
        all.push(("reduced", Case::new(EngineConfig { reduce_dtype: DType::BF16, ..bf16.clone() }, adamw)));
    } else {
        let config = EngineConfig { strategy: Strategy::NoShard, ..bf16.clone() };
        all.push(("unsharded", Case { order: true, ..Case::new(config, adamw) }));
    }
    if worlds == 4 {
        let config = EngineConfig { strategy: Strategy::HybridShard, shard_size: 2, ..bf16.clone() };
        all.push(("in groups", Case { micro: 2, average: false, ..Case::new(config, adamw) }));
        let after_forward = Some(ReshardAfterForward::Over(2));
        all.push(("over two ranks", Case { order: true, after_forward, ..Case::new(bf16, adamw) }));
    }
    all
}

/// Hooks that they have.
const HOOKS: [Option<Change>; 3] = [None, Some(Change::Scale(0.3)), Some(Change::Round)];

/// NCCL sums in an order of its own, and multiplies before or after: the last bits differ, Adam's steps a little more.
fn close(got: &[Vec<f32>], want: &[Vec<f32>], what: &str) {
    for (k, (got, want)) in got.iter().flatten().zip(want.iter().flatten()).enumerate() {
        assert!((got - want).abs() <= 2e-3 * (1.0 + want.abs()), "{what}, element {k}: {got}, not {want}");
    }
}

#[test]
fn engines_on_a_gpu_train_as_on_the_cpu() {
    on_gpu(|_| {
        for (what, case) in cases(1) {
            for hook in HOOKS {
                let run = |place: Place| {
                    let trainer = Trainer::new(single::init(), place, &case);
                    hook.iter().for_each(|change| drop(hooks::set(&trainer, *change)));
                    trainer.train();
                    trainer.engine.synchronize().unwrap();
                    trainer.pieces()
                };
                same(&run(Place::gpu()), &run(Place::Cpu), &format!("{what}, hook {hook:?}"));
            }
        }
    });
}

/// This process again, once for each rank, on one GPU: to NCCL each is a host of its own.
#[test]
fn ranks_on_one_gpu_train_as_on_the_cpu() {
    const RANK: &str = "FSDP_GPU_TEST_RANK";
    if let Ok(text) = std::env::var(RANK) {
        let numbers: Vec<&str> = text.split(' ').collect();
        let (job, rank, world) = (numbers[0], numbers[1].parse().unwrap(), numbers[2].parse().unwrap());
        return train_as_rank(job, rank, world);
    }
    on_gpu(|_| {
        if let Err(e) = Nccl::get() {
            return skip(e);
        }
        for world in [2, 4] {
            let start = |rank: usize| {
                std::process::Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "ranks_on_one_gpu_train_as_on_the_cpu", "--nocapture"])
                    .env(RANK, format!("fsdp-gpu-{}-{world} {rank} {world}", std::process::id()))
                    .env("NCCL_HOSTID", format!("rank-{rank}"))
                    .spawn()
                    .unwrap()
            };
            let processes: Vec<_> = (0..world).map(start).collect();
            let ends: Vec<bool> = processes.into_iter().map(|mut p| p.wait().unwrap().success()).collect();
            assert!(ends.iter().all(|ok| *ok), "{world} ranks: {ends:?}");
        }
    });
}

fn train_as_rank(job: &str, rank: usize, world: usize) {
    for (k, (what, case)) in cases(world).into_iter().enumerate() {
        let run = |place: Place, name: &str| {
            let mut config = shm::Config::new(format!("{job}-{k}-{name}"), rank, world);
            config.timeout = Duration::from_secs(120);
            let trainer = Trainer::new(shm::init(&config).unwrap(), place, &case);
            if k == 0 {
                hooks::set(&trainer, Change::Scale(0.3));
            }
            trainer.train();
            trainer.engine.synchronize().unwrap();
            trainer.pieces()
        };
        close(&run(Place::gpu(), "gpu"), &run(Place::Cpu, "cpu"), &format!("{what}, rank {rank} of {world}"));
    }
}
