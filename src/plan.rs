//! From a wrapped module tree to units: who owns which parameter, and where every piece lies on this rank.
//!
//! Pure data, computed before anything is allocated. Unit 0 is the root; units are in depth-first order of the tree.

use crate::comm::{self, Segment, UnitName};
use crate::config::EngineConfig;
use crate::dtype::DType;
use crate::error::Result;
use crate::layout::{Piece, UnitLayout, PARAM_ALIGN};
use crate::module::{ModuleId, ModuleTree, ParamId, ROOT};
use crate::precision::Cast;
use crate::shards::ShardStore;
use std::sync::Arc;

pub type UnitId = u32;

/// Units begin at a multiple of this in the arena, so that every parameter keeps [`crate::layout::PARAM_ALIGN`].
const UNIT_ALIGN: usize = 64;

/// Bytes, and number, of the gradient slots for small units that there are beyond those that are needed.
const SMALL_SLOTS: usize = 1 << 20;
const MOST_SMALL_SLOTS: usize = 256;

/// A unit: the parameters below its module that no nested unit owns.
#[derive(Clone, Debug)]
pub struct UnitPlan {
    /// Fully qualified name of its module.
    pub name: String,
    pub module: ModuleId,
    /// Units that enclose it, up to and without the root: 0 for the root, 1 for its direct units.
    pub depth: usize,
    pub params: Vec<ParamId>,
    pub layout: UnitLayout,
    /// Which store its shards are in: 0 the engine's own, then those of the models that the tree has adopted.
    pub store: usize,
    /// First byte of the unit buffer in the store's arena.
    pub arena_offset: usize,
    /// First element of this rank's part in the store's gradient shards.
    pub grad_offset: usize,
    /// First byte of its parameters' compute copies in the store's arena of them, and how many they are.
    pub compute_offset: usize,
    pub compute_bytes: usize,
    /// The type that its gradients are rounded to before they are summed.
    pub reduce_dtype: DType,
    /// The type that they are collected in: float32, or the 16-bit type that all of its parameters are computed in.
    pub grad_dtype: DType,
}

impl UnitPlan {
    pub fn bytes(&self) -> usize {
        self.layout.len * DType::F32.size()
    }

    /// Bytes of its full gradient as it is collected.
    pub fn grad_bytes(&self) -> usize {
        self.layout.len * self.grad_dtype.size()
    }

    /// First byte in its slot of what is collected in float32: behind what is in 16 bits.
    pub fn wide_offset(&self) -> usize {
        comm::wide_offset(self.grad_dtype, self.layout.len)
    }

    /// Addresses that its slot needs, used or not.
    pub fn slot_room(&self) -> usize {
        self.wide_offset() + self.bytes()
    }

    pub fn shard_bytes(&self) -> usize {
        self.layout.shard_len * DType::F32.size()
    }

    /// Bytes of this rank's gradient shard, with what aligns the next one.
    pub fn grad_shard_bytes(&self) -> usize {
        self.shard_bytes().next_multiple_of(UNIT_ALIGN)
    }

    /// Bytes of the unit buffer, with what aligns the next one.
    pub fn arena_bytes(&self) -> usize {
        self.bytes().next_multiple_of(UNIT_ALIGN)
    }

    /// Bytes of what an all-gather fills where bytes move: the unit buffer, with 16-bit parameters in 16 bits.
    pub fn gathered_bytes(&self, params: &[ParamPlan]) -> usize {
        if self.compute_bytes == 0 {
            return self.bytes();
        }
        let narrow = self.params.iter().filter(|p| params[**p as usize].compute != DType::F32);
        self.bytes() - narrow.map(|p| 2 * self.layout.numels[params[*p as usize].index]).sum::<usize>()
    }

    /// How messages call it.
    pub fn label(&self) -> &str {
        if self.name.is_empty() {
            "(root)"
        } else {
            &self.name
        }
    }
}

/// A parameter's place.
#[derive(Clone, Debug)]
pub struct ParamPlan {
    pub fqn: String,
    pub unit: UnitId,
    /// Its index among the unit's parameters.
    pub index: usize,
    pub shape: Vec<i64>,
    pub requires_grad: bool,
    /// Its number in its unit's store.
    pub store_param: usize,
    /// The type that it is computed in.
    pub compute: DType,
    /// First byte of its compute copy among those of its unit; 0 when it is computed in float32.
    pub compute_offset: usize,
    /// This rank's piece.
    pub piece: Piece,
}

