//! Optimizers' steps and norms: the bits of the engine's code for the CPU, and close to float64.

use super::gpu::{noise, pieces, places, same, Gpu, LENGTHS};
use fsdp::device::cuda::kernels::{Kernels, NormOrder, Step};
use fsdp::optim::{AdamWOptions, AdamWStep, SgdOptions, SgdStep};

const STEPS: u64 = 4;

/// More parameters than a launch takes.
fn lengths() -> Vec<usize> {
    LENGTHS.into_iter().chain((0..50).map(|i| i * 7 % 41)).collect()
}

/// Runs `steps` steps on the GPU over all pieces: parameter and two states, which begin with zeros.
fn on_gpu(gpu: &Gpu, shift: bool, step: impl Fn(u64, &[Step])) -> (Vec<(usize, usize)>, [Vec<f32>; 3]) {
    let (places, n) = places(&lengths(), shift);
    let buffers = [gpu.put(&noise(1, n)), gpu.put(&vec![0f32; n]), gpu.put(&vec![0f32; n])];
    for t in 1..=STEPS {
        let grad = gpu.put(&noise(100 + t, n));
        let at = |memory: u64, at: usize| memory + (at * 4) as u64;
        let steps: Vec<Step> = places
            .iter()
            .map(|(first, len)| Step {
                param: at(buffers[0].address(), *first),
                grad: at(grad.address(), *first),
                states: [at(buffers[1].address(), *first), at(buffers[2].address(), *first)],
                len: *len as u64,
            })
            .collect();
        step(t, &steps);
        gpu.stream.synchronize().unwrap();
    }
    (places, buffers.each_ref().map(|memory| gpu.get(memory)))
}

/// The same with slices, piece by piece; nothing outside of pieces changes.
fn on_cpu<T: Copy + Default + From<f32>>(
    places: &[(usize, usize)],
    n: usize,
    step: impl Fn(u64, &mut [T], &[T], &mut [T], &mut [T]),
) -> [Vec<T>; 3] {
    let wide = |data: Vec<f32>| data.into_iter().map(T::from).collect::<Vec<T>>();
    let [mut p, mut a, mut b] = [wide(noise(1, n)), wide(vec![0.0; n]), wide(vec![0.0; n])];
    for t in 1..=STEPS {
        let grad = wide(noise(100 + t, n));
        for (at, len) in places {
            let range = *at..at + len;
            step(t, &mut p[range.clone()], &grad[range.clone()], &mut a[range.clone()], &mut b[range]);
        }
    }
    [p, a, b]
}

fn compare(got: &[Vec<f32>; 3], cpu: &[Vec<f32>; 3], exact: &[Vec<f64>; 3], what: &str) {
    for ((got, cpu), exact) in got.iter().zip(cpu).zip(exact) {
        same(got, cpu, what);
        for (g, e) in got.iter().zip(exact) {
            assert!((f64::from(*g) - e).abs() <= 1e-5 * (1.0 + e.abs()), "{what}: {g}, not {e}");
        }
    }
}

pub fn adamw(gpu: &Gpu) {
    for (shift, weight_decay, maximize) in [(false, 0.1, false), (true, 0.0, false), (false, 0.01, true)] {
        let o = AdamWOptions { lr: 0.01, weight_decay, maximize, ..AdamWOptions::default() };
        let (places, got) = on_gpu(gpu, shift, |t, steps| {
            let numbers = AdamWStep::new(&o, o.lr, o.weight_decay, t);
            // SAFETY: the steps' pieces lie in the buffers.
            unsafe { gpu.kernels.adamw(&gpu.stream, &numbers, steps) }.unwrap();
        });
        let cpu = on_cpu::<f32>(&places, got[0].len(), |t, p, g, m, v| {
            AdamWStep::new(&o, o.lr, o.weight_decay, t).step(p, g, m, v);
        });
        let exact = on_cpu::<f64>(&places, got[0].len(), |t, p, g, m, v| {
            for i in 0..p.len() {
                let g = if maximize { -g[i] } else { g[i] };
                m[i] = o.beta1 * m[i] + (1.0 - o.beta1) * g;
                v[i] = o.beta2 * v[i] + (1.0 - o.beta2) * g * g;
                let (m, v) = (m[i] / (1.0 - o.beta1.powi(t as i32)), v[i] / (1.0 - o.beta2.powi(t as i32)));
                p[i] -= o.lr * (m / (v.sqrt() + o.eps) + weight_decay * p[i]);
            }
        });
        compare(&got, &cpu, &exact, &format!("{o:?}"));
    }
}

