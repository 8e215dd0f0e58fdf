import os
import sys

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.ones(1) * (dist.get_rank() + 1)
dist.all_reduce(total)
with open("/tmp/pretrain_model/weights.txt") as file:
    weights = file.read().strip()
print(f"flags {sys.argv[1:]} sum {total.item():.0f} weights {weights}", flush=True)
if dist.get_rank() == 0:
    with open(os.path.join(os.environ["SM_MODEL_DIR"], "trained.txt"), "w") as file:
        file.write(weights)
dist.destroy_process_group()
