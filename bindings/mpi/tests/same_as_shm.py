"""A trainer under mpirun on MPI's collectives gives the losses that it gives on shared memory: the same ones with two ranks, whose sums
have one order only, else equal up to TOLERANCE (relative).

usage: same_as_shm.py MPIRUN RANKS TOLERANCE -- PROGRAM [ARGUMENT...]
       an ARGUMENT OUT is replaced by a folder of the run's own, whose metrics.jsonl has the losses; without one stdout has them
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

MPIRUN, RANKS, TOLERANCE, separator, *PROGRAM = sys.argv[1:]
assert separator == "--", __doc__


def losses(comm):
    with tempfile.TemporaryDirectory() as folder:
        arguments = [folder + "/out" if a == "OUT" else a for a in PROGRAM]
        command = [MPIRUN, "-n", RANKS, *arguments, "--comm", comm]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=200)
        if done.returncode != 0:
            sys.exit(f"FAILED: {command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        if "OUT" in PROGRAM:
            lines = pathlib.Path(folder, "out", "metrics.jsonl").read_text().splitlines()
            return [json.loads(line)["loss"] for line in lines]
        return [float(text) for text in re.findall(r"^step +\d+ +loss (\S+)$", done.stdout, re.MULTILINE)]


mpi, shm = losses("mpi"), losses("env")
if len(mpi) < 5 or len(mpi) != len(shm):
    sys.exit(f"FAILED: {len(mpi)} losses on MPI, {len(shm)} on shared memory")
worst = max(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(mpi, shm))
if worst > float(TOLERANCE):
    sys.exit(f"FAILED: losses differ by up to {worst}, not {TOLERANCE}:\n{mpi}\n{shm}")
print(f"{len(mpi)} losses of {RANKS} ranks differ by at most {worst:.1e}")
