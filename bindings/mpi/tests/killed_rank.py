"""A rank that is killed while it trains on MPI ends the job, soon and with an error: nobody waits for it.

usage: killed_rank.py MPIRUN PROGRAM [ARGUMENT...]
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

MPIRUN, *PROGRAM = sys.argv[1:]


def ranks_of(launcher):
    """The process ids of the launcher's descendants that run the program: MPICH has a process between."""
    found, parents = [], {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            name = os.readlink(stat.parent / "exe")
        except OSError:
            continue
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        if name == os.path.realpath(PROGRAM[0]):
            found.append(pid)

    def is_descendant(pid):
        return pid == launcher or pid in parents and is_descendant(parents[pid])

    return [pid for pid in found if is_descendant(pid)]


with subprocess.Popen([MPIRUN, "-n", "2", *PROGRAM], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                      stderr=subprocess.STDOUT, text=True) as job:
    try:
        for line in job.stdout:  # until it trains
            if line.startswith("step"):
                break
        ranks = ranks_of(job.pid)
        if len(ranks) != 2:
            sys.exit(f"FAILED: {len(ranks)} ranks were found, not 2")
        os.kill(ranks[1], signal.SIGKILL)
        job.communicate(timeout=60)
    finally:
        job.kill()
if job.returncode == 0:
    sys.exit("FAILED: the job ended well though a rank was killed")
deadline = time.monotonic() + 20
while any(os.path.exists(f"/proc/{rank}") for rank in ranks):
    if time.monotonic() > deadline:
        sys.exit("FAILED: a rank is still there")
    time.sleep(0.1)
print(f"the job ended with {job.returncode}")
