#!/usr/bin/env python3
"""Makes capi_tests/scenario_data/: what PyTorch's own data-parallel wrappers compute for the scenario tests.

    make scenario-data                                                    (or, in an environment with the
    python3 scripts/make_scenario_data.py capi_tests/scenario_data         packages of requirements/pytorch.txt)

Runs the real DistributedDataParallel and FullyShardedDataParallel on the CPU: gloo, 1, 2 and 4 ranks (processes that this
script starts), one thread each. Writes NAME_wWORLD.safetensors; the same input gives the same bytes. The tests only read
the files. At world size 1 PyTorch's FSDP runs without sharding.

Every file: "about" in the metadata is JSON with the versions, the scenario's facts, and "texts" where PyTorch says
something. All tensors are float32 unless said otherwise; W is the world size, rank r is entry r. Weights come from
torch.manual_seed(SEED) followed by the construction of the modules in the order of their keys (nn.Linear: weight, then
bias), so that a LibTorch program gets the same bits without the file.

multiple_forward  inner = Linear(4, 4) used twice, outer = Linear(4, 5); y = outer(inner(x) + inner(x)), loss = sum of y;
                  3 steps of SGD with lr 0.1. Weights: seed 0, inner, outer.
    initial.PARAM             weights before training
    same.input [64, 4]        the input of every rank: rand(64, 4), drawn right after the construction
    each.input [W, 64, 4]     a different input per rank: manual_seed(100 + r), rand(64, 4)
    CASE.loss.SYSTEM [3, W]   CASE is same or each, SYSTEM ddp or fsdp
    CASE.SYSTEM.PARAM         weights after training
    about.bitwise.CASE        whether the two systems' weights agree bit for bit
multiple_wrapping  inner model = "layers", a Sequential of Linear(5, 5), which is a unit of its own; loss = sum of the
                  output; 3 steps of SGD, lr 0.1; then inference, and again after the inner model was wrapped in a new root.
                  Weights: seed 0.
    initial.PARAM             before training
    input [6, W, 1, 5]        by step: manual_seed(200 + r), six times rand(1, 5); 0 to 2 train, 3 is the inference's,
                              4 and 5 train the third root
    loss [3, W], trained.PARAM
    output.before, output.after [W, 1, 5]   of inference with the first and with the second root
    root.initial.PARAM, root.loss [2, W], root.trained.PARAM   a third root: y = head(inner(x)), head = Linear(5, 5) made
                              after manual_seed(1), trained for 2 more steps with lr 0.1; names with inner. and head.
exec_order        layer0 = Linear(5, 6), layer1 = Linear(6, 6, no bias), layer2 = Sequential(Linear(6, 3, no bias), ReLU,
                  Linear(3, 6, no bias)); z = relu(layer0(x)), y = relu(layer1(z)) or, on the other path, relu(layer2(z));
                  loss = sum of y; the layer of the path that is not taken is frozen. layer1, layer2 and the root are units.
                  SGD, lr 0.01. Weights: seed 0.
    initial.PARAM, input [6, W, 8, 5]       manual_seed(300 + r), six times randn(8, 5)
    unflipped.loss [3, W], unflipped.PARAM  3 steps on the first path
    flipped.path [6] int64, flipped.loss [6, W], flipped.PARAM   6 steps; 1 is the other path, the same on every rank
    deviating.grad.PARAM      W > 1: the gradients of one backward from the initial weights with input 0 in which rank 0
                              takes the first path and the others the other one: DistributedDataParallel with
                              find_unused_parameters, where a rank that skipped a layer counts as zero
    about.texts.error, .warning             W > 1: of a first iteration, and of a later one, that deviates
meta              Modules made without storage and initialized when they are wrapped. Every reset_parameters starts with
                  manual_seed(42): xavier_uniform_(weight, gain 1) for a linear layer (never a bias), xavier_uniform_(buf,
                  gain 0.5) for the buffer [3, 3].
                  simple: lin1 = 2 -> 4, lin2 = 4 -> 2, buf_mod.buf; y = lin2(lin1(x))
                  nested: lin1 = 2 -> 3, lin2 = 3 -> 2, l3 = simple; y = l3(lin2(lin1(x))); lin1 and l3 are units
                  mixed: lin1 = Linear(5, 5) with normal_(weight, 0, 0.1) and bias zero, lin2.weight [5, 5] =
                  normal_(0, 1); one manual_seed(42), then lin1, lin2; y = relu(lin1(x)) @ lin2.weight; gradients are
                  reduced as float16
    about.bitwise             "MODEL, CASE": whether that way of making and wrapping agrees with meta bit for bit, before
                              and after the step
    MODEL.initial.NAME        after initialization, the buffer included
    MODEL.input [W, 10, IN]   manual_seed(400 + r), randn
    MODEL.loss [W], MODEL.trained.PARAM     one step, loss = sum of y, SGD with lr 1e-3
    mixed.grad16.PARAM, mixed.grad32.PARAM  gradients reduced as float16 and as float32
fx (one file)     The model of the execution-order tracer: weight1 [6, 6], weight2 [6, 6], weight_unused [2, 2] = randn,
                  layer0 = Linear(6, 6), layer1 = Linear(6, 6, no bias), layer2 = Sequential(Linear(6, 3, no bias), ReLU,
                  Linear(3, 6, no bias)). Weights: seed 0.
    initial.PARAM, input [4, 8, 6]          manual_seed(500 + r), randn(8, 6)
    loss [4], grad.PARAM [4, ...]           of rank r's input alone, without run_all_layers; loss = sum of the output
                                            (with it, nothing but layer0 would reach the output)
    about.traces.all, .some   with and without run_all_layers: module_forward_order, module_to_param_usage_infos (as
                              [module, [parameter names below it]]), param_forward_order, visited_params (sorted)
"""

