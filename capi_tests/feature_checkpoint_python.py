"""Checkpoints as a Python user sees them, with the real `safetensors`: the ranks' files, the consolidated form, and a model
that Python has written; and `fsdp checkpoint` on all of them.

usage: feature_checkpoint_python.py FSDP_TOOL WORKER

Skipped (exit status 77) under a Python without numpy and safetensors; the one of `make test` has them.
"""

import json
import os
import subprocess
import sys
import tempfile

try:
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file
except ImportError as missing:
    print(f"skipped: {sys.executable}: {missing}; `pip install -r scripts/requirements/tools.txt` brings it")
    sys.exit(77)

SHAPES = {"scale": (), "embed.weight": (13, 7), "block.weight": (5, 3, 4), "block.bias": (11,), "block.none": (0, 3)}
NAMES = list(SHAPES)
STEP = 5


def values(name, state=False):
    """What checkpoint_model.h says."""
    index = np.arange(int(np.prod(SHAPES[name])), dtype=np.int64)
    p = NAMES.index(name) + (10 if state else 0)
    return ((STEP * 7919 + p * 104729 + index * 31) % 16777213).astype(np.float32).reshape(SHAPES[name])


BUFFERS = {
    "block.mask": ((STEP + np.arange(6)) % 2).astype(bool).reshape(2, 3),
    "block.half": np.arange(0x3C00, 0x3C04, dtype=np.uint16).view(np.float16),
    "count": np.array(STEP, dtype=np.int64),
}
WHOLE = {**{name: values(name) for name in NAMES}, **BUFFERS}
STATES = {f"optimizer.exp_avg:{name}": values(name, state=True) for name in NAMES}


def same(got, want, what):
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {got.shape}"
    assert np.array_equal(got, want), f"{what} has other values"


def run(*command, code=0):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout if code == 0 else done.stderr


def safetensors_in(folder):
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".safetensors"))


def put_together(folder):
    """All tensors, from the boxes of all files and the places that their headers give."""
    whole, filled = {}, {}
    for path in safetensors_in(folder):
        with safe_open(path, framework="numpy") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for key in file.keys():
                box = file.get_tensor(key)
                want = {**WHOLE, **STATES}[key]
                if key not in whole:
                    whole[key], filled[key] = np.zeros_like(want), np.zeros(want.shape, dtype=int)
                at = tuple(slice(o, o + n) for o, n in zip(places[key]["saved_offsets"], box.shape))
                whole[key][at] = box
                filled[key][at] += 1
    for key, times in filled.items():
        assert (times == 1).all(), f"{key}: elements are missing or there twice"
    return whole


def read_model(folder):
    """All tensors of a folder in Hugging Face's layout, by its index if it has one."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(index):
        assert os.listdir(folder) == ["model.safetensors"]
        with safe_open(os.path.join(folder, "model.safetensors"), framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            return {key: file.get_tensor(key) for key in file.keys()}
    with open(index) as text:
        weight_map = json.load(text)["weight_map"]
    count = len(set(weight_map.values()))
    names = {f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)}
    assert set(weight_map.values()) == names and set(os.listdir(folder)) == names | {os.path.basename(index)}
    whole = {}
    for key, name in weight_map.items():
        with safe_open(os.path.join(folder, name), framework="numpy") as file:
            whole[key] = file.get_tensor(key)
    return whole


def compare(got, want, what):
    assert set(got) == set(want), f"{what}: {sorted(set(got) ^ set(want))}"
    for key in want:
        same(got[key], want[key], f"{what}: {key}")


def main():
    tool, worker = map(os.path.abspath, sys.argv[1:3])
    ranks = lambda n, *args: run(tool, "run", "-n", n, "--", worker, *args)
    with tempfile.TemporaryDirectory(prefix="fsdp-checkpoint-") as top:
        path = lambda name: os.path.join(top, name)
        for world in (1, 2, 3, 4):
            folder = path(f"w{world}")
            ranks(world, "save", folder)
            compare(put_together(folder), {**WHOLE, **STATES}, f"the files of {world} ranks")
            for other in (1, 2, 3, 4):
                ranks(other, "load", folder)

        # What the tool says of it.
        about = json.loads(run(tool, "checkpoint", "inspect", "--json", "--verify", path("w3")))
        assert about["layout"] == "sharded" and about["world_size"] == 3 and about["metadata"] == {"note": "of a test"}
        assert about["verified_bytes"] == sum(x.nbytes for x in [*WHOLE.values(), *STATES.values()])
        for name, x in WHOLE.items():
            tensor = about["tensors"][name]
            assert tensor["shape"] == list(x.shape) and tensor["bytes"] == x.nbytes
            assert tensor["kind"] == ("buffer" if name in BUFFERS else "parameter")
            assert tensor["states"] == ([] if name in BUFFERS else ["exp_avg"])
        assert set(about["files"]) == {os.path.basename(p) for p in safetensors_in(path("w3"))}
        table = run(tool, "checkpoint", "inspect", "--verify", path("w3"))
        assert "embed.weight" in table and "[13, 7]" in table and "all checksums fit" in table

        # Consolidated: in one file, in several, rounded.
        run(tool, "checkpoint", "consolidate", path("w3"), path("one"))
        compare(read_model(path("one")), WHOLE, "one file")
        out = run(tool, "checkpoint", "consolidate", "--max-shard-size", "400B", path("w4"), path("many"))
        compare(read_model(path("many")), WHOLE, "several files")
        assert "8 tensors in 2 files" in out, out
        run(tool, "checkpoint", "consolidate", "--dtype", "float16", path("w2"), path("never"), code=1)
        assert not os.path.exists(path("never")) and not os.path.exists(path(".never.incomplete"))
        for form in ("one", "many"):
            for world in (1, 3):
                ranks(world, "model", path(form))
        assert json.loads(run(tool, "checkpoint", "inspect", "--json", path("many")))["layout"] == "huggingface"
        assert "exists already" in run(tool, "checkpoint", "consolidate", path("w1"), path("one"), code=1)
        run(tool, "checkpoint", "consolidate", "--max-shard-size", "5 apples", path("w1"), path("x"), code=2)

        # A model that Python wrote.
        os.mkdir(path("python"))
        names = [("model-00001-of-00002.safetensors", ["embed.weight", "count", "block.none"]),
                 ("model-00002-of-00002.safetensors", ["block.weight", "block.bias", "scale", "block.mask", "block.half"])]
        for name, keys in names:
            save_file({key: WHOLE[key] for key in keys}, os.path.join(path("python"), name), metadata={"format": "pt"})
        with open(os.path.join(path("python"), "model.safetensors.index.json"), "w") as index:
            json.dump({"metadata": {}, "weight_map": {key: name for name, keys in names for key in keys}}, index)
        for world in (1, 2, 4):
            ranks(world, "model", path("python"))

        # A flipped bit: the tool names file and tensor, and so does a rank that loads.
        victim = safetensors_in(path("w2"))[-1]
        with open(victim, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        for command in (["inspect", "--verify", path("w2")], ["inspect", "--verify", "--json", path("w2")]):
            message = run(tool, "checkpoint", *command, code=1)
            assert os.path.basename(victim) in message and "is damaged" in message and '"' in message, message
        done = subprocess.run([tool, "run", "-n", "2", "--", worker, "load", path("w2")], capture_output=True, text=True)
        assert done.returncode == 3 and "is damaged" in done.stderr and os.path.basename(victim) in done.stderr, done
        assert "no such checkpoint" in run(tool, "checkpoint", "inspect", path("nowhere"), code=1)
    print("safetensors reads what ranks save, ranks load what safetensors writes")


main()
