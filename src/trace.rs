//! Execution-order tracing: which modules a forward enters and which parameters its operations read, without any data.
//!
//! Pure data. A host announces enter, use and leave while it walks through a forward; what is recorded is what
//! PyTorch's FSDP records of a symbolically traced one. Invariants: a module is left before those around it; the root
//! is entered first and once.

use crate::error::{err, Result};
use crate::module::{ModuleId, ModuleTree, ParamId, ROOT};
use crate::plan::{Plan, UnitId};

/// Parameters that one operation or one module called by another needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The module that was called, or the one whose operation it was.
    pub module: ModuleId,
    /// All parameters in and below the module that was called, or those that the operation reads.
    pub params: Vec<ParamId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Enter(ModuleId),
    Use(ParamId),
    Leave,
}

/// The recorded order of one forward.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Fully qualified names of the traced model.
    modules: Vec<String>,
    params: Vec<String>,
    /// The parameters in and below each module.
    below: Vec<Vec<ParamId>>,
    events: Vec<Event>,
    /// Modules entered and not left.
    stack: Vec<ModuleId>,
    module_order: Vec<ModuleId>,
    param_order: Vec<ParamId>,
    visited: Vec<bool>,
    usages: Vec<Vec<Usage>>,
}

impl Trace {
    /// An empty trace of a forward of `tree`, as it is now.
    pub fn new(tree: &ModuleTree) -> Trace {
        let modules = tree.modules().len();
        Trace {
            modules: tree.modules().iter().map(|m| m.fqn.clone()).collect(),
            params: tree.params().iter().map(|p| p.fqn.clone()).collect(),
            below: params_below(tree),
            events: Vec::new(),
            stack: Vec::new(),
            module_order: Vec::new(),
            param_order: Vec::new(),
            visited: vec![false; tree.params().len()],
            usages: vec![Vec::new(); modules],
        }
    }

    /// The forward of `module` begins. What was recorded as used inside it in an earlier call is forgotten.
    pub fn enter(&mut self, module: ModuleId) -> Result<()> {
        let m = self.check_module(module)?;
        if module == ROOT && !self.module_order.is_empty() {
            return Err(err!(InvalidState, "the root is entered a second time: a trace is of one forward"));
        }
        if let Some(caller) = self.stack.last() {
            if !self.below[m].is_empty() {
                self.usages[*caller as usize].push(Usage { module, params: self.below[m].clone() });
            }
        } else if module != ROOT {
            let when = if self.module_order.is_empty() { "before the root" } else { "after the root was left" };
            return Err(err!(InvalidState, "module \"{}\" is entered {when}", self.modules[m]));
        }
        self.usages[m].clear();
        self.stack.push(module);
        self.module_order.push(module);
        self.events.push(Event::Enter(module));
        Ok(())
    }

    /// One operation of the module entered last reads `params`.
    pub fn use_params(&mut self, params: &[ParamId]) -> Result<()> {
        let module = *self.stack.last().ok_or_else(|| {
            err!(InvalidState, "parameters are used outside the root's forward: enter the root first")
        })?;
        params.iter().try_for_each(|p| self.check_param(*p))?;
        if params.is_empty() {
            return Ok(());
        }
        for p in params {
            if !std::mem::replace(&mut self.visited[*p as usize], true) {
                self.param_order.push(*p);
            }
            self.events.push(Event::Use(*p));
        }
        self.usages[module as usize].push(Usage { module, params: params.to_vec() });
        Ok(())
    }

    /// The forward of `module` ends; it must be the module entered last.
    pub fn leave(&mut self, module: ModuleId) -> Result<()> {
        let m = self.check_module(module)?;
        match self.stack.last() {
            Some(last) if *last == module => {
                self.stack.pop();
                self.events.push(Event::Leave);
                Ok(())
            }
            Some(last) => Err(err!(
                InvalidState,
                "module \"{}\" is left inside the forward of module \"{}\"",
                self.modules[m],
                self.modules[*last as usize]
            )),
            None => Err(err!(InvalidState, "module \"{}\" is left without having been entered", self.modules[m])),
        }
    }

    /// The modules in the order they were entered, as often as they were.
    pub fn module_order(&self) -> &[ModuleId] {
        &self.module_order
    }

    /// The parameters in the order of their first use.
    pub fn param_order(&self) -> &[ParamId] {
        &self.param_order
    }

