"""Rows of overheads: what hooks, operators and units cost where nothing is communicated (world size 1)."""

import statistics

from . import ranks, workloads

UNITS, ITERATIONS = 200, 500
DEADLINE_S = 120


def printed(name, command, logs):
    """The one object that a program prints."""
    with ranks.System(name, command, 1, logs) as system:
        return system.answers(DEADLINE_S)[0]


def per_unit_pass(sharded, unsharded):
    """Nanoseconds per unit and pass: the difference of two times of a forward and backward of tiny200, over its units' passes."""
    return (sharded - unsharded) / (2 * workloads.TINY_LAYERS) * 1e9


def engine_time(step, tiny, data, logs, rounds, per_round):
    """Nanoseconds that sharding adds to each pass of a unit of tiny200 at world size 1, over the same forward and backward
    unsharded, by round: of the fastest of each, since the difference is small beside the noise. Optimizers are left out: they
    do not step over the same tensors."""

    def passes(system):
        (answer,) = system.ask(f"steps {per_round}", DEADLINE_S)
        return min(map(sum, zip(answer["forward_s"], answer["backward_s"], strict=True)))

    commands = {name: [*step, "--system", name, *tiny.arguments(data)] for name in ("fsdp_shm", "bound")}
    differences = []
    with ranks.System("fsdp_shm", commands["fsdp_shm"], 1, logs) as sharded:
        with ranks.System("bound", commands["bound"], 1, logs) as unsharded:
            for system in (sharded, unsharded):
                system.answers(DEADLINE_S)
                system.steps(3, DEADLINE_S)
            for _ in range(rounds):
                differences.append(per_unit_pass(passes(sharded), passes(unsharded)))
    return differences


def measure(programs, step, tiny, data, logs, say, quick):
    """Rows {"overhead", "ns", ...}: medians over several runs of each program."""
    logs = logs / "overhead"
    logs.mkdir(parents=True, exist_ok=True)
    rows, repetitions = [], 1 if quick else 5

    def row(name, values, **more):
        rows.append({"overhead": name, "ns": statistics.median(values), "min_ns": min(values), **more})
        say(f"{name:32} {rows[-1]['ns']:9.1f} ns  {more or ''}")

    hooks = [printed("hooks", [programs / "fsdp_bench_hooks", str(UNITS), str(ITERATIONS)], logs)
             for _ in range(repetitions)]
    row("ns_per_unit_hook_pair", [got["forward_ns"] for got in hooks], **{"pass": "forward"})
    row("ns_per_unit_hook_pair", [got["backward_ns"] for got in hooks], **{"pass": "backward"})
    operators = [printed("fallback", [programs / "fsdp_bench_fallback"], logs) for _ in range(repetitions)]
    row("ops_fallback_ns", [got["sharded_ns"] - got["plain_ns"] for got in operators],
        plain_ns=statistics.median(got["plain_ns"] for got in operators))
    row("engine_ns_per_unit_pass", engine_time(step, tiny, data, logs, 3 if quick else 15, 20))
    return rows
