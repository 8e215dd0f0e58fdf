"""Whole runs on a tiny model: interrupted and resumed, adapters, 4 bits and full fine-tuning, and what is left."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_model
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
)

from estiba.errors import ConfigError
from finetune.ask import run as ask
from finetune.inputs import Inputs
from finetune.model.base import find_base
from finetune.tokens.corpus import TokenizedRecords

CODES = {"H01": "Total income", "H05": "Wages", "H11": "Rent", "H20": "Stock", "H24": "Fixed assets"}
SETTINGS = (
    "--max-steps 12 --batch-size 2 --gradient-accumulation-steps 2 --learning-rate 0.003 --lora-dropout 0.1 "
    "--eval-steps 6 --eval-records 6 --answer-questions 4 --log-interval 2"
).split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("base"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_table(tmp_path / "input/data/training/table.csv")
    return tmp_path


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run, which tests only read."""
    root = tmp_path_factory.mktemp("finished")
    write_table(root / "input/data/training/table.csv")
    return root, run(root, base)


def write_table(path: Path, rows: int = 120) -> None:
    dice = random.Random(0)
    path.parent.mkdir(parents=True)
    lines = [
        f"{dice.randint(2013, 2023)},{code},{CODES[code]},{dice.randint(1, 999)}"
        for code in dice.choices(list(CODES), k=rows)
    ]
    path.write_text("\n".join(["Year,Code,Name,Value", *lines]) + "\n")


def command(root: Path, base: Path | str, *flags: str) -> tuple[list[str], dict[str, str]]:
    path = os.pathsep.join(path for path in sys.path if path)
    environ = {
        **os.environ,
        "ESTIBA_ROOT": str(root),
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return [sys.executable, "-m", "finetune", "--base-model", str(base), *SETTINGS, *flags], environ


def run(root: Path, base: Path | str, *flags: str) -> subprocess.CompletedProcess[str]:
    argv, environ = command(root, base, *flags)
    return subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=250)


def results(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "model/results.json").read_text())
    return found


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "model/model.safetensors")


def interrupted_run(root: Path, base: Path, *flags: str) -> None:
    """Run to the end with two kills on the way."""
    for step in (4, 8):
        argv, environ = command(root, base, *flags, "--save-steps", "2", "--log-interval", "1")
        process = subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(rf"step={step} of", line):
                process.send_signal(signal.SIGTERM if step == 4 else signal.SIGKILL)
                break
        process.stdout.close()
        process.wait(timeout=100)
    done = run(root, base, *flags, "--save-steps", "2")
    assert done.returncode == 0, done.stderr
    assert re.search(r"resuming at step [1-9]", done.stderr)


Finished = tuple[Path, subprocess.CompletedProcess[str]]


def test_a_run_leaves_a_merged_model_an_adapter_and_a_report(finished: Finished, base: Path) -> None:
    root, done = finished
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    model = root / "model"
    for name in (
        "config.json model.safetensors tokenizer.json report.md README.md loss.png results.json generation_config.json "
        "adapter/adapter_config.json adapter/adapter_model.safetensors"
    ).split():
        assert (model / name).is_file(), name
    assert not [path for path in model.rglob("*") if path.is_symlink()]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in model.rglob("*") if path.is_file())
    for path in model.rglob("*.json"):
        assert str(base) not in path.read_text() or path.name == "results.json" or "adapter" in str(path)
    found = results(root)
    assert found["steps"] == 12 and found["saved_model"]["loaded_again"]
    assert found["saved_model"]["val_loss"] == pytest.approx(found["val_loss"], abs=1e-4)
    assert found["val_loss"] < found["val_loss_before"]
    name = found["columns"]["Name"]
    assert name["val_loss"] < name["val_loss_before"] and name["answers"] > 0
    assert "Value" in found["not_learnable"]
    report = (model / "report.md").read_text()
    assert "| Name |" in report and "Answers to held-out questions" in report and "learning_rate" in report
    losses = [
        float(line.split("train_loss=")[1].split()[0]) for line in done.stdout.splitlines() if "train_loss=" in line
    ]
    assert losses[-1] < losses[0]


