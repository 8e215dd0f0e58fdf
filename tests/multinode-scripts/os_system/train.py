import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.add_argument("--local-rank", "--local_rank", type=int, default=0)
args, _ = parser.parse_known_args()

dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
generator = torch.Generator().manual_seed(dist.get_rank())
for step in range(20):
    inputs = torch.randn(16, 8, generator=generator)
    loss = (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if os.environ.get("FAIL_RANK") == str(dist.get_rank()) and step == 10:
        raise ValueError("loss is nan at step 10")
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: loss={loss.item():.6f}", flush=True)
if dist.get_rank() == 0:
    torch.save(model.module.state_dict(), os.path.join(args.output_dir, "model.pt"))
dist.barrier()
dist.destroy_process_group()
