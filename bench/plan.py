"""How long planning Llama-405B for 16,384 ranks takes, and how much of it is padding.

usage: plan.py FSDP_TOOL OUT.json: runs the tool 21 times as a user would, prints the median time of the whole process and the share of
padding, and writes both, with every time, to OUT.json. Exits with 1 if a bound is missed: 0.3 s, 1 %.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time

MODEL = pathlib.Path(__file__).parent.parent / "examples" / "plan" / "llama_405b.json"
RANKS, RUNS = 16384, 21
MOST_SECONDS, MOST_PADDING = 0.3, 0.01


def main(tool, out):
    command = [tool, "plan", "--json", "-n", str(RANKS), "--wrap", "LlamaDecoderLayer", str(MODEL)]
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        times.append(time.perf_counter() - start)
    plan = json.loads(text)
    padding = plan["padding_bytes"] / (4 * plan["numel"])
    result = {
        "model": MODEL.name, "numel": plan["numel"], "world_size": RANKS, "padding": padding,
        "median_s": statistics.median(times), "max_s": max(times), "times_s": times,
    }
    pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"planning {plan['numel']:,} parameters for {RANKS:,} ranks: median {result['median_s'] * 1e3:.1f} ms, "
          f"slowest {result['max_s'] * 1e3:.1f} ms of {RUNS}; {padding:.5%} padding")
    return result["median_s"] >= MOST_SECONDS or padding >= MOST_PADDING


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
