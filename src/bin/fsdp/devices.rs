//! `fsdp devices`: the devices of this machine, and the libraries that drive them.

use crate::text::{bytes, print};
use fsdp::comm::nccl::Nccl;
use fsdp::device::cuda::{self, Compiler, DeviceInfo, Driver};
use fsdp::error::Result;
use serde_json::{json, Value};

#[derive(clap::Args)]
pub struct DevicesArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A library that was found, and where.
struct Found {
    version: String,
    path: String,
}

struct Report {
    cores: usize,
    driver: Result<Found>,
    gpus: Vec<DeviceInfo>,
    compiler: Result<Found>,
    nccl: Result<Found>,
}

/// Runs the command; returns the exit status.
pub fn devices(args: &DevicesArgs) -> i32 {
    let report = Report::new();
    print(&match args.json {
        true => format!("{:#}\n", report.json()),
        false => report.text(),
    })
}

impl Report {
    fn new() -> Report {
        let gpus = cuda::devices();
        let driver = Driver::get().and_then(|d| {
            let (major, minor) = d.version()?;
            Ok(Found { version: format!("CUDA {major}.{minor}"), path: d.path().to_string() })
        });
        Report {
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            // A driver that cannot describe its GPUs cannot be used.
            driver: gpus.as_ref().map_err(Clone::clone).map(|_| ()).and(driver),
            gpus: gpus.unwrap_or_default(),
            compiler: Compiler::get().and_then(|c| {
                let (major, minor) = c.version()?;
                Ok(Found { version: format!("CUDA {major}.{minor}"), path: c.path().to_string() })
            }),
            nccl: Nccl::get().map(|n| {
                let (major, minor, patch) = n.version();
                Found { version: format!("{major}.{minor}.{patch}"), path: n.path().to_string() }
            }),
        }
    }

    fn text(&self) -> String {
        let cores = if self.cores == 1 { "core" } else { "cores" };
        let mut text = format!("CPU     {} {cores}\n", self.cores);
        for gpu in &self.gpus {
            let ((major, minor), memory) = (gpu.capability, bytes(gpu.memory as u64));
            let pools = if gpu.has_pools { "" } else { ", no memory pools" };
            text += &format!(
                "GPU {:<3} {}, compute capability {major}.{minor}, {} multiprocessors, {memory}{pools}\n",
                gpu.ordinal, gpu.name, gpu.multiprocessors
            );
        }
        for (name, found) in [("driver", &self.driver), ("NVRTC", &self.compiler), ("NCCL", &self.nccl)] {
            text += &match found {
                Ok(found) => format!("{name:<7} {}, {}\n", found.version, found.path),
                Err(e) => format!("{name:<7} {}\n", e.message),
            };
        }
        if self.driver.is_ok() && self.gpus.is_empty() {
            text += "The driver sees no GPU.\n";
        }
        text
    }

    fn json(&self) -> Value {
        let found = |found: &Result<Found>| match found {
            Ok(found) => json!({ "version": found.version, "path": found.path }),
            Err(e) => json!({ "error": e.to_string() }),
        };
        let gpu = |gpu: &DeviceInfo| {
            json!({
                "ordinal": gpu.ordinal,
                "name": gpu.name,
                "compute_capability": [gpu.capability.0, gpu.capability.1],
                "multiprocessors": gpu.multiprocessors,
                "memory_bytes": gpu.memory,
                "memory_pools": gpu.has_pools,
            })
        };
        json!({
            "cpu_cores": self.cores,
            "gpus": self.gpus.iter().map(gpu).collect::<Vec<_>>(),
            "driver": found(&self.driver),
            "nvrtc": found(&self.compiler),
            "nccl": found(&self.nccl),
        })
    }
}
