//! The host's module tree: modules, the parameters they own, which parameters are tied, and what initializes those that
//! have no storage.
//!
//! Pure data. A module is a number, 0 is the root; a parameter is a number in order of registration. Invariant: parents
//! come before their children, and fully qualified names are unique.

use crate::dtype::DType;
use crate::error::{err, Result};
use crate::materialize::{ModuleInit, ParamInit};
use crate::plan::UnitId;
use crate::precision::Precision;
use crate::shards::ShardedModel;
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::Arc;

mod adopt;

pub type ModuleId = u32;
pub type ParamId = u32;

/// The root module's number.
pub const ROOT: ModuleId = 0;

/// A node of the tree.
#[derive(Clone, Debug)]
pub struct Module {
    pub parent: Option<ModuleId>,
    /// Fully qualified name, parts joined by dots; "" for the root.
    pub fqn: String,
    /// The host's name for the module's type, as policies match it.
    pub class_name: String,
    pub children: Vec<ModuleId>,
    /// The parameters registered in it, first or tied, in order of registration.
    pub params: Vec<ParamId>,
}

impl Module {
    fn new(parent: Option<ModuleId>, fqn: String, class_name: &str) -> Module {
        Module { parent, fqn, class_name: class_name.into(), children: Vec::new(), params: Vec::new() }
    }
}

/// A parameter. `data` is the host's memory, borrowed until it has been sharded; null for a parameter without storage,
/// which gets its values when it is sharded ([`crate::materialize`]).
#[derive(Clone, Debug)]
pub struct Param {
    /// Fully qualified name of its first registration.
    pub fqn: String,
    /// Every module that registered it: one, or several when tied.
    pub modules: Vec<ModuleId>,
    pub shape: Vec<i64>,
    pub dtype: DType,
    pub requires_grad: bool,
    pub data: *const u8,
    /// The GPU whose memory `data` is; None: the host's.
    pub gpu: Option<usize>,
    /// Its (model, number) among the models that the tree has adopted: its values are in shards already.
    pub adopted: Option<(usize, ParamId)>,
}

// SAFETY: `data` is only an address here; reading it is `unsafe` where it happens.
unsafe impl Send for Param {}
// SAFETY: as above.
unsafe impl Sync for Param {}

impl Param {
    /// Elements; 1 for a scalar (no dimensions).
    pub fn numel(&self) -> usize {
        self.shape.iter().map(|d| *d as usize).product()
    }

    /// Whether it has values: in `data`, in shards, or because it has no elements.
    pub fn has_storage(&self) -> bool {
        !self.data.is_null() || self.adopted.is_some() || self.numel() == 0
    }
}

/// What initializes parameters without storage.
#[derive(Clone, Default)]
struct Initializers {
    modules: BTreeMap<ModuleId, ModuleInit>,
    params: BTreeMap<ParamId, ParamInit>,
}

impl fmt::Debug for Initializers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "modules {:?}, parameters {:?}", self.modules.keys(), self.params.keys())
    }
}

/// The tree, its parameters, and the modules marked as units by [`crate::wrap`].
#[derive(Clone, Debug)]
pub struct ModuleTree {
    modules: Vec<Module>,
    params: Vec<Param>,
    wrapped: Vec<bool>,
    initializers: Initializers,
    /// The types that parameters are computed and reduced in.
    pub(crate) precision: Precision,
    /// Models that are sharded already and have become a part of this one.
    adopted: Vec<Arc<ShardedModel>>,
    /// The (model, unit) of each module that is a unit of one of them.
    adopted_units: BTreeMap<ModuleId, (usize, UnitId)>,
    /// Every fully qualified name in use.
    names: HashSet<String>,
}

