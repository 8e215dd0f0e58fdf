"""Training for all images, in reading order.

`task` (what an image implements), `config`, `schedule` (learning rates), `precision`, `prefetch`, `metrics`,
`throughput`, `rng`, `fingerprint` (what a resume must not change), `saving` (when to checkpoint), `trainer` (steps,
evaluations, stop, resume) and `fit` (the sequence from paths to artifacts that every training image runs).
"""
