//! A checkpoint to read from, of either kind: our shards with a manifest, or a folder as Hugging Face has them.
//!
//! Reads ranges of tensors, in blocks: memory is bounded, and what has checksums is compared before it is handed out. A
//! file is checked (its size, its header) when it is first opened. Ordinary reads, not maps: a file that is cut short while
//! it is read is an error, not the end of the process.

use super::huggingface;
use super::manifest::{checksum, File, Kind, Manifest, Metadata, Piece, Tensor, BLOCK, MANIFEST};
use super::{damaged, label};
use crate::error::Result;
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Files kept open at once.
const OPEN: usize = 16;

/// See the module's text.
pub struct Source {
    pub dir: PathBuf,
    pub tensors: Vec<Tensor>,
    pub files: Vec<File>,
    /// What a sharded checkpoint has besides; None for Hugging Face's layout, which has no checksums either.
    pub sharded: Option<Sharded>,
    block: usize,
    /// By name of tensor, its number.
    by_name: HashMap<String, usize>,
    /// By tensor and state, in order of first elements.
    places: HashMap<(usize, Option<String>), Vec<Place>>,
    open: RefCell<VecDeque<(usize, fs::File)>>,
    /// Of each file that was checked, what it was then.
    checked: RefCell<Vec<Option<Stamp>>>,
}

/// A piece, as numbers.
#[derive(Clone, Copy)]
struct Place {
    file: usize,
    piece: usize,
}

/// Gets a piece, the number of its file, and which of its bytes are asked for.
type TakePart<'a> = dyn FnMut(usize, &Piece, Range<usize>) -> Result<()> + 'a;

/// Tells a file from what it becomes when it is written or replaced.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds.
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Stamp {
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        Stamp { inode: metadata.ino(), bytes: metadata.len(), changed }
    }
}

/// See [`Source::sharded`].
pub struct Sharded {
    pub world_size: usize,
    pub metadata: Metadata,
}

impl Source {
    /// Opens the checkpoint in `dir` and reads what it has, no tensor. `dir` may also be one safetensors file, or an index
    /// of several, in Hugging Face's layout.
    pub fn open(dir: &Path) -> Result<Source> {
        if !dir.join(MANIFEST).exists() {
            if let Some(model) = huggingface::open(dir)? {
                return Ok(Source::new(model.folder, model.tensors, model.files, None, BLOCK));
            }
        }
        let m = Manifest::read(dir)?;
        let sharded = Sharded { world_size: m.world_size, metadata: m.metadata };
        Ok(Source::new(dir.to_path_buf(), m.tensors, m.files, Some(sharded), m.block_bytes))
    }

    fn new(dir: PathBuf, tensors: Vec<Tensor>, files: Vec<File>, sharded: Option<Sharded>, block: usize) -> Source {
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        let mut places: HashMap<_, Vec<Place>> = HashMap::new();
        for (f, file) in files.iter().enumerate() {
            for (p, piece) in file.pieces.iter().enumerate() {
                places.entry((piece.tensor, piece.state.clone())).or_default().push(Place { file: f, piece: p });
            }
        }
        places.values_mut().for_each(|list| list.sort_by_key(|p| files[p.file].pieces[p.piece].first));
        let checked = RefCell::new(vec![None; files.len()]);
        Source { dir, tensors, files, sharded, block, by_name, places, open: RefCell::default(), checked }
    }

    /// The number of the tensor `name`.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The states of each parameter, by number.
    pub fn states(&self) -> Vec<(usize, String)> {
        let mut states: Vec<_> = self.places.keys().filter_map(|(t, s)| Some((*t, s.clone()?))).collect();
        states.sort();
        states
    }

    /// How messages call a tensor or a state.
    pub fn label(&self, tensor: usize, state: Option<&str>) -> String {
        let t = &self.tensors[tensor];
        label(self.sharded.is_some().then_some(t.kind), &t.name, state)
    }

