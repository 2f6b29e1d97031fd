//! Forecasts against plans of every rank at small worlds, against numbers by hand, and of a model that no machine holds.

use super::*;
use crate::config::Strategy;
use crate::module::ModuleId;
use proptest::prelude::*;
use proptest::strategy::Strategy as _;
use std::ptr::null;

fn add(t: &mut ModuleTree, module: ModuleId, name: &str, shape: &[i64], trained: bool) {
    t.add_param(module, name, shape, DType::F32, trained, null()).unwrap();
}

fn request(world_size: usize) -> Request {
    Request { world_size, optimizer_bytes_per_element: 8, ..Request::default() }
}

/// root: r [5] > a: w [7, 3], frozen f [100] > x: v [40]; b has no parameters. All but the root wrapped.
fn tree() -> ModuleTree {
    let mut t = ModuleTree::new("Net");
    let a = t.add_module(ROOT, "a", "Block").unwrap();
    let x = t.add_module(a, "x", "Linear").unwrap();
    t.add_module(ROOT, "b", "Block").unwrap();
    add(&mut t, ROOT, "r", &[5], true);
    add(&mut t, a, "w", &[7, 3], true);
    add(&mut t, a, "f", &[100], false);
    add(&mut t, x, "v", &[40], true);
    crate::wrap::always(&mut t).unwrap();
    t
}

#[test]
fn numbers_by_hand() {
    // Elements at W = 2: root 8 (5, padding 3); a: w at 0, f at 32, so 132 (121, padding 11); x 40.
    let f = Forecast::new(&tree(), &Request { rank: Some(1), ..request(2) }).unwrap();
    assert_eq!((f.numel, f.trained_numel, f.rank), (166, 66, 1));
    assert_eq!(f.param_shard_bytes, 4 * (4 + 68 + 20));
    assert_eq!(f.grad_shard_bytes, 64 + 320 + 128);
    // a's 132 elements make shards of 66, which is 68 on a 16-byte cut: a buffer of 136.
    assert_eq!(f.padding_bytes, 4 * (3 + 15));
    assert_eq!(f.unit_buffer_bytes, 64 + 576 + 192);
    assert_eq!(f.gradient_slot_bytes, 4 * (136 + 40 + 8));
    // Rank 1 has 1 of r, 64 of f, 20 of v.
    assert_eq!(f.optimizer_bytes, 8 * 21);
    assert_eq!(f.shard_padding_bytes, 4 * (3 + 4));
    assert_eq!(f.unsharded_peak_bytes, 4 * (8 + 136 + 40));
    assert_eq!(f.rank_peak_bytes, 368 + 512 + 736 + 168);
    assert_eq!(f.host_peak_bytes, 832 + 2 * (512 + 736) + 8 * 66);
    let gathered = 4 * (8 + 136 + 40);
    let once = Traffic { collectives: 3, bytes: gathered, sent_bytes: gathered / 2, sent_messages: 3 };
    assert_eq!(f.reduce_scatter, once);
    // All but the root once more, for their backward.
    let bytes = gathered + 4 * (136 + 40);
    assert_eq!(f.all_gather, Traffic { collectives: 5, bytes, sent_bytes: bytes / 2, sent_messages: 5 });
    assert_eq!(f.all_reduce, Traffic::default());
    assert_eq!(
        f.units.iter().map(|u| (u.name.as_str(), u.params)).collect::<Vec<_>>(),
        [("", 1), ("a", 2), ("a.x", 1), ("b", 0)]
    );
    assert_eq!((f.unit(3).unwrap().all_gather, f.unit(3).unwrap().bytes), (Traffic::default(), 0));
    assert!(f.unit(4).unwrap_err().message.contains("unit 4"));
}

