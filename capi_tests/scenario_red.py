"""Shows that the scenario tests can fail: each program passes as it is, and fails by a check of its own when the switch
FSDP_TEST_BREAK breaks one property in the test host.

    scenario_red.py TOOL PROGRAM RANKS BREAK,BREAK,... [PROGRAM RANKS BREAK,... ...]

TOOL is the fsdp command, which starts the ranks (RANKS 0: the program is started by itself); PROGRAM may have arguments
after it. A crash, a hang, or a failure without a check's message (file:line: ...) does not count as failing.
Python 3 standard library only.
"""

import concurrent.futures
import os
import re
import shlex
import subprocess
import sys

SECONDS = 60
CHECK = re.compile(r"[\w./-]+\.(?:c|h|cpp|hpp):\d+: .*")


def run(tool, program, ranks, broken):
    """(exit status, or None for a hang; output)"""
    command = shlex.split(program)
    if ranks > 0:
        command = [tool, "run", "-n", str(ranks), "--", *command]
    environment = dict(os.environ)
    environment.pop("FSDP_TEST_BREAK", None)
    if broken:
        environment["FSDP_TEST_BREAK"] = broken
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        output, _ = process.communicate(timeout=SECONDS)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.terminate()
        return None, process.communicate()[0]


def judge(broken, status, output):
    """(whether all is as it must be, what happened)"""
    said = CHECK.search(output)
    said = said.group(0) if said else ""
    if status is None:
        return False, f"did not end within {SECONDS} s"
    if status < 0 or status > 125:
        return False, f"crashed (exit status {status})"
    if not broken:
        return status == 0, said or f"exit status {status}"
    if status == 0:
        return False, "passed"
    return bool(said), said or f"failed without a check's message (exit status {status})"


def main():
    arguments = sys.argv[2:]
    if len(sys.argv) < 5 or len(arguments) % 3 != 0:
        raise SystemExit(__doc__)
    cases = [(program, int(ranks), broken)
             for program, ranks, breaks in zip(arguments[::3], arguments[1::3], arguments[2::3])
             for broken in [None, *breaks.split(",")]]
    failures = 0
    # Two at a time: most of what one takes is one process that loads libraries.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda case: run(sys.argv[1], *case), cases)
        for (program, _, broken), (status, output) in zip(cases, results):
            good, what = judge(broken, status, output)
            print(f"{'ok' if good else 'FAILED':7}{os.path.basename(program)} {broken or '(unbroken)'}: {what}")
            if not good:
                failures += 1
                print("    " + output.replace("\n", "\n    "))
    print(f"{len(cases) - failures} of {len(cases)} as they must be")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
