"""What the fault drivers share: starting ranks by hand, watching how they end, and what they may have left behind.

Ranks are started directly, not by `fsdp run`, so that a rank ends by its own doing and not because a launcher ended it.
Every rank is killed, by its process id, when the driver leaves the job. Python 3 standard library only.
"""

import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time

PR_SET_CHILD_SUBREAPER = 36
EXIT_OF_AN_ERROR = 3
STATUS = {"INVALID_ARGUMENT": 1, "RENDEZVOUS": 7, "PEER_DIED": 8, "TIMEOUT": 9, "MISMATCH": 10, "ABORTED": 11}


def fail(message):
    print(f"FAILED: {message}", file=sys.stderr)
    sys.exit(1)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Rank:
    """One process, its output so far, and when it ended."""

    def __init__(self, number, process):
        self.number = number
        self.process = process
        self.out = b""
        self.err = b""
        self.ended_at = None

    @property
    def status(self):
        return self.process.returncode

    def error(self):
        """(status code, message) of the call that failed."""
        match = re.search(r"^error (\d+): (.*)$", self.err.decode(), re.MULTILINE)
        if match is None:
            fail(f"rank {self.number} (exit status {self.status}) reported no error: {self.err.decode()!r}")
        return int(match.group(1)), match.group(2)


class Job:
    """Ranks of one job. As a context manager: leaves no process behind, whatever happens."""

    def __init__(self, program, world, port, environment=None):
        self.program = program
        self.world = world
        self.folder = tempfile.TemporaryDirectory(prefix="fsdp-fault-")
        self.environment = dict(os.environ, WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TMPDIR=self.folder.name,
                                FSDP_RENDEZVOUS_TIMEOUT_MS="20000", FSDP_TIMEOUT_MS="20000")
        for launcher in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "FSDP_JOB"):
            self.environment.pop(launcher, None)
        self.environment.update(environment or {})
        self.ranks = []
        self.selector = selectors.DefaultSelector()

    def start(self, number, *arguments, **environment):
        environment = dict(self.environment, RANK=str(number), LOCAL_RANK=str(number), **environment)
        process = subprocess.Popen([self.program, *map(str, arguments)], env=environment, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder.name)
        rank = Rank(number, process)
        for name in ("stdout", "stderr"):
            pipe = getattr(process, name)
            os.set_blocking(pipe.fileno(), False)
            self.selector.register(pipe, selectors.EVENT_READ, (rank, name))
        # Readable when the process has ended: its end is seen at once, not at the next look.
        rank.pidfd = os.pidfd_open(process.pid)
        self.selector.register(rank.pidfd, selectors.EVENT_READ, (rank, "end"))
        self.ranks.append(rank)
        return rank

    def _step(self, seconds):
        for key, _ in self.selector.select(max(0.0, seconds)):
            rank, what = key.data
            if what == "end":
                rank.ended_at = time.monotonic()
                self.selector.unregister(rank.pidfd)
                os.close(rank.pidfd)
                rank.process.wait()
                continue
            data = key.fileobj.read()
            if what == "stdout":
                rank.out += data or b""
            else:
                rank.err += data or b""
            if data == b"":
                self.selector.unregister(key.fileobj)

    def wait(self, condition, seconds, what):
        """Runs until the condition holds; fails when it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                report = "\n".join(f"  rank {r.number}: exit status {r.process.poll()}, out {r.out!r}, err {r.err!r}"
                                   for r in self.ranks)
                fail(f"{what} did not happen within {seconds} s\n{report}")
            self._step(left)

    def wait_for_line(self, rank, line, seconds=30):
        wanted = line.encode() + b"\n"
        self.wait(lambda: wanted in rank.out or rank.ended_at is not None, seconds, f"{line!r} of rank {rank.number}")
        if wanted not in rank.out:
            fail(f"rank {rank.number} ended (status {rank.status}) before {line!r}: {rank.err.decode()}")

    def wait_for_end(self, ranks, seconds, what="the end of the ranks"):
        self.wait(lambda: all(r.ended_at is not None for r in ranks), seconds, what)
        # What they wrote last.
        open_pipes = lambda: any(k.data[0] in ranks for k in self.selector.get_map().values())
        self.wait(lambda: not open_pipes(), 10, "the end of the ranks' output")

    def sleep(self, seconds):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._step(deadline - time.monotonic())

    def kill(self, rank):
        """Returns when the signal was sent."""
        now = time.monotonic()
        rank.process.send_signal(signal.SIGKILL)
        return now

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.kill()
                rank.process.wait()
            rank.process.stdout.close()
            rank.process.stderr.close()
        self.selector.close()
        left = os.listdir(self.folder.name)
        self.folder.cleanup()
        if left and sys.exc_info()[0] is None:
            fail(f"the job left files in its TMPDIR: {left}")


class Traces:
    """What a job could leave behind: files in /dev/shm and /tmp, and processes."""

    def __init__(self):
        # Orphans of a job become children of this process instead of init's, so that they are seen.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.before = self.listing()

    @staticmethod
    def listing():
        # Other programs use these folders too; what is not named after this library or its ranks' driver is theirs.
        return {os.path.join(folder, name) for folder in ("/dev/shm", "/tmp") if os.path.isdir(folder)
                for name in os.listdir(folder) if "fsdp" in name.lower() and not name.startswith("fsdp-fault-")}

    @staticmethod
    def check_memory_is_nameless(rank):
        """While a rank runs: nothing it holds open or shares has a name in /dev/shm or /tmp."""
        folder = f"/proc/{rank.process.pid}"
        try:
            targets = [os.readlink(f"{folder}/fd/{fd}") for fd in os.listdir(f"{folder}/fd")]
            with open(f"{folder}/maps") as maps:
                shared = [line.split(None, 5)[5].strip() for line in maps if re.match(r"\S+ \S\S\Ss ", line)]
        except FileNotFoundError:
            return
        named = [t for t in targets if t.startswith(("/dev/shm/", "/tmp/"))]
        named += [s for s in shared if not s.startswith("/memfd:")]
        if named:
            fail(f"rank {rank.number} holds memory or files with names: {named}")

    def check(self, what):
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            fail(f"{what}: a child is left in the process table (pid {pid or 'still running'})")
        except ChildProcessError:
            pass
        new = self.listing() - self.before
        # Another job may be creating and removing such a file at this moment.
        deadline = time.monotonic() + 5
        while new and time.monotonic() < deadline:
            time.sleep(0.1)
            new &= self.listing()
        if new:
            fail(f"{what}: left behind: {sorted(new)}")
