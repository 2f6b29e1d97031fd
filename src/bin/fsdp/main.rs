//! The `fsdp` command-line tool: reads the arguments and calls the command's file.

mod checkpoint;
mod devices;
mod launch;
mod output;
mod plan;
mod run;
mod signals;
mod text;

use clap::{Parser, Subcommand};

/// Fully sharded data parallel training: the command-line tool.
#[derive(Parser)]
#[command(name = "fsdp", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start N ranks of a program on this machine and watch over them.
    ///
    /// Each rank gets torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR,
    /// MASTER_PORT, TORCHELASTIC_RUN_ID) and, unless it is already set, OMP_NUM_THREADS = cores / N. Standard input
    /// goes to rank 0 when it is not a terminal; the other ranks read end of file.
    ///
    /// SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 are passed on to every rank; a third SIGINT or SIGTERM ends the
    /// ranks at once. The exit status is 0 when every rank succeeded, else that of the rank that failed first
    /// (128 + the signal's number for a rank that a signal ended; 127: program not found; 126: it cannot be executed;
    /// 2: bad arguments).
    #[command(verbatim_doc_comment)]
    Run(launch::RunArgs),

    /// Say what a model will take and move when it is sharded, without loading it.
    ///
    /// FILE is a safetensors file (only its header is read; several files are one model), an index of such files
    /// (model.safetensors.index.json), or a description in JSON:
    ///
    ///   { "class": "Net",
    ///     "parameters": { "scale": [], "bias": { "shape": [64], "trained": false } },
    ///     "modules": {
    ///       "embed": { "class": "Embedding", "parameters": { "weight": [32000, 512] } },
    ///       "layers": { "repeat": 8, "class": "Block", "parameters": { "up.weight": [2048, 512] } },
    ///       "head": { "tied": { "weight": "embed.weight" } } } }
    ///
    /// Every part is optional; dots in names make modules, and "repeat" makes the modules layers.0 to layers.7. What no
    /// other unit has belongs to the root's. Parameters are planned as float32, the type that the engine keeps. A step
    /// is one forward and one backward that use each unit once. The exit status is 0, 1 for a model that cannot be
    /// planned, or 2 for bad arguments.
    #[command(verbatim_doc_comment)]
    Plan(plan::PlanArgs),

    /// Say which devices there are to compute on, and which libraries drive them.
    ///
    /// What is missing is said with what was looked for and where. FSDP_CUDA_LIBRARY, FSDP_NVRTC_LIBRARY and FSDP_NCCL_LIBRARY may
    /// name the files. The exit status is 0, or 2 for bad arguments.
    #[command(verbatim_doc_comment)]
    Devices(devices::DevicesArgs),

    /// Look at a checkpoint, or write it as Hugging Face's libraries read it.
    #[command(subcommand)]
    Checkpoint(checkpoint::CheckpointCommand),
}

fn main() {
    let code = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Plan(args) => plan::plan(&args),
        Command::Devices(args) => devices::devices(&args),
        Command::Checkpoint(command) => checkpoint::run(&command),
    };
    std::process::exit(code);
}
