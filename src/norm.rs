//! Norms of what is sharded like the parameters (gradients, usually), and clipping gradients to one.
//!
//! The definition is torch's `get_total_norm`: the norm of order p of the parameters' norms of order p, a parameter
//! counted once however many modules use it, one without a gradient on every rank not at all.
//!
//!   p = inf, -inf   the largest, the smallest magnitude
//!   p = 0           how many parameters' norms are not 0; such a norm is how many of the elements are not
//!   other p         (sum of |x|^p)^(1/p)
//!
//! Everything is float64. A rank sums its piece in an order that depends on its length alone, and the ranks' sums are
//! combined in rank order: the result is the same bits on every rank and in every run. Orders below 0 have no identity, so
//! a parameter without elements is an error there, as it is for torch; for p = inf it counts as 0.

use crate::comm::{Communicator, ReduceOp};
use crate::device::Floats;
use crate::dtype::DType;
use crate::engine::Engine;
use crate::error::{err, Result};
use crate::module::ParamId;

/// What torch adds to the norm that it divides by.
const EPSILON: f64 = 1e-6;

/// The order of a norm: any number but NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    Largest,
    Smallest,
    Count,
    Power(f64),
}

impl Order {
    pub fn new(p: f64) -> Result<Order> {
        match p {
            _ if p.is_nan() => Err(err!(InvalidArgument, "the order of a norm cannot be NaN")),
            f64::INFINITY => Ok(Order::Largest),
            f64::NEG_INFINITY => Ok(Order::Smallest),
            0.0 => Ok(Order::Count),
            _ => Ok(Order::Power(p)),
        }
    }

    /// Whether a norm of nothing has a value (0).
    fn has_identity(self) -> bool {
        !matches!(self, Order::Smallest) && !matches!(self, Order::Power(p) if p < 0.0)
    }

    /// How parts are combined. The smallest is kept negated, so that a NaN and presence survive one kind of combination.
    fn op(self) -> ReduceOp {
        match self {
            Order::Largest | Order::Smallest => ReduceOp::Max,
            Order::Count | Order::Power(_) => ReduceOp::Sum,
        }
    }

    /// The part of a norm that these elements are.
    pub(crate) fn part<T: Copy + Into<f64>>(self, x: &[T]) -> f64 {
        let max = |a: f64, b: f64| if a.is_nan() || a > b { a } else { b };
        match self {
            Order::Largest => fold(x, 0.0, |m, v| max(m, v.abs()), max),
            Order::Smallest => fold(x, f64::NEG_INFINITY, |m, v| max(m, -v.abs()), max),
            Order::Count => x.iter().filter(|v| (**v).into() != 0.0).count() as f64,
            Order::Power(2.0) => fold(x, 0.0, |s, v| s + v * v, |a, b| a + b),
            Order::Power(1.0) => fold(x, 0.0, |s, v| s + v.abs(), |a, b| a + b),
            Order::Power(p) => fold(x, 0.0, |s, v| s + v.abs().powf(p), |a, b| a + b),
        }
    }

    /// The norm that has this combination of parts.
    fn norm(self, part: f64) -> f64 {
        match self {
            Order::Largest | Order::Count => part,
            Order::Smallest => -part,
            Order::Power(2.0) => part.sqrt(),
            Order::Power(p) => part.powf(1.0 / p),
        }
    }
}

/// Combines elements in a fixed order, eight chains at a time.
fn fold<T: Copy + Into<f64>>(
    x: &[T],
    first: f64,
    add: impl Fn(f64, f64) -> f64,
    join: impl Fn(f64, f64) -> f64,
) -> f64 {
    let mut lanes = [first; 8];
    let chunks = x.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane = add(*lane, (*v).into()));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, v)| *lane = add(*lane, (*v).into()));
    lanes.into_iter().reduce(join).unwrap_or(first)
}

/// Norms by parameter (None: nothing there on any rank) and of all together.
struct Norms {
    by_param: Vec<Option<f64>>,
    total: f64,
}

