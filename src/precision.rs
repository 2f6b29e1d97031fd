//! Mixed precision: the type that each parameter is computed in, the type that each unit's gradients are reduced in, and
//! values on their way between them.
//!
//! The *masters* (the shards that optimizers update) and the gradient shards are always float32. A parameter's *compute
//! dtype* is what unsharding yields: its own override, else its unit's, else the engine's `param_dtype`, else the type it
//! was registered with. One computed in float32 is read where its masters lie; of one computed in 16 bits there is a
//! *compute copy* besides, which each rank rounds its own masters into (to nearest, ties to even; a NaN stays one) when a
//! READ phase opens.

use crate::comm::reduce;
use crate::config::EngineConfig;
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::halves::Half;
use crate::module::{ModuleId, ModuleTree, ParamId};
use half::{bf16, f16};
use std::collections::BTreeMap;

/// Overrides of a unit; None: what holds for the whole engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitDtypes {
    pub param: Option<DType>,
    pub reduce: Option<DType>,
}

/// What a tree says about types. Every type in it is float32, float16 or bfloat16.
#[derive(Clone, Debug, Default)]
pub struct Precision {
    /// For what has no override: the engine's.
    engine: UnitDtypes,
    /// Units that compute in one 16-bit type collect gradients in it.
    grads_in_param_dtype: bool,
    units: BTreeMap<ModuleId, UnitDtypes>,
    params: BTreeMap<ParamId, DType>,
}

