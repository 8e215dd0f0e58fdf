"""Find the HDF5 objects of a data set, and load, build and publish their index files.

An index is published once next to the data, as `.estiba-index/<session>.<split>.<kind>.index`, and used by every run.
It is valid only for the version of the object that it describes. If that location is read-only, and for local files, it
is kept in a cache folder of this machine.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from brain_to_text.data.indexing.index_file import ObjectIndex, dumps, loads
from brain_to_text.data.indexing.scan import ScanResult
from brain_to_text.data.indexing.scan_pool import scan_all
from brain_to_text.data.schema import ObjectVersion, parse_path
from estiba.errors import ConfigError, DataError, StoreError
from estiba.log import get_logger
from estiba.platform.stop import Stop
from estiba.storage import Entry, FileStore, Store, open_store

logger = get_logger(__name__)

FOLDER = ".estiba-index"
LOADING_THREADS = 32


def find_objects(store: Store) -> list[Entry]:
    """Return every data_{train,val,test}.hdf5 below the location. Raises DataError, ConfigError if there is none."""
    entries = store.list()
    objects = [entry for entry in entries if parse_path(entry.path) and not entry.path.startswith(FOLDER)]
    for entry in objects:
        if entry.path != entry.path.encode(errors="ignore").decode():
            raise DataError(f"{store.url}: the name {entry.path!r} is not valid text; rename it")
    if objects:
        return objects
    if not entries:
        raise ConfigError(
            f"{store.url}: is empty or does not exist; check the bucket and the prefix. In a container, mount "
            "the sessions (-v DIR:/opt/ml/input/data/dataset) or call their channel dataset"
        )
    examples = ", ".join(entry.path for entry in entries[:3])
    raise DataError(
        f"{store.url}: no SESSION/data_train.hdf5 below it (found {len(entries)} other objects, such as {examples}); "
        "give the folder that holds the sessions, such as t15.2023.08.11"
    )


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
    """Return the index of every entry, in their order. Builds and publishes missing ones.

    Raises DataError if an object is not the version that was indexed, StoreError, Interrupted.
    """
    index_stores = _index_stores(location, store, index_path)
    versions = {entry.path: _version(store, entry) for entry in entries}
    indexes: dict[str, ObjectIndex] = {}
    if not rebuild:
        with ThreadPoolExecutor(LOADING_THREADS, "brain-index") as pool:
            for index in pool.map(lambda entry: _load(index_stores, entry.path, versions[entry.path], store), entries):
                if index is not None:
                    indexes[index.path] = index
    missing = [entry for entry in entries if entry.path not in indexes]
    if missing:
        if len(missing) > 1:
            logger.info(
                f"indexing {len(missing)} HDF5 files in {store.url}; later runs use the index in {index_stores[0].url}"
            )
        # A local folder is a job's input and is never written to.
        writable = index_stores[:1] if isinstance(store, FileStore) else list(index_stores)

        def publish(scanned: ScanResult) -> None:
            entry = store.head(scanned.path)
            if entry is None or _version(store, entry) != versions[scanned.path]:
                raise DataError(
                    f"{store.url_of(scanned.path)}: changed or disappeared while it was being indexed; run again when "
                    "it is complete"
                )
            indexes[scanned.path] = _publish(writable, scanned, versions[scanned.path], store, replace=rebuild)

        scan_all(location, missing, workers=workers, stop=stop, on_result=publish)
    return [indexes[entry.path] for entry in entries]


def _version(store: Store, entry: Entry) -> ObjectVersion:
    if isinstance(store, FileStore):
        return ObjectVersion.from_file(store.path_of(entry.path))
    return ObjectVersion.from_entry(entry, store.url_of(entry.path))


def _index_stores(location: str, store: Store, index_path: str | os.PathLike[str] | None) -> list[Store]:
    """Return where indexes may be, in order of preference."""
    if index_path is not None:
        return [open_store(index_path)]
    beside_data, on_machine = open_store(f"{location.rstrip('/')}/{FOLDER}"), FileStore(_cache_folder(store))
    # A job does not write to its input, and local files are indexed within seconds.
    return [on_machine, beside_data] if isinstance(store, FileStore) else [beside_data, on_machine]


def _cache_folder(store: Store) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()) / "estiba-index"
    return cache / xxhash.xxh3_64_hexdigest(store.url.encode())


def forget(folder: Path) -> None:
    """Delete this machine's index of a folder whose files were replaced."""
    shutil.rmtree(_cache_folder(FileStore(folder)), ignore_errors=True)


