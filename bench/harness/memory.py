"""Host memory of each system alone: the proportional set size (PSS) summed over its ranks, which counts what ranks share
once; its largest value while they step, and what their libraries take by themselves."""

import statistics

from . import ranks, workloads

START_S, STEP_S = 180, 60
# Steps that are watched. State is complete after the first; PyTorch's heaps grow until the fourth.
STEPS = 4


def pss_of(rollup):
    """Bytes of a process's proportional set size, from the lines of its smaps_rollup. What it shares with the fork server
    that started it (harness/forks.py), of which it has a copy as soon as it writes, counts as if it had it alone, as a
    process has that was started in another way."""
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in rollup if line.rstrip().endswith(" kB")}
    return (kilobytes["Pss"] - kilobytes["Pss_Anon"] + kilobytes["Anonymous"]) * 1024


def pss(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return pss_of(file)


class Peak:
    """The largest sum over a system's processes of all the times that sample was called."""

    def __init__(self, system):
        self._pids = [process.pid for process in system.processes]
        self.bytes = 0

    def sample(self):
        self.bytes = max(self.bytes, sum(map(pss, self._pids)))


def peak_of(name, command, world_size, logs, starter):
    """(largest PSS of all ranks while they step, what "stats" says) of a system that runs alone."""
    with ranks.System(name, command, world_size, logs, starter) as system:
        system.answers(START_S)
        peak = Peak(system)
        system.steps(STEPS, STEPS * STEP_S, idle=peak.sample)
        peak.sample()
        return peak.bytes, system.ask("stats", STEP_S)


def libraries_of(name, command, world_size, logs, starter):
    """PSS of as many processes that have loaded the same libraries and do nothing."""
    with ranks.System(name, [*command, "--load-only"], world_size, logs, starter) as system:
        system.answers(START_S)
        peak = Peak(system)
        peak.sample()
        return peak.bytes


def activations(workload, program, data, logs):
    """What forward and backward need besides parameters and gradients, summed over the ranks: the peak of as many processes
    of the program of bench/step that compute unsharded and free each gradient at once, less libraries and parameters. In two
    parts: what lies in the heap, where gradient shards have their turns with it, and all else (small tensors, buffers of
    the libraries, their code)."""
    command = [*program, "--system", "plain", *workload.arguments(data)]
    peak, stats = peak_of("plain", command, workload.world_size, logs, ranks.start)
    params = 4 * workloads.parameter_count(workload.model) * workload.world_size
    in_heap = sum(rank["heap_bytes"] for rank in stats)
    return in_heap, peak - libraries_of("plain", program, workload.world_size, logs, ranks.start) - params - in_heap


def measure(workload, commands, programs, data, logs, say, plan_bytes, runs, starter=ranks.start):
    """Rows of a workload: for each system the median of its peaks in some runs, and its libraries'. `programs` has each
    system's program without arguments. `plan_bytes`: what the plan says that the host holds."""
    rows, known = [], {}
    folder = logs / workload.name / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    in_heap, besides = activations(workload, programs["bound"], data, folder)
    for name, command in commands.items():
        watched = [peak_of(name, command, workload.world_size, folder, starter) for _ in range(runs)]
        peaks, stats = zip(*watched, strict=True)
        peak, stats = int(statistics.median(peaks)), stats[0]
        kind = tuple(map(str, programs[name]))
        if kind not in known:
            known[kind] = libraries_of(name, programs[name], workload.world_size, folder, starter)
        row = {"workload": workload.name, "system": name, "world_size": workload.world_size,
               "host_peak_pss_bytes": peak, "peaks": peaks,
               "libraries_pss_bytes": known[kind], "own_bytes": peak - known[kind]}
        if name in workloads.OURS:
            optimizer = sum(rank["optimizer_bytes"] for rank in stats)
            # Gradient shards, and what the optimizer needs beside them, come when activations have gone (src/heap.rs).
            grads = sum(rank["grad_shard_bytes"] for rank in stats)
            row.update(plan_bytes=plan_bytes, activation_bytes=in_heap + besides, optimizer_bytes=optimizer,
                       expected_bytes=plan_bytes - grads + max(in_heap, grads + optimizer) + besides)
        rows.append(row)
        say(f"{workload.name:16} {name:15} peak PSS {peak / 1e6:8.1f} MB, without libraries {row['own_bytes'] / 1e6:8.1f} MB"
            + (f" (plan, activations, optimizer: {row['expected_bytes'] / 1e6:.1f} MB)" if name in workloads.OURS else ""))
    return rows
