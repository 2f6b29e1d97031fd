//! Tensors as C describes them, in DLPack's layout.

use super::status::out;
use crate::dtype::DType;
use crate::error::{err, Error, Result};

/// Device type of host memory (DLPack's kDLCPU).
pub const FSDP_DEVICE_CPU: i32 = 1;
/// Device type of a GPU's memory (DLPack's kDLCUDA).
pub const FSDP_DEVICE_CUDA: i32 = 2;
/// Type codes of fsdp_dtype_t (DLPack's): signed integers.
pub const FSDP_DTYPE_INT: u8 = 0;
/// Unsigned integers.
pub const FSDP_DTYPE_UINT: u8 = 1;
/// IEEE floating point.
pub const FSDP_DTYPE_FLOAT: u8 = 2;
/// The upper bits of an IEEE float32.
pub const FSDP_DTYPE_BFLOAT: u8 = 4;
/// Truth values, 8 bits each. Only tensors that go into checkpoints as they are may have it.
pub const FSDP_DTYPE_BOOL: u8 = 6;

/// Where a tensor lies; DLPack's DLDevice.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_device_t {
    /// FSDP_DEVICE_CPU, or FSDP_DEVICE_CUDA where a function takes or gives memory of a GPU.
    pub device_type: i32,
    /// 0 for host memory; the GPU's number.
    pub device_id: i32,
}

/// An element type; DLPack's DLDataType. float32 is {FSDP_DTYPE_FLOAT, 32, 1}.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_dtype_t {
    /// FSDP_DTYPE_INT, FSDP_DTYPE_UINT, FSDP_DTYPE_FLOAT, FSDP_DTYPE_BFLOAT or FSDP_DTYPE_BOOL.
    pub code: u8,
    /// Bits of one element.
    pub bits: u8,
    /// 1.
    pub lanes: u16,
}

/// A tensor; laid out as DLPack's DLTensor, so that a DLTensor can be passed. As an argument it borrows data, shape and
/// strides for the call (or as long as the function says); as a result they are borrowed from the engine until
/// fsdp_engine_destroy.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct fsdp_tensor_t {
    /// Start of the memory. NULL if there are no elements; with elements only where a function gives that a meaning.
    pub data: *mut std::ffi::c_void,
    pub device: fsdp_device_t,
    /// Number of dimensions; 0 for a scalar.
    pub ndim: i32,
    pub dtype: fsdp_dtype_t,
    /// ndim sizes.
    pub shape: *mut i64,
    /// ndim strides in elements, or NULL for a contiguous tensor (row-major). Other tensors are refused.
    pub strides: *mut i64,
    /// Bytes from data to the first element.
    pub byte_offset: u64,
}

/// A tensor that was checked: contiguous, on the host, of whatever type.
pub struct RawTensor {
    pub data: *mut u8,
    pub dtype: fsdp_dtype_t,
    pub shape: Vec<i64>,
}

impl RawTensor {
    /// Checks and converts; `name` is how errors call it.
    ///
    /// # Safety
    /// `tensor` is NULL or points to a tensor whose shape (and strides) are readable.
    pub unsafe fn read(tensor: *const fsdp_tensor_t, name: &str) -> Result<RawTensor> {
        // SAFETY: the caller's promise.
        let (raw, gpu) = unsafe { RawTensor::read_anywhere(tensor, name) }?;
        match gpu {
            None => Ok(raw),
            Some(gpu) => Err(err!(Unsupported, "{name} is on GPU {gpu}: host memory is needed here")),
        }
    }

