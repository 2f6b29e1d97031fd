"""Measures on a GPU: this engine, PyTorch's FSDP2 and plain LibTorch, world size 1, bfloat16. Each system runs alone, so that
memory is its own; the systems take turns by round, so that what the GPU does besides meets all of them."""

import dataclasses
import math
import statistics

from . import ranks, ratios

SYSTEMS = ("fsdp", "torch_fsdp2", "plain")
TITLES = {"fsdp": "fsdp", "torch_fsdp2": "FSDP2", "plain": "plain LibTorch"}
# How far a loss may be from plain LibTorch's: sums of bfloat16 in other kernels.
TOLERANCE = 1e-2
START_S, STEP_S = 300, 60
# Steps before those that are measured: allocators fill, state appears, kernels are chosen.
WARM = 5


@dataclasses.dataclass(frozen=True)
class Workload:
    """With few tokens the GPU waits for the host, and a step takes as long as it takes to launch it."""
    name: str
    model: str
    layers: int
    batch: int
    tokens: int

    def arguments(self, system, device):
        return ["--system", system, "--model", self.model, "--batch", str(self.batch), "--tokens", str(self.tokens),
                "--device", device]

    @property
    def units(self):
        return self.layers + 1


WORKLOADS = (
    Workload("gpt2_124m_8x1024", "124m", 12, 8, 1024),
    Workload("gpt2_774m_4x1024", "774m", 36, 4, 1024),
    Workload("gpt2_124m_1x64", "124m", 12, 1, 64),
    Workload("gpt2_774m_1x64", "774m", 36, 1, 64),
)


def run(workload, system, command, device, logs, steps):
    """One process of a system: what it answers for `steps` steps after the warm ones, their losses, and its memory."""
    with ranks.System(f"{workload.name}.{system}", [*command, *workload.arguments(system, device)], 1, logs) as running:
        running.answers(START_S)
        warm = running.ask(f"steps {WARM}", WARM * STEP_S)[0]
        running.ask("reset", STEP_S)
        answer = running.ask(f"steps {steps}", steps * STEP_S)[0]
        memory = running.ask("stats", STEP_S)[0]
    for part in (warm, answer):
        if not all(isinstance(part.get(key), list) for key in ("step_s", "host_s", "loss")):
            raise ranks.Failed(f"{workload.name}: {system} answered {str(part)[:200]} when asked for steps")
    return {**answer, "losses": warm["loss"] + answer["loss"], "memory": memory}


def measure(workload, commands, device, logs, say, rounds, steps):
    """A row for each system, and the ratios to fsdp's. `commands`: the program of each system."""
    logs = logs / workload.name
    logs.mkdir(parents=True, exist_ok=True)
    found = {system: [] for system in SYSTEMS}
    for turn in range(rounds):
        order = SYSTEMS[turn % len(SYSTEMS):] + SYSTEMS[:turn % len(SYSTEMS)]
        for system in order:
            found[system].append(run(workload, system, commands[system], device, logs, steps))
    losses = {system: found[system][0]["losses"] for system in ("plain", "fsdp", "torch_fsdp2")}
    different = ratios.first_difference(losses, TOLERANCE)
    if different:
        system, step, got, reference, want = different
        raise ranks.Failed(f"{workload.name}: {system} does not compute what {reference} does: in step {step} its loss is "
                           f"{got!r}, not {want!r} (within {TOLERANCE:g})")
    rows = []
    for system in SYSTEMS:
        every = lambda key: [value for one in found[system] for value in one[key]]
        most = lambda key: max(one["memory"].get(key, 0) for one in found[system])
        row = {"workload": workload.name, "system": system, "units": workload.units,
               "median_step_s": statistics.median(every("step_s")), "median_host_s": statistics.median(every("host_s")),
               **{key: most(key) for key in ("allocated_peak_bytes", "reserved_peak_bytes", "driver_used_bytes")}}
        if system == "fsdp":
            row.update({key: most(key) for key in ("engine_peak_bytes", "plan_bytes", "overflows")})
        rows.append(row)
        say(f"{workload.name:18} {system:12} step {row['median_step_s'] * 1e3:8.2f} ms, host {row['median_host_s'] * 1e3:8.2f} "
            f"ms, peak {row['allocated_peak_bytes'] / 1e6:9.1f} MB (driver {row['driver_used_bytes'] / 1e6:.1f} MB)")
    rounds_of = lambda system: [one["step_s"] for one in found[system]]
    compare = [{"workload": workload.name, "over": other, **ratios.of_rounds(rounds_of("fsdp"), rounds_of(other))}
               for other in ("plain", "torch_fsdp2")]
    return rows, compare


def host_per_unit(rows, workload, system):
    """Seconds of the host's that a system adds to each unit of a step: more than plain LibTorch's launches."""
    by = {row["system"]: row for row in rows if row["workload"] == workload}
    return (by[system]["median_host_s"] - by["plain"]["median_host_s"]) / by["plain"]["units"]


def targets(rows, compare):
    """Whether each thing that is wanted was found: name, bound, value, met."""
    found = []

    def target(name, value, bound, met):
        found.append({"name": name, "bound": bound, "value": value, "met": bool(met)})

    for ratio in compare:
        if not ratio["workload"].endswith("x1024"):
            continue
        if ratio["over"] == "plain":
            target(f"{ratio['workload']}: step over plain LibTorch", ratio["median"], "<= 1.02", ratio["median"] <= 1.02)
        else:
            target(f"{ratio['workload']}: step over FSDP2", ratio["median"], "< 1", ratio["median"] < 1)
    for name in dict.fromkeys(row["workload"] for row in rows):
        by = {row["system"]: row for row in rows if row["workload"] == name}
        over = by["fsdp"]["allocated_peak_bytes"] / max(1, by["torch_fsdp2"]["allocated_peak_bytes"])
        target(f"{name}: peak memory over FSDP2", over, "<= 1", over <= 1)
        planned = by["fsdp"]["engine_peak_bytes"] / max(1, by["fsdp"]["plan_bytes"])
        target(f"{name}: the engine's memory over its plan", planned, "0.98 to 1.02", math.isclose(planned, 1, rel_tol=0.02))
    return found
