"""PyTorch's own data parallelism, on the CPU with gloo: how each system takes a model."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel


def fsdp1(model, world_size):
    # device_id is how FSDP1 is told to stay on the CPU; without it, it insists on an accelerator.
    return FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy(model.unit_classes()),
        device_id=torch.device("cpu"))


def fsdp2(model, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    for unit in model.units():
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp(model, world_size):
    return DistributedDataParallel(model)


SYSTEMS = {"torch_fsdp1": fsdp1, "torch_fsdp2": fsdp2, "torch_ddp": ddp}
