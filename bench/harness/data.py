"""The inputs that every system reads: raw little-endian files, made with numpy from a fixed seed.

    params.f32   all parameters one after the other, in the order of registration
    tokens.i64   [64][8][batch * (tokens + 1)]: in step s rank r takes row [s % 64][r]
    inputs.f32   [64][8][8 * 16], for tiny200

Weights and embeddings of the GPT are normal with deviation 0.02; its tokens are drawn so that small numbers are frequent,
and the loss has something to fall to. Weights of tiny200 are orthogonal: through 200 layers of normal ones nothing would
arrive. Biases are 0, weights of norms 1.
"""

import numpy

from . import workloads

STEPS, RANKS = 64, 8
SEED = 20260101


def initial_values(model, shapes, random):
    """The values of each parameter, float32, in order."""
    for name, shape in shapes:
        if name.endswith(".bias"):
            yield numpy.zeros(shape, numpy.float32)
        elif len(shape) == 1:
            yield numpy.ones(shape, numpy.float32)
        elif model == "tiny200":
            q, r = numpy.linalg.qr(random.standard_normal(shape))
            yield (q * numpy.sign(numpy.diag(r))).astype(numpy.float32)
        else:
            yield random.standard_normal(shape, numpy.float32) * numpy.float32(0.02)


def write(folder, workload):
    """Makes the folder and writes the files of a workload into it."""
    folder.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(SEED)
    shapes = workloads.parameter_shapes(workload.model)
    with open(folder / "params.f32", "wb") as file:
        for values in initial_values(workload.model, shapes, random):
            values.astype("<f4").tofile(file)
    if workload.model == "tiny200":
        size = (STEPS, RANKS, workloads.TINY_BATCH * workloads.TINY_WIDTH)
        random.standard_normal(size, numpy.float32).astype("<f4").tofile(folder / "inputs.f32")
    else:
        drawn = random.random((STEPS, RANKS, workload.batch * (workload.tokens + 1))) ** 4
        (drawn * workloads.VOCABULARY).astype("<i8").tofile(folder / "tokens.i64")
    return folder
