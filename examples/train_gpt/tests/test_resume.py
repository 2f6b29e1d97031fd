"""Checkpoints: going on as if nothing had happened, and refusing what cannot be gone on with."""

import os
import shutil
import unittest

from trainer import Case

STEPS = ["--steps", "12", "--global-batch", "12", "--save-every", "4"]


class Resume(Case):
    def files(self, folder):
        return {os.path.join(d, f): os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(folder) for f in fs}

    def interrupted(self, ranks, out):
        """A run whose last checkpoints are gone: it can go on from step 4."""
        full = self.train(ranks, out, *STEPS)
        for step in (8, 12):
            shutil.rmtree(self.path(out, "checkpoints", f"step-{step:06d}"))
        return full

    def test_resuming_at_the_same_world_size_is_bitwise(self):
        full = self.interrupted(2, "out")
        resumed = self.train(2, "out", *STEPS, "--resume")
        self.assert_same(full, resumed)

    def test_resuming_at_other_world_sizes(self):
        full = self.interrupted(4, "out")
        for ranks in (1, 2, 3):
            shutil.copytree(self.path("out"), self.path(f"out{ranks}"))
            self.assert_close(full, self.train(ranks, f"out{ranks}", *STEPS, "--resume"))

    def test_the_engines_optimizer(self):
        """As LibTorch's; resumes bitwise; a checkpoint of the other one is refused."""
        fused = ["--optimizer", "fused"]
        full = self.train(2, "out", *STEPS, *fused)
        self.assert_close(full, self.train(2, "torch", *STEPS))
        self.assert_close(full, self.train(3, "out3", *STEPS, *fused))
        for step in (8, 12):
            shutil.rmtree(self.path("out", "checkpoints", f"step-{step:06d}"))
        self.refuse(2, "--out", self.path("out"), *STEPS, "--resume", words=["without an optimizer"])
        self.assert_same(full, self.train(2, "out", *STEPS, *fused, "--resume"))
        self.refuse(0, "--out", self.path("whole"), *STEPS, *fused, "--no-shard", words=["--optimizer fused"])

    def test_resuming_unsharded(self):
        full = self.train(0, "out", "--no-shard", *STEPS)
        shutil.rmtree(self.path("out", "checkpoints", "step-000012"))
        self.assert_same(full, self.train(0, "out", "--no-shard", *STEPS, "--resume"))

    def test_what_cannot_be_resumed_is_refused_and_nothing_is_overwritten(self):
        self.train(2, "out", *STEPS)
        last = self.path("out", "checkpoints", "step-000012")
        before = self.files(self.path("out"))
        out = ["--out", self.path("out")]
        self.refuse(2, *out, *STEPS, words=["holds an earlier run", "--resume", "--overwrite"])
        self.refuse(2, *out, "--steps", "20", "--global-batch", "12", "--resume", "--layers", "2",
                    words=["layers", "3", "2"])
        self.assertEqual(self.files(self.path("out")), before)
        shard = os.path.join(last, "shard-00002-of-00002.safetensors")
        with open(shard, "r+b") as f:
            f.truncate(os.path.getsize(shard) // 2)
        before = self.files(self.path("out"))
        again = [*out, "--steps", "20", "--global-batch", "12", "--resume"]
        self.refuse(2, *again, words=["shard-00002-of-00002.safetensors", "bytes"])
        self.assertEqual(self.files(self.path("out")), before)
        os.remove(os.path.join(last, "manifest.json"))
        self.refuse(2, *out, *STEPS, "--resume", last, words=["manifest.json"])
        self.refuse(2, *out, *STEPS, "--resume", self.path("nothing"), words=["nothing"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
