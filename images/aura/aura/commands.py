"""All commands except training.

aura plan --hours 72 --gpu A100-80GB
aura tokenizer train --dataset-path corpus.txt --vocab-size 32768 --output-dir tokenizer
aura export --checkpoint checkpoints --to checkpoint-step-500.pt        # or --to FOLDER --form hf|dcp
aura sample --model-dir out --prompt "Había una vez"
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from estiba.config import Config, load
from estiba.errors import CheckpointError, ConfigError
from estiba.log import get_logger
from estiba.platform.workload import Commands
from estiba.storage import FileStore, open_store, split_location, stage

if TYPE_CHECKING:
    from aura.tokenizer.loading import Tokenizer
    from estiba.checkpoint.restore import Restored

logger = get_logger(__name__)


class TokenizerConfig(Config):
    """Train a byte-level BPE tokenizer for Spanish; the same text gives the same bytes."""

    dataset_path: str
    """Text in any format that training accepts."""
    output_dir: str
    """New directory for the tokenizer."""
    vocab_size: Annotated[int, Field(ge=300)] = 32_768
    """Number of tokens."""
    text_format: Literal["auto", "running", "lines"] = "auto"
    """Whether a .txt is running text or has one document per line."""


class ExportConfig(Config):
    """Export a verified checkpoint to another format."""

    checkpoint: str
    """A checkpoint, or a directory of checkpoints, of which the newest that verifies is exported; also on S3."""
    to: str
    """A .pt file, or a new directory."""
    form: Literal["pt", "hf", "dcp"] | None = None
    """pt: one file for torch.load and --resume-from. hf: a Hugging Face directory. dcp: torch.distributed.checkpoint.
    Default is pt for a name that ends in .pt, else hf."""
    tokenizer_name_or_path: str | None = None
    """For hf; default is the tokenizer beside the checkpoints."""


class SampleConfig(Config):
    """Generate text from a prompt with a finished model."""

    model_dir: str
    """The output directory of a run."""
    prompt: str = "Había una vez"
    """How the text starts."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 120
    """Maximum number of tokens to generate."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Sampling temperature; 0 always picks the likeliest token."""
    top_k: Annotated[int, Field(ge=1)] | None = 50
    """How many of the likeliest tokens to sample from; none means all."""
    seed: int = 42
    """Random seed."""


def _plan(arguments: list[str]) -> None:
    from aura.planning.config import PlanConfig

    config = _load(PlanConfig, arguments)
    from aura.planning.planner import plan  # as all imports below a _load: torch, which --help does not need

    plan(config)


def _tokenizer(arguments: list[str]) -> None:
    from aura.data.documents import read_documents
    from aura.tokenizer.training import train_tokenizer

    config = _load(TokenizerConfig, arguments)
    folder = Path(config.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output-dir {folder}: exists and is not empty; give a new directory")
    texts = read_documents(config.dataset_path, config.text_format)
    size = train_tokenizer(texts, vocab_size=config.vocab_size, folder=folder).vocab_size
    if size < config.vocab_size:
        logger.info(f"{size} tokens instead of {config.vocab_size}, because no others occur twice in this text")
    logger.info(f"{folder}: {size} tokens; pass --tokenizer-name-or-path {folder}")


def _export(arguments: list[str]) -> None:
    config = _load(ExportConfig, arguments)
    from estiba.checkpoint.exports import export_dcp, export_pt
    from estiba.checkpoint.restore import load_newest

    target = Path(config.to)
    form = config.form or ("pt" if target.suffix == ".pt" else "hf")
    checkpoint = load_newest(_fetched(config.checkpoint), flag="--checkpoint")
    if form == "pt":
        export_pt(checkpoint.state, target, {"model_config": checkpoint.state["plan"]["model"]})
    elif form == "dcp":
        export_dcp(checkpoint.state, target)
    else:
        from aura.artifacts.export import write_hf_directory
        from aura.model.decoder import Aura, ModelConfig

        model = Aura(ModelConfig(**checkpoint.state["plan"]["model"]), seed=0)
        model.load_state_dict(checkpoint.state["model"])
        write_hf_directory(model, _find_tokenizer(config, checkpoint), target)
    logger.info(f"{target}: step {checkpoint.step} of {checkpoint.path}, as {form}")


def _fetched(location: str) -> Path:
    """Return a local path: of a checkpoint on S3, or of the newest one below a prefix, a verified copy."""
    if "://" not in location:
        return Path(location)
    from estiba.checkpoint.format import step_and_copy
    from estiba.checkpoint.remote import Remote

    parent, name = split_location(location)
    store = open_store(location)
    if isinstance(store, FileStore):
        return store.root
    store.answers()
    remote = Remote(parent) if step_and_copy(name) else Remote(location)
    names = [name] if step_and_copy(name) else remote.names()
    if not names:
        raise ConfigError(f"--checkpoint {location}: contains no checkpoint (step-.../manifest.json); give another URL")
    folder = Path(tempfile.mkdtemp(prefix="estiba-export-"))
    for path in {entry.path.split("/")[0] for entry in remote.store.list()}:
        if path.startswith("tokenizer-"):
            stage(f"{remote.url}/{path}", folder / path)
    for name in names:
        try:
            return folder / remote.fetch(name, folder)
        except CheckpointError as error:
            logger.warning(f"{error}; falling back to the previous checkpoint")
    raise CheckpointError(f"--checkpoint {location}: no checkpoint verifies; give another URL")


def _find_tokenizer(config: ExportConfig, checkpoint: Restored) -> Tokenizer:
    from aura.tokenizer.loading import load_tokenizer

    folder = checkpoint.path.parent
    candidates = [config.tokenizer_name_or_path] if config.tokenizer_name_or_path else folder.glob("tokenizer-*")
    for candidate in sorted(map(str, candidates)):
        tokenizer = load_tokenizer(candidate)
        if tokenizer.identity == checkpoint.state["plan"]["tokenizer"]:
            return tokenizer
    raise ConfigError(
        f"{checkpoint.path}: its tokenizer is not at {config.tokenizer_name_or_path or folder}; pass "
        "--tokenizer-name-or-path with the tokenizer it was trained with"
    )


def _sample(arguments: list[str]) -> None:
    config = _load(SampleConfig, arguments)
    from aura.artifacts.export import load_final_model
    from aura.artifacts.sample import sample
    from aura.tokenizer.loading import load_tokenizer

    folder = Path(config.model_dir)
    if not (folder / "final_model.pt").exists():
        raise ConfigError(f"--model-dir {folder}: has no final_model.pt; give the output directory of a finished run")
    model, _ = load_final_model(folder / "final_model.pt")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    settings = config.model_dump(exclude={"model_dir", "prompt"})
    print(sample(model, tokenizer, config.prompt, **settings))


def _load(cls: Any, arguments: list[str]) -> Any:
    return load(cls, argv=arguments, environ=None, hyperparameters=None)


COMMANDS: Commands = {"plan": _plan, "tokenizer train": _tokenizer, "export": _export, "sample": _sample}