/// `pieces[p]` is this rank's piece of something of parameter p, or null.
///
/// # Safety
/// Every piece that is not null is readable for its parameter's piece's length.
unsafe fn norms(engine: &Engine, pieces: &[*const f32], order: Order) -> Result<Norms> {
    let params = &engine.plan().params;
    if pieces.len() != params.len() {
        return Err(err!(InvalidArgument, "{} pieces were given, there are {} parameters", pieces.len(), params.len()));
    }
    let floats = |(p, data): (usize, &*const f32)| Floats {
        data: data.cast_mut(),
        len: if data.is_null() { 0 } else { params[p].piece.len },
    };
    let floats: Vec<Floats> = pieces.iter().enumerate().map(floats).collect();
    // SAFETY: the caller's promise; a piece without elements may have any pointer.
    let mut parts = unsafe { engine.settled_at_home()?.norm_parts(order, &floats) }?;
    // Parts, then presence.
    parts.extend(pieces.iter().map(|data| f64::from(u8::from(!data.is_null()))));
    all_reduce(engine.comm().as_ref(), &mut parts, order.op())?;
    let (parts, present) = parts.split_at(params.len());
    let mut by_param = Vec::new();
    for (p, part) in parts.iter().enumerate() {
        let is_present = present[p] > 0.0;
        if is_present && !order.has_identity() && params[p].shape.contains(&0) {
            return Err(err!(
                InvalidArgument,
                "parameter \"{}\" has no elements: norms of negative order are not defined there",
                params[p].fqn
            ));
        }
        by_param.push(is_present.then(|| order.norm(*part)));
    }
    let there: Vec<f64> = by_param.iter().flatten().copied().collect();
    let total = if there.is_empty() { 0.0 } else { order.norm(order.part(&there)) };
    Ok(Norms { by_param, total })
}

/// In place, the same bits on every rank.
pub(crate) fn all_reduce(comm: &dyn Communicator, values: &mut [f64], op: ReduceOp) -> Result<()> {
    let mut bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    comm.all_reduce(&mut bytes, DType::F64, op)?;
    for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(size_of::<f64>())) {
        *value = f64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
    }
    Ok(())
}

impl Norms {
    /// An error that names the first parameter whose norm is not finite.
    fn require_finite(&self, engine: &Engine, p: f64) -> Result<()> {
        if self.total.is_finite() {
            return Ok(());
        }
        let first = self.by_param.iter().position(|n| n.is_some_and(|n| !n.is_finite()));
        Err(match first {
            Some(i) => err!(
                Nonfinite,
                "the norm of order {p} is {}: that of parameter \"{}\" is {}. Nothing was changed",
                self.total,
                engine.plan().params[i].fqn,
                self.by_param[i].unwrap_or(f64::NAN)
            ),
            None => err!(Nonfinite, "the norm of order {p} of finite norms is {}. Nothing was changed", self.total),
        })
    }
}

impl Engine {
    /// Torch's `get_total_norm`: see the module's text. `pieces` are this rank's, by parameter, null where a parameter has
    /// none here. `Nonfinite`, on every rank, if `error_if_nonfinite` and the norm is not finite. Collective.
    ///
    /// # Safety
    /// Every piece that is not null is readable for its parameter's piece's length.
    pub unsafe fn total_norm(&self, pieces: &[*const f32], p: f64, error_if_nonfinite: bool) -> Result<f64> {
        let order = Order::new(p)?;
        self.between_iterations("norms can be taken", || {
            // SAFETY: the caller's promise.
            let norms = unsafe { norms(self, pieces, order) }?;
            match error_if_nonfinite {
                true => norms.require_finite(self, p).map(|()| norms.total),
                false => Ok(norms.total),
            }
        })
    }

    /// The norm of the gradient shards of all ranks. Collective.
    pub fn grad_norm(&self, p: f64) -> Result<f64> {
        let order = Order::new(p)?;
        self.between_iterations("the gradients' norm can be taken", || {
            // SAFETY: gradient shards have the pieces' lengths, and only this engine, locked, writes them now.
            Ok(unsafe { norms(self, &self.grad_pieces()?, order) }?.total)
        })
    }

    /// Torch's `clip_grad_norm_`: multiplies the gradient shards by `min(1, max_norm / (norm + 1e-6))` and returns the
    /// norm from before. As there, a norm that is not finite makes them 0 or NaN; with `error_if_nonfinite` it is
    /// `Nonfinite` on every rank instead, and they stay. Collective.
    pub fn clip_grad_norm(&self, max_norm: f64, p: f64, error_if_nonfinite: bool) -> Result<f64> {
        let order = Order::new(p)?;
        if max_norm.is_nan() || max_norm < 0.0 {
            return Err(err!(InvalidArgument, "max_norm cannot be {max_norm}: a number of at least 0 is needed"));
        }
        self.between_iterations("gradients can be clipped", || {
            // SAFETY: as in `grad_norm`.
            let norms = unsafe { norms(self, &self.grad_pieces()?, order) }?;
            if error_if_nonfinite {
                norms.require_finite(self, p)?;
            }
            let factor = clip_factor(max_norm, norms.total);
            if factor != 1.0 {
                let params = self.plan().params.iter().zip(self.grad_pieces()?);
                let there = params.filter(|(_, grad)| !grad.is_null());
                let floats: Vec<Floats> =
                    there.map(|(p, grad)| Floats { data: grad.cast_mut(), len: p.piece.len }).collect();
                // SAFETY: as above.
                unsafe { self.at_home().scale(&floats, factor) }?;
            }
            Ok(norms.total)
        })
    }

