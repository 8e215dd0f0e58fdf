# environment: torch
"""Tokens a second of aura's training loop against litgpt, Hugging Face's Trainer and a plain nanoGPT-style loop.

    python benchmarks/aura_throughput.py                        # a small model on a CPU, a large one on a GPU
    python benchmarks/aura_throughput.py --rounds 5 --steps 8 --threads 2

Needs a Python with aura's requirements, and for the peers `litgpt` and `accelerate`; no network, no image. Every one
trains the same Llama (same shape and number of parameters) on the same packed ids, with the same batch, AdamW, clipping
at 1 and no dropout: float32 on a CPU, bfloat16 on a GPU. Ours is Aura in estiba.loop; litgpt's is litgpt.pretrain.fit;
Hugging Face's is Trainer with LlamaForCausalLM; the plain one is the loop of nanoGPT's train.py around separate
projections and F.cross_entropy of all logits. On a GPU those that compile by default do, ours too, and the Trainer runs
with gradient checkpointing a second time, as memory makes people do. Rounds in turn; each begins a new run, whose first
steps are not counted. Times are of the ends of optimizer steps, so all that a loop does in between counts.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
RATE, DECAY, BETAS, CLIP = 3e-4, 0.01, (0.9, 0.95), 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What everyone has to do."""

    vocab_size: int
    embed_size: int
    num_layers: int
    num_heads: int
    ff_size: int
    seq_length: int
    batch_size: int
    accumulation: int
    warm: int
    """Steps before the clock starts."""
    steps: int
    """Steps that count."""
    ids: Any
    """uint16 ids on disk, mapped."""
    device: str
    folder: Path

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.seq_length


def task_for(device: str, options: argparse.Namespace, folder: Path) -> Task:
    """A model of 17M parameters for a CPU, aura-large (0.78B) for a GPU; ids as rare and frequent as words are."""
    import numpy as np

    is_small = device == "cpu"
    vocab_size, seq_length, batch_size, accumulation = (8192, 256, 4, 2) if is_small else (32_000, 2048, 4, 2)
    width, layers, heads, ff = (384, 6, 6, 1024) if is_small else (1536, 24, 12, 4096)
    warm, steps = (1, options.steps or 4) if is_small else (5, options.steps or 20)
    count = (warm + steps + 2) * batch_size * accumulation * seq_length + 1
    ranks = np.random.default_rng(0).zipf(1.2, count) % vocab_size
    ranks.astype(np.uint16).tofile(folder / "ids.bin")
    return Task(
        vocab_size=vocab_size, embed_size=width, num_layers=layers, num_heads=heads, ff_size=ff, seq_length=seq_length,
        batch_size=batch_size, accumulation=accumulation, warm=warm, steps=steps,
        ids=np.memmap(folder / "ids.bin", np.uint16, "r"), device=device, folder=folder,
    )  # fmt: skip


# --- ours ----------------------------------------------------------------------------------------------------------