    /// Hands the elements `first..first + len` of a tensor or state to `take`, as bytes in their order. An error names file
    /// and tensor, and says whether the checkpoint lacks a part.
    pub fn read(
        &self,
        tensor: usize,
        state: Option<&str>,
        first: usize,
        len: usize,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut buffer = Vec::new();
        self.parts(tensor, state, first, len, &mut |f, piece, bytes| self.read_part(f, piece, bytes, &mut buffer, take))
    }

    /// Fills `out` with the elements of a tensor or state from `first` on, that were read before: nothing is compared again.
    /// `require_unchanged` says whether that was right. Errors as of `read`.
    pub fn read_again(&self, tensor: usize, state: Option<&str>, first: usize, out: &mut [u8]) -> Result<()> {
        let len = out.len() / self.size_of(tensor);
        let mut rest = out;
        self.parts(tensor, state, first, len, &mut |f, piece, bytes| {
            let (out, behind) = std::mem::take(&mut rest).split_at_mut(bytes.len());
            rest = behind;
            let read = self.read_at(f, out, piece.offset + bytes.start as u64);
            read.map_err(|e| e.context(self.label(tensor, state)))
        })
    }

    /// An error that names a file which is another one, or has been written, since it was first opened.
    pub fn require_unchanged(&self) -> Result<()> {
        for (file, stamp) in self.files.iter().zip(self.checked.borrow().iter()) {
            let path = self.dir.join(&file.name);
            if stamp.is_some_and(|stamp| fs::metadata(&path).map(|m| Stamp::of(&m)).ok() != Some(stamp)) {
                return Err(damaged(&path, "was changed while it was read"));
            }
        }
        Ok(())
    }

    /// Bytes of an element of a tensor.
    fn size_of(&self, tensor: usize) -> usize {
        self.tensors[tensor].dtype.bitsize() / 8
    }

    /// Calls `take` with the pieces that have the elements `first..first + len`, in order, and the bytes of each.
    fn parts(
        &self,
        tensor: usize,
        state: Option<&str>,
        first: usize,
        len: usize,
        take: &mut TakePart<'_>,
    ) -> Result<()> {
        let size = self.size_of(tensor);
        let (mut at, end) = (first, first + len);
        let places = self.places.get(&(tensor, state.map(str::to_string)));
        for place in places.into_iter().flatten() {
            let piece = &self.files[place.file].pieces[place.piece];
            // Pieces are in order: one that begins after `at` leaves a gap.
            if at < end && piece.first <= at && at < piece.first + piece.len {
                let last = end.min(piece.first + piece.len);
                take(place.file, piece, (at - piece.first) * size..(last - piece.first) * size)?;
                at = last;
            }
        }
        match at < end {
            true => Err(damaged(&self.dir, format_args!("{} is not (all) in it", self.label(tensor, state)))),
            false => Ok(()),
        }
    }

    /// The bytes `range` of a piece, in blocks.
    fn read_part(
        &self,
        f: usize,
        piece: &Piece,
        range: Range<usize>,
        buffer: &mut Vec<u8>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let path = self.dir.join(&self.files[f].name);
        let label = || self.label(piece.tensor, piece.state.as_deref());
        let bytes = piece.len * self.size_of(piece.tensor);
        let mut at = range.start;
        while at < range.end {
            // With checksums the whole block is read, else no more than is wanted.
            let (begin, end) = match piece.checksums.is_empty() {
                true => (at, range.end.min(at + self.block)),
                false => (at / self.block * self.block, bytes.min((at / self.block + 1) * self.block)),
            };
            buffer.resize(end - begin, 0);
            self.read_at(f, buffer, piece.offset + begin as u64).map_err(|e| e.context(label()))?;
            if piece.checksums.get(begin / self.block).is_some_and(|sum| *sum != checksum(buffer)) {
                let why = format!("{} is damaged: its checksum does not fit", label());
                return Err(damaged(&path, why));
            }
            let end = end.min(range.end);
            take(&buffer[at - begin..end - begin])?;
            at = end;
        }
        Ok(())
    }

