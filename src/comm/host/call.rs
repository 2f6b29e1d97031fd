//! Collectives of the control plane: small, on copies of the caller's memory, so that a callback that never ends touches
//! nothing that the caller may free.

use super::table::{Collectives, Lane};
use super::work::Next;
use crate::comm::ReduceOp;
use crate::dtype::DType;
use crate::error::Result;

/// Which one.
pub enum Call {
    Barrier,
    /// Ranks' inputs may differ in length.
    Exchange,
    AllGather,
    AllReduce(DType, ReduceOp),
    ReduceScatter(DType, ReduceOp),
    Broadcast(usize),
}

/// See the module's text.
pub struct HostCall {
    call: Call,
    input: Words,
    output: Words,
    /// Bytes that each rank gives to an exchange.
    lengths: Vec<usize>,
    started: bool,
}

impl HostCall {
    /// `output`: how many bytes it fills, where that is known before.
    pub fn new(call: Call, input: &[u8], output: usize) -> HostCall {
        HostCall { call, input: Words::of(input), output: Words::zeros(output), lengths: Vec::new(), started: false }
    }

    /// What came out.
    pub fn output(&self) -> &[u8] {
        match self.call {
            Call::AllReduce(..) | Call::Broadcast(_) => self.input.bytes(),
            _ => self.output.bytes(),
        }
    }

    /// What each rank gave to an exchange.
    pub fn parts(&self) -> Vec<Vec<u8>> {
        let most = self.lengths.iter().copied().max().unwrap_or(0);
        let part = |(rank, len): (usize, &usize)| self.output.bytes()[rank * most..rank * most + len].to_vec();
        self.lengths.iter().enumerate().map(part).collect()
    }

    /// What the ranks said of themselves: their lengths, in an exchange.
    pub fn agreed(&mut self, own: &[u64]) {
        if let Call::Exchange = self.call {
            self.lengths = own.iter().map(|n| *n as usize).collect();
            let most = self.lengths.iter().copied().max().unwrap_or(0);
            self.input.grow(most);
            self.output = Words::zeros(most * own.len());
        }
    }

    pub fn next(&mut self, table: &dyn Collectives) -> Result<Next> {
        if std::mem::replace(&mut self.started, true) {
            return Ok(Next::Done);
        }
        let lane = Lane::Control;
        let (input, output, len) = (self.input.as_mut_ptr(), self.output.as_mut_ptr(), self.input.len);
        if len == 0 && !matches!(self.call, Call::Barrier) {
            return Ok(Next::Done);
        }
        // SAFETY: both buffers are this call's, which stays with the flight until the request has ended; sizes were checked by
        // the caller and agreed on by all ranks.
        let request = unsafe {
            match self.call {
                Call::Barrier => table.barrier(lane),
                Call::Exchange | Call::AllGather => table.all_gather(lane, input, output, len),
                Call::AllReduce(dtype, op) => table.all_reduce(lane, input, len / dtype.size(), dtype, op),
                Call::ReduceScatter(dtype, op) => {
                    table.reduce_scatter(lane, input, output, self.output.len / dtype.size(), dtype, op)
                }
                Call::Broadcast(root) => table.broadcast(lane, input, len, root),
            }
        };
        Ok(Next::Moving(request?))
    }
}

/// Bytes, aligned for every element type.
struct Words {
    words: Vec<u64>,
    len: usize,
}

impl Words {
    fn zeros(len: usize) -> Words {
        Words { words: vec![0; len.div_ceil(8)], len }
    }

    fn of(bytes: &[u8]) -> Words {
        let mut words = Words::zeros(bytes.len());
        // SAFETY: the words have room for the bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), words.as_mut_ptr(), bytes.len()) };
        words
    }

    fn grow(&mut self, len: usize) {
        self.words.resize(len.div_ceil(8), 0);
        self.len = len;
    }

    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.words.as_mut_ptr().cast()
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the words hold as many bytes.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.len) }
    }
}

/// Divides every element by the number of ranks; 16-bit types in float32, rounded once more.
pub fn divide(data: &mut [u8], dtype: DType, ranks: usize) {
    macro_rules! each {
        ($t:ty, $wide:ty, $widen:expr, $narrow:expr) => {
            for bytes in data.chunks_exact_mut(size_of::<$t>()) {
                let value = $widen(<$t>::from_ne_bytes((&*bytes).try_into().expect("whole elements")));
                bytes.copy_from_slice(&<$t>::to_ne_bytes($narrow(value / ranks as $wide)));
            }
        };
    }
    match dtype {
        DType::F32 => each!(f32, f32, |x: f32| x, |x: f32| x),
        DType::F64 => each!(f64, f64, |x: f64| x, |x: f64| x),
        DType::F16 => each!(half::f16, f32, half::f16::to_f32, half::f16::from_f32),
        DType::BF16 => each!(half::bf16, f32, half::bf16::to_f32, half::bf16::from_f32),
        // Averages of integers are refused before.
        DType::I32 | DType::I64 | DType::U8 => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_divide_in_their_type() {
        let mut data = 3f32.to_ne_bytes().to_vec();
        divide(&mut data, DType::F32, 2);
        assert_eq!(data, 1.5f32.to_ne_bytes());
        let mut data = half::bf16::from_f32(3.0).to_ne_bytes().to_vec();
        divide(&mut data, DType::BF16, 4);
        assert_eq!(data, half::bf16::from_f32(0.75).to_ne_bytes());
    }
}
