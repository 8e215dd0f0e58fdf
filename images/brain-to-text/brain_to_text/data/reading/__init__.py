"""Read trials from S3 or files, ahead of their step, through caches in memory, on disk and on the device."""
