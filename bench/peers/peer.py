"""One rank of a PyTorch system: the program that bench/harness starts, which speaks the protocol of harness/ranks.py.

usage: peer.py --system torch_fsdp1|torch_fsdp2|torch_ddp --workload gpt33m|tiny200 --batch B --tokens T --data DIR
       peer.py --load-only

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment. --load-only imports the same and computes next to
nothing: what the libraries alone take. --adamw chooses the optimizer's implementation.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch._dynamo  # optimizers import it when they are made: it is one of the libraries
import torch.distributed

import inputs
import sharding


def say(**answer):
    print(json.dumps(answer), flush=True)


class Trainer:
    def __init__(self, arguments):
        torch.distributed.init_process_group("gloo")
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        module, self.inputs = inputs.make(
            arguments.workload, arguments.data, self.rank, arguments.batch, arguments.tokens)
        shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        module.load_state_dict(inputs.full_state(arguments.data, shapes))
        self.model = sharding.SYSTEMS[arguments.system](module, self.world_size)
        chosen = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}[arguments.adamw]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **chosen)
        self.step_number = 0

    def step(self):
        batch = self.inputs.batch(self.step_number)
        self.step_number += 1
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.inputs.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        return time.perf_counter() - begin, value

    def steps(self, count):
        done = [self.step() for _ in range(count)]
        say(step_s=[seconds for seconds, _ in done], loss=[loss for _, loss in done])

    def stats(self):
        """Bytes of this rank's parameters, gradients and optimizer state."""
        local = lambda t: t.to_local() if hasattr(t, "to_local") else t
        held = {}
        for p in self.model.parameters():
            for t in (p, p.grad, *self.optimizer.state.get(p, {}).values()):
                if t is not None:
                    storage = local(t).untyped_storage()
                    held[storage.data_ptr()] = storage.nbytes()
        say(state_bytes=sum(held.values()))


def load_only():
    torch.ones(4).sum().item()
    say(ready=True)
    sys.stdin.read()


def serve(trainer):
    say(ready=True)
    for line in sys.stdin:
        command, *argument = line.split()
        if command == "quit":
            break
        {"steps": trainer.steps, "stats": trainer.stats}[command](*map(int, argument))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", choices=sorted(sharding.SYSTEMS))
    parser.add_argument("--workload", choices=("gpt33m", "tiny200"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--data")
    parser.add_argument("--adamw", choices=("default", "foreach", "fused"), default="fused")
    parser.add_argument("--load-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.load_only:
        return load_only()
    if not (arguments.system and arguments.workload and arguments.data):
        parser.error("--system, --workload and --data are needed")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    serve(Trainer(arguments))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
