"""Kills one of four training ranks with SIGKILL, 20 times, in every phase and at random moments.

Each survivor must notice within one second of the kill, by an error of a call of the library that names the killed rank,
and end by itself with a non-zero exit status; nothing of the job may be left. All repetitions use the same job name. Eight
more times with shard groups of two ranks: there the error may be that of a rank that has noticed before.

usage: fault_kill.py WORKER [SEED]
"""

import os
import random
import sys

from fault_ranks import EXIT_OF_AN_ERROR, STATUS, Job, Traces, fail, free_port

WORLD = 4
LIMIT = 1.0
# Where the victim is when it is killed; "moment": wherever it happens to be.
PLACES = ["moment"] * 8 + ["forward", "backward", "optimizer"] * 3 + ["rendezvous"] * 3


def check_group_survivor(rank, killed_at, what):
    seconds = rank.ended_at - killed_at
    if rank.status != EXIT_OF_AN_ERROR:
        fail(f"{what}: rank {rank.number} ended with status {rank.status}: {rank.err.decode()}")
    code, message = rank.error()
    if code not in (STATUS["PEER_DIED"], STATUS["ABORTED"], STATUS["MISMATCH"]):
        fail(f"{what}: rank {rank.number} got status {code}: {message}")
    if seconds > 2 * LIMIT:
        fail(f"{what}: rank {rank.number} needed {seconds:.2f} s to notice: {message}")
    return seconds


def check_survivor(rank, victim, killed_at, status, what):
    seconds = rank.ended_at - killed_at
    if rank.status != EXIT_OF_AN_ERROR:
        fail(f"{what}: rank {rank.number} ended with status {rank.status}: {rank.err.decode()}")
    code, message = rank.error()
    if code != status:
        fail(f"{what}: rank {rank.number} got status {code}, not {status}: {message}")
    if f"rank {victim.number} " not in message and f"rank {victim.number}:" not in message:
        fail(f"{what}: rank {rank.number}'s message does not name rank {victim.number}: {message}")
    if "died" not in message:
        fail(f"{what}: rank {rank.number}'s message does not say what happened: {message}")
    if seconds > LIMIT:
        fail(f"{what}: rank {rank.number} needed {seconds:.2f} s to notice: {message}")
    return seconds


def kill_in_training(worker, port, victim_number, place, pick, groups=0):
    with Job(worker, WORLD, port) as job:
        step = pick.randrange(1, 30)
        ranks = [job.start(r, "--groups", groups,
                           *(["--pause", place, step] if r == victim_number and place != "moment" else []))
                 for r in range(WORLD)]
        victim = ranks[victim_number]
        if place == "moment":
            for rank in ranks:
                job.wait_for_line(rank, "at optimizer")
            job.sleep(pick.uniform(0, 0.3))
        else:
            # Twice in the first step, when every rank says where it is.
            line = f"at {place}\n".encode()
            job.wait(lambda: victim.out.count(line) == 2, 30, f"rank {victim_number} in {place} of step {step}")
            job.sleep(pick.uniform(0, 0.2))
        for rank in ranks:
            Traces.check_memory_is_nameless(rank)
        killed_at = job.kill(victim)
        job.wait_for_end(ranks, 15)
        survivors = [r for r in ranks if r is not victim]
        if groups > 0:
            return max(check_group_survivor(r, killed_at, place) for r in survivors)
        return max(check_survivor(r, victim, killed_at, STATUS["PEER_DIED"], place) for r in survivors)


def kill_in_rendezvous(worker, port, victim_number, pick):
    """The victim dies while one rank has not appeared yet; that one appears a moment later."""
    with Job(worker, WORLD, port) as job:
        late_number = pick.choice([r for r in range(1, WORLD) if r != victim_number])
        ranks = [job.start(r) for r in range(WORLD) if r != late_number]
        victim = next(r for r in ranks if r.number == victim_number)
        for rank in ranks:
            job.wait_for_line(rank, "at start")
        job.sleep(0.3 + pick.uniform(0, 0.2))
        killed_at = job.kill(victim)
        survivors = [r for r in ranks if r is not victim]
        if victim_number != 0:
            # Rank 0 tells who comes late; without rank 0 nobody is there to tell it.
            survivors.append(job.start(late_number))
        job.wait_for_end(survivors + [victim], 15)
        return max(check_survivor(r, victim, killed_at, STATUS["RENDEZVOUS"], "rendezvous") for r in survivors)


def main():
    worker = os.path.abspath(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 20240229
    pick = random.Random(seed)
    places = PLACES[:]
    pick.shuffle(places)
    traces, port = Traces(), free_port()
    for number, place in enumerate(places):
        victim = pick.randrange(WORLD)
        if place == "rendezvous":
            slowest = kill_in_rendezvous(worker, port, victim, pick)
        else:
            slowest = kill_in_training(worker, port, victim, place, pick)
        what = f"{number + 1:2}/{len(places)} rank {victim} killed: {place}"
        traces.check(what)
        print(f"{what}: the last survivor ended after {slowest * 1000:.0f} ms", flush=True)
    for place in ["moment", "forward", "backward", "optimizer"] * 2:
        victim = pick.randrange(WORLD)
        slowest = kill_in_training(worker, port, victim, place, pick, groups=2)
        what = f"groups of two, rank {victim} killed: {place}"
        traces.check(what)
        print(f"{what}: the last survivor ended after {slowest * 1000:.0f} ms", flush=True)


main()