/// All of it, for one rank.
#[derive(Clone, Debug)]
pub struct Plan {
    pub units: Vec<UnitPlan>,
    pub params: Vec<ParamPlan>,
    /// The unit that each module belongs to.
    pub unit_of_module: Vec<UnitId>,
    /// Bytes of the unit buffers in the engine's own store: its arena.
    pub arena_bytes: usize,
    /// Elements of this rank's shards in it.
    pub shard_elements: usize,
    /// Bytes of the compute copies in the engine's own store.
    pub compute_bytes: usize,
}

impl Plan {
    /// Plans `tree` for `rank` of `world_size`.
    pub fn new(tree: &ModuleTree, rank: usize, world_size: usize) -> Result<Plan> {
        tree.check_dtypes()?;
        let modules: Vec<ModuleId> = tree.preorder().into_iter().filter(|m| tree.is_wrapped(*m)).collect();
        let mut unit_of_module = vec![0; tree.modules().len()];
        for (u, m) in modules.iter().enumerate() {
            unit_of_module[*m as usize] = u as UnitId;
        }
        for m in 0..unit_of_module.len() {
            unit_of_module[m] = unit_of_module[tree.unit_module(m as ModuleId) as usize];
        }

        let mut owned = vec![Vec::new(); modules.len()];
        for (i, p) in tree.params().iter().enumerate() {
            owned[unit_of_module[tree.owner(p) as usize] as usize].push(i as ParamId);
        }

        let mut plan = Plan {
            units: Vec::new(),
            params: Vec::new(),
            unit_of_module,
            arena_bytes: 0,
            shard_elements: 0,
            compute_bytes: 0,
        };
        let mut places = vec![None; tree.params().len()];
        for (u, (module, params)) in modules.into_iter().zip(owned).enumerate() {
            let adopted = tree.adopted_unit(module);
            let layout = match adopted {
                Some((model, unit)) => tree.adopted()[model].plan.units[unit as usize].layout.clone(),
                None => {
                    let numels: Vec<usize> = params.iter().map(|p| tree.params()[*p as usize].numel()).collect();
                    UnitLayout::plan(&numels, DType::F32.size(), world_size)
                }
            };
            let mut compute_bytes = 0usize;
            for (index, p) in params.iter().enumerate() {
                let compute = tree.compute_dtype(*p, module);
                let copy = if compute == DType::F32 { 0 } else { layout.numels[index] * compute.size() };
                let compute_offset = if copy == 0 { 0 } else { compute_bytes };
                compute_bytes += copy.next_multiple_of(PARAM_ALIGN);
                places[*p as usize] = Some((u as UnitId, index, layout.piece(index, rank), compute, compute_offset));
            }
            let mut unit = UnitPlan {
                name: tree.module(module)?.fqn.clone(),
                module,
                depth: plan.depth_of(tree, module),
                params,
                layout,
                store: 0,
                arena_offset: plan.arena_bytes,
                grad_offset: plan.shard_elements,
                compute_offset: plan.compute_bytes,
                compute_bytes,
                reduce_dtype: tree.precision.reduce_dtype(module),
                grad_dtype: DType::F32,
            };
            let computed = |p: &ParamId| tree.compute_dtype(*p, module);
            unit.grad_dtype = tree.precision.grad_dtype(unit.params.iter().map(computed));
            match adopted {
                Some((model, u)) => {
                    let place = &tree.adopted()[model].plan.units[u as usize];
                    unit.store =
                        1 + tree.adopted()[..model].iter().map(|m| m.stores.len()).sum::<usize>() + place.store;
                    (unit.arena_offset, unit.grad_offset) = (place.arena_offset, place.grad_offset);
                    unit.compute_offset = place.compute_offset;
                }
                None => {
                    plan.arena_bytes += unit.arena_bytes();
                    plan.shard_elements += unit.grad_shard_bytes() / DType::F32.size();
                    plan.compute_bytes += compute_bytes;
                }
            }
            plan.units.push(unit);
        }
        plan.params = tree
            .params()
            .iter()
            .zip(places)
            .enumerate()
            .map(|(i, (p, place))| {
                let (unit, index, piece, compute, compute_offset) = place.expect("every parameter has an owner");
                let (fqn, shape) = (p.fqn.clone(), p.shape.clone());
                let store_param = match p.adopted {
                    Some((model, old)) => tree.adopted()[model].plan.params[old as usize].store_param,
                    None => i,
                };
                let requires_grad = p.requires_grad;
                ParamPlan { fqn, unit, index, shape, requires_grad, store_param, compute, compute_offset, piece }
            })
            .collect();
        Ok(plan)
    }

