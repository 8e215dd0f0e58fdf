"""The training loop that all tensor workloads share.

In reading order: `schedule` (learning rate as a plan), `settings`, `randomness`, `precision`,
`ahead` (batches made before they are asked for), `history` (metrics as lines, JSONL, CSV and event files),
`work` (what a workload gives), `loop` (steps, evaluation, saves, stop, resume), `processes` (one per GPU).
"""
