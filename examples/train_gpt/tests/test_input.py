"""Bad input: a clear message, a non-zero exit, nothing written."""

import os
import subprocess
import unittest

from trainer import FSDP, TINY, TRAINER, Case


class Input(Case):
    def test_text(self):
        out = ["--out", self.path("out"), "--steps", "3"]
        open(self.path("empty"), "w").close()
        with open(self.path("short"), "w") as f:
            f.write("too short")
        for name, word in [("absent", "cannot open"), ("empty", "empty"), ("short", "too short")]:
            self.refuse(0, *out, text_file=name, words=["--text", word])
            self.refuse(2, *out, text_file=name, words=["--text", word])
        self.assertFalse(os.path.exists(self.path("out")))

    def test_options(self):
        out = ["--out", self.path("out")]
        self.refuse(0, *out, "--no-such-option", words=["--no-such-option"])
        self.refuse(0, *out, "--heads", "3", words=["--heads 3", "--d-model 32"])
        self.refuse(0, *out, "--steps", "-1", words=["--steps"])
        self.refuse(2, *out, "--steps", "3", "--global-batch", "3", words=["--global-batch 3", "world size 2"])
        self.assertFalse(os.path.exists(self.path("out")))

    def test_environment(self):
        args = [TRAINER, *TINY, "--text", self.path("text"), "--out", self.path("out"), "--steps", "3"]
        for variables, words in [
            ({"RANK": "0", "WORLD_SIZE": "two"}, ["WORLD_SIZE", "two"]),
            ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, ["RANK=2", "WORLD_SIZE=2"]),
            ({"WORLD_SIZE": "2"}, ["RANK"]),
        ]:
            environment = ["env"] + [f"{k}={v}" for k, v in variables.items()]
            clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
            done = subprocess.run(environment + args, env=clean, capture_output=True, text=True, timeout=60)
            self.assertNotEqual(done.returncode, 0)
            for word in words:
                self.assertIn(word, done.stderr)
        self.assertFalse(os.path.exists(self.path("out")))

    def test_device(self):
        out = ["--out", self.path("out"), "--steps", "3"]
        for device in ("tpu", "cuda:", "cuda:x", "cuda:12345"):
            self.refuse(0, *out, "--device", device, words=["--device", device])
        devices = subprocess.run([FSDP, "devices"], capture_output=True, text=True, timeout=60)
        if "driver was not found" in devices.stdout:
            for device in ("cuda", "cuda:1"):
                for whole in ([], ["--no-shard"]):
                    self.refuse(0, *out, "--device", device, *whole, words=["CUDA", "FSDP_CUDA_LIBRARY"])
            self.refuse(2, *out, "--device", "cuda", words=["CUDA", "FSDP_CUDA_LIBRARY"])
        self.refuse(0, *out, "--no-shard", "--cpu-offload", words=["--cpu-offload"])
        self.assertFalse(os.path.exists(self.path("out")))

    def test_no_shard_is_for_one_rank(self):
        self.refuse(2, "--out", self.path("out"), "--no-shard", "--steps", "3", words=["--no-shard"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
