import argparse
import os

import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int)
parser.add_argument("--local_rank", "--local-rank", type=int, default=-1)
args = parser.parse_args()
dist.init_process_group("gloo", init_method="env://")
value = torch.ones(1)
for _ in range(args.epochs):
    dist.all_reduce(value)
print(f"rank {dist.get_rank()}: value {value.item():.0f} gpus {os.environ['SM_NUM_GPUS']}", flush=True)
with open(os.path.join(os.environ["SM_MODEL_DIR"], f"rank-{dist.get_rank()}"), "w") as file:
    file.write("done")
dist.destroy_process_group()