def _index_name(path: str, version: ObjectVersion) -> str:
    """Return a file name that is unique for each path: slashes are escaped, so they differ from dots in a name."""
    folder, _, file = path.rpartition("/")
    return f"{folder.replace('%', '%25').replace('/', '%2F')}.{file.removesuffix('.hdf5')}.{version.kind}.index"


def _load(index_stores: list[Store], path: str, version: ObjectVersion, store: Store) -> ObjectIndex | None:
    name = _index_name(path, version)
    mismatch: DataError | None = None
    for index_store in index_stores:
        data = _read(index_store, name)
        if data is None:
            continue
        try:
            index = loads(data)
        except ValueError as error:
            logger.warning(f"{index_store.url_of(name)}: {error}; building it again")
            continue
        if index.path == path and index.version.is_same_content(version):
            return index
        if index.path != path or version.is_elsewhere(index.version):
            if version.kind == "etag":  # a bucket is expensive to index, so say why
                logger.info(
                    f"{index_store.url_of(name)}: describes {index.version.place}; indexing {store.url_of(path)} again"
                )
            continue
        # The next store may have the right one, if this one was read-only when the index was built again.
        mismatch = mismatch or DataError(
            f"{store.url_of(path)}: is not the object that was indexed: expected {index.version}; found {version}. "
            f"Restore the old object; or, to use the new one, index it again (`brain-to-text index {store.url} "
            f"--rebuild`, or delete {index_store.url_of(name)}). Interrupted runs then see a different data set"
        )
    if mismatch is not None:
        raise mismatch
    return None


def _read(index_store: Store, name: str) -> bytes | None:
    is_local = isinstance(index_store, FileStore)
    try:
        return index_store.read(name) if not is_local or index_store.head(name) else None
    except StoreError as error:
        # This user may not read it: try the next store, or build the index.
        if isinstance(error.__cause__, FileNotFoundError) or is_local or "denied" in str(error):
            return None
        raise


def _publish(
    index_stores: list[Store], scanned: ScanResult, version: ObjectVersion, store: Store, *, replace: bool
) -> ObjectIndex:
    """Write an index to the first store that accepts it, and remove stores that do not from the list."""
    data, name = dumps(scanned, version), _index_name(scanned.path, version)
    index = loads(data)
    while index_stores:
        target = index_stores[0]
        try:
            if replace or not (target.write_new(name, data) or _is_published(target, name, index, store)):
                target.write(name, data)
            break
        except StoreError as error:
            index_stores.pop(0)
            if index_stores:
                logger.info(f"keeping the index in {index_stores[0].url}, because {error}")
            else:
                logger.warning(f"the index cannot be stored anywhere, so the next run will build it again: {error}")
    return index


def _is_published(index_store: Store, name: str, index: ObjectIndex, store: Store) -> bool:
    """Return whether another run published this index; False if the existing file is damaged or describes a copy."""
    try:
        published = loads(index_store.read(name)).version
    except ValueError:
        return False
    is_same = published.is_same_content(index.version)
    if not is_same and not index.version.is_elsewhere(published):
        raise DataError(
            f"{store.url_of(index.path)}: another run indexed it as {published}, this one as {index.version}; run "
            "again when nothing writes to it"
        )
    return is_same
