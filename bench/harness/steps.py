"""Step times of all systems of a workload, in turns: all are started, must agree on the losses, and then take their steps
round by round while the others sleep, so that what the machine does besides meets all of them."""

import contextlib
import statistics
import time

from . import ranks, ratios, workloads

# How far a loss, averaged over the ranks, may be from the reference's: sums of gradients have other orders.
TOLERANCE = 1e-4
# Share of a processor that a process may use while it waits for its turn.
IDLE = 0.01
START_S, STEP_S = 180, 30


def agree(workload, running, count):
    """Takes `count` steps with every system and compares the losses; the reference is PyTorch's DDP. The bound does not
    communicate: it only takes the steps. Returns the reference's losses."""
    losses = {}
    for name in sorted(running, key=lambda name: name != "torch_ddp"):
        curve = running[name].steps(count, count * STEP_S)[1]
        if name != "bound":
            losses[name] = curve
    different = ratios.first_difference(losses, TOLERANCE)
    if different:
        system, step, got, reference, want = different
        raise ranks.Failed(
            f"{workload.name}: {system} does not compute what {reference} does: in step {step} its loss is {got!r}, "
            f"not {want!r} (within {TOLERANCE:g})")
    return next(iter(losses.values()))


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


def take(workload, running, rounds, per_round):
    """Step times by system, a list of rounds of `per_round` each; and the largest share of a processor used idly."""
    names, times = list(running), {name: [] for name in running}
    idle = IdleCheck(running)
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            with idle.turn(name):
                times[name].append(running[name].steps(per_round, per_round * STEP_S)[0])
    return times, idle.finish(workload)


def measure(workload, commands, logs, say, *, compared, rounds, per_round):
    """Rows and ratios of a workload. `commands` has the command line of each system, `compared` is how many steps the
    systems must agree on. Raises ranks.Failed."""
    with contextlib.ExitStack() as stack:
        running = {}
        for name, command in commands.items():
            running[name] = stack.enter_context(
                ranks.System(name, command, workload.world_size, logs / workload.name))
        for system in running.values():
            system.answers(START_S)
        curve = agree(workload, running, compared)
        say(f"{workload.name}: all systems compute the same; loss {curve[0]:.5g}, after {compared - 1} steps {curve[-1]:.5g}")
        for system in running.values():
            system.ask("reload", START_S)
        times, idle = take(workload, running, rounds, per_round)
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
