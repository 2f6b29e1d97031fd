//! Communication hooks of engines on the CPU and on a GPU (or what stands in for it) that do the same to gradients, and what they
//! have seen.

use crate::engine::{Place, Trainer};
use fsdp::device::cuda::kernels::{Kernels, Piece};
use fsdp::device::cuda::{DeviceMemory, Stream};
use fsdp::dtype::DType;
use fsdp::engine::Engine;
use fsdp::error::Result;
use fsdp::hook::{HookGradient, UnitGradients};
use fsdp::module::ParamId;
use fsdp::plan::UnitId;
use half::bf16;
use std::sync::{Arc, Mutex};

/// What a hook does.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    Scale(f32),
    /// To bfloat16 and back.
    Round,
}

/// A unit, its name, and the parameters that have gradients, with their lengths.
pub type Call = (UnitId, String, Vec<(ParamId, usize)>);

/// What a hook has seen; and the streams, each once.
#[derive(Debug, Default, PartialEq)]
pub struct Seen {
    pub calls: Vec<Call>,
    pub streams: Vec<usize>,
}

/// Has the trainer's engine call a hook that changes gradients in this way from here on.
pub fn set(trainer: &Trainer, change: Change) -> Arc<Mutex<Seen>> {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let (engine, place, record) = (&trainer.engine, &trainer.place, seen.clone());
    match place {
        Place::Cpu => set_hook(engine, record, move |unit| {
            // SAFETY: the hook's own until it returns.
            let floats = |g: &HookGradient| unsafe { std::slice::from_raw_parts_mut(g.data, g.numel) };
            for x in unit.gradients.iter().filter(|g| g.numel > 0).flat_map(floats) {
                *x = match change {
                    Change::Scale(factor) => *x * factor,
                    Change::Round => bf16::from_f32(*x).to_f32(),
                };
            }
            Ok(())
        }),
        Place::Gpu { stream, source, .. } => {
            let (context, source) = (stream.context().clone(), source.clone());
            let kernels = Kernels::load(&context).unwrap();
            set_hook(engine, record, move |unit| {
                // SAFETY: the engine's stream, which outlives it.
                let stream = unsafe { Stream::borrowed(&context, unit.stream) }?;
                let pieces =
                    |g: &HookGradient| Piece { from: g.data as u64, to: g.data as u64, len: g.numel as u64, add: 0 };
                let pieces: Vec<Piece> = unit.gradients.iter().filter(|g| g.numel > 0).map(pieces).collect();
                match change {
                    // SAFETY: complete on this stream, and reduced on it afterwards.
                    Change::Scale(factor) => unsafe { kernels.scale(&stream, DType::F32, &pieces, factor) },
                    Change::Round => pieces.iter().try_for_each(|p| {
                        let narrow = DeviceMemory::new(&source, &stream, p.len as usize * 2, "rounded gradients")?;
                        let (down, up) = (Piece { to: narrow.address(), ..*p }, Piece { from: narrow.address(), ..*p });
                        // SAFETY: as above; the memory is given back in the stream's order.
                        unsafe {
                            kernels.cast(&stream, DType::F32, DType::BF16, &[down])?;
                            kernels.cast(&stream, DType::BF16, DType::F32, &[up])
                        }
                    }),
                }
            })
        }
    }
    seen
}

fn set_hook(
    engine: &Engine,
    seen: Arc<Mutex<Seen>>,
    change: impl Fn(&UnitGradients) -> Result<()> + Send + Sync + 'static,
) {
    let hook = move |unit: &UnitGradients| {
        let mut seen = seen.lock().unwrap();
        let params = unit.gradients.iter().map(|g| (g.param, g.numel)).collect();
        seen.calls.push((unit.unit, unit.name.to_string(), params));
        if !seen.streams.contains(&(unit.stream as usize)) {
            seen.streams.push(unit.stream as usize);
        }
        change(unit)
    };
    engine.set_comm_hook(Some(Arc::new(hook))).unwrap();
}
