"""The example examples/c_mlp as a user starts it: it learns, gives the same losses on 1, 2 and 4 ranks and from run to
run, and says what is wrong with a bad command line.

usage: feature_c_mlp.py FSDP_TOOL C_MLP
"""

import re
import subprocess
import sys

TOOL, PROGRAM = sys.argv[1:3]


def run(ranks, *arguments, status=0):
    command = [TOOL, "run", "-n", str(ranks), "--no-prefix", "--", PROGRAM] if ranks else [PROGRAM]
    done = subprocess.run([*command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if (done.returncode == 0) != (status == 0) or (ranks == 0 and done.returncode != status):
        sys.exit(f"FAILED: {arguments} on {ranks} ranks ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout, done.stderr


def losses(ranks, *arguments):
    output = run(ranks, *arguments)[0]
    values = [float(text) for text in re.findall(r"^step +\d+ +loss (\S+)$", output, re.MULTILINE)]
    if len(values) < 2:
        sys.exit(f"FAILED: {ranks} ranks printed too few losses:\n{output}")
    return values, output


def check(condition, message):
    if not condition:
        sys.exit(f"FAILED: {message}")


for optimizer in ("adam", "sgd"):
    arguments = ["--steps", "60", "--log-every", "1", "--hidden", "33", "--optimizer", optimizer]
    alone, _ = losses(0, *arguments)
    first, last = sum(alone[:5]) / 5, sum(alone[-5:]) / 5
    check(last < 0.9 * first, f"{optimizer}: the loss does not fall: {first} to {last}")
    for ranks in (1, 2, 4):
        values, output = losses(ranks, *arguments)
        check(output == losses(ranks, *arguments)[1], f"{optimizer} on {ranks} ranks differs from run to run")
        # Printed with six decimals: that much is lost on top of the relative difference allowed.
        pairs = list(zip(values, alone, strict=True))
        worst = max(abs(a - b) - 1e-4 * abs(b) for a, b in pairs)
        check(worst < 2e-6, f"{optimizer} on {ranks} ranks differs from one process: {pairs}")

usage, _ = run(0, "--help")
for option in ("--steps", "--batch", "--hidden", "--layers", "--lr", "--optimizer", "--seed", "--log-every", "--comm"):
    check(option in usage, f"--help does not mention {option}")
for bad in (["--steps", "0"], ["--steps", "ten"], ["--steps"], ["--lr", "-1"], ["--optimizer", "magic"], ["--what", "1"],
            ["extra"]):
    _, errors = run(0, *bad, status=2)
    check(bad[0] in errors or bad[-1] in errors, f"{bad}: the message does not name it: {errors!r}")
_, errors = run(2, "--batch", "3", status=2)
check("--batch 3" in errors and "2 ranks" in errors, f"--batch 3: {errors!r}")
