"""Saved work that verifies itself.

For work that ends in pieces (`pieces`): finished pieces under names that hold their digests, and a small ledger.
For tensors, in reading order: `tree` (a state as tensors and a skeleton), `layout` (safetensors bytes), `arena` (memory
that another process can write from), `directory` (one checkpoint: published whole, verified on load), `retention`,
`remote` (S3), `writer` (the process that writes), `saver` (what a training loop holds), `exports` (.pt files).
"""

from estiba.checkpoint.pieces import SUFFIX, Ledger, Pieces, digest_of, exclusive

__all__ = ["SUFFIX", "Ledger", "Pieces", "digest_of", "exclusive"]
