"""Rows of collectives: runs the programs of bench/collectives and bench/peers/collectives.py in turns."""

import collections
import os
import shutil
import statistics

from . import ranks, ratios

WORLD_SIZE = 2
DEADLINE_S = 300
# What the engine's unit path is compared with.
OTHERS = ("gloo", "open_mpi", "plain_loop", "memcpy")


def times_of(answers):
    """{(collective, dtype, bytes, system): times} of what every rank (or one for all) has printed."""
    return {(same[0]["collective"], same[0]["dtype"], same[0]["bytes"], same[0]["system"]):
            ratios.slowest_rank([row["times"] for row in same])
            for same in zip(*(answer["rows"] for answer in answers), strict=True)}


def rows_of(rounds):
    """A row per collective, dtype, size and system, of all rounds together."""
    rows = []
    for collective, dtype, size, system in rounds[0]:
        taken = [t for times in rounds for t in times[collective, dtype, size, system]]
        rows.append({"collective": collective, "bytes": size, "system": system, "world_size": WORLD_SIZE,
                     "median_s": statistics.median(taken), "dtype": dtype, "min_s": min(taken), "repetitions": len(taken)})
    return rows


def speeds_of(rounds):
    """How many times as fast the engine is as each other system, by round."""
    speeds = []
    for collective, dtype, size, system in rounds[0]:
        if system in OTHERS:
            key = (collective, dtype, size)
            speeds.append({"collective": collective, "dtype": dtype, "bytes": size, "system": "shm", "over": system,
                           **ratios.of_rounds([times[*key, system] for times in rounds],
                                              [times[*key, "shm"] for times in rounds])})
    return speeds


def open_mpi(program):
    """(command that runs the program on Open MPI, "") or (None, why there is none)."""
    if not program.exists():
        return None, "it was not found when the benchmark was built (Debian: openmpi-bin and libopenmpi-dev)"
    mpirun = shutil.which("mpirun")
    if not mpirun:
        return None, "mpirun was not found (Debian: openmpi-bin)"
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [mpirun, *as_root, "-n", str(WORLD_SIZE), program], ""


def measure(programs, torch_python, peers, logs, say, rounds, repetitions, starter=ranks.start):
    """(rows, speeds, {system: why it has none})."""
    logs = logs / "collectives"
    logs.mkdir(parents=True, exist_ok=True)
    commands = [
        ("shm", [programs / "fsdp_bench_shm"], WORLD_SIZE),
        ("plain", [programs / "fsdp_bench_plain"], 1),
        ("gloo", [torch_python, "-B", peers / "collectives.py"], WORLD_SIZE),
    ]
    mpi, absent = open_mpi(programs / "fsdp_bench_mpi")
    if mpi:
        commands.append(("open_mpi", mpi, 1))
    else:
        say(f"no rows of open_mpi: {absent}")
    taken = [collections.OrderedDict() for _ in range(rounds)]
    for turn in range(rounds):
        for i in range(len(commands)):
            name, command, processes = commands[(i + turn) % len(commands)]
            with ranks.System(name, [*command, str(repetitions)], processes, logs, starter) as system:
                taken[turn].update(times_of(system.answers(DEADLINE_S)))
    rows = rows_of(taken)
    rows.sort(key=lambda row: (row["collective"], row["dtype"], row["bytes"]))
    for row in rows:
        say(f"{row['collective']:14} {row['dtype']:8} {row['bytes'] / 2**20:9.4f} MiB {row['system']:10} "
            f"median {row['median_s'] * 1e6:10.1f} us")
    return rows, speeds_of(taken), {"open_mpi": absent} if absent else {}