#[test]
fn strategy_slots_and_reduce_dtype_count() {
    let t = tree();
    let mut r = request(2);
    r.config.strategy = Strategy::ShardGradOp;
    r.config.reduce_dtype = DType::BF16;
    r.config.gradient_slots = 1;
    let f = Forecast::new(&t, &r).unwrap();
    assert_eq!((f.all_gather.collectives, f.all_gather.bytes), (3, 4 * 184));
    assert_eq!((f.reduce_scatter.collectives, f.reduce_scatter.bytes, f.reduce_scatter.sent_bytes), (3, 2 * 184, 184));
    assert_eq!(f.gradient_slot_bytes, 4 * 136);
    assert_eq!(f.unsharded_peak_bytes, 4 * 184);
}

#[test]
fn replicas_average_what_is_trained() {
    let mut r = Request { rank: Some(3), ..request(4) };
    (r.config.strategy, r.config.shard_size) = (Strategy::HybridShard, 2);
    let (hybrid, full) = (Forecast::new(&tree(), &r).unwrap(), Forecast::new(&tree(), &request(2)).unwrap());
    // Each group is a world of two; rank 3 is the second of its group, with 1 of r, none of w and 20 of v.
    assert_eq!((hybrid.param_shard_bytes, hybrid.all_gather), (full.param_shard_bytes, full.all_gather));
    assert_eq!(hybrid.reduce_scatter, full.reduce_scatter);
    assert_eq!(hybrid.optimizer_bytes, 8 * 21);
    let averaged = Traffic { collectives: 2, bytes: 4 * 21, sent_bytes: 2 * 2 + 2 * 40, sent_messages: 4 };
    assert_eq!(hybrid.all_reduce, averaged);
    assert_eq!(hybrid.host_peak_bytes, 2 * 832 + 4 * (512 + 736) + 2 * 8 * 66);
    (r.config.strategy, r.config.shard_size) = (Strategy::NoShard, 0);
    let none = Forecast::new(&tree(), &r).unwrap();
    assert_eq!((none.all_reduce.collectives, none.all_reduce.bytes, none.all_gather.sent_bytes), (3, 4 * 66, 0));
}

#[test]
fn sixteen_bits_need_copies_and_move_less() {
    let mut t = tree();
    let mut r = Request { rank: Some(1), ..request(2) };
    r.config.param_dtype = Some(DType::BF16);
    t.set_param_dtype(2, Some(DType::F32)).unwrap();
    let f = Forecast::new(&t, &r).unwrap();
    // r [5], w [21], v [40], each on a line of 64 bytes; f is float32.
    assert_eq!(f.compute_buffer_bytes, 64 + 64 + 128);
    // Rank 1 has 1 of r, none of w, 20 of v.
    assert_eq!(f.cast_bytes, 2 * 21);
    let full = 4 * (8 + 136 + 40);
    // The root once, the others twice.
    assert_eq!((f.unsharded_peak_bytes, f.all_gather.bytes), (full - 2 * 66, 2 * (full - 2 * 66) - (4 * 8 - 2 * 5)));
    assert_eq!((f.param_shard_bytes, f.unit_buffer_bytes), (368, 832));
    assert_eq!(f.host_peak_bytes, 832 + 256 + 2 * (512 + 736) + 8 * 66);
    assert_eq!(f.gradient_slot_bytes, 4 * (8 + 136 + 40));
    r.config.grads_in_param_dtype = true;
    // A unit of two types collects in float32.
    let narrow = Forecast::new(&t, &r).unwrap();
    assert_eq!(narrow.gradient_slot_bytes, 2 * 8 + 4 * 136 + 2 * 40);
    assert_eq!(narrow.reduce_scatter, f.reduce_scatter);
    r.config.cuda = Some(crate::config::CudaConfig::default());
    assert!(Forecast::new(&t, &r).unwrap_err().message.contains("grads_in_param_dtype"));
    (r.config.cuda, r.config.grads_in_param_dtype) = (None, false);
    t.set_unit_dtypes(2, crate::precision::UnitDtypes { param: Some(DType::F32), reduce: Some(DType::F16) }).unwrap();
    let f = Forecast::new(&t, &r).unwrap();
    assert_eq!((f.compute_buffer_bytes, f.reduce_scatter.bytes), (128, 4 * (8 + 136) + 2 * 40));
}

