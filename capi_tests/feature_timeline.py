"""The timeline: one JSON file of all ranks, in which every rank has every unit's events, properly nested, as often as
the engine's counters say, and memory. usage: feature_timeline.py FSDP_TOOL TIMELINE_WORKER"""

import collections
import json
import os
import subprocess
import sys
import tempfile

TOOL, WORKER = sys.argv[1:]


def run(folder, mode, ranks, path):
    return subprocess.run(
        [TOOL, "run", "-n", str(ranks), WORKER, folder, mode],
        env={**os.environ, "FSDP_TIMELINE": path}, capture_output=True, text=True, timeout=120)


def require(condition, *what):
    if not condition:
        sys.exit("feature_timeline: " + " ".join(map(str, what)))


def check_nesting(events, what):
    """Events of one track are disjoint or inside one another. To the nanosecond, in integers."""
    spans = sorted((round(e["ts"] * 1000), -round((e["ts"] + e["dur"]) * 1000)) for e in events)
    open_ends = []
    for begin, end in spans:
        end = -end
        while open_ends and open_ends[-1] <= begin:
            open_ends.pop()
        require(not open_ends or end <= open_ends[-1], what, "events overlap at", begin)
        open_ends.append(end)


def check(folder, mode, ranks, path):
    events = json.load(open(path))["traceEvents"]
    require({e["pid"] for e in events} == set(range(ranks)), "ranks are", {e["pid"] for e in events})
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    require(names == {r: f"rank {r}" for r in range(ranks)}, "process names are", names)
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    require({e["ph"] for e in events} == {"M", "X", "C"}, "phases are", {e["ph"] for e in events})
    require({e["name"] for e in spans} >= {"unshard", "wait", "forward", "backward", "reduce"},
            "events are", {e["name"] for e in spans})
    by_track = collections.defaultdict(list)
    for e in spans:
        require(e["dur"] >= 0, "an event has the duration", e["dur"])
        require((e["pid"], e["tid"]) in tracks, "a track has no name:", e)
        by_track[e["pid"], e["tid"]].append(e)
    for (rank, tid), track in by_track.items():
        check_nesting(track, f"rank {rank}, track {tracks[rank, tid]}:")

    for rank in range(ranks):
        about = json.load(open(f"{folder}/{rank}.json"))
        require((about["rank"], about["world_size"]) == (rank, ranks), "describe says", about["rank"])
        count = collections.Counter((e["name"], e["args"].get("unit")) for e in spans if e["pid"] == rank)
        mine = [name for (r, _), name in tracks.items() if r == rank]
        for unit in about["units"]:
            name = unit["name"] or "(root)"
            require(f"unit {name}" in mine, "rank", rank, "has no track of unit", name)
            require(unit["state"] == "sharded", "unit", name, "is", unit["state"])
            if unit["unit_bytes"] == 0:
                continue
            got = (count["unshard", name], count["reduce", name])
            want = (unit["all_gathers"], unit["reduce_scatters"])
            require(got == want, f"{mode}: rank {rank}, unit {name}: {got} unshards and reductions, not {want}")
            used = unit["all_gathers"] > 0
            require(used or name in ("spare", "(root)"), "unit", name, "was never used")
            require((count["forward", name] > 0) == used, "rank", rank, "unit", name, "has no forward")
            reduced = unit["reduce_scatters"] > 0
            require((count["backward", name] > 0) >= reduced, "rank", rank, "unit", name, "has no backward")
        require(sum(u["all_gathers"] for u in about["units"]) == about["stats"]["all_gathers"], "counters differ")
        require(sum(u["reduce_scatters"] for u in about["units"]) == about["stats"]["reduce_scatters"],
                "counters differ")

        # The compute of a unit begins when it is unsharded: each forward or backward after an unshard of its unit.
        for e in (e for e in spans if e["pid"] == rank and e["name"] in ("forward", "backward")):
            require(any(u["pid"] == rank and u["name"] == "unshard" and u["args"]["unit"] == e["args"]["unit"]
                        and u["ts"] <= e["ts"] for u in spans), "compute before it was unsharded:", e)

        memory = [e["args"] for e in events if e["ph"] == "C" and e["pid"] == rank]
        require(memory, "rank", rank, "has no memory counters")
        require({m["parameter shards"] for m in memory} == {about["stats"]["param_shard_bytes"]}, memory[0])
        require({m["gradient shards"] for m in memory} == {about["stats"]["grad_shard_bytes"]}, memory[0])
        require(max(m["gradient slots"] for m in memory) > 0, "no gradient slot was ever used")
        most = max(m["units unsharded"] for m in memory)
        require(max(u["unit_bytes"] for u in about["units"]) <= most <= about["stats"]["unit_buffer_bytes"], most)
        require(memory[-1]["units unsharded"] == 0, "units stay unsharded at the end")


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/timeline.json"
        for ranks in (1, 2, 3, 4):
            for mode in ("hooks", "touch"):
                # What an earlier job left is replaced.
                open(path, "w").write("something else, which is longer than nothing" * 1000)
                done = run(folder, mode, ranks, path)
                require(done.returncode == 0, mode, ranks, done.stderr)
                check(folder, mode, ranks, path)
        # Without a proper end, the file is whole all the same, up to the last time that a rank wrote.
        done = run(folder, "leave", 2, path)
        require(done.returncode == 0, done.stderr)
        events = json.load(open(path))["traceEvents"]
        for rank in (0, 1):
            count = sum(e["ph"] == "X" and e["pid"] == rank for e in events)
            require(count > 1000, "rank", rank, "wrote", count, "events only")
        # A file that cannot be written is an error on every rank that names it.
        bad = folder + "/no/such/folder.json"
        done = run(folder, "touch", 2, bad)
        require(done.returncode != 0 and f'"{bad}"' in done.stderr and "FSDP_TIMELINE" in done.stderr, done.stderr)
        require(all(f"[rank {rank}]" in done.stderr for rank in (0, 1)), done.stderr)


main()
