//! Saving: each rank writes its own files; rank 0 prepares the folder, adds the manifest, and makes it visible.

use super::boxes::{boxes, TensorBox};
use super::contents::{Contents, Entry, Listing};
use super::folder::{aside, Incomplete};
use super::gather;
use super::manifest::{checksum, key, File, Manifest, Metadata, Piece, BLOCK, MANIFEST};
use super::writer::{write_text, Spec, Writer};
use crate::comm::Communicator;
use crate::engine::Engine;
use crate::error::{err, Error, Result};
use serde_json::{json, Map, Value};
use std::path::Path;

/// Saves the shards of `engine` and `contents` into the new folder `dir`. Collective: same folder, on a file system that
/// all ranks share, and states and extra tensors of the same names on every rank. Any rank's failure is the error of all,
/// and leaves nothing under `dir`. Refused while the engine has a save in the background.
///
/// # Safety
/// The data of states and extra tensors must be readable.
pub unsafe fn save(engine: &Engine, dir: &Path, contents: &Contents) -> Result<()> {
    let comm = engine.world().as_ref();
    let mut listing = engine.saves().require_idle().and_then(|()| Listing::to_save(engine, contents));
    if let (true, Ok(list)) = (engine.shards_on_gpu(), &mut listing) {
        // SAFETY: as below.
        if let Err(e) = unsafe { list.copy(engine) } {
            listing = Err(e);
        }
    }
    let description = listing.as_ref().map(|l| l.description(contents)).unwrap_or_default();
    // SAFETY: the caller's promise for states and extras; the shards belong to the engine.
    unsafe { write(comm, dir, listing, &description, &contents.metadata) }
}

/// `save` of what was listed. Collective: `description` is compared.
///
/// # Safety
/// The memory of the listing's entries is readable and not written meanwhile.
pub unsafe fn write(
    comm: &dyn Communicator,
    dir: &Path,
    listing: Result<Listing>,
    description: &str,
    metadata: &Metadata,
) -> Result<()> {
    // Rank 0's; on every early return below it removes what was written.
    let mut folder = None;
    let ready = listing.as_ref().map_err(Error::clone).and_then(|_| {
        aside(dir)?;
        if comm.rank() == 0 {
            folder = Some(Incomplete::create(dir)?);
        }
        Ok(format!("{}\n{}", dir.display(), checksum(description.as_bytes())))
    });
    let agreed = gather(comm, ready)?;
    if let Some(rank) = agreed.iter().position(|a| *a != agreed[0]) {
        return Err(err!(
            Mismatch,
            "rank 0 and rank {rank} save different checkpoints: another folder, or other states or tensors ({} against {})",
            agreed[0].replace('\n', " "),
            agreed[rank].replace('\n', " ")
        ));
    }
    let listing = listing?;

    // SAFETY: the caller's promise.
    let mine = aside(dir).and_then(|aside| unsafe { write_files(&aside, &listing) });
    let mine = mine.and_then(|files| serde_json::to_string(&files).map_err(|e| err!(Checkpoint, "{e}")));
    let files = gather(comm, mine)?;

    let finished = match folder {
        Some(folder) => finish(folder, comm.world_size(), &listing, &files, metadata),
        None => Ok(()),
    };
    gather(comm, finished.map(|()| String::new())).map(|_| ())
}

/// One box of an entry.
struct Part<'a> {
    entry: &'a Entry,
    part: TensorBox,
}

/// Writes this rank's files into `aside`: the largest box of every entry into the first, the next into the second, ...
///
/// # Safety
/// As [`write`].
unsafe fn write_files(aside: &Path, listing: &Listing) -> Result<Vec<File>> {
    let Some(stem) = &listing.stem else { return Ok(Vec::new()) };
    let mut files: Vec<Vec<Part>> = vec![Vec::new()];
    for entry in &listing.entries {
        let mut parts = boxes(&listing.tensors[entry.tensor].shape, entry.first, entry.len);
        parts.sort_by_key(|b| std::cmp::Reverse(b.len));
        for (k, part) in parts.into_iter().enumerate() {
            if files.len() == k {
                files.push(Vec::new());
            }
            files[k].push(Part { entry, part });
        }
    }
    let write = |(k, mut parts): (usize, Vec<Part>)| {
        let name = match k {
            0 => format!("{stem}.safetensors"),
            k => format!("{stem}-part-{}.safetensors", k + 1),
        };
        parts.sort_by_key(|p| std::cmp::Reverse(listing.tensors[p.entry.tensor].dtype.bitsize()));
        // SAFETY: the caller's promise.
        unsafe { write_file(aside, name, listing, &parts) }
    };
    files.into_iter().enumerate().map(write).collect()
}

/// # Safety
/// As [`write`].
unsafe fn write_file(aside: &Path, name: String, listing: &Listing, parts: &[Part]) -> Result<File> {
    let tensor = |p: &Part| &listing.tensors[p.entry.tensor];
    let specs: Vec<Spec> = parts
        .iter()
        .map(|p| Spec {
            key: key(&tensor(p).name, p.entry.state.as_deref()),
            dtype: tensor(p).dtype,
            shape: p.part.sizes.clone(),
        })
        .collect();
    // Where each box belongs, as torch.distributed.checkpoint's HuggingFaceStorageReader looks for it.
    let places: Map<String, Value> =
        specs.iter().zip(parts).map(|(s, p)| (s.key.clone(), json!({ "saved_offsets": p.part.offsets }))).collect();
    let about = Metadata::from([
        ("format".to_string(), "pt".to_string()),
        ("DCP_VERSION".to_string(), "1.0".to_string()),
        ("DCP_SHARDING_INFO".to_string(), Value::Object(places).to_string()),
    ]);
    let mut writer = Writer::create(&aside.join(&name), &specs, &about)?;
    let mut pieces = Vec::with_capacity(parts.len());
    for Part { entry, part } in parts {
        // SAFETY: the caller's promise.
        let bytes = unsafe { listing.slice(entry) };
        let size = listing.tensors[entry.tensor].dtype.bitsize() / 8;
        let bytes = &bytes[(part.first - entry.first) * size..][..part.len * size];
        let (offset, checksums) = writer.write_piece(bytes)?;
        let (tensor, state) = (entry.tensor, entry.state.clone());
        pieces.push(Piece { tensor, state, first: part.first, len: part.len, offset, checksums });
    }
    let written = writer.finish()?;
    Ok(File {
        name,
        bytes: written.bytes,
        header_bytes: written.header_bytes,
        header_checksum: written.header_checksum,
        pieces,
    })
}

fn finish(folder: Incomplete, world: usize, listing: &Listing, files: &[String], metadata: &Metadata) -> Result<()> {
    let files: std::result::Result<Vec<Vec<File>>, _> = files.iter().map(|f| serde_json::from_str(f)).collect();
    let files = files.map_err(|e| err!(Checkpoint, "a rank's list of pieces cannot be read: {e}"))?;
    let manifest = Manifest {
        world_size: world,
        block_bytes: BLOCK,
        tensors: listing.tensors.clone(),
        files: files.into_iter().flatten().collect(),
        metadata: metadata.clone(),
    };
    write_text(&folder.path().join(MANIFEST), &manifest.to_text()?)?;
    folder.publish()
}
