"""Starts Python ranks by forking them from one process that has imported PyTorch: the harness's side of peers/forkserver.py."""

import ctypes
import json
import os
import pathlib
import signal
import socket
import subprocess
import time

from . import ranks

PROGRAM = pathlib.Path(__file__).resolve().parent.parent / "peers" / "forkserver.py"
PR_SET_CHILD_SUBREAPER = 36
# Importing PyTorch on a busy machine.
IMPORT_S = 120
# How often it is looked whether a process has ended.
LOOK_S = 0.005


class Forked:
    """A process of a fork server: as much of subprocess.Popen as ranks.System uses."""

    def __init__(self, pid, stdin, stdout):
        self.pid, self.stdin, self.stdout, self.returncode = pid, stdin, stdout, None

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        deadline = time.monotonic() + timeout if timeout is not None else None
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(LOOK_S)
        return self.returncode

    def _signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self._signal(signal.SIGTERM)

    def kill(self):
        self._signal(signal.SIGKILL)


class ForkServer:
    """A `python` that has imported `modules`, and starts its programs by forking. It is there when the constructor
    returns, and ends with `close`; processes that it has started stay. Raises ranks.Failed."""

    def __init__(self, python, modules, log):
        self.python, self.log = str(python), log
        if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise ranks.Failed("this process cannot become a subreaper")
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(IMPORT_S)
        command = [self.python, "-B", PROGRAM, theirs.fileno(), *modules]
        try:
            with theirs:
                self._process = ranks.start(command, log, pass_fds=(theirs.fileno(),))
        except OSError as error:
            self._socket.close()
            raise ranks.Failed(f"cannot start {python}: {error}") from error
        try:
            self._answer()
        except ranks.Failed:
            self.close()
            raise

    def _answer(self):
        try:
            answer, why = self._socket.recv(4096), "has ended"
        except OSError as error:
            answer, why = b"", f"does not answer: {error}"
        if not answer:
            said = self.log.read_text(errors="replace").strip().splitlines()[-4:]
            raise ranks.Failed("\n    ".join([f"{self.python} {PROGRAM.name} {why} (its messages: {self.log})", *said]))
        return json.loads(answer)

    def start(self, command, log, environment=None):
        """ranks.start, but that a Python program is forked: [python, "-B", PROGRAM, ARGUMENT...]."""
        command = [str(part) for part in command]
        if command[:2] != [self.python, "-B"]:
            return ranks.start(command, log, environment)
        request = json.dumps({"command": command[2:], "environment": environment or {}}).encode()
        input_theirs, input_ours = os.pipe()
        output_ours, output_theirs = os.pipe()
        with os.fdopen(input_ours, "wb", 0) as stdin, os.fdopen(output_ours, "rb", 0) as stdout:
            with open(log, "wb") as errors, os.fdopen(input_theirs, "rb", 0), os.fdopen(output_theirs, "wb", 0):
                socket.send_fds(self._socket, [request], [input_theirs, output_theirs, errors.fileno()])
            pid = self._answer()["pid"]
            return Forked(pid, os.fdopen(os.dup(stdin.fileno()), "wb", 0), os.fdopen(os.dup(stdout.fileno()), "rb", 0))

    def close(self):
        self._socket.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
