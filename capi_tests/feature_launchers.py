"""The same program under other launchers than `fsdp run`: Open MPI's mpirun and torchrun, where they are installed, give
the losses that `fsdp run` gives. Exit status 77 (skipped, with the reason) where neither is.

usage: feature_launchers.py FSDP_TOOL C_MLP
"""

import os
import re
import shutil
import subprocess
import sys

TOOL, PROGRAM = sys.argv[1:3]
RANKS = 2
ARGUMENTS = ["--steps", "20", "--log-every", "1"]


def losses(launcher, environment=None):
    command = [*launcher, PROGRAM, *ARGUMENTS]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90,
                          env={**os.environ, **(environment or {})})
    if done.returncode != 0:
        sys.exit(f"FAILED: {command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    found = re.findall(r"^step +\d+ +loss \S+$", done.stdout, re.MULTILINE)
    if len(found) != 20:
        sys.exit(f"FAILED: {command} printed {len(found)} losses, not 20:\n{done.stdout}")
    return found


def works(command, word):
    """Whether the launcher is there, is the one meant, and starts at all (a torchrun without all of PyTorch does not)."""
    if shutil.which(command[0]) is None:
        return False
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)
    return done.returncode == 0 and word in done.stdout


# mpirun refuses to be run by root, as in a container, unless told twice; two ranks need no two free slots.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
LAUNCHERS = {
    "mpirun": (["mpirun", "--version"], "Open MPI", ["mpirun", "--oversubscribe", "-n", str(RANKS)], AS_ROOT),
    "torchrun": (["torchrun", "--help"], "nproc", ["torchrun", "--no-python", "--standalone", f"--nproc-per-node={RANKS}"], {}),
}

expected = losses([TOOL, "run", "-n", str(RANKS), "--no-prefix", "--"])
ran = 0
for name, (probe, word, launcher, environment) in LAUNCHERS.items():
    if not works(probe, word):
        print(f"skipped {name}: it is not installed, or does not start")
        continue
    if losses(launcher, environment) != expected:
        sys.exit(f"FAILED: under {name} the losses are others than under fsdp run")
    print(f"same losses under {name}")
    ran += 1
sys.exit(0 if ran else 77)