impl ModuleTree {
    /// A tree that has only its root.
    pub fn new(class_name: &str) -> ModuleTree {
        ModuleTree {
            modules: vec![Module::new(None, String::new(), class_name)],
            params: Vec::new(),
            wrapped: vec![true],
            initializers: Initializers::default(),
            precision: Precision::default(),
            adopted: Vec::new(),
            adopted_units: BTreeMap::new(),
            names: HashSet::new(),
        }
    }

    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    pub fn params(&self) -> &[Param] {
        &self.params
    }

    pub fn module(&self, id: ModuleId) -> Result<&Module> {
        self.modules
            .get(id as usize)
            .ok_or_else(|| err!(InvalidArgument, "module {id} does not exist: the model has {}", self.modules.len()))
    }

    pub fn param(&self, id: ParamId) -> Result<&Param> {
        self.params
            .get(id as usize)
            .ok_or_else(|| err!(InvalidArgument, "parameter {id} does not exist: the model has {}", self.params.len()))
    }

    /// Adds `name` below `parent`. Names have no dots and are unique below one parent.
    pub fn add_module(&mut self, parent: ModuleId, name: &str, class_name: &str) -> Result<ModuleId> {
        let fqn = self.fqn_below(parent, name)?;
        self.names.insert(fqn.clone());
        let id = self.modules.len() as ModuleId;
        self.modules.push(Module::new(Some(parent), fqn, class_name));
        self.modules[parent as usize].children.push(id);
        self.wrapped.push(false);
        Ok(id)
    }

    /// Adds a parameter owned by `module`. `data` null: it has no storage, and needs an initializer by the time it is
    /// sharded, unless it has no elements.
    pub fn add_param(
        &mut self,
        module: ModuleId,
        name: &str,
        shape: &[i64],
        dtype: DType,
        requires_grad: bool,
        data: *const u8,
    ) -> Result<ParamId> {
        let fqn = self.fqn_below(module, name)?;
        if let Some(d) = shape.iter().find(|d| **d < 0) {
            return Err(err!(InvalidArgument, "parameter \"{fqn}\" has the negative dimension {d}"));
        }
        let bytes = shape.iter().try_fold(dtype.size(), |n, d| n.checked_mul(*d as usize));
        if bytes.is_none() {
            return Err(err!(InvalidArgument, "parameter \"{fqn}\" has more bytes than an address can hold"));
        }
        let id = self.params.len() as ParamId;
        self.names.insert(fqn.clone());
        self.params.push(Param {
            fqn,
            modules: vec![module],
            shape: shape.into(),
            dtype,
            requires_grad,
            data,
            gpu: None,
            adopted: None,
        });
        self.modules[module as usize].params.push(id);
        Ok(id)
    }

    /// A parameter's data is at `data` in the memory of this GPU.
    pub fn set_param_gpu(&mut self, param: ParamId, data: *const u8, gpu: usize) -> Result<()> {
        self.param(param)?;
        let p = &mut self.params[param as usize];
        (p.data, p.gpu) = (data, Some(gpu));
        Ok(())
    }

    /// Registers an existing parameter a second time, in `module` under `name`.
    pub fn tie_param(&mut self, module: ModuleId, name: &str, param: ParamId) -> Result<()> {
        let fqn = self.fqn_below(module, name)?;
        let p = self.param(param)?;
        if p.adopted.is_some() {
            return Err(err!(
                InvalidState,
                "parameter \"{}\" is sharded already: it cannot be tied to \"{fqn}\"",
                p.fqn
            ));
        }
        self.params[param as usize].modules.push(module);
        self.modules[module as usize].params.push(param);
        self.names.insert(fqn);
        Ok(())
    }

    /// What initializes the parameters without storage that `module` registered, in place of an earlier one. A module
    /// without any parameter has it called once too. Unused for a module whose parameters all have storage.
    pub fn set_reset(&mut self, module: ModuleId, init: ModuleInit) -> Result<()> {
        self.module(module)?;
        self.initializers.modules.insert(module, init);
        Ok(())
    }