#[test]
fn a_unit_that_is_frozen_is_not_reduced() {
    let mut t = ModuleTree::new("Net");
    let a = t.add_module(ROOT, "a", "Block").unwrap();
    add(&mut t, ROOT, "r", &[16], true);
    add(&mut t, a, "f", &[16], false);
    t.wrap(a).unwrap();
    let f = Forecast::new(&t, &request(4)).unwrap();
    assert_eq!((f.all_gather.collectives, f.reduce_scatter.collectives, f.optimizer_bytes), (3, 1, 32));
}

#[test]
fn one_rank_sends_nothing() {
    let f = Forecast::new(&tree(), &request(1)).unwrap();
    assert_eq!((f.all_gather.collectives, f.all_gather.sent_bytes, f.all_gather.sent_messages), (5, 0, 0));
    assert_eq!((f.reduce_scatter.sent_bytes, f.optimizer_bytes), (0, 8 * 66));
}

#[test]
fn a_model_without_parameters_takes_nothing() {
    let f = Forecast::new(&ModuleTree::new("Net"), &request(3)).unwrap();
    assert_eq!((f.rank_peak_bytes, f.host_peak_bytes, f.all_gather.collectives), (0, 0, 0));
}

#[test]
fn what_cannot_be_planned_is_named() {
    let t = tree();
    let fails = |r: Request, text: &str| {
        let e = Forecast::new(&t, &r).unwrap_err();
        assert!(e.message.contains(text), "{e}");
    };
    fails(request(0), "world size 0");
    fails(request(MAX_WORLD + 1), "world size 16777217");
    fails(Request { rank: Some(2), ..request(2) }, "rank 2 does not exist in a world of 2");
    fails(Request { optimizer_bytes_per_element: 4097, ..request(2) }, "4097 bytes");
    let config = EngineConfig { reduce_dtype: DType::F64, ..EngineConfig::default() };
    fails(Request { config, ..request(2) }, "float64");
    let mut huge = ModuleTree::new("Net");
    add(&mut huge, ROOT, "w", &[1 << 30, 1 << 19], true);
    assert!(Forecast::new(&huge, &request(2)).unwrap_err().message.contains("more than"));
    let mut double = ModuleTree::new("Net");
    double.add_param(ROOT, "w", &[2], DType::F64, true, null()).unwrap();
    assert!(Forecast::new(&double, &request(2)).unwrap_err().message.contains("\"w\" is float64"));
}

/// Llama 3.1 405B: 126 layers of width 16384, 8 key and value heads of 128, feed-forward 53248, vocabulary 128256.
fn llama_405b() -> ModuleTree {
    let (width, kv, ffn, vocab) = (16384, 8 * 128, 53248, 128256);
    let mut t = ModuleTree::new("Llama");
    add(&mut t, ROOT, "embed", &[vocab, width], true);
    for l in 0..126 {
        let layer = t.add_module(ROOT, &format!("layer{l}"), "Layer").unwrap();
        for (name, shape) in [
            ("q", &[width, width][..]),
            ("k", &[kv, width]),
            ("v", &[kv, width]),
            ("o", &[width, width]),
            ("gate", &[ffn, width]),
            ("up", &[ffn, width]),
            ("down", &[width, ffn]),
            ("norm1", &[width]),
            ("norm2", &[width]),
        ] {
            add(&mut t, layer, name, shape, true);
        }
    }
    add(&mut t, ROOT, "norm", &[width], true);
    add(&mut t, ROOT, "head", &[vocab, width], true);
    crate::wrap::by_class(&mut t, "Layer").unwrap();
    t
}

#[test]
fn padding_of_405_billion_parameters_on_16384_ranks_is_below_one_percent() {
    let f = Forecast::new(&llama_405b(), &request(16384)).unwrap();
    assert_eq!(f.numel, 405_853_388_800);
    assert!(f.padding_bytes < f.numel * 4 / 100, "{} bytes of padding", f.padding_bytes);
    // A rank holds its share, rounded up by less than a cut per unit.
    assert!(f.param_shard_bytes >= f.numel * 4 / 16384 && f.param_shard_bytes < f.numel * 4 / 16384 + 127 * 16);
    assert_eq!((f.all_gather.collectives, f.reduce_scatter.collectives), (253, 127));
    // The root's buffer and one layer's.
    assert_eq!(f.unsharded_peak_bytes, f.units[0].bytes + f.units[1].bytes);
}

