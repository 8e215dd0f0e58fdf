"""The commands beside training.

aura plan --hours 72 --gpu A100-80GB
aura tokenizer train --dataset-path corpus.txt --vocab-size 32768 --output-dir tokenizer
aura export --checkpoint checkpoints --to checkpoint-step-500.pt        # or --to FOLDER --form hf|dcp
aura sample --model-dir out --prompt "Había una vez"
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field

from estiba.config import Config, load
from estiba.errors import CheckpointError, ConfigError, EstibaError
from estiba.stop import say


class TokenizerConfig(Config):
    """Train a byte-level BPE tokenizer for Spanish; the same text gives the same bytes."""

    dataset_path: str
    """Text, as training takes it."""
    output_dir: str
    """New directory for it."""
    vocab_size: Annotated[int, Field(ge=300)] = 32_768
    """Tokens."""
    text_format: Literal["auto", "running", "lines"] = "auto"
    """Whether a .txt is running text or has a document on each line."""


class ExportConfig(Config):
    """Write a verified checkpoint in another form."""

    checkpoint: str
    """A checkpoint's directory, or the directory of them all, of which the newest that verifies is taken."""
    to: str
    """A .pt file, or a new directory."""
    form: Literal["pt", "hf", "dcp"] | None = None
    """pt: one file for torch.load and --resume-from. hf: a Hugging Face directory. dcp: torch.distributed.checkpoint.
    Default is pt for a name that ends in .pt, else hf."""
    tokenizer_name_or_path: str | None = None
    """For hf; default is the one that lies beside the checkpoints."""


class SampleConfig(Config):
    """Write on from a prompt with a finished model."""

    model_dir: str
    """The output directory of a run."""
    prompt: str = "Había una vez"
    """What the text begins with."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 120
    """Most tokens to add."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """0 takes the likeliest token always."""
    top_k: Annotated[int, Field(ge=1)] | None = 50
    """Likeliest tokens to draw from; none is all."""
    seed: int = 42
    """Of the draw."""


def run(arguments: Sequence[str]) -> NoReturn:
    """Run one command and end the process. A mistake ends in one message."""
    for words, command in COMMANDS.items():
        if tuple(arguments[: len(words)]) == words:
            code = 0
            try:
                code = command(list(arguments[len(words) :])) or 0
            except EstibaError as error:
                say(f"error: {error}")
                code = error.exit_code
            sys.stdout.flush()
            os._exit(code)
    known = ", ".join("aura " + " ".join(words) for words in COMMANDS)
    say(f"error: unknown command {' '.join(arguments[:2])!r}; known: {known}; flags alone train")
    os._exit(ConfigError.exit_code)


def _plan(arguments: list[str]) -> int:
    from aura.planner import main

    return main(arguments)


def _tokenizer(arguments: list[str]) -> None:
    from aura.documents import read_documents
    from aura.tokenizer import train_tokenizer

    config = _load(TokenizerConfig, arguments)
    folder = Path(config.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output-dir {folder}: is there already and not empty; give a new directory")
    made = train_tokenizer(
        read_documents(config.dataset_path, config.text_format), vocab_size=config.vocab_size, folder=folder
    )
    if made.vocab_size < config.vocab_size:
        say(f"{made.vocab_size} of the {config.vocab_size} tokens asked for: no more occur twice in this text")
    say(f"{folder}: {made.vocab_size} tokens; pass --tokenizer-name-or-path {folder}")


def _export(arguments: list[str]) -> None:
    from estiba.checkpoint.exports import export_dcp, export_pt

    config = _load(ExportConfig, arguments)
    target = Path(config.to)
    form = config.form or ("pt" if target.suffix == ".pt" else "hf")
    found = _newest(Path(config.checkpoint))
    if form == "pt":
        export_pt(found.state, target, {"model_config": found.state["plan"]["model"]})
    elif form == "dcp":
        export_dcp(found.state, target)
    else:
        from aura.export import hf_directory
        from aura.model import Aura, Shape

        model = Aura(Shape(**found.state["plan"]["model"]), seed=0)
        model.load_state_dict(found.state["model"])
        hf_directory(model, _tokenizer_beside(config, found), target)
    say(f"{target}: step {found.step} of {found.path}, as {form}")


def _newest(path: Path) -> Any:
    from estiba.checkpoint import directory
    from estiba.checkpoint.saver import load as load_checkpoint

    if (path / directory.MANIFEST).exists():
        return load_checkpoint(path)
    if not path.is_dir():
        raise ConfigError(
            f"--checkpoint {path}: no such directory; give the directory of a run's checkpoints, or one of them"
        )
    names = directory.names_in(path)
    for name in names:
        try:
            return load_checkpoint(path / name)
        except CheckpointError as error:
            say(f"warning: {error}; taking the one before")
    raise CheckpointError(f"--checkpoint {path}: {len(names)} checkpoints there and none verifies; give another place")


def _tokenizer_beside(config: ExportConfig, found: Any) -> Any:
    from aura.tokenizer import load_tokenizer

    wanted = found.state["plan"]["tokenizer"]
    places = [config.tokenizer_name_or_path] if config.tokenizer_name_or_path else []
    places += [str(place) for place in sorted(found.path.parent.glob("tokenizer-*"))] if not places else []
    for place in places:
        tokenizer = load_tokenizer(place)
        if tokenizer.identity == wanted:
            return tokenizer
    raise ConfigError(
        f"{found.path}: its tokenizer is not at {places or found.path.parent}; pass --tokenizer-name-or-path "
        "with the one that it was trained with"
    )


def _sample(arguments: list[str]) -> None:
    from aura.export import load_final_model
    from aura.sample import sample
    from aura.tokenizer import load_tokenizer

    config = _load(SampleConfig, arguments)
    folder = Path(config.model_dir)
    if not (folder / "final_model.pt").exists():
        raise ConfigError(f"--model-dir {folder}: has no final_model.pt; give the output directory of a finished run")
    model, _ = load_final_model(folder / "final_model.pt")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    text = sample(
        model,
        tokenizer,
        config.prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
    )
    print(text)


def _load(kind: Any, arguments: list[str]) -> Any:
    return load(kind, argv=arguments, environ=None, hyperparameters=None)


COMMANDS: dict[tuple[str, ...], Callable[[list[str]], int | None]] = {
    ("plan",): _plan,
    ("tokenizer", "train"): _tokenizer,
    ("export",): _export,
    ("sample",): _sample,
}
