//! Materialization: giving parameters without storage their values, one unit at a time, just before they are cut.
//!
//! Local and deterministic: units in order, the root first; within a unit its modules in order of registration; each
//! initializer is called once. Every rank runs the same initializers, so ranks that seed alike get the same values.
//!
//! The memory of a unit's parameters is private and released before the next unit's: one unit's full parameters exist
//! at a time. A module with a parameter that an enclosing unit owns (a tied one) is initialized with that unit, all its
//! parameters together: a reset function sees all of them, and running it twice would draw random numbers twice.

use crate::dtype::DType;
use crate::error::{err, Result};
use crate::layout::UnitLayout;
use crate::memory::HostBuffer;
use crate::module::{ModuleId, ModuleTree, ParamId};
use crate::plan::{Plan, UnitId};
use std::cell::Cell;
use std::ops::BitOr;
use std::sync::Arc;

/// A parameter to fill, during the call of an initializer.
#[derive(Clone, Copy, Debug)]
pub struct InitParam<'a> {
    pub param: ParamId,
    /// Fully qualified name.
    pub fqn: &'a str,
    pub shape: &'a [i64],
    /// As it was registered.
    pub dtype: DType,
    /// All elements, row-major, on a 64-byte line. Undefined at first; every one must be written.
    pub bytes: &'a [Cell<u8>],
}

impl InitParam<'_> {
    /// The elements of a float32 parameter; none of any other.
    pub fn values(&self) -> &[Cell<f32>] {
        self.elements(DType::F32)
    }

    /// The elements if they are of `dtype`, whose bits a T holds.
    fn elements<T>(&self, dtype: DType) -> &[Cell<T>] {
        if self.dtype != dtype {
            return &[];
        }
        // SAFETY: the memory is aligned for any element, holds `dtype.size()` bytes for each of them, and may be written
        // through a shared reference as it is made of cells; a T is plain bits.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr().cast(), self.bytes.len() / dtype.size()) }
    }

    /// Marks every element as not written.
    fn mark_untouched(&self) {
        match self.dtype {
            DType::F16 => self.elements::<u16>(DType::F16).iter().for_each(|v| v.set(UNTOUCHED_F16.0)),
            DType::BF16 => self.elements::<u16>(DType::BF16).iter().for_each(|v| v.set(UNTOUCHED_BF16.0)),
            _ => self.elements::<u32>(DType::F32).iter().for_each(|v| v.set(UNTOUCHED_F32.0)),
        }
    }

    /// The first element that was not written, or was computed from one that was not.
    fn first_untouched(&self) -> Option<usize> {
        match self.dtype {
            DType::F16 => first_untouched(self.elements::<u16>(DType::F16), UNTOUCHED_F16),
            DType::BF16 => first_untouched(self.elements::<u16>(DType::BF16), UNTOUCHED_BF16),
            _ => first_untouched(self.elements::<u32>(DType::F32), UNTOUCHED_F32),
        }
    }
}

/// A module to initialize, during the call of its initializer.
#[derive(Clone, Copy, Debug)]
pub struct InitModule<'a> {
    pub module: ModuleId,
    /// Fully qualified name, "" for the root.
    pub fqn: &'a str,
    pub class_name: &'a str,
    /// The parameters to fill: those without storage that it was the first to register, in order of registration. A
    /// reset function does not get those that have an initializer of their own.
    pub params: &'a [InitParam<'a>],
}

