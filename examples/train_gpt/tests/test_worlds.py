"""The same training at every world size, and the memory it takes."""

import os
import unittest

from trainer import TINY, Case

STEPS = ["--steps", "20", "--global-batch", "8"]


class Worlds(Case):
    def test_losses_agree_between_world_sizes_and_with_the_unsharded_model(self):
        whole = self.train(0, "whole", "--no-shard", *STEPS)
        self.assertEqual(len(whole), 20)
        self.assertLess(whole[-1]["loss"], whole[0]["loss"])
        for ranks in (1, 2, 4):
            sharded = self.train(ranks, f"w{ranks}", *STEPS)
            self.assert_close(whole, sharded)
            self.assert_close([m for m in whole if "val_loss" in m], [m for m in sharded if "val_loss" in m])

    def test_two_runs_are_bitwise_equal(self):
        for ranks in (2, 4):
            self.assert_same(self.train(ranks, f"a{ranks}", *STEPS), self.train(ranks, f"b{ranks}", *STEPS))

    def test_strategies(self):
        """The same losses, however parameters are spread."""
        full = self.train(4, "full", *STEPS)
        for name in ("shard-grad-op", "no-shard", "hybrid-shard"):
            more = ["--shard-size", "2"] if name == "hybrid-shard" else []
            self.assert_close(full, self.train(4, name, "--strategy", name, *more, *STEPS))
        self.refuse(2, "--out", self.path("odd"), "--strategy", "hybrid-shard", "--shard-size", "3", *STEPS,
                    words=["shard_size is 3"])

    def test_micro_batches(self):
        """Four backwards over a quarter of the batch each give what one over all of it gives."""
        whole = self.train(2, "whole", *STEPS)
        self.assert_close(whole, self.train(2, "parts", "--micro-batches", "4", *STEPS))
        self.refuse(2, "--out", self.path("odd"), "--micro-batches", "3", *STEPS, words=["--micro-batches"])

    def test_bfloat16(self):
        """Near what float32 gives, the same at every world size but for the order of sums; not the same numbers."""
        wide = self.train(2, "wide", *STEPS)
        narrow = self.train(2, "narrow", "--precision", "bfloat16", *STEPS)
        self.assert_close(wide, narrow, 2e-2)
        self.assertNotEqual([m["loss"] for m in wide], [m["loss"] for m in narrow])
        self.assert_same(narrow, self.train(2, "again", "--precision", "bfloat16", *STEPS))
        self.assert_close(narrow, self.train(4, "w4", "--precision", "bfloat16", *STEPS), 2e-2)
        self.refuse(0, "--out", self.path("whole"), "--no-shard", "--precision", "bfloat16", *STEPS, words=["--precision"])

    def test_cpu_offload(self):
        """On the CPU a second copy, and the same numbers; with every name of bfloat16, too."""
        self.assert_same(self.train(2, "whole", *STEPS), self.train(2, "apart", "--cpu-offload", *STEPS))
        narrow = ["--cpu-offload", *STEPS]
        self.assert_same(self.train(2, "a", "--precision", "bfloat16", *narrow), self.train(2, "b", "--dtype", "bf16", *narrow))

    def test_the_picture(self):
        """Drawn unless it is not wanted, or, with a warning, Python has no matplotlib."""
        picture = self.path("out", "loss.png")
        self.train(0, "out", "--no-shard", *STEPS)
        self.assertFalse(os.path.exists(picture))
        for ranks, more in ((0, ["--no-shard"]), (2, [])):
            code, output = self.run_trainer(ranks, "--out", self.path("out"), "--overwrite", "--picture", *more, *STEPS)
            self.assertEqual(code, 0, output)
            if "has no matplotlib" in output:
                continue
            with open(picture, "rb") as f:
                self.assertEqual(f.read(8), b"\x89PNG\r\n\x1a\n")

    def test_tied_head(self):
        whole = self.train(0, "whole", "--no-shard", "--tie-head", *STEPS)
        self.assert_close(whole, self.train(2, "w2", "--tie-head", *STEPS))


def units(d, layers, seq, vocabulary=256):
    """Elements of each parameter, unit by unit, in order of registration: the root, then the blocks."""
    block = [d, d, 3 * d * d, 3 * d, d * d, d, d, d, 4 * d * d, 4 * d, 4 * d * d, d]
    return [[vocabulary * d, seq * d, d, d, vocabulary * d]] + [block] * layers


def up(n, multiple):
    return -(-n // multiple) * multiple


def rank0_bytes(world):
    """Parameters + gradients + AdamW's two averages on rank 0, by the layout that ARCHITECTURE.md states: parameters
    on 64-byte lines, shards of a multiple of 16 bytes, a unit's gradient shard on a 64-byte line."""
    option = dict(zip(TINY, TINY[1:]))
    total = 0
    for params in units(int(option["--d-model"]), int(option["--layers"]), int(option["--seq"])):
        end, starts = 0, []
        for n in params:
            starts.append(up(end, 16))
            end = starts[-1] + n
        shard = up(-(-end // world), 4)
        pieces = sum(max(0, min(start + n, shard) - start) for start, n in zip(starts, params))
        total += 4 * shard + 4 * up(shard, 16) + 2 * 4 * pieces
    return total


class Memory(Case):
    def test_a_rank_holds_its_share(self):
        option = dict(zip(TINY, TINY[1:]))
        shape = units(int(option["--d-model"]), int(option["--layers"]), int(option["--seq"]))
        model = 16 * sum(sum(unit) for unit in shape)
        for ranks in (1, 2, 4):
            got = self.train(ranks, f"w{ranks}", "--steps", "3", "--global-batch", "4")[-1]["rank_state_bytes"]
            self.assertEqual(got, rank0_bytes(ranks))
            # 1/W of the model's; padding is at most a line a parameter and a line a unit, four times.
            padding = 4 * 64 * sum(len(unit) + 1 for unit in shape)
            self.assertLessEqual(abs(got - model / ranks), padding)


if __name__ == "__main__":
    unittest.main(verbosity=2)
