"""The benchmark's own logic: its arithmetic, and what it does with systems that misbehave. Measures nothing.

usage: test_harness.py
"""

import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from harness import collectives, forks, memory, overhead, plan, ranks, ratios, setup_speed, steps, table, targets, workloads

FAKE = [sys.executable, "-B", HERE / "fake_rank.py"]
FAKE_WORKLOAD = workloads.Workload("fake_w2", "fake", 2, 1, 1)


class Arithmetic(unittest.TestCase):
    def test_a_slow_round_cancels(self):
        ours, theirs = [[1, 1, 9], [10, 10, 10], [1, 1, 1]], [[2, 2, 2], [20, 20, 90], [2, 2, 2]]
        self.assertEqual(ratios.of_rounds(ours, theirs), {"median": 0.5, "low": 0.5, "high": 0.5})
        self.assertEqual(ratios.of_rounds(theirs, ours)["median"], 2)

    def test_spread_is_the_quartiles(self):
        self.assertEqual(ratios.spread([5, 1, 2, 3, 4]), {"median": 3, "low": 2, "high": 4})
        self.assertEqual(ratios.spread([7]), {"median": 7, "low": 7, "high": 7})

    def test_rounds_of_different_numbers_are_an_error(self):
        with self.assertRaises(ValueError):
            ratios.of_rounds([[1]], [[1], [1]])

    def test_losses_are_compared_by_step(self):
        self.assertIsNone(ratios.first_difference({"a": [1, 2], "b": [1.00001, 2]}, 1e-4))
        self.assertEqual(ratios.first_difference({"a": [1, 2], "b": [1, 2.001]}, 1e-4), ("b", 1, 2.001, "a", 2))
        self.assertEqual(ratios.first_difference({"a": [1, 2], "b": [math.nan, 2]}, 1e-4)[:2], ("b", 0))
        self.assertEqual(ratios.first_difference({"a": [math.inf]}, 1e-4)[:2], ("a", 0))

    def test_a_collective_takes_as_long_as_its_slowest_rank(self):
        answer = lambda *times: {"rows": [{"collective": "c", "dtype": "d", "bytes": 4, "system": "shm", "times": list(times)}]}
        rounds = [collectives.times_of([answer(1, 5), answer(2, 3)]), collectives.times_of([answer(9, 9), answer(1, 1)])]
        self.assertEqual(rounds[0], {("c", "d", 4, "shm"): [2, 5]})
        (row,) = collectives.rows_of(rounds)
        self.assertEqual((row["median_s"], row["min_s"], row["repetitions"]), (7, 2, 4))
        for times in rounds:
            times["c", "d", 4, "gloo"] = [10 * t for t in times["c", "d", 4, "shm"]]
        (speed,) = collectives.speeds_of(rounds)
        self.assertEqual((speed["over"], speed["median"]), ("gloo", 10))

    def test_overheads_are_per_unit_and_pass(self):
        self.assertAlmostEqual(overhead.per_unit_pass(1.0004, 1.0), 0.0004 / 400 * 1e9, places=3)

    def test_speeds_of_setting_up(self):
        rows = [{"setup": name, "bytes": 1000, "times": times} for name, times in (
            ("shard_from_meta", [2, 2, 2]), ("fill_and_copy", [1, 1, 1]), ("checkpoint_save", [1, 2, 4]),
            ("plain_write", [1, 1, 1]), ("checkpoint_load", [1, 1, 1]), ("plain_read", [3, 3, 3]))]
        _, speeds = setup_speed.rows_of([{"rows": rows}])
        self.assertEqual({s["setup"]: s["median"] for s in speeds},
                         {"shard_from_meta": 0.5, "checkpoint_save": 0.5, "checkpoint_load": 3})


class Models(unittest.TestCase):
    def test_parameters(self):
        self.assertEqual(workloads.parameter_count("gpt33m"), 33_739_776)
        self.assertEqual(workloads.parameter_count("tiny200"), 200 * (256 + 16))
        shapes = plan.description("gpt33m")["parameters"]
        self.assertEqual(list(shapes)[:4], ["tok.weight", "pos.weight", "blocks.0.norm1.weight", "blocks.0.norm1.bias"])

    def test_chosen(self):
        names = lambda *arguments: [workload.name for workload in workloads.chosen(*arguments)]
        self.assertEqual(names((), False), ["gpt33m_2x128_w2", "gpt33m_1x16_w2", "gpt33m_1x64_w4", "tiny200_w2"])
        self.assertEqual(names((), True), ["gpt33m_2x128_w2", "gpt33m_1x16_w2", "tiny200_w2"])
        self.assertEqual(names(("tiny200_w2", "gpt33m_1x64_w4"), True), ["gpt33m_1x64_w4", "tiny200_w2"])
        with self.assertRaisesRegex(ValueError, "no such workload: gpt4"):
            workloads.chosen(("gpt4", "tiny200_w2"), False)

    def test_inputs(self):
        try:
            from harness import data
        except ImportError as error:
            self.skipTest(str(error))
        with tempfile.TemporaryDirectory() as folder:
            tiny = data.write(pathlib.Path(folder) / "tiny", workloads.WORKLOADS[3])
            self.assertEqual((tiny / "params.f32").stat().st_size, 4 * workloads.parameter_count("tiny200"))
            self.assertEqual((tiny / "inputs.f32").stat().st_size, 4 * 64 * 8 * 128)
            gpt = data.write(pathlib.Path(folder) / "gpt", workloads.WORKLOADS[1])
            self.assertEqual((gpt / "params.f32").stat().st_size, 4 * workloads.parameter_count("gpt33m"))
            self.assertEqual((gpt / "tokens.i64").stat().st_size, 8 * 64 * 8 * 17)


