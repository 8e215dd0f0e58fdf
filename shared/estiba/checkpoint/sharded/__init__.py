"""Checkpoints of a model that is sharded over the ranks of several hosts: `format` describes them, read it first.

manager      what a trainer calls, as `estiba.checkpoint.manager`
writer       the process that writes one rank's parts and copies them to S3
receipts     how the main rank learns that every part is written
restore      ranges of all parts, for any number of ranks
retention    which to keep
"""
