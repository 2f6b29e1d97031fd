//! The arithmetic of one step on one parameter's piece: a single pass over parameter, gradient and state.
//!
//! Numbers that are the same for all elements are computed in float64 and rounded to float32 once. Each element then goes
//! through the float32 operations written below, in that order, each rounded to nearest, without fused multiply-add:
//! the result is the same bit for bit (NaNs aside) however wide the vectors are and however parameters are cut.

use super::rule::{AdamWOptions, SgdOptions};

/// A loop over elements.
trait Pass {
    /// Inlined into each of the functions that compile it for other processors.
    fn run(self);
}

fn run_widest(pass: impl Pass) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { run_avx2(pass) };
    }
    pass.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn run_avx2(pass: impl Pass) {
    pass.run()
}

fn sign(maximize: bool) -> f32 {
    if maximize {
        -1.0
    } else {
        1.0
    }
}

/// SGD's numbers for one parameter, laid out as the GPU's kernels take them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct Sgd {
    sign: f32,
    weight_decay: f32,
    momentum: f32,
    rest: f32,
    nesterov: bool,
    lr: f32,
}

impl Sgd {
    pub fn new(o: &SgdOptions, lr: f64, weight_decay: f64) -> Sgd {
        Sgd {
            sign: sign(o.maximize),
            weight_decay: weight_decay as f32,
            momentum: o.momentum as f32,
            rest: (1.0 - o.dampening) as f32,
            nesterov: o.nesterov,
            lr: lr as f32,
        }
    }

    /// One step. `buffer` is None without momentum; what it holds does not matter in the `first` step.
    pub fn step(self, param: &mut [f32], grad: &[f32], buffer: Option<&mut [f32]>, first: bool) {
        match buffer {
            None => run_widest(SgdPass { sgd: self, param, grad }),
            Some(buffer) => run_widest(MomentumPass { sgd: self, param, grad, buffer, first }),
        }
    }

    #[inline(always)]
    fn gradient(&self, p: f32, g: f32) -> f32 {
        let g = self.sign * g;
        // Not merely an optimization: 0 times an infinite parameter is NaN.
        if self.weight_decay == 0.0 {
            g
        } else {
            g + self.weight_decay * p
        }
    }
}

struct SgdPass<'a> {
    sgd: Sgd,
    param: &'a mut [f32],
    grad: &'a [f32],
}

impl Pass for SgdPass<'_> {
    #[inline(always)]
    fn run(self) {
        for (p, g) in self.param.iter_mut().zip(self.grad) {
            let g = self.sgd.gradient(*p, *g);
            *p -= self.sgd.lr * g;
        }
    }
}

struct MomentumPass<'a> {
    sgd: Sgd,
    param: &'a mut [f32],
    grad: &'a [f32],
    buffer: &'a mut [f32],
    first: bool,
}

impl Pass for MomentumPass<'_> {
    #[inline(always)]
    fn run(self) {
        let s = self.sgd;
        for ((p, g), b) in self.param.iter_mut().zip(self.grad).zip(self.buffer) {
            let g = s.gradient(*p, *g);
            *b = if self.first { g } else { s.momentum * *b + s.rest * g };
            let d = if s.nesterov { g + s.momentum * *b } else { *b };
            *p -= s.lr * d;
        }
    }
}

/// AdamW's numbers for one parameter in one step, laid out as the GPU's kernels take them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub struct AdamW {
    sign: f32,
    decay: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    step_size: f32,
    root: f32,
    eps: f32,
}

impl AdamW {
    /// `step` counts from 1.
    pub fn new(o: &AdamWOptions, lr: f64, weight_decay: f64, step: u64) -> AdamW {
        AdamW {
            sign: sign(o.maximize),
            decay: (1.0 - lr * weight_decay) as f32,
            beta1: o.beta1 as f32,
            rest1: (1.0 - o.beta1) as f32,
            beta2: o.beta2 as f32,
            rest2: (1.0 - o.beta2) as f32,
            step_size: (lr / (1.0 - power(o.beta1, step))) as f32,
            root: (1.0 - power(o.beta2, step)).sqrt() as f32,
            eps: o.eps as f32,
        }
    }

    /// One step. The averages are zero before the first.
    pub fn step(self, param: &mut [f32], grad: &[f32], exp_avg: &mut [f32], exp_avg_sq: &mut [f32]) {
        run_widest(AdamWPass { adamw: self, param, grad, exp_avg, exp_avg_sq })
    }
}

/// `base` to the `exponent`-th by squaring: the same bits with every C library.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

struct AdamWPass<'a> {
    adamw: AdamW,
    param: &'a mut [f32],
    grad: &'a [f32],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
}

