"""What a summary says about where, when and of what it was made."""

import datetime
import os
import platform
import subprocess


def _output(*command, cwd=None):
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _first_value(path, key):
    with open(path) as file:
        for line in file:
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


# What torch.__version__ is, without importing it.
TORCH_VERSION = """import importlib.util, os, runpy
folder, = importlib.util.find_spec("torch").submodule_search_locations
print(runpy.run_path(os.path.join(folder, "version.py"))["__version__"])"""


def about(torch_python, root, quick, parts, workloads=()):
    """A dict of texts and numbers; "" for what cannot be found out."""
    commit = _output("git", "rev-parse", "HEAD", cwd=root)
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", cwd=root)
    gigabytes = int(_first_value("/proc/meminfo", "MemTotal").split()[0]) / 1e6
    command = "make bench" + (" QUICK=1" if quick else "") + (f" ONLY={','.join(parts)}" if len(parts) < 5 else "")
    command += f" WORKLOADS={','.join(workloads)}" if workloads else ""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_first_value('/proc/cpuinfo', 'model name')}, {os.cpu_count()} processors, {gigabytes:.0f} GB, "
                   f"Linux {platform.release()}",
        "load_average_at_start": os.getloadavg()[0],
        "commit": commit + ("+changes" if changed else ""),
        "torch": _output(torch_python, "-c", TORCH_VERSION),
        "open_mpi": next(iter(_output("mpirun", "--version").splitlines()), ""),
        "compiler": next(iter(_output("c++", "--version").splitlines()), ""),
        "rust": _output("rustc", "--version"),
        "command": command,
        "quick": quick,
        "seconds": {},  # that each part took
    }
