"""Training that stops and goes on: saved at one world size (in the background), resumed at others. At the same world size
the losses are the same bit for bit; at another, up to the order in which gradients are summed.

usage: feature_resume.py FSDP_TOOL WORKER
"""

import os
import re
import subprocess
import sys
import tempfile

FIRST_RESUMED = 5
# Losses are of order 1; float32 sums of 12 terms in other orders, over 8 steps of AdamW.
TOLERANCE = 1e-6


def losses(tool, world, worker, *args):
    command = [tool, "run", "-n", str(world), "--", worker, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        sys.exit(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return {int(s): float.fromhex(v) for s, v in re.findall(r"loss (\d+) (\S+)", done.stdout)}


def main():
    tool, worker = map(os.path.abspath, sys.argv[1:3])
    with tempfile.TemporaryDirectory(prefix="fsdp-resume-") as top:
        for saved in (4, 3):
            folder = os.path.join(top, f"saved{saved}")
            full = losses(tool, saved, worker, folder)
            assert list(full) == list(range(1, 9)) and full[8] < full[1], full
            rest = {s: v for s, v in full.items() if s >= FIRST_RESUMED}
            for world in (1, 2, 3, 4):
                resumed = losses(tool, world, worker, folder, "resume")
                assert list(resumed) == list(rest), resumed
                if world == saved:
                    assert resumed == rest, f"resumed at the same world size: {resumed}, not {rest}"
                worst = max(abs(resumed[s] - rest[s]) for s in rest)
                assert worst <= TOLERANCE, f"from {saved} to {world} ranks: losses differ by {worst}"
                print(f"saved on {saved} ranks, resumed on {world}: losses differ by at most {worst:.1e}")


main()
