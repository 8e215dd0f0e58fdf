"""The job layer: what every Estiba image knows about the place it runs in.

Read in this order: `errors`, `contract` (where things are), `config` (what was asked), `stop` (how long is left),
`store` (bytes, by URL), `checkpoint` (bytes that verify), `progress` (what it is doing), `workload` (one run of a
workload), `entry` (PID 1).
"""

__version__ = "0.1.0"
