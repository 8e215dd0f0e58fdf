import os
import signal
import sys
import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
rank = dist.get_rank()
folder = os.environ["SM_MODEL_DIR"]


def save(signum, frame):
    print(f"rank {rank}: saving", flush=True)
    time.sleep(float(os.environ.get("SAVE_S", "45")))
    torch.save({"step": step}, os.path.join(folder, f"saved-{rank}.pt"))
    print(f"rank {rank}: saved", flush=True)
    sys.exit(0)


# Only the first rank of a node has anything to save; the others end at once.
if int(os.environ["LOCAL_RANK"]) == 0:
    signal.signal(signal.SIGTERM, save)
step = 0
print(f"rank {rank}: training", flush=True)
while True:
    step += 1
    time.sleep(0.05)
