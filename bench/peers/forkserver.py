"""Starts Python programs by forking, so that what all of them import (PyTorch: seconds each) is imported once.

usage: forkserver.py FD MODULE...

Imports the modules, says {} on the socket FD, whose other end is harness/forks.py, and answers requests there:

    {"command": [PROGRAM, ARGUMENT...], "environment": {...}} with three descriptors
                          a process that runs PROGRAM with these as its standard files; {"pid": its id}

Such a process is the child of who started this one (which must be a subreaper), and dies with it. Ends when the socket does.
"""

import ctypes
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback

PR_SET_PDEATHSIG = 1
LONGEST = 1 << 16


def run(command):
    """Runs a program as `python PROGRAM ARGUMENT...` would, and ends the process."""
    status = 0
    try:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start(server, request, files):
    """Forks twice: who is in between ends, and the process becomes the starter's child."""
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return
    between = os.getpid()
    child = os.fork()
    if child:
        server.send(json.dumps({"pid": child}).encode())
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.001)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    server.close()
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    os.environ.update(request["environment"])
    run(request["command"])


def main():
    server = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    server.send(b"{}")
    while True:
        message, files, _, _ = socket.recv_fds(server, LONGEST, 3)
        if not message:
            return
        start(server, json.loads(message), files)
        for file in files:
            os.close(file)


if __name__ == "__main__":
    main()
