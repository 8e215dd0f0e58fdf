"""Open one split of a data set: build missing indexes, and check the trials against what the model expects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import xxhash

from brain_to_text.config import BrainConfig
from brain_to_text.data.collate import NO_PADDING, PaddingSpec
from brain_to_text.data.dataset import TrialDataset
from brain_to_text.data.indexing.index import find_objects, open_indexes
from brain_to_text.data.reading.cache import DiskCache, MemoryCache
from brain_to_text.data.reading.h5py_source import H5pySource
from brain_to_text.data.reading.ranges import open_ranges
from brain_to_text.data.reading.reader import Reader
from brain_to_text.data.sampler import NEVER, NextUse, SeededSampler, UpstreamSampler
from brain_to_text.data.schema import Split
from brain_to_text.data.validation import check_trials, choose_sessions
from brain_to_text.model import output_frames
from estiba.log import get_logger
from estiba.memory import available_memory_bytes
from estiba.platform.stop import Stop
from estiba.storage import open_store

logger = get_logger(__name__)
HORIZON_STEPS = 2048
"""How far the caches look ahead. In the full study, a trial is drawn about once in 130 steps."""
TRAIN_SHARE, OTHER_SHARE = 0.4, 0.1
"""Shares of the memory that is left which the caches of the splits take by default."""
BATCHES_IN_FLIGHT = 5
"""Batches that were read and not yet trained on, and free buffers."""


def open_trials(
    config: BrainConfig,
    split: Split,
    stop: Stop,
    *,
    sessions: Sequence[str] | None,
    padding: PaddingSpec = NO_PADDING,
    on_cpu: bool = False,
    rebuild_index: bool = False,
) -> TrialDataset:
    """Open one split. `sessions` None uses every session that has training data, sorted by name.

    `on_cpu` says that the model runs in this memory too, so that the caches leave room for its steps.

    Raises DataError, ConfigError, StoreError for every problem that the index shows; Interrupted.
    """
    store = open_store(config.data_location)
    names, entries = choose_sessions(find_objects(store), sessions, split, store.url)
    indexes = open_indexes(
        config.data_location, entries, store=store, index_path=config.index_path, rebuild=rebuild_index,
        workers=config.num_dataloader_workers, stop=stop,
    )  # fmt: skip
    refs, problems = check_trials(indexes, names, config, split, store)
    skipped = [f"{name}: {problem}" for name, problem in problems.items()]
    for line in skipped:
        logger.info(f"skipped trial ({len(skipped)} in total): {line}")
    sampler, next_use, next_use_of = None, None, lambda _: NEVER
    if split == "train":
        sizes = [sum(ref.day == day for ref in refs) for day in range(len(names))]
        sampler = (UpstreamSampler if config.upstream_plan else SeededSampler)(
            sizes, batch_size=config.batch_size, days_per_batch=config.days_per_batch, seed=config.dataset_seed,
            must_include=config.must_include_days,
        )  # fmt: skip
        next_use = NextUse(sampler, HORIZON_STEPS)
        next_use_of = next_use.next_use
    digests, used, subset = [index.digest for index in indexes], [ref.name for ref in refs], config.feature_subset
    disk = None
    if config.disk_cache_dir is not None:
        content = [[str(index.version) for index in indexes], digests, used, [*problems], [*(subset or ())]]
        identity = xxhash.xxh3_64_hexdigest(repr(content).encode())
        disk = DiskCache(Path(config.disk_cache_dir), round(config.disk_cache_gb * 1e9), next_use_of, identity=identity)
    source = H5pySource(store, config.num_dataloader_workers) if config.reader == "h5py" else open_ranges(store)
    needed = step_bytes(config, [ref.layout.shape for ref in refs], on_cpu=on_cpu)
    share = TRAIN_SHARE if split == "train" else OTHER_SHARE
    memory = MemoryCache(cache_bytes(config.cache_gb, share, needed), next_use_of)
    # Its digest is part of every checkpoint, so neither the order nor the content of this list may change.
    trained_on = [digests, names, split, used, [*problems], config.dataset_seed, config.batch_size,
                  config.days_per_batch, config.upstream_plan, [*(subset or ())],
                  [*(config.must_include_days or ())]]  # fmt: skip
    return TrialDataset(
        refs, Reader(refs, source, memory=memory, disk=disk, feature_subset=subset, stop=stop),
        sessions=names, sampler=sampler, next_use=next_use,
        identity=xxhash.xxh3_128_hexdigest(repr(trained_on).encode()), ahead_batches=config.ahead_batches,
        skip_bad=config.on_bad_trial == "skip", skipped=skipped, padding=padding, stop=stop,
    )  # fmt: skip


def cache_bytes(limit_gb: float | None, share: float, needed_bytes: int) -> int:
    """Return the limit of a cache; None is a share of the memory that is left, but never of what the steps need."""
    if limit_gb is not None:
        return round(limit_gb * 1e9)
    left_bytes = available_memory_bytes() or 0
    return max(0, min(int(left_bytes * share), left_bytes - needed_bytes))


def step_bytes(config: BrainConfig, shapes: Sequence[tuple[int, ...]], *, on_cpu: bool) -> int:
    """Return about how much memory the longest batch needs, from its trials being read to the end of its step."""
    longest = max(shape[0] for shape in shapes)
    width = shapes[0][1] if config.feature_subset is None else len(config.feature_subset)
    batch = 4 * config.batch_size * longest * width
    reading = (config.ahead_batches + 1 + BATCHES_IN_FLIGHT) * batch
    if not on_cpu:
        return reading
    frames = 4 * config.batch_size * max(1, output_frames(longest, config.patch_size, config.patch_stride))
    patches = 3 * frames * max(1, config.patch_size) * width  # the patches, in the order of time, and their gradient
    states = 8 * frames * config.n_layers * (2 if config.bidirectional else 1) * config.n_units
    return reading + 10 * batch + patches + states + 5 * frames * config.n_classes
