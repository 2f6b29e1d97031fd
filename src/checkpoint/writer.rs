//! Writes one safetensors file as a stream: the header first, then the tensors' bytes as they come.
//!
//! The `safetensors` crate writes tensors that are in memory as a whole; here at most a block is.

use super::manifest::{checksum, BLOCK};
use crate::error::{err, Error, Result};
use safetensors::Dtype;
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct Spec {
    pub key: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Spec {
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bitsize() as u64 / 8
    }
}

/// A file being written.
pub struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    header_checksum: String,
    header_bytes: u64,
    written: u64,
    /// Of these, the disk was asked to begin with.
    begun: u64,
    total: u64,
}

/// The disk is asked to begin with so many bytes at once: it works while the next ones are prepared.
const BEGIN: u64 = 8 << 20;

/// A file on disk.
pub struct Written {
    pub bytes: u64,
    pub header_bytes: u64,
    pub header_checksum: String,
}

impl Writer {
    /// Creates the file and writes its header. Tensors are written in this order, which should be one of element sizes
    /// that do not grow: every tensor is then aligned to its elements, as readers that map the file want it.
    pub fn create(path: &Path, specs: &[Spec], metadata: &BTreeMap<String, String>) -> Result<Writer> {
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), json!(metadata));
        }
        let mut end = 0;
        for s in specs {
            let begin = end;
            end += s.bytes();
            let entry = json!({ "dtype": s.dtype, "shape": s.shape, "data_offsets": [begin, end] });
            if header.insert(s.key.clone(), entry).is_some() {
                return Err(err!(Checkpoint, "\"{}\": two tensors are called \"{}\"", path.display(), s.key));
            }
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        // The format's own rule: padded with spaces.
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut text);
        let file = File::create(path).map_err(|e| writing(path, e))?;
        let mut writer = Writer {
            path: path.to_path_buf(),
            file: BufWriter::with_capacity(1 << 16, file),
            header_checksum: checksum(&bytes),
            header_bytes: bytes.len() as u64,
            written: 0,
            begun: 0,
            total: bytes.len() as u64 + end,
        };
        writer.write(&bytes)?;
        Ok(writer)
    }

    /// The next bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| writing(&self.path, e))?;
        self.written += bytes.len() as u64;
        if self.written - self.begun >= BEGIN {
            self.begin_writeback();
        }
        Ok(())
    }

    /// Hands what was written to the disk, without waiting. A hint: `finish` flushes, and sees what fails.
    fn begin_writeback(&mut self) {
        let (from, bytes) = (self.begun as i64, (self.written - self.begun) as i64);
        // SAFETY: a call on a file that is open; it touches no memory.
        unsafe { libc::sync_file_range(self.file.get_ref().as_raw_fd(), from, bytes, libc::SYNC_FILE_RANGE_WRITE) };
        self.begun = self.written;
    }

    /// A whole piece; returns where it begins in the file, and its checksums.
    pub fn write_piece(&mut self, bytes: &[u8]) -> Result<(u64, Vec<String>)> {
        let offset = self.written;
        let mut checksums = Vec::with_capacity(bytes.len().div_ceil(BLOCK));
        for block in bytes.chunks(BLOCK) {
            checksums.push(checksum(block));
            self.write(block)?;
        }
        Ok((offset, checksums))
    }

    /// Flushes to disk. An error if the bytes are not those that the header announces.
    pub fn finish(self) -> Result<Written> {
        let Writer { path, file, header_checksum, header_bytes, written, total, .. } = self;
        if written != total {
            return Err(err!(Panic, "\"{}\" has {written} bytes instead of {total}", path.display()));
        }
        let file = file.into_inner().map_err(|e| writing(&path, e.into_error()))?;
        file.sync_all().map_err(|e| writing(&path, e))?;
        Ok(Written { bytes: written, header_bytes, header_checksum })
    }
}

/// Writes a small file and flushes it to disk.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|e| writing(path, e))
}

fn writing(path: &Path, error: std::io::Error) -> Error {
    Error::os(format!("writing \"{}\"", path.display()), error)
}
