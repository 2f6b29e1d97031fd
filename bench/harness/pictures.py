"""The summary as pictures."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from . import table, workloads

COLORS = {"fsdp_shm": "#1f77b4", "fsdp_shm_fused": "#17becf", "torch_fsdp1": "#d62728", "torch_fsdp2": "#ff7f0e",
          "torch_ddp": "#9467bd", "bound": "#7f7f7f", "shm": "#1f77b4", "shm_host": "#17becf", "gloo": "#d62728",
          "open_mpi": "#ff7f0e", "plain_loop": "#7f7f7f", "memcpy": "#7f7f7f"}


def _save(figure, path, about):
    figure.text(0.01, 0.005, f"{about['date']}, {about['machine']}, torch {about['torch']}, {about['commit'][:12]}", fontsize=6)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(figure_rows, value, unit, title, path, about, extra=None):
    """A panel per workload, a bar per system; `extra(axes, rows)` adds to a panel."""
    names = table.names_of(figure_rows, "workload", [w.name for w in workloads.WORKLOADS])
    figure, panels = pyplot.subplots(1, len(names), figsize=(max(6.5, 3.4 * len(names)), 3.6), squeeze=False)
    for axes, name in zip(panels[0], names):
        rows = {row["system"]: row for row in figure_rows if row["workload"] == name}
        systems = [s for s in workloads.SYSTEMS if s in rows]
        values = [value(rows[s]) for s in systems]
        axes.bar(range(len(systems)), values, color=[COLORS[s] for s in systems])
        for i, v in enumerate(values):
            axes.text(i, v, f"{v:.1f}" if v < 100 else f"{v:.0f}", ha="center", va="bottom", fontsize=7)
        if extra:
            extra(axes, [rows[s] for s in systems])
        if max(values) > 20 * min(values) > 0:
            axes.set_yscale("log")
        axes.set_xticks(range(len(systems)), [table.TITLES[s] for s in systems], rotation=40, ha="right", fontsize=7)
        axes.set_title(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(unit)
    figure.suptitle(title, fontsize=10)
    _save(figure, path, about)


def steps(rows, path, about):
    def fastest(axes, rows):
        axes.plot(range(len(rows)), [row["min_step_s"] * 1e3 for row in rows], "k_", markersize=12)

    _bars(rows, lambda row: row["median_step_s"] * 1e3, "ms", "Median step time; the dash is the fastest step", path, about,
          fastest)


def memory(rows, path, about):
    def expected(axes, rows):
        for i, row in enumerate(rows):
            if "expected_bytes" in row:
                axes.plot([i - 0.4, i + 0.4], [row["expected_bytes"] / 1e6] * 2, "k--", linewidth=1)

    _bars(rows, lambda row: row["own_bytes"] / 1e6, "MB",
          "Peak memory of all ranks without libraries; dashed: plan and activations", path, about, expected)


def collectives(rows, path, about):
    figure, panels = pyplot.subplots(2, 2, figsize=(10, 8), sharex=True, sharey=True)
    for column, collective in enumerate(("all_gather", "reduce_scatter")):
        for line, dtype in enumerate(("float32", "bfloat16")):
            axes = panels[line][column]
            mine = [row for row in rows if row["collective"] == collective and row["dtype"] == dtype]
            for system in dict.fromkeys(row["system"] for row in mine):
                points = sorted((row["bytes"] / 2**20, row["median_s"] * 1e6) for row in mine if row["system"] == system)
                axes.loglog(*zip(*points), marker="o", markersize=3, color=COLORS[system], label=table.TITLES[system],
                            linestyle="--" if system in ("plain_loop", "memcpy") else "-")
            axes.set_title(f"{collective.replace('_', '-')}, {dtype}", fontsize=9)
            axes.grid(True, which="major", alpha=0.3)
            axes.legend(fontsize=7)
    for axes in panels[1]:
        axes.set_xlabel("MiB")
    for axes in panels[:, 0]:
        axes.set_ylabel("us, median")
    _save(figure, path, about)


def write(folder, summary):
    for key, name, picture in (("rows", "steps", steps), ("memory", "memory", memory),
                               ("collectives", "collectives", collectives)):
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if summary[key]:
            picture(summary[key], path, summary)
