"""The GPU benchmark's own logic, and that it says why where there is no GPU. Measures nothing.

usage: test_gpu.py
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from harness import gpu, ranks

FAKE = [sys.executable, "-B", HERE / "fake_gpu_rank.py"]
WORKLOAD = gpu.Workload("fake_8x1024", "fake", 3, 8, 1024)


class Measuring(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.logs = pathlib.Path(folder.name)

    def measure(self, **behaviours):
        commands = {system: [*FAKE, behaviours.get(system, "good")] for system in gpu.SYSTEMS}
        return gpu.measure(WORKLOAD, commands, "cpu", self.logs, lambda line: None, rounds=2, steps=3)

    def test_rows_and_targets(self):
        rows, compare = self.measure(fsdp="fast")
        by = {row["system"]: row for row in rows}
        self.assertEqual(by["plain"]["median_step_s"], 0.008)
        self.assertEqual(by["fsdp"]["median_host_s"], 0.002)
        self.assertEqual(by["fsdp"]["plan_bytes"], 1000)
        self.assertAlmostEqual(gpu.host_per_unit(rows, "fake_8x1024", "torch_fsdp2"), 0)
        self.assertAlmostEqual(gpu.host_per_unit(rows, "fake_8x1024", "fsdp"), -0.002 / 4)
        self.assertEqual([r["median"] for r in compare], [0.5, 0.5])
        met = {target["name"]: target["met"] for target in gpu.targets(rows, compare)}
        self.assertEqual(len(met), 4)
        self.assertTrue(all(met.values()), met)
        rows, compare = self.measure(fsdp="slow")
        self.assertFalse(any(target["met"] for target in gpu.targets(rows, compare)))

    def test_systems_that_differ_or_fail(self):
        with self.assertRaisesRegex(ranks.Failed, "torch_fsdp2 does not compute what plain does: in step 2"):
            self.measure(torch_fsdp2="other")
        with self.assertRaisesRegex(ranks.Failed, "fsdp.*status 3"):
            self.measure(fsdp="dies")
        with self.assertRaisesRegex(ranks.Failed, "answered"):
            self.measure(plain="no_host")


class Skipping(unittest.TestCase):
    """Without a driver the targets of make say so and succeed."""

    def run_script(self, name, driver):
        return subprocess.run([ROOT / "scripts" / name], env={**os.environ, "FSDP_CUDA_LIBRARY": driver}, text=True,
                              capture_output=True, timeout=60)

    def test_no_driver(self):
        for name in ("gpu_bench.sh", "gpu_torch_test.sh"):
            done = self.run_script(name, "/nowhere/libcuda.so.1")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("skipped", done.stdout)
            self.assertIn("/nowhere/libcuda.so.1", done.stdout)


if __name__ == "__main__":
    unittest.main(verbosity=2)