def ours(task: Task) -> int:
    """Aura in estiba.training, as aura.train puts them together. Returns the number of parameters, as all others do."""
    import torch

    from aura.data.windows import Windows
    from aura.model.decoder import Aura, ModelConfig
    from aura.model.optimizer import make_optimizer
    from estiba.platform.stop import Stop
    from estiba.training.config import TrainerConfig
    from estiba.training.metrics import MetricsLogger
    from estiba.training.schedule import Schedule
    from estiba.training.task import TrainTask
    from estiba.training.trainer import Trainer

    class Pretraining(TrainTask[torch.Tensor]):
        def __init__(self) -> None:
            self.shape = ModelConfig(
                vocab_size=task.vocab_size, embed_size=task.embed_size, num_layers=task.num_layers,
                num_heads=task.num_heads, seq_length=task.seq_length, ff_size=task.ff_size,
            )  # fmt: skip
            self.model = Aura(self.shape, seed=1).to(task.device)
            self.optimizer = make_optimizer(
                self.model, "adamw", lr=RATE, weight_decay=DECAY, betas=BETAS, device=torch.device(task.device)
            )
            self.windows = Windows([task.ids], seq_length=task.seq_length, seed=1, stream_identity="bench")

        def batches(self, step: int) -> Any:
            share = task.batch_size * task.accumulation
            return self.windows.take(step * share, share).split(task.batch_size)

        def units_in(self, batch: torch.Tensor) -> int:
            return batch.shape[0] * (batch.shape[1] - 1)

        def loss(self, model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = model(batch[:, :-1], batch[:, 1:])
            return loss

        def evaluate(self, model: torch.nn.Module) -> Iterator[Any]:
            del model
            return iter(())

    work = Pretraining()
    settings = TrainerConfig(
        schedule=Schedule(peak=RATE, steps=task.warm + task.steps), clip=CLIP, compile=task.device == "cuda",
        evaluate_every=None, save_every_s=None, log_every=10,
    )  # fmt: skip
    loop = Trainer(
        work,
        settings,
        checkpoints=None,
        metrics_logger=MetricsLogger(None),
        stop=Stop(),
        device=torch.device(task.device),
    )
    loop.resume(None)
    loop.run()
    return sum(p.numel() for p in work.model.parameters())


# --- peers ---------------------------------------------------------------------------------------------------------


def litgpt(task: Task) -> int:
    """litgpt.pretrain.fit with its own GPT of the same shape, set up as litgpt.pretrain.main does."""
    import lightning as L
    import torch
    from litgpt import GPT, Config
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.pretrain import fit
    from torch.utils.data import DataLoader

    fabric = L.Fabric(devices=1, accelerator=task.device, precision="32-true" if task.device == "cpu" else "bf16-mixed")
    fabric.launch()
    config = Config(
        name="bench", block_size=task.seq_length, vocab_size=task.vocab_size, padded_vocab_size=task.vocab_size,
        n_layer=task.num_layers, n_head=task.num_heads, n_query_groups=task.num_heads, n_embd=task.embed_size,
        intermediate_size=task.ff_size, rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    with fabric.init_module():
        model = GPT(config)
    model.max_seq_length = task.seq_length
    count = sum(p.numel() for p in model.parameters())
    if task.device == "cuda":
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=task.device == "cuda"
    )
    optimizer = fabric.setup_optimizers(optimizer)
    loader = DataLoader(_rows(task, extra=1), batch_size=task.batch_size, pin_memory=True)
    loaders = fabric.setup_dataloaders(loader, loader)
    train = TrainArgs(
        save_interval=None, log_interval=10, global_batch_size=task.batch_size * task.accumulation,
        micro_batch_size=task.batch_size, lr_warmup_steps=1, max_norm=CLIP,
        max_tokens=(task.warm + task.steps) * task.tokens_per_step,
    )  # fmt: skip
    evaluation = EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False)
    state = {"model": model, "optimizer": optimizer, "train_dataloader": loader, "iter_num": 0, "step_count": 0}
    fit(fabric, 1, state, *loaders, task.folder, None, train, evaluation)
    return count