    /// Whether an operation used the parameter.
    pub fn visited(&self, param: ParamId) -> Result<bool> {
        self.check_param(param)?;
        Ok(self.visited[param as usize])
    }

    /// What was used inside the module's own forward, in its latest call: one entry for each operation that read
    /// parameters, and one for each module called that has any. Empty if the module was never entered.
    pub fn usages(&self, module: ModuleId) -> Result<&[Usage]> {
        Ok(&self.usages[self.check_module(module)?])
    }

    /// Refuses a trace that is not complete, or not of the model that has this many modules and parameters of these
    /// fully qualified names.
    pub fn check_fits<'a>(&self, modules: usize, params: impl Iterator<Item = &'a str>) -> Result<()> {
        if self.module_order.is_empty() {
            return Err(err!(InvalidState, "the trace is empty: the root was never entered"));
        }
        if let Some(open) = self.stack.last() {
            let open = &self.modules[*open as usize];
            return Err(err!(InvalidState, "the trace is not complete: module \"{open}\" was entered but not left"));
        }
        let other = |traced: String, here: String| {
            Err(err!(InvalidArgument, "the trace is of another model: that has {traced}, this one {here}"))
        };
        let params: Vec<&str> = params.collect();
        if let Some((t, p)) = self.params.iter().zip(&params).find(|(t, p)| t != *p) {
            return other(format!("the parameter \"{t}\""), format!("\"{p}\" there"));
        }
        if (self.modules.len(), self.params.len()) != (modules, params.len()) {
            let counts = |modules, params| format!("{modules} modules and {params} parameters");
            return other(counts(self.modules.len(), self.params.len()), counts(modules, params.len()));
        }
        Ok(())
    }

    /// The units in the order in which the forward needs them to be unsharded: when a module of a unit is entered, or a
    /// parameter of a unit used, while no module of that unit is being run. (A unit stays unsharded while units inside
    /// it run, so coming back to it is no need.) A unit needed twice is there twice, one without elements never.
    pub fn unit_order(&self, plan: &Plan) -> Vec<UnitId> {
        let mut order = Vec::new();
        let mut running: Vec<UnitId> = Vec::new();
        for event in &self.events {
            let unit = match event {
                Event::Enter(m) => plan.unit_of_module[*m as usize],
                Event::Use(p) => plan.params[*p as usize].unit,
                Event::Leave => {
                    running.pop();
                    continue;
                }
            };
            let needed = !running.contains(&unit) && plan.units[unit as usize].bytes() > 0;
            if needed && order.last() != Some(&unit) {
                order.push(unit);
            }
            if let Event::Enter(_) = event {
                running.push(unit);
            }
        }
        order
    }

    fn check_module(&self, module: ModuleId) -> Result<usize> {
        match (module as usize) < self.modules.len() {
            true => Ok(module as usize),
            false => Err(err!(
                InvalidArgument,
                "module {module} does not exist: the traced model has {}",
                self.modules.len()
            )),
        }
    }

    fn check_param(&self, param: ParamId) -> Result<()> {
        match (param as usize) < self.params.len() {
            true => Ok(()),
            false => Err(err!(
                InvalidArgument,
                "parameter {param} does not exist: the traced model has {}",
                self.params.len()
            )),
        }
    }
}