    /// Reads from a file, which is opened and checked before.
    fn read_at(&self, f: usize, buffer: &mut [u8], offset: u64) -> Result<()> {
        let path = self.dir.join(&self.files[f].name);
        let mut open = self.open.borrow_mut();
        if !open.iter().any(|(number, _)| *number == f) {
            let file = self.check_file(f)?;
            if open.len() == OPEN {
                open.pop_front();
            }
            open.push_back((f, file));
        }
        let file = open.iter().find(|(number, _)| *number == f).map(|(_, file)| file);
        file.map_or(Ok(()), |file| file.read_exact_at(buffer, offset)).map_err(|e| damaged(&path, e))
    }

    /// Opens a file; the first time, its size and its header are compared with what the checkpoint says.
    pub fn check_file(&self, f: usize) -> Result<fs::File> {
        let file = &self.files[f];
        let path = self.dir.join(&file.name);
        let opened = fs::File::open(&path).map_err(|e| damaged(&path, e))?;
        if self.checked.borrow()[f].is_some() {
            return Ok(opened);
        }
        let metadata = opened.metadata().map_err(|e| damaged(&path, e))?;
        let bytes = metadata.len();
        if bytes != file.bytes {
            return Err(damaged(&path, format_args!("has {bytes} bytes, but was saved with {}", file.bytes)));
        }
        if self.sharded.is_some() {
            if file.header_bytes > bytes {
                return Err(damaged(&path, "has a header longer than itself"));
            }
            let mut header = vec![0; file.header_bytes as usize];
            opened.read_exact_at(&mut header, 0).map_err(|e| damaged(&path, e))?;
            if checksum(&header) != file.header_checksum {
                return Err(damaged(&path, "is damaged: the checksum of its header does not fit"));
            }
        }
        self.checked.borrow_mut()[f] = Some(Stamp::of(&metadata));
        Ok(opened)
    }

    /// Whether a tensor is cut over the ranks; unknown in Hugging Face's layout.
    pub fn is_parameter(&self, tensor: usize) -> bool {
        self.tensors[tensor].kind == Kind::Parameter
    }
}

#[cfg(test)]
mod tests {
    use super::super::writer::{Spec, Writer};
    use super::*;
    use safetensors::Dtype;

    #[test]
    fn a_file_that_changes_after_it_was_read_is_found() {
        let dir = std::env::temp_dir().join(format!("fsdp-source-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let path = dir.join("model.safetensors");
        let write = |bytes: &[u8]| {
            let spec = Spec { key: "w".into(), dtype: Dtype::F32, shape: vec![bytes.len() / 4] };
            let mut writer = Writer::create(&path, &[spec], &Default::default()).unwrap();
            writer.write(bytes).unwrap();
            writer.finish().unwrap();
        };
        write(&[1; 64]);
        let source = Source::open(&path).unwrap();
        let mut bytes = 0;
        source
            .read(0, None, 2, 10, &mut |b| {
                bytes += b.len();
                Ok(())
            })
            .unwrap();
        assert_eq!(bytes, 40);
        let mut out = [0; 40];
        source.read_again(0, None, 2, &mut out).unwrap();
        source.require_unchanged().unwrap();
        assert_eq!(out, [1; 40]);
        let e = source.read_again(0, None, 10, &mut [0; 28]).unwrap_err();
        assert!(e.message.contains("not (all) in it"), "{e}");
        std::thread::sleep(std::time::Duration::from_millis(20)); // file systems stamp in ticks
        write(&[2; 64]);
        let e = source.require_unchanged().unwrap_err();
        assert!(e.message.contains("model.safetensors") && e.message.contains("was changed"), "{e}");
        fs::remove_dir_all(&dir).unwrap();
    }
}
