//! `fsdp checkpoint`: what a checkpoint has, whether it is intact, and the same as Hugging Face's libraries read it.

use crate::text::{bytes, count, print};
use fsdp::checkpoint::{self, ConsolidateOptions, Kind, Summary};
use fsdp::dtype::DType;
use serde_json::{json, Value};
use std::path::{Path, PathBuf};

#[derive(clap::Subcommand)]
pub enum CheckpointCommand {
    /// Say what a checkpoint has, without reading it.
    ///
    /// DIR is a folder that a save made, or a model in Hugging Face's layout (a folder, a *.safetensors, an index). The
    /// exit status is 0, 1 for a checkpoint that is incomplete, damaged or absent, or 2 for bad arguments.
    #[command(verbatim_doc_comment)]
    Inspect(InspectArgs),

    /// Write parameters and buffers, whole, as Hugging Face's libraries read them.
    ///
    /// OUT must not exist; it gets model.safetensors, or several files and model.safetensors.index.json. Optimizer state and
    /// the caller's texts stay behind; buffers keep their type. Needs memory for 4 MiB, whatever the model's size. The exit
    /// status is 0, 1 for a failure, which leaves no OUT, or 2 for bad arguments.
    #[command(verbatim_doc_comment)]
    Consolidate(ConsolidateArgs),
}

#[derive(clap::Args)]
pub struct InspectArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,

    /// Read everything and compare all checksums, too.
    #[arg(long)]
    verify: bool,

    /// The checkpoint.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

#[derive(clap::Args)]
pub struct ConsolidateArgs {
    /// Bytes of tensors per file, unless a single one has more: a number, or with KB, MB, GB, TB, KiB, MiB, GiB or TiB.
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    max_shard_size: u64,

    /// What parameters are rounded to, to nearest; default: as they are.
    #[arg(long, value_name = "TYPE", value_parser = ["float32", "float16", "bfloat16"])]
    dtype: Option<String>,

    /// The checkpoint.
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// The new folder.
    #[arg(value_name = "OUT")]
    out: PathBuf,
}

fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let factor = match text[digits..].trim() {
        "" | "B" => Some(1),
        "KB" => Some(1000),
        "MB" => Some(1000_u64.pow(2)),
        "GB" => Some(1000_u64.pow(3)),
        "TB" => Some(1000_u64.pow(4)),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        "TiB" => Some(1 << 40),
        _ => None,
    };
    let bytes = text[..digits].parse::<u64>().ok().zip(factor).and_then(|(n, factor)| n.checked_mul(factor));
    bytes.filter(|n| *n > 0).ok_or_else(|| "a size is expected, such as 5GB or 500MiB".to_string())
}

/// Runs the command; returns the exit status.
pub fn run(command: &CheckpointCommand) -> i32 {
    let outcome = match command {
        CheckpointCommand::Inspect(args) => inspect(args),
        CheckpointCommand::Consolidate(args) => consolidate(args),
    };
    outcome.unwrap_or_else(|e| {
        eprintln!("fsdp: {}", e.message);
        1
    })
}

fn inspect(args: &InspectArgs) -> fsdp::error::Result<i32> {
    let summary = checkpoint::inspect(&args.dir)?;
    let verified = if args.verify { Some(checkpoint::verify(&args.dir)?) } else { None };
    Ok(match args.json {
        true => print(&format!("{:#}\n", as_json(&summary, verified))),
        false => print(&as_table(&args.dir, &summary, verified)),
    })
}

fn consolidate(args: &ConsolidateArgs) -> fsdp::error::Result<i32> {
    let dtype = args.dtype.as_deref().and_then(|name| DType::ALL.into_iter().find(|d| d.name() == name));
    let options = ConsolidateOptions { max_file_bytes: args.max_shard_size, dtype };
    checkpoint::consolidate(&args.dir, &args.out, &options)?;
    let made = checkpoint::inspect(&args.out)?;
    let total = bytes(made.files.iter().map(|f| f.1).sum());
    let (tensors, files) = (made.tensors.len(), made.files.len());
    Ok(print(&format!("{}: {tensors} tensors in {files} files, {total}\n", args.out.display())))
}

fn kind(kind: Option<Kind>) -> &'static str {
    match kind {
        Some(Kind::Parameter) => "parameter",
        Some(Kind::Extra) => "buffer",
        None => "tensor",
    }
}

fn as_json(s: &Summary, verified: Option<u64>) -> Value {
    let tensors = s.tensors.iter().map(|t| {
        let (kind, states) = (kind(t.kind), &t.states);
        let about = json!({ "dtype": t.dtype, "shape": t.shape, "bytes": t.bytes, "kind": kind, "states": states });
        (t.name.clone(), about)
    });
    let files = s.files.iter().map(|(name, bytes)| (name.clone(), json!(bytes)));
    json!({
        "layout": if s.world_size.is_some() { "sharded" } else { "huggingface" },
        "world_size": s.world_size,
        "tensors": tensors.collect::<serde_json::Map<_, _>>(),
        "files": files.collect::<serde_json::Map<_, _>>(),
        "metadata": s.metadata,
        "verified_bytes": verified,
    })
}

fn as_table(dir: &Path, s: &Summary, verified: Option<u64>) -> String {
    let mut text = match s.world_size {
        Some(world) => format!("{}: a checkpoint of {world} ranks\n", dir.display()),
        None => format!("{}: a model in Hugging Face's layout\n", dir.display()),
    };
    let names = s.tensors.iter().map(|t| &t.name).chain(s.files.iter().map(|f| &f.0));
    let width = names.map(String::len).max().unwrap_or(0);
    text += &format!("\n  {:<width$}  {:<6}{:<20}{:>12}  {}\n", "tensor", "dtype", "shape", "bytes", "kind, states");
    for t in &s.tensors {
        let about = std::iter::once(kind(t.kind)).chain(t.states.iter().map(String::as_str));
        let about = about.collect::<Vec<_>>().join(", ");
        let shape = format!("{:?}", t.shape);
        text += &format!("  {:<width$}  {:<6}{shape:<20}{:>12}  {about}\n", t.name, t.dtype, bytes(t.bytes));
    }
    text += &format!("\n  {:<width$}  {:>38}\n", "file", "bytes");
    for (name, size) in &s.files {
        text += &format!("  {name:<width$}  {:>38}\n", bytes(*size));
    }
    if !s.metadata.is_empty() {
        text += "\n  texts\n";
    }
    for (key, value) in &s.metadata {
        const SHOWN: usize = 100;
        let short: String = value.chars().take(SHOWN).collect();
        let more = if short.len() < value.len() { " ..." } else { "" };
        text += &format!("  {key}: {}{more}\n", short.escape_debug());
    }
    let numel: u64 = s.tensors.iter().map(|t| t.shape.iter().product::<usize>() as u64).sum();
    let total = s.files.iter().map(|f| f.1).sum();
    text += &format!("\n  {} tensors, {} elements, {} on disk", s.tensors.len(), count(numel), bytes(total));
    text += &match (verified, s.world_size) {
        (Some(n), Some(_)) => format!("; all checksums fit ({} of tensors)\n", bytes(n)),
        (Some(n), None) => format!("; complete ({} of tensors), without checksums to compare\n", bytes(n)),
        (None, _) => "\n".to_string(),
    };
    text
}