impl Pass for AdamWPass<'_> {
    #[inline(always)]
    fn run(self) {
        let a = self.adamw;
        for (((p, g), m), v) in self.param.iter_mut().zip(self.grad).zip(self.exp_avg).zip(self.exp_avg_sq) {
            let g = a.sign * *g;
            let w = *p * a.decay;
            *m = a.beta1 * *m + a.rest1 * g;
            *v = a.beta2 * *v + a.rest2 * g * g;
            let d = v.sqrt() / a.root + a.eps;
            *p = w - a.step_size * *m / d;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STEPS: u64 = 10;

    /// A step (counted from 1) on parameter, gradient and states.
    type Step<'a> = &'a mut dyn FnMut(u64, &mut [f32], &[f32], &mut [&mut [f32]]);
    /// The same on one element in float64.
    type ExactStep<'a> = &'a dyn Fn(u64, &mut f64, f64, &mut [f64]);

    fn noise(seed: u64, n: usize) -> Vec<f32> {
        let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            ((x >> 40) as f32 / 8388608.0 - 1.0) * 10f32.powi((x % 5) as i32 - 4)
        };
        (0..n).map(|_| next()).collect()
    }

    /// Runs `steps` steps of `step` on `len` elements whose addresses are `shift` floats off a cache line; `kinds` states
    /// that begin with zeros. Returns parameter and states.
    fn run(len: usize, shift: usize, kinds: usize, step: Step) -> Vec<Vec<f32>> {
        let place = |values: Vec<f32>| [vec![7.0; shift], values].concat();
        let mut param = place(noise(1, len));
        let mut states: Vec<Vec<f32>> = (0..kinds).map(|_| place(vec![0.0; len])).collect();
        for t in 1..=STEPS {
            let grad = place(noise(100 + t, len));
            let mut slices: Vec<&mut [f32]> = states.iter_mut().map(|s| &mut s[shift..]).collect();
            step(t, &mut param[shift..], &grad[shift..], &mut slices);
        }
        for all in states.iter().chain([&param]) {
            assert!(all[..shift].iter().all(|v| *v == 7.0), "wrote before its piece");
        }
        std::iter::once(param).chain(states).map(|v| v[shift..].to_vec()).collect()
    }

    /// The same in float64, element by element, from the formulas of the paper or manual.
    fn exact(len: usize, kinds: usize, step: ExactStep) -> Vec<Vec<f64>> {
        let mut all: Vec<Vec<f64>> = (0..=kinds).map(|_| vec![0.0; len]).collect();
        all[0] = noise(1, len).into_iter().map(f64::from).collect();
        for t in 1..=STEPS {
            for (i, g) in noise(100 + t, len).into_iter().enumerate() {
                let mut state: Vec<f64> = all[1..].iter().map(|s| s[i]).collect();
                step(t, &mut all[0][i], g.into(), &mut state);
                (0..kinds).for_each(|k| all[1 + k][i] = state[k]);
            }
        }
        all
    }

    fn same_bits(got: &[Vec<f32>], want: &[Vec<f32>], what: &str) {
        for (got, want) in got.iter().zip(want) {
            assert!(got.iter().zip(want).all(|(g, w)| g.to_bits() == w.to_bits()), "{what}");
        }
    }

    fn close(got: &[Vec<f32>], want: &[Vec<f64>], what: &str) {
        for (g, w) in got.iter().flatten().zip(want.iter().flatten()) {
            assert!((f64::from(*g) - w).abs() <= 1e-5 * (1.0 + w.abs()), "{what}: {g}, not {w}");
        }
    }

    fn check_sgd(o: SgdOptions, len: usize, shift: usize) {
        let what = format!("{o:?} {len} {shift}");
        let kinds = usize::from(o.momentum != 0.0);
        let sgd = Sgd::new(&o, o.lr, o.weight_decay);
        let got = run(len, shift, kinds, &mut |t, p, g, s| {
            sgd.step(p, g, s.first_mut().map(|b| &mut **b), t == 1);
        });
        // One element after the other, as the C header says.
        let naive = run(len, 0, kinds, &mut |t, p, g, s| {
            for i in 0..p.len() {
                let mut d = if o.maximize { -g[i] } else { g[i] };
                if o.weight_decay != 0.0 {
                    d += o.weight_decay as f32 * p[i];
                }
                if kinds == 1 {
                    let b = if t == 1 { d } else { o.momentum as f32 * s[0][i] + (1.0 - o.dampening) as f32 * d };
                    s[0][i] = b;
                    d = if o.nesterov { d + o.momentum as f32 * b } else { b };
                }
                p[i] -= o.lr as f32 * d;
            }
        });
        same_bits(&got, &naive, &what);
        let want = exact(len, kinds, &|t, p, g, s| {
            let mut d = (if o.maximize { -g } else { g }) + o.weight_decay * *p;
            if let Some(b) = s.first_mut() {
                *b = if t == 1 { d } else { o.momentum * *b + (1.0 - o.dampening) * d };
                d = if o.nesterov { d + o.momentum * *b } else { *b };
            }
            *p -= o.lr * d;
        });
        close(&got, &want, &what);
    }

    fn check_adamw(o: AdamWOptions, len: usize, shift: usize) {
        let what = format!("{o:?} {len} {shift}");
        let got = run(len, shift, 2, &mut |t, p, g, s| {
            let [m, v] = s else { panic!("two states") };
            AdamW::new(&o, o.lr, o.weight_decay, t).step(p, g, m, v);
        });
        let naive = run(len, 0, 2, &mut |t, p, g, s| {
            let correction = |beta: f64| 1.0 - power(beta, t);
            let root = correction(o.beta2).sqrt() as f32;
            let step_size = (o.lr / correction(o.beta1)) as f32;
            for i in 0..p.len() {
                let g = if o.maximize { -g[i] } else { g[i] };
                let w = p[i] * (1.0 - o.lr * o.weight_decay) as f32;
                s[0][i] = o.beta1 as f32 * s[0][i] + (1.0 - o.beta1) as f32 * g;
                s[1][i] = o.beta2 as f32 * s[1][i] + ((1.0 - o.beta2) as f32 * g) * g;
                p[i] = w - (step_size * s[0][i]) / (s[1][i].sqrt() / root + o.eps as f32);
            }
        });
        same_bits(&got, &naive, &what);
        // Algorithm 2 of the paper.
        let want = exact(len, 2, &|t, p, g, s| {
            let g = if o.maximize { -g } else { g };
            s[0] = o.beta1 * s[0] + (1.0 - o.beta1) * g;
            s[1] = o.beta2 * s[1] + (1.0 - o.beta2) * g * g;
            let (m, v) = (s[0] / (1.0 - o.beta1.powi(t as i32)), s[1] / (1.0 - o.beta2.powi(t as i32)));
            *p -= o.lr * (m / (v.sqrt() + o.eps) + o.weight_decay * *p);
        });
        close(&got, &want, &what);
    }

    #[test]
    fn every_option_of_sgd() {
        for momentum in [0.0, 0.9] {
            for dampening in [0.0, 0.25] {
                for weight_decay in [0.0, 0.01] {
                    for nesterov in [false, true] {
                        for maximize in [false, true] {
                            let o = SgdOptions { lr: 0.01, momentum, dampening, weight_decay, nesterov, maximize };
                            if super::super::Rule::Sgd(o).check().is_ok() {
                                [0, 1, 7, 8, 67, 1001].into_iter().for_each(|len| check_sgd(o, len, len % 5));
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_option_of_adamw() {
        for (beta1, beta2) in [(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)] {
            for eps in [1e-8, 1e-3] {
                for weight_decay in [0.0, 0.1] {
                    for maximize in [false, true] {
                        let o = AdamWOptions { lr: 0.01, beta1, beta2, eps, weight_decay, maximize };
                        [0, 1, 7, 8, 67, 1001].into_iter().for_each(|len| check_adamw(o, len, len % 5));
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_length_and_alignment(len in 0usize..300, shift in 0usize..17, nesterov: bool) {
            check_sgd(SgdOptions { lr: 0.1, momentum: 0.8, weight_decay: 0.1, nesterov, ..Default::default() }, len, shift);
            check_adamw(AdamWOptions::default(), len, shift);
        }
    }

    #[test]
    fn vectors_of_any_width_give_the_same_bits() {
        let o = AdamWOptions::default();
        let s = SgdOptions { momentum: 0.9, dampening: 0.1, weight_decay: 0.1, ..Default::default() };
        let sgd = Sgd::new(&s, s.lr, s.weight_decay);
        let widest = run(999, 3, 3, &mut |t, param, grad, states| {
            let [exp_avg, exp_avg_sq, buffer] = states else { panic!("three states") };
            AdamW::new(&o, o.lr, 0.1, t).step(param, grad, exp_avg, exp_avg_sq);
            sgd.step(param, grad, Some(buffer), t == 1);
        });
        // As compiled for every processor of this kind.
        let plain = run(999, 3, 3, &mut |t, param, grad, states| {
            let [exp_avg, exp_avg_sq, buffer] = states else { panic!("three states") };
            AdamWPass { adamw: AdamW::new(&o, o.lr, 0.1, t), param, grad, exp_avg, exp_avg_sq }.run();
            MomentumPass { sgd, param, grad, buffer, first: t == 1 }.run();
        });
        same_bits(&widest, &plain, "widest and plain");
    }

    #[test]
    fn without_weight_decay_infinite_parameters_make_no_nan() {
        let mut param = [f32::INFINITY];
        Sgd::new(&SgdOptions::default(), 0.1, 0.0).step(&mut param, &[1.0], None, true);
        assert_eq!(param, [f32::INFINITY]);
    }

    #[test]
    fn powers_are_right_for_many_steps() {
        for (base, exponent) in [(0.9f64, 1), (0.9, 7), (0.999, 1000), (0.999, 123_456), (0.0, 3), (0.5, 10_000_000)] {
            let want = base.powf(exponent as f64);
            assert!((power(base, exponent) - want).abs() <= 1e-13, "{base}^{exponent}");
        }
        assert_eq!(power(0.0, 1), 0.0);
    }
}