/// A tree of up to 8 modules (each below an earlier one), wrapped or not, with parameters that are trained or not.
fn any_tree() -> impl proptest::strategy::Strategy<Value = ModuleTree> {
    let module = (any::<prop::sample::Index>(), any::<bool>());
    let param = (any::<prop::sample::Index>(), 0i64..300, any::<bool>());
    (prop::collection::vec(module, 0..8), prop::collection::vec(param, 0..16)).prop_map(|(modules, params)| {
        let mut t = ModuleTree::new("Net");
        for (i, (parent, wrapped)) in modules.iter().enumerate() {
            let parent = parent.index(t.modules().len()) as ModuleId;
            let m = t.add_module(parent, &format!("m{i}"), "M").unwrap();
            if *wrapped {
                t.wrap(m).unwrap();
            }
        }
        for (i, (module, numel, trained)) in params.iter().enumerate() {
            let module = module.index(t.modules().len()) as ModuleId;
            add(&mut t, module, &format!("p{i}"), &[*numel], *trained);
        }
        t
    })
}

proptest! {
    /// What is forecast for a rank is what the plan of that rank says, sums over the ranks are the totals, and the
    /// largest rank is the first of the largest.
    #[test]
    fn agrees_with_the_plan_of_every_rank(t in any_tree(), world in 1usize..7, slots in 0u32..5) {
        let mut r = request(world);
        r.config.gradient_slots = slots;
        let largest = Forecast::new(&t, &r).unwrap();
        let (mut optimizer, mut padding, mut host, mut peaks) = (0, 0, largest.unit_buffer_bytes, Vec::new());
        for rank in 0..world {
            let f = Forecast::new(&t, &Request { rank: Some(rank), ..r.clone() }).unwrap();
            let plan = Plan::new(&t, rank, world).unwrap();
            let pieces = |trained: bool| -> usize {
                plan.params.iter().filter(|p| p.requires_grad || !trained).map(|p| p.piece.len).sum()
            };
            prop_assert_eq!(f.optimizer_bytes, 8 * pieces(true) as u64);
            prop_assert_eq!(f.shard_padding_bytes, f.param_shard_bytes - 4 * pieces(false) as u64);
            prop_assert_eq!(f.grad_shard_bytes, 4 * plan.shard_elements as u64);
            prop_assert_eq!(f.unit_buffer_bytes, plan.arena_bytes as u64);
            prop_assert_eq!(f.padding_bytes, plan.padding_bytes() as u64);
            prop_assert_eq!(f.gradient_slot_bytes, plan.slot_bytes(slots as usize).iter().sum::<usize>() as u64);
            for (u, p) in f.units.iter().zip(&plan.units) {
                prop_assert_eq!((&u.name, u.bytes, u.params), (&p.name, p.bytes() as u64, p.params.len()));
                prop_assert_eq!(u.bytes, world as u64 * u.shard_bytes);
                prop_assert_eq!(u.bytes - u.padding_bytes, 4 * u.numel);
            }
            prop_assert_eq!(f.units.iter().map(|u| u.padding_bytes).sum::<u64>(), f.padding_bytes);
            optimizer += f.optimizer_bytes;
            padding += f.shard_padding_bytes;
            host += f.rank_peak_bytes - f.param_shard_bytes;
            peaks.push(f.rank_peak_bytes);
        }
        prop_assert_eq!(optimizer, 8 * largest.trained_numel);
        prop_assert_eq!(padding, largest.padding_bytes);
        prop_assert_eq!(host, largest.host_peak_bytes);
        prop_assert_eq!(Some(&largest.rank_peak_bytes), peaks.iter().max());
        prop_assert_eq!(Some(largest.rank), peaks.iter().position(|p| *p == largest.rank_peak_bytes));
    }
}
