"""Runs train_gpt for the tests: tiny models on a text made here, in a folder that is removed."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import tempfile
import unittest

TRAINER = os.environ["TRAIN_GPT"]
FSDP = os.environ["FSDP_TOOL"]
DEADLINE = 120

TINY = ["--d-model", "32", "--layers", "3", "--heads", "2", "--seq", "24", "--val-every", "5", "--val-batches", "1",
        "--warmup", "2", "--threads", "1", "--sample-tokens", "0", "--quiet", "--no-picture"]


def text(size, seed=3):
    """Words in random order: something a model can learn."""
    words = "the quick brown fox jumps over a lazy dog and runs home before it rains again".split()
    choice = random.Random(seed).choice
    out = ""
    while len(out) < size:
        out += choice(words) + " "
    return out[:size]


class Case(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="train_gpt_test_", dir=os.environ.get("TEST_DIR"))
        self.addCleanup(shutil.rmtree, self.dir)
        with open(self.path("text"), "w") as f:
            f.write(text(6000))

    def path(self, *names):
        return os.path.join(self.dir, *names)

    def command(self, ranks, *args):
        run = [FSDP, "run", "-n", str(ranks), "--grace", "5", "--"] if ranks else []
        return run + [TRAINER, *TINY, *map(str, args)]

    def run_trainer(self, ranks, *args, text_file="text"):
        """Exit code and output; `ranks` 0 starts it without the launcher."""
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        command = self.command(ranks, "--text", self.path(text_file), *args)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            self.fail(f"{' '.join(command)} hung; it had printed:\n{output}")
        return process.returncode, output

    def train(self, ranks, out, *args):
        """A run that must succeed; returns the lines of its metrics."""
        code, output = self.run_trainer(ranks, "--out", self.path(out), *args)
        self.assertEqual(code, 0, output)
        return self.metrics(out)

    def refuse(self, ranks, *args, words, text_file="text"):
        """A run that must fail with all of `words` in its output."""
        code, output = self.run_trainer(ranks, *args, text_file=text_file)
        self.assertNotEqual(code, 0, f"succeeded, with\n{output}")
        for word in words:
            self.assertIn(word, output)
        return output

    def metrics(self, out):
        with open(self.path(out, "metrics.jsonl")) as f:
            return [json.loads(line) for line in f]

    def assert_close(self, a, b, tolerance=1e-4):
        self.assertEqual(len(a), len(b))
        for x, y in zip(a, b):
            self.assertEqual(x["step"], y["step"])
            self.assertTrue(math.isclose(x["loss"], y["loss"], rel_tol=tolerance), (x, y))

    def assert_same(self, a, b):
        """Bit by bit: loss, validation loss and gradient norm (JSON carries doubles exactly)."""
        keys = ("step", "loss", "val_loss", "grad_norm", "lr")
        self.assertEqual([[m.get(k) for k in keys] for m in a], [[m.get(k) for k in keys] for m in b])
