"""`make gpu-bench`: an engine on a GPU beside PyTorch's FSDP2 and plain LibTorch, in one run on one machine.

usage: gpu.py --program FILE --torch-python PYTHON [--quick] [--device cuda|cpu] [--model NAME,...] [--out DIR]

FILE is fsdp_bench_gpu. Writes gpu.json and gpu.md to bench/out. Exits with 1 when something could not be measured, or a system
computes something else than the others; a missed target is printed and is no failure. `--device cpu --model tiny` runs the same
on the CPU, which says nothing about speed: it is how this is tested.
"""

import argparse
import json
import pathlib
import signal
import subprocess
import sys
import time

from harness import gpu, machine, ranks, table

HERE = pathlib.Path(__file__).resolve().parent
TINY = (gpu.Workload("gpt2_tiny_2x16", "tiny", 3, 2, 16),)


def gpu_name():
    """The GPU and its driver, as nvidia-smi says."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.returncode == 0 else ""


def steps_table(rows):
    """Times and memory of each system on each workload."""
    mb = lambda value: f"{value / 1e6:,.0f}"
    lines = []
    for row in rows:
        cells = [row["workload"], gpu.TITLES[row["system"]], table.seconds(row["median_step_s"]), table.seconds(row["median_host_s"])]
        host = gpu.host_per_unit(rows, row["workload"], row["system"])
        cells.append(f"{host * 1e6:.1f}" if row["system"] != "plain" else "")
        cells += [mb(row["allocated_peak_bytes"]), mb(row["driver_used_bytes"])]
        cells.append(f"{mb(row['engine_peak_bytes'])} / {mb(row['plan_bytes'])}" if row["system"] == "fsdp" else "")
        lines.append(cells)
    return table.grid(["workload", "system", "step", "host", "host per unit over plain, us", "peak of the allocator, MB",
                       "the GPU's, MB", "engine / plan, MB"], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=pathlib.Path, required=True)
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="124m,774m")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "out")
    arguments = parser.parse_args()
    wanted = arguments.model.split(",")
    chosen = [w for w in (*gpu.WORKLOADS, *TINY) if w.model in wanted]
    if not chosen:
        parser.error("--model: 124m, 774m or tiny is expected")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes are ended on the way out
    began = time.monotonic()
    say = lambda line: print(f"[{time.monotonic() - began:6.1f} s] {line}", flush=True)
    about = {**machine.about(arguments.torch_python, HERE.parent, arguments.quick, ()), "gpu": gpu_name(),
             "command": "make gpu-bench" + (" QUICK=1" if arguments.quick else "")}
    say(f"{about['gpu'] or arguments.device}, commit {about['commit'][:12]}, torch {about['torch']}")
    commands = {system: [arguments.program] for system in ("fsdp", "plain")}
    commands["torch_fsdp2"] = [arguments.torch_python, "-B", HERE / "peers" / "gpu_peer.py"]
    logs = arguments.out / "logs"
    rows, compare = [], []
    try:
        for workload in chosen:
            more = gpu.measure(workload, commands, arguments.device, logs, say,
                               rounds=1 if arguments.quick else 3, steps=10 if arguments.quick else 20)
            rows += more[0]
            compare += more[1]
    except ranks.Failed as failure:
        say(f"FAILED: {failure}")
        return 1
    targets = gpu.targets(rows, compare)
    (arguments.out / "gpu.json").write_text(
        json.dumps({**about, "rows": rows, "ratios": compare, "targets": targets}, indent=1) + "\n")
    (arguments.out / "gpu.md").write_text(
        f"`{about['command']}`, {about['date']}, {about['gpu']}, torch {about['torch']}, commit {about['commit'][:12]}\n\n"
        + steps_table(rows) + "\n" + table.targets(targets))
    for target in targets:
        say(f"{'met   ' if target['met'] else 'MISSED'} {target['value']:8.3g} ({target['bound']}) {target['name']}")
    say(f"written: {arguments.out}/gpu.json, gpu.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
