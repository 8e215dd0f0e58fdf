"""The base model: where it is, whether it can be had, and loading it with its tokenizer."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from estiba.errors import ConfigError, EstibaError, first_line
from estiba.log import get_logger
from estiba.storage import stage
from finetune.model import packed_attention
from finetune.model.hub_token import hub_token

logger = get_logger(__name__)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

ALIASES = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-7b-chat": "meta-llama/Llama-2-7b-chat-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "mistral-7b-instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-3-4b": "google/gemma-3-4b-pt",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
}
"""Short names, as the fine-tuning document's `llama-2-7b`."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A base model that can be loaded."""

    name: str
    """As a user knows it: a hub id, or the address that was given. Never a temporary path."""
    location: str
    """A directory, or a hub id."""
    gguf_file: str | None
    identity: str
    """Digest of a directory's files; the commit of a hub model."""
    is_hub: bool

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ConfigError if there is none."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.location, **self._options())
        except Exception as error:
            raise ConfigError(
                f"{self.name}: its tokenizer cannot be loaded ({first_line(error)}); the directory needs "
                "tokenizer.json or the tokenizer's own files"
            ) from None
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or len(tokenizer) < 2:
            raise ConfigError(f"{self.name}: has no usable tokenizer; add its tokenizer.json")
        return tokenizer

    @functools.cached_property
    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.location, **self._options())

    def load(
        self, *, dtype: torch.dtype | None, quantization: Any = None, device: torch.device | None = None
    ) -> PreTrainedModel:
        """Load the weights. `dtype` None keeps that of the files.

        Raises ConfigError if they are damaged, incomplete, or no causal language model.
        """
        packed_attention.register()
        options: dict[str, Any] = {"dtype": dtype or "auto", "attn_implementation": packed_attention.NAME}
        on_gpu = device is not None and device.type == "cuda"
        if quantization is not None or on_gpu:  # straight to the GPU: the host may have less memory
            options["device_map"] = {"": device or "cpu"}
        if quantization is not None:
            options["quantization_config"] = quantization
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.location, output_loading_info=True, **options, **self._options()
            )
        except Exception as error:  # of configurations, weights and libraries: there is no common class
            raise ConfigError(
                f"{self.name}: cannot be loaded as a causal language model ({first_line(error)})"
            ) from None
        if missing := sorted(info["missing_keys"]):
            raise ConfigError(
                f"{self.name}: {len(missing)} weights are not in its files, such as {missing[0]}, and would be random; "
                "pass a complete causal language model"
            )
        if self.gguf_file:
            _forget_gguf(model)
        for layer in model.modules() if quantization is not None else ():
            # With AVX512-BF16 an evaluation would repack the weights in place, and later steps would train nothing.
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        assert isinstance(model, PreTrainedModel)
        return model if "device_map" in options or device is None else model.to(device)  # type: ignore[arg-type]

    def check_kind(self) -> None:
        """Raise ConfigError if the configuration is not that of a causal language model.

        transformers builds one of an encoder's weights too, whose tokens see those that follow.
        """
        if self.gguf_file:
            return
        try:
            named = self.config.architectures or []
        except Exception as error:
            raise ConfigError(f"{self.name}: its config.json cannot be used ({first_line(error)})") from None
        if named and not set(named) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
            raise ConfigError(
                f"{self.name}: is a {named[0]}, not a causal language model; pass one, such as a Llama, Qwen or Mistral"
            )

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"trust_remote_code": False}
        if self.gguf_file:
            options["gguf_file"] = self.gguf_file
        if self.is_hub:
            options["token"] = hub_token()
        else:
            options["local_files_only"] = True
        return options


def find_base(name: str | None, channel: Path) -> BaseModel:
    """Resolve a hub id, an alias, a directory or an `s3://` prefix; None uses the channel `model`.

    Everything is checked that can be without the weights: that the model exists, may be used, and is a causal language
    model. Raises ConfigError.
    """
    base = _find(name, channel)
    base.check_kind()
    return base


def _find(name: str | None, channel: Path) -> BaseModel:
    if not name:
        if not channel.is_dir() or not any(channel.iterdir()):
            raise ConfigError(
                "no base model: pass --base-model (a hub id, a directory, or an s3:// prefix), or give the job a "
                "channel named `model`"
            )
        return _local(channel, f"channel {channel.name}")
    if name.startswith("s3://"):
        folder = Path(tempfile.gettempdir()) / f"estiba-base-{xxhash.xxh3_64_hexdigest(name.rstrip('/').encode())}"
        return _local(stage(name, folder), name)
    if name.startswith("file://"):
        name = name.removeprefix("file://")
    if Path(name).is_dir() or name.startswith(("/", ".", "~")):
        return _local(Path(name).expanduser(), name)
    return _on_hub(ALIASES.get(name.lower(), name), name)