    /// This rank's gradient shards, null where there is none.
    pub(crate) fn grad_pieces(&self) -> Result<Vec<*const f32>> {
        (0..self.plan().params.len() as ParamId).map(|p| self.shard(p).map(|s| s.grad.cast_const())).collect()
    }
}

/// What gradients of this norm are multiplied by: at most 1.
pub fn clip_factor(max_norm: f64, norm: f64) -> f32 {
    let factor = max_norm / (norm + EPSILON);
    // NaN stays.
    (if factor > 1.0 { 1.0 } else { factor }) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn norm(x: &[f32], p: f64) -> f64 {
        let order = Order::new(p).unwrap();
        order.norm(order.part(x))
    }

    #[test]
    fn every_order() {
        let x = [3f32, -4.0, 0.0];
        let inf = f64::INFINITY;
        for (p, want) in [(2.0, 5.0), (1.0, 7.0), (inf, 4.0), (-inf, 0.0), (0.0, 2.0), (-1.0, 0.0), (-2.0, 0.0)] {
            assert_eq!(norm(&x, p), want, "p = {p}");
        }
        assert!((norm(&x, 3.0) - 91f64.cbrt()).abs() < 1e-12);
        assert!((norm(&x, 0.5) - (3f64.sqrt() + 2.0).powi(2)).abs() < 1e-12);
        assert!((norm(&[2f32, 4.0], -1.0) - 4.0 / 3.0).abs() < 1e-15);
        assert_eq!(norm(&[2f32, -4.0], -inf), 2.0);
        assert!(Order::new(f64::NAN).is_err());
    }

    #[test]
    fn nothing_finite_is_invented() {
        for p in [0.5, 1.0, 2.0, 3.0, f64::INFINITY] {
            assert_eq!(norm(&[1f32, f32::NEG_INFINITY], p), f64::INFINITY, "p = {p}");
        }
        for p in [0.5, 1.0, 2.0, f64::INFINITY, f64::NEG_INFINITY, -1.0] {
            for i in 0..20 {
                let mut x = [1f32; 20];
                x[i] = f32::NAN;
                assert!(norm(&x, p).is_nan(), "p = {p}, NaN at {i}");
            }
        }
        assert_eq!(norm(&[f32::INFINITY, 2.0], f64::NEG_INFINITY), 2.0);
        assert_eq!(norm(&[f32::NAN, 0.0], 0.0), 1.0);
        let (got, want) = (norm(&[f32::MAX, f32::MAX], 2.0), f64::from(f32::MAX) * 2f64.sqrt());
        assert!((got - want).abs() <= 1e-15 * want);
    }

    #[test]
    fn factors() {
        assert_eq!(clip_factor(1.0, 0.5), 1.0);
        assert_eq!(clip_factor(1.0, 0.0), 1.0);
        assert_eq!(clip_factor(0.0, 2.0), 0.0);
        assert_eq!(clip_factor(f64::INFINITY, 2.0), 1.0);
        assert_eq!(clip_factor(1.0, f64::INFINITY), 0.0);
        assert!(clip_factor(1.0, f64::NAN).is_nan());
        assert!(clip_factor(f64::INFINITY, f64::INFINITY).is_nan());
        assert_eq!(clip_factor(1.0, 4.0), (1.0 / 4.000001) as f32);
    }

    proptest! {
        /// However the elements are cut into pieces, the parts give the norm of all.
        #[test]
        fn parts_make_a_whole(
            x in prop::collection::vec(-1e3f32..1e3, 1..60),
            cut in 0usize..60,
            p in prop::sample::select(vec![0.0, 0.5, 1.0, 2.0, 3.0, -1.0, f64::INFINITY, f64::NEG_INFINITY]),
        ) {
            let order = Order::new(p).unwrap();
            let (a, b) = x.split_at(cut.min(x.len()));
            let (a, b) = (order.part(a), order.part(b));
            let both = match order.op() {
                ReduceOp::Max => a.max(b),
                _ => a + b,
            };
            let (got, want) = (order.norm(both), norm(&x, p));
            prop_assert!(got == want || (got - want).abs() <= 1e-12 * want.abs(), "{} {}", got, want);
        }
    }
}