/// Whether parameters can be registered and computed in this type.
pub fn can_compute(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

impl Precision {
    /// Overrides of a model that is added with its first module and parameter as these numbers.
    pub fn extend(&mut self, other: &Precision, module: ModuleId, param: ParamId) {
        self.units.extend(other.units.iter().map(|(m, d)| (module + m, *d)));
        self.params.extend(other.params.iter().map(|(p, d)| (param + p, *d)));
    }

    /// The type that gradients of the unit of this module are reduced in.
    pub fn reduce_dtype(&self, unit: ModuleId) -> DType {
        self.units.get(&unit).and_then(|d| d.reduce).or(self.engine.reduce).unwrap_or(DType::F32)
    }

    /// The type that a unit collects gradients in whose parameters are computed in these types.
    pub fn grad_dtype(&self, mut computed: impl Iterator<Item = DType>) -> DType {
        let first = computed.next().filter(|_| self.grads_in_param_dtype).unwrap_or(DType::F32);
        if computed.all(|d| d == first) {
            first
        } else {
            DType::F32
        }
    }
}

impl ModuleTree {
    /// The tree with an engine's choice for what has no override.
    pub fn with_engine_dtypes(mut self, config: &EngineConfig) -> ModuleTree {
        self.precision.engine = UnitDtypes { param: config.param_dtype, reduce: Some(config.reduce_dtype) };
        self.precision.grads_in_param_dtype = config.grads_in_param_dtype;
        self
    }

    /// Overrides the types of the unit that `module` is, or will be when an engine is made. A unit that is sharded already
    /// keeps the types that its parameters are computed in.
    pub fn set_unit_dtypes(&mut self, module: ModuleId, dtypes: UnitDtypes) -> Result<()> {
        let name = self.module(module)?.fqn.clone();
        for (dtype, what) in [(dtypes.param, "computed"), (dtypes.reduce, "reduced")] {
            if let Some(d) = dtype.filter(|d| !can_compute(*d)) {
                return Err(err!(
                    Unsupported,
                    "unit \"{name}\" cannot be {what} in {d}: float32, float16 and bfloat16 are supported"
                ));
            }
        }
        if let (Some((model, unit)), Some(dtype)) = (self.adopted_unit(module), dtypes.param) {
            let plan = &self.adopted()[model].plan;
            let params = &plan.units[unit as usize].params;
            let other = params.iter().map(|p| &plan.params[*p as usize]).find(|p| p.compute != dtype);
            let unchanged = self.precision.units.get(&module).is_some_and(|d| d.param == dtypes.param);
            if let Some(other) = other.filter(|_| !unchanged) {
                return Err(err!(
                    InvalidState,
                    "unit \"{name}\" is sharded already: its parameter \"{}\" stays {}, and cannot become {dtype}",
                    other.fqn,
                    other.compute
                ));
            }
        }
        self.precision.units.insert(module, dtypes);
        Ok(())
    }

    /// Overrides the type that a parameter is computed in; None takes the override back.
    pub fn set_param_dtype(&mut self, param: ParamId, dtype: Option<DType>) -> Result<()> {
        let p = self.param(param)?;
        if let Some(d) = dtype.filter(|d| !can_compute(*d)) {
            return Err(err!(
                Unsupported,
                "parameter \"{}\" cannot be computed in {d}: float32, float16 and bfloat16 are supported",
                p.fqn
            ));
        }
        if let Some((model, old)) = p.adopted {
            let now = self.adopted()[model].plan.params[old as usize].compute;
            return match dtype {
                Some(d) if d == now => Ok(()),
                _ => Err(err!(InvalidState, "parameter \"{}\" is sharded already: it stays {now}", p.fqn)),
            };
        }
        match dtype {
            Some(d) => self.precision.params.insert(param, d),
            None => self.precision.params.remove(&param),
        };
        Ok(())
    }

    /// The type that a parameter is computed in, when the module `unit` is its unit.
    pub fn compute_dtype(&self, param: ParamId, unit: ModuleId) -> DType {
        let p = &self.params()[param as usize];
        if let Some((model, old)) = p.adopted {
            return self.adopted()[model].plan.params[old as usize].compute;
        }
        let of_unit = self.precision.units.get(&unit).and_then(|d| d.param);
        let chosen = self.precision.params.get(&param).copied().or(of_unit).or(self.precision.engine.param);
        chosen.unwrap_or(p.dtype)
    }

    /// Refuses what cannot be sharded: a parameter of another type, a unit's types for a module that is no unit.
    pub fn check_dtypes(&self) -> Result<()> {
        if let Some(p) = self.params().iter().find(|p| !can_compute(p.dtype)) {
            return Err(err!(
                Unsupported,
                "parameter \"{}\" is {}: only float32, float16 and bfloat16 parameters are supported",
                p.fqn,
                p.dtype
            ));
        }
        if let Some((m, _)) = self.precision.units.iter().find(|(m, _)| !self.is_wrapped(**m)) {
            return Err(err!(
                InvalidArgument,
                "module \"{}\" was given types of its own, as a unit, but it is no unit",
                self.modules()[*m as usize].fqn
            ));
        }
        Ok(())
    }
}

/// Elements converted at a time: few enough to stay in the first-level cache.
const BLOCK: usize = 2048;

/// Calls `each` with consecutive blocks of `len` elements of `dtype` at `from` as floats (exactly the same values), and
/// the number of the block's first element.
///
/// # Safety
/// `from` is readable for `len` elements of `dtype`, which is one that [`can_compute`] names, and aligned for it.
unsafe fn widened(dtype: DType, from: *const u8, len: usize, mut each: impl FnMut(usize, &[f32])) {
    let mut wide = [0f32; BLOCK];
    for at in (0..len).step_by(BLOCK) {
        let n = BLOCK.min(len - at);
        // SAFETY: `at + n <= len` elements are readable by the caller's promise.
        unsafe {
            match dtype {
                DType::F16 => f16::widen(std::slice::from_raw_parts(from.cast::<f16>().add(at), n), &mut wide[..n]),
                DType::BF16 => bf16::widen(std::slice::from_raw_parts(from.cast::<bf16>().add(at), n), &mut wide[..n]),
                _ => {
                    each(at, std::slice::from_raw_parts(from.cast::<f32>().add(at), n));
                    continue;
                }
            }
        }
        each(at, &wide[..n]);
    }
}

/// Writes `len` elements of `dtype` at `from` to `to` as float32, exactly.
///
/// # Safety
/// `from` is readable for `len` elements of `dtype` (one that [`can_compute`] names) and aligned for it, `to` writable for
/// `len` floats; they do not overlap.
pub unsafe fn widen(dtype: DType, from: *const u8, to: *mut f32, len: usize) {
    // SAFETY: the caller's promise; a block lies inside the `len` elements.
    unsafe {
        widened(dtype, from, len, |at, block| {
            std::ptr::copy_nonoverlapping(block.as_ptr(), to.add(at), block.len());
        });
    }
}

/// Adds `len` elements of `dtype` at `from` to the floats at `to`, in float32.
///
/// # Safety
/// As for [`widen`], with `to` readable too.
pub unsafe fn add(dtype: DType, from: *const u8, to: *mut f32, len: usize) {
    // SAFETY: as for `widen`.
    unsafe {
        widened(dtype, from, len, |at, block| {
            let sum = std::slice::from_raw_parts_mut(to.add(at), block.len());
            sum.iter_mut().zip(block).for_each(|(s, x)| *s += x);
        });
    }
}

/// A range of masters and where its compute copy lies.
#[derive(Clone, Copy, Debug)]
pub struct Cast {
    pub dtype: DType,
    /// First byte of the masters in the arena of masters.
    pub from: usize,
    /// First byte in the arena of compute copies.
    pub to: usize,
    /// Elements.
    pub len: usize,
}

impl Cast {
    /// Bytes that it writes.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    /// Rounds the masters into their copy.
    ///
    /// # Safety
    /// The range lies inside the arenas that start at `masters` and `copies`, where nobody else writes the former or touches
    /// the latter meanwhile.
    pub unsafe fn run(&self, masters: *const u8, copies: *mut u8) {
        // SAFETY: the caller's promise; ranges of parameters are aligned for their elements.
        unsafe { reduce::narrow(self.dtype, masters.add(self.from).cast(), copies.add(self.to), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::ROOT;

    #[test]
    fn sixteen_bits_widen_exactly_and_add_in_float32() {
        let values: Vec<f32> = (0..5000).map(|i| (i as f32 - 2500.0) / 8.0).collect();
        let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
        let brains: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
        let cases: [(DType, *const u8, Vec<f32>); 3] = [
            (DType::F32, values.as_ptr().cast(), values.clone()),
            (DType::F16, halves.as_ptr().cast(), halves.iter().map(|v| v.to_f32()).collect()),
            (DType::BF16, brains.as_ptr().cast(), brains.iter().map(|v| v.to_f32()).collect()),
        ];
        for (dtype, from, want) in cases {
            let mut to = vec![f32::NAN; want.len()];
            // SAFETY: the vectors have 5000 elements.
            unsafe { widen(dtype, from, to.as_mut_ptr(), to.len()) };
            assert_eq!(to, want, "{dtype}");
            // SAFETY: as above.
            unsafe { add(dtype, from, to.as_mut_ptr(), to.len()) };
            assert!(to.iter().zip(&want).all(|(a, b)| *a == b + b), "{dtype}");
        }
    }

    #[test]
    fn a_cast_rounds_to_nearest_even_and_keeps_nan() {
        let of = |bits: u32| f32::from_bits(bits);
        let cases = [
            (of(0x3f80_8000), 0x3f80u16), // a tie, down to even
            (of(0x3f81_8000), 0x3f82),    // a tie, up to even
            (of(0x3f80_8001), 0x3f81),
            (f32::MAX, 0x7f80),
            (f32::INFINITY, 0x7f80),
            (-0.0, 0x8000),
            (of(1), 0),
        ];
        let mut out = 0u16;
        for (value, want) in cases {
            let cast = Cast { dtype: DType::BF16, from: 0, to: 0, len: 1 };
            // SAFETY: one float in, one 16-bit element out.
            unsafe { cast.run((&raw const value).cast(), (&raw mut out).cast()) };
            assert_eq!(out, want, "{value}");
        }
        for (dtype, bits) in [(DType::BF16, 0x7f80_0001u32), (DType::F16, 0xff80_0001), (DType::BF16, 0x7fff_ffff)] {
            let value = of(bits);
            // SAFETY: as above.
            unsafe {
                Cast { dtype, from: 0, to: 0, len: 1 }.run((&raw const value).cast(), (&raw mut out).cast());
            }
            let wide = if dtype == DType::F16 { f16::from_bits(out).to_f32() } else { bf16::from_bits(out).to_f32() };
            assert!(wide.is_nan(), "{dtype} {bits:x}");
        }
    }

    #[test]
    fn a_parameter_before_its_unit_before_the_engine_before_its_registration() {
        let mut t = ModuleTree::new("Net");
        let a = t.add_module(ROOT, "a", "Block").unwrap();
        let b = t.add_module(a, "b", "Block").unwrap();
        let w = t.add_param(a, "w", &[2], DType::BF16, true, std::ptr::null()).unwrap();
        let v = t.add_param(a, "v", &[2], DType::F32, true, std::ptr::null()).unwrap();
        assert_eq!((t.compute_dtype(w, a), t.compute_dtype(v, a)), (DType::BF16, DType::F32));
        let config = EngineConfig { param_dtype: Some(DType::F16), ..EngineConfig::default() };
        let engine = t.clone().with_engine_dtypes(&config);
        assert_eq!((engine.compute_dtype(w, a), engine.compute_dtype(v, a)), (DType::F16, DType::F16));
        t.wrap(a).unwrap();
        let unit = UnitDtypes { param: Some(DType::BF16), reduce: Some(DType::F16) };
        t.set_unit_dtypes(a, unit).unwrap();
        t.set_param_dtype(v, Some(DType::F32)).unwrap();
        let engine = t.clone().with_engine_dtypes(&config);
        assert_eq!((engine.compute_dtype(w, a), engine.compute_dtype(v, a)), (DType::BF16, DType::F32));
        assert_eq!((engine.precision.reduce_dtype(a), engine.precision.reduce_dtype(ROOT)), (DType::F16, DType::F32));
        t.check_dtypes().unwrap();

        let e = t.set_param_dtype(w, Some(DType::F64)).unwrap_err();
        assert!(e.message.contains("\"a.w\" cannot be computed in float64"), "{e}");
        let e = t.set_unit_dtypes(a, UnitDtypes { reduce: Some(DType::I32), ..unit }).unwrap_err();
        assert!(e.message.contains("\"a\" cannot be reduced in int32"), "{e}");
        t.set_unit_dtypes(b, unit).unwrap();
        let e = t.check_dtypes().unwrap_err();
        assert!(e.message.contains("\"a.b\"") && e.message.contains("no unit"), "{e}");
    }
}
