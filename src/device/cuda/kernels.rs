//! Launches of the engine's kernels: each works on many pieces at once, in the order of a stream.
//!
//! Addresses that are multiples of 16 are accessed 16 bytes at a time, others element by element; results are the same.
//! What a kernel computes has the bits of the engine's code for the CPU (powers in norms aside).

use super::compile;
use super::context::Context;
use super::stream::Stream;
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::optim::{AdamWStep, SgdStep};
use cudarc::driver::sys::{CUdeviceptr, CUfunction, CUmodule};
use std::ffi::{c_int, c_void, CStr};
use std::sync::Arc;

/// Threads of a block: THREADS in the sources.
const THREADS: u32 = 256;
/// Pieces of a launch, and parameters of a step: the sizes of the tables in the sources.
const PIECES: usize = 64;
const STEPS: usize = 48;
/// Elements of a thread at a time.
const GROUP: u64 = 8;
/// Elements of a norm that a block is worth.
const NORM_BLOCK: u64 = 32 * 1024;

macro_rules! kernels {
    ($($kernel:ident = $name:literal,)*) => {
        #[derive(Clone, Copy)]
        enum Kernel {
            $($kernel,)*
        }

        /// The kernels' names in the sources.
        pub const NAMES: &[&CStr] = &[$($name,)*];
    };
}

kernels! {
    CastF32Bf16 = c"fsdp_cast_f32_bf16",
    CastF32F16 = c"fsdp_cast_f32_f16",
    CastBf16F32 = c"fsdp_cast_bf16_f32",
    CastF16F32 = c"fsdp_cast_f16_f32",
    ScaleF32 = c"fsdp_scale_f32",
    ScaleBf16 = c"fsdp_scale_bf16",
    ScaleF16 = c"fsdp_scale_f16",
    CopyInF32 = c"fsdp_copy_in_f32",
    CopyInBf16 = c"fsdp_copy_in_bf16",
    CopyInF16 = c"fsdp_copy_in_f16",
    Zero = c"fsdp_zero",
    Unscale = c"fsdp_unscale",
    Sgd = c"fsdp_sgd",
    SgdMomentum = c"fsdp_sgd_momentum",
    AdamW = c"fsdp_adamw",
    NormParts = c"fsdp_norm_parts",
    NormJoin = c"fsdp_norm_join",
}

/// A range of elements on the device. `from` and `to` are used as the kernel says; they do not overlap.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    pub from: CUdeviceptr,
    pub to: CUdeviceptr,
    /// Elements.
    pub len: u64,
    /// Not 0: add to what is there. (Kernels that add to nothing do not look at it.)
    pub add: u64,
}

/// One parameter's piece in an optimizer's step: addresses of floats. States that the rule does not have are 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    pub param: CUdeviceptr,
    pub grad: CUdeviceptr,
    /// SGD: the momentum buffer. AdamW: exp_avg, exp_avg_sq.
    pub states: [CUdeviceptr; 2],
    /// Elements.
    pub len: u64,
}

/// Orders of norms as [`crate::norm`] defines them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormOrder {
    Largest,
    /// Parts are negated magnitudes, as in [`crate::norm`].
    Smallest,
    Count,
    Power(f64),
}

/// The kernels, loaded into a GPU's context.
pub struct Kernels {
    context: Arc<Context>,
    module: CUmodule,
    functions: Vec<CUfunction>,
}

