"""What is measured: workloads, systems, and the models' parameters. Pure data.

The models are built three times, to the same numbers: here as shapes and initial values, in bench/peers with PyTorch, and
in bench/step with LibTorch.
"""

import dataclasses
import math

SYSTEMS = ("fsdp_shm", "fsdp_shm_fused", "torch_fsdp1", "torch_fsdp2", "torch_ddp", "bound")
OURS = ("fsdp_shm", "fsdp_shm_fused")
PEERS = ("torch_fsdp1", "torch_fsdp2", "torch_ddp")

# GPT of 33.7 million parameters.
D_MODEL, LAYERS, VOCABULARY, CONTEXT = 512, 8, 8192, 256
# 200 linear layers of 16 x 16.
TINY_LAYERS, TINY_WIDTH, TINY_BATCH = 200, 16, 8


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    model: str
    world_size: int
    batch: int
    tokens: int

    def arguments(self, data):
        """The command line that every system's program takes, with its inputs in the folder `data`."""
        return ["--workload", self.model, "--batch", str(self.batch), "--tokens", str(self.tokens), "--data", str(data)]


WORKLOADS = (
    Workload("gpt33m_2x128_w2", "gpt33m", 2, 2, 128),
    Workload("gpt33m_1x16_w2", "gpt33m", 2, 1, 16),
    Workload("gpt33m_1x64_w4", "gpt33m", 4, 1, 64),
    Workload("tiny200_w2", "tiny200", 2, TINY_BATCH, 1),
)


def chosen(names, quick):
    """The workloads of these names; where there are none, all, or in the short form those of two ranks (four ranks of six
    systems take long). Raises ValueError."""
    unknown = set(names) - {workload.name for workload in WORKLOADS}
    if unknown:
        raise ValueError(f"no such workload: {', '.join(sorted(unknown))} ({', '.join(w.name for w in WORKLOADS)} are expected)")
    return tuple(w for w in WORKLOADS if (w.name in names if names else w.world_size <= 2 or not quick))


def parameter_shapes(model):
    """(name, shape) of each parameter, in the order of registration."""
    if model == "tiny200":
        shapes = []
        for i in range(TINY_LAYERS):
            shapes += [(f"layers.{i}.weight", (TINY_WIDTH, TINY_WIDTH)), (f"layers.{i}.bias", (TINY_WIDTH,))]
        return shapes
    if model != "gpt33m":
        raise ValueError(f"no such model: {model}")
    d = D_MODEL
    shapes = [("tok.weight", (VOCABULARY, d)), ("pos.weight", (CONTEXT, d))]
    for i in range(LAYERS):
        for name, shape in (
            ("norm1.weight", (d,)), ("norm1.bias", (d,)),
            ("attn.qkv.weight", (3 * d, d)), ("attn.qkv.bias", (3 * d,)),
            ("attn.out.weight", (d, d)), ("attn.out.bias", (d,)),
            ("norm2.weight", (d,)), ("norm2.bias", (d,)),
            ("mlp.up.weight", (4 * d, d)), ("mlp.up.bias", (4 * d,)),
            ("mlp.down.weight", (d, 4 * d)), ("mlp.down.bias", (d,)),
        ):
            shapes.append((f"blocks.{i}.{name}", shape))
    return shapes + [("norm.weight", (d,)), ("norm.bias", (d,)), ("head.weight", (VOCABULARY, d))]


def parameter_count(model):
    return sum(math.prod(shape) for _, shape in parameter_shapes(model))