def _local(folder: Path, name: str) -> BaseModel:
    if not folder.is_dir():
        raise ConfigError(f"{name}: no such directory; pass a model directory, an s3:// prefix, or a hub id")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ConfigError(
            f"{name}: holds an adapter and no base model; pass its merged model, or the base that it was made for"
        )
    names = {path.name for path in folder.iterdir()}
    gguf = sorted(item for item in names if item.endswith(".gguf"))
    has_weights = any(item.endswith(".safetensors") for item in names)
    if not has_weights and len(gguf) != 1:
        pickled = sorted(item for item in names if item.endswith((".bin", ".pt", ".pth")))
        if pickled:
            raise ConfigError(
                f"{name}: its weights are pickled ({pickled[0]}), which can run code when read; convert them to "
                "safetensors"
            )
        found = ", ".join(sorted(names)[:4]) or "nothing"
        raise ConfigError(f"{name}: no *.safetensors and not one *.gguf in it, but {found}; pass a model directory")
    if has_weights and "config.json" not in names:
        raise ConfigError(f"{name}: has no config.json; pass the directory that save_pretrained wrote")
    try:
        identity = _identity(folder)
    except OSError as error:
        raise ConfigError(f"{name}: {error.filename} cannot be read ({error.strerror}) by user {os.getuid()}") from None
    return BaseModel(
        name=name,
        location=str(folder),
        gguf_file=None if has_weights else gguf[0],
        identity=identity,
        is_hub=False,
    )


def _on_hub(hub_id: str, given: str) -> BaseModel:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        if (cached := _cached(hub_id)) is not None:
            return cached
        raise ConfigError(
            f"--base-model {given}: HF_HUB_OFFLINE is set and the model is not in the cache; pass a directory or an "
            "s3:// prefix with the model, or give the job a channel named `model`"
        )
    token = hub_token()
    try:
        info = HfApi(token=token).model_info(hub_id, timeout=20)
        if info.gated and not token:
            raise ConfigError(_gated(hub_id, "no token was given"))
        HfApi(token=token).auth_check(hub_id)
    except GatedRepoError:
        raise ConfigError(_gated(hub_id, "this account has no access")) from None
    except (RepositoryNotFoundError, HFValidationError):
        hint = f"; did you mean an alias: {', '.join(sorted(ALIASES)[:6])}, ..." if "/" not in given else ""
        raise ConfigError(f"--base-model {given}: no such model on the hub, and no such directory{hint}") from None
    except EstibaError:
        raise
    except Exception as error:
        if (cached := _cached(hub_id)) is not None:
            logger.warning(f"the hub does not answer ({first_line(error)}); using the cached copy of {hub_id}")
            return cached
        raise ConfigError(
            f"--base-model {given}: the hub does not answer ({first_line(error)}); a job without internet (a VPC, a "
            "test) needs the model as a directory, an s3:// prefix, or a channel named `model`"
        ) from None
    return BaseModel(name=hub_id, location=hub_id, gguf_file=None, identity=str(info.sha), is_hub=True)


def _cached(hub_id: str) -> BaseModel | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        path = try_to_load_from_cache(hub_id, "config.json")
    except ValueError:
        return None
    if not isinstance(path, str):
        return None
    return BaseModel(name=hub_id, location=hub_id, gguf_file=None, identity=Path(path).parent.name, is_hub=True)


def _gated(hub_id: str, why: str) -> str:
    return (
        f"{hub_id}: the model is gated and {why}; accept its licence at https://huggingface.co/{hub_id}, then pass "
        "HF_TOKEN (locally by --env-file), or HF_TOKEN_ARN with the ARN of a Secrets Manager secret or an SSM parameter"
    )


def _identity(folder: Path) -> str:
    """Digest the files that decide the model, whole: they are all read anyway, and no changed weight goes unnoticed."""
    digest = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix in (".md", ".png", ".txt"):
            continue
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(8 << 20):
                digest.update(block)
    return digest.hexdigest()


def _forget_gguf(model: PreTrainedModel) -> None:
    """The weights are plain tensors now, and must be saved as such."""
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.hf_quantizer = None
    model.is_quantized = False