def trainer(task: Task, *, checkpointing: bool = False) -> int:
    """transformers.Trainer with LlamaForCausalLM and its defaults but for what is the same for all."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=task.vocab_size, hidden_size=task.embed_size, intermediate_size=task.ff_size,
            num_hidden_layers=task.num_layers, num_attention_heads=task.num_heads,
            num_key_value_heads=task.num_heads, max_position_embeddings=task.seq_length, tie_word_embeddings=False,
        )
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(task.folder / "trainer"), max_steps=task.warm + task.steps,
        per_device_train_batch_size=task.batch_size, gradient_accumulation_steps=task.accumulation,
        learning_rate=RATE, weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP,
        bf16=task.device == "cuda", use_cpu=task.device == "cpu", gradient_checkpointing=checkpointing,
        logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in _rows(task)]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    return sum(p.numel() for p in model.parameters())


def trainer_checkpointing(task: Task) -> int:
    """The same with gradient_checkpointing=True."""
    return trainer(task, checkpointing=True)


def nanogpt(task: Task) -> int:
    """The loop of nanoGPT's train.py: random crops of a memmap, all logits, clip, step, the loss looked at every 10."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    torch.manual_seed(1)
    model = plain_llama(task).to(task.device)
    count = sum(p.numel() for p in model.parameters())
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=task.device == "cuda")
    autocast: Any = contextlib.nullcontext()
    if task.device == "cuda":
        model, autocast = torch.compile(model), torch.autocast("cuda", dtype=torch.bfloat16)

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.randint(len(task.ids) - task.seq_length, (task.batch_size,)).tolist()
        x = torch.stack([torch.from_numpy(task.ids[i : i + task.seq_length].astype(np.int64)) for i in at])
        y = torch.stack([torch.from_numpy(task.ids[i + 1 : i + 1 + task.seq_length].astype(np.int64)) for i in at])
        if task.device == "cuda":
            return x.pin_memory().to("cuda", non_blocking=True), y.pin_memory().to("cuda", non_blocking=True)
        return x, y

    x, y = get_batch()
    for step in range(task.warm + task.steps):
        for _ in range(task.accumulation):
            with autocast:
                logits = model(x)
                loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1)) / task.accumulation
            x, y = get_batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            print(loss.item() * task.accumulation)
    return count


def plain_llama(task: Task) -> Any:
    """Llama as one writes it down: a projection each for q, k, v, gate and up."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    width, heads = task.embed_size, task.num_heads
    frequencies = 1.0 / 10_000 ** (torch.arange(0, width // heads, 2) / (width // heads))
    angles = torch.outer(torch.arange(task.seq_length), frequencies).repeat(1, 2)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.norm_2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
            self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
            self.gate, self.up = (nn.Linear(width, task.ff_size, bias=False) for _ in range(2))
            self.down = nn.Linear(task.ff_size, width, bias=False)

        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            h = self.norm_1(x)
            q, k, v = (m(h).view(*h.shape[:2], heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
            q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
            y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
            x = x + self.o(y.transpose(1, 2).reshape(h.shape))
            h = self.norm_2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(task.vocab_size, width)
            self.blocks = nn.ModuleList(Block() for _ in range(task.num_layers))
            self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, task.vocab_size, bias=False)
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            logits: Tensor = self.head(self.norm(x))
            return logits

    return Llama()


def _rows(task: Task, extra: int = 0) -> list[Any]:
    """The ids as rows of T (+ extra) tokens, for loaders that take one row at a time."""
    import numpy as np
    import torch

    count = (len(task.ids) - 1) // task.seq_length
    ids = torch.from_numpy(task.ids.astype(np.int64))
    return [ids[i * task.seq_length : (i + 1) * task.seq_length + extra] for i in range(count)]


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(run: Callable[[Task], int], task: Task) -> dict[str, float]:
    """Tokens a second from the end of the last warm-up step to the end of the last one."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[float] = []
    on_gpu = task.device == "cuda"

    def stepped(*_: Any) -> None:
        if on_gpu and len(ends) + 1 in (task.warm, task.warm + task.steps):
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    hook = register_optimizer_step_post_hook(stepped)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            parameters = run(task)
    finally:
        hook.remove()
        gc.collect()
        if on_gpu:
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    if len(ends) != task.warm + task.steps:
        raise RuntimeError(f"made {len(ends)} steps instead of {task.warm + task.steps}")
    found = {"tokens_per_s": task.steps * task.tokens_per_step / (ends[-1] - ends[task.warm - 1])}
    found["parameters"] = parameters
    if on_gpu:
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def compare(task: Task, rounds: int) -> dict[str, Any]:
    """Everyone in turn, every round beginning with another one."""
    runs: list[Callable[[Task], int]] = [ours, litgpt, trainer, nanogpt]
    if task.device == "cuda":
        runs.append(trainer_checkpointing)
    found: dict[str, list[dict[str, float]]] = {run.__name__: [] for run in runs}
    absent: dict[str, str] = {}
    for number in range(rounds):
        for run in runs[number % len(runs) :] + runs[: number % len(runs)]:
            if run.__name__ in absent:
                continue
            try:
                found[run.__name__].append(measure(run, task))
            except Exception as error:
                if run is ours:
                    raise
                absent[run.__name__] = f"{type(error).__name__}: {error}"[:300]
    sizes = {values[0]["parameters"] for name, values in found.items() if name not in absent}
    if len(sizes) != 1:
        raise RuntimeError(f"these are not the same model: {sizes}")
    results: dict[str, Any] = {"parameters": int(sizes.pop())}
    ours_per_s = [value["tokens_per_s"] for value in found["ours"]]
    for name, values in found.items():
        if name in absent:
            results[name] = {"could_not_run": absent[name]}
            continue
        rates = [value["tokens_per_s"] for value in values]
        results[name] = {
            "tokens_per_s": round(statistics.median(rates), 1),
            "rounds": [round(rate, 1) for rate in rates],
            "ours_is_times": round(statistics.median(a / b for a, b in zip(ours_per_s, rates, strict=True)), 3),
        }
        if "peak_memory_gb" in values[0]:
            results[name]["peak_memory_gb"] = round(max(value["peak_memory_gb"] for value in values), 2)
    return results


