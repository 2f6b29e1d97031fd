"""Step times of all systems of a workload, in turns: all are started, and take their steps round by round while the others
sleep, so that what the machine does besides meets all of them. They must agree on the losses before a time counts."""

import contextlib
import statistics
import time

from . import ranks, ratios, workloads

# How far a loss, averaged over the ranks, may be from the reference's: sums of gradients have other orders.
TOLERANCE = 1e-4
# How many losses are compared, at most: differences of rounding grow with the steps.
COMPARED = 11
# Steps that come first and are not timed: memory is met for the first time, and what is made lazily is made. Systems start
# and take them all at once.
WARM_UP = 1
# Share of a processor that a process may use while it waits for its turn.
IDLE = 0.01
START_S, STEP_S = 180, 30


def agree(workload, curves):
    """Compares the losses of the systems (lists as long as each other); the reference is PyTorch's DDP. The bound does not
    communicate, so that its losses are its own. Returns the reference's losses."""
    compared = {name: curves[name][:COMPARED] for name in sorted(curves, key=lambda name: name != "torch_ddp") if name != "bound"}
    different = ratios.first_difference(compared, TOLERANCE)
    if different:
        system, step, got, reference, want = different
        raise ranks.Failed(
            f"{workload.name}: {system} does not compute what {reference} does: in step {step} its loss is {got!r}, "
            f"not {want!r} (within {TOLERANCE:g})")
    return next(iter(compared.values()))


class IdleCheck:
    """Sees that systems sleep while it is not their turn."""

    def __init__(self, running):
        self._running = running
        self._begin = time.monotonic()
        self._used = {name: -system.cpu_seconds() for name, system in running.items()}
        self._active = dict.fromkeys(running, 0.0)

    @contextlib.contextmanager
    def turn(self, name):
        begin, used = time.monotonic(), self._running[name].cpu_seconds()
        yield
        self._used[name] -= self._running[name].cpu_seconds() - used
        self._active[name] += time.monotonic() - begin

    def finish(self, workload):
        """The largest share of a processor that any system used while idle; Failed if that is too much."""
        wall = time.monotonic() - self._begin
        shares = {name: (self._used[name] + system.cpu_seconds()) / (wall - self._active[name])
                  for name, system in self._running.items()}
        name = max(shares, key=shares.get)
        if shares[name] > IDLE * workload.world_size:
            raise ranks.Failed(f"{workload.name}: {name} used {shares[name]:.1%} of a processor while it was not its turn: "
                               "the times of the others count for nothing")
        return shares[name]


def warm_up(running):
    """Waits until all systems are ready and have taken the first steps. Their losses by system."""
    for system in running.values():
        system.tell(f"steps {WARM_UP}")
    for system in running.values():
        system.answers(START_S)
    return {name: system.taken(WARM_UP, START_S)[1] for name, system in running.items()}


def take(workload, running, curves, rounds, per_round):
    """Step times by system, a list of rounds of `per_round` each; the losses that all agree on; and the largest share of
    a processor used idly. `curves` has the losses of the steps before, and gets these."""
    names, times = list(running), {name: [] for name in running}
    agree(workload, curves)
    idle = IdleCheck(running)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            with idle.turn(name):
                seconds, losses = running[name].steps(per_round, per_round * STEP_S)
            times[name].append(seconds)
            curves[name] += losses
        agreed = agree(workload, curves)
    return times, agreed, idle.finish(workload)


def measure(workload, commands, logs, say, *, rounds, per_round, starter=ranks.start):
    """Rows and ratios of a workload. `commands` has the command line of each system. Raises ranks.Failed."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        running = {}
        for name, command in commands.items():
            running[name] = stack.enter_context(
                ranks.System(name, command, workload.world_size, logs / workload.name, starter))
        curves = warm_up(running)
        started = time.monotonic()
        times, curve, idle = take(workload, running, curves, rounds, per_round)
        say(f"{workload.name}: all systems compute the same; loss {curve[0]:.5g}, after {len(curve) - 1} steps {curve[-1]:.5g} "
            f"(started in {started - began:.1f} s, measured in {time.monotonic() - started:.1f} s)")
    rows = []
    for name in commands:
        counted = [seconds for turn in times[name] for seconds in turn]
        rows.append({
            "workload": workload.name, "system": name, "world_size": workload.world_size,
            "median_step_s": statistics.median(counted), "min_step_s": min(counted), "steps": len(counted),
            "host_peak_pss_bytes": None})
        say(f"{workload.name:16} {name:15} median {rows[-1]['median_step_s'] * 1e3:9.2f} ms   "
            f"min {rows[-1]['min_step_s'] * 1e3:9.2f} ms   of {len(counted)} steps")
    compare = [
        {"workload": workload.name, "system": name, "over": other, **ratios.of_rounds(times[name], times[other])}
        for name in workloads.OURS for other in ("bound", *workloads.PEERS) if name in times and other in times]
    return rows, compare, {"workload": workload.name, "losses": curve, "idle_share": idle}
