"""Ranks that do not fit together: each process ends by itself, with an error that says what is wrong and with whom.

Wrong world size, a rank number given twice (also rank 0), missing ranks, a job name in use, and two jobs at once.

usage: fault_rendezvous.py WORKER
"""

import os
import sys
import time

from fault_ranks import EXIT_OF_AN_ERROR, STATUS, Job, Traces, fail, free_port

WORLD = 4


def expect(rank, status, *texts):
    if rank.status != EXIT_OF_AN_ERROR:
        fail(f"rank {rank.number} ended with status {rank.status}: {rank.err.decode()}")
    code, message = rank.error()
    if code != status:
        fail(f"rank {rank.number} got status {code}, not {status}: {message}")
    for text in texts:
        if text not in message:
            fail(f"rank {rank.number}'s message does not contain {text!r}: {message}")


def expect_success(ranks):
    for rank in ranks:
        if rank.status != 0:
            fail(f"rank {rank.number} ended with status {rank.status}: {rank.err.decode()}")


def wrong_world_size(worker, port):
    with Job(worker, WORLD, port) as job:
        ranks = [job.start(r) for r in range(3)]
        odd = job.start(3, WORLD_SIZE="5", LOCAL_WORLD_SIZE="5")
        job.wait_for_end(ranks + [odd], 10)
        for rank in ranks + [odd]:
            expect(rank, STATUS["RENDEZVOUS"], "world size 4", "rank 3", "world size 5")


def rank_out_of_range(worker, port):
    with Job(worker, WORLD, port) as job:
        rank = job.start(4)
        job.wait_for_end([rank], 10)
        expect(rank, STATUS["INVALID_ARGUMENT"], "RANK=4", "WORLD_SIZE=4")


def number_twice(worker, port):
    with Job(worker, WORLD, port) as job:
        ranks = [job.start(r) for r in (0, 1, 2, 2)]
        job.wait_for_end(ranks, 10)
        twins = [f"pid {r.process.pid}" for r in ranks[2:]]
        for rank in ranks:
            expect(rank, STATUS["RENDEZVOUS"], "rank 2", *twins)


def rank_0_twice(worker, port):
    with Job(worker, WORLD, port) as job:
        ranks = [job.start(r) for r in (0, 0, 1)]
        job.wait_for_end(ranks, 10)
        twins = [f"pid {r.process.pid}" for r in ranks[:2]]
        for rank in ranks:
            expect(rank, STATUS["RENDEZVOUS"], "rank 0", *twins)


def missing(worker, port, present, text):
    with Job(worker, WORLD, port, {"FSDP_RENDEZVOUS_TIMEOUT_MS": "700"}) as job:
        start = time.monotonic()
        ranks = [job.start(r) for r in present]
        job.wait_for_end(ranks, 10)
        for rank in ranks:
            expect(rank, STATUS["RENDEZVOUS"], text, "700 ms" if 0 not in present else "ms")
            if rank.ended_at - start < 0.5:
                fail(f"rank {rank.number} gave up too early")


def late_rank(worker, port):
    """A rank that comes late, but in time, is waited for; so is rank 0."""
    for late in (0, 3):
        with Job(worker, WORLD, port) as job:
            ranks = [job.start(r, "--steps", 3, *(["--after", 700] if r == late else [])) for r in range(WORLD)]
            job.wait_for_end(ranks, 20)
            expect_success(ranks)


def name_in_use_while_gathering(worker, port):
    """A second job of the same name, while the first still waits for a rank: both are told, nobody waits in vain."""
    with Job(worker, 2, port) as job:
        first = job.start(0)
        job.wait_for_line(first, "at start")
        job.sleep(0.3)
        second = job.start(0)
        job.wait_for_end([first, second], 10)
        for rank in (first, second):
            expect(rank, STATUS["RENDEZVOUS"], f"pid {first.process.pid}", f"pid {second.process.pid}")


def name_in_use_while_training(worker, port):
    """The same while the first job trains: the first is not disturbed, and the second has no rank of it."""
    with Job(worker, 2, port) as job, Job(worker, 2, port) as other:
        ranks = [job.start(r) for r in range(2)]
        for rank in ranks:
            job.wait_for_line(rank, "at optimizer")
        second = [other.start(r, "--steps", 20) for r in range(2)]
        other.wait_for_end(second, 20)
        for rank in second:
            if rank.status != 0:
                expect(rank, STATUS["RENDEZVOUS"], "job")
        job.sleep(0.2)
        if any(r.ended_at is not None for r in ranks):
            fail(f"the first job was disturbed: {[r.err.decode() for r in ranks]}")


def other_job(worker, port):
    """Ranks of two jobs that each lack the rank which the other has: they do not complete each other."""
    with Job(worker, 2, port, {"FSDP_RENDEZVOUS_TIMEOUT_MS": "700"}) as job:
        ranks = [job.start(0, FSDP_JOB="one"), job.start(1, FSDP_JOB="two")]
        job.wait_for_end(ranks, 10)
        expect(ranks[0], STATUS["RENDEZVOUS"], "rank 1")
        expect(ranks[1], STATUS["RENDEZVOUS"], "rank 0")


def several_jobs_at_once(worker):
    with Job(worker, 2, free_port()) as one, Job(worker, 3, free_port()) as two:
        ones = [one.start(r, "--steps", 20) for r in range(2)]
        twos = [two.start(r, "--steps", 20) for r in (2, 1, 0)]
        one.wait_for_end(ones, 20)
        two.wait_for_end(twos, 20)
        expect_success(ones + twos)


def main():
    worker = os.path.abspath(sys.argv[1])
    traces, port = Traces(), free_port()
    cases = [
        ("wrong world size", lambda: wrong_world_size(worker, port)),
        ("rank out of range", lambda: rank_out_of_range(worker, port)),
        ("a number twice", lambda: number_twice(worker, port)),
        ("rank 0 twice", lambda: rank_0_twice(worker, port)),
        ("rank 3 missing", lambda: missing(worker, port, (0, 1, 2), "rank 3 ")),
        ("ranks 1 and 3 missing", lambda: missing(worker, port, (0, 2), "ranks 1, 3 ")),
        ("rank 0 missing", lambda: missing(worker, port, (1, 2), "rank 0 ")),
        ("all but rank 0 missing", lambda: missing(worker, port, (0,), "ranks 1, 2, 3 ")),
        ("late ranks", lambda: late_rank(worker, port)),
        ("name in use while gathering", lambda: name_in_use_while_gathering(worker, port)),
        ("name in use while training", lambda: name_in_use_while_training(worker, port)),
        ("another job's rank", lambda: other_job(worker, port)),
        ("several jobs at once", lambda: several_jobs_at_once(worker)),
    ]
    for name, case in cases:
        print(name, flush=True)
        case()
        traces.check(name)


main()