// SAFETY: a module and its functions may be used by any thread that has the context current.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Compiles them, if no earlier process has, and loads them.
    pub fn load(context: &Arc<Context>) -> Result<Arc<Kernels>> {
        let image = compile::image(context.info().capability, context.driver.version()?)?;
        let _current = context.enter()?;
        let mut kernels = Kernels { context: context.clone(), module: std::ptr::null_mut(), functions: Vec::new() };
        // SAFETY: an image as the compiler made it; PTX ends with NUL.
        let code = unsafe { (context.driver.fns.cuModuleLoadData)(&mut kernels.module, image.as_ptr().cast()) };
        context.check("loading the kernels", code)?;
        for name in NAMES {
            let mut function = std::ptr::null_mut();
            // SAFETY: the module is loaded, the name ends with NUL.
            let code =
                unsafe { (context.driver.fns.cuModuleGetFunction)(&mut function, kernels.module, name.as_ptr()) };
            context.check(&format!("looking up the kernel {}", name.to_string_lossy()), code)?;
            // Else it may be loaded when it is first launched, which may wait for the GPU, where a collective may be waiting for
            // what this rank has not launched yet.
            if let Some(load) = context.driver.fns.cuFuncLoad {
                // SAFETY: a function of the module.
                let code = unsafe { load(function) };
                context.check(&format!("loading the kernel {}", name.to_string_lossy()), code)?;
            }
            kernels.functions.push(function);
        }
        Ok(Arc::new(kernels))
    }

    /// `to` = `from` in another type, to nearest with ties to even. Between float32 and bfloat16 or float16.
    ///
    /// # Safety
    /// When the launch runs, every piece's memory is there, aligned for its elements, and touched by nobody else.
    pub unsafe fn cast(&self, stream: &Stream, from: DType, to: DType, pieces: &[Piece]) -> Result<()> {
        let kernel = match (from, to) {
            (DType::F32, DType::BF16) => Kernel::CastF32Bf16,
            (DType::F32, DType::F16) => Kernel::CastF32F16,
            (DType::BF16, DType::F32) => Kernel::CastBf16F32,
            (DType::F16, DType::F32) => Kernel::CastF16F32,
            _ => return Err(err!(Unsupported, "{from} cannot be cast to {to} on a GPU")),
        };
        // SAFETY: the caller's promise.
        unsafe { self.over_pieces(stream, kernel, pieces, &mut []) }
    }

    /// `to` = `to` * `factor`, in float32, rounded once. float32, bfloat16 or float16; `from` is not used.
    ///
    /// # Safety
    /// As [`Kernels::cast`].
    pub unsafe fn scale(&self, stream: &Stream, dtype: DType, pieces: &[Piece], mut factor: f32) -> Result<()> {
        let kernel = match dtype {
            DType::F32 => Kernel::ScaleF32,
            DType::BF16 => Kernel::ScaleBf16,
            DType::F16 => Kernel::ScaleF16,
            _ => return Err(err!(Unsupported, "{dtype} cannot be scaled on a GPU")),
        };
        // SAFETY: the caller's promise.
        unsafe { self.over_pieces(stream, kernel, pieces, &mut [(&raw mut factor).cast()]) }
    }

    /// Gradients of a host, of float32, bfloat16 or float16, into the floats at `to`: written, or added where the piece
    /// says so.
    ///
    /// # Safety
    /// As [`Kernels::cast`].
    pub unsafe fn copy_in(&self, stream: &Stream, dtype: DType, pieces: &[Piece]) -> Result<()> {
        let kernel = match dtype {
            DType::F32 => Kernel::CopyInF32,
            DType::BF16 => Kernel::CopyInBf16,
            DType::F16 => Kernel::CopyInF16,
            _ => return Err(err!(Unsupported, "gradients of {dtype} cannot be copied in on a GPU")),
        };
        // SAFETY: the caller's promise.
        unsafe { self.over_pieces(stream, kernel, pieces, &mut []) }
    }

    /// The floats at `to` = 0.
    ///
    /// # Safety
    /// As [`Kernels::cast`].
    pub unsafe fn zero(&self, stream: &Stream, pieces: &[Piece]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.over_pieces(stream, Kernel::Zero, pieces, &mut []) }
    }

    /// The floats at `to` *= `factor` (nothing is written for 1), and the 32-bit number at `found` = 1 if one of them
    /// was not finite before; it is left alone otherwise.
    ///
    /// # Safety
    /// As [`Kernels::cast`]; `found` is the address of a u32.
    pub unsafe fn unscale(
        &self,
        stream: &Stream,
        pieces: &[Piece],
        mut factor: f32,
        mut found: CUdeviceptr,
    ) -> Result<()> {
        let arguments = &mut [(&raw mut factor).cast(), (&raw mut found).cast()];
        // SAFETY: the caller's promise.
        unsafe { self.over_pieces(stream, Kernel::Unscale, pieces, arguments) }
    }

    /// A step of SGD, with momentum if `momentum`: the buffers are the first states, and written only in the `first`
    /// step.
    ///
    /// # Safety
    /// As [`Kernels::cast`], for all memory of the steps.
    pub unsafe fn sgd(
        &self,
        stream: &Stream,
        numbers: &SgdStep,
        momentum: bool,
        first: bool,
        steps: &[Step],
    ) -> Result<()> {
        let (mut numbers, mut first) = (*numbers, u32::from(first));
        let arguments: &mut [*mut c_void] = &mut [(&raw mut numbers).cast(), (&raw mut first).cast()];
        // SAFETY: the caller's promise.
        unsafe {
            match momentum {
                true => self.over_steps(stream, Kernel::SgdMomentum, steps, arguments),
                false => self.over_steps(stream, Kernel::Sgd, steps, &mut arguments[..1]),
            }
        }
    }

    /// A step of AdamW.
    ///
    /// # Safety
    /// As [`Kernels::cast`], for all memory of the steps.
    pub unsafe fn adamw(&self, stream: &Stream, numbers: &AdamWStep, steps: &[Step]) -> Result<()> {
        let mut numbers = *numbers;
        // SAFETY: the caller's promise.
        unsafe { self.over_steps(stream, Kernel::AdamW, steps, &mut [(&raw mut numbers).cast()]) }
    }

    /// The part of a norm that each piece's floats at `from` are: `out` gets a float64 per piece, the order of
    /// additions depends on the piece's length alone. `scratch` is room for [`Kernels::norm_scratch`] bytes.
    ///
    /// # Safety
    /// As [`Kernels::cast`]; `out` and `scratch` are writable.
    pub unsafe fn norm_parts(
        &self,
        stream: &Stream,
        order: NormOrder,
        pieces: &[Piece],
        scratch: CUdeviceptr,
        out: CUdeviceptr,
    ) -> Result<()> {
        let (mut number, mut power): (c_int, f64) = match order {
            NormOrder::Largest => (0, 0.0),
            NormOrder::Smallest => (1, 0.0),
            NormOrder::Count => (2, 0.0),
            NormOrder::Power(1.0) => (3, 1.0),
            NormOrder::Power(2.0) => (4, 2.0),
            NormOrder::Power(p) => (5, p),
        };
        for (i, chunk) in pieces.chunks(PIECES).enumerate() {
            let mut table = table::<Piece, PIECES>(chunk);
            // How many blocks share a piece depends on its length alone, and so does the order of additions.
            table.iter_mut().for_each(|p| p.add = p.len.div_ceil(NORM_BLOCK).clamp(1, u64::from(THREADS)));
            let most = table[..chunk.len()].iter().map(|p| p.add).max().unwrap_or(1) as u32;
            let mut parts = scratch;
            let mut results = out + (i * PIECES * size_of::<f64>()) as u64;
            let [table, number, power]: [*mut c_void; 3] =
                [(&raw mut table).cast(), (&raw mut number).cast(), (&raw mut power).cast()];
            let [parts, results]: [*mut c_void; 2] = [(&raw mut parts).cast(), (&raw mut results).cast()];
            let pieces = chunk.len() as u32;
            // SAFETY: the caller's promise. In the stream's order, the parts of one chunk are joined before the next
            // ones are written.
            unsafe {
                self.launch(stream, Kernel::NormParts, (most, pieces), &mut [table, number, power, parts])?;
                self.launch(stream, Kernel::NormJoin, (1, pieces), &mut [table, number, parts, results])?;
            }
        }
        Ok(())
    }

    /// Bytes of scratch memory for norms of so many pieces.
    pub fn norm_scratch(pieces: usize) -> usize {
        pieces.min(PIECES) * THREADS as usize * size_of::<f64>()
    }

    /// # Safety
    /// `arguments` are what the kernel has after its table; else as [`Kernels::cast`].
    unsafe fn over_pieces(
        &self,
        stream: &Stream,
        kernel: Kernel,
        pieces: &[Piece],
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let pieces: Vec<Piece> = pieces.iter().copied().filter(|p| p.len > 0).collect();
        for chunk in pieces.chunks(PIECES) {
            let longest = chunk.iter().map(|p| p.len).max().unwrap_or(0);
            // SAFETY: the caller's promise.
            unsafe { self.over_table(stream, kernel, table::<Piece, PIECES>(chunk), longest, chunk.len(), arguments) }?;
        }
        Ok(())
    }

    /// # Safety
    /// As `over_pieces`.
    unsafe fn over_steps(
        &self,
        stream: &Stream,
        kernel: Kernel,
        steps: &[Step],
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let steps: Vec<Step> = steps.iter().copied().filter(|s| s.len > 0).collect();
        for chunk in steps.chunks(STEPS) {
            let longest = chunk.iter().map(|s| s.len).max().unwrap_or(0);
            // SAFETY: the caller's promise.
            unsafe { self.over_table(stream, kernel, table::<Step, STEPS>(chunk), longest, chunk.len(), arguments) }?;
        }
        Ok(())
    }

    /// # Safety
    /// As `over_pieces`.
    unsafe fn over_table<T>(
        &self,
        stream: &Stream,
        kernel: Kernel,
        mut table: T,
        longest: u64,
        count: usize,
        arguments: &[*mut c_void],
    ) -> Result<()> {
        // A few waves of blocks; more would only start and end.
        let most = self.context.info().multiprocessors as u64 * 16;
        let blocks = longest.div_ceil(u64::from(THREADS) * GROUP).clamp(1, most) as u32;
        let mut all: Vec<*mut c_void> = vec![(&raw mut table).cast()];
        all.extend(arguments);
        // SAFETY: the caller's promise.
        unsafe { self.launch(stream, kernel, (blocks, count as u32), &mut all) }
    }

    /// # Safety
    /// `arguments` point to what the kernel takes; what they say holds when it runs.
    unsafe fn launch(
        &self,
        stream: &Stream,
        kernel: Kernel,
        (blocks, pieces): (u32, u32),
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the caller's promise; arguments are copied before the call returns.
        let code = unsafe {
            (self.context.driver.fns.cuLaunchKernel)(
                self.functions[kernel as usize],
                blocks,
                pieces,
                1,
                THREADS,
                1,
                1,
                0,
                stream.raw(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        match code {
            0 => Ok(()),
            code => self.context.check(&format!("launching {}", NAMES[kernel as usize].to_string_lossy()), code),
        }
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.module.is_null() {
            return;
        }
        if let Ok(_current) = self.context.enter() {
            // SAFETY: loaded once, unloaded once.
            unsafe { (self.context.driver.fns.cuModuleUnload)(self.module) };
        }
    }
}

/// A table as kernels take it, by value.
fn table<T: Copy + Default, const N: usize>(entries: &[T]) -> [T; N] {
    let mut table = [T::default(); N];
    table[..entries.len()].copy_from_slice(entries);
    table
}