def test_the_merged_model_is_base_plus_adapter_and_not_the_base(finished: Finished, base: Path) -> None:
    root, _ = finished
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(root / "model")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        original = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, root / "model/adapter")(ids).logits
    assert (merged - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    assert (merged - original).abs().max() > 0.01 * original.abs().max()
    tied = AutoModelForCausalLM.from_pretrained(root / "model")
    assert tied.get_input_embeddings().weight.data_ptr() == tied.get_output_embeddings().weight.data_ptr()


def test_the_loss_is_a_mean_over_tokens_whatever_the_accumulation_and_the_ranks(tmp_path: Path, base: Path) -> None:
    found = {}
    ways = {
        "4 x 1": ("--batch-size", "4", "--gradient-accumulation-steps", "1"),
        "1 x 4": ("--batch-size", "1", "--gradient-accumulation-steps", "4"),
        "2 ranks": ("--batch-size", "2", "--gradient-accumulation-steps", "1", "--processes", "2"),
    }
    for name, flags in ways.items():
        write_table(tmp_path / name / "input/data/training/table.csv")
        done = run(tmp_path / name, base, *flags, "--lora-dropout", "0", "--log-interval", "1", "--max-steps", "5")
        assert done.returncode == 0, done.stderr
        found[name] = re.findall(r"step=\d+ of=.*?train_loss=(\S+)", done.stdout)
    assert len(found["4 x 1"]) == 5
    for losses in found.values():
        assert [float(loss) for loss in losses] == pytest.approx([float(loss) for loss in found["4 x 1"]], rel=2e-3)


def test_a_rank_without_a_held_out_record_evaluates_with_the_others(tmp_path: Path, base: Path) -> None:
    found = []
    for name, flags in {"one": (), "two": ("--processes", "2")}.items():
        write_table(tmp_path / name / "input/data/training/table.csv")
        accumulation = "1" if flags else "2"
        flags = (*flags, "--batch-size", "4", "--gradient-accumulation-steps", accumulation, "--eval-records", "3")
        done = run(tmp_path / name, base, *flags, "--max-steps", "2", "--eval-steps", "1", "--lora-dropout", "0")
        assert done.returncode == 0, done.stderr
        found.append([float(loss) for loss in re.findall(r"val_loss=(\S+)", done.stdout)])
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], rel=2e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_interrupted_twice_it_ends_with_the_same_bits(tmp_path: Path, base: Path, method: str) -> None:
    for name in ("once", "killed"):
        write_table(tmp_path / name / "input/data/training/table.csv")
    flags = ("--method", method, "--optimizer", "adamw")
    done = run(tmp_path / "once", base, *flags)
    assert done.returncode == 0, done.stderr
    interrupted_run(tmp_path / "killed", base, *flags)
    expected, found = weights(tmp_path / "once"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    logs = [(tmp_path / name / "model/training_log.csv").read_text().splitlines()[-1] for name in ("once", "killed")]
    assert logs[0] == logs[1]


def test_four_bits_train_resume_and_merge_to_the_model_that_was_trained(tmp_path: Path) -> None:
    base = tiny_model.build(tmp_path / "base", hidden_size=64, head_dim=16, intermediate_size=128)
    for name in ("once", "killed"):
        write_table(tmp_path / name / "input/data/training/table.csv")
    done = run(tmp_path / "once", base, "--method", "qlora")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "once")
    assert found["saved_model"]["val_loss"] == pytest.approx(found["val_loss"], abs=2e-3)
    config = json.loads((tmp_path / "once/model/config.json").read_text())
    assert "quantization_config" not in config
    interrupted_run(tmp_path / "killed", base, "--method", "qlora")
    expected, again = weights(tmp_path / "once"), weights(tmp_path / "killed")
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


def test_the_checkpoint_holds_the_adapter_and_never_the_base(finished: Finished, base: Path) -> None:
    root, _ = finished
    newest = max((root / "checkpoints").glob("step-*"))
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    adapter = (root / "model/adapter/adapter_model.safetensors").stat().st_size
    assert size < 5 * adapter + 200_000
    assert not list((root / "model").rglob("step-*"))


def test_a_stop_saves_and_leaves_a_usable_adapter(root: Path, base: Path) -> None:
    argv, environ = command(root, base, "--log-interval", "1", "--max-steps", "2000")
    process = subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("step=3 of"):
            process.terminate()
            break
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=60) == 143, said
    assert list((root / "checkpoints").glob("step-*/manifest.json"))
    assert not (root / "model/config.json").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), root / "model/adapter")


def test_a_finished_run_is_not_repeated_and_other_data_does_not_continue_it(
    finished: Finished, base: Path, tmp_path: Path
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(finished[0], root)
    before = weights(root)
    again = run(root, base)
    assert again.returncode == 0 and "resuming at step 12 of 12" in again.stderr
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(root).items())
    with (root / "input/data/training/table.csv").open("a") as file:
        file.write("2020,H01,Total income,5\n")
    done = run(root, base)
    assert done.returncode == 2 and "data" in done.stderr


