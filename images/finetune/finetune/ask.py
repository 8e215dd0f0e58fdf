"""`finetune ask`: one question to a finished model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from estiba.config import Config, load
from estiba.errors import ConfigError


class AskConfig(Config):
    """Ask a fine-tuned model a question, and print its answer."""

    model_dir: str
    """The output directory of a run."""
    system: str | None = None
    """A system message; the report shows the one that a table's questions were trained with."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Maximum number of tokens to generate."""
    device: str | None = None
    """Torch device; default is the GPU if there is one, else the CPU."""


def run(arguments: Sequence[str]) -> None:
    """Print the answer. Raises ConfigError."""
    flags, questions = _split(list(arguments))
    config = load(AskConfig, argv=flags, environ=None, hyperparameters=None, prog="finetune ask QUESTION")
    if len(questions) != 1:
        raise ConfigError(
            f'{len(questions)} questions; pass one, in quotes: finetune ask --model-dir {config.model_dir} "..."'
        )
    if not questions[0].strip():
        raise ConfigError("the question is empty; pass one, in quotes")
    folder = Path(config.model_dir)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model-dir {folder}: no config.json there; pass the output directory of a finished run")
    import torch

    from estiba.training.fit import select_device
    from finetune.answers import continuations
    from finetune.data.records import turns
    from finetune.model.base import find_base
    from finetune.tokens.chat import ChatRenderer
    from finetune.tokens.encode import Encoder

    base, device = find_base(str(folder.absolute()), folder), select_device(config.device)
    tokenizer = base.tokenizer()
    model = base.load(dtype=None, device=device).eval()
    encoder = Encoder(tokenizer, ChatRenderer(tokenizer, None), max_length=1 << 20)
    asked = encoder.guarded_all(turns(config.system, questions[0]))
    ids = torch.tensor([encoder.prompt(encoder.renderer.prompt(asked))], device=device)
    print(*continuations(model, encoder, ids, torch.ones_like(ids), max_new_tokens=config.max_new_tokens))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate flags with their values from the questions; every flag of `ask` takes one value."""
    flags: list[str] = []
    questions: list[str] = []
    while arguments:
        word = arguments.pop(0)
        if not word.startswith("--"):
            questions.append(word)
            continue
        flags.append(word)
        if "=" not in word and word != "--help" and arguments:
            flags.append(arguments.pop(0))
    return flags, questions
