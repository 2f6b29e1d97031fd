"""Instructions of the engine's hot paths, counted by valgrind's callgrind: per unit in forward and in backward, at world size 1,
they stay below a bound. Counts depend on the compiler and on the processor's vectors a little, on the machine's load not at
all; so this notices what a benchmark would notice late.

usage: feature_instructions.py HOOKS_PROGRAM THIRD_PARTY_ROOT: HOOKS_PROGRAM is bench/overhead/hooks.c, THIRD_PARTY_ROOT a folder
into which Debian's valgrind may have been unpacked. Skipped (exit status 77) where there is no valgrind.

A change that needs more instructions for a reason raises the bound here; one that saves many lowers it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile

SKIPPED = 77
UNITS, FEW, MANY = 40, 4, 14
# Function of hooks.c: what it does to a unit, and the most instructions that may take.
BOUNDS = {
    "forward": ("pre_forward and post_forward", 1300),
    "backward": ("pre_backward, two gradients of 272 elements in all, and post_backward", 4600),
}


def find_valgrind(root):
    """(program, environment), or None."""
    found = shutil.which("valgrind")
    if found:
        return found, {}
    unpacked = os.path.join(root, "usr", "bin", "valgrind")
    if os.access(unpacked, os.X_OK):
        return unpacked, {"VALGRIND_LIB": os.path.join(root, "usr", "libexec", "valgrind")}
    return None


def count(valgrind, program, function, iterations):
    """Instructions within the function, and whatever it calls, of a run of so many iterations."""
    tool, environment = valgrind
    with tempfile.TemporaryDirectory(prefix="fsdp-callgrind-") as folder:
        done = subprocess.run(
            [tool, "--tool=callgrind", f"--callgrind-out-file={folder}/out", f"--toggle-collect={function}", program,
             str(UNITS), str(iterations)],
            env={**os.environ, **environment}, capture_output=True, text=True, timeout=250)
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or not collected:
        sys.exit(f"feature_instructions: {program} under {tool} failed, status {done.returncode}:\n{done.stderr}")
    return int(collected[1])


def main(program, root):
    valgrind = find_valgrind(root)
    if valgrind is None:
        print("skipped: valgrind was not found (Debian: valgrind)")
        sys.exit(SKIPPED)
    failed = False
    for function, (what, most) in BOUNDS.items():
        few, many = (count(valgrind, program, function, iterations) for iterations in (FEW, MANY))
        per_unit = (many - few) / ((MANY - FEW) * UNITS)
        print(f"{what}: {per_unit:.0f} instructions per unit, at most {most}")
        # Nothing counted is no success: each hook alone is a hundred instructions and more.
        failed |= not 100 < per_unit <= most
    sys.exit("feature_instructions: out of bounds" if failed else 0)


main(*sys.argv[1:])