def goals_of(results: dict[str, Any], task: Task) -> list[dict[str, Any]]:
    """The goals are for a GPU; on a CPU, where arithmetic is nearly all there is, none is set."""
    if task.device != "cuda":
        return []
    import torch

    from aura.model.decoder import ModelConfig
    from estiba.gpus import find_device

    shape = ModelConfig(
        vocab_size=task.vocab_size, embed_size=task.embed_size, num_layers=task.num_layers, num_heads=task.num_heads,
        seq_length=task.seq_length, ff_size=task.ff_size,
    )  # fmt: skip
    sheet = find_device(torch.cuda.get_device_name())
    mfu = results["ours"]["tokens_per_s"] * shape.flops_per_token() / sheet.peak_flops if sheet else None
    return [
        goal("tokens/s vs litgpt", results["litgpt"].get("ours_is_times"), ">=1.1"),
        goal("tokens/s vs Trainer with checkpointing", results["trainer_checkpointing"].get("ours_is_times"), ">=1.5"),
        goal("MFU", None if mfu is None else round(mfu, 3), ">=0.45"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps that count, in each run; 4 on a CPU, 20 on a GPU")
    parser.add_argument("--threads", type=int, help="of a CPU; default is torch's own choice")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "images/aura")]
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONWARNINGS="ignore")
    try:
        import torch
    except ModuleNotFoundError as error:
        print(f"needs {error.name}: pip install -r images/aura/requirements.txt litgpt accelerate", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="aura-throughput-") as folder:
        task = task_for(device, options, Path(folder))
        results = compare(task, options.rounds)
        sizes = {name: value for name, value in vars(task).items() if name not in ("ids", "folder")}
        return report(
            results | {"task": sizes, "versions": versions()}, goals_of(results, task), device, options.results
        )


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "litgpt", "lightning", "accelerate"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def report(results: dict[str, Any], goals: list[dict[str, Any]], device: str, path: Path | None) -> int:
    import torch

    print(f"{results['parameters'] / 1e6:.1f}M parameters; {results['task']}")
    print(f"{'':<22} {'tokens/s':>10} {'ours is':>8}")
    for name in ("ours", "litgpt", "trainer", "trainer_checkpointing", "nanogpt"):
        found = results.get(name)
        if found and "could_not_run" in found:
            print(f"{name:<22} could not run: {found['could_not_run']}")
        elif found:
            print(f"{name:<22} {found['tokens_per_s']:>10.1f} {found['ours_is_times']:>7.2f}x")
    on = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    publish("aura_throughput", results, goals, conditions=on, path=path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
