//! What collectives are told: ranges, types and reductions, and NCCL's numbers for them.

use crate::dtype::DType;
use crate::error::{err, Result};
use cudarc::driver::sys::CUdeviceptr;
use half::{bf16, f16};
use std::ffi::{c_int, c_void};

/// How elements of different ranks are combined.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reduction {
    Sum,
    /// The sum divided by the world size.
    Mean,
    /// The sum of what each rank has times this factor, which is rounded to the type.
    Scaled(f64),
    Max,
}

pub(super) const NCCL_SUM: c_int = 0;
pub(super) const NCCL_MAX: c_int = 2;
pub(super) const NCCL_AVG: c_int = 4;
/// ncclScalarHostImmediate.
pub(super) const HOST_IMMEDIATE: c_int = 1;

/// Equal ranges of all ranks, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Of the first rank's.
    pub data: CUdeviceptr,
    /// Elements of each rank's.
    pub shard_len: usize,
    pub dtype: DType,
}

impl Part {
    pub(super) fn at(&self, rank: usize) -> *mut c_void {
        pointer(self.data + (rank * self.shard_len * self.dtype.size()) as u64)
    }
}

pub(super) fn pointer(address: CUdeviceptr) -> *mut c_void {
    address as *mut c_void
}

/// ncclDataType_t.
pub(super) fn number_of(dtype: DType) -> c_int {
    match dtype {
        DType::U8 => 1,
        DType::I32 => 2,
        DType::I64 => 4,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
    }
}

/// A number of this type, as bytes.
pub(super) fn scalar_of(dtype: DType, value: f64) -> Result<Vec<u8>> {
    match dtype {
        DType::F32 => Ok((value as f32).to_ne_bytes().to_vec()),
        DType::F64 => Ok(value.to_ne_bytes().to_vec()),
        DType::F16 => Ok(f16::from_f32(value as f32).to_ne_bytes().to_vec()),
        DType::BF16 => Ok(bf16::from_f32(value as f32).to_ne_bytes().to_vec()),
        _ => Err(err!(InvalidArgument, "a sum of {dtype} cannot be scaled")),
    }
}
