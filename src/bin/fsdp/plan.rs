//! `fsdp plan`: what a model will take and move when it is sharded, from its description alone.

use fsdp::config::{CudaConfig, EngineConfig, Strategy};
use fsdp::dtype::DType;
use fsdp::forecast::{Forecast, Request};
use fsdp::module::ModuleTree;
use std::path::PathBuf;
use std::time::Instant;

mod description;
mod files;
mod pattern;
mod report;

#[derive(clap::Args)]
pub struct PlanArgs {
    /// How many ranks share the model.
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    world_size: u32,

    /// full-shard: units are unsharded only while they compute; shard-grad-op: from forward to backward; no-shard: always.
    /// hybrid-shard and hybrid-shard-grad-op: so within groups of --shard-size ranks, which are replicas of each other.
    #[arg(long, value_name = "NAME", default_value = "full-shard", value_parser = strategy)]
    strategy: Strategy,

    /// Ranks of a shard group, for the hybrid strategies.
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    shard_size: u32,

    /// The type that gradients are rounded to before they are summed.
    #[arg(long, value_name = "TYPE", default_value = "float32", value_parser = ["float32", "float16", "bfloat16"])]
    reduce_dtype: String,

    /// What parameters are computed in; registered: each in the type it has in FILE.
    #[arg(long, value_name = "TYPE", default_value = "registered",
          value_parser = ["registered", "float32", "float16", "bfloat16"])]
    param_dtype: String,

    /// Gradients come in the type that parameters are computed in, and are collected in it: as LibTorch's do.
    #[arg(long)]
    grads_in_param_dtype: bool,

    /// adamw (8 bytes of state per element), sgd (0), or a number of bytes: 4 for SGD with momentum.
    #[arg(long, value_name = "NAME|BYTES", default_value = "adamw", value_parser = optimizer)]
    optimizer: u32,

    /// Gradient buffers per rank; default: one more than units nest.
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    gradient_slots: u32,

    /// Where ranks compute: cpu, or cuda, each on a GPU of its own.
    #[arg(long, value_name = "cpu|cuda", default_value = "cpu", value_parser = ["cpu", "cuda"])]
    device: String,

    /// On GPUs: units gathered ahead of their use, where training gives an order; default: 1.
    #[arg(long, value_name = "N")]
    prefetch: Option<u32>,

    /// On GPUs: unit buffers at most; default: as many as units nest, and those for units ahead.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_units_in_flight: Option<u32>,

    /// Shards, gradient shards and optimizer state lie in host memory.
    #[arg(long)]
    cpu_offload: bool,

    /// Make every module of this class a unit (descriptions in JSON that give classes). May be repeated.
    #[arg(long, value_name = "CLASS")]
    wrap: Vec<String>,

    /// Make every module with such a name a unit: * is anything but a dot, ** anything; e.g. 'model.layers.*'. May be
    /// repeated.
    #[arg(long, value_name = "PATTERN")]
    unit: Vec<String>,

    /// Then make a unit of every module that has at least so many elements in no unit yet, innermost first.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    min_numel: Option<u64>,

    /// Leave out parameters with such a name, as in --unit (buffers that a file holds too). May be repeated.
    #[arg(long, value_name = "PATTERN")]
    ignore: Vec<String>,

    /// Whose bytes to show; default: the rank with the most.
    #[arg(long, value_name = "RANK")]
    rank: Option<u32>,

    /// Show every unit, too.
    #[arg(long)]
    units: bool,

    /// Print JSON: every number in bytes, and every unit.
    #[arg(long)]
    json: bool,

    /// Safetensors files, or one *.json: an index (model.safetensors.index.json) or a description.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// How the command line calls a strategy.
fn strategy_name(strategy: Strategy) -> String {
    strategy.name().to_lowercase().replace('_', "-")
}

fn strategy(text: &str) -> Result<Strategy, String> {
    let known = Strategy::ALL.into_iter().find(|s| strategy_name(*s) == text);
    known.ok_or_else(|| format!("one of {} is expected", Strategy::ALL.map(strategy_name).join(", ")))
}

fn optimizer(text: &str) -> Result<u32, String> {
    match text {
        "adamw" => Ok(8),
        "sgd" => Ok(0),
        _ => text.parse().map_err(|_| "adamw, sgd or a number of bytes per element is expected".to_string()),
    }
}

/// What was read: a model, and what the reader has to say about it.
pub struct Described {
    tree: ModuleTree,
    /// Lines for the user about what was assumed.
    notes: Vec<String>,
}

/// Prints the plan; returns the exit status.
pub fn plan(args: &PlanArgs) -> i32 {
    let start = Instant::now();
    match described(args).and_then(|model| Ok((forecast(args, &model.tree)?, model))) {
        Ok((forecast, model)) if args.json => report::json(args, &forecast, &model),
        Ok((forecast, model)) => report::table(args, &forecast, &model, start.elapsed()),
        Err(message) => {
            eprintln!("fsdp: {message}");
            1
        }
    }
}

/// The model of the files, wrapped.
fn described(args: &PlanArgs) -> Result<Described, String> {
    let mut model = files::read(&args.files, &args.ignore)?;
    let tree = &mut model.tree;
    for p in &args.unit {
        pattern::wrap(tree, p)?;
    }
    for class in &args.wrap {
        fsdp::wrap::by_class(tree, class)
            .map_err(|e| format!("--wrap {class}: {}. Names of modules are matched by --unit", e.message))?;
    }
    if let Some(min_numel) = args.min_numel {
        fsdp::wrap::by_size(tree, min_numel).map_err(|e| e.message)?;
    }
    Ok(model)
}

fn forecast(args: &PlanArgs, tree: &ModuleTree) -> Result<Forecast, String> {
    let dtype = |name: &String| DType::ALL.into_iter().find(|d| d.name() == name);
    let cuda = match (args.device.as_str(), args.prefetch, args.max_units_in_flight) {
        ("cuda", prefetch, most) => {
            let default = CudaConfig::default();
            let prefetch = prefetch.map_or(default.prefetch, |n| n as usize);
            Some(CudaConfig { prefetch, max_units_in_flight: most.unwrap_or(0) as usize, ..default })
        }
        (_, None, None) => None,
        _ => return Err("--prefetch and --max-units-in-flight are for --device cuda".to_string()),
    };
    let config = EngineConfig {
        gradient_slots: args.gradient_slots,
        strategy: args.strategy,
        shard_size: args.shard_size,
        reduce_dtype: dtype(&args.reduce_dtype).ok_or("unknown type")?,
        param_dtype: dtype(&args.param_dtype),
        grads_in_param_dtype: args.grads_in_param_dtype,
        cpu_offload: args.cpu_offload,
        cuda,
        ..EngineConfig::default()
    };
    let request = Request {
        world_size: args.world_size as usize,
        rank: args.rank.map(|r| r as usize),
        config,
        optimizer_bytes_per_element: args.optimizer,
    };
    Forecast::new(tree, &request).map_err(|e| e.message)
}