    /// The same of a tensor that may be on a GPU, whose number is told.
    ///
    /// # Safety
    /// As [`RawTensor::read`].
    pub unsafe fn read_anywhere(tensor: *const fsdp_tensor_t, name: &str) -> Result<(RawTensor, Option<usize>)> {
        // SAFETY: NULL is turned into None; else the caller's promise.
        let t = unsafe { tensor.as_ref() }.ok_or_else(|| err!(InvalidArgument, "{name} is NULL"))?;
        let gpu = match (t.device.device_type, t.device.device_id) {
            (FSDP_DEVICE_CPU, _) => None,
            (FSDP_DEVICE_CUDA, id) if id >= 0 => Some(id as usize),
            (device, id) => {
                return Err(err!(
                    Unsupported,
                    "{name} is on a device of type {device}, number {id}: there is none such"
                ));
            }
        };
        if t.dtype.lanes != 1 || t.dtype.bits == 0 || t.dtype.bits % 8 != 0 {
            return Err(unsupported(name, t.dtype));
        }
        let size = i64::from(t.dtype.bits / 8);
        if t.ndim < 0 || t.ndim > 64 || (t.ndim > 0 && t.shape.is_null()) {
            return Err(err!(InvalidArgument, "{name} has {} dimensions and {} shape", t.ndim, presence(t.shape)));
        }
        let ndim = t.ndim as usize;
        // SAFETY: `ndim` sizes are readable by the caller's promise; an empty slice needs a non-null pointer only.
        let shape = if ndim == 0 { &[][..] } else { unsafe { std::slice::from_raw_parts(t.shape, ndim) } };
        if let Some(d) = shape.iter().find(|d| **d < 0) {
            return Err(err!(InvalidArgument, "{name} has the negative dimension {d}"));
        }
        if !t.strides.is_null() && ndim > 0 {
            // SAFETY: as for the shape.
            let strides = unsafe { std::slice::from_raw_parts(t.strides, ndim) };
            let mut expected = 1i64;
            for (d, s) in shape.iter().zip(strides).rev() {
                if *d != 1 && *s != expected && !shape.contains(&0) {
                    return Err(err!(Unsupported, "{name} is not contiguous: strides {strides:?}, shape {shape:?}"));
                }
                expected = expected.saturating_mul(*d);
            }
        }
        let bytes = shape.iter().try_fold(size, |n, d| n.checked_mul(*d));
        let bytes = bytes.ok_or_else(|| err!(InvalidArgument, "{name} has more bytes than an address can hold"))?;
        let data = t.data.cast::<u8>();
        let data = if data.is_null() { data } else { data.wrapping_add(t.byte_offset as usize) };
        if data as i64 % size != 0 && bytes > 0 {
            return Err(err!(InvalidArgument, "{name} is not aligned to its elements of {size} bytes"));
        }
        Ok((RawTensor { data, dtype: t.dtype, shape: shape.to_vec() }, gpu))
    }
}

/// What the crate needs of a tensor: checked, contiguous, on the host, of a type that it computes with.
pub struct HostTensor {
    pub data: *mut u8,
    pub dtype: DType,
    pub shape: Vec<i64>,
}

/// The error for a type that `name` may not have.
pub fn unsupported(name: &str, dtype: fsdp_dtype_t) -> Error {
    let fsdp_dtype_t { code, bits, lanes } = dtype;
    err!(Unsupported, "{name} has the unsupported dtype (code {code}, bits {bits}, lanes {lanes})")
}

impl HostTensor {
    /// Checks and converts; `name` is how errors call it.
    ///
    /// # Safety
    /// `tensor` is NULL or points to a tensor whose shape (and strides) are readable.
    pub unsafe fn read(tensor: *const fsdp_tensor_t, name: &str) -> Result<HostTensor> {
        // SAFETY: the caller's promise.
        let RawTensor { data, dtype, shape } = unsafe { RawTensor::read(tensor, name) }?;
        let known = DType::from_dlpack(dtype.code, dtype.bits).ok_or_else(|| unsupported(name, dtype))?;
        Ok(HostTensor { data, dtype: known, shape })
    }

