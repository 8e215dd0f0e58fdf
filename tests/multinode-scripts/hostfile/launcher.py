"""Starts this node's ranks from a hostfile of `name slots=N` lines, one process a slot."""

import os
import signal
import subprocess
import sys
import time

path = sys.argv[sys.argv.index("--hostfile") + 1]
command = sys.argv[sys.argv.index("--hostfile") + 2 :]
slots = {}
with open(path) as file:
    for line in file:
        name, count = line.split()
        slots[name] = int(count.split("=")[1])
names = list(slots)
node = names.index(os.environ["SM_CURRENT_HOST"])
first = sum(slots[name] for name in names[:node])
processes = []
for local in range(slots[names[node]]):
    environ = dict(
        os.environ,
        MASTER_ADDR=names[0],
        MASTER_PORT="29600",
        WORLD_SIZE=str(sum(slots.values())),
        RANK=str(first + local),
        LOCAL_RANK=str(local),
    )
    processes.append(subprocess.Popen([sys.executable, "-u", *command], env=environ))


def end(signum, frame):
    for process in processes:
        process.terminate()
    time.sleep(1)
    for process in processes:
        process.kill()
    sys.exit(1)


signal.signal(signal.SIGTERM, end)
code = 0
for process in processes:
    code = process.wait() or code
if not processes:
    sys.exit("no slots in the hostfile")
sys.exit(code)
