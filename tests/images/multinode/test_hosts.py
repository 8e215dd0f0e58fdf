"""Jobs on one, two and three hosts: the same loss, and checkpoints that any of them resumes."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
from pathlib import Path

import pytest
import tiny_model
import torch
from hosts import Hosts, Scheduler, of_batch, of_torchrun, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from estiba.checkpoint.sharded import format as sharded_format
from estiba.storage import FileStore


def digest(hosts: Hosts) -> str:
    return hashlib.sha256((hosts.roots[0] / "model/model.safetensors").read_bytes()).hexdigest()


def same_within(one: list[float], other: list[float], tolerance: float) -> None:
    assert len(one) == len(other)
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= tolerance


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hosts]:
    """Undisturbed runs by name, which several tests compare with."""
    return {}


def undisturbed(whole: dict[str, Hosts], root: Path, count: int, arguments: list[str]) -> Hosts:
    key = str(count)
    if key not in whole:
        whole[key] = run(root / f"whole-{count}", count, arguments)
    return whole[key]


def test_two_and_three_hosts_have_the_loss_of_one_within_a_millionth(
    tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str]
) -> None:
    root = tmp_path_factory.mktemp("counts")
    one = undisturbed(whole, root, 1, arguments)
    assert len(one.column("train_loss")) == 8 and len(one.column("val_loss")) == 2
    assert one.column("train_loss")[-1] < one.column("train_loss")[0] - 0.1
    for count in (2, 3):
        other = undisturbed(whole, root, count, arguments)
        for name in ("train_loss", "val_loss"):
            same_within(one.column(name), other.column(name), 1e-6)
        assert f"sharded over {count} of {count} ranks, {count} hosts" in other.log()


def test_replicas_that_are_sharded_have_the_same_loss_and_save_each_shard_once(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str]
) -> None:
    """HSDP: two copies of the model, one on each host."""
    one = undisturbed(whole, tmp_path_factory.mktemp("one"), 1, arguments)
    hybrid = run(tmp_path, 2, [*arguments, "--replicas", "2"])
    same_within(one.column("train_loss"), hybrid.column("train_loss"), 1e-6)
    manifest = sharded_format.read_manifest(FileStore(hybrid.roots[0] / "checkpoints"), "step-00000008")
    assert [part.shard for part in manifest.parts] == [0, None]
    assert manifest.parts[1].size < manifest.parts[0].size / 10


def test_checkpoints_of_three_hosts_resume_on_two_and_on_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str]
) -> None:
    one = undisturbed(whole, tmp_path_factory.mktemp("one"), 1, arguments)
    shared = tmp_path / "checkpoints"
    three = Hosts(tmp_path / "three", 3, [*arguments, "--checkpoint-path", str(shared)])
    three.wait_for("step=5 of")
    three.signal(signal.SIGTERM, [1])  # one host alone hears it
    assert three.wait() == [143, 143, 143], three.log()
    step = int(re.findall(r"everything up to step (\d+)", three.log())[-1])
    assert 5 <= step < 8
    for count in (2, 1):
        copy = tmp_path / f"copy-{count}"
        shutil.copytree(shared, copy)
        resumed = run(tmp_path / f"on-{count}", count, [*arguments, "--checkpoint-path", str(copy)])
        assert f"resuming at step {step} of 8" in resumed.log()
        same_within(one.column("train_loss"), resumed.column("train_loss"), 1e-6)


def test_two_hosts_that_are_interrupted_twice_end_with_the_bits_of_an_undisturbed_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str]
) -> None:
    """Each host has a disk of its own, which both keep: once after a signal, once after a kill."""
    two = undisturbed(whole, tmp_path_factory.mktemp("two"), 2, arguments)
    first = Hosts(tmp_path, 2, arguments)
    first.wait_for("step=3 of")
    first.signal(signal.SIGTERM)
    assert first.wait() == [143, 143], first.log()
    second = Hosts(tmp_path, 2, arguments)
    second.wait_for("resuming at step")
    second.wait_for("step=6 of")
    second.kill()
    third = run(tmp_path, 2, arguments)
    assert re.search(r"resuming at step [4-8] of 8", third.log())
    assert digest(third) == digest(two)
    assert third.column("train_loss") == two.column("train_loss")
    logs = [(hosts.roots[0] / "model/training_log.csv").read_bytes() for hosts in (third, two)]
    assert logs[0] == logs[1]


def test_a_flipped_byte_in_the_part_of_another_host_is_found_and_the_checkpoint_before_is_used(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str]
) -> None:
    two = undisturbed(whole, tmp_path_factory.mktemp("two"), 2, arguments)
    for host in two.roots:
        shutil.copytree(host, tmp_path / host.name)
    (part,) = (tmp_path / "algo-2/checkpoints/step-00000008").glob("rank-*/part.safetensors")
    data = bytearray(part.read_bytes())
    data[-100] ^= 1
    part.write_bytes(data)
    again = run(tmp_path, 2, arguments)
    assert re.search(r"step-00000008: .*algo-2.*do not match their digest; falling back", again.log())
    assert re.search(r"resuming at step [2-7] of 8", again.log())
    assert digest(again) == digest(two)


def test_hosts_that_lack_each_others_parts_say_so_instead_of_starting_over(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str]
) -> None:
    two = undisturbed(whole, tmp_path_factory.mktemp("two"), 2, arguments)
    shutil.copytree(two.roots[0], tmp_path / "algo-1")
    alone = Hosts(tmp_path, 1, arguments)
    assert alone.wait() == [1]
    assert re.search(r"is missing, so none of \d checkpoints can be restored on these hosts", alone.log())
    assert "--checkpoint-upload s3://" in (tmp_path / "algo-1/output/failure").read_text()
    kept = sharded_format.committed(FileStore(tmp_path / "algo-1/checkpoints").list())
    assert kept == sharded_format.committed(FileStore(two.roots[0] / "checkpoints").list()) and kept


def test_the_trained_model_loads_as_a_hugging_face_model_and_predicts_as_well(
    tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str], text: Path
) -> None:
    two = undisturbed(whole, tmp_path_factory.mktemp("two"), 2, arguments)
    folder = two.roots[0] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer((text / "a.txt").read_text(), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    loss_sum, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 32):
            window = torch.tensor(ids[start : start + 33])
            logits = model(window[None, :-1]).logits[0]
            loss_sum += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            count += len(window) - 1
    assert abs(loss_sum / count - two.column("val_loss")[-1]) < 1e-5
    assert not (two.roots[1] / "model/model.safetensors").exists()


def test_the_trained_weights_have_the_dtype_of_the_base_model(tmp_path: Path, arguments: list[str]) -> None:
    folder = tiny_model.build(tmp_path / "base", "qwen3", dtype=torch.bfloat16)
    hosts = run(tmp_path, 1, [*arguments, "--model", str(folder), "--max-steps", "1"])
    tensors = load_file(hosts.roots[0] / "model/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(hosts.roots[0] / "model").dtype == torch.bfloat16


def test_hosts_that_lose_their_disks_resume_from_s3_on_another_number_of_hosts(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str]
) -> None:
    """Two hosts with a disk each stop; one host with an empty disk continues."""
    from s3server import s3_server

    one = undisturbed(whole, tmp_path_factory.mktemp("one"), 1, arguments)
    with s3_server(persist=False) as s3:
        s3.make_bucket("estiba")
        uploading = [*arguments, "--checkpoint-upload", "s3://estiba/run"]
        two = Hosts(tmp_path / "two", 2, [*uploading, "--max-steps", "400"], environ=s3.environ)
        two.wait_for("step=8 of")
        two.signal(signal.SIGTERM, [1])
        assert two.wait() == [143, 143], two.logs()
        step = int(re.findall(r"everything up to step (\d+)", two.log())[-1])
        alone = run(
            tmp_path / "one",
            1,
            [*uploading, "--max-steps", str(step + 2), "--accept-changed-plan", "true"],
            environ=s3.environ,
        )
    assert f"resuming at step {step} of {step + 2}" in alone.log()
    assert len(alone.column("train_loss")) == step + 2
    assert abs(alone.column("train_loss")[0] - one.column("train_loss")[0]) <= 1e-6


def test_a_host_that_is_killed_between_two_saves_costs_the_steps_since_the_last_committed_one(
    tmp_path: Path, arguments: list[str]
) -> None:
    """The other host ends by itself. What it was saving without the lost part is not mistaken for a checkpoint."""
    words = [*arguments, "--save-steps", "1", "--lr-schedule", "constant", "--warmup-ratio", "0"]
    endless = [*words, "--max-steps", "100000", "--checkpoint-path", str(tmp_path / "shared")]
    two = Hosts(tmp_path / "two", 2, endless)
    two.wait_for("step=6 of")
    two.signal(signal.SIGKILL, [1])
    assert two.wait() == [75, -9], two.logs()
    resumed = Hosts(tmp_path / "one", 1, endless)
    resumed.wait_for("resuming at step")
    step = int(re.findall(r"resuming at step (\d+) of", resumed.log())[0])
    assert step >= 1
    resumed.wait_for(f"step={step + 3} of")
    resumed.signal(signal.SIGTERM)
    assert resumed.wait() == [143], resumed.log()
    expected = run(tmp_path / "undisturbed", 1, [*words, "--max-steps", str(step + 3)])
    same_within(expected.column("train_loss")[step:], resumed.column("train_loss")[step : step + 3], 1e-6)


def test_bfloat16_trains_on_a_cpu_and_keeps_float32_parameters_and_sums(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str]
) -> None:
    one = undisturbed(whole, tmp_path_factory.mktemp("one"), 1, arguments)
    two = run(tmp_path, 2, [*arguments, "--precision", "bfloat16"])
    assert "2 hosts; bfloat16 on cpu" in two.log()
    losses = two.column("train_loss")
    same_within(one.column("train_loss"), losses, 0.05)
    assert losses != one.column("train_loss")
    saved = load_file(next((tmp_path / "algo-1/checkpoints").rglob("part.safetensors")))
    assert {tensor.dtype for name, tensor in saved.items() if name.startswith("model/")} == {torch.float32}


@pytest.mark.parametrize("scheduler", [of_torchrun, of_batch])
def test_hosts_that_another_scheduler_started_have_the_same_loss_and_end_when_one_is_lost(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: dict[str, Hosts], arguments: list[str],
    scheduler: Scheduler,
) -> None:  # fmt: skip
    one = undisturbed(whole, tmp_path_factory.mktemp("one"), 1, arguments)
    two = run(tmp_path / "two", 2, arguments, scheduler=scheduler)
    same_within(one.column("train_loss"), two.column("train_loss"), 1e-6)
    environ = {"ESTIBA_HOST_LOST_S": "3"}
    lost = Hosts(tmp_path / "lost", 2, [*arguments, "--max-steps", "400"], scheduler=scheduler, environ=environ)
    lost.wait_for("step=4 of")
    lost.signal_all(signal.SIGKILL, 1)
    assert lost.wait()[0] in (1, 75), lost.logs()  # torchrun has a status of its own
    assert "lost other ranks of the run" in lost.log()
    assert lost.failure().startswith("lost host node-1: no heartbeat for "), lost.failure()