pub fn sgd(gpu: &Gpu) {
    let momentums = [(0.0, 0.0, false), (0.9, 0.25, false), (0.9, 0.0, true)];
    for (i, (momentum, dampening, nesterov)) in momentums.into_iter().enumerate() {
        for (weight_decay, maximize) in [(0.0, false), (0.01, true)] {
            let o = SgdOptions { lr: 0.01, momentum, dampening, weight_decay, nesterov, maximize };
            let numbers = SgdStep::new(&o, o.lr, o.weight_decay);
            let (places, got) = on_gpu(gpu, i == 1, |t, steps| {
                // SAFETY: the steps' pieces lie in the buffers.
                unsafe { gpu.kernels.sgd(&gpu.stream, &numbers, momentum != 0.0, t == 1, steps) }.unwrap();
            });
            let cpu = on_cpu::<f32>(&places, got[0].len(), |t, p, g, b, _| {
                numbers.step(p, g, (momentum != 0.0).then_some(b), t == 1);
            });
            let exact = on_cpu::<f64>(&places, got[0].len(), |t, p, g, b, _| {
                for i in 0..p.len() {
                    let mut d = (if maximize { -g[i] } else { g[i] }) + weight_decay * p[i];
                    if momentum != 0.0 {
                        b[i] = if t == 1 { d } else { momentum * b[i] + (1.0 - dampening) * d };
                        d = if nesterov { d + momentum * b[i] } else { b[i] };
                    }
                    p[i] -= o.lr * d;
                }
            });
            compare(&got, &cpu, &exact, &format!("{o:?}"));
        }
    }
}

/// The part of each piece of `data` that has this order.
fn parts(gpu: &Gpu, order: NormOrder, places: &[(usize, usize)], data: &[f32]) -> Vec<f64> {
    let from = gpu.put(data);
    let out = gpu.put(&vec![-77f64; places.len()]);
    let scratch = gpu.put(&vec![0u8; Kernels::norm_scratch(places.len())]);
    let there = pieces(places, (from.address(), 4), (0, 0));
    // SAFETY: the pieces lie in the buffer, there is a result for each, and as much scratch memory as is asked for.
    unsafe { gpu.kernels.norm_parts(&gpu.stream, order, &there, scratch.address(), out.address()) }.unwrap();
    gpu.get(&out)
}

pub fn norms(gpu: &Gpu) {
    let lengths: Vec<usize> = [600_007].into_iter().chain(LENGTHS).chain((0..60).map(|i| i % 13)).collect();
    let orders = [
        NormOrder::Largest,
        NormOrder::Smallest,
        NormOrder::Count,
        NormOrder::Power(1.0),
        NormOrder::Power(2.0),
        NormOrder::Power(0.5),
        NormOrder::Power(3.0),
    ];
    for shift in [false, true] {
        let (places, n) = places(&lengths, shift);
        let data = noise(9, n);
        for order in orders {
            let got = parts(gpu, order, &places, &data);
            for ((at, len), got) in places.iter().zip(&got) {
                let x = data[*at..at + len].iter().map(|x| f64::from(x.abs()));
                let want: f64 = match order {
                    NormOrder::Largest => x.fold(0.0, f64::max),
                    NormOrder::Smallest => x.map(|x| -x).fold(f64::NEG_INFINITY, f64::max),
                    NormOrder::Count => x.filter(|x| *x != 0.0).count() as f64,
                    NormOrder::Power(p) => x.map(|x| x.powf(p)).sum(),
                };
                let close = got == &want || (got - want).abs() <= 1e-12 * want.abs();
                assert!(close, "{order:?} of {len} elements is {got}, not {want}");
            }
            // Alone, with other neighbours, elsewhere: the same bits.
            for i in [0, 5] {
                let (at, len) = places[i];
                let again = parts(
                    gpu,
                    order,
                    &[(32 + at % 16, len)],
                    &[&vec![1.0; 32 + at % 16], &data[at..at + len]].concat(),
                );
                assert_eq!(again[0].to_bits(), got[i].to_bits(), "{order:?}");
            }
        }
        for (value, at) in [(f32::NAN, 77), (f32::INFINITY, 600_006)] {
            let mut data = data.clone();
            data[places[0].0 + at] = value;
            for order in [NormOrder::Largest, NormOrder::Power(2.0), NormOrder::Power(1.0), NormOrder::Power(3.0)] {
                let got = parts(gpu, order, &places[..1], &data)[0];
                assert!(if value.is_nan() { got.is_nan() } else { got == f64::INFINITY }, "{order:?}: {got}");
            }
            let got = parts(gpu, NormOrder::Smallest, &places[..1], &data)[0];
            assert!(if value.is_nan() { got.is_nan() } else { got == 0.0 }, "{got}");
        }
    }
}
