"""What a run says and checks before its first step, and settings that change how it trains."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_model
import torch
from records_for_tests import chat, encoder, row

from estiba.errors import ConfigError
from estiba.training.precision import AmpContext
from finetune import introduction, train
from finetune.config import FinetuneConfig
from finetune.data.records import Dataset
from finetune.data.report import DataReport, TableReport
from finetune.inputs import Inputs
from finetune.model import self_test
from finetune.model.base import find_base
from finetune.model.optimizer import make_optimizer
from finetune.tokens.corpus import TokenizedRecords

CPU = torch.device("cpu")
RECORDS = [row(known=f"Year: {year}", Units="Dollars", Value=f"{year * 7}") for year in range(2000, 2012)]


def corpus(records: list[Any]) -> TokenizedRecords:
    one = encoder()
    pairs = [(record.source, example) for record in records for example in one.examples(record)]
    return TokenizedRecords(examples=[example for _, example in pairs], sources=[source for source, _ in pairs])


def test_checking_data_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\n")
    script = (
        "import runpy, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'transformers', 'peft'): raise AssertionError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"sys.argv = ['finetune', 'check', {str(tmp_path)!r}, '--json']\n"
        "runpy.run_module('finetune', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept"] == 1


def test_a_first_loss_of_zero_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model.build(tmp_path / "base")
    model = find_base(str(folder), folder).load(dtype=torch.float32).train()
    monkeypatch.setattr(self_test, "token_losses", lambda *_: torch.zeros(3, requires_grad=True))
    with pytest.raises(ConfigError, match=r"the first loss is 0\.0: nothing is learnt from these records"):
        self_test.check_gradients(model, corpus(RECORDS).examples, AmpContext("float32", CPU), CPU)


def test_every_record_has_a_trained_token_and_every_trained_token_follows_another() -> None:
    for example in corpus([*RECORDS, chat(("user", "a"), ("assistant", "b"))]).examples:
        for sequence in example.sequences():
            assert sequence.trained.any() and not sequence.trained[0]


def test_the_introduction_shows_what_is_trained_and_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    monkeypatch.setattr(introduction.logger, "info", said.append)
    folder = tiny_model.build(tmp_path / "base")
    training = corpus(RECORDS)
    training.dropped["answer too long"] = ["s.csv:9"]
    table = TableReport(template="", target_columns=["Units", "Value"], memorisation_columns=["Value"])
    report = DataReport(rows=13, kept=12, records=["table"], tables=[table], dropped={"exact duplicate": ["s.csv:14"]})
    inputs = Inputs(
        base=find_base(str(folder), folder),
        dataset=Dataset(train=RECORDS, validation=[], report=report, identity=""),
        encoder=encoder(),
        columns=("Units", "Value"),
        training=training,
        validation=TokenizedRecords(),
        tokens_key="",
    )
    config = FinetuneConfig(epochs=100)
    schedule = train._schedule(config, len(training.examples), 16)
    introduction.introduce(inputs, config, torch.nn.Linear(3, 5), schedule, 0.5, "ml.g5.xlarge")
    [text] = said
    for part in (
        "13 rows, 12 records (table), 12 to train on, 0 held out",
        f"tokens: {training.tokens:,}, {training.trained_tokens / training.tokens:.1%} of them trained",
        "times fewer tokens than without",
        "nothing in the table predicts Value",
        ">>>Dollars<|im_end|><<<",
        "75 steps, 20 trained parameters (lora), learning rate 0.0002 (the default for lora;",
        " USD",
    ):
        assert part in text, text
    assert text.count("sample ") == 5
    assert "not used: " in text and "exact duplicate" in text and "answer too long" in text


def test_the_documents_learning_rate_is_taken_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(train.logger, "warning", said.append)
    assert train._schedule(FinetuneConfig(), 100, 16).peak == 2e-4 and not said
    assert train._schedule(FinetuneConfig(learning_rate=0.001), 100, 16).peak == 1e-3
    assert said and "--learning-rate 0.001 is high for lora" in said[0]


@pytest.mark.parametrize("name", ["adam", "adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_each_optimizer_trains_on_this_device_and_continues_from_its_state(name: Any) -> None:
    def steps(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            (weight.square().sum() + weight.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()

    def make(values: torch.Tensor) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        weight = torch.nn.Parameter(values.clone())
        return weight, make_optimizer([weight], name, lr=1e-2, weight_decay=0.01, device=CPU)

    start = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    once, optimizer = make(start)
    steps(once, optimizer, 6)
    assert (once - start).abs().max() > 0.01
    first, optimizer = make(start)
    steps(first, optimizer, 3)
    second, resumed = make(first.detach())
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, 3)
    assert torch.equal(once, second)


def test_weight_decay_is_for_matrices_alone() -> None:
    parameters = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4))]
    optimizer = make_optimizer(parameters, "adamw", lr=1e-3, weight_decay=0.5, device=CPU)
    decays = {group["params"][0].ndim: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {2: 0.5, 1: 0.0}


def test_neftune_adds_noise_of_its_size_while_training_and_none_later() -> None:
    embedding = torch.nn.Embedding(10, 16)
    train._add_embedding_noise(embedding, 5.0)
    ids = torch.arange(8)[None]
    plain = embedding.weight[ids[0]]
    noise = (embedding(ids)[0] - plain).abs().max().item()
    assert 0.5 * 5 / math.sqrt(8 * 16) < noise <= 5 / math.sqrt(8 * 16)
    assert torch.equal(embedding.eval()(ids)[0], plain)


def test_generation_stops_where_trained_answers_end() -> None:
    for known, expected in ((None, [2]), (0, [0, 2]), ([0, 2], [0, 2])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=known))
        train._stop_at(model, [2])  # type: ignore[arg-type]
        assert model.generation_config.eos_token_id == expected
