"""The settings of the job. Each is a flag, an environment variable and a hyperparameter."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from estiba.config import Config
from estiba.platform.contract import checkpoint_dir, root_of
from new_image.data import require_input


class CountConfig(Config):
    """Count the words in text files: one JSON Lines file per input file, with one record per line of text."""

    input_path: str = Field(default_factory=lambda: str(root_of() / "input/data/dataset"))
    """Directory or s3:// prefix of text files."""
    output_path: str = Field(default_factory=lambda: str(root_of() / "output/data"))
    """Directory or s3:// prefix; each output keeps its input's relative path."""
    checkpoint_path: str = Field(default_factory=lambda: str(checkpoint_dir()))
    """Directory or s3:// prefix for chunks of finished work. It outlives a spot host; the output directory does not."""
    chunk_lines: Annotated[int, Field(ge=1)] = 10_000
    """Lines in a chunk: the most work that a kill costs."""
    longest_word: bool = False
    """Add the longest word of each line."""

    def preflight(self) -> None:
        require_input(self.input_path)