/// Initializes a module's parameters. An error stops the materialization and is its error.
pub type ModuleInit = Arc<dyn Fn(&InitModule<'_>) -> Result<()> + Send + Sync>;
/// Initializes one parameter.
pub type ParamInit = Arc<dyn Fn(&InitParam<'_>) -> Result<()> + Send + Sync>;

/// What memory holds until an initializer writes it: a signalling NaN, which no arithmetic produces; and its sign and quiet
/// bit, which arithmetic on it may change, so that values computed from it are found too.
const UNTOUCHED_F32: (u32, u32) = (0x7fa5_f5d9, 0x8040_0000);
const UNTOUCHED_F16: (u16, u16) = (0x7d59, 0x8200);
const UNTOUCHED_BF16: (u16, u16) = (0x7fa5, 0x8040);

/// What is initialized in one go.
struct Job {
    module: ModuleId,
    /// Parameters without storage that the module was the first to register.
    params: Vec<ParamId>,
}

/// Initializes every parameter of `tree` that has no storage: with `init` (called for each module that has such
/// parameters), else with the parameter's own initializer, else with its module's reset function. A module that has a
/// reset function and in which no parameter is registered is initialized too, with none. `take` is called once for
/// each parameter, when its values are complete; they can be read during the call. Returns the most bytes of full
/// parameters that were in memory at once. Nothing is called when a parameter has no initializer, and nothing more
/// after the first error, be it one of `take`.
pub fn materialize(
    tree: &ModuleTree,
    plan: &Plan,
    init: Option<&ModuleInit>,
    take: &mut dyn FnMut(ParamId, *const u8) -> Result<()>,
) -> Result<u64> {
    let mut peak = 0;
    for (unit, jobs) in jobs(tree, plan, init)?.into_iter().enumerate() {
        peak = peak.max(materialize_unit(tree, plan, unit as UnitId, &jobs, init, take)?);
    }
    Ok(peak)
}

/// The jobs of each unit; an error names a parameter without initializer.
fn jobs(tree: &ModuleTree, plan: &Plan, init: Option<&ModuleInit>) -> Result<Vec<Vec<Job>>> {
    let mut of_unit: Vec<Vec<Job>> = plan.units.iter().map(|_| Vec::new()).collect();
    for (m, module) in tree.modules().iter().enumerate() {
        let m = m as ModuleId;
        let mut params: Vec<ParamId> = Vec::new();
        for p in &module.params {
            let param = tree.param(*p)?;
            // Registered here twice is still one parameter.
            if param.modules[0] == m && !param.has_storage() && !params.contains(p) {
                params.push(*p);
            }
        }
        let reset = tree.reset(m);
        if let Some(p) = params.iter().find(|p| init.is_none() && tree.param_init(**p).is_none() && reset.is_none()) {
            return Err(err!(
                InvalidArgument,
                "parameter \"{}\" has no storage and nothing that initializes it: no initializer of its own, no reset \
                 function of module {}, no param_init_fn",
                tree.param(*p)?.fqn,
                module_name(tree, m)
            ));
        }
        let fills_buffers = module.params.is_empty() && reset.is_some();
        if !params.is_empty() || fills_buffers {
            // Units that own a parameter enclose its module's unit, and come before it.
            let owners = params.iter().map(|p| plan.params[*p as usize].unit);
            let unit = owners.chain([plan.unit_of_module[m as usize]]).min().unwrap_or(Plan::ROOT_UNIT);
            of_unit[unit as usize].push(Job { module: m, params });
        }
    }
    Ok(of_unit)
}

/// Runs the jobs of one unit in memory that ends with the call; returns the bytes of its parameters.
fn materialize_unit(
    tree: &ModuleTree,
    plan: &Plan,
    unit: UnitId,
    jobs: &[Job],
    init: Option<&ModuleInit>,
    take: &mut dyn FnMut(ParamId, *const u8) -> Result<()>,
) -> Result<u64> {
    let bytes_of = |p: &ParamId| tree.params()[*p as usize].numel() * tree.params()[*p as usize].dtype.size();
    let bytes: Vec<usize> = jobs.iter().flat_map(|j| &j.params).map(bytes_of).collect();
    let layout = UnitLayout::plan(&bytes, 1, 1);
    let label = plan.units[unit as usize].label();
    let floats = layout.len.div_ceil(size_of::<f32>());
    let memory = HostBuffer::zeroed(floats, &format!("the parameters of unit \"{label}\" while they are initialized"))?;
    let mut places = layout.offsets.iter().zip(&layout.numels);
    for job in jobs {
        let params: Vec<InitParam> = job
            .params
            .iter()
            .zip(&mut places)
            .map(|(p, (offset, bytes))| {
                let param = &tree.params()[*p as usize];
                // SAFETY: the layout gave the parameter this part of `memory` alone, which outlives `params`; only
                // this thread knows it; a Cell<u8> is laid out as u8 and may be written through a shared reference.
                let bytes =
                    unsafe { std::slice::from_raw_parts(memory.as_ptr().cast::<Cell<u8>>().add(*offset), *bytes) };
                InitParam { param: *p, fqn: &param.fqn, shape: &param.shape, dtype: param.dtype, bytes }
            })
            .collect();
        run(tree, job.module, &params, init)?;
        params.iter().try_for_each(|p| take(p.param, p.bytes.as_ptr().cast()))?;
    }
    Ok(bytes.iter().sum::<usize>() as u64)
}

/// Initializes one module's parameters, and checks that nothing was left out.
fn run(tree: &ModuleTree, module: ModuleId, params: &[InitParam], init: Option<&ModuleInit>) -> Result<()> {
    let mut together: Vec<InitParam> = Vec::new();
    for p in params {
        match tree.param_init(p.param) {
            Some(own) if init.is_none() => {
                let what = format!("the initializer of parameter \"{}\"", p.fqn);
                fill(&[*p], &what, || own(p))?;
            }
            _ => together.push(*p),
        }
    }
    let name = module_name(tree, module);
    let (call, what) = match (init, tree.reset(module)) {
        (Some(init), _) => (init, format!("param_init_fn for module {name}")),
        (None, Some(reset)) if !together.is_empty() || params.is_empty() => {
            (reset, format!("the reset function of module {name}"))
        }
        _ => return Ok(()),
    };
    let m = tree.module(module)?;
    let info = InitModule { module, fqn: &m.fqn, class_name: &m.class_name, params: &together };
    fill(&together, &what, || call(&info))
}

/// Calls an initializer of `params`; `what` names it.
fn fill(params: &[InitParam], what: &str, call: impl FnOnce() -> Result<()>) -> Result<()> {
    params.iter().for_each(InitParam::mark_untouched);
    call().map_err(|e| e.context(what))?;
    for p in params {
        if let Some(i) = p.first_untouched() {
            return Err(err!(InvalidState, "parameter \"{}\" was left uninitialized by {what} (element {i})", p.fqn));
        }
    }
    Ok(())
}

/// The first element that is `mark`, whatever its `changeable` bits are.
fn first_untouched<T: Copy + PartialEq + BitOr<Output = T>>(
    values: &[Cell<T>],
    (mark, changeable): (T, T),
) -> Option<usize> {
    /// Without an early end inside a block, so that the compiler can use vectors.
    const BLOCK: usize = 1024;
    let untouched = |v: &Cell<T>| v.get() | changeable == mark | changeable;
    let found = |block: &[Cell<T>]| block.iter().fold(false, |found, v| found | untouched(v));
    let block = values.chunks(BLOCK).position(found)? * BLOCK;
    values[block..].iter().position(untouched).map(|i| block + i)
}

/// How messages call a module.
fn module_name(tree: &ModuleTree, module: ModuleId) -> String {
    let m = &tree.modules()[module as usize];
    let fqn = if m.fqn.is_empty() { "(root)" } else { &m.fqn };
    format!("\"{fqn}\" ({})", m.class_name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::ROOT;
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    static HELD: [f32; 2] = [1.0, 2.0];

    type Calls = Arc<Mutex<Vec<String>>>;

    fn set(p: &InitParam, value: f32) {
        assert_eq!(p.values().as_ptr() as usize % 64, 0, "{}", p.fqn);
        assert_eq!(p.values().len() as i64, p.shape.iter().product::<i64>());
        p.values().iter().for_each(|v| v.set(value));
    }

    /// Fills every parameter it is given with its number, and says so.
    fn filler(calls: &Calls, who: &'static str) -> ModuleInit {
        let calls = calls.clone();
        Arc::new(move |m| {
            m.params.iter().for_each(|p| set(p, p.param as f32));
            let params: Vec<&str> = m.params.iter().map(|p| p.fqn).collect();
            calls.lock().unwrap().push(format!("{who} {} [{}]", m.fqn, params.join(" ")));
            Ok(())
        })
    }

    /// root(r: 5) > a(w: 7x3, held: 2 with storage) > x(v: 100, u: 9), b > buffers(); units: root, a, a.x. Every module
    /// with parameters has a reset function, and so has b.buffers.
    fn tree(calls: &Calls) -> ModuleTree {
        let mut t = ModuleTree::new("Net");
        let a = t.add_module(ROOT, "a", "Block").unwrap();
        let x = t.add_module(a, "x", "Linear").unwrap();
        let b = t.add_module(ROOT, "b", "Block").unwrap();
        let buffers = t.add_module(b, "buffers", "Norm").unwrap();
        let none = std::ptr::null();
        t.add_param(x, "v", &[100], DType::F32, true, none).unwrap();
        t.add_param(a, "w", &[7, 3], DType::F32, true, none).unwrap();
        t.add_param(a, "held", &[2], DType::F32, true, HELD.as_ptr().cast()).unwrap();
        t.add_param(ROOT, "r", &[5], DType::F32, true, none).unwrap();
        t.add_param(x, "u", &[9], DType::F32, false, none).unwrap();
        t.add_param(x, "empty", &[0, 4], DType::F32, true, none).unwrap();
        for m in [ROOT, a, x, buffers] {
            t.set_reset(m, filler(calls, "reset")).unwrap();
        }
        t.wrap(a).unwrap();
        t.wrap(x).unwrap();
        t
    }

    type Taken = BTreeMap<ParamId, Vec<f32>>;

    /// What was taken, and the peak or the error.
    fn run_all(t: &ModuleTree, init: Option<&ModuleInit>) -> (Taken, Result<u64>) {
        let plan = Plan::new(t, 0, 2).unwrap();
        let mut taken = Taken::new();
        let peak = materialize(t, &plan, init, &mut |p, values| {
            // SAFETY: materialize says that the parameter's elements can be read during the call.
            let values = unsafe { std::slice::from_raw_parts(values.cast::<f32>(), t.params()[p as usize].numel()) };
            assert!(taken.insert(p, values.to_vec()).is_none(), "parameter {p} is taken once");
            Ok(())
        });
        (taken, peak)
    }

    fn seen(calls: &Calls) -> Vec<String> {
        std::mem::take(&mut *calls.lock().unwrap())
    }

    #[test]
    fn units_in_order_one_at_a_time() {
        let calls = Calls::default();
        let (taken, peak) = run_all(&tree(&calls), None);
        assert_eq!(seen(&calls), ["reset  [r]", "reset b.buffers []", "reset a [a.w]", "reset a.x [a.x.v a.x.u]"]);
        // The largest unit, a.x, and nothing besides it.
        assert_eq!(peak.unwrap(), (100 + 9) * 4);
        assert_eq!(taken.keys().copied().collect::<Vec<_>>(), [0, 1, 3, 4]);
        for (p, values) in &taken {
            assert!(values.iter().all(|v| *v == *p as f32));
        }
    }

    #[test]
    fn a_model_with_storage_takes_no_memory() {
        let mut t = ModuleTree::new("Net");
        t.add_param(ROOT, "held", &[2], DType::F32, true, HELD.as_ptr().cast()).unwrap();
        let nobody: ModuleInit = Arc::new(|m| Err(err!(Callback, "{} is called", m.class_name)));
        t.set_reset(ROOT, nobody.clone()).unwrap();
        let (taken, peak) = run_all(&t, Some(&nobody));
        assert_eq!((taken.len(), peak), (0, Ok(0)));
        assert_eq!(run_all(&t, None).1, Ok(0));
    }

    #[test]
    fn param_init_fn_before_own_initializers_before_reset_functions() {
        let calls = Calls::default();
        let mut t = tree(&calls);
        let own = calls.clone();
        let init: ParamInit = Arc::new(move |p| {
            set(p, -1.0);
            own.lock().unwrap().push(format!("own {} {:?}", p.fqn, p.shape));
            Ok(())
        });
        t.set_param_init(0, init.clone()).unwrap();
        t.set_param_init(1, init).unwrap();
        let (taken, peak) = run_all(&t, None);
        peak.unwrap();
        assert_eq!(
            seen(&calls),
            ["reset  [r]", "reset b.buffers []", "own a.w [7, 3]", "own a.x.v [100]", "reset a.x [a.x.u]"]
        );
        assert_eq!((taken[&0][99], taken[&1][20], taken[&4][8]), (-1.0, -1.0, 4.0));

        let (taken, peak) = run_all(&t, Some(&filler(&calls, "init")));
        peak.unwrap();
        assert_eq!(seen(&calls), ["init  [r]", "init b.buffers []", "init a [a.w]", "init a.x [a.x.v a.x.u]"]);
        assert_eq!((taken[&0][99], taken[&1][20], taken[&4][8]), (0.0, 1.0, 4.0));
    }

    #[test]
    fn what_is_left_out_is_named() {
        let calls = Calls::default();
        for (gap, from_gap) in [(0, false), (99, false), (50, true)] {
            let mut t = tree(&calls);
            let reset: ModuleInit = Arc::new(move |m| {
                for p in m.params {
                    for (i, v) in p.values().iter().enumerate().filter(|(i, _)| (p.param, *i) != (0, gap)) {
                        v.set(i as f32);
                    }
                }
                if let (true, Some(p)) = (from_gap, m.params.iter().find(|p| p.param == 0)) {
                    p.values()[gap].set(-p.values()[gap].get() * 3.0);
                }
                Ok(())
            });
            t.set_reset(2, reset.clone()).unwrap();
            let (taken, e) = run_all(&t, None);
            let at = format!("(element {gap})");
            let want = |what: &str| format!("parameter \"a.x.v\" was left uninitialized by {what} {at}");
            assert_eq!(e, Err(err!(InvalidState, "{}", want("the reset function of module \"a.x\" (Linear)"))));
            assert_eq!(taken.keys().copied().collect::<Vec<_>>(), [1, 3], "what came before was taken");
            let e = run_all(&t, Some(&reset)).1.unwrap_err();
            assert_eq!(e.message, want("param_init_fn for module \"a.x\" (Linear)"));
            let three: ParamInit = Arc::new(|p| {
                p.values()[..3].iter().for_each(|v| v.set(0.0));
                Ok(())
            });
            t.set_param_init(0, three).unwrap();
            let e = run_all(&t, None).1.unwrap_err();
            assert!(e.message.contains("the initializer of parameter \"a.x.v\" (element 3)"), "{e}");
        }
    }

    #[test]
    fn a_parameter_without_initializer_is_named_before_anything_is_called() {
        let calls = Calls::default();
        let mut t = tree(&calls);
        t.add_param(3, "lost", &[4], DType::F32, true, std::ptr::null()).unwrap();
        let e = run_all(&t, None).1.unwrap_err();
        assert_eq!(e.status, crate::error::Status::InvalidArgument);
        assert!(e.message.contains("\"b.lost\" has no storage") && e.message.contains("\"b\" (Block)"), "{e}");
        assert_eq!(seen(&calls), [""; 0]);
        // Each of the three initializes it.
        assert!(run_all(&t, Some(&filler(&calls, "init"))).1.is_ok());
        let mut own = t.clone();
        own.set_param_init(
            6,
            Arc::new(|p| {
                set(p, 0.0);
                Ok(())
            }),
        )
        .unwrap();
        assert!(run_all(&own, None).1.is_ok());
        t.set_reset(3, filler(&calls, "reset")).unwrap();
        assert!(run_all(&t, None).1.is_ok());
    }

    #[test]
    fn the_first_failure_stops_and_is_the_error() {
        let calls = Calls::default();
        let mut t = tree(&calls);
        t.set_reset(1, Arc::new(|_| Err(err!(Callback, "returned 7")))).unwrap();
        let (taken, e) = run_all(&t, None);
        assert_eq!(e, Err(err!(Callback, "the reset function of module \"a\" (Block): returned 7")));
        assert_eq!(seen(&calls), ["reset  [r]", "reset b.buffers []"]);
        assert_eq!(taken.keys().copied().collect::<Vec<_>>(), [3]);
        t.set_param_init(1, Arc::new(|_| Err(err!(Callback, "returned -1")))).unwrap();
        let e = run_all(&t, None).1.unwrap_err();
        assert_eq!(e.message, "the initializer of parameter \"a.w\": returned -1");
    }

    #[test]
    fn a_tied_parameter_is_initialized_once_with_all_of_its_first_module() {
        let calls = Calls::default();
        let mut t = tree(&calls);
        // Also used in b, so that the root owns it; and once more in its own module.
        t.tie_param(3, "v", 0).unwrap();
        t.tie_param(2, "again", 0).unwrap();
        assert_eq!(t.owner(&t.params()[0]), ROOT);
        let (taken, peak) = run_all(&t, None);
        assert_eq!(seen(&calls), ["reset  [r]", "reset a.x [a.x.v a.x.u]", "reset b.buffers []", "reset a [a.w]"]);
        assert_eq!(peak.unwrap(), (5 + 100 + 9) * 4);
        assert_eq!(taken.keys().copied().collect::<Vec<_>>(), [0, 1, 3, 4]);
        assert!(taken[&0].iter().all(|v| *v == 0.0) && taken[&4].iter().all(|v| *v == 4.0));
    }

    #[test]
    fn untouched_elements_are_found_anywhere() {
        for len in [1, 1023, 1024, 1025, 5000] {
            let values: Vec<Cell<u32>> = (0..len).map(|i| Cell::new((i as f32).to_bits())).collect();
            for other in [f32::NAN, f32::INFINITY, -0.0] {
                values[len / 2].set(other.to_bits());
                assert_eq!(first_untouched(&values, UNTOUCHED_F32), None);
            }
            for i in [0, len / 2, len - 1] {
                let old = values[i].replace(UNTOUCHED_F32.0);
                assert_eq!(first_untouched(&values, UNTOUCHED_F32), Some(i));
                values[i].set(old);
            }
        }
        assert!(f32::from_bits(UNTOUCHED_F32.0).is_nan() && UNTOUCHED_F32.0 & 0x40_0000 == 0, "a signalling NaN");
        let (half, brain) = (half::f16::from_bits(UNTOUCHED_F16.0), half::bf16::from_bits(UNTOUCHED_BF16.0));
        assert!(half.is_nan() && UNTOUCHED_F16.0 & 0x200 == 0, "a signalling NaN");
        assert!(brain.is_nan() && UNTOUCHED_BF16.0 & 0x40 == 0, "a signalling NaN");
        // Arithmetic goes through float32, and quiets it.
        let computed = [half::f16::from_f32(-half.to_f32() * 3.0).to_bits()];
        assert_eq!(first_untouched(&computed.map(Cell::new), UNTOUCHED_F16), Some(0));
        let computed = [half::bf16::from_f32(-brain.to_f32() * 3.0).to_bits()];
        assert_eq!(first_untouched(&computed.map(Cell::new), UNTOUCHED_BF16), Some(0));
    }
}
