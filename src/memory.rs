//! Private host memory: zeroed, aligned, freed on drop. Large buffers use no page before it is written.

use crate::error::{err, Result};
use crate::layout::PARAM_ALIGN;
use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::ptr::NonNull;

/// `len` floats, zero at first.
#[derive(Debug)]
pub struct HostBuffer {
    data: NonNull<f32>,
    layout: Option<Layout>,
}

// SAFETY: the buffer owns its memory; who writes it when is its owner's affair, as with a raw pointer.
unsafe impl Send for HostBuffer {}

impl HostBuffer {
    /// Allocates; `what` names the purpose in the error.
    pub fn zeroed(len: usize, what: &str) -> Result<HostBuffer> {
        let bytes = len.checked_mul(size_of::<f32>());
        let layout = bytes.and_then(|b| Layout::from_size_align(b, PARAM_ALIGN).ok());
        let Some(layout) = layout else {
            return Err(err!(OutOfMemory, "{what} of {len} elements does not fit into an address space"));
        };
        if len == 0 {
            return Ok(HostBuffer { data: NonNull::dangling(), layout: None });
        }
        // SAFETY: the layout has a size above zero.
        let data = NonNull::new(unsafe { alloc_zeroed(layout) }.cast::<f32>());
        let data = data.ok_or_else(|| err!(OutOfMemory, "no memory for {what} of {} bytes", layout.size()))?;
        Ok(HostBuffer { data, layout: Some(layout) })
    }

    pub fn as_ptr(&self) -> *mut f32 {
        self.data.as_ptr()
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if let Some(layout) = self.layout {
            // SAFETY: allocated by `zeroed` with this layout, and dropped once.
            unsafe { dealloc(self.data.as_ptr().cast(), layout) }
        }
    }
}
