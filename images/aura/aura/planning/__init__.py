"""How large a model to train: `presets`, `hardware` (memory and speed), `budget` (sizes for a time), `planner`."""