    /// What initializes this one parameter, in place of an earlier one; it comes before its module's reset function.
    pub fn set_param_init(&mut self, param: ParamId, init: ParamInit) -> Result<()> {
        let p = self.param(param)?;
        if !p.data.is_null() || p.adopted.is_some() {
            return Err(err!(
                InvalidArgument,
                "parameter \"{}\" has storage: its values are taken from there, so it cannot have an initializer",
                p.fqn
            ));
        }
        self.initializers.params.insert(param, init);
        Ok(())
    }

    pub fn reset(&self, module: ModuleId) -> Option<&ModuleInit> {
        self.initializers.modules.get(&module)
    }

    pub fn param_init(&self, param: ParamId) -> Option<&ParamInit> {
        self.initializers.params.get(&param)
    }

    /// Marks a module as a unit of its own.
    pub fn wrap(&mut self, module: ModuleId) -> Result<()> {
        let m = self.module(module)?;
        if self.wrapped[module as usize] {
            return Err(match module {
                ROOT => err!(InvalidState, "the root module is always a unit: it cannot be wrapped again"),
                _ => err!(InvalidState, "module \"{}\" is wrapped already: a module can be one unit only", m.fqn),
            });
        }
        if !self.can_wrap(module) {
            return Err(err!(InvalidState, "module \"{}\" is a part of a unit that is sharded already", m.fqn));
        }
        self.wrapped[module as usize] = true;
        Ok(())
    }

    pub fn is_wrapped(&self, module: ModuleId) -> bool {
        self.wrapped[module as usize]
    }

    /// The module that is the unit `module` belongs to: itself, or its nearest wrapped ancestor.
    pub fn unit_module(&self, mut module: ModuleId) -> ModuleId {
        while !self.wrapped[module as usize] {
            module = self.modules[module as usize].parent.unwrap_or(ROOT);
        }
        module
    }

    /// The wrapped module that owns a parameter: the innermost unit that contains every module which uses it, so that
    /// a tied parameter is unsharded wherever one of its users computes.
    pub fn owner(&self, param: &Param) -> ModuleId {
        let chain = |m: ModuleId| {
            let mut chain = vec![self.unit_module(m)];
            while let Some(parent) = self.modules[*chain.last().unwrap() as usize].parent {
                chain.push(self.unit_module(parent));
            }
            chain
        };
        let mut common = chain(param.modules[0]);
        for m in &param.modules[1..] {
            let other = chain(*m);
            common.retain(|u| other.contains(u));
        }
        common[0]
    }

    /// Depth-first order, parents before children, children in order of registration.
    pub fn preorder(&self) -> Vec<ModuleId> {
        let mut order = Vec::with_capacity(self.modules.len());
        let mut stack = vec![ROOT];
        while let Some(m) = stack.pop() {
            order.push(m);
            stack.extend(self.modules[m as usize].children.iter().rev());
        }
        order
    }