    /// The same of a tensor that may be on a GPU, whose number is told.
    ///
    /// # Safety
    /// As [`HostTensor::read`].
    pub unsafe fn read_anywhere(tensor: *const fsdp_tensor_t, name: &str) -> Result<(HostTensor, Option<usize>)> {
        // SAFETY: the caller's promise.
        let (RawTensor { data, dtype, shape }, gpu) = unsafe { RawTensor::read_anywhere(tensor, name) }?;
        let known = DType::from_dlpack(dtype.code, dtype.bits).ok_or_else(|| unsupported(name, dtype))?;
        Ok((HostTensor { data, dtype: known, shape }, gpu))
    }

    pub fn bytes(&self) -> usize {
        self.shape.iter().map(|d| *d as usize).product::<usize>() * self.dtype.size()
    }

    /// The elements as bytes.
    ///
    /// # Safety
    /// `data` is readable and writable for the tensor's bytes, by nobody else while the result lives.
    pub unsafe fn slice<'a>(&self, name: &str) -> Result<&'a mut [u8]> {
        match (self.bytes(), self.data.is_null()) {
            (0, _) => Ok(&mut []),
            (_, true) => Err(err!(InvalidArgument, "{name} has elements but its data is NULL")),
            // SAFETY: not NULL; else the caller's promise.
            (n, false) => Ok(unsafe { std::slice::from_raw_parts_mut(self.data, n) }),
        }
    }
}

/// Fills an output tensor: contiguous in host memory. `shape` must live as long as C may use the result.
///
/// # Safety
/// `tensor` is NULL or writable.
pub unsafe fn write(tensor: *mut fsdp_tensor_t, data: *mut u8, dtype: DType, shape: &[i64]) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { write_on(None, tensor, data, dtype, shape) }
}

/// The same of memory of the GPU of this number; None: of the host's.
///
/// # Safety
/// As [`write`].
pub unsafe fn write_on(
    gpu: Option<usize>,
    tensor: *mut fsdp_tensor_t,
    data: *mut u8,
    dtype: DType,
    shape: &[i64],
) -> Result<()> {
    let description = fsdp_tensor_t { device: on(gpu), ..describe(data, dtype, shape) };
    // SAFETY: the caller's promise.
    unsafe { out(tensor, "out") }?.write(description);
    Ok(())
}

/// A GPU in C's terms; None: the CPU.
pub fn on(gpu: Option<usize>) -> fsdp_device_t {
    match gpu {
        Some(gpu) => fsdp_device_t { device_type: FSDP_DEVICE_CUDA, device_id: gpu as i32 },
        None => fsdp_device_t { device_type: FSDP_DEVICE_CPU, device_id: 0 },
    }
}

/// The dtype in C's terms.
pub fn c_dtype(dtype: DType) -> fsdp_dtype_t {
    let (code, bits) = dtype.dlpack();
    fsdp_dtype_t { code, bits, lanes: 1 }
}

/// The dtype that C means; None for all zero. Outside: an error that calls it `what`.
pub fn optional_dtype(value: fsdp_dtype_t, what: &str) -> Result<Option<DType>> {
    let fsdp_dtype_t { code, bits, lanes } = value;
    if (code, bits, lanes) == (0, 0, 0) {
        return Ok(None);
    }
    let known = DType::from_dlpack(code, bits).filter(|_| lanes == 1);
    known
        .map(Some)
        .ok_or_else(|| err!(Unsupported, "{what} cannot be {{code {code}, bits {bits}, lanes {lanes}}}: unknown dtype"))
}

/// Describes contiguous elements in host memory; valid as long as `shape`.
pub fn describe(data: *mut u8, dtype: DType, shape: &[i64]) -> fsdp_tensor_t {
    fsdp_tensor_t {
        data: data.cast(),
        device: on(None),
        ndim: shape.len() as i32,
        dtype: c_dtype(dtype),
        shape: shape.as_ptr().cast_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    }
}

fn presence<T>(pointer: *const T) -> &'static str {
    if pointer.is_null() {
        "no"
    } else {
        "a"
    }
}
