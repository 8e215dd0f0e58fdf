"""The embedders that benchmarks/embed_peers.py compares: their environments, their workers, and who runs when.

`peers` lists them, `environments` installs them, `corpus` makes the text, `turns` has workers take turns, `jobs` runs
whole jobs. `workers/` runs inside a peer's own environment and imports nothing of the rest.
"""
