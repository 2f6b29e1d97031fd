"""A rank of the GPU benchmark that computes nothing, for test_gpu.py. usage: fake_gpu_rank.py BEHAVIOUR [more, ignored]

good      steps of 8 ms, 4 of them the host's, with the losses 1, 1/2, 1/3, ...; memory as planned
fast      half of that
slow      twice that, and twice the memory
other     as good, with the third loss a little different
dies      ends with status 3 when asked for steps
no_host   answers without the host's time
"""

import json
import sys

behaviour = sys.argv[1]
factor = {"fast": 0.5, "slow": 2}.get(behaviour, 1)


def say(**answer):
    print(json.dumps(answer), flush=True)


done = 0
say(ready=True)
for line in sys.stdin:
    command, *count = line.split()
    if command == "steps":
        if behaviour == "dies":
            sys.exit(3)
        losses = []
        for _ in range(int(count[0])):
            done += 1
            losses.append(1 / done + (0.1 if behaviour == "other" and done == 3 else 0))
        answer = {"step_s": [0.008 * factor] * len(losses), "host_s": [0.004 * factor] * len(losses), "loss": losses}
        if behaviour == "no_host":
            del answer["host_s"]
        say(**answer)
    elif command == "reset":
        say(reset=True)
    elif command == "stats":
        memory = 2 if behaviour == "slow" else 1
        say(allocated_peak_bytes=5000 * memory, reserved_peak_bytes=6000, driver_used_bytes=7000,
            engine_peak_bytes=1000 * memory, plan_bytes=1000, overflows=0)
    elif command == "quit":
        break