def test_the_answer_of_a_finished_model_is_printed(finished: Finished, base: Path) -> None:
    root, _ = finished
    path = os.pathsep.join(path for path in sys.path if path)
    argv = [
        sys.executable,
        "-m",
        "finetune",
        "ask",
        "--model-dir",
        str(root / "model"),
        "--max-new-tokens",
        "5",
        "Code: H01",
    ]
    done = subprocess.run(argv, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    missing = [*argv[:5], str(root / "nowhere"), "Code: H01"]
    done = subprocess.run(missing, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "no config.json" in done.stderr


@pytest.mark.parametrize(
    ("damage", "question", "says"),
    [
        ("", " ", "question is empty"),
        ("tokenizer.json", "a", "tokenizer cannot be loaded"),
        ("model.safetensors", "a", "cannot be loaded as a causal language model"),
    ],
)
def test_a_question_that_cannot_be_asked_is_one_message(
    finished: Finished, tmp_path: Path, damage: str, question: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished[0] / "model", folder)
    if damage:
        (folder / damage).write_bytes(b"\0" * 50)
    with pytest.raises(ConfigError, match=says):
        ask(["--model-dir", str(folder), question])
    assert not capsys.readouterr().out


def test_the_saved_tokenizer_renders_what_was_trained(finished: Finished, base: Path) -> None:
    root, _ = finished
    saved, original = AutoTokenizer.from_pretrained(root / "model"), AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": "a"}]
    expected = original.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert saved.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == expected


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--lora-targets", '["nadie"]'), "nadie"),
        (("--chat-template", "/no/such.jinja"), "/no/such.jinja"),
    ],
)
def test_mistakes_end_with_status_2_and_one_message(root: Path, base: Path, flags: tuple[str, ...], says: str) -> None:
    done = run(root, base, *flags)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr


def test_a_base_model_that_cannot_be_trained_is_refused_before_a_step(tmp_path: Path) -> None:
    tokenizer = tiny_model.make_tokenizer()
    other = tiny_model.build(tmp_path / "other-tokenizer", vocab_size=300)
    nan = tiny_model.build(tmp_path / "nan")
    tensors = load_file(nan / "model.safetensors")
    next(tensor for name, tensor in tensors.items() if "q_proj" in name)[0, 0] = float("nan")
    save_file(tensors, nan / "model.safetensors", metadata={"format": "pt"})
    headless = tiny_model.build(tmp_path / "headless", tie_word_embeddings=False)
    tensors = load_file(headless / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    encoder = tmp_path / "encoder"
    BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=96,
        )
    ).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    for base, says in (
        (other, "has embeddings for 300"),
        (nan, "not finite before anything is trained"),
        (headless, "lm_head.weight, and would be random"),
        (encoder, "BertForMaskedLM, not a causal language model"),
    ):
        write_table(tmp_path / f"{base.name}-job/input/data/training/table.csv")
        done = run(tmp_path / f"{base.name}-job", base)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr and "Traceback" not in done.stderr


