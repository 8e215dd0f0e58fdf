"""The job layer of every Estiba image.

Read in this order: `errors`, `platform/contract` (the job's directories), `config` (its settings), `platform/stop` (how
many seconds are left), `storage` (bytes by URL), `checkpoint` (bytes that verify), `progress` and `log`,
`platform/workload` (the entry point of an image), `platform/entry` (PID 1), `training` (fit, trainer, task).
"""

__version__ = "0.1.0"