class Reports(unittest.TestCase):
    ratios = [{"workload": "gpt33m_2x128_w2", "system": "fsdp_shm", "over": over, "median": median, "low": 0, "high": 9}
              for over, median in (("bound", 1.05), ("torch_fsdp1", 0.5), ("torch_fsdp2", 0.7), ("torch_ddp", 1.01))]

    def test_targets(self):
        met = {t["name"].rpartition(" ")[2]: t["met"] for t in targets.of_steps(self.ratios)}
        self.assertEqual(met, {"bound's": True, "torch_fsdp1": True, "torch_fsdp2": False, "torch_ddp": False})
        own = lambda system, size: {"workload": "gpt33m_1x16_w2", "system": system, "own_bytes": size, "expected_bytes": 100}
        met = [t["met"] for t in targets.of_memory([own("fsdp_shm", 106), own("torch_fsdp1", 200), own("torch_fsdp2", 150)])]
        self.assertEqual(met, [True, False, False])

    def test_an_all_gather_that_copies_misses(self):
        row = lambda system, size, median: {"system": system, "collective": "all_gather", "dtype": "float32", "bytes": size,
                                            "median_s": median}
        copied = [row("memcpy", 1 << 16, 1e-5), row("memcpy", 1 << 26, 1e-2)]
        for last, met in ((2e-5, True), (5e-3, False)):
            (found,) = targets.of_collectives([row("shm", 1 << 16, 1e-5), row("shm", 1 << 26, last), *copied], [])
            self.assertEqual(found["met"], met)

    def test_a_target_tells_its_bound(self):
        self.assertEqual(targets.target("x", 1, at_least=0.95, at_most=1.05)["bound"], ">= 0.95 and <= 1.05")
        self.assertFalse(targets.target("x", math.nan, at_most=1)["met"])

    def test_times_have_three_digits(self):
        self.assertEqual([table.seconds(t) for t in (1.2345, 0.1234, 0.012345, 12.3e-6, 0.9999e-3, 5e-7)],
                         ["1.23 s", "123 ms", "12.3 ms", "12.3 us", "1000 us", "0.5 us"])


class Memory(unittest.TestCase):
    def test_what_is_inherited_counts_as_ones_own(self):
        rollup = ["00400000-7fff0000 ---p 00000000 00:00 0    [rollup]\n", "Rss:   900 kB\n", "Pss:   500 kB\n",
                  "Pss_Anon:  100 kB\n", "Pss_File:  380 kB\n", "Pss_Shmem:  20 kB\n", "Anonymous:  300 kB\n"]
        self.assertEqual(memory.pss_of(rollup), 700 * 1024)


