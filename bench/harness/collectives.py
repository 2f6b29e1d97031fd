"""Rows of collectives: runs the programs of bench/collectives and bench/peers/collectives.py one after the other."""

import os
import shutil
import statistics

from . import ranks, ratios

WORLD_SIZE = 2
DEADLINE_S = 300


def rows_of(answers):
    """Rows with median times, of what every rank (or one for all) has printed."""
    for same in zip(*(answer["rows"] for answer in answers), strict=True):
        taken = ratios.slowest_rank([row["times"] for row in same])
        yield {"collective": same[0]["collective"], "bytes": same[0]["bytes"], "system": same[0]["system"],
               "world_size": WORLD_SIZE, "median_s": statistics.median(taken), "dtype": same[0]["dtype"],
               "min_s": min(taken), "repetitions": len(taken)}


def open_mpi(program):
    """(command that runs the program on Open MPI, "") or (None, why there is none)."""
    if not program.exists():
        return None, "no mpicc was found when the benchmark was built (Debian: libopenmpi-dev)"
    mpirun = shutil.which("mpirun")
    if not mpirun:
        return None, "mpirun was not found (Debian: openmpi-bin)"
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [mpirun, *as_root, "-n", str(WORLD_SIZE), program], ""


def measure(programs, torch_python, peers, logs, say, repetitions):
    """(rows, {system: why it has none})."""
    logs = logs / "collectives"
    logs.mkdir(parents=True, exist_ok=True)
    mpi, absent = open_mpi(programs / "fsdp_bench_mpi")
    commands = [
        ("shm", [programs / "fsdp_bench_shm"], WORLD_SIZE),
        ("plain", [programs / "fsdp_bench_plain"], 1),
        ("gloo", [torch_python, "-B", peers / "collectives.py"], WORLD_SIZE),
    ]
    if mpi:
        commands.append(("open_mpi", mpi, 1))
    else:
        say(f"no rows of open_mpi: {absent}")
    rows = []
    for name, command, processes in commands:
        with ranks.System(name, [*command, str(repetitions)], processes, logs) as system:
            for row in rows_of(system.answers(DEADLINE_S)):
                rows.append(row)
                say(f"{row['collective']:14} {row['dtype']:8} {row['bytes'] / 2**20:9.4f} MiB {row['system']:10} "
                    f"median {row['median_s'] * 1e6:10.1f} us")
    return rows, {"open_mpi": absent} if absent else {}
