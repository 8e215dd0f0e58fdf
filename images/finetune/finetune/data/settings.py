"""The settings of the data front end. The image's configuration inherits them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from estiba.config import Config

OnBadRow = Literal["limit", "fail", "skip"]
TextFormat = Literal["auto", "lines", "document"]


class DataSettings(Config):
    """How files become training records."""

    on_bad_row: OnBadRow = "limit"
    """Rows that cannot be used: limit skips and counts up to 1%, fail stops at the first, skip accepts any number."""
    text_column: str | None = None
    """Train on this column's text alone; default is to recognise the records by their columns."""
    target_columns: tuple[str, ...] | None = None
    """Columns of a table to ask for; default is those that other columns decide, and numbers that none predicts."""
    key_columns: tuple[str, ...] | None = None
    """Columns of a table that a question states; default is the fewest that decide the targets and tell rows apart."""
    template: str | None = None
    """A Jinja file that turns a row into text; default is one made from the columns, which the report shows."""
    group_by: str | None = None
    """Rows with the same value in this column stay on one side of the validation split."""
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the records to hold out, whole groups at a time."""
    max_records: Annotated[int, Field(ge=1)] | None = None
    """Use a random sample of this many records."""
    encoding: str | None = None
    """Encoding of all text files, such as cp1252; default is to detect it."""
    csv_delimiter: str | None = None
    """One character, or `tab`; default is to detect it."""
    csv_quote: str | None = None
    """One character, or `no` if quotes are ordinary characters; default is to detect it."""
    csv_header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first row of a CSV file names the columns."""
    text_format: TextFormat = "auto"
    """Whether a text file has one record per line or is one document; auto detects it."""
    text_chunk_chars: Annotated[int, Field(ge=100)] = 4000
    """Longest piece of a text record; a longer text becomes several records of one group."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the split and of the sample."""

    @field_validator("csv_delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        if value is None or value in ("tab", "\\t") or (len(value) == 1 and value not in '"\r\n'):
            return value
        raise ValueError("a delimiter is one character, or `tab`")

    @field_validator("csv_quote")
    @classmethod
    def _check_quote(cls, value: str | None) -> str | None:
        if value is None or value == "no" or (len(value) == 1 and value not in "\r\n"):
            return value
        raise ValueError("a quote is one character, or `no`")
