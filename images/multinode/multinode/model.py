"""A Hugging Face causal language model, built without memory, sharded, then filled from safetensors rank by rank."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from estiba.checkpoint.sharded.format import shard_rows
from estiba.errors import ConfigError, first_line
from estiba.log import get_logger
from estiba.storage import FileStore, Store, open_store
from estiba.training.sharding import shard_layers
from multinode.weights import Weights, names_of

logger = get_logger(__name__)
MAX_SMALL_FILE_BYTES = 100 << 20
SMALL_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")


@dataclass(frozen=True)
class BaseModel:
    """A model's configuration and tokenizer in a local directory, and the place of its weights."""

    location: str
    folder: Path
    store: Store
    config: Any
    dtype: torch.dtype
    """Of the stored weights; building the model changes its configuration's."""

    def tokenizer(self) -> Any:
        """Raises ConfigError."""
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:
            raise ConfigError(
                f"{self.location}: its tokenizer cannot be loaded ({first_line(error)}); copy it again"
            ) from None


def find_base(location: str) -> BaseModel:
    """Read a model's configuration; its weights stay where they are. Raises ConfigError."""
    store = open_store(location)
    folder = store.root if isinstance(store, FileStore) else _small_files(store)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"{location}: config.json cannot be read ({first_line(error)}); give a model that transformers knows"
        ) from None
    dtype = getattr(config, "dtype", None)
    return BaseModel(location, folder, store, config, dtype if isinstance(dtype, torch.dtype) else torch.float32)


def _small_files(store: Store) -> Path:
    """Copy everything but the weights from S3."""
    folder = Path(tempfile.mkdtemp(prefix="estiba-model-"))
    for entry in store.list():
        is_small = entry.size_bytes <= MAX_SMALL_FILE_BYTES
        if "/" not in entry.path and is_small and Path(entry.path).suffix in SMALL_SUFFIXES:
            (folder / entry.path).write_bytes(store.read(entry.path))
    return folder


def load_sharded(base: BaseModel, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model in float32, sharded over the mesh; `dtype` is that of the computation.

    A rank reads its own rows of each tensor, so its memory holds its shard and one range of a file. Raises ConfigError.
    """
    config = base.config
    config.use_cache = False
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"{base.location}: is no causal language model ({first_line(error)})") from None
    model.tie_weights()
    shard_layers(model, _layers(model), mesh, dtype=dtype)
    weights = Weights(base.store)
    owners: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    parameters = dict(model.named_parameters())
    persistent = _persistent(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    stored = names_of(weights, {**parameters, **buffers}, model.base_model_prefix)
    _make_buffers(model, weights, stored, persistent, device)
    for name, parameter in parameters.items():
        loaded = _load_shard(weights, stored[name], parameter, mesh, device)
        for module, attribute in owners[id(parameter)]:  # a tied one has several
            module._parameters[attribute] = loaded
    return model


def _layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The repeated blocks, each of which is gathered alone. Raises ConfigError."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(f"{type(model).__name__}: names no layers (_no_split_modules); it cannot be sharded here")
    return layers


def _load_shard(
    weights: Weights, name: str, parameter: torch.nn.Parameter, mesh: DeviceMesh, device: torch.device
) -> torch.nn.Parameter:
    assert isinstance(parameter, DTensor)
    source = weights.sources[name]
    if source.shape != tuple(parameter.shape):
        raise ConfigError(
            f"{weights.store.url}: {name} has the shape {list(source.shape)}, and its config.json says "
            f"{list(parameter.shape)}; the two must belong together"
        )
    start, stop = shard_rows(source.shape[0], mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1))
    local = torch.empty((stop - start, *source.shape[1:]), dtype=torch.float32, device=device)
    if local.numel():
        weights.read_into(name, local, start)
    sharded = DTensor.from_local(
        local, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return torch.nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def _persistent(model: torch.nn.Module) -> set[str]:
    return set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _make_buffers(
    model: PreTrainedModel, weights: Weights, stored: dict[str, str], persistent: set[str], device: torch.device
) -> None:
    """Read the buffers that are stored, and compute the others, such as rotary frequencies. Raises ConfigError."""
    computed = []
    for prefix, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            value = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            module._buffers[attribute] = value
            if name in persistent:
                weights.read_into(stored[name], value, 0)
            else:
                if value.is_floating_point():
                    value.fill_(torch.nan)
                computed.append((name, module, attribute))
    with torch.no_grad():
        for module in {id(module): module for _, module, _ in computed}.values():
            for parameter in module._parameters.values():
                if parameter is not None:  # transformers leaves it alone then
                    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
            model._init_weights(module)
    for name, module, attribute in computed:
        value = module._buffers[attribute]
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ConfigError(
                f"{type(model).__name__}: its buffer {name} is computed in a way that this image does not know; "
                "train it with a script of your own"
            )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def write_config(base: BaseModel, dtype: torch.dtype, folder: Path) -> None:
    """Write config.json, the generation settings and the tokenizer's files beside the final weights."""
    for path in sorted(base.folder.iterdir()):
        if path.is_file() and path.suffix in SMALL_SUFFIXES and not path.name.endswith(".index.json"):
            FileStore(folder).write(path.name, path.read_bytes())
    settings = json.loads((base.folder / "config.json").read_bytes())
    settings.pop("torch_dtype", None)  # its older name
    settings["dtype"] = str(dtype).removeprefix("torch.")
    FileStore(folder).write("config.json", (json.dumps(settings, indent=2) + "\n").encode())
