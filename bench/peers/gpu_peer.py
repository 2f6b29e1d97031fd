"""PyTorch's FSDP2 on a GPU, in bfloat16 beside float32 masters: speaks the protocol of bench/gpu/main.cpp.

usage: gpu_peer.py --system torch_fsdp2 --model 124m|774m|tiny --batch B --tokens T [--device cuda|cpu]

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment.
"""

import argparse
import json
import sys
import time

import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gpt2


def say(**answer):
    print(json.dumps(answer), flush=True)


class Trainer:
    def __init__(self, arguments):
        self.arguments, self.device = arguments, torch.device(arguments.device)
        on_gpu = self.device.type == "cuda"
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        self.synchronize = torch.cuda.synchronize if on_gpu else lambda: None
        with torch.device("meta"):
            model = gpt2.Gpt2(arguments.model)
        mesh = init_device_mesh(self.device.type, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in model.blocks():
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self.model = fully_shard(model, mesh=mesh, mp_policy=policy)
        self.model.to_empty(device=self.device)
        self._set_values()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
        self.number = 0

    def _set_values(self):
        """One rank: its shards are the whole parameters."""
        local = {name: param.to_local() for name, param in self.model.named_parameters()}

        class Values:
            named_parameters = staticmethod(local.items)

        gpt2.initialize(Values, self.device)

    def step(self):
        batch = gpt2.tokens_of(self.model, self.number, self.arguments.batch, self.arguments.tokens, self.device)
        self.number += 1
        self.synchronize()
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = gpt2.loss_of(self.model, batch)
        loss.backward()
        self.optimizer.step()
        launched = time.perf_counter()
        value = loss.item()
        self.synchronize()
        return time.perf_counter() - begin, launched - begin, value

    def steps(self, count):
        done = [self.step() for _ in range(count)]
        say(step_s=[d[0] for d in done], host_s=[d[1] for d in done], loss=[d[2] for d in done])

    def stats(self):
        on_gpu = self.device.type == "cuda"
        free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
        say(allocated_peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
            reserved_peak_bytes=torch.cuda.max_memory_reserved() if on_gpu else 0, driver_used_bytes=total - free)

    def reset(self):
        self.synchronize()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        say(reset=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", choices=("torch_fsdp2",), required=True)
    parser.add_argument("--model", choices=sorted(gpt2.CONFIGS), required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--device", default="cuda")
    trainer = Trainer(parser.parse_args())
    say(ready=True)
    for line in sys.stdin:
        command, *argument = line.split()
        if command == "quit":
            break
        {"steps": trainer.steps, "stats": trainer.stats, "reset": trainer.reset}[command](*map(int, argument))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
