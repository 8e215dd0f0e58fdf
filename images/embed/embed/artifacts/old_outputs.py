"""Outputs of an earlier run whose vectors `--reuse` takes: what is there, and whether its settings are this job's."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embed.artifacts.outputs import RESULTS_NAME
from embed.artifacts.written import ENGINES_KEY, METADATA_KEY
from embed.config import EmbedConfig
from embed.data.chunks import REUSED
from embed.data.files import MAGIC, PARALLEL_READS, READ_AS, one_line, table_of, why_not_text
from embed.data.known_vectors import size_bytes
from embed.data.table import InputFile, Table
from estiba.errors import ConfigError, StoreError
from estiba.log import get_logger
from estiba.storage import Entry, Store, open_store

logger = get_logger(__name__)

SHOWN = 5
NO_SETTING = frozenset(
    "estiba output_id source model commit text_column embedding_column embedding_dtype "
    "embedding_decode sparse multi_vector torch transformers sentence_transformers tokenizers".split()
)
"""Provenance that does not change a vector, beside what is compared by itself."""
FLAGS = {"digest": "--model", "pooling": "--model", "products": "--dtype"}
VECTOR_DTYPES = {"float32": pa.float32(), "float16": pa.float16()}


@dataclass(frozen=True, kw_only=True)
class OldFile:
    table: Table
    text_column: str
    vector_column: str


@dataclass(frozen=True, kw_only=True)
class OldOutputs:
    """The readable outputs below one location. All have the same settings."""

    location: str
    files: tuple[OldFile, ...]
    settings: dict[str, str]
    model: str
    dtype: str
    """Stored precision."""
    computed_by: dict[str, Any]

    @property
    def rows(self) -> int:
        return sum(file.table.rows for file in self.files)

    @property
    def dimensions(self) -> int:
        return int(self.settings["dimensions"])

    def refuse_other_settings(self, config: EmbedConfig, identity: Mapping[str, str] | None = None) -> None:
        """Raise ConfigError if the vectors are not those of this job.

        Without the model's `identity` only the settings that are given are compared, before the model is loaded.
        """
        wanted = given_settings(config) if identity is None else settings_of(identity)
        names = set(wanted)
        if identity is not None:
            exact_will_do = self.settings.get("products") == "float32"
            names |= set(self.settings) - ({"products"} if exact_will_do else set())
        wrong = [
            f"{_flag(name)} {self._shown(name, self.settings.get(name), self.model)} there and "
            f"{self._shown(name, wanted.get(name), (identity or {}).get('model', ''))} here"
            for name in sorted(names)
            if wanted.get(name) != self.settings.get(name)
        ]
        if self.dtype not in VECTOR_DTYPES:
            wrong.append(
                f"--embedding-dtype {self.dtype} there, of which only {' and '.join(VECTOR_DTYPES)} can be reused"
            )
        elif self.dtype == "float16" != config.embedding_dtype:  # int8 and binary would be rounded twice
            wrong.append(f"--embedding-dtype float16 there and {config.embedding_dtype} here, which needs more bits")
        if wrong:
            raise ConfigError(
                f"--reuse {self.location}: its vectors are not those of this job ({'; '.join(wrong)}); pass the same "
                "settings, or leave out --reuse to compute all rows"
            )

    def require_disk(self) -> None:
        """Raise ConfigError if the vectors do not fit into the temporary directory."""
        needed, folder = size_bytes(self.rows, self.dimensions, self.dtype), tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ConfigError(
                f"--reuse {self.location}: {self.rows} vectors take {needed / 1e9:.2f} GB in {folder} while the job "
                f"runs, and {free / 1e9:.2f} GB are free; make room, or set TMPDIR to a larger directory"
            )
        logger.info(
            f"--reuse {self.location}: {self.rows} old rows in {len(self.files)} files; their vectors take up to "
            f"{needed / 1e9:.2f} GB in {folder} while the job runs"
        )

    @staticmethod
    def _shown(name: str, value: str | None, model: str) -> str:
        if value is None:
            return "not set"
        return f"{model} ({value})" if name == "digest" else repr(value)


def _flag(name: str) -> str:
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def settings_of(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The part of a provenance that changes a vector. What a later version adds to it counts until it is known."""
    return {name: str(value) for name, value in provenance.items() if name not in NO_SETTING}


def given_settings(config: EmbedConfig) -> dict[str, str]:
    """The settings that have their value before the model is loaded."""
    given: dict[str, Any] = {"prompt": config.prompt, "max_length": config.max_length, "dimensions": config.dimensions}
    if config.dtype != "auto":
        given["dtype"] = "float32" if config.dtype == "int8" else config.dtype
    if config.dtype in ("float32", "int8"):
        given["products"] = config.dtype
    settings = {name: str(value) for name, value in given.items() if value is not None}
    return {**settings, "normalize": str(config.normalize).lower()}


