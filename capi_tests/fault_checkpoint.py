"""Kills ranks with SIGKILL while they save checkpoint after checkpoint, 100 times, at random moments.

After each kill the newest complete checkpoint must load, with the right contents, be no older than the last one that a
rank reported as saved, and what the kill left must not disturb the saves that follow. In some rounds one rank is killed
only: the other must end by itself, by an error. At the end the last checkpoint loads at other world sizes.

usage: fault_checkpoint.py WORKER [SEED]
"""

import os
import random
import re
import shutil
import sys
import tempfile

from fault_ranks import EXIT_OF_AN_ERROR, STATUS, Job, Traces, fail, free_port

WORLD = 2
ROUNDS = 100


def numbers(rank, word):
    return [int(n) for n in re.findall(rf"^{word} (\d+)$", rank.out.decode(), re.MULTILINE)]


def newest(folder):
    steps = [int(name[5:]) for name in os.listdir(folder) if re.fullmatch(r"step-\d+", name)]
    return max(steps, default=0)


def kill_round(worker, port, folder, pick, said):
    """`said`: the newest step that is known to be complete. Returns the same after this round."""
    with Job(worker, WORLD, port) as job:
        ranks = [job.start(r, "run", folder) for r in range(WORLD)]
        job.wait(lambda: b"loaded" in ranks[0].out or ranks[0].ended_at, 30, "loading the last complete checkpoint")
        if ranks[0].ended_at is not None:
            fail(f"rank 0 could not go on after a kill: {ranks[0].err.decode()}")
        (loaded,) = numbers(ranks[0], "loaded")
        if loaded < said:
            fail(f"step {said} was saved, but step {loaded} was loaded")
        job.sleep(pick.uniform(0, 0.06))
        victims = ranks[:]
        pick.shuffle(victims)
        alone = pick.random() < 0.25
        job.kill(victims[0])
        if not alone:
            job.sleep(pick.uniform(0, 0.003))
            job.kill(victims[1])
        job.wait_for_end(ranks, 30)
        survivor = victims[1]
        if alone:
            code, message = survivor.error()
            if survivor.status != EXIT_OF_AN_ERROR or code != STATUS["PEER_DIED"]:
                fail(f"the survivor ended with status {survivor.status}, error {code}: {message}")
        return max([loaded, *numbers(ranks[0], "saved")])


def check(worker, port, folder, world, step):
    with Job(worker, world, port) as job:
        ranks = [job.start(r, "check", folder) for r in range(world)]
        job.wait_for_end(ranks, 30)
        for rank in ranks:
            if rank.status != 0:
                fail(f"checking on {world} ranks: rank {rank.number}: {rank.err.decode()}")
        if numbers(ranks[0], "loaded") != [step]:
            fail(f"{world} ranks loaded {ranks[0].out!r}, not step {step}")


def main():
    worker = os.path.abspath(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 20240229
    pick = random.Random(seed)
    traces, port = Traces(), free_port()
    said = interrupted = 0
    with tempfile.TemporaryDirectory(prefix="fsdp-fault-") as folder:
        for number in range(ROUNDS):
            said = kill_round(worker, port, folder, pick, said)
            traces.check(f"round {number}")
            last = newest(folder)
            if last not in (said, said + 1):
                fail(f"round {number}: step {said} was reported last, step {last} is the newest")
            left = [name for name in os.listdir(folder) if name.endswith(".incomplete")]
            interrupted += bool(left)
            if any(int(re.fullmatch(r"\.step-(\d+)\.incomplete", name)[1]) <= last for name in left):
                fail(f"round {number}: {left} is left of steps up to {last}, which are complete")
            for name in os.listdir(folder):
                if re.fullmatch(r"step-\d+", name) and int(name[5:]) < last:
                    shutil.rmtree(os.path.join(folder, name))
        for world in (1, 2, 3):
            check(worker, port, folder, world, newest(folder))
    print(f"{ROUNDS} kills, {interrupted} of them left a save half done; the last complete step is {last}")
    if interrupted < ROUNDS // 5:
        fail("too few kills were in the middle of a save for this test to say anything")


main()
