"""The summary as compact Markdown tables, for a README."""

from . import workloads

TITLES = {"fsdp_shm": "fsdp", "fsdp_shm_fused": "fsdp, its AdamW", "torch_fsdp1": "FSDP1", "torch_fsdp2": "FSDP2",
          "torch_ddp": "DDP", "bound": "bound", "shm": "fsdp", "shm_host": "fsdp, caller's memory", "gloo": "gloo",
          "open_mpi": "Open MPI", "plain_loop": "plain loop", "memcpy": "memcpy"}


def grid(head, lines):
    row = lambda cells: "| " + " | ".join(cells) + " |\n"
    return row(head) + row(["---"] * len(head)) + "".join(map(row, lines))


def seconds(value):
    """A time with three digits and its unit."""
    for unit, scale in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            break
    return f"{value / scale:.3g} {unit}" if value < 999.5 * scale else f"{value / scale:.0f} {unit}"


def names_of(rows, key, order):
    """Which of `order` occur, in that order."""
    have = {row[key] for row in rows}
    return [name for name in order if name in have]


def steps(rows):
    """Median step time of each system (columns) on each workload, and how many times the bound's it is."""
    by = {(row["workload"], row["system"]): row["median_step_s"] for row in rows}
    lines = []
    for name in names_of(rows, "workload", [w.name for w in workloads.WORKLOADS]):
        cells = [name]
        for system in workloads.SYSTEMS:
            value, bound = by[name, system], by[name, "bound"]
            cells.append(seconds(value) + (f" ({value / bound:.2f})" if system != "bound" else ""))
        lines.append(cells)
    return grid(["median step (over the bound)", *(TITLES[s] for s in workloads.SYSTEMS)], lines)


def memory(rows):
    """Peak PSS of each system without libraries, in MB."""
    by = {(row["workload"], row["system"]): row for row in rows}
    lines = []
    for name in names_of(rows, "workload", [w.name for w in workloads.WORKLOADS]):
        expected = "/".join(f"{by[name, s]['expected_bytes'] / 1e6:.0f}" for s in workloads.OURS)
        lines.append([name, *(f"{by[name, s]['own_bytes'] / 1e6:.0f}" for s in workloads.SYSTEMS), expected])
    return grid(["peak host memory, MB", *(TITLES[s] for s in workloads.SYSTEMS), "plan (torch AdamW/fused)"], lines)


def collectives(rows):
    """Median time of each system (columns) for each collective and size."""
    systems = names_of(rows, "system", ("shm", "shm_host", "gloo", "open_mpi", "plain_loop", "memcpy"))
    by = {(row["collective"], row["dtype"], row["bytes"], row["system"]): row["median_s"] for row in rows}
    lines = []
    for collective, dtype, size in sorted({key[:3] for key in by}, key=lambda key: (key[1] != "float32", key)):
        amount = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        cells = [f"{collective.replace('_', '-')}, {dtype}, {amount}"]
        cells += [seconds(by[collective, dtype, size, s]) if (collective, dtype, size, s) in by else "" for s in systems]
        lines.append(cells)
    return grid(["2 ranks, median", *(TITLES[s] for s in systems)], lines)


def overheads(rows):
    text = lambda row: f"{row['overhead']}{', ' + row['pass'] if 'pass' in row else ''}"
    return grid(["world size 1", "ns"], [[text(row), f"{row['ns']:.0f}"] for row in rows])


def setup(rows):
    return grid([f"{rows[0]['bytes'] >> 20} MiB, 2 ranks", "GB/s"], [[row["setup"], f"{row['gb_per_s']:.2f}"] for row in rows])


def targets(rows):
    return grid(["target", "bound", "value", ""],
                [[row["name"], row["bound"], f"{row['value']:.3g}", "met" if row["met"] else "**missed**"] for row in rows])


def of(summary):
    text = (f"`{summary['command']}`, {summary['date']}, {summary['machine']}, torch {summary['torch']}, "
            f"commit {summary['commit'][:12]}\n")
    parts = (("rows", steps), ("memory", memory), ("collectives", collectives), ("overheads", overheads), ("setup", setup),
             ("targets", targets))
    for key, part in parts:
        if summary[key]:
            text += "\n" + part(summary[key])
    for system, why in summary["absent"].items():
        text += f"\nNot measured: {TITLES[system]}: {why}\n"
    return text