    fn depth_of(&self, tree: &ModuleTree, module: ModuleId) -> usize {
        match tree.modules()[module as usize].parent {
            None => 0,
            Some(parent) => {
                let above = tree.unit_module(parent);
                1 + self.units.iter().find(|u| u.module == above).map_or(0, |u| u.depth)
            }
        }
    }

    /// Where bytes move, gradients are sent as they lie in their slot: a unit that is reduced in another type than it could
    /// be collected in collects in float32.
    pub fn collect_as_reduced(&mut self) {
        for u in self.units.iter_mut().filter(|u| u.grad_dtype != u.reduce_dtype) {
            u.grad_dtype = DType::F32;
        }
    }

    /// Bytes of each gradient slot, largest first: the `count` largest units' gradients, so that any `count` of them fit.
    /// `count` 0 means the deepest nesting plus one more that is being reduced, and as many of the next units as fit in
    /// [`SMALL_SLOTS`], so that ranks which reduce small units need not keep in step.
    pub fn slot_bytes(&self, count: usize) -> Vec<usize> {
        let mut sizes: Vec<usize> = self.units.iter().map(UnitPlan::grad_bytes).filter(|b| *b > 0).collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        let count = match count {
            0 => {
                let needed = 2 + self.units.iter().map(|u| u.depth).max().unwrap_or(0);
                let mut left = SMALL_SLOTS;
                let fits = |bytes: &&usize| {
                    left = left.saturating_sub(**bytes);
                    left > 0
                };
                needed + sizes.iter().skip(needed).take(MOST_SMALL_SLOTS).take_while(fits).count()
            }
            _ => count,
        };
        sizes.truncate(count);
        sizes
    }

    /// The stores of the units, as [`UnitPlan::store`] counts them, when the engine's own is `own`.
    pub fn stores(tree: &ModuleTree, own: Arc<ShardStore>) -> Vec<Arc<ShardStore>> {
        std::iter::once(own).chain(tree.adopted().iter().flat_map(|m| m.stores.iter().cloned())).collect()
    }

    /// The pieces of unit `u` that lie on this rank, to be reduced to where [`Segment::out`] shall say.
    pub fn segments(&self, u: UnitId) -> Vec<Segment> {
        let unit = &self.units[u as usize];
        let mut segments = Vec::new();
        for (index, p) in unit.params.iter().enumerate() {
            let piece = &self.params[*p as usize].piece;
            if piece.len > 0 {
                let (offset, len) = (piece.unit_offset, piece.len);
                let (narrow, out) = (unit.grad_dtype, std::ptr::null_mut());
                segments.push(Segment { param: index, offset, len, narrow, out, accumulate: false });
            }
        }
        segments
    }

    /// This rank's pieces of the parameters of unit `u` that are computed in 16 bits.
    pub fn casts(&self, u: UnitId) -> impl Iterator<Item = Cast> + '_ {
        let unit = &self.units[u as usize];
        let params = unit.params.iter().map(|p| &self.params[*p as usize]);
        params.filter(|p| p.compute != DType::F32 && p.piece.len > 0).map(|p| Cast {
            dtype: p.compute,
            from: unit.arena_offset + p.piece.unit_offset * DType::F32.size(),
            to: unit.compute_offset + p.compute_offset + p.piece.param_offset * p.compute.size(),
            len: p.piece.len,
        })
    }

    /// A unit's name for messages, with the first few of its parameters.
    pub fn unit_name(&self, unit: UnitId) -> UnitName {
        const SHOWN: usize = 4;
        let unit = &self.units[unit as usize];
        let names = unit.params.iter().map(|p| self.params[*p as usize].fqn.as_str());
        let mut params = names.take(SHOWN).collect::<Vec<_>>().join(", ");
        if unit.params.len() > SHOWN {
            params += &format!(" and {} more", unit.params.len() - SHOWN);
        }
        UnitName { label: unit.label().to_string(), params }
    }

    /// One line per unit and parameter: what ranks must agree on.
    pub fn description(&self, tree: &ModuleTree, config: &EngineConfig) -> Vec<String> {
        let mut lines = Vec::new();
        for (p, param) in self.params.iter().zip(tree.params()) {
            let values = match (param.has_storage(), param.adopted) {
                (_, Some(_)) => "sharded already, ",
                (false, None) if !config.sync_module_states => "without storage, ",
                _ => "",
            };
            let types = match (param.dtype, p.compute) {
                (DType::F32, DType::F32) => String::new(),
                (registered, compute) => format!("{registered} computed in {compute}, "),
            };
            lines.push(format!(
                "parameter \"{}\" of shape {:?}, {}, {}{types}in unit \"{}\"",
                p.fqn,
                p.shape,
                if p.requires_grad { "trained" } else { "frozen" },
                values,
                self.units[p.unit as usize].label()
            ));
        }
        for u in &self.units {
            let class = &tree.modules()[u.module as usize].class_name;
            let collected = match u.grad_dtype {
                DType::F32 => String::new(),
                dtype => format!(", gradients in {dtype}"),
            };
            lines.push(format!("unit \"{}\" ({class}), reduced in {}{collected}", u.label(), u.reduce_dtype));
        }
        lines
    }

    /// Padding of all unit buffers, in bytes.
    pub fn padding_bytes(&self) -> usize {
        self.units.iter().map(|u| u.layout.padding() * DType::F32.size()).sum()
    }

    /// The unit that owns the parameters of the root module and everything not in a nested unit.
    pub const ROOT_UNIT: UnitId = ROOT;
}

