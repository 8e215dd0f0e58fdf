import argparse
import json
import os

import torch
import torch.distributed as dist


def train(args):
    is_distributed = len(args.hosts) > 1 and args.backend is not None
    use_cuda = args.num_gpus > 0
    device = torch.device("cuda" if use_cuda else "cpu")
    rank = 0
    if is_distributed:
        world_size = len(args.hosts)
        os.environ["WORLD_SIZE"] = str(world_size)
        rank = args.hosts.index(args.current_host)
        os.environ["RANK"] = str(rank)
        dist.init_process_group(backend=args.backend, rank=rank, world_size=world_size)
    torch.manual_seed(1)
    weight = torch.zeros(4, device=device, requires_grad=True)
    for epoch in range(args.epochs):
        for _ in range(10):
            inputs = torch.randn(8, 4, device=device)
            loss = ((inputs * weight).sum(1) - inputs.sum(1)).pow(2).mean()
            loss.backward()
            if is_distributed:
                dist.all_reduce(weight.grad)
                weight.grad /= dist.get_world_size()
            with torch.no_grad():
                weight -= 0.1 * weight.grad
            weight.grad = None
        print(f"rank {rank} epoch {epoch} loss={loss.item():.6f}", flush=True)
    torch.save(weight, os.path.join(args.model_dir, f"model-{rank}.pth"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--backend", type=str, default=None)
    parser.add_argument("--hosts", type=list, default=json.loads(os.environ["SM_HOSTS"]))
    parser.add_argument("--current-host", type=str, default=os.environ["SM_CURRENT_HOST"])
    parser.add_argument("--model-dir", type=str, default=os.environ["SM_MODEL_DIR"])
    parser.add_argument("--num-gpus", type=int, default=os.environ["SM_NUM_GPUS"])
    train(parser.parse_args())
