"""The processes of one system: W ranks that speak the line protocol, each with a deadline, ended on every path.

A rank is a program that prints one JSON object a line and reads commands on its standard input:

    {"ready": true}       everything is loaded and sharded
    steps N               {"step_s": [N seconds], "loss": [N losses]}
    stats                 counters of the system, where it has them
    quit, or the end of the input
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import time

_libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


class Failed(Exception):
    """A system did not do what was asked of it. The text names it, the rank, and the file with what it said."""


def _die_with_parent():
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command, log, environment=None, **more):
    """Starts one process that dies with this one, pipes to its input and output, its errors in the file `log`. `more`
    goes to subprocess.Popen."""
    with open(log, "wb") as errors:
        return subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **(environment or {})},
            preexec_fn=_die_with_parent, **more)


class System:
    """`world_size` processes of `command`, each started by `starter`. Use as a context manager: leaving it ends them."""

    def __init__(self, name, command, world_size, logs, starter=start):
        self.name, self.processes, self.logs = name, [], []
        self._received = [b""] * world_size
        port = free_port()
        try:
            for rank in range(world_size):
                log = logs / f"{name}.{rank}.log"
                self.logs.append(log)
                self.processes.append(starter(command, log, {
                    "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": "lo"}))
        except (OSError, Failed) as error:
            self.kill()
            raise Failed(f"{name}: cannot start {command[0]}: {error}") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.quit()
        self.kill()

    def _fail(self, rank, what):
        said = self.logs[rank].read_text(errors="replace").strip().splitlines()[-8:]
        raise Failed("\n    ".join([f"{self.name}, rank {rank}: {what} (its messages: {self.logs[rank]})", *said]))

    def answers(self, seconds, idle=None):
        """One object from every rank, or Failed. Calls `idle` about every 20 ms while it waits, if given."""
        deadline = time.monotonic() + seconds
        answers = [None] * len(self.processes)
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                if b"\n" in self._received[rank]:
                    answers[rank] = self._line(rank)
                else:
                    selector.register(process.stdout, selectors.EVENT_READ, rank)
            while None in answers:
                if idle:
                    idle()
                for key, _ in selector.select(0.02 if idle else 1):
                    got = os.read(key.fileobj.fileno(), 1 << 16)
                    if not got:
                        self._fail(key.data, f"ended early, exit status {self.processes[key.data].wait()}")
                    self._received[key.data] += got
                    if b"\n" in self._received[key.data]:
                        answers[key.data] = self._line(key.data)
                        selector.unregister(key.fileobj)
                if time.monotonic() > deadline:
                    self._fail(answers.index(None), f"no answer within {seconds:.0f} s")
        return answers

    def _line(self, rank):
        line, _, self._received[rank] = self._received[rank].partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._fail(rank, f"printed {line[:200]!r}, which is no JSON object")
        return answer

    def tell(self, command):
        """Gives a command to every rank."""
        for rank, process in enumerate(self.processes):
            try:
                process.stdin.write(command.encode() + b"\n")
                process.stdin.flush()
            except OSError:
                self._fail(rank, f"is gone, exit status {process.poll()}")

    def ask(self, command, seconds, idle=None):
        """Gives a command to every rank and returns their answers."""
        self.tell(command)
        return self.answers(seconds, idle)

    def steps(self, count, seconds, idle=None):
        """(seconds, loss) of each of `count` steps: the means over the ranks."""
        self.tell(f"steps {count}")
        return self.taken(count, seconds, idle)

    def taken(self, count, seconds, idle=None):
        """What `steps` returns, of steps that all have been told to take."""
        answers = self.answers(seconds, idle)
        for rank, answer in enumerate(answers):
            if len(answer.get("step_s", [])) != count or len(answer.get("loss", [])) != count:
                self._fail(rank, f"answered {str(answer)[:200]} when asked for {count} steps")
        mean = lambda key: [sum(of_ranks) / len(answers) for of_ranks in zip(*(answer[key] for answer in answers), strict=True)]
        return mean("step_s"), mean("loss")

    def cpu_seconds(self):
        """Processor time that its processes have used so far."""
        ticks = 0
        for process in self.processes:
            with open(f"/proc/{process.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def quit(self, seconds=20):
        """Asks all to end and waits; one that ends with an error, or not at all, is Failed."""
        for process in self.processes:
            process.stdin.close()
        deadline = time.monotonic() + seconds
        for rank, process in enumerate(self.processes):
            try:
                status = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._fail(rank, f"has not ended {seconds} s after its input did")
            if status != 0:
                self._fail(rank, f"ended with exit status {status}")

    def kill(self):
        """Ends whatever is left. mpirun ends its ranks when it is asked to; who does not end soon is killed."""
        left = [process for process in self.processes if process.poll() is None]
        for process in left:
            process.terminate()
        deadline = time.monotonic() + 3
        for process in left:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for process in self.processes:
            process.stdout.close()
            with contextlib.suppress(OSError):
                process.stdin.close()
