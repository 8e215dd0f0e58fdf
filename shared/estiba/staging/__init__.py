"""Staging: copy a large model or data set from S3 to local files, fast, verified and resumable, to all hosts at once.

    from estiba.staging import stage

    stage("s3://bucket/models/llama", "/tmp/llama")     # on every host of the job; returns when the files are complete

Each byte leaves S3 once: a host reads its share of the pieces from S3 and gets the others from its peers.
"""

from __future__ import annotations

from estiba.staging.run import StageResult, stage
from estiba.staging.uploads import UploadResult, upload

__all__ = ["StageResult", "UploadResult", "stage", "upload"]
