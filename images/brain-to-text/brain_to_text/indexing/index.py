"""The byte index: where every trial's features lie, with labels and attributes inlined, one file for each HDF5 object.

It is kept beside the data, `.estiba-index/<session>.<split>.<kind>.index`, published once and used by every run. Each
says which version of its object it describes, and is refused where the object is another one now. Where that place
cannot be written, and for local files, it is kept in a folder of this machine instead.

    estiba-h5-index 1 <xxh3-128 of the rest>\\n<zlib of JSON>
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from brain_to_text.indexing.schema import Placement, Split, Trial, session_of
from brain_to_text.indexing.survey import Survey
from brain_to_text.indexing.surveyors import survey_all
from estiba.errors import ConfigError, DataError, EstibaError, StoreError
from estiba.stop import Stop, say
from estiba.store import Entry, FileStore, Store, open_store

FOLDER = ".estiba-index"
MAGIC = b"estiba-h5-index 1 "
READERS = 32


@dataclass(frozen=True)
class Pin:
    """Which version of an object: its ETag in an object store, size and time of change in a file system."""

    kind: Literal["etag", "mtime"]
    size_bytes: int
    mark: str
    place: str = ""
    """Of a file: where it was. A copy that lies elsewhere is no change."""

    def __str__(self) -> str:
        return f"{'ETag' if self.kind == 'etag' else 'changed at'} {self.mark}, {self.size_bytes:,} bytes"


@dataclass(frozen=True)
class ObjectIndex:
    """One object, all of its trials."""

    path: str
    """Relative to the location of the data."""
    session: str
    split: Split
    pin: Pin
    trials: list[Trial]
    problems: dict[str, str]
    digest: str
    """Of what it says, without the pin: the same for a copy of the object."""


def find_objects(store: Store) -> list[Entry]:
    """Every data_{train,val,test}.hdf5 below the location. Raises DataError where there is none."""
    entries = store.list()
    found = [entry for entry in entries if session_of(entry.path) and not entry.path.startswith(FOLDER)]
    for entry in found:
        if entry.path != entry.path.encode(errors="ignore").decode():
            raise DataError(f"{store.url}: {entry.path!r} is a name with bytes that are no text; rename it")
    if found:
        return found
    if not entries:
        raise ConfigError(
            f"{store.url}: nothing there; check the bucket and the prefix. In a container, mount "
            "the sessions (-v DIR:/opt/ml/input/data/dataset) or name the channel dataset"
        )
    shown = ", ".join(entry.path for entry in entries[:3])
    raise DataError(
        f"{store.url}: no SESSION/data_train.hdf5 below it (found {len(entries)} other objects, such as {shown}); "
        "give the folder that holds the sessions, such as t15.2023.08.11"
    )


def pin_of(store: Store, entry: Entry) -> Pin:
    if isinstance(store, FileStore):
        return file_pin(store.path_of(entry.path))
    return Pin("etag", entry.size_bytes, entry.etag or "")


def file_pin(path: Path) -> Pin:
    """Raises StoreError."""
    try:
        status = path.stat()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; check the path") from None
    return Pin("mtime", status.st_size, str(status.st_mtime_ns), str(path))


def open_indexes(
    location: str,
    entries: Sequence[Entry],
    *,
    store: Store,
    index_path: str | os.PathLike[str] | None,
    rebuild: bool,
    workers: int,
    stop: Stop,
) -> list[ObjectIndex]:
    """The index of every entry, in their order; what is missing is built and published.

    Raises DataError where an object is no longer the one that was indexed, StoreError, Interrupted.
    """
    places = _places(location, store, index_path)
    pins = {entry.path: pin_of(store, entry) for entry in entries}
    found: dict[str, ObjectIndex] = {}
    if not rebuild:
        with ThreadPoolExecutor(READERS, "brain-index") as pool:
            for known in pool.map(lambda entry: _read(places, entry.path, pins[entry.path], store), entries):
                if known is not None:
                    found[known.path] = known
    missing = [entry for entry in entries if entry.path not in found]
    if missing:
        if len(missing) > 1:
            say(f"indexing {len(missing)} HDF5 files in {store.url}, once; {places[0].url} keeps the index")
        # A folder is a job's input, which is only read.
        own = places[:1] if isinstance(store, FileStore) else places
        keeper = _Keeper(own, rebuild)

        def keep(survey: Survey) -> None:
            pin = pins[survey.path]
            now = pin if isinstance(store, FileStore) else _pin_now(store, survey.path)
            if isinstance(store, FileStore):
                now = file_pin(store.path_of(survey.path))
            if now != pin:
                raise DataError(
                    f"{store.url_of(survey.path)}: changed while it was indexed; run again when it is whole"
                )
            found[survey.path] = keeper.keep(survey, pin, store)

        survey_all(location, missing, workers=workers, stop=stop, done=keep)
    return [found[entry.path] for entry in entries]


def _pin_now(store: Store, path: str) -> Pin:
    entry = store.head(path)
    if entry is None:
        raise DataError(f"{store.url_of(path)}: is gone; run again when it is there")
    return pin_of(store, entry)


def _places(location: str, store: Store, index_path: str | os.PathLike[str] | None) -> list[Store]:
    """Where indexes may be, the best place first."""
    if index_path is not None:
        return [open_store(index_path)]
    beside, here = open_store(f"{location.rstrip('/')}/{FOLDER}"), FileStore(_own_place(store))
    # A directory is a job's input, which a job does not write to; and of local files an index is made in seconds.
    return [here, beside] if isinstance(store, FileStore) else [beside, here]


def _own_place(store: Store) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir())) / "estiba-index"
    return cache / xxhash.xxh3_64_hexdigest(store.url.encode())


def forget(folder: Path) -> None:
    """What this machine keeps of a folder whose files were made anew."""
    shutil.rmtree(_own_place(FileStore(folder)), ignore_errors=True)


def _name(path: str, pin: Pin) -> str:
    """Another one for each path: folders above the session are told from dots in a name."""
    folder, _, file = path.rpartition("/")
    return f"{folder.replace('%', '%25').replace('/', '%2F')}.{file.removesuffix('.hdf5')}.{pin.kind}.index"


def _read(places: list[Store], path: str, pin: Pin, store: Store) -> ObjectIndex | None:
    refused: DataError | None = None
    for place in places:
        data = _bytes_of(place, _name(path, pin))
        if data is None:
            continue
        try:
            index = loads(data)
        except ValueError as error:
            say(f"warning: {place.url_of(_name(path, pin))}: {error}; it is made again")
            continue
        if index.path != path or index.pin.place != pin.place:
            continue  # of a copy: that its time is another one is no change
        if index.pin != pin and refused is None:
            # The next place may know this one: made anew where the first could not be written.
            refused = DataError(
                f"{store.url_of(path)}: is not the object that was indexed: expected {index.pin}; found {pin}. Bring "
                "the old one back; or, if the new one is meant, index it anew (brain-to-text's command "
                f"`index {store.url} --rebuild`, or delete {place.url_of(_name(path, pin))}); it is another data set "
                "then, for runs that were interrupted"
            )
        if index.pin == pin:
            return index
    if refused is not None:
        raise refused
    return None


def _bytes_of(place: Store, name: str) -> bytes | None:
    try:
        if isinstance(place, FileStore):
            return place.read(name) if place.head(name) else None
        return place.read(name)
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if isinstance(place, FileStore) or "denied" in str(error):  # not ours to read: the next place, or made again
            return None
        raise


class _Keeper:
    """Publishes indexes in the first place that can be written."""

    def __init__(self, places: list[Store], replace: bool) -> None:
        self._places, self._replace = list(places), replace

    def keep(self, survey: Survey, pin: Pin, store: Store) -> ObjectIndex:
        data = dumps(survey, pin)
        index = loads(data)
        name = _name(survey.path, pin)
        while self._places:
            place = self._places[0]
            try:
                self._publish(place, name, data, index, store)
                return index
            except StoreError as error:
                self._places.pop(0)
                if self._places:
                    say(f"the index is kept in {self._places[0].url}: {error}")
                else:
                    say(f"warning: the index is kept nowhere, so the next run makes it again: {error}")
        return index

    def _publish(self, place: Store, name: str, data: bytes, index: ObjectIndex, store: Store) -> None:
        if not self._replace and place.write_new(name, data):
            return
        if not self._replace:  # another run was first, or what is there is damaged or of a copy
            with contextlib.suppress(ValueError):
                there = loads(place.read(name))
                if there.pin == index.pin:
                    return
                if there.pin.place == index.pin.place:
                    raise DataError(
                        f"{store.url_of(index.path)}: another run indexed it as {there.pin}, this one as {index.pin}; "
                        "run again when nobody writes it"
                    )
        place.write(name, data)


def dumps(survey: Survey, pin: Pin) -> bytes:
    body = {
        "path": survey.path,
        "trials": [_packed(trial) for trial in survey.trials],
        "problems": survey.problems,
    }
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    document = {
        "pin": [pin.kind, pin.size_bytes, pin.mark, pin.place],
        "digest": xxhash.xxh3_128_hexdigest(text.encode()),
        "body": body,
    }
    packed = zlib.compress(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode(), 6)
    return MAGIC + xxhash.xxh3_128_hexdigest(packed).encode() + b"\n" + packed


def loads(data: bytes) -> ObjectIndex:
    """Raises ValueError for what is no index of this form, or is damaged."""
    head, _, packed = data.partition(b"\n")
    if not head.startswith(MAGIC):
        raise ValueError("not an index that this version reads")
    if head[len(MAGIC) :].decode(errors="replace") != xxhash.xxh3_128_hexdigest(packed):
        raise ValueError("its bytes do not match its digest")
    try:
        document = json.loads(zlib.decompress(packed))
        body = document["body"]
        named = session_of(body["path"])
        if named is None:
            raise ValueError(f"it is of {body['path']!r}, which is no session's file")
        return ObjectIndex(
            path=body["path"],
            session=named[0],
            split=named[1],
            pin=Pin(*document["pin"]),
            trials=[_unpacked(item) for item in body["trials"]],
            problems=body["problems"],
            digest=document["digest"],
        )
    except (KeyError, IndexError, TypeError, AttributeError, zlib.error) as error:
        raise ValueError(f"not an index that this version reads ({type(error).__name__}: {error})") from None


def _packed(trial: Trial) -> list[Any]:
    labels, phonemes = trial.labels, trial.phoneme_labels
    return [
        trial.name,
        None if trial.features is None else _packed_placement(trial.features),
        trial.n_time_steps,
        None if labels is None else labels.tolist(),
        trial.label_length,
        None if phonemes is None else phonemes.tolist(),
        trial.phoneme_length,
        trial.transcription,
        trial.sentence,
        trial.block,
        trial.number,
    ]


def _unpacked(item: list[Any]) -> Trial:
    name, features, steps, labels, length, phonemes, phoneme_length, *rest = item
    return Trial(
        name,
        None if features is None else _unpacked_placement(features),
        steps,
        None if labels is None else np.asarray(labels, np.int64),
        length,
        None if phonemes is None else np.asarray(phonemes, np.int64),
        phoneme_length,
        *rest,
    )


def _packed_placement(found: Placement) -> list[Any]:
    inline = None if found.inline is None else base64.b85encode(found.inline).decode()
    return [found.shape, found.dtype, found.offset, found.chunk_shape, found.chunks, found.filters, inline,
            found.fill.hex()]  # fmt: skip


def _unpacked_placement(item: list[Any]) -> Placement:
    shape, dtype, offset, chunk_shape, chunks, filters, inline, fill = item
    return Placement(
        shape=tuple(shape),
        dtype=dtype,
        offset=offset,
        chunk_shape=None if chunk_shape is None else tuple(chunk_shape),
        chunks=tuple((tuple(first), at, size, mask) for first, at, size, mask in chunks),
        filters=tuple((code, flags, tuple(values)) for code, flags, values in filters),
        inline=None if inline is None else base64.b85decode(inline),
        fill=bytes.fromhex(fill),
    )


def command(arguments: Sequence[str]) -> int:
    """`brain-to-text index LOCATION`: build what is missing, and say what there is."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m brain_to_text index", description=command.__doc__)
    parser.add_argument("location", help="s3://BUCKET/PREFIX, file:///DIR or a folder, which holds the sessions")
    parser.add_argument("--index-path", help="keep the index here instead of beside the data")
    parser.add_argument("--rebuild", action="store_true", help="make it anew, also where there is one")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    try:
        store = open_store(options.location)
        entries = find_objects(store)
        stop = Stop().install()
        indexes = open_indexes(
            options.location, entries, store=store, index_path=options.index_path, rebuild=options.rebuild,
            workers=options.workers, stop=stop,
        )  # fmt: skip
    except EstibaError as error:
        say(f"error: {error}")
        return error.exit_code
    for index in indexes:
        print(f"{index.path}  {len(index.trials)} trials, {len(index.problems)} that cannot be read  {index.pin}")
    return 0
