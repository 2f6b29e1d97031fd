//! Making a sharded model a part of a bigger one: its modules, parameters and units are added to the tree as they are.

use super::{Module, ModuleId, ModuleTree, Param, ParamId};
use crate::error::{err, Result};
use crate::plan::UnitId;
use crate::shards::ShardedModel;
use std::sync::Arc;

impl ModuleTree {
    /// Adds the whole tree of `model` below `parent` as `name`; with an empty name its modules and parameters keep
    /// their own names below `parent`'s. Returns the numbers of its first module and parameter; the others follow in
    /// their old order. Its units are units here, and its parameters' values stay where they are.
    pub fn adopt(&mut self, parent: ModuleId, name: &str, model: Arc<ShardedModel>) -> Result<(ModuleId, ParamId)> {
        let prefix = match name {
            "" => self.module(parent)?.fqn.clone(),
            _ => self.fqn_below(parent, name)?,
        };
        let stores = |m: &ShardedModel| m.stores.clone();
        let known = self.adopted.iter().flat_map(|m| stores(m));
        if let Some(shared) = known.into_iter().find(|k| model.stores.iter().any(|s| Arc::ptr_eq(s, k))) {
            let owner = self
                .adopted_units
                .iter()
                .find(|(_, (m, _))| self.adopted[*m].stores.iter().any(|s| Arc::ptr_eq(s, &shared)));
            let fqn = owner.map_or("", |(m, _)| &self.modules[*m as usize].fqn);
            return Err(err!(
                InvalidState,
                "the sharded model is a part of this one already, at module \"{fqn}\": a module can be one unit only"
            ));
        }
        let below = |fqn: &str| match (prefix.is_empty(), fqn.is_empty()) {
            (true, _) => fqn.to_string(),
            (_, true) => prefix.clone(),
            _ => format!("{prefix}.{fqn}"),
        };
        let taken = model.tree.names.iter().map(|n| below(n)).find(|n| self.names.contains(n));
        if let Some(taken) = taken {
            return Err(err!(InvalidArgument, "\"{taken}\" is registered already"));
        }

        let (modules, params) = (self.modules.len() as ModuleId, self.params.len() as ParamId);
        let index = self.adopted.len();
        for module in &model.tree.modules {
            self.modules.push(Module {
                parent: Some(module.parent.map_or(parent, |p| modules + p)),
                fqn: below(&module.fqn),
                class_name: module.class_name.clone(),
                children: module.children.iter().map(|c| modules + c).collect(),
                params: module.params.iter().map(|p| params + p).collect(),
            });
        }
        self.modules[parent as usize].children.push(modules);
        self.wrapped.extend(&model.tree.wrapped);
        for (i, param) in model.tree.params.iter().enumerate() {
            self.params.push(Param {
                gpu: None,
                fqn: below(&param.fqn),
                modules: param.modules.iter().map(|m| modules + m).collect(),
                data: std::ptr::null(),
                adopted: Some((index, i as ParamId)),
                ..param.clone()
            });
        }
        self.names.extend(model.tree.names.iter().map(|n| below(n)));
        self.names.insert(prefix);
        for (u, unit) in model.plan.units.iter().enumerate() {
            self.adopted_units.insert(modules + unit.module, (index, u as UnitId));
        }
        self.precision.extend(&model.tree.precision, modules, params);
        self.adopted.push(model);
        Ok((modules, params))
    }

    /// The models that were adopted.
    pub fn adopted(&self) -> &[Arc<ShardedModel>] {
        &self.adopted
    }

    /// The (adopted model, its unit) that a module is, if it is one.
    pub fn adopted_unit(&self, module: ModuleId) -> Option<(usize, UnitId)> {
        self.adopted_units.get(&module).copied()
    }

    /// Whether the module can still become a unit: it is none, and no unit of an adopted model contains it.
    pub fn can_wrap(&self, module: ModuleId) -> bool {
        !self.wrapped[module as usize] && self.adopted_unit(self.unit_module(module)).is_none()
    }

    /// The tree without what belongs to the host: pointers and initializers.
    pub(crate) fn without_host(mut self) -> ModuleTree {
        self.initializers = Default::default();
        for param in &mut self.params {
            param.data = std::ptr::null();
        }
        self
    }
}
