"""Writes what was found: summary.json, a table in Markdown, pictures."""

import json

from . import pictures, table, targets


def with_memory(rows, memory):
    """The rows of step times with host_peak_pss_bytes from the rows of memory, where there is one."""
    peaks = {(row["workload"], row["system"]): row["host_peak_pss_bytes"] for row in memory}
    return [{**row, "host_peak_pss_bytes": peaks.get((row["workload"], row["system"]))} for row in rows]


def write(folder, about, found):
    """Returns the targets."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = {**about, **found, "rows": with_memory(found["rows"], found["memory"]), "targets": targets.of(found)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "table.md").write_text(table.of(summary))
    pictures.write(folder, summary)
    return summary["targets"]