def find_old_outputs(config: EmbedConfig) -> OldOutputs | None:
    """What `--reuse` names. Raises ConfigError if it holds no outputs, or outputs that cannot be reused."""
    if config.reuse is None:
        return None
    store = open_store(config.reuse)
    entries = [entry for entry in store.list() if not RESULTS_NAME.fullmatch(entry.path)]
    with ThreadPoolExecutor(PARALLEL_READS) as threads:
        looked = list(threads.map(lambda entry: _look(store, entry), entries))
    found = [item for item in looked if isinstance(item, _Found)]
    damaged = [item for item in looked if isinstance(item, _Damaged)]
    others = [entry.path for entry, item in zip(entries, looked, strict=True) if item is None]
    if others:
        logger.info(f"--reuse {config.reuse}: {len(others)} files are no outputs of this image: {_names(others)}")
    for item in damaged:
        logger.warning(f"--reuse {config.reuse}: {item.path} is damaged ({item.reason}); its rows are computed")
    if not found:
        raise ConfigError(
            f"--reuse {config.reuse}: no output of an earlier run is there (found {_names(others) or 'nothing'}); "
            "pass the --output-path of that run, or leave out --reuse"
        )
    _refuse_mixed(config.reuse, found)
    first = found[0].provenance
    old = OldOutputs(
        location=config.reuse,
        files=tuple(_file_of(config, item) for item in found),
        settings=settings_of(first),
        model=str(first.get("model")),
        dtype=str(first.get("embedding_dtype")),
        computed_by={"engine": REUSED, "computed_by": _engines_of(found)},
    )
    old.refuse_other_settings(config)
    for file in old.files:
        _refuse_without_columns(old, file)
    old.require_disk()
    return old


@dataclass(frozen=True, kw_only=True)
class _Found:
    table: Table
    provenance: dict[str, Any]
    computed_by: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Damaged:
    path: str
    reason: str


def _look(store: Store, entry: Entry) -> _Found | _Damaged | None:
    """Read a footer. None if the file is no output of this job layer."""
    try:
        with store.open(entry.path, entry.size_bytes, etag=entry.etag) as file:
            if entry.size_bytes < len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
                return None
            file.seek(0)
            parquet = pq.ParquetFile(file, **READ_AS)
            metadata = parquet.metadata.metadata or {}
            if METADATA_KEY not in metadata:
                return None
            provenance = json.loads(metadata[METADATA_KEY])
            if "output_id" not in provenance:
                return None
            listed = InputFile(path=entry.path, size_bytes=entry.size_bytes, etag=entry.etag)
            ranges = json.loads(metadata.get(ENGINES_KEY.encode(), b"[]"))
            return _Found(
                table=table_of(listed, "", None, parquet),
                provenance=provenance,
                computed_by=[engine for item in ranges for engine in item["engines"]],
            )
    except StoreError as error:
        if store.is_durable:
            raise
        return _Damaged(path=entry.path, reason=str(error))
    except Exception as error:  # a damaged footer can make a reader raise anything
        return _Damaged(path=entry.path, reason=one_line(error))


def _refuse_mixed(location: str, found: list[_Found]) -> None:
    """Raise ConfigError if two outputs have other settings."""

    def compared(item: _Found) -> dict[str, str]:
        return {**settings_of(item.provenance), "embedding_dtype": str(item.provenance.get("embedding_dtype"))}

    first = compared(found[0])
    for item in found[1:]:
        other = compared(item)
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"--reuse {location}: holds vectors of two kinds: {_flag(name)} is {first.get(name)!r} in "
                    f"{found[0].table.path} and {other.get(name)!r} in {item.table.path}; pass a folder of one run"
                )


def _file_of(config: EmbedConfig, item: _Found) -> OldFile:
    return OldFile(
        table=item.table,
        text_column=str(item.provenance.get("text_column")),
        vector_column=str(item.provenance.get("embedding_column", config.embedding_column)),  # 0.1.0 did not say
    )


def _refuse_without_columns(old: OldOutputs, file: OldFile) -> None:
    """Raise ConfigError if an output lacks its text, by which its rows are known, or its vectors."""
    schema = file.table.schema
    if why_not_text(file.table, file.text_column, binary_as_text=True) is not None:
        raise ConfigError(
            f"--reuse {old.location}: {file.table.path} has no text column {file.text_column!r} (found "
            f"{sorted(schema.names)}), by which its rows are known; run that job again with the column in --columns"
        )
    kind = pa.list_(VECTOR_DTYPES[old.dtype], old.dimensions)
    if file.vector_column not in schema.names or schema.field(file.vector_column).type != kind:
        raise ConfigError(
            f"--reuse {old.location}: {file.table.path} has no column {file.vector_column!r} of {kind} (found "
            f"{sorted(schema.names)}); pass the --embedding-column that it was written with"
        )


def _engines_of(found: list[_Found]) -> list[dict[str, Any]]:
    """Each engine that computed a vector once, however often it was reused since."""
    engines = [
        engine
        for item in found
        for entry in item.computed_by
        for engine in (entry.get("computed_by", []) if entry.get("engine") == REUSED else [entry])
    ]
    distinct = {json.dumps(engine, sort_keys=True): engine for engine in engines}
    return [distinct[key] for key in sorted(distinct)]


def _names(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more
