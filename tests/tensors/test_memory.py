"""Memory that a step frees is reused by the next one."""

from __future__ import annotations

import subprocess
import sys

STEPS = """
import resource, sys
import torch
from estiba.training import allocator
from estiba.training.allocator import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    allocator.ROOM_BYTES = 0
    assert keep_freed_memory()

def step():
    return [torch.ones(16 * 2**20) for _ in range(4)]  # 64 MB each

for _ in range(5):  # the heap grows for some steps
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kind: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, kind], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_pages_of_large_tensors_are_not_requested_from_the_kernel_at_every_step() -> None:
    given_back, kept = faults("given back"), faults("kept")
    assert kept < given_back / 2, (kept, given_back)
