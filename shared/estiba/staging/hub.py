"""From the model hub to S3, a file at a time: a disk with room for the largest file is enough.

Every file is compared with the hub's own digest. What S3 holds already under that digest is not downloaded again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import xxhash

from estiba.errors import ConfigError, StoreError, first_line
from estiba.log import get_logger
from estiba.staging.uploads import PARTS_IN_FLIGHT, UploadResult, report
from estiba.storage import open_store
from estiba.storage.s3 import S3ObjectStore

logger = get_logger(__name__)

SCHEME = "hf://"
METADATA = "hub-digest"


def upload_model(source: str, url: str) -> UploadResult:
    """Copy `hf://ORG/NAME` or `hf://ORG/NAME@REVISION` to an s3:// URL. Raises ConfigError, StoreError.

    Endpoint and token are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN.
    """
    started = time.monotonic()
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ConfigError(
            f"{source}: this image has no huggingface_hub; install it, or use an image that has it"
        ) from None
    repository, _, revision = source.removeprefix(SCHEME).strip("/").partition("@")
    store = open_store(url)
    if not isinstance(store, S3ObjectStore):
        raise ConfigError(f"{url}: a model of the hub is staged to s3://BUCKET/PREFIX first, and from there to hosts")
    work = Path(tempfile.gettempdir()) / f"estiba-hub-{xxhash.xxh3_64_hexdigest(source.encode())}"
    files = size_bytes = sent_bytes = 0
    try:
        info = HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        for file in info.siblings or ():
            digest = file.lfs.sha256 if file.lfs else str(file.blob_id)
            files, size_bytes = files + 1, size_bytes + int(file.size or 0)
            if store.metadata(file.rfilename).get(METADATA) == digest:
                continue
            path = Path(hf_hub_download(repository, file.rfilename, revision=info.sha, local_dir=work))
            _verify(path, digest, f"{source}/{file.rfilename}")
            sent_bytes += store.upload(
                file.rfilename, path, resume=True, in_flight=PARTS_IN_FLIGHT, metadata={METADATA: digest}
            )
            path.unlink()
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise StoreError(
            f"{source}: {first_line(error)}; check its name and revision, HF_TOKEN for a private model, HF_ENDPOINT "
            "and the network"
        ) from error
    if not files:
        raise ConfigError(f"{source}: the model has no files; check its name and revision")
    return report(url, files=files, size_bytes=size_bytes, sent_bytes=sent_bytes, started=started)


def _verify(path: Path, digest: str, url: str) -> None:
    """Compare a file with the hub's digest: SHA-256 of a large file, git's blob id of a small one."""
    expected: Any = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(digest) == 40:
        expected.update(f"blob {os.path.getsize(path)}\0".encode())
    with open(path, "rb") as file:
        while data := file.read(2**20):
            expected.update(data)
    if expected.hexdigest() != digest:
        path.unlink()
        raise StoreError(f"{url}: what arrived differs from the hub's digest {digest}; run the same command again")
