import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PER_NODE = 2


def work(local, node, nodes):
    rank = node * PER_NODE + local
    dist.init_process_group("gloo", rank=rank, world_size=nodes * PER_NODE)
    value = torch.ones(1)
    dist.all_reduce(value)

    def save(signum, frame):
        open(os.path.join(os.environ["SM_MODEL_DIR"], f"saved-{rank}"), "w").close()
        sys.exit(0)

    signal.signal(signal.SIGTERM, save)
    print(f"rank {rank}: {value.item():.0f}", flush=True)
    if os.environ.get("FAIL_RANK") == str(rank):
        raise KeyError("texto")
    while os.environ.get("WAIT"):
        time.sleep(0.05)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    hosts = json.loads(os.environ["SM_HOSTS"])
    mp.spawn(work, nprocs=PER_NODE, args=(hosts.index(os.environ["SM_CURRENT_HOST"]), len(hosts)))
