"""The job from start to end.

Work is done in chunks. A finished chunk is committed under a key that names its content, so a job that was stopped or
killed finds it again, on this host or on another one. Outputs are published whole, from chunks.
"""

from __future__ import annotations

import time

import xxhash

from estiba.checkpoint import ChunkStore, exclusive
from estiba.log import get_logger
from estiba.paths import writable
from estiba.platform.contract import Job
from estiba.platform.stop import Stop
from estiba.progress import Progress
from estiba.storage import FileStore, open_store
from new_image.artifacts import OUTPUT_SUFFIX, records, write_results
from new_image.config import CountConfig
from new_image.data import chunks_of, list_files

logger = get_logger(__name__)


def count(config: CountConfig, job: Job, stop: Stop) -> None:
    """Run the job. Raises EstibaError; Interrupted on a stop, with what is saved."""
    started = time.monotonic()
    source, files = list_files(config.input_path, job)
    target, saved = open_store(config.output_path), open_store(config.checkpoint_path)
    for store, flag in ((target, "--output-path"), (saved, "--checkpoint-path")):
        if isinstance(store, FileStore):
            writable(store.root, flag)
    with exclusive(saved, f"new-image-{job.current_host}"):
        chunks = ChunkStore(saved, "new-image")
        resumed = len(chunks.keys())
        logger.info("%d files%s", len(files), f"; resuming: {resumed} chunks are saved" if resumed else "")
        computed = 0
        progress = Progress(total=len(files), unit="files")
        for file in files:
            with target.writer(file.path + OUTPUT_SUFFIX) as output:
                for lines in chunks_of(source, file, config.chunk_lines):
                    if stop():
                        raise stop.interrupted(f"{resumed + computed} chunks are saved in {saved.url}")
                    key = key_of(config, lines)
                    data = chunks.load(key)  # None: missing or damaged
                    if data is None:
                        data = records(lines, longest_word=config.longest_word)
                        chunks.commit(key, data)
                        computed += 1
                    output.write(data)
            progress.advance(1, file=file.path)
        progress.close()
    logger.info(
        write_results(
            target, job, files=len(files), resumed=resumed, computed=computed, seconds=time.monotonic() - started
        )
    )


def key_of(config: CountConfig, lines: list[str]) -> str:
    """Names a chunk by everything its content depends on, so that other input or settings never reuse it."""
    digest = xxhash.xxh3_128(repr(config.longest_word).encode())
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
