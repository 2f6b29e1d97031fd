//! Wrap policies: which modules become units.
//!
//! Each function marks modules of a [`ModuleTree`]; modules marked before stay marked, the root is always a unit, and
//! the units of adopted models stay as they are.
//! The behaviours are those of PyTorch's `torch.distributed.fsdp.wrap` policies of the same names.

use crate::error::{err, Result};
use crate::module::{ModuleId, ModuleTree, ParamId, ROOT};
use crate::trace::Trace;
use std::collections::HashSet;

/// Every module becomes a unit (`always_wrap_policy`).
pub fn always(tree: &mut ModuleTree) -> Result<()> {
    for_each_unwrapped(tree, |_, _| Ok(true))
}

/// Modules of the class `class_name` become units (`ModuleWrapPolicy`); an error when there are none.
pub fn by_class(tree: &mut ModuleTree, class_name: &str) -> Result<()> {
    if !tree.modules().iter().any(|m| m.class_name == class_name) {
        let mut classes: Vec<&str> = tree.modules().iter().map(|m| m.class_name.as_str()).collect();
        classes.sort_unstable();
        classes.dedup();
        return Err(err!(
            InvalidArgument,
            "no module has the class \"{class_name}\"; the model has {}",
            classes.join(", ")
        ));
    }
    for_each_unwrapped(tree, |tree, m| Ok(tree.modules()[m as usize].class_name == class_name))
}

/// Children first, a module whose parameters not yet in a nested unit have at least `min_numel` elements becomes a unit
/// (`size_based_auto_wrap_policy`). A tied parameter counts where it was registered first.
pub fn by_size(tree: &mut ModuleTree, min_numel: u64) -> Result<()> {
    sized(tree, min_numel, |_| true, |_| true)
}

/// As [`by_size`], but only modules that the traced forward entered become units, and only parameters that it used
/// count.
pub fn by_trace(tree: &mut ModuleTree, trace: &Trace, min_numel: u64) -> Result<()> {
    trace.check_fits(tree.modules().len(), tree.params().iter().map(|p| p.fqn.as_str()))?;
    let entered: HashSet<ModuleId> = trace.module_order().iter().copied().collect();
    let used: HashSet<ParamId> = trace.param_order().iter().copied().collect();
    sized(tree, min_numel, |p| used.contains(&p), |m| entered.contains(&m))
}

/// Wraps by size the modules that `may` become units, counting the parameters that `counts` names.
fn sized(
    tree: &mut ModuleTree,
    min_numel: u64,
    counts: impl Fn(ParamId) -> bool,
    may: impl Fn(ModuleId) -> bool,
) -> Result<()> {
    if min_numel == 0 {
        return Err(err!(InvalidArgument, "the smallest size of a unit must be at least 1 element"));
    }
    let mut open = own_numel(tree, counts);
    for m in tree.preorder().into_iter().rev() {
        if m == ROOT {
            continue;
        }
        if tree.can_wrap(m) && may(m) && open[m as usize] >= min_numel {
            tree.wrap(m)?;
        }
        if !tree.is_wrapped(m) {
            let parent = tree.modules()[m as usize].parent.unwrap_or(ROOT);
            open[parent as usize] += open[m as usize];
        }
    }
    Ok(())
}

/// `decide(module, fqn, class name, elements in and below it)` says which modules become units (`CustomPolicy`).
/// Parents are asked before their children; an error of `decide` leaves the tree as it was.
pub fn by_callback(
    tree: &mut ModuleTree,
    mut decide: impl FnMut(ModuleId, &str, &str, u64) -> Result<bool>,
) -> Result<()> {
    let below = subtree_numel(tree);
    let mut chosen = Vec::new();
    for m in tree.preorder() {
        let module = &tree.modules()[m as usize];
        if tree.can_wrap(m) && decide(m, &module.fqn, &module.class_name, below[m as usize])? {
            chosen.push(m);
        }
    }
    chosen.into_iter().try_for_each(|m| tree.wrap(m))
}

fn for_each_unwrapped(
    tree: &mut ModuleTree,
    mut decide: impl FnMut(&ModuleTree, ModuleId) -> Result<bool>,
) -> Result<()> {
    for m in tree.preorder() {
        if tree.can_wrap(m) && decide(tree, m)? {
            tree.wrap(m)?;
        }
    }
    Ok(())
}

/// Elements of the parameters that each module registered first, of those that count.
fn own_numel(tree: &ModuleTree, counts: impl Fn(ParamId) -> bool) -> Vec<u64> {
    let mut numel = vec![0u64; tree.modules().len()];
    for (_, p) in tree.params().iter().enumerate().filter(|(i, p)| p.adopted.is_none() && counts(*i as ParamId)) {
        numel[p.modules[0] as usize] += p.numel() as u64;
    }
    numel
}

