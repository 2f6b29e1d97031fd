//! Private host memory: zeroed, page-aligned, freed on drop. A page takes memory only once it is written.

use crate::error::{Error, Result};
use memmap2::MmapMut;

/// Bytes of a huge page, on x86-64 and elsewhere where pages have 4 KiB.
pub const HUGE_PAGE: usize = 2 << 20;

/// `len` floats, zero at first.
#[derive(Debug)]
pub struct HostBuffer(Option<MmapMut>);

impl HostBuffer {
    /// Allocates; `what` names the purpose in the error.
    pub fn zeroed(len: usize, what: &str) -> Result<HostBuffer> {
        if len == 0 {
            return Ok(HostBuffer(None));
        }
        let bytes = len.checked_mul(size_of::<f32>()).ok_or(std::io::ErrorKind::OutOfMemory.into());
        let map = bytes.and_then(MmapMut::map_anon);
        map.map(|m| HostBuffer(Some(m))).map_err(|e| Error::os(format!("memory for {what}: {len} elements"), e))
    }

    /// Dangling, not null, for no elements.
    pub fn as_ptr(&self) -> *mut f32 {
        self.0.as_ref().map_or(std::ptr::dangling_mut(), |m| m.as_ptr().cast_mut().cast())
    }
}
