"""PyTorch's torch.distributed.checkpoint reads our checkpoints through its HuggingFaceStorageReader: the ranks' own files,
optimizer state included, and the consolidated form; into plain tensors, and into DTensors over two processes.

usage: feature_checkpoint_dcp.py FSDP_TOOL WORKER BUILD_FOLDER

Runs itself under a Python with torch and safetensors: FSDP_TEST_TORCH_PYTHON, else BUILD_FOLDER/pytorch (`make
scenario-data`). Without one it is skipped (exit status 77).
"""

import os
import subprocess
import sys
import tempfile

SKIPPED = 77


def other_python(build):
    """A Python that has torch, or None."""
    candidates = [os.environ.get("FSDP_TEST_TORCH_PYTHON"), os.path.join(build, "pytorch", "bin", "python")]
    for python in filter(None, candidates):
        try:
            found = subprocess.run([python, "-c", "import torch, safetensors"], capture_output=True, timeout=120)
        except OSError:
            continue
        if found.returncode == 0:
            return python
    return None


def start(tool, worker, build):
    python = other_python(build)
    if python is None:
        print("skipped: no Python with torch and safetensors: FSDP_TEST_TORCH_PYTHON=python names one, or "
              "`make scenario-data` installs one")
        sys.exit(SKIPPED)
    with tempfile.TemporaryDirectory(prefix="fsdp-checkpoint-") as top:
        for world in (1, 2, 3, 4):
            folder = os.path.join(top, f"sharded{world}")
            subprocess.run([tool, "run", "-n", str(world), "--", worker, "save", folder], check=True, timeout=60)
        for size, name in (("5GB", "one"), ("400B", "many")):
            subprocess.run([tool, "checkpoint", "consolidate", "--max-shard-size", size, folder,
                            os.path.join(top, name)], check=True, stdout=subprocess.DEVNULL, timeout=60)
        command = [python, "-B", os.path.abspath(__file__), "--inside", top]
        sys.exit(subprocess.run(command, timeout=240).returncode)


def expected():
    import torch

    shapes = {"scale": (), "embed.weight": (13, 7), "block.weight": (5, 3, 4), "block.bias": (11,), "block.none": (0, 3)}
    step = 5
    whole = {}
    for p, (name, shape) in enumerate(shapes.items()):
        for key, number in ((name, p), (f"optimizer.exp_avg:{name}", p + 10)):
            count = 1
            for n in shape:
                count *= n
            index = torch.arange(count)
            whole[key] = ((step * 7919 + number * 104729 + index * 31) % 16777213).float().reshape(shape)
    whole["block.mask"] = ((step + torch.arange(6)) % 2).bool().reshape(2, 3)
    whole["block.half"] = torch.arange(0x3C00, 0x3C04, dtype=torch.int16).view(torch.float16)
    whole["count"] = torch.tensor(step)
    return whole


def load(folder, state, **how):
    import torch.distributed.checkpoint as dcp

    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(folder), **how)


def plain(top):
    import torch

    for name in ("sharded1", "sharded2", "sharded3", "sharded4", "one", "many"):
        want = expected()
        if not name.startswith("sharded"):
            want = {key: x for key, x in want.items() if not key.startswith("optimizer.")}
        got = {key: torch.zeros_like(x) for key, x in want.items()}
        load(os.path.join(top, name), got, no_dist=True)
        for key, x in want.items():
            assert torch.equal(got[key], x), f"{name}: {key} is {got[key]}, not {x}"
        print(f"{name}: {len(want)} tensors read by torch.distributed.checkpoint")


def sharded_over_two(rank, top, port):
    """DTensors cut along rows over two processes, as FSDP2 has them: other cuts than those of the files."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in ("sharded3", "sharded4", "many"):
        want = {key: x for key, x in expected().items() if key in ("embed.weight", "block.weight", "block.bias")}
        got = {key: distribute_tensor(torch.zeros_like(x), mesh, [Shard(0)]) for key, x in want.items()}
        load(os.path.join(top, name), got)
        for key, x in want.items():
            assert torch.equal(got[key].full_tensor(), x), f"{name}: {key}"
    dist.destroy_process_group()


def inside(top):
    import socket

    import torch.multiprocessing as mp

    plain(top)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(sharded_over_two, args=(top, port), nprocs=2)
    print("DTensors over two processes read sharded3, sharded4, many")


if __name__ == "__main__":
    if sys.argv[1] == "--inside":
        inside(sys.argv[2])
    else:
        start(*map(os.path.abspath, sys.argv[1:4]))