#[cfg(test)]
mod tests {
    use super::*;

    static DATA: [f32; 4096] = [0.0; 4096];

    fn tree() -> ModuleTree {
        let mut t = ModuleTree::new("Net");
        let a = t.add_module(ROOT, "a", "Block").unwrap();
        let x = t.add_module(a, "x", "Linear").unwrap();
        t.add_param(ROOT, "r", &[5], DType::F32, true, DATA.as_ptr().cast()).unwrap();
        t.add_param(a, "w", &[7, 3], DType::F32, true, DATA.as_ptr().cast()).unwrap();
        t.add_param(x, "v", &[100], DType::F32, false, DATA.as_ptr().cast()).unwrap();
        t
    }

    #[test]
    fn nested_units_own_what_is_below_them() {
        let mut t = tree();
        t.wrap(1).unwrap();
        t.wrap(2).unwrap();
        let p = Plan::new(&t, 0, 2).unwrap();
        assert_eq!(p.units.iter().map(|u| u.params.clone()).collect::<Vec<_>>(), [[0], [1], [2]]);
        assert_eq!(p.units.iter().map(|u| u.depth).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(p.slot_bytes(0), [416, 96, 32]);
        assert_eq!(p.slot_bytes(2), [416, 96]);
        t.add_param(ROOT, "large", &[(SMALL_SLOTS / 4) as i64], DType::F32, true, DATA.as_ptr().cast()).unwrap();
        for i in 0..MOST_SMALL_SLOTS + 8 {
            let module = t.add_module(ROOT, &format!("small{i}"), "Small").unwrap();
            t.add_param(module, "w", &[i as i64 + 1], DType::F32, true, DATA.as_ptr().cast()).unwrap();
            t.wrap(module).unwrap();
        }
        let slots = Plan::new(&t, 0, 2).unwrap().slot_bytes(0);
        assert_eq!(slots.len(), 4 + MOST_SMALL_SLOTS, "what is needed, and small ones");
        assert!(slots[0] > SMALL_SLOTS && slots[4..].iter().sum::<usize>() <= SMALL_SLOTS);
        let p = Plan::new(&tree(), 0, 2).unwrap();
        assert_eq!(p.units.len(), 1);
        assert_eq!(p.units[0].params, [0, 1, 2]);
    }

    #[test]
    fn units_and_shards_do_not_overlap() {
        let mut t = tree();
        crate::wrap::always(&mut t).unwrap();
        for world in 1..6 {
            let p = Plan::new(&t, world - 1, world).unwrap();
            for pair in p.units.windows(2) {
                assert!(pair[0].arena_offset + pair[0].bytes() <= pair[1].arena_offset);
                assert!(pair[0].grad_offset + pair[0].layout.shard_len <= pair[1].grad_offset);
            }
        }
    }

    #[test]
    fn other_dtypes_are_refused_by_name() {
        let mut t = tree();
        t.add_param(1, "d", &[2], DType::F64, true, DATA.as_ptr().cast()).unwrap();
        let e = Plan::new(&t, 0, 1).unwrap_err();
        assert!(e.message.contains("\"a.d\" is float64"), "{e}");
    }
}