    fn fqn_below(&self, module: ModuleId, name: &str) -> Result<String> {
        let parent = &self.module(module)?.fqn;
        if name.is_empty() || name.contains('.') {
            return Err(err!(
                InvalidArgument,
                "\"{name}\" below module \"{parent}\" is no name: it must not be empty or contain a dot"
            ));
        }
        let fqn = if parent.is_empty() { name.to_string() } else { format!("{parent}.{name}") };
        if self.names.contains(&fqn) {
            return Err(err!(InvalidArgument, "\"{fqn}\" is registered already"));
        }
        Ok(fqn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn tree() -> ModuleTree {
        let mut t = ModuleTree::new("Net");
        let a = t.add_module(ROOT, "a", "Block").unwrap();
        t.add_module(a, "x", "Linear").unwrap();
        let b = t.add_module(ROOT, "b", "Block").unwrap();
        t.add_module(b, "x", "Linear").unwrap();
        t
    }

    #[test]
    fn names_are_qualified_and_unique() {
        let mut t = tree();
        assert_eq!(t.modules()[2].fqn, "a.x");
        assert_eq!(t.preorder(), vec![0, 1, 2, 3, 4]);
        let e = t.add_module(ROOT, "a", "Block").unwrap_err();
        assert!(e.message.contains("\"a\" is registered already"), "{e}");
        assert!(t.add_module(ROOT, "p.q", "Block").is_err());
        assert!(t.add_module(9, "q", "Block").is_err());
    }

    #[test]
    fn tied_parameters_belong_to_the_innermost_common_unit() {
        let mut t = tree();
        let data = [0f32; 4];
        let p = t.add_param(2, "w", &[2, 2], DType::F32, true, data.as_ptr().cast()).unwrap();
        t.wrap(1).unwrap();
        t.wrap(3).unwrap();
        assert_eq!(t.owner(&t.params()[p as usize]), 1);
        t.tie_param(1, "w", p).unwrap();
        assert_eq!(t.owner(&t.params()[p as usize]), 1);
        t.tie_param(4, "w", p).unwrap();
        assert_eq!(t.owner(&t.params()[p as usize]), ROOT);
    }

    #[test]
    fn wrapping_twice_says_so() {
        let mut t = tree();
        t.wrap(1).unwrap();
        assert!(t.wrap(1).unwrap_err().message.contains("\"a\" is wrapped already"));
        assert!(t.wrap(ROOT).unwrap_err().message.contains("root"));
    }

    #[test]
    fn parameters_may_have_no_storage() {
        let mut t = tree();
        let data = [0f32; 3];
        let w = t.add_param(2, "w", &[3], DType::F32, true, std::ptr::null()).unwrap();
        let empty = t.add_param(2, "empty", &[3, 0], DType::F32, true, std::ptr::null()).unwrap();
        let held = t.add_param(2, "held", &[3], DType::F32, true, data.as_ptr().cast()).unwrap();
        t.tie_param(1, "held", held).unwrap();
        let storage: Vec<bool> = t.params().iter().map(Param::has_storage).collect();
        assert_eq!(storage, [false, true, true]);
        assert_eq!((&t.modules()[2].params, &t.modules()[1].params), (&vec![w, empty, held], &vec![held]));
        assert!(t.add_param(2, "neg", &[-1], DType::F32, true, std::ptr::null()).is_err());
        assert!(t.add_param(2, "big", &[i64::MAX, 8], DType::F32, true, std::ptr::null()).is_err());
        assert_eq!(t.modules()[2].params.len(), 3);
    }

    #[test]
    fn initializers_replace_each_other_and_go_with_copies() {
        let mut t = tree();
        let data = [0f32; 3];
        let w = t.add_param(2, "w", &[3], DType::F32, true, std::ptr::null()).unwrap();
        let held = t.add_param(2, "held", &[3], DType::F32, true, data.as_ptr().cast()).unwrap();
        let (first, second): (ModuleInit, ModuleInit) = (Arc::new(|_| Ok(())), Arc::new(|_| Ok(())));
        t.set_reset(2, first).unwrap();
        t.set_reset(2, second.clone()).unwrap();
        t.set_param_init(w, Arc::new(|_| Ok(()))).unwrap();
        let copy = t.clone();
        assert!(Arc::ptr_eq(copy.reset(2).unwrap(), &second) && copy.reset(1).is_none());
        assert!(copy.param_init(w).is_some() && copy.param_init(held).is_none());
        assert!(format!("{copy:?}").contains("modules [2], parameters [0]"));
        let e = t.set_param_init(held, Arc::new(|_| Ok(()))).unwrap_err();
        assert!(e.message.contains("\"a.x.held\" has storage"), "{e}");
        assert!(t.set_reset(9, second).unwrap_err().message.contains("module 9"));
        assert!(t.set_param_init(9, Arc::new(|_| Ok(()))).unwrap_err().message.contains("parameter 9"));
    }
}