import json
import os
import sys
import tempfile
import warnings

# Before torch: ranks talk over the loopback device only, and compute with one thread.
os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp._trace_utils import _ExecOrderTracer
from torch.distributed.fsdp.wrap import always_wrap_policy, enable_wrap, ModuleWrapPolicy, wrap
from torch.nn.parallel import DistributedDataParallel as DDP

CPU = torch.device("cpu")
WORLDS = (1, 2, 4)


# ---- what every scenario uses ----


def shard(module, **options):
    return FSDP(module, device_id=CPU, **options)


def clean(name):
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def full(model, grads=False):
    """Full parameters (or their gradients) by name, on every rank."""
    of = lambda p: (p.grad if grads else p).detach().clone()
    if not isinstance(model, FSDP):
        return {clean(n): of(p) for n, p in model.named_parameters()}
    with FSDP.summon_full_params(model, writeback=False, with_grads=grads):
        return {clean(n): of(p) for n, p in model.named_parameters()}


def prefixed(prefix, tensors):
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def of_ranks(values):
    """This rank's list of tensors, stacked, and the ranks' stacks below one another: [len, W, ...]."""
    mine = torch.stack([v.detach() for v in values])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return torch.stack(every, 1)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-6, atol=1e-8) for n in a)


def must(condition, what):
    if not condition:
        raise SystemExit(f"make_scenario_data: PyTorch does not behave as expected: {what}")


def step(model, optimizer, x):
    loss = model(x).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def inputs(seed, draw, count):
    torch.manual_seed(seed + dist.get_rank())
    return [draw() for _ in range(count)]


# ---- the scenarios: (tensors, facts) ----


class TwiceUsed(nn.Module):
    def __init__(self, wrapped):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        if wrapped:
            self.inner = shard(self.inner)
        self.outer = nn.Linear(4, 5)

    def forward(self, x):
        return self.outer(self.inner(x) + self.inner(x))


