import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--backend", default="gloo")
parser.add_argument("--model_dir", default=os.environ.get("SM_MODEL_DIR", "/tmp/model"))
args, _ = parser.parse_known_args()
dist.init_process_group(args.backend)
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = DDP(torch.nn.Linear(4, 1))
opt = torch.optim.SGD(model.parameters(), lr=0.01)
for epoch in range(args.epochs):
    for _ in range(5):
        x = torch.ones(8, 4) * (rank + 1)
        loss = (model(x) - 1).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"epoch {epoch} rank {rank}/{world} loss {loss.item():.6f}", flush=True)
if rank == 0:
    os.makedirs(args.model_dir, exist_ok=True)
    torch.save(model.module.state_dict(), os.path.join(args.model_dir, "pytorch_model.bin"))
dist.barrier()
dist.destroy_process_group()