def test_a_base_model_with_few_positions_gets_shorter_sequences(root: Path, tmp_path: Path) -> None:
    tokenizer = tiny_model.make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with (root / "input/data/training/table.csv").open("a") as file:
        file.write(f"2020,H01,Total income,{'word ' * 200}\n")
    done = run(root, tmp_path / "base")
    assert done.returncode == 0, done.stderr
    assert "128 positions, so that is the longest" in done.stderr
    assert results(root)["saved_model"]["val_loss"] == pytest.approx(results(root)["val_loss"], abs=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("held_out", ["0.2", "0"])
def test_a_model_that_diverged_is_an_error_and_not_an_output(
    root: Path, base: Path, method: str, held_out: str
) -> None:
    flags = ("--learning-rate", "1e12", "--validation-split", held_out, "--log-interval", "50")
    done = run(root, base, "--method", method, *flags)
    assert done.returncode == 1 and "lower --learning-rate" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (root / "model/config.json").exists() and not (root / "model/results.json").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_that_also_reads_images_is_trained_where_text_passes(tmp_path: Path, method: str) -> None:
    root, folder = tmp_path / "job", tmp_path / "base"
    write_table(root / "input/data/training/table.csv")
    tokenizer = tiny_model.make_tokenizer()
    text = {**tiny_model.SIZES, "vocab_size": len(tokenizer), "sliding_window": 16}
    sight = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**sight, "image_size": 56, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = run(root, folder, "--method", method)
    assert done.returncode == 0, done.stderr
    found = results(root)
    assert found["saved_model"]["val_loss"] == pytest.approx(found["val_loss"], abs=1e-4)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(root / "model").state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any("language_model" in name for name in changed)
    assert not any("vision" in name or "projector" in name for name in changed)


def test_the_saved_model_stops_where_its_training_answers_end(tmp_path: Path) -> None:
    """A base model's own end is often `<|endoftext|>`, where its chat template ends turns with another token."""
    root, base = tmp_path / "job", tiny_model.build(tmp_path / "base", eos_token_id=0)
    write_table(root / "input/data/training/table.csv")
    done = run(root, base)
    assert done.returncode == 0, done.stderr
    assert json.loads((root / "model/generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_a_base_model_that_is_none_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"pickled": "pytorch_model.bin", "adapter": "adapter_config.json", "weights": "model.safetensors"}
    for name, file in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"{}")
    (tmp_path / "empty").mkdir()
    for given, says in (
        (str(tmp_path / "pickled"), "pickled"),
        (str(tmp_path / "adapter"), "an adapter and no base model"),
        (str(tmp_path / "empty"), r"no \*.safetensors"),
        (str(tmp_path / "weights"), "no config.json"),
        ("/no/such/model", "no such directory"),
        ("nobody/nothing", "HF_HUB_OFFLINE is set"),
    ):
        with pytest.raises(ConfigError, match=says):
            find_base(given, tmp_path / "none")
    with pytest.raises(ConfigError, match="--base-model"):
        find_base(None, tmp_path / "none")


def test_one_changed_byte_in_the_middle_of_the_base_makes_it_another(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    weights_file = tmp_path / "base/model.safetensors"
    before = find_base(str(tmp_path / "base"), tmp_path).identity
    data = bytearray(weights_file.read_bytes()) + bytes(5 << 20)  # longer than any part that a sample would read
    weights_file.write_bytes(data)
    longer = find_base(str(tmp_path / "base"), tmp_path).identity
    data[len(data) // 2] ^= 1
    weights_file.write_bytes(data)
    assert len({before, longer, find_base(str(tmp_path / "base"), tmp_path).identity}) == 3


def test_records_left_out_of_either_side_are_counted(base: Path) -> None:
    report = SimpleNamespace(dropped={"empty": ["a:1"]})
    sides = [TokenizedRecords(dropped={"too long": ["a:2"]}), TokenizedRecords(dropped={"too long": ["a:3"]})]
    inputs = SimpleNamespace(dataset=SimpleNamespace(report=report), training=sides[0], validation=sides[1])
    assert Inputs.dropped(inputs) == {"empty": ["a:1"], "too long": ["a:2", "a:3"]}  # type: ignore[arg-type]


CONVERTER = """
import argparse, gguf, safetensors.torch, sys
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile")
parser.add_argument("--outtype")
options = parser.parse_args()
if options.outtype == "q8_0":
    sys.exit("Model LlamaForCausalLM is not supported")
writer = gguf.GGUFWriter(options.outfile, "llama")
for name, tensor in safetensors.torch.load_file(options.model + "/model.safetensors").items():
    writer.add_tensor(name, tensor.float().numpy())
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def test_a_converter_writes_the_merged_model_as_gguf_too(root: Path, base: Path) -> None:
    import gguf

    converter = root / "convert_hf_to_gguf.py"
    converter.write_text(CONVERTER)
    flags = ("--max-steps", "2", "--gguf", "f32", "--gguf-converter", str(converter))
    done = run(root, base, *flags)
    assert done.returncode == 0, done.stderr
    assert results(root)["gguf"] == "model.gguf"
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(root / "model/model.gguf").tensors}
    assert set(written) == set(weights(root))
    assert all((written[name] == tensor.float().numpy()).all() for name, tensor in weights(root).items())
    # A converter that fails costs its file, never the model; the file of the run before is of another model.
    done = run(root, base, *flags[:3], "q8_0", *flags[4:], "--checkpoint-path", str(root / "other"))
    assert done.returncode == 0, done.stderr
    assert "convert_hf_to_gguf.py ended with 1 (Model LlamaForCausalLM is not supported)" in done.stderr
    assert results(root)["gguf"] is None and not (root / "model/model.gguf").exists()
    assert (root / "model/model.safetensors").is_file()


def test_gguf_without_a_converter_is_refused_before_anything_is_read(root: Path, base: Path) -> None:
    done = run(root, base, "--gguf", "f16", "--gguf-converter", str(root / "none.py"))
    assert done.returncode == 2
    assert "no converter" in done.stderr and "--gguf-converter /llama.cpp/convert_hf_to_gguf.py" in done.stderr
    assert not (root / "checkpoints").exists()
