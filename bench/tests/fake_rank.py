"""A rank that computes nothing, for test_harness.py. usage: fake_rank.py BEHAVIOUR

good      speaks the protocol, and says what RANK is when asked for stats; steps of 1 ms with the losses 1, 1/2, 1/3, ...
other     as good, with the third loss a little different
nan       as good, with a third loss that is not a number
spins     as good, but waits for commands with a busy thread
dies      ends with status 3 when asked for steps, having said why
hangs     never answers
prattles  prints something that is no JSON
short     answers with one step less than it was asked for
stays     does not end when its input does
"""

import json
import os
import sys
import threading
import time

behaviour = sys.argv[1]


def say(**answer):
    print(json.dumps(answer), flush=True)


def spin():
    while True:
        pass


done = 0
if behaviour == "spins":
    threading.Thread(target=spin, daemon=True).start()
if behaviour == "hangs":
    time.sleep(600)
if behaviour == "prattles":
    print("hello", flush=True)
say(ready=True)
for line in sys.stdin:
    command, *count = line.split()
    if command == "steps":
        if behaviour == "dies":
            print("the reason", file=sys.stderr)
            sys.exit(3)
        losses = []
        for _ in range(int(count[0])):
            done += 1
            losses.append({"other": 0.334, "nan": float("nan")}.get(behaviour, 1 / 3) if done == 3 else 1 / done)
        if behaviour == "short":
            losses.pop()
        say(step_s=[0.001] * len(losses), loss=losses)
    elif command == "stats":
        say(rank=os.environ["RANK"])
if behaviour == "stays":
    time.sleep(600)
