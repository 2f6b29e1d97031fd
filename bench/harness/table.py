"""The summary as compact Markdown tables, for a README."""

from . import workloads

TITLES = {"fsdp_shm": "fsdp, torch AdamW", "fsdp_shm_fused": "fsdp, its AdamW", "torch_fsdp1": "FSDP1",
          "torch_fsdp2": "FSDP2", "torch_ddp": "DDP", "bound": "bound"}


def _row(cells):
    return "| " + " | ".join(cells) + " |\n"


def _grid(head, lines):
    return _row(head) + _row(["---"] * len(head)) + "".join(map(_row, lines))


def _amount(seconds):
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def steps(rows):
    """Median step time of each system (columns) on each workload (rows), and how many times the bound's it is."""
    by = {(row["workload"], row["system"]): row["median_step_s"] for row in rows}
    names = [w.name for w in workloads.WORKLOADS if any(row["workload"] == w.name for row in rows)]
    lines = []
    for name in names:
        bound = by.get((name, "bound"))
        cells = [name]
        for system in workloads.SYSTEMS:
            seconds = by.get((name, system))
            if seconds is None:
                cells.append("")
            else:
                cells.append(_amount(seconds) + (f" ({seconds / bound:.2f})" if bound and system != "bound" else ""))
        lines.append(cells)
    return _grid(["step time (over the bound)", *(TITLES[s] for s in workloads.SYSTEMS)], lines)


def of(summary):
    text = (f"`{summary['command']}`, {summary['date']}, {summary['machine']}, torch {summary['torch']}, "
            f"commit {summary['commit'][:12]}\n")
    if summary["rows"]:
        text += "\n" + steps(summary["rows"])
    return text