/// The parameters in and below each module: its own first, then its children's, each once.
fn params_below(tree: &ModuleTree) -> Vec<Vec<ParamId>> {
    let mut below: Vec<Vec<ParamId>> = vec![Vec::new(); tree.modules().len()];
    // The module whose list each parameter was put into last.
    let mut listed = vec![None; tree.params().len()];
    for m in tree.preorder().into_iter().rev() {
        let module = &tree.modules()[m as usize];
        let children = module.children.iter().flat_map(|c| below[*c as usize].iter());
        let all = module.params.iter().chain(children).copied();
        below[m as usize] = all.filter(|p| listed[*p as usize].replace(m) != Some(m)).collect();
    }
    below
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    const LAYER0: ModuleId = 1;
    const LAYER1: ModuleId = 2;
    const LAYER2: ModuleId = 3;
    const RELU: ModuleId = 7;
    const W1: ParamId = 0;
    const W2: ParamId = 1;
    const UNUSED: ParamId = 2;

    /// The model of PyTorch's tracing test: two weights and an unused one in the root; layer0 with a bias, layer1,
    /// layer2 of linear, relu, linear; and one relu that is called four times. Parameters: layer0 3 and 4, layer1 5,
    /// layer2 6, 7.
    fn model() -> ModuleTree {
        let none = std::ptr::null();
        let mut t = ModuleTree::new("Model");
        for (parent, name, class) in [
            (ROOT, "layer0", "Linear"),
            (ROOT, "layer1", "Linear"),
            (ROOT, "layer2", "Sequential"),
            (LAYER2, "0", "Linear"),
            (LAYER2, "1", "ReLU"),
            (LAYER2, "2", "Linear"),
            (ROOT, "relu", "ReLU"),
        ] {
            t.add_module(parent, name, class).unwrap();
        }
        for (module, name, shape) in [
            (ROOT, "weight1", &[6i64, 6][..]),
            (ROOT, "weight2", &[6, 6]),
            (ROOT, "weight_unused", &[2, 2]),
            (LAYER0, "weight", &[6, 6]),
            (LAYER0, "bias", &[6]),
            (LAYER1, "weight", &[6, 6]),
            (4, "weight", &[3, 6]),
            (6, "weight", &[6, 3]),
        ] {
            t.add_param(module, name, shape, DType::F32, true, none).unwrap();
        }
        t
    }

    fn call(t: &mut Trace, module: ModuleId, params: &[ParamId]) {
        t.enter(module).unwrap();
        t.use_params(params).unwrap();
        t.leave(module).unwrap();
    }

    /// Its forward with all layers: layer0 is used twice.
    fn traced(tree: &ModuleTree) -> Trace {
        let mut t = Trace::new(tree);
        t.enter(ROOT).unwrap();
        call(&mut t, LAYER0, &[3, 4]);
        call(&mut t, RELU, &[]);
        t.enter(LAYER2).unwrap();
        call(&mut t, 4, &[6]);
        call(&mut t, 5, &[]);
        call(&mut t, 6, &[7]);
        t.leave(LAYER2).unwrap();
        call(&mut t, RELU, &[]);
        t.use_params(&[W1]).unwrap();
        call(&mut t, LAYER1, &[5]);
        call(&mut t, RELU, &[]);
        t.use_params(&[W2]).unwrap();
        call(&mut t, LAYER0, &[3, 4]);
        call(&mut t, RELU, &[]);
        t.leave(ROOT).unwrap();
        t
    }

    #[test]
    fn what_pytorch_records() {
        let t = traced(&model());
        let order = [ROOT, LAYER0, RELU, LAYER2, 4, 5, 6, RELU, LAYER1, RELU, LAYER0, RELU];
        assert_eq!(t.module_order(), order);
        let usages = |m: ModuleId| -> Vec<(ModuleId, Vec<ParamId>)> {
            t.usages(m).unwrap().iter().map(|u| (u.module, u.params.clone())).collect()
        };
        let layer0 = (LAYER0, vec![3, 4]);
        assert_eq!(
            usages(ROOT),
            [
                layer0.clone(),
                (LAYER2, vec![6, 7]),
                (ROOT, vec![W1]),
                (LAYER1, vec![5]),
                (ROOT, vec![W2]),
                layer0.clone()
            ]
        );
        assert_eq!(usages(LAYER0), [layer0]);
        assert_eq!(usages(LAYER1), [(LAYER1, vec![5])]);
        assert_eq!(usages(LAYER2), [(4, vec![6]), (6, vec![7])]);
        assert_eq!(usages(RELU), []);
        assert_eq!(t.param_order(), [3, 4, 6, 7, W1, 5, W2]);
        let visited: Vec<ParamId> = (0..8).filter(|p| t.visited(*p).unwrap()).collect();
        assert_eq!(visited, [W1, W2, 3, 4, 5, 6, 7]);
        assert!(!t.visited(UNUSED).unwrap());
    }

    #[test]
    fn tied_parameters_count_once_below_a_module() {
        let mut tree = model();
        tree.tie_param(LAYER1, "tied", 3).unwrap();
        tree.tie_param(6, "tied", 6).unwrap();
        let below = params_below(&tree);
        assert_eq!(below[LAYER1 as usize], [5, 3]);
        assert_eq!(below[LAYER2 as usize], [6, 7]);
        assert_eq!(below[ROOT as usize], [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn wrong_order_names_the_modules_and_changes_nothing() {
        let tree = model();
        let mut t = Trace::new(&tree);
        let message = |r: Result<()>| r.unwrap_err().message;
        assert!(message(t.enter(LAYER0)).contains("\"layer0\" is entered before the root"));
        assert!(message(t.use_params(&[0])).contains("outside"));
        assert!(message(t.leave(LAYER0)).contains("\"layer0\" is left without"));
        t.enter(ROOT).unwrap();
        t.enter(LAYER2).unwrap();
        assert!(message(t.leave(ROOT)).contains("\"\" is left inside the forward of module \"layer2\""));
        assert!(message(t.enter(ROOT)).contains("second time"));
        assert!(message(t.enter(8)).contains("module 8 does not exist: the traced model has 8"));
        assert!(message(t.use_params(&[W1, 8])).contains("parameter 8 does not exist"));
        assert!(t.param_order().is_empty() && t.usages(LAYER2).unwrap().is_empty());
        t.leave(LAYER2).unwrap();
        t.leave(ROOT).unwrap();
        assert!(message(t.enter(LAYER2)).contains("\"layer2\" is entered after the root was left"));
        assert!(message(t.enter(ROOT)).contains("second time"));
        assert_eq!(t.module_order(), [ROOT, LAYER2]);
        assert!(t.usages(8).is_err() && t.visited(8).is_err());
    }

    #[test]
    fn fits_only_the_traced_model_and_only_when_complete() {
        fn fits(t: &Trace, tree: &ModuleTree) -> Result<()> {
            t.check_fits(tree.modules().len(), tree.params().iter().map(|p| p.fqn.as_str()))
        }
        let tree = model();
        let message = |r: Result<()>| r.unwrap_err().message;
        let mut t = Trace::new(&tree);
        assert!(message(fits(&t, &tree)).contains("the trace is empty"));
        t.enter(ROOT).unwrap();
        t.enter(LAYER0).unwrap();
        assert!(message(fits(&t, &tree)).contains("\"layer0\" was entered but not left"));
        let t = traced(&tree);
        fits(&t, &tree).unwrap();
        let mut more = model();
        more.add_module(ROOT, "more", "Linear").unwrap();
        assert!(message(fits(&t, &more)).contains("8 modules and 8 parameters, this one 9 modules and 8"));
        let mut more = model();
        more.add_param(ROOT, "more", &[1], DType::F32, true, std::ptr::null()).unwrap();
        assert!(message(fits(&t, &more)).contains("8 modules and 8 parameters, this one 8 modules and 9"));
        let names = tree.params().iter().map(|p| if p.fqn == "layer0.bias" { "layer0.b" } else { p.fqn.as_str() });
        assert!(
            message(t.check_fits(8, names)).contains("that has the parameter \"layer0.bias\", this one \"layer0.b\"")
        );
    }

    #[test]
    fn units_in_the_order_they_are_needed() {
        let order = |wrapped: &[ModuleId]| {
            let mut tree = model();
            wrapped.iter().for_each(|m| tree.wrap(*m).unwrap());
            traced(&tree).unit_order(&Plan::new(&tree, 0, 2).unwrap())
        };
        assert_eq!(order(&[]), [0]);
        // Units: root 0, layer0 1, layer1 2, layer2 3; relu has no unit of its own.
        assert_eq!(order(&[LAYER0, LAYER1, LAYER2]), [0, 1, 3, 2, 1]);
        // layer2's halves, and a relu without parameters that is a unit all the same.
        assert_eq!(order(&[LAYER0, 4, 6, RELU]), [0, 1, 2, 3, 1]);

        // A parameter used while its unit does not run; a root without parameters.
        let mut tree = ModuleTree::new("Model");
        for name in ["a", "b"] {
            let m = tree.add_module(ROOT, name, "Linear").unwrap();
            tree.add_param(m, "weight", &[3], DType::F32, true, std::ptr::null()).unwrap();
            tree.wrap(m).unwrap();
        }
        let mut t = Trace::new(&tree);
        t.enter(ROOT).unwrap();
        t.enter(1).unwrap();
        t.use_params(&[0, 1, 0]).unwrap();
        t.leave(1).unwrap();
        call(&mut t, 2, &[1]);
        t.leave(ROOT).unwrap();
        assert_eq!(t.unit_order(&Plan::new(&tree, 0, 1).unwrap()), [1, 2]);
    }
}
