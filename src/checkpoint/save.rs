//! Saving: each rank writes its own file; rank 0 prepares the folder, adds the manifest, and makes it visible.

use super::manifest::{checksum, File, Manifest, Metadata, Parameter, Piece, MANIFEST};
use super::{damaged, entries, gather, Entry, StateTensor};
use crate::dtype::DType;
use crate::engine::Engine;
use crate::error::{err, Error, Result};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Saves the shards of `engine` and `states` into the new folder `dir`, with `metadata` (rank 0's is kept).
/// Collective: same folder, on a file system that all ranks share, and states of the same parameters and names on
/// every rank. Any rank's failure is the error of all, and leaves nothing under `dir`.
///
/// # Safety
/// Each state's data must be readable for the parameter's piece.
pub unsafe fn save(engine: &Engine, dir: &Path, states: &[StateTensor], metadata: &Metadata) -> Result<()> {
    let comm = engine.comm().as_ref();
    let entries = entries(engine, states);
    let aside = aside(dir);

    // Rank 0's; on every early return below it removes what was written.
    let mut folder = None;
    let ready = entries.as_ref().map_err(Error::clone).and_then(|entries| {
        if comm.rank() == 0 {
            folder = Some(Incomplete::create(dir, aside.as_ref().map_err(Error::clone)?)?);
        }
        let names: Vec<String> = entries.iter().map(|e| e.label(engine)).collect();
        Ok(format!("{}\n{}", dir.display(), checksum(names.join("\n").as_bytes())))
    });
    let agreed = gather(comm, ready)?;
    if let Some(rank) = agreed.iter().position(|a| *a != agreed[0]) {
        return Err(err!(
            Mismatch,
            "rank 0 and rank {rank} save different checkpoints: another folder, or other states ({} against {})",
            agreed[0].replace('\n', " "),
            agreed[rank].replace('\n', " ")
        ));
    }
    let (entries, aside) = (entries?, aside?);

    // SAFETY: the caller's promise for the states; the shards belong to the engine.
    let mine = unsafe { write_shards(engine, &aside, &entries) };
    let mine = mine.and_then(|file| serde_json::to_string(&file).map_err(|e| err!(Checkpoint, "{e}")));
    let files = gather(comm, mine)?;

    let finished = match folder {
        Some(folder) => {
            let files: std::result::Result<Vec<File>, _> = files.iter().map(|f| serde_json::from_str(f)).collect();
            let files = files.map_err(|e| err!(Checkpoint, "a rank's list of pieces cannot be read: {e}"));
            files.and_then(|files| finish(engine, dir, &folder.0, files, metadata))
        }
        None => Ok(String::new()),
    };
    gather(comm, finished).map(|_| ())
}

/// A checkpoint being written; removed on drop. Once complete it has another name and there is nothing to remove.
struct Incomplete(PathBuf);

impl Incomplete {
    fn create(dir: &Path, aside: &Path) -> Result<Incomplete> {
        if dir.exists() {
            return Err(damaged(dir, "exists already: a checkpoint is never overwritten"));
        }
        if aside.exists() {
            fs::remove_dir_all(aside).map_err(|e| Error::os(format!("removing \"{}\"", aside.display()), e))?;
        }
        fs::create_dir_all(aside).map_err(|e| Error::os(format!("creating \"{}\"", aside.display()), e))?;
        Ok(Incomplete(aside.to_path_buf()))
    }
}

impl Drop for Incomplete {
    fn drop(&mut self) {
        // A failure here would hide the error that stopped the save; the next save removes it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Where the checkpoint is written before it is complete.
fn aside(dir: &Path) -> Result<PathBuf> {
    let name = dir.file_name().ok_or_else(|| err!(InvalidArgument, "\"{}\" names no folder", dir.display()))?;
    Ok(dir.with_file_name(format!(".{}.incomplete", name.to_string_lossy())))
}

/// # Safety
/// As [`save`].
unsafe fn write_shards(engine: &Engine, aside: &Path, entries: &[Entry]) -> Result<File> {
    let (rank, world) = (engine.comm().rank(), engine.comm().world_size());
    let name = format!("shard-{:05}-of-{world:05}.safetensors", rank + 1);
    let path = aside.join(&name);
    let mut tensors = Vec::new();
    let mut pieces = Vec::new();
    for e in entries.iter().filter(|e| e.len > 0) {
        // SAFETY: a piece of the engine's, or the caller's promise; nobody writes it during the save.
        let bytes = unsafe { std::slice::from_raw_parts(e.data.cast::<u8>(), e.len * DType::F32.size()) };
        let fqn = &engine.plan().params[e.param as usize].fqn;
        let tensor = match &e.state {
            None => fqn.clone(),
            Some(state) => format!("optimizer.{state}:{fqn}"),
        };
        let view = TensorView::new(Dtype::F32, vec![e.len], bytes).map_err(|e| damaged(&path, e))?;
        tensors.push((tensor.clone(), view));
        pieces.push(Piece {
            tensor,
            parameter: e.param as usize,
            state: e.state.clone(),
            first: e.first,
            len: e.len,
            checksum: checksum(bytes),
        });
    }
    let info = HashMap::from([("format".to_string(), "fsdp-shard".to_string())]);
    let os = |e| Error::os(format!("writing \"{}\"", path.display()), e);
    // The library writes a private temporary file; what a plain new file here may be read by is asked of one.
    let mode = fs::File::create(&path).and_then(|f| f.metadata()).map_err(os)?.permissions();
    safetensors::serialize_to_file(tensors, Some(info), &path)
        .map_err(|e| err!(Io, "writing \"{}\": {e}", path.display()))?;
    fs::set_permissions(&path, mode).map_err(os)?;
    let file = fs::File::open(&path).and_then(|f| f.sync_all().map(|()| f)).and_then(|f| f.metadata());
    let bytes = file.map_err(os)?.len();
    Ok(File { name, bytes, pieces })
}

fn finish(engine: &Engine, dir: &Path, aside: &Path, files: Vec<File>, metadata: &Metadata) -> Result<String> {
    let parameters = engine.plan().params.iter();
    let parameters = parameters
        .map(|p| Parameter { name: p.fqn.clone(), shape: p.shape.clone(), dtype: DType::F32.name().into() })
        .collect();
    let manifest =
        Manifest { world_size: engine.comm().world_size(), parameters, files, metadata: metadata.clone() }.to_text()?;
    let path = aside.join(MANIFEST);
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&path)?;
        file.write_all(manifest.as_bytes())?;
        file.sync_all()?;
        fs::File::open(aside)?.sync_all()?;
        fs::rename(aside, dir)?;
        match dir.parent() {
            Some(parent) if parent != Path::new("") => fs::File::open(parent)?.sync_all(),
            _ => fs::File::open(".")?.sync_all(),
        }
    };
    write().map_err(|e| Error::os(format!("completing the checkpoint \"{}\"", dir.display()), e))?;
    Ok(String::new())
}
