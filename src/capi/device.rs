//! Which devices there are.

use super::status::{boundary, fsdp_status_t, out};
use super::tensor::{FSDP_DEVICE_CPU, FSDP_DEVICE_CUDA};
use crate::device::cuda::Driver;
use crate::error::err;

/// How many devices of a type, FSDP_DEVICE_*, this process sees: one CPU; GPUs perhaps none. The first question about GPUs
/// loads CUDA's driver; without one the answer is FSDP_ERR_UNSUPPORTED, with a message that says what was looked for and
/// where. Local. Since 0.1.
///
/// # Safety
/// `out_count` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn fsdp_device_count(device_type: i32, out_count: *mut i32) -> fsdp_status_t {
    boundary(|| {
        // SAFETY: the caller's promise.
        let count = unsafe { out(out_count, "out_count") }?;
        count.write(match device_type {
            FSDP_DEVICE_CPU => 1,
            FSDP_DEVICE_CUDA => Driver::get()?.device_count()? as i32,
            _ => return Err(err!(InvalidArgument, "device_type cannot be {device_type}")),
        });
        Ok(())
    })
}
