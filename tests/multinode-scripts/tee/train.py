import os
import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
value = torch.ones(1)
dist.all_reduce(value)
if dist.get_rank() == int(os.environ.get("FAIL_RANK", "-1")):
    raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
time.sleep(0.5)
dist.all_reduce(value)
print(f"rank {dist.get_rank()}: value {value.item():.0f}", flush=True)
