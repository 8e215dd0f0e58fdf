"""Where a base model comes from: the hub, which may refuse or not answer, a secret with its token, S3; and its size."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import huggingface_hub.constants
import pytest
import tiny_model
import torch
from records_for_tests import encoder, row

from estiba.errors import ConfigError
from finetune.artifacts.report import licence_of
from finetune.config import FinetuneConfig
from finetune.model import base as base_module
from finetune.model import memory
from finetune.model.base import ALIASES, find_base
from finetune.model.hub_token import hub_token

TOKEN = "hf_of_the_test"
SECRET = "arn:aws:secretsmanager:eu-west-1:123456789012:secret:hub"
PARAMETER = "arn:aws:ssm:eu-west-1:123456789012:parameter/hub"


class Hub(http.server.BaseHTTPRequestHandler):
    """Two models: `open/model`, and `meta-llama/Llama-2-7b-hf`, which is gated. Who has TOKEN may read both."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.removeprefix("/api/models/").removesuffix("/auth-check")
        may_read = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in ("open/model", ALIASES["llama-2-7b"]):
            self._answer(404, {"error": "Repository not found"}, "RepoNotFound")
        elif name != "open/model" and self.path.endswith("/auth-check") and not may_read:
            self._answer(403, {"error": "gated"}, "GatedRepo")
        else:
            self._answer(200, {"id": name, "sha": "abc", "gated": name != "open/model" and "manual", "siblings": []})

    def _answer(self, status: int, document: dict[str, Any], code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(json.dumps(document).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests that a hub on this machine gets."""
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_ARN", "HUGGINGFACE_TOKEN_ARN"):
        monkeypatch.delenv(name, raising=False)
    _ask(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield Hub.asked
    server.shutdown()


def _ask(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.__init__", _with_endpoint(address))
    monkeypatch.setattr(base_module.BaseModel, "check_kind", lambda _: None)  # it downloads the configuration


def _with_endpoint(address: str) -> Any:
    original = huggingface_hub.HfApi.__init__

    def init(self: Any, *_: Any, **options: Any) -> None:
        original(self, **{**options, "endpoint": address})

    return init


def test_a_model_of_the_hub_is_known_by_its_commit(hub: list[str], tmp_path: Path) -> None:
    found = find_base("open/model", tmp_path)
    assert (found.name, found.identity, found.is_hub) == ("open/model", "abc", True)


def test_a_gated_model_without_access_names_its_licence_and_downloads_nothing(
    hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = r"accept its licence at https://huggingface\.co/meta-llama/Llama-2-7b-hf, then pass HF_TOKEN"
    with pytest.raises(ConfigError, match=f"no token was given; {page}"):
        find_base("llama-2-7b", tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_without_access")
    with pytest.raises(ConfigError, match=f"this account has no access; {page}"):
        find_base("Llama-2-7B", tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert find_base("llama-2-7b", tmp_path).name == "meta-llama/Llama-2-7b-hf"
    assert all(path.startswith("/api/models/") for path in hub), hub


def test_a_model_that_the_hub_does_not_have_is_named(hub: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llama-9: no such model on the hub, and no such directory; did you mean"):
        find_base("llama-9", tmp_path)


def test_a_hub_that_does_not_answer_is_met_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    _ask("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ConfigError, match=r"the hub does not answer .* an s3:// prefix, or a channel named `model`"):
        find_base("open/model", tmp_path)


@pytest.mark.parametrize(
    ("arn", "answer"),
    [(SECRET, TOKEN), (SECRET, json.dumps({"user": "me", "token": TOKEN})), (PARAMETER, f"{TOKEN}\n")],
)
def test_the_hubs_token_is_read_from_the_secret_that_the_environment_names(
    arn: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_ARN", arn)
    asked = []

    def client(service: str, region_name: str) -> Any:
        asked.append((service, region_name))
        return SimpleNamespace(
            get_secret_value=lambda SecretId: {"SecretString": answer},  # noqa: ARG005
            get_parameter=lambda Name, WithDecryption: {"Parameter": {"Value": answer}},  # noqa: ARG005
        )

    monkeypatch.setattr(boto3, "client", client)
    assert hub_token() == TOKEN
    assert asked == [(arn.split(":")[2], "eu-west-1")]


def test_a_secret_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_ARN", "arn:aws:s3:::bucket")
    with pytest.raises(ConfigError, match="not the ARN of a Secrets Manager secret or of an SSM parameter"):
        hub_token()


def test_a_base_model_on_s3_keeps_its_address_as_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model.build(tmp_path / "base")
    monkeypatch.setattr(base_module, "stage", lambda *_: folder)
    found = find_base("s3://bucket/model/", tmp_path)
    assert (found.name, found.location) == ("s3://bucket/model/", str(folder))


def test_the_report_names_the_licence_of_the_base(hub: list[str], tmp_path: Path) -> None:
    assert licence_of(find_base("open/model", tmp_path)) == "see https://huggingface.co/open/model"
    base = find_base(str(tiny_model.build(tmp_path / "base")), tmp_path)
    assert licence_of(base) == "see where the base model is from"
    (tmp_path / "base/LICENSE").write_text("Apache License")
    assert licence_of(base) == "LICENSE of the base model's directory"
    (tmp_path / "base/README.md").write_text(
        "---\ntags:\n- small\nlicense: apache-2.0\n---\n# A model\nlicense: none\n"
    )
    assert licence_of(base) == "apache-2.0"
    (tmp_path / "base/README.md").write_text("# A model\nlicense: none\n")
    assert licence_of(base) == "LICENSE of the base model's directory"


def _needs(folder: Path, config: FinetuneConfig) -> Any:
    """What `check_memory` looks at: a base and tokenized records."""
    examples = encoder().examples(row(Units="x", Value="1"))
    return SimpleNamespace(
        base=find_base(str(tiny_model.build(folder)), folder), training=SimpleNamespace(examples=examples)
    )


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FinetuneConfig(output_dir=str(tmp_path))
    inputs = _needs(tmp_path / "base", config)
    memory.check_memory(inputs, config, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 100_000)
    with pytest.raises(ConfigError, match=r"M parameters, lora, .* GB of 0\.0 GB of memory that is available"):
        memory.check_memory(inputs, config, torch.device("cpu"), torch.float32)
    monkeypatch.undo()
    gpu = SimpleNamespace(total_memory=0.5e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Small GPU")
    with pytest.raises(ConfigError, match=r"Small GPU has 0\.5 GB; pass --method qlora, a smaller --batch-size"):
        memory.check_memory(inputs, config, torch.device("cuda"), torch.bfloat16)


def test_a_disk_too_small_for_the_merged_model_is_met_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FinetuneConfig(output_dir=str(tmp_path))
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"the merged model needs .*use a larger volume \(VolumeSizeInGB\)"):
        memory.check_memory(_needs(tmp_path / "base", config), config, torch.device("cpu"), torch.float32)


def test_seven_billion_parameters_in_four_bits_fit_a_card_of_sixteen_gigabytes() -> None:
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig()  # its defaults are those of Llama 7B
    with init_empty_weights():
        model = LlamaForCausalLM(llama)
    need = {
        method: memory.estimate_memory(
            model, llama, FinetuneConfig(method=method), torch.bfloat16,
            tokens=4 * 2048, trained_tokens=4 * 200, checkpoints_activations=True,
        ).total / 1e9
        for method in ("qlora", "lora", "full")
    }  # fmt: skip
    assert 5 < need["qlora"] < 15 < need["lora"] < 24 < 80 < need["full"]
