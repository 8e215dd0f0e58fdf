"""TRL's trainer as the oracle: the same rows, one by one and without dropout, give the same losses step by step."""

from __future__ import annotations

from pathlib import Path

import tiny_model
import torch
from datasets import Dataset
from records_for_tests import chat, encoder
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from finetune.model.base import find_base
from finetune.model.forward import logits_of
from finetune.tokens.examples import pack

NO_LINE_FEED = tiny_model.CHATML.replace("<|im_end|>\n", "<|im_end|>")
"""TRL would also train the line feed that the usual template puts after the end of the turn."""
STEPS, ROWS_PER_STEP, RATE = 20, 4, 1e-3
CONVERSATIONS = [
    [("user", f"El barco {number} zarpa"), ("assistant", f"al alba con {'trigo ' * (number % 5)}{number * 7}")]
    for number in range(STEPS * ROWS_PER_STEP)
]


def losses_of_trl(base: Path, folder: Path) -> list[float]:
    rows = [
        {
            "prompt": [{"role": "user", "content": turns[0][1]}],
            "completion": [{"role": "assistant", "content": turns[1][1]}],
        }
        for turns in CONVERSATIONS
    ]
    model = find_base(str(base), base).load(dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS_PER_STEP, learning_rate=RATE,
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1e9, optim="adamw_torch",
            logging_steps=1, report_to=[], bf16=False, gradient_checkpointing=False, packing=False, seed=0,
            completion_only_loss=True, save_strategy="no", use_cpu=True, disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def losses_of_ours(base: Path) -> list[float]:
    model = find_base(str(base), base).load(dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    one = encoder(NO_LINE_FEED)
    found = []
    for step in range(STEPS):
        rows = CONVERSATIONS[step * ROWS_PER_STEP : (step + 1) * ROWS_PER_STEP]
        batch = pack([example for turns in rows for example in one.examples(chat(*turns))])
        loss = torch.nn.functional.cross_entropy(logits_of(model, batch), batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_losses_of_twenty_steps_agree_with_trls_trainer(tmp_path: Path) -> None:
    base = tiny_model.build(tmp_path / "base", template=NO_LINE_FEED)
    ours, theirs = losses_of_ours(base), losses_of_trl(base, tmp_path / "trl")
    assert len(ours) == len(theirs) == STEPS
    assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) <= 1e-4
    assert ours[-1] < ours[0]