class Processes(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.logs = pathlib.Path(self.folder.name)
        (self.logs / "fake_w2").mkdir()

    def tearDown(self):
        self.folder.cleanup()

    def system(self, behaviour, starter=ranks.start):
        return ranks.System(behaviour, [*FAKE, behaviour], 2, self.logs, starter)

    def measure(self, **behaviours):
        said = []
        commands = {name: [*FAKE, behaviour] for name, behaviour in behaviours.items()}
        return steps.measure(FAKE_WORKLOAD, commands, self.logs, said.append, rounds=2, per_round=3)

    def failure(self, call, *words):
        """`call` fails with a message that has the words, and soon."""
        begin = time.monotonic()
        with self.assertRaises(ranks.Failed) as caught:
            call()
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertLess(time.monotonic() - begin, 30)

    def test_steps(self):
        with self.system("good") as system:
            system.answers(20)
            self.assertEqual(system.steps(2, 20), ([0.001, 0.001], [1, 0.5]))
            self.assertEqual(system.steps(1, 20)[1], [1 / 3])
            self.assertEqual([answer["rank"] for answer in system.ask("stats", 20)], ["0", "1"])
            pids = [p.pid for p in system.processes]
            self.assertGreater(memory.pss(pids[0]), 100_000)
        for process in system.processes:
            self.assertEqual(process.returncode, 0)

    def test_rows_and_ratios(self):
        rows, compare, check = self.measure(torch_ddp="good", fsdp_shm="good", bound="nan")
        self.assertEqual([row["steps"] for row in rows], [6, 6, 6])
        self.assertEqual({c["over"] for c in compare}, {"bound", "torch_ddp"})
        self.assertEqual(check["losses"], [1 / n for n in range(1, 8)])
        json.dumps([rows, compare, check])

    def test_other_losses_are_a_failure(self):
        self.failure(lambda: self.measure(torch_ddp="good", fsdp_shm="other"), "fsdp_shm", "torch_ddp", "step 2", "0.334")
        self.failure(lambda: self.measure(torch_ddp="good", fsdp_shm="nan"), "fsdp_shm", "step 2", "nan")

    def test_who_spins_out_of_turn_is_a_failure(self):
        def call():
            running = {}
            with self.system("good") as running["good"], self.system("spins") as running["spins"]:
                idle = steps.IdleCheck(running)
                with idle.turn("good"):
                    time.sleep(0.5)
                idle.finish(FAKE_WORKLOAD)

        self.failure(call, "spins", "not its turn")

    def test_death_and_its_reason(self):
        def call():
            with self.system("dies") as system:
                system.answers(20)
                system.steps(1, 20)

        self.failure(call, "dies, rank", "status 3", "the reason")

    def test_silence_ends_at_the_deadline(self):
        with self.assertRaises(ranks.Failed):
            with self.system("hangs") as system:
                system.answers(0.3)
        for process in system.processes:
            self.assertIsNotNone(process.returncode)

    def test_wrong_answers(self):
        self.failure(lambda: self.measure(torch_ddp="prattles"), "no JSON", "hello")
        self.failure(lambda: self.measure(torch_ddp="short"), "asked for 1 steps")

    def test_who_does_not_end_is_ended(self):
        def call():
            with self.system("stays") as system:
                system.answers(20)
                try:
                    system.quit(0.3)
                finally:
                    self.left = system.processes

        self.failure(call, "has not ended")
        self.assertTrue(all(process.returncode is not None for process in self.left))

    def server(self, *modules):
        server = forks.ForkServer(sys.executable, modules, self.logs / "forkserver.log")
        self.addCleanup(server.close)
        return server

    def test_forked_ranks(self):
        server = self.server("json")
        with self.system("good", server.start) as system:
            system.answers(20)
            self.assertEqual(system.steps(2, 20), ([0.001, 0.001], [1, 0.5]))
            self.assertEqual([answer["rank"] for answer in system.ask("stats", 20)], ["0", "1"])
            for process in system.processes:
                self.assertIsInstance(process, forks.Forked)
                self.assertGreater(memory.pss(process.pid), 100_000)
            self.assertGreaterEqual(system.cpu_seconds(), 0)
        self.assertEqual([process.returncode for process in system.processes], [0, 0])
        with ranks.System("sleep", ["/bin/sh", "-c", "echo '{}'; read line; exit 0"], 1, self.logs, server.start) as system:
            self.assertEqual(system.answers(20), [{}])
            self.assertIsInstance(system.processes[0], subprocess.Popen)

    def test_forked_ranks_that_misbehave(self):
        server = self.server()

        def dies():
            with self.system("dies", server.start) as system:
                system.answers(20)
                system.steps(1, 20)

        self.failure(dies, "dies, rank", "status 3", "the reason")
        for behaviour in ("stays", "hangs"):
            with self.assertRaises(ranks.Failed):
                with self.system(behaviour, server.start) as system:
                    system.answers(0.5)
                    system.quit(0.3)
            self.assertTrue(all(process.returncode is not None for process in system.processes))

        def no_program():
            with ranks.System("none", [sys.executable, "-B", self.logs / "none.py"], 1, self.logs, server.start) as system:
                system.answers(20)

        self.failure(no_program, "status 1", "none.py")

    def test_a_fork_server_that_is_not_there(self):
        log = self.logs / "forkserver.log"
        self.failure(lambda: forks.ForkServer(sys.executable, ["no_such_module"], log), "has ended", "no_such_module")
        self.failure(lambda: forks.ForkServer("/nonexistent/python", [], log), "cannot start /nonexistent/python")
        server = forks.ForkServer(sys.executable, [], log)
        server.close()
        self.failure(lambda: self.system("good", server.start), "good: cannot start")

    def test_forked_ranks_die_with_the_harness(self):
        program = (f"import os, pathlib, sys; sys.path.insert(0, {str(HERE.parent)!r})\n"
                   f"from harness import forks, ranks\nlogs = pathlib.Path({str(self.logs)!r})\n"
                   f"server = forks.ForkServer(sys.executable, (), logs / 'forkserver.log')\n"
                   f"command = [sys.executable, '-B', {str(HERE / 'fake_rank.py')!r}, 'stays']\n"
                   "system = ranks.System('stays', command, 2, logs, server.start)\n"
                   "print(*(process.pid for process in system.processes), flush=True)\nos._exit(0)\n")
        done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, timeout=60)
        pids = done.stdout.split()
        self.assertEqual(len(pids), 2, done.stderr)
        deadline = time.monotonic() + 20
        while any(pathlib.Path(f"/proc/{pid}/exe").exists() for pid in pids):
            self.assertLess(time.monotonic(), deadline, "ranks are left")
            time.sleep(0.05)

    def test_a_program_that_is_not_there(self):
        self.failure(lambda: ranks.System("none", ["/nonexistent/program"], 2, self.logs), "none", "/nonexistent/program")


if __name__ == "__main__":
    unittest.main()
