"""`make bench`: measures this engine beside what a user would otherwise run, in one run on one machine.

usage: run.py --build DIR --torch-python PYTHON [--quick] [--only steps,memory,...] [--workloads NAME,...] [--out DIR]

DIR is the build folder with bench/bin, PYTHON a Python that has the torch of scripts/requirements/pytorch.txt. Prints a
line per row as it is measured; writes summary.json, table.md and pictures to bench/out. bench/NOTES.md says how to read
them. Exits with 1 when something could not be measured, or a system computes something else than the others; a target that
is missed is reported and is no failure.
"""

import argparse
import functools
import pathlib
import signal
import sys
import time

from harness import (
    collectives, data, forks, machine, memory, overhead, plan, ranks, report, setup_speed, steps, workloads)

HERE = pathlib.Path(__file__).resolve().parent


class Bench:
    """The settings of a run, and what it has found."""

    def __init__(self, arguments):
        build = arguments.build.resolve()
        self.quick, self.torch_python = arguments.quick, arguments.torch_python
        # For steps; for memory, which takes longer, the short form has one of them.
        self.workloads = workloads.chosen(arguments.workloads, arguments.quick)
        self.memory_workloads = workloads.WORKLOADS[1:2] if self.quick and not arguments.workloads else self.workloads
        self.tool, self.programs = build / "bin" / "fsdp", build / "bench" / "bin"
        self.scratch, self.logs = build / "bench" / "scratch", build / "bench" / "logs"
        # Lists of rows. "absent" says which systems could not be measured, and why.
        self.found = {"rows": [], "ratios": [], "checks": [], "memory": [], "collectives": [], "collective_speeds": [],
                      "overheads": [], "setup": [], "setup_speeds": [], "absent": {}}
        self._began = time.monotonic()
        self.logs.mkdir(parents=True, exist_ok=True)
        self._forks = None

    def say(self, line):
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", flush=True)

    def starter(self):
        """Starts ranks, PyTorch's by forking them from a process that has imported it. That is done at the first call, so
        that nothing is measured meanwhile."""
        if self._forks is None:
            self._forks = forks.ForkServer(self.torch_python, ("peer",), self.logs / "forkserver.log")
        return self._forks.start

    def close(self):
        if self._forks is not None:
            self._forks.close()

    def program(self, system):
        """The program of a system, without arguments."""
        if system in workloads.PEERS:
            return [self.torch_python, "-B", HERE / "peers" / "peer.py"]
        return [self.programs / "fsdp_bench_step"]

    def commands(self, workload, folder):
        """The command line of each system for a workload."""
        return {system: [*self.program(system), "--system", system, *workload.arguments(folder)]
                for system in workloads.SYSTEMS}

    @functools.cache
    def inputs(self, workload):
        (self.logs / workload.name).mkdir(parents=True, exist_ok=True)
        return data.write(self.scratch / workload.name, workload)


def measure_steps(bench):
    for workload in bench.workloads:
        commands = bench.commands(workload, bench.inputs(workload))
        rows, compare, check = steps.measure(
            workload, commands, bench.logs, bench.say, rounds=2 if bench.quick else 6, per_round=5, starter=bench.starter())
        bench.found["rows"] += rows
        bench.found["ratios"] += compare
        bench.found["checks"].append(check)


def measure_memory(bench):
    """Each system runs alone, three times, each process started by itself; with --quick once, and forked."""
    how = dict(runs=1, starter=bench.starter()) if bench.quick else dict(runs=3)
    for workload in bench.memory_workloads:
        commands = bench.commands(workload, bench.inputs(workload))
        programs = {system: bench.program(system) for system in commands}
        planned = plan.of(workload, bench.tool, bench.scratch)["host_peak_bytes"]
        bench.found["memory"] += memory.measure(
            workload, commands, programs, bench.inputs(workload), bench.logs, bench.say, planned, **how)


def measure_collectives(bench):
    rounds, repetitions = (1, 5) if bench.quick else (5, 10)
    bench.found["collectives"], bench.found["collective_speeds"], bench.found["absent"] = collectives.measure(
        bench.programs, bench.torch_python, HERE / "peers", bench.logs, bench.say, rounds, repetitions, bench.starter())


def measure_overhead(bench):
    tiny = workloads.WORKLOADS[3]
    bench.found["overheads"] = overhead.measure(
        bench.programs, bench.program("fsdp_shm"), tiny, bench.inputs(tiny), bench.logs, bench.say, bench.quick)


def measure_setup(bench):
    bench.found["setup"], bench.found["setup_speeds"] = setup_speed.measure(
        bench.programs, bench.scratch, bench.logs, bench.say, *((4, 2) if bench.quick else (16, 5)))


MEASURE = {"steps": measure_steps, "memory": measure_memory, "collectives": measure_collectives,
           "overhead": measure_overhead, "setup": measure_setup}


PARTS = tuple(MEASURE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help=f"some of {','.join(PARTS)}; all is the default")
    parser.add_argument("--workloads", default="",
                        help="of steps and memory; all is the default, or with --quick those of two ranks")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "out")
    arguments = parser.parse_args()
    parts = [part for part in arguments.only.split(",") if part] if arguments.only is not None else PARTS
    unknown = set(parts) - set(PARTS)
    if unknown or not parts:
        parser.error(f"--only: one or more of {', '.join(PARTS)} are expected")
    arguments.workloads = [name for name in arguments.workloads.split(",") if name]
    try:
        workloads.chosen(arguments.workloads, arguments.quick)
    except ValueError as error:
        parser.error(f"--workloads: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes are ended on the way out
    bench = Bench(arguments)
    about = machine.about(bench.torch_python, HERE.parent, arguments.quick, parts, arguments.workloads)
    bench.say(f"{about['machine']}, commit {about['commit'][:12]}, torch {about['torch']}")
    try:
        for part in PARTS:
            if part in parts:
                began = time.monotonic()
                MEASURE[part](bench)
                about["seconds"][part] = round(time.monotonic() - began, 1)
    except ranks.Failed as failure:
        bench.say(f"FAILED: {failure}")
        return 1
    finally:
        bench.close()
    bench.say("seconds: " + ", ".join(f"{part} {taken}" for part, taken in about["seconds"].items()))
    for target in report.write(arguments.out, about, bench.found):
        bench.say(f"{'met   ' if target['met'] else 'MISSED'} {target['value']:8.3g} ({target['bound']}) {target['name']}")
    bench.say(f"written: {arguments.out}/summary.json, table.md, *.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
