"""gloo's collectives through torch.distributed, one rank: the times of bench/collectives/rows.h, printed as it says.

usage: collectives.py REPETITIONS
"""

import json
import math
import sys
import time

import torch
import torch.distributed as dist

SIZES = (64 << 10, 1 << 20, 4 << 20, 12 << 20, 64 << 20)
WARM_UP = 2


def begin_together():
    """As in rows.h: waits for the next whole millisecond that is not too near."""
    begin = math.floor(time.perf_counter() * 1e3 + 0.3) / 1e3 + 1e-3
    while time.perf_counter() < begin:
        pass
    return time.perf_counter()


def times(count, collective):
    taken = []
    for _ in range(count + WARM_UP):
        dist.barrier()
        begin = begin_together()
        collective()
        taken.append(time.perf_counter() - begin)
    return taken[WARM_UP:]


def main(large):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rows = dist.get_world_size(), []
    for dtype in (torch.float32, torch.bfloat16):
        for size in SIZES:
            whole = torch.zeros(size // dtype.itemsize, dtype=dtype)
            part = torch.zeros(whole.numel() // world, dtype=dtype)
            count = 5 * large if size < 4 << 20 else large
            for name, collective in (("all_gather", lambda: dist.all_gather_into_tensor(whole, part)),
                                     ("reduce_scatter", lambda: dist.reduce_scatter_tensor(part, whole))):
                rows.append({"collective": name, "dtype": str(dtype).removeprefix("torch."), "bytes": size,
                             "system": "gloo", "times": times(count, collective)})
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps({"rows": rows}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