/// Elements of the parameters in and below each module.
fn subtree_numel(tree: &ModuleTree) -> Vec<u64> {
    let mut numel = own_numel(tree, |_| true);
    for m in tree.preorder().into_iter().rev() {
        if let Some(parent) = tree.modules()[m as usize].parent {
            numel[parent as usize] += numel[m as usize];
        }
    }
    numel
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;

    /// root(p: 1) > a(10) > [x(100), y(5)], b > z(50)
    fn tree() -> ModuleTree {
        static DATA: [f32; 100] = [0.0; 100];
        let mut t = ModuleTree::new("Net");
        let a = t.add_module(ROOT, "a", "Block").unwrap();
        let x = t.add_module(a, "x", "Linear").unwrap();
        let y = t.add_module(a, "y", "Linear").unwrap();
        let b = t.add_module(ROOT, "b", "Block").unwrap();
        let z = t.add_module(b, "z", "Linear").unwrap();
        for (m, n) in [(ROOT, 1), (a, 10), (x, 100), (y, 5), (z, 50)] {
            t.add_param(m, "p", &[n], DType::F32, true, DATA.as_ptr().cast()).unwrap();
        }
        t
    }

    fn wrapped(t: &ModuleTree) -> Vec<&str> {
        t.preorder().into_iter().filter(|m| t.is_wrapped(*m)).map(|m| t.modules()[m as usize].fqn.as_str()).collect()
    }

    #[test]
    fn always_wraps_every_module() {
        let mut t = tree();
        always(&mut t).unwrap();
        assert_eq!(wrapped(&t), ["", "a", "a.x", "a.y", "b", "b.z"]);
    }

    #[test]
    fn class_name_selects_and_a_wrong_one_is_named() {
        let mut t = tree();
        by_class(&mut t, "Block").unwrap();
        assert_eq!(wrapped(&t), ["", "a", "b"]);
        let e = by_class(&mut t, "Blok").unwrap_err();
        assert!(e.message.contains("\"Blok\"") && e.message.contains("Block, Linear, Net"), "{e}");
    }

    #[test]
    fn size_counts_only_what_no_nested_unit_owns() {
        let mut t = tree();
        by_size(&mut t, 15).unwrap();
        // a keeps its own 10 and y's 5 once x (100) is a unit of its own.
        assert_eq!(wrapped(&t), ["", "a", "a.x", "b.z"]);
        let mut t = tree();
        by_size(&mut t, 16).unwrap();
        assert_eq!(wrapped(&t), ["", "a.x", "b.z"]);
        assert!(by_size(&mut t, 0).is_err());
    }

    #[test]
    fn trace_counts_only_what_was_entered_and_used() {
        let t = tree();
        // x is entered and used, y used from its parent without being entered, z entered but its parameter not used.
        let mut trace = Trace::new(&t);
        assert!(by_trace(&mut t.clone(), &trace, 1).unwrap_err().message.contains("empty"));
        for m in [ROOT, 1, 2] {
            trace.enter(m).unwrap();
        }
        trace.use_params(&[2]).unwrap();
        trace.leave(2).unwrap();
        trace.use_params(&[1, 3]).unwrap();
        trace.leave(1).unwrap();
        for m in [4, 5] {
            trace.enter(m).unwrap();
        }
        assert!(by_trace(&mut t.clone(), &trace, 1).unwrap_err().message.contains("\"b.z\" was entered but not left"));
        for m in [5, 4, ROOT] {
            trace.leave(m).unwrap();
        }
        for (min, want) in [(1, &["", "a", "a.x"][..]), (15, &["", "a", "a.x"]), (16, &["", "a.x"]), (101, &["", "a"])]
        {
            let mut t = t.clone();
            by_trace(&mut t, &trace, min).unwrap();
            assert_eq!(wrapped(&t), want, "{min}");
        }
        assert!(by_trace(&mut t.clone(), &trace, 0).is_err());
        let mut other = t.clone();
        other.add_module(ROOT, "c", "Block").unwrap();
        assert!(by_trace(&mut other, &trace, 1).unwrap_err().message.contains("another model"));
    }

    #[test]
    fn callback_sees_sizes_and_its_error_changes_nothing() {
        let mut t = tree();
        let mut seen = Vec::new();
        by_callback(&mut t, |_, fqn, class, n| {
            seen.push((fqn.to_string(), n));
            Ok(class == "Linear" && n > 20)
        })
        .unwrap();
        assert_eq!(seen[0], ("a".to_string(), 115));
        assert_eq!(wrapped(&t), ["", "a.x", "b.z"]);
        let mut t = tree();
        assert!(
            by_callback(&mut t, |_, fqn, _, _| if fqn == "b" { Err(err!(Callback, "no")) } else { Ok(true) }).is_err()
        );
        assert_eq!(wrapped(&t), [""]);
    }
}
