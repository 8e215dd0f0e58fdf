"""Text to batches of tokens.

In reading order: `sources` (the files at a path), `documents` (files to documents), `encoder` (documents to token ids),
`packing` (documents to the bytes of a shard), `shards` (the shards of a corpus on disk), `windows` (shards to training
samples), `corpus` (all of it, from a path).
"""
