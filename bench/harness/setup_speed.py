"""Rows of set-up: sharding from nothing and checkpoints, as bytes per second and beside the plain thing in the same run."""

import statistics

from . import ranks, ratios

WORLD_SIZE = 2
DEADLINE_S = 400
PLAIN = {"shard_from_meta": "fill_and_copy", "checkpoint_save": "plain_write", "checkpoint_load": "plain_read"}


def rows_of(answers):
    """(rows, ratios of speeds: ours over the plain one's, by repetition) of what every rank has printed."""
    rows, taken = [], {}
    for same in zip(*(answer["rows"] for answer in answers), strict=True):
        name, size = same[0]["setup"], same[0]["bytes"]
        taken[name] = ratios.slowest_rank([row["times"] for row in same])
        seconds = statistics.median(taken[name])
        rows.append({"setup": name, "bytes": size, "world_size": WORLD_SIZE, "median_s": seconds,
                     "gb_per_s": size / seconds / 1e9, "repetitions": len(taken[name])})
    speeds = [{"setup": ours, "over": plain,
               **ratios.spread([p / o for o, p in zip(taken[ours], taken[plain], strict=True)])}
              for ours, plain in PLAIN.items()]
    return rows, speeds


def measure(programs, scratch, logs, say, units, repetitions):
    """On a model of so many units of 64 MiB."""
    logs, folder = logs / "setup", scratch / "setup"
    logs.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    command = [programs / "fsdp_bench_setup", folder, str(units), str(repetitions)]
    with ranks.System("setup", command, WORLD_SIZE, logs) as system:
        rows, speeds = rows_of(system.answers(DEADLINE_S))
    for row in rows:
        say(f"{row['setup']:16} {row['gb_per_s']:6.2f} GB/s")
    for ratio in speeds:
        say(f"{ratio['setup']:16} has {ratio['median']:.2f} of the speed of {ratio['over']}")
    return rows, speeds
