"""What the project wants to reach, and whether this run does: pure arithmetic on the rows."""

import math

from . import workloads


def target(name, value, at_least=-math.inf, at_most=math.inf):
    bound = " and ".join([f">= {at_least:g}"] * (at_least > -math.inf) + [f"<= {at_most:g}"] * (at_most < math.inf))
    return {"name": name, "value": value, "bound": bound, "met": at_least <= value <= at_most}


def of_steps(ratios):
    """Step times over the bound's and over the peers', medians of the rounds' ratios."""
    over = {(row["workload"], row["system"], row["over"]): row["median"] for row in ratios}
    most_over_bound = {"gpt33m_2x128_w2": 1.10, "gpt33m_1x16_w2": 1.25}
    least_faster = {"gpt33m_2x128_w2": 1.6, "gpt33m_1x16_w2": 2.8, "tiny200_w2": 30}
    found = []
    for (workload, system, other), ratio in over.items():
        if other == "bound" and workload in most_over_bound:
            found.append(target(f"{workload}: {system}, step time over the bound's", ratio,
                                at_most=most_over_bound[workload]))
        elif other in ("torch_fsdp1", "torch_fsdp2") and workload in least_faster:
            found.append(target(f"{workload}: {system}, times as fast as {other}", 1 / ratio,
                                at_least=least_faster[workload]))
        elif other == "torch_ddp" and workload in most_over_bound:
            found.append(target(f"{workload}: {system}, times as fast as {other}", 1 / ratio, at_least=1))
    return found


def of_collectives(rows, speeds):
    """At 4 MiB and more; the slowest size counts."""
    found = []
    for dtype in ("float32", "bfloat16"):
        for other, least in (("gloo", 15), ("open_mpi", 6), ("plain_loop", 0.7)):
            times_as_fast = [s["median"] for s in speeds if s["over"] == other and s["collective"] == "reduce_scatter"
                             and s["dtype"] == dtype and s["bytes"] >= 4 << 20]
            if times_as_fast:
                found.append(target(f"{dtype} reduce-scatter, 4 to 64 MiB: at least so many times as fast as {other}",
                                    min(times_as_fast), at_least=least))
    gathers = lambda system: sorted((row["bytes"], row["median_s"]) for row in rows if row["system"] == system
                                    and row["collective"] == "all_gather" and row["dtype"] == "float32")
    if gathers("shm") and gathers("memcpy"):
        growth = gathers("shm")[-1][1] - gathers("shm")[0][1]
        found.append(target("float32 all-gather: growth of its time from 64 KiB to 64 MiB, over memcpy's time at 64 MiB",
                            growth / gathers("memcpy")[-1][1], at_most=0.01))
    return found


def of_memory(rows):
    """Without libraries. tiny200's state is less than 2 MB, the noise of everything else: it has no targets."""
    by = {(row["workload"], row["system"]): row for row in rows}
    found = []
    for (workload, system), row in by.items():
        if system not in workloads.OURS or workload == "tiny200_w2":
            continue
        for other in ("torch_fsdp1", "torch_fsdp2"):
            if (workload, other) in by:
                found.append(target(f"{workload}: {system}, peak memory over {other}'s",
                                    row["own_bytes"] / by[workload, other]["own_bytes"], at_most=0.6))
        found.append(target(f"{workload}: {system}, peak memory over plan, activations and optimizer",
                            row["own_bytes"] / row["expected_bytes"], at_least=0.95, at_most=1.05))
    return found


def of_overheads(rows):
    most = {"ns_per_unit_hook_pair": ("engine's time per unit and pass (hooks), ns", 3000),
            "engine_ns_per_unit_pass": ("all that sharding adds per unit and pass of tiny200 in LibTorch, ns", 3000),
            "ops_fallback_ns": ("fallback's time per operator, ns", 500)}
    found = []
    for row in rows:
        name, limit = most[row["overhead"]]
        which = f", {row['pass']}" if "pass" in row else ""
        # What is less than nothing was not measured.
        found.append(target(name + which, row["ns"], at_least=0, at_most=limit))
    return found


def of_setup(speeds):
    return [target(f"{row['setup']}: speed over {row['over']}'s", row["median"], at_least=0.8)
            for row in speeds if row["setup"] != "shard_from_meta"]


def of(found):
    """The targets of the parts that were measured."""
    return [*of_steps(found["ratios"]), *of_memory(found["memory"]),
            *of_collectives(found["collectives"], found["collective_speeds"]),
            *of_overheads(found["overheads"]), *of_setup(found["setup_speeds"])]
