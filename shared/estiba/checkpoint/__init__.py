"""Saved work that verifies itself.

For work that finishes in parts, `chunks`: parts with their digest in the name, and a small ledger.
For training states, in reading order: `tree_spec` (a state as tensors and JSON), `layout` (safetensors bytes),
`staging` (memory that another process writes from), `snapshot` (a state copied there), `format` (one checkpoint:
published atomically, verified on load), `retention`, `disk`, `remote` (S3), `writer` (a process) and
`writer_process` (the trainer's side of it), `restore`, `manager` (the trainer's interface) and `exports` (.pt files).
"""

from estiba.checkpoint.chunks import SUFFIX, ChunkStore, Ledger, digest_of, exclusive

__all__ = ["SUFFIX", "ChunkStore", "Ledger", "digest_of", "exclusive"]
