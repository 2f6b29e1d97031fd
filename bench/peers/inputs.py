"""The workloads' inputs from the files of bench/harness/data.py, and their losses."""

import os

import numpy
import torch
from torch.nn import functional

import models

STEPS, RANKS, TINY_BATCH = 64, 8, 8


def full_state(folder, shapes):
    """Initial values of all parameters by name; `shapes` has names and shapes in the order of registration."""
    values = torch.from_numpy(numpy.fromfile(os.path.join(folder, "params.f32"), "<f4"))
    state, begin = {}, 0
    for name, shape in shapes.items():
        state[name] = values[begin:begin + shape.numel()].view(shape)
        begin += shape.numel()
    if begin != values.numel():
        raise ValueError(f"params.f32 has {values.numel()} values, the model {begin}")
    return state


class GptInputs:
    def __init__(self, folder, rank, batch, tokens):
        ids = numpy.fromfile(os.path.join(folder, "tokens.i64"), "<i8").reshape(STEPS, RANKS, batch, tokens + 1)
        self.ids = torch.from_numpy(ids[:, rank].copy())

    def batch(self, step):
        ids = self.ids[step % STEPS]
        return ids[:, :-1].contiguous(), ids[:, 1:].flatten()

    def loss(self, model, batch):
        inputs, targets = batch
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets)


class TinyInputs:
    def __init__(self, folder, rank, batch, tokens):
        values = numpy.fromfile(os.path.join(folder, "inputs.f32"), "<f4")
        values = values.reshape(STEPS, RANKS, TINY_BATCH, models.TINY_WIDTH)
        self.values = torch.from_numpy(values[:, rank].copy())

    def batch(self, step):
        return self.values[step % STEPS].clone()

    def loss(self, model, batch):
        return model(batch).square().mean()


def make(workload, folder, rank, batch, tokens):
    """The model on this process and its inputs."""
    if workload == "gpt33m":
        return models.Gpt(), GptInputs(folder, rank, batch, tokens)
    if workload == "tiny200":
        return models.Tiny(), TinyInputs(folder, rank, batch, tokens)
    raise ValueError(f"no such workload: {workload}")
