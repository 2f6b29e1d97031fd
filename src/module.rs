//! The host's module tree: modules, the parameters they own, and which parameters are tied.
//!
//! Pure data. A module is a number, 0 is the root; a parameter is a number in order of registration. Invariant: parents
//! come before their children, and fully qualified names are unique.

use crate::dtype::DType;
use crate::error::{err, Result};
use std::collections::HashSet;

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
}

/// A parameter. `data` is the host's memory, borrowed until it has been sharded.
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
}

/// The tree, its parameters, and the modules marked as units by [`crate::wrap`].
#[derive(Clone, Debug)]
pub struct ModuleTree {
    modules: Vec<Module>,
    params: Vec<Param>,
    wrapped: Vec<bool>,
    /// Every fully qualified name in use.
    names: HashSet<String>,
}

impl ModuleTree {
    /// A tree that has only its root.
    pub fn new(class_name: &str) -> ModuleTree {
        let root = Module { parent: None, fqn: String::new(), class_name: class_name.into(), children: Vec::new() };
        ModuleTree { modules: vec![root], params: Vec::new(), wrapped: vec![true], names: HashSet::new() }
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

    /// Adds `name` below `parent`. Names have no dots and are unique below one parent.
    pub fn add_module(&mut self, parent: ModuleId, name: &str, class_name: &str) -> Result<ModuleId> {
        let fqn = self.fqn_below(parent, name)?;
        self.names.insert(fqn.clone());
        let id = self.modules.len() as ModuleId;
        self.modules.push(Module { parent: Some(parent), fqn, class_name: class_name.into(), children: Vec::new() });
        self.modules[parent as usize].children.push(id);
        self.wrapped.push(false);
        Ok(id)
    }

    /// Adds a parameter owned by `module`. `data` may be null only for zero elements.
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
        match bytes {
            None => return Err(err!(InvalidArgument, "parameter \"{fqn}\" has more bytes than an address can hold")),
            Some(n) if n > 0 && data.is_null() => {
                return Err(err!(
                Unsupported,
                "parameter \"{fqn}\" has no storage (data is NULL); parameters without storage are not supported yet"
            ))
            }
            Some(_) => {}
        }
        self.names.insert(fqn.clone());
        self.params.push(Param { fqn, modules: vec![module], shape: shape.into(), dtype, requires_grad, data });
        Ok(self.params.len() as ParamId - 1)
    }

    /// Registers an existing parameter a second time, in `module` under `name`.
    pub fn tie_param(&mut self, module: ModuleId, name: &str, param: ParamId) -> Result<()> {
        let fqn = self.fqn_below(module, name)?;
        let count = self.params.len();
        let p = self
            .params
            .get_mut(param as usize)
            .ok_or_else(|| err!(InvalidArgument, "parameter {param} does not exist: the model has {count}"))?;
        p.modules.push(module);
        self.names.insert(fqn);
        Ok(())
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
    fn parameters_without_storage_are_refused() {
        let mut t = tree();
        let e = t.add_param(2, "w", &[3], DType::F32, true, std::ptr::null()).unwrap_err();
        assert!(e.message.contains("\"a.x.w\" has no storage"), "{e}");
        t.add_param(2, "empty", &[3, 0], DType::F32, true, std::ptr::null()).unwrap();
        assert!(t.add_param(2, "neg", &[-1], DType::F32, true, std::ptr::null()).is_err());
        assert!(t.add_param(2, "big", &[i64::MAX, 8], DType::F32, true, std::ptr::null()).is_err());
    }
}