def multiple_forward(world):
    tensors, bitwise = prefixed("initial", full(TwiceUsed(False))), {}
    for case in ("same", "each"):
        result = {}
        for system in ("ddp", "fsdp"):
            model = TwiceUsed(system == "fsdp")
            x = torch.rand(64, 4) if case == "same" else inputs(100, lambda: torch.rand(64, 4), 1)[0]
            model = shard(model) if system == "fsdp" else DDP(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            tensors[f"{case}.loss.{system}"] = of_ranks([step(model, optimizer, x) for _ in range(3)])
            result[system] = full(model)
            tensors.update(prefixed(f"{case}.{system}", result[system]))
        tensors[f"{case}.input"] = x if case == "same" else of_ranks([x])[0]
        bitwise[case] = same(result["ddp"], result["fsdp"])
    return tensors, {"bitwise": bitwise}


class Inner(nn.Module):
    def __init__(self, wrapped):
        super().__init__()
        linear = nn.Linear(5, 5)
        self.layers = nn.Sequential(shard(linear) if wrapped else linear)

    def forward(self, x):
        return self.layers(x)


class NewRoot(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(5, 5)

    def forward(self, x):
        return self.head(self.inner(x))


def multiple_wrapping(world):
    torch.manual_seed(0)
    tensors = prefixed("initial", full(Inner(False)))
    torch.manual_seed(0)
    inner = Inner(True)
    x = inputs(200, lambda: torch.rand(1, 5), 6)
    model = shard(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tensors["loss"] = of_ranks([step(model, optimizer, x[i]) for i in range(3)])
    tensors.update(prefixed("trained", full(model)))
    before = model(x[3])
    after = shard(inner)(x[3])
    must(torch.equal(before, after), "the output after wrapping again is not the one before")
    torch.manual_seed(1)
    root = NewRoot(inner)
    root = shard(root)
    tensors.update(prefixed("root.initial", full(root)))
    optimizer = torch.optim.SGD(root.parameters(), lr=0.1)
    tensors["root.loss"] = of_ranks([step(root, optimizer, x[i]) for i in (4, 5)])
    tensors.update(prefixed("root.trained", full(root)))
    tensors.update({"input": of_ranks(x), "output.before": of_ranks([before])[0], "output.after": of_ranks([after])[0]})
    return tensors, {}


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer0 = nn.Linear(5, 6)
        self.layer1 = nn.Linear(6, 6, bias=False)
        self.layer2 = nn.Sequential(nn.Linear(6, 3, bias=False), nn.ReLU(), nn.Linear(3, 6, bias=False))
        self.path = 0
        self.layer2.requires_grad_(False)

    def forward(self, x):
        z = self.layer0(x).relu()
        return (self.layer2(z) if self.path else self.layer1(z)).relu()

    def take(self, path):
        self.path = path
        for layer, on in ((self.layer1, path == 0), (self.layer2, path == 1)):
            for p in layer.parameters():
                p.requires_grad = on

    @staticmethod
    def sharded(strategy):
        model = TwoPaths()
        model.layer1 = shard(model.layer1, sharding_strategy=strategy)
        model.layer2 = shard(model.layer2, sharding_strategy=strategy)
        return shard(model, sharding_strategy=strategy)


def exec_order(world):
    x = inputs(300, lambda: torch.randn(8, 5), 6)
    tensors = prefixed("initial", full(TwoPaths()))
    tensors["input"] = of_ranks(x)
    rank = dist.get_rank()
    runs = {}
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
        run = {}
        for name, path in (("unflipped", [0, 0, 0]), ("flipped", [0, 0, 1, 1, 0, 1])):
            model = TwoPaths.sharded(strategy)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            losses = []
            for i, p in enumerate(path):
                model.take(p)
                losses.append(step(model, optimizer, x[i]))
            run[f"{name}.loss"] = of_ranks(losses)
            run.update(prefixed(name, full(model)))
        runs[strategy] = run
    must(same(*runs.values()), "FULL_SHARD and SHARD_GRAD_OP train differently")
    tensors.update(run)
    tensors["flipped.path"] = torch.tensor(path)
    if world == 1:
        return tensors, {}

    plain = TwoPaths()
    plain.layer2.requires_grad_(True)
    plain.path = int(rank != 0)
    model = DDP(plain, find_unused_parameters=True)
    model(x[0]).sum().backward()
    tensors.update(prefixed("deviating.grad", full(model, grads=True)))

    dist.set_debug_level(dist.DebugLevel.DETAIL)  # PyTorch checks the order in this mode only
    texts = {}
    model = TwoPaths.sharded(ShardingStrategy.FULL_SHARD)
    model.take(int(rank != 0))
    try:
        model(x[0])
    except RuntimeError as error:
        texts["error"] = str(error)
    model = TwoPaths.sharded(ShardingStrategy.FULL_SHARD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in (0, 1, 1):
            model.take(path)
            model(x[0]).sum().backward()
    # All ranks deviate here, so that PyTorch's collectives still fit together; rank 0's text is kept.
    said = [str(w.message) for w in caught if str(w.message).startswith("Forward order differs")]
    must("error" in texts and len(said) == 1, "one error and one warning about the order")
    texts["warning"] = said[0]
    dist.set_debug_level(dist.DebugLevel.OFF)
    return tensors, {"texts": texts}


class Reset(nn.Linear):
    def __init__(self, inputs, outputs, device):
        super().__init__(inputs, outputs, bias=False, device=device)

    def reset_parameters(self):
        torch.manual_seed(42)
        nn.init.xavier_uniform_(self.weight, 1.0)


class Buffer(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.register_buffer("buf", torch.empty(3, 3, device=device))

    def reset_parameters(self):
        torch.manual_seed(42)
        nn.init.xavier_uniform_(self.buf, 0.5)


class Simple(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.lin1 = Reset(2, 4, device)
        self.lin2 = Reset(4, 2, device)
        self.buf_mod = Buffer(device)

    def forward(self, x):
        return self.lin2(self.lin1(x))


class Nested(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.lin1 = wrap(Reset(2, 3, device))
        self.lin2 = Reset(3, 2, device)
        self.l3 = wrap(Simple(device))

    def forward(self, x):
        return self.l3(self.lin2(self.lin1(x)))


class Matrix(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 5, device=device))

    def forward(self, x):
        return x @ self.weight


class Mixed(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.lin1 = nn.Linear(5, 5, device=device)
        self.lin2 = Matrix(device)

    def forward(self, x):
        return self.lin2(self.lin1(x).relu())


def meta_case(model, x):
    """Values after wrapping and after one step; the same of a second model made the regular way must not differ."""
    initial = full(model)
    initial.update({clean(n): b.clone() for n, b in model.named_buffers()})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = step(model, optimizer, x)
    return {**prefixed("initial", initial), "loss": of_ranks([loss])[0], **prefixed("trained", full(model))}


def regular(model):
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def wrapped_by_hand(make):
    with enable_wrap(wrapper_cls=FSDP, device_id=CPU):
        return wrap(make())


def mixed_init(module):
    """PyTorch wraps nested units first; each module seeds so that the order does not show."""
    module.to_empty(device=CPU, recurse=False)
    generator = torch.Generator().manual_seed(42)
    weight1 = torch.empty(5, 5).normal_(0, 0.1, generator=generator)
    weight2 = torch.empty(5, 5).normal_(0, 1, generator=generator)
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            module.weight.copy_(weight1)
            module.bias.zero_()
        elif isinstance(module, Matrix):
            module.weight.copy_(weight2)


def meta(world):
    tensors, bitwise = {}, {}
    always = {"auto_wrap_policy": always_wrap_policy}
    for name, make in (("simple", Simple), ("nested", Nested)):
        x = inputs(400, lambda: torch.randn(10, 2), 1)[0]
        # Wrapping seeds the generator: the input was drawn before.
        cases = {"meta": meta_case(shard(make("meta"), **always), x),
                 "meta, one unit": meta_case(shard(make("meta")), x),
                 "meta, by hand": meta_case(wrapped_by_hand(lambda: make("meta")), x),
                 "regular": meta_case(shard(regular(make(CPU)), **always), x)}
        for case, values in cases.items():
            # Other units are summed in other pieces, hence in another order.
            must(close(values, cases["meta"]), f"{name}: {case} differs from meta")
            bitwise[f"{name}, {case}"] = same(values, cases["meta"])
        tensors.update(prefixed(name, cases["meta"]))
        tensors[f"{name}.input"] = of_ranks([x])[0]
    x = inputs(400, lambda: torch.randn(10, 5), 1)[0]
    tensors["mixed.input"] = of_ranks([x])[0]
    for bits, dtype in ((16, torch.float16), (32, torch.float32)):
        make = lambda **options: shard(
            Mixed("meta"), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), param_init_fn=mixed_init,
            mixed_precision=MixedPrecision(param_dtype=torch.float32, reduce_dtype=dtype), **options)
        if bits == 16:
            tensors.update(prefixed("mixed", meta_case(make(), x)))
        # Only this mode shows full gradients.
        model = make(use_orig_params=True)
        model(x).sum().backward()
        tensors.update(prefixed(f"mixed.grad{bits}", full(model, grads=True)))
    return tensors, {"bitwise": bitwise}


class Traced(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight1 = nn.Parameter(torch.randn(6, 6))
        self.weight2 = nn.Parameter(torch.randn(6, 6))
        self.weight_unused = nn.Parameter(torch.randn(2, 2))
        self.layer0 = nn.Linear(6, 6)
        self.layer1 = nn.Linear(6, 6, bias=False)
        self.layer2 = nn.Sequential(nn.Linear(6, 3, bias=False), nn.ReLU(), nn.Linear(3, 6, bias=False))
        self.relu = nn.ReLU()

    def forward(self, x, run_all_layers):
        z = self.relu(self.layer0(x))
        z = self.relu(self.layer2(z))
        z = z @ self.weight1
        if run_all_layers:
            z = self.relu(self.layer1(z))
            z = z @ self.weight2
            z = self.relu(self.layer0(x))
        return z


def fx(world):
    if world != WORLDS[0]:
        return None
    model = Traced()
    names = {m: n for n, m in model.named_modules()}
    params = {p: n for n, p in model.named_parameters()}
    traces = {}
    for key, run_all in (("all", True), ("some", False)):
        tracer, recorder = torch.fx.Tracer(), _ExecOrderTracer()
        with recorder.patch_tracer(tracer=tracer, root_module=model):
            tracer.trace(model, {"run_all_layers": run_all})
        info = recorder.exec_info
        traces[key] = {
            "module_forward_order": [names[m] for m in info.module_forward_order],
            "module_to_param_usage_infos": {
                names[m]: [[names[u.module], [n for n, _ in u.named_params]] for u in usages]
                for m, usages in info.module_to_param_usage_infos.items()},
            "param_forward_order": [params[p] for p in info.param_forward_order],
            "visited_params": sorted(params[p] for p in info.visited_params)}
    tensors = prefixed("initial", full(model))
    x = []
    for rank in range(4):
        torch.manual_seed(500 + rank)
        x.append(torch.randn(8, 6))
    tensors["input"] = torch.stack(x)
    losses, grads = [], {}
    for rank in range(4):
        model.zero_grad()
        losses.append(model(x[rank], False).sum())
        losses[-1].backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                grads.setdefault(f"grad.{n}", []).append(p.grad.clone())
    tensors["loss"] = torch.stack(losses).detach()
    tensors.update({n: torch.stack(g) for n, g in grads.items()})
    return tensors, {"traces": traces}


# ---- ranks ----


def rank_main(rank, world, store, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for scenario in (multiple_forward, multiple_wrapping, exec_order, meta, fx):
        result = scenario(world)
        if rank != 0 or result is None:
            continue
        tensors, facts = result
        about = {"torch": torch.__version__, "scenario": scenario.__name__, "world_size": world, **facts}
        # One key: safetensors writes several in an order that changes from run to run.
        name = "fx.safetensors" if scenario is fx else f"{scenario.__name__}_w{world}.safetensors"
        path = os.path.join(folder, name)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path,
                  metadata={"about": json.dumps(about, sort_keys=True)})
        os.chmod(path, 0o644)
    dist.barrier()
    dist.destroy_process_group()


def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: make_scenario_data.py FOLDER")
    folder = os.path.abspath(sys.argv[1])
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for world in WORLDS:
            torch.multiprocessing.spawn(rank_main, (world, os.path.join(temporary, f"store{world}"), folder), world)
            print(f"{folder}: world size {world}")


if __name__ == "__main__":
    main()
